"""``python -m storymem_dist``: the same as ``storymem-render``."""

from storymem_dist.cli.render import main

if __name__ == "__main__":
    main()
