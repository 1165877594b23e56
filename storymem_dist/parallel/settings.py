"""Settings of the parallel layout: how many ranks share one forward, and where the weights live.

Plain values only (they come from ``conf/parallel``). ``storymem_dist.parallel.layout`` decides whether they fit the
started ranks; nothing here looks at the machine.
"""

from dataclasses import dataclass
from typing import cast

from storymem_dist.errors import ConfigError, require_between, require_one_of, shown

AUTO = "auto"
"""Of an axis or of ``weights``: free, the planner chooses. A value is pinned."""

FREE = ("cfg", "ring", "ulysses", "weights")
"""The settings that may be ``AUTO``, besides ``compile``."""

WEIGHTS = ("replicated", "fsdp", "fsdp_offload", "zero3")
SHARDED = ("fsdp", "fsdp_offload")  # by FSDP2
OFFLOADED = ("fsdp_offload", "zero3")  # in host memory
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "gloo", "nccl")
SHARD_OVER = ("replica", "sequence")
COMPILE = ("auto", "true", "false")
ZERO3_OFFLOADS = ("cpu",)
_MAX_RANKS = 65_536
_LONGEST_WAIT = 30 * 24 * 3600.0  # a month; timers of the system count further, clusters do not


@dataclass(kw_only=True, slots=True)
class ParallelSettings:
    """One entry of ``conf/parallel``.

    Layout: ``num_replicas`` (None: as many as the started ranks hold), and the axes inside a replica, outermost first:
    ``cfg`` (2 runs the conditional and the unconditional pass in parallel), ``ring`` and ``ulysses`` (sequence
    parallel; ``ulysses`` must divide the number of attention heads). ``across_nodes`` allows one replica to span nodes.
    An axis, and ``weights``, may be "auto": a job then decides it when its ranks have started (``render.choice``), and
    all else here needs numbers.

    Weights: ``replicated`` (every rank holds them whole), ``fsdp`` (FSDP2 shards over all ranks of the replica),
    ``fsdp_offload`` (the shards live in host memory; on one rank, as ``model.experts=stream``), ``zero3`` (DeepSpeed
    ZeRO-3 with the weights in host memory). ``shard_over`` ``sequence`` keeps one copy of sharded weights per guidance
    pass (over ``ring`` x ``ulysses``), so that no weights travel between the two passes: for ``cfg=2`` over two nodes.
    It needs twice the memory. ``zero3_offload`` is ``cpu``, and ``zero3_nvme_path`` is not read: both are kept for
    configurations that set them.
    ``prefetch_blocks`` is the number of blocks that FSDP gathers, or a stream copies, ahead of the one that computes; 0
    makes every block wait for its own. ``share_reads`` lets one rank per node read a part of the weights and broadcast
    it to the ranks of that node that hold the same part. ``compile`` runs the transformer's blocks under torch.compile;
    ``auto`` does so on GPUs where the work ahead is worth it (a job decides that: ``render.compilation``).

    Process groups: ``device`` and ``backend`` ("auto": CUDA with nccl where a GPU is present, else CPU with gloo).
    ``cpu_threads`` is the number of threads of a rank on the CPU: one by default, because the number changes the last
    bits of results, and several ranks or jobs on one machine would compete for cores.
    ``collective_timeout_seconds`` ends a collective that hangs. ``leader_timeout_seconds`` is how long the ranks of a
    replica wait for each other, or for a sign of life from their leader (a working leader sends them).
    ``stall_timeout_seconds`` ends a rank that hangs outside of collectives (in a driver, on a dead file system), also
    in a replica of one rank. Signs of life are: a stage or step begins or ends, weights are read, a leader looks for
    the next shot. So a wait of hours for a shot is no hang, but one denoising step, one decode or one save must take
    less. Reading text encoder and weights may take three times as long. None: no limit, for a debugger.
    """

    num_replicas: int | None = None
    cfg: int | str = 1
    ring: int | str = 1
    ulysses: int | str = 1
    across_nodes: bool = False
    weights: str = "replicated"
    shard_over: str = "replica"
    prefetch_blocks: int = 1
    share_reads: bool = True
    zero3_offload: str = "cpu"
    zero3_nvme_path: str | None = None
    compile: bool | str = "auto"
    device: str = "auto"
    backend: str = "auto"
    cpu_threads: int = 1
    collective_timeout_seconds: float = 600.0
    leader_timeout_seconds: float = 600.0
    stall_timeout_seconds: float | None = 1800.0

    def __post_init__(self) -> None:
        if self.num_replicas is not None:
            require_between("parallel.num_replicas", self.num_replicas, 1, _MAX_RANKS)
        for name, most in (("cfg", 2), ("ring", _MAX_RANKS), ("ulysses", _MAX_RANKS)):
            _check_axis(f"parallel.{name}", getattr(self, name), most)
        require_one_of("parallel.weights", self.weights, (*WEIGHTS, AUTO))
        require_one_of("parallel.shard_over", self.shard_over, SHARD_OVER)
        require_between("parallel.prefetch_blocks", self.prefetch_blocks, 0, 1000)
        if self.zero3_offload == "nvme":
            raise ConfigError(
                "parallel.zero3_offload=nvme (weights on disk) has never been run and is not supported; use cpu"
            )
        require_one_of("parallel.zero3_offload", self.zero3_offload, ZERO3_OFFLOADS)
        choice = str(self.compile).lower()
        require_one_of("parallel.compile", choice, COMPILE)
        self.compile = choice if choice == "auto" else choice == "true"
        require_one_of("parallel.device", self.device, DEVICES)
        require_one_of("parallel.backend", self.backend, BACKENDS)
        require_between("parallel.cpu_threads", self.cpu_threads, 1, 4096)
        require_between("parallel.collective_timeout_seconds", self.collective_timeout_seconds, 1, _LONGEST_WAIT)
        require_between("parallel.leader_timeout_seconds", self.leader_timeout_seconds, 1, _LONGEST_WAIT)
        if self.stall_timeout_seconds is not None:
            require_between("parallel.stall_timeout_seconds", self.stall_timeout_seconds, 1, _LONGEST_WAIT)
        if self.stall_timeout_seconds is not None and not self.stall_timeout_seconds >= self.collective_timeout_seconds:
            raise ConfigError(
                f"parallel.stall_timeout_seconds={self.stall_timeout_seconds} is not allowed; it must be at least "
                f"parallel.collective_timeout_seconds={self.collective_timeout_seconds}, or null for no limit"
            )
        if self.weights == "zero3":
            self._check_zero3()

    @property
    def may_compile(self) -> bool:
        """Whether blocks may be compiled; where memory is planned, ``auto`` counts as compiled."""
        return self.compile is not False

    @property
    def free(self) -> tuple[str, ...]:
        """The names of the settings that are "auto", of those that make up the layout."""
        return tuple(name for name in FREE if getattr(self, name) == AUTO)

    @property
    def axes(self) -> tuple[int, int, int]:
        """``cfg``, ``ring`` and ``ulysses``. Raises ``ConfigError`` while one of them is "auto"."""
        for name in ("cfg", "ring", "ulysses"):
            if getattr(self, name) == AUTO:
                raise ConfigError(
                    f"parallel.{name}=auto is decided by a render job when its ranks have started; give a number here"
                )
        return cast(tuple[int, int, int], (self.cfg, self.ring, self.ulysses))

    @property
    def sequence(self) -> int:
        """Number of ranks that share the tokens of one forward."""
        _, ring, ulysses = self.axes
        return ring * ulysses

    @property
    def ranks_per_replica(self) -> int:
        """Number of ranks that render one shot together."""
        return self.axes[0] * self.sequence

    @property
    def weight_shards(self) -> int:
        """Number of parts that the weights of an expert are cut into; each rank holds one of them."""
        if self.weights not in SHARDED:
            return 1
        return self.sequence if self.shard_over == "sequence" else self.ranks_per_replica

    @property
    def streams_blocks(self) -> bool:
        """Whether each rank offloads whole weights: it then streams their blocks by itself, without FSDP2."""
        return self.weights == "fsdp_offload" and self.weight_shards == 1

    def _check_zero3(self) -> None:
        if any(axis not in (1, AUTO) for axis in (self.cfg, self.ring, self.ulysses)):
            raise ConfigError(
                f"parallel.weights=zero3 needs cfg=1, ring=1 and ulysses=1; got cfg={self.cfg}, ring={self.ring}, "
                f"ulysses={self.ulysses}. Use parallel.weights=fsdp_offload to split a forward and offload its weights"
            )
        if self.compile is True:
            raise ConfigError("parallel.weights=zero3 runs in eager mode only; set parallel.compile=false")


def _check_axis(name: str, value: object, most: int) -> None:
    if value == AUTO:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={shown(value)} is not allowed; use a whole number from 1 to {most}, or auto")
    require_between(name, value, 1, most)
