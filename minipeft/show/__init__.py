"""A user's own model, looked at: the memory of a step, its time, and the changes that an adapter makes."""
