"""Simulates replicas that share shots by the project's own choice, for ``benchmarks.dispatch``. Renders nothing."""

import heapq
from collections.abc import Sequence

from storymem_dist.dispatch.choosing import choose_shot
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.story_graph import ShotStatus


def simulate(
    stories: Sequence[Sequence[PlannedShot]],
    num_replicas: int,
    seconds_per_tflop: float,
    *,
    swap_seconds: float,
    save_seconds: float,
    overlap: bool,
) -> tuple[float, int]:
    """Return the makespan in seconds and the number of times that experts were loaded."""
    graph = ShotGraph(stories)
    loaded: list[str | None] = [None] * num_replicas
    saving: list[PlannedShot | None] = [None] * num_replicas
    save_ends = [0.0] * num_replicas
    idle = list(range(num_replicas))
    events: list[tuple[float, int, bool, PlannedShot]] = []  # time, replica, save to come?, shot
    now, loads = 0.0, 0

    def expected_wait(kind: str) -> float:
        ends = [
            end + to_save * save_seconds
            for end, _, to_save, shot in events
            if any(freed.kind == kind for freed in graph.freed_by(shot))
        ]
        return min(ends, default=float("inf")) - now

    while True:
        waiting: list[int] = []
        refused: set[str | None] = set()  # nothing gets ready meanwhile: one answer holds for all
        for replica in idle:
            is_saving = saving[replica] is not None
            if not is_saving and loaded[replica] in refused:
                waiting.append(replica)
                continue
            shot = choose_shot(
                graph,
                loaded[replica],
                num_replicas=num_replicas,
                expected_wait=expected_wait,
                swap_seconds=swap_seconds,
                saving=saving[replica],
            )
            if shot is None:
                waiting.append(replica)
                refused |= set() if is_saving else {loaded[replica]}
                continue
            graph.set_state(shot, ShotStatus.LEASED)
            swap = swap_seconds if loaded[replica] != shot.kind else 0.0
            loads += loaded[replica] != shot.kind
            loaded[replica] = shot.kind
            end = now + swap + shot.cost * seconds_per_tflop
            end = max(end, save_ends[replica]) if overlap else end + save_seconds
            heapq.heappush(events, (end, replica, overlap, shot))
        if not events:
            return now, loads
        now, replica, to_save, shot = heapq.heappop(events)
        idle = waiting
        if to_save:
            saving[replica], save_ends[replica] = shot, now + save_seconds
            heapq.heappush(events, (save_ends[replica], replica, False, shot))
        else:
            saving[replica] = None
            graph.set_state(shot, ShotStatus.COMMITTED)
        if to_save == overlap:  # it is free for the next shot
            idle = [*waiting, replica]


def story_level(lengths: Sequence[float], num_replicas: int) -> float:
    """Makespan when the next free replica gets a whole story, the longest story first."""
    free = [0.0] * num_replicas
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def shortest_possible(
    stories: Sequence[Sequence[PlannedShot]], num_replicas: int, seconds_per_tflop: float, save_seconds: float
) -> float:
    """A bound in seconds: one replica's share of the work and a save, or the longest path with its saves."""
    work = seconds_per_tflop * sum(shot.cost for shots in stories for shot in shots)
    saves = save_seconds * sum(map(len, stories))
    longest = 0.0
    for shots in stories:
        ends: list[float] = []
        for shot in shots:
            before = max((ends[need] for need in shot.waits_for), default=0.0)
            ends.append(before + seconds_per_tflop * shot.cost + save_seconds)
        longest = max(longest, *ends)
    return max(work / num_replicas + save_seconds, saves / num_replicas, longest)
