"""The linear layers of a mixture's experts, all in one operation: see `op`."""
