"""Predicts memory and time of a job, and chooses its layout: for ``storymem-plan`` and ``parallel=auto``."""
