"""A run as its observers see it: the state that follows from its events, its files, and numbers as text."""
