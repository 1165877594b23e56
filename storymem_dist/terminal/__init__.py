"""The way of every text to a terminal or a log: what it may contain, and that writing it never fails.

``text`` makes the characters of names, prompts and messages visible; ``streams`` holds standard output and standard
error, and is the only module that prints; ``program`` is what every command starts with; ``rich_console`` draws tables
and live views on the same streams. Imports nothing of this package but ``errors``.
"""
