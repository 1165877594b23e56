"""A run as observers see it: its state folded from events, its files, its speed, and numbers as text."""
