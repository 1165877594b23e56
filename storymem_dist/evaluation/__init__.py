"""Scores the clips, stories and runs of a run folder: for ``storymem-score`` and ``evaluation=on_finish``."""
