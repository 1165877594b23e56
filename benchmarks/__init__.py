"""The benchmarks: each answers one question about speed, memory, traffic or faults.

    python -m benchmarks.NAME --help      from the repository root

``docs/benchmarks.md`` lists them all. ``harness``, ``ranks``, ``rivals`` and ``narrow_model`` hold what they share.
"""
