"""Storyboards: typed values and loading. Knows nothing about models or rendering."""
