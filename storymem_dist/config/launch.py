"""The ``launch`` group: how the ranks of a job start. None of its settings changes a pixel.

Plain values only; ``launch/torchrun.py`` and ``launch/slurm.py`` act on them. They live here because the schema of a
whole job needs them and ``launch`` lies above it.
"""

import re
from dataclasses import dataclass, field

from storymem_dist.errors import ConfigError, require_between, require_one_of

MODES = ("inline", "torchrun", "slurm")
NUMA = ("auto", "off", "node", "socket", "exclusive", "core-complex")
_MAX_NODES = 65_536  # also of tasks and of cores per task
_TIME = re.compile(r"\d+(-\d+(:\d+){0,2})?|\d+(:\d+){1,2}")


@dataclass(kw_only=True, slots=True)
class SlurmSettings:
    """What ``launch=slurm`` asks the cluster for. None: as the template says.

    ``template``: ``render`` (one job over ``nodes`` nodes), ``render_array`` (``tasks`` independent one-node tasks that
    join one run folder), or the path of your own copy. ``max_requeues``: how often a job that ran out of time goes back
    to the queue by itself. ``options``: further options of sbatch, as on its command line. ``report``: also submit a
    job that writes the report when the render has ended.
    """

    template: str = "render"
    job_name: str | None = None
    nodes: int | None = None
    tasks: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    max_requeues: int = 20
    report: bool = False
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("nodes", "tasks", "cpus_per_task"):
            value = getattr(self, key)
            if value is not None:
                require_between(f"launch.slurm.{key}", value, 1, _MAX_NODES)
        if self.gpus_per_node is not None:
            require_between("launch.slurm.gpus_per_node", self.gpus_per_node, 0, 1024)
        require_between("launch.slurm.max_requeues", self.max_requeues, 0, 1_000_000)
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError(
                f"launch.slurm.time={self.time!r} is not allowed; use minutes, HH:MM:SS or D-HH:MM:SS, in quotes: "
                "launch.slurm.time='12:00:00'"
            )
        wrong = [option for option in self.options if not option.startswith("-")]
        if wrong:
            raise ConfigError(
                f"launch.slurm.options holds {wrong[0]!r}; each must be one option of sbatch, such as --exclude=node7"
            )
        if self.template == "render_array" and (self.nodes or 1) > 1:
            raise ConfigError(
                f"launch.slurm.nodes={self.nodes} does not go with launch.slurm.template=render_array, whose tasks "
                "have one node each; set launch.slurm.tasks"
            )
        if self.template == "render" and self.tasks is not None:
            raise ConfigError(
                f"launch.slurm.tasks={self.tasks} goes with launch.slurm.template=render_array; "
                "template=render takes launch.slurm.nodes"
            )


@dataclass(kw_only=True, slots=True)
class LaunchSettings:
    """One entry of ``conf/launch``.

    ``mode``: ``inline`` renders in this process, which is alone or one of the ranks that torchrun or accelerate
    started; ``torchrun`` starts one rank per GPU of this node (``processes_per_node`` overrides that; 1 without GPUs)
    and starts them again up to ``max_restarts`` times when one dies; ``slurm`` submits a job. ``dry_run`` only prints
    what is left to render or would be submitted. ``numa`` binds the ranks that ``torchrun`` starts to the cores next to
    their GPU: ``auto`` to those of its NUMA node, where there are several; the others are torch's own choices.

    One replica over several nodes (``parallel.across_nodes=true``): the same command runs on each of ``num_nodes``
    nodes with its own ``node_rank``; they meet at ``port`` of the host ``head``, which is the node of rank 0.
    ``launch/node.sh`` sets these four. On one node ``port`` is null: any free one.
    """

    mode: str = "inline"
    dry_run: bool = False
    processes_per_node: int | None = None
    max_restarts: int = 3
    numa: str = "auto"
    num_nodes: int = 1
    node_rank: int = 0
    head: str = "localhost"
    port: int | None = None
    slurm: SlurmSettings = field(default_factory=SlurmSettings)

    def __post_init__(self) -> None:
        require_one_of("launch.mode", self.mode, MODES)
        require_one_of("launch.numa", self.numa, NUMA)
        if self.processes_per_node is not None:
            require_between("launch.processes_per_node", self.processes_per_node, 1, 1024)
        require_between("launch.max_restarts", self.max_restarts, 0, 1_000_000)
        require_between("launch.num_nodes", self.num_nodes, 1, _MAX_NODES)
        require_between("launch.node_rank", self.node_rank, 0, _MAX_NODES)
        if self.node_rank >= self.num_nodes:
            raise ConfigError(
                f"launch.node_rank={self.node_rank} is not allowed; with launch.num_nodes={self.num_nodes} it is "
                f"0 to {self.num_nodes - 1}"
            )
        if self.port is not None:
            require_between("launch.port", self.port, 1, 65535)
