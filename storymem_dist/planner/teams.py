"""How much faster a shot is when several replicas render it together, by the model of times."""

from collections.abc import Mapping
from dataclasses import replace

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.planner.timing import TimeModel
from storymem_dist.weights.settings import ModelSettings


def team_speedups(
    time: TimeModel,
    teams: Mapping[int, ParallelSettings],
    parallel: ParallelSettings,
    model: ModelSettings,
    dit_config: DiTConfig,
    sampler: SamplerSettings,
    kind: str,
    num_keyframes: float,
) -> dict[int, float]:
    """Return, for each size of a team, its speed over that of one replica of layout ``parallel``.

    ``teams`` maps sizes to layouts (``parallel.merging.merged_settings``). For a shot of ``kind`` with
    ``num_keyframes``, from its text to the end of its decoding. Where a team spreads tokens in another way than its
    replicas, it runs eager code.
    """

    def seconds(layout: ParallelSettings) -> float:
        return time.shot_seconds(layout, model, dit_config, sampler, kind, num_keyframes).busy

    alone = seconds(parallel)
    return {size: alone / seconds(as_team(team, parallel)) for size, team in teams.items()}


def as_team(team: ParallelSettings, parallel: ParallelSettings) -> ParallelSettings:
    """Return the layout ``team`` as replicas of ``parallel`` run it: eager where it spreads tokens in another way."""
    return team if team.axes[1:] == parallel.axes[1:] else replace(team, compile=False)
