"""The plain simulation of a dispatch, which the planner's fast one must equal: each event asks every idle replica."""

import heapq
from collections.abc import Callable, Sequence

from storymem_dist.dispatch.choosing import choose_shot
from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.planner.tail import Times


def plain_simulation(
    stories: Sequence[Sequence[PlannedShot]],
    num_replicas: int,
    times: Callable[[PlannedShot], Times],
    *,
    swap_seconds: float,
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
            end + to_save * times(shot).save
            for end, _, to_save, shot in events
            if any(freed.kind == kind for freed in graph.freed_by(shot))
        ]
        return min(ends, default=float("inf")) - now

    while True:
        waiting: list[int] = []
        for replica in idle:
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
                continue
            graph.set_state(shot, ShotStatus.LEASED)
            swap = swap_seconds if loaded[replica] != shot.kind else 0.0
            loads += loaded[replica] != shot.kind
            loaded[replica] = shot.kind
            end = now + swap + times(shot).render
            end = max(end, save_ends[replica]) if overlap else end + times(shot).save
            heapq.heappush(events, (end, replica, overlap, shot))
        if not events:
            return now, loads
        now, replica, to_save, shot = heapq.heappop(events)
        idle = waiting
        if to_save:
            saving[replica], save_ends[replica] = shot, now + times(shot).save
            heapq.heappush(events, (save_ends[replica], replica, False, shot))
        else:
            saving[replica] = None
            graph.set_state(shot, ShotStatus.COMMITTED)
        if to_save == overlap:  # it is free for the next shot
            idle = [*waiting, replica]
