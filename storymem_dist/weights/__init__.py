"""Weights as files: found, checked, downloaded, inspected, prepared, and streamed into modules.

``bundle`` opens all that a job needs. ``loading`` streams rows of safetensors into a module and merges LoRAs. The
modules are in ``models``; nothing here computes a pixel.
"""
