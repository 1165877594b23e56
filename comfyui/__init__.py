"""StoryMem nodes for ComfyUI: put or link this folder into ``custom_nodes``; docs/comfyui.md says more."""

import sys
from importlib.util import find_spec


async def comfy_entrypoint() -> object:
    """Return the extension. Raises ``ImportError``, which ComfyUI logs as one line, without ``storymem_dist``."""
    if find_spec("storymem_dist") is None:
        raise ImportError(
            "the StoryMem nodes need the package storymem_dist in the Python of this ComfyUI; install it with:"
            f' "{sys.executable}" -m pip install PATH_OF_THE_CHECKOUT_OF_STORYMEM_DIST'
        )
    from .nodes import StoryMemExtension

    return StoryMemExtension()
