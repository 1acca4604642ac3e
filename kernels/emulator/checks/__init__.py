"""Observers that find what a GPU would let pass: each raises one kind of error."""
