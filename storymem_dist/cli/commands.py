"""The installed commands. Each prepares the terminal and interrupts first, then imports what it needs and runs it."""

from storymem_dist.terminal.program import program


def render() -> None:
    """``storymem-render``, ``python -m storymem_dist`` and ``python -m storymem_dist.cli``."""
    with program("storymem-render"):
        from storymem_dist.cli.render import main

        main()


def weights() -> None:
    """``storymem-weights``."""
    with program("storymem-weights"):
        from storymem_dist.cli.weights import main

        main()


def report() -> int:
    """``storymem-report``; returns the exit code."""
    with program("storymem-report"):
        from storymem_dist.cli.report import main

        return main()


def queue() -> int:
    """``storymem-queue``; returns the exit code."""
    with program("storymem-queue"):
        from storymem_dist.cli.queue import main

        return main()


def doctor() -> None:
    """``storymem-doctor``."""
    with program("storymem-doctor"):
        from storymem_dist.cli.doctor import main

        main()


def plan() -> None:
    """``storymem-plan``."""
    with program("storymem-plan"):
        from storymem_dist.cli.plan import main

        main()


def score() -> None:
    """``storymem-score``."""
    with program("storymem-score"):
        from storymem_dist.cli.score import main

        main()
