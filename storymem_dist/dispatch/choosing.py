"""Which ready shot a replica renders next, given the experts and LoRAs that it has loaded. Knows the graph only."""

from collections.abc import Callable

from storymem_dist.dispatch.graph import ShotGraph
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.story_graph import ShotStatus
from storymem_dist.story.modes import GIVEN, M2V, T2V


def choose_shot(
    graph: ShotGraph,
    loaded: str | None,
    *,
    num_replicas: int,
    expected_wait: Callable[[str], float],
    swap_seconds: float,
    saving: PlannedShot | None = None,
    lora_key: str = "",
) -> PlannedShot | None:
    """Return the shot that a replica with the experts of kind ``loaded`` should render next; None: wait.

    A given clip comes before all: it needs no experts and little time, and others may wait for it. Then a shot for the
    loaded experts, unless one of the others is of a story with a lower priority; with none loaded, a T2V shot (it opens
    a story). If no shot for the loaded experts is ready, the replica swaps them, unless ``expected_wait(loaded)``, the
    seconds until one will be ready, is less than two swaps take. ``saving`` is the shot that this replica is saving. If
    a shot that waits for it alone needs the loaded experts, the replica waits for it when it is urgent, and does not
    swap experts before it is ready. Among shots for the same experts, those with the LoRAs of ``lora_key`` come first,
    unless another is urgent.
    """

    def best(kind: str) -> PlannedShot | None:
        return _best(graph, kind, lora_key, num_replicas)

    if (given := graph.best_ready(GIVEN, num_replicas)) is not None:
        return given
    if loaded is None:
        return _more_urgent(graph, best(M2V), best(T2V))
    freed = graph.freed_by(saving) if saving is not None else []
    follows = [shot for shot in freed if shot.kind == loaded]
    if any(graph.cannot_wait(shot, num_replicas) for shot in follows):
        return None
    shot, other = best(loaded), best(M2V if loaded == T2V else T2V)
    if follows and shot is not None and graph.priority(follows[0]) < graph.priority(shot):
        return None
    if shot is not None:
        return _more_urgent(graph, other, shot)
    if other is None:
        return None
    wait = 0.0 if follows else expected_wait(loaded)  # saving takes no time, compared with swapping
    return None if wait < 2 * swap_seconds else other


def likely_order(graph: ShotGraph, num_replicas: int) -> list[PlannedShot]:
    """Return the ready shots and those after them in about the order in which a job will claim them.

    Marks them as committed in ``graph``, which nobody else may use.
    """
    order: list[PlannedShot] = []
    loaded: str | None = None
    lora_key = ""
    while shot := choose_shot(
        graph,
        loaded,
        num_replicas=num_replicas,
        expected_wait=lambda kind: float("inf"),
        swap_seconds=0.0,
        lora_key=lora_key,
    ):
        order.append(shot)
        if shot.kind != GIVEN:
            loaded, lora_key = shot.kind, shot.lora_key
        graph.set_state(shot, ShotStatus.COMMITTED)
    return order


def _best(graph: ShotGraph, kind: str, lora_key: str, num_replicas: int) -> PlannedShot | None:
    first = graph.best_ready(kind, num_replicas)
    if first is None or first.lora_key == lora_key or graph.cannot_wait(first, num_replicas):
        return first
    same = graph.best_ready(kind, num_replicas, lora_key)
    return _more_urgent(graph, first, same)


def _more_urgent(graph: ShotGraph, one: PlannedShot | None, other: PlannedShot | None) -> PlannedShot | None:
    """``one`` if its story has a lower priority than that of ``other``, or there is no other."""
    if one is None or other is None:
        return other if one is None else one
    return one if graph.priority(one) < graph.priority(other) else other
