"""The best layout for a job on given hardware: what each candidate needs of memory and time, and which one wins.

Needs no device: sizes, the models of memory and time, and a simulation of the dispatch. ``candidates`` says which
layouts are looked at, ``figures`` what each of them needs, ``fitting`` what helps where one does not fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from storymem_dist.errors import ConfigError
from storymem_dist.observe.run.format import count, duration, percent
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.calibration import Constants, load_constants
from storymem_dist.planner.candidates import candidates, pins
from storymem_dist.planner.figures import Figures
from storymem_dist.planner.fitting import nearest_possible, shortfall, with_remedies
from storymem_dist.planner.hardware import Hardware
from storymem_dist.planner.job import CONTINUATION, FIRST, Option, PhaseFigures, PlanJob
from storymem_dist.planner.timing import TimeModel

__all__ = ["CONTINUATION", "FIRST", "Option", "PhaseFigures", "Plan", "PlanJob", "make_plan"]

_ALWAYS_SIMULATED = 3
"""Options that are simulated in any case: the winner and the runners-up that are shown first."""

_AS_GOOD = 1.005
"""Options that take at most this many times the least time are as good: the simplest of them comes first."""


RESIDENCIES = ("resident", "swap", "stream")
"""Of the experts, the simplest first."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All options of a job, best first: those that fit by their makespan, then those that do not, the nearest first.

    ``pins``: the settings that the user fixed, as ``parallel.cfg=2``. ``sources``: where the constants of the model
    come from and how old they are, a sentence each. ``reasons``: why the best one is the best, or what would be
    possible where nothing fits, a sentence each.
    """

    hardware: Hardware
    num_stories: int
    num_shots: int
    options: tuple[Option, ...]
    pins: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def best(self) -> Option | None:
        """The best option that fits, or None."""
        return next((option for option in self.options if option.fits), None)


def make_plan(
    job: PlanJob,
    hardware: Hardware,
    parallel: ParallelSettings,
    constants: Constants | None = None,
) -> Plan:
    """Return all options of ``job`` on ``hardware``, best first.

    Axes of ``parallel`` that are ``"auto"`` are free, numbers are pinned; the same holds for ``weights``, ``compile``
    and ``model.experts``. ``constants``: those of the device (None: ``load_constants``).

    An option is simulated unless even its bound is as good only as what was simulated before, so no better one is
    missed. Raises ``ConfigError`` for a job without shots, and ``LayoutError`` where what is pinned cannot be formed.
    """
    if not job.num_shots:
        raise ConfigError(
            "there is no shot to plan; the nearest possible thing is a job of one story with one shot, such as "
            "stories=examples stories.max_stories=1 stories.max_shots=1"
        )
    constants = constants or load_constants(hardware)
    figures = Figures(job, hardware, TimeModel(hardware=hardware, constants=constants))
    options = [figures.option(candidate) for candidate in candidates(job, hardware, parallel)]
    fitting = _ranked([option for option in options if option.fits], figures)
    fitting[1:] = [replace(option, timeline=()) for option in fitting[1:]]
    others = sorted((option for option in options if not option.fits), key=lambda one: shortfall(one, hardware))
    others = with_remedies(others, job, hardware)
    reasons: tuple[str, ...]
    if fitting:
        reasons = tuple(_reasons(fitting, figures))
    else:
        reasons = (nearest_possible(job, hardware, parallel),)
        others[0] = replace(others[0], remedy=reasons[0])
    return Plan(
        hardware=hardware,
        num_stories=len(job.stories),
        num_shots=job.num_shots,
        options=(*fitting, *others),
        pins=pins(job, parallel),
        sources=(str(constants),),
        reasons=reasons,
    )


def _ranked(options: list[Option], figures: Figures) -> list[Option]:
    """``options`` by the time of the job; those that may be the best are simulated."""
    ranked: list[Option] = []
    best = float("inf")
    for option in sorted(options, key=lambda one: one.bound_seconds):
        if _AS_GOOD * option.bound_seconds < best or len(ranked) < _ALWAYS_SIMULATED:
            option = figures.simulated(option)
            best = min(best, option.makespan_seconds)
        ranked.append(option)
    return sorted(ranked, key=lambda one: _order(one, best))


def _order(option: Option, best: float) -> tuple[float, ...]:
    """By time; but simple layouts first among those that are as good as the best one.

    What was not simulated comes after all that is as good.
    """
    width, residency = option.parallel.ranks_per_replica, RESIDENCIES.index(option.model.experts)
    simplicity = (width, option.parallel.weights != "replicated", residency)
    if option.simulated and option.makespan_seconds <= _AS_GOOD * best:
        return (0, *simplicity, option.makespan_seconds)
    return (1, max(option.makespan_seconds, best), *simplicity)


def _reasons(fitting: list[Option], figures: Figures) -> Iterator[str]:
    """Why the first of the options that fit is the best."""
    best = fitting[0]
    work, path = figures.work_and_path(best)
    if path > work:
        yield (
            f"the longest story binds: its shots wait for each other and take {duration(path)}, while all work is "
            f"{duration(work)} for each of {count(best.num_replicas, 'replica')}"
        )
    else:
        yield f"the work of all shots binds: {duration(work)} for each of {count(best.num_replicas, 'replica')}"
    width = best.parallel.ranks_per_replica
    other = next((one for one in fitting if one.parallel.ranks_per_replica != width), None)
    if other is not None:
        wider = "wider" if other.parallel.ranks_per_replica > width else "narrower"
        more = other.makespan_seconds / best.makespan_seconds - 1.0
        least = "" if other.simulated else "at least "
        longer = "about as long" if abs(more) < _AS_GOOD - 1 else f"{percent(more)} longer"
        yield (
            f"the best of {wider} replicas ({other.num_replicas} of {other.parallel.ranks_per_replica}) takes "
            f"{least}{duration(other.makespan_seconds)}, {longer}"
        )
