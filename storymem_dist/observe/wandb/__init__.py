"""Weights & Biases: ``feed`` sends one run folder's events to one W&B run, ``process`` runs it outside the renderer."""
