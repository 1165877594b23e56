"""``python -m storymem_dist.cli``: the same as ``storymem-render``; launchers start ranks with it."""

from storymem_dist.cli.render import main

if __name__ == "__main__":
    main()
