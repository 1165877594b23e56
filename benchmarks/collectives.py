"""How many bytes does a rank send in one denoising step of A14B, compared with the least possible?

    python -m benchmarks.collectives                        # 8 and 16 ranks, 480p, K = 0 and 10 memory keyframes
    python -m benchmarks.collectives --small --ranks 4      # the tiny model and a small picture

The project's own transformer runs on tensors without data, over a process group that sends nothing. The benchmark
counts every collective that it starts. In an all-gather over P ranks, a rank sends its part P - 1 times; in an
all-to-all, it sends everything except its own part. The least number of bytes comes from the sizes alone: no padding
and no second copies. Each cell of the table shows counted / least GB.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.ranks import CPU, simulated_ranks
from storymem_dist.diffusion.experts import Expert
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import TINY, WAN22_A14B
from storymem_dist.parallel.guidance import make_guidance
from storymem_dist.parallel.layout import Layout
from storymem_dist.parallel.mesh import ReplicaMesh
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.settings import ParallelSettings

PARTS = ("ulysses", "ring", "weights", "join", "guidance")
"""In order: heads for tokens, keys and values, FSDP2's weights, the head's output, the velocity of a guidance pass."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One replica and the clip it renders."""

    cfg: int
    ring: int
    ulysses: int
    weights: str
    num_memory: int

    @property
    def layout(self) -> Layout:
        """The mesh of the replica."""
        size = self.cfg * self.ring * self.ulysses
        return Layout(cfg=self.cfg, ring=self.ring, ulysses=self.ulysses, ranks_per_node=size)


def main() -> None:
    """Parse the command line, print the table."""
    args = parse_arguments()
    warnings.filterwarnings("ignore")
    preset = TINY if args.small else WAN22_A14B
    size = (48, 80) if args.small else (480, 832)
    rows = []
    for num_ranks in args.ranks:
        for num_memory in args.memory:
            config = preset.i2v if num_memory else preset.t2v
            grid = LatentGrid(num_frames=81, height=size[0], width=size[1], num_memory=num_memory)
            for case in cases(num_ranks, num_memory, config.num_heads):
                rows.append(row(case, grid, counted_bytes(case, config, grid), least_bytes(case, config, grid)))
    print_table(rows)
    write_json(args.json, "collectives", {"unit": "GB sent per rank and step", "rows": rows}, CPU)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("collectives", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--memory", type=int, nargs="+", default=[0, 10], help="memory keyframes, K (0: T2V, else M2V)")
    parser.add_argument("--small", action="store_true", help="the tiny model and a small picture")
    return parser.parse_args()


def cases(num_ranks: int, num_memory: int, num_heads: int) -> Iterator[Case]:
    """The most Ulysses, a mixture, and no Ulysses; each with and without two guidance passes at once."""
    for cfg in (1, 2):
        sequence = num_ranks // cfg
        divisors = [u for u in range(1, sequence + 1) if sequence % u == 0 and num_heads % u == 0]
        for ulysses in sorted({divisors[-1], divisors[len(divisors) // 2], 1}, reverse=True):
            yield Case(cfg=cfg, ring=sequence // ulysses, ulysses=ulysses, weights="replicated", num_memory=num_memory)
        yield Case(cfg=cfg, ring=sequence // divisors[-1], ulysses=divisors[-1], weights="fsdp", num_memory=num_memory)


def row(case: Case, grid: LatentGrid, counted: Counter[str], least: Counter[str]) -> dict[str, Any]:
    """Counted and least GB of each part."""
    columns: dict[str, Any] = {
        "ranks": case.layout.world_size,
        "K": case.num_memory,
        "tokens": grid.num_tokens,
        "cfg x ring x ulysses": f"{case.cfg} x {case.ring} x {case.ulysses}",
        "weights held": case.weights,
    }
    for part in PARTS:
        columns[part] = f"{counted[part] / 1e9:.4g} / {least[part] / 1e9:.4g}" if counted[part] else ""
    columns["total GB / least"] = f"{counted.total() / 1e9:.4g} / {least.total() / 1e9:.4g}"
    columns["ratio"] = round(counted.total() / least.total(), 4)
    return columns


# ---- counting


def counted_bytes(case: Case, config: DiTConfig, grid: LatentGrid) -> Counter[str]:
    """Bytes that rank 0 sends in one guided step, by part."""
    settings = ParallelSettings(cfg=case.cfg, ring=case.ring, ulysses=case.ulysses, weights=case.weights)
    counts: Counter[str] = Counter()
    with (
        simulated_ranks(case.layout.world_size, layout=case.layout) as mesh,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        dit = parallelize(WanDiT(config), mesh, settings)
        latents = torch.zeros(1, config.in_dim, grid.num_latents, grid.latent_height, grid.latent_width)
        text = torch.zeros(1, config.text_len, config.text_dim, dtype=torch.bfloat16)
        expert = Expert(name="high_noise", module=dit, guidance_scale=3.5)
        with CountSent(mesh, counts):
            make_guidance(mesh).velocity(expert, latents, torch.full((1,), 500), text, text, grid.temporal_positions())
    return counts


class CountSent(TorchDispatchMode):
    """Adds up the bytes that this rank sends, by part. An unknown collective is an error, so no byte is missed."""

    def __init__(self, mesh: ReplicaMesh, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts
        self._cfg = mesh.cfg.group.group_name if mesh.cfg.group is not None else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        c10d = torch.ops.c10d
        if func is c10d.alltoall_base_.default:
            _, sent, group, *_ = args
            size = dist.ProcessGroup.unbox(group).size()
            self._counts["ulysses"] += sent.nbytes * (size - 1) // size
        elif func is c10d.send.default:
            self._counts["ring"] += args[0][0].nbytes
        elif func is c10d._allgather_base_.default:
            _, sent, group, *_ = args
            self._counts["weights"] += sent.nbytes * (dist.ProcessGroup.unbox(group).size() - 1)
        elif func is c10d.allgather_.default:
            _, sent, group, *_ = args
            group = dist.ProcessGroup.unbox(group)
            self._counts["guidance" if group.group_name == self._cfg else "join"] += sent[0].nbytes * (group.size() - 1)
        elif func.namespace == "c10d" and func is not c10d.recv_.default:
            raise NotImplementedError(f"no rule to count {func}")
        return func(*args, **(kwargs or {}))


# ---- the least


def least_bytes(case: Case, config: DiTConfig, grid: LatentGrid) -> Counter[str]:
    """The bytes that a rank must send in one guided step, by part."""
    passes = 2 // case.cfg
    tokens = grid.num_tokens / case.layout.sequence
    activations = tokens * config.dim * 2  # bf16
    values = tokens * config.out_dim * 4 * 4  # a patch of 1 x 2 x 2, fp32
    keys_and_values = 2 * activations  # U times the tokens, 1/U of the heads
    blocks = config.num_layers * passes
    shard = case.layout.ranks_per_replica
    least = {
        "ulysses": blocks * 4 * activations * (case.ulysses - 1) / case.ulysses,  # q, k, v and the output
        "ring": blocks * keys_and_values * (case.ring - 1),
        "weights": passes * weight_bytes(config) * (shard - 1) / shard if case.weights == "fsdp" else 0,
        "join": passes * values * (case.layout.sequence - 1),
        "guidance": 4 * torch.Size(grid.latent_shape).numel() * (case.cfg - 1),
    }
    return Counter({part: round(num_bytes) for part, num_bytes in least.items()})


def weight_bytes(config: DiTConfig) -> int:
    """Bytes of one expert: bf16 matrices, fp32 norms, modulation, time embedding and head."""
    with torch.device("meta"):
        return sum(parameter.nbytes for parameter in WanDiT(replace(config)).parameters())


if __name__ == "__main__":
    main()
