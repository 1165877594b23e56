"""Storyboards: typed values and loading. Knows nothing about models or rendering.

Read in this order: ``schema`` (the values), ``loading`` (from a request to stories), ``parsing`` (files), ``shapes``
and ``listing`` (where stories are in them), ``checking`` (a story), ``shots`` (its shots), ``entities`` and ``recall``.
"""
