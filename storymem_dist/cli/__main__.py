"""``python -m storymem_dist.cli``: the same as ``storymem-render``; launchers start ranks with it."""

from storymem_dist.cli.commands import render

if __name__ == "__main__":
    render()
