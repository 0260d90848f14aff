"""The machine: which target it is, what works on it, which versions it has."""
