"""How often the replicas of a job look at their run folder: rarer as they become more, so the job's rate is bounded.

Each kind of look (for a stop file, for a request, for leases) has a bound for the whole job. A job of a few replicas
looks as often as its settings say. Knows nothing of files.
"""

OPERATIONS_PER_SECOND = 200.0
"""Operations on a run folder in a second that one kind of look may take for all replicas together."""


class Pace:
    """The pace of one replica. ``num_replicas``: how many share the folder, as far as known; kept up to date."""

    def __init__(self, num_replicas: int = 1) -> None:
        self.num_replicas = num_replicas

    def seconds(self, base_seconds: float, num_operations: float = 1.0, *, num_looking: float | None = None) -> float:
        """Return the seconds between two looks: ``base_seconds``, or more where the bound for the job asks for it.

        ``num_operations``: what one look takes. ``num_looking``: how many replicas look, if not all.
        """
        looking = self.num_replicas if num_looking is None else num_looking
        return max(base_seconds, num_operations * looking / OPERATIONS_PER_SECOND)
