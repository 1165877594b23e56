"""storymem_dist: a multi-GPU batch renderer for StoryMem on Wan2.2-A14B.

Importing the package does no work; the public names are loaded on first use.
"""

__version__ = "0.1.0"
