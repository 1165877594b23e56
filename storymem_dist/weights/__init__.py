"""Weights as files: found, checked, downloaded, inspected, prepared, and streamed into modules.

``bundle`` opens all that a job needs. ``loading`` streams rows of safetensors into a module and merges LoRAs on the
way. ``models`` holds the modules; nothing here computes a pixel.
"""
