"""``python -m storymem_dist``: the same as ``storymem-render``."""

from storymem_dist.cli.commands import render

if __name__ == "__main__":
    render()
