"""Points: configurations to render, each into a run folder of its own; as plain values, and which of them can join."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from storymem_dist.config.composing import compose_both, to_settings
from storymem_dist.config.schema import RenderConfig


@dataclass(frozen=True, kw_only=True)
class Point:
    """One configuration to render into one run folder: a job has one, a joined sweep several.

    ``plain`` is the same as ``settings``, as nested plain values. ``name`` is the point's name in its sweep.
    """

    settings: RenderConfig
    plain: Mapping[str, Any]
    name: str = ""


def compose_point(overrides: Sequence[str]) -> Point:
    """The point that ``storymem-render OVERRIDES`` would render. Raises ``ConfigError`` as ``compose_settings``."""
    settings, plain = compose_both(overrides)
    return Point(settings=settings, plain=plain)


def points_to_plain(points: Sequence[Point], sweep: str | None) -> dict[str, Any]:
    """Points, and the name of their sweep, as plain values for another process."""
    return {"sweep": sweep, "points": [{"name": point.name, "config": point.plain} for point in points]}


def points_from_plain(plain: Mapping[str, Any]) -> tuple[list[Point], str | None]:
    """The inverse of ``points_to_plain``; every group validates itself again."""
    schema = OmegaConf.structured(RenderConfig)
    points = [
        Point(settings=to_settings(OmegaConf.merge(schema, one["config"])), plain=one["config"], name=one["name"])
        for one in plain["points"]
    ]
    return points, plain["sweep"]


def can_join(one: RenderConfig, other: RenderConfig) -> bool:
    """Whether two points can be parts of one job: same weights, layout, dispatch and debug settings."""

    def shared(settings: RenderConfig) -> tuple[object, ...]:
        # the continuation chooses the StoryMem LoRA, which is merged into the weights
        return settings.model, settings.sampler.continuation, settings.parallel, settings.dispatch, settings.debug

    return shared(one) == shared(other)
