"""The ``launch`` group: how the ranks of a job start. None of its settings changes a pixel.

Plain values only; ``launch/torchrun.py``, ``launch/slurm.py`` and ``launch/kubernetes.py`` act on them. They live here
because the schema of a whole job needs them and ``launch`` lies above it.
"""

import re
from dataclasses import dataclass, field

from storymem_dist.errors import ConfigError, require_between, require_one_of, shown

MODES = ("inline", "torchrun", "slurm", "kubernetes")
SUBMITTING = ("slurm", "kubernetes")
"""The modes that hand the job to a cluster: nothing is rendered here, and this machine says nothing about its nodes."""
NUMA = ("auto", "off", "node", "socket", "exclusive", "core-complex")
_MAX_NODES = 65_536  # also of tasks and of cores per task
_LONGEST_NAME = 40  # JobSet adds the replica, its number, that of the pod and five more: 63 at most
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # a label of RFC 1123
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
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
                f"launch.slurm.time={shown(self.time)} is not allowed; use minutes, HH:MM:SS or D-HH:MM:SS, in quotes: "
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
class KubernetesSettings:
    """What ``launch=kubernetes`` asks the cluster for. None: as the template says.

    ``template``: ``job`` (``pods`` pods that come and go), ``jobset`` (replicas wider than a node), or the path of your
    own copy; None: what ``parallel.across_nodes`` needs. ``name``: None makes one of the run folder's name. ``claim``:
    the PersistentVolumeClaim of the volume that all pods see at ``mount``. ``secrets``: names of Secrets whose keys
    become environment variables (``HF_TOKEN``, ``WANDB_API_KEY``). ``queue``: Kueue's LocalQueue. ``user``: the number
    of the user and group that own the files. ``max_retries``: how often a pod that failed is tried again;
    ``grace_seconds``: how long a pod that is asked to stop may take. ``memory`` and ``shared_memory`` (``/dev/shm``)
    are quantities of Kubernetes: ``500Gi``.
    """

    template: str | None = None
    name: str | None = None
    namespace: str | None = None
    image: str | None = None
    pods: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    memory: str | None = None
    shared_memory: str | None = None
    claim: str | None = None
    mount: str | None = None
    secrets: list[str] = field(default_factory=list)
    queue: str | None = None
    user: int | None = None
    max_retries: int | None = None
    grace_seconds: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "pods": (1, _MAX_NODES),
            "gpus": (0, 1024),
            "cpus": (1, _MAX_NODES),
            "user": (1, 2**31 - 1),
            "max_retries": (0, 1_000_000),
            "grace_seconds": (1, 7 * 86_400),
        }
        for key, (least, most) in limits.items():
            if (number := getattr(self, key)) is not None:
                require_between(f"launch.kubernetes.{key}", number, least, most)
        named = [(key, getattr(self, key)) for key in ("name", "namespace", "claim", "queue")]
        for key, text in [*named, *(("secrets", secret) for secret in self.secrets)]:
            most = _LONGEST_NAME if key == "name" else 63
            if text is not None and (len(text) > most or not _NAME.fullmatch(text)):
                raise ConfigError(
                    f"launch.kubernetes.{key}={shown(text)} is not allowed; names in Kubernetes have lower-case "
                    f"letters, digits and '-', begin and end with a letter or digit, and are at most {most} long"
                )
        for key in ("memory", "shared_memory"):
            text = getattr(self, key)
            if text is not None and not _QUANTITY.fullmatch(text):
                raise ConfigError(
                    f"launch.kubernetes.{key}={shown(text)} is not allowed; use a quantity of Kubernetes, such as 500Gi"
                )
        if self.image is not None and (not self.image or re.search(r"\s", self.image)):
            raise ConfigError(f"launch.kubernetes.image={shown(self.image)} is not allowed; it is no name of an image")
        if self.mount is not None and (not self.mount.startswith("/") or ":" in self.mount or self.mount == "/"):
            raise ConfigError(
                f"launch.kubernetes.mount={shown(self.mount)} is not allowed; use an absolute path without ':', "
                "such as /work"
            )


@dataclass(kw_only=True, slots=True)
class LaunchSettings:
    """One entry of ``conf/launch``.

    ``mode``: ``inline`` renders in this process, which is alone or one of the ranks that torchrun or accelerate
    started; ``torchrun`` starts one rank per GPU of this node (``processes_per_node`` overrides that; 1 without GPUs)
    and starts them again up to ``max_restarts`` times when one dies; ``slurm`` and ``kubernetes`` submit a job.
    ``dry_run`` only prints what is left to render or would be submitted. ``numa`` binds the ranks that ``torchrun``
    starts to the cores next to their GPU: ``auto`` to those of its NUMA node, where there are several; the others are
    torch's own choices.

    One replica over several nodes (``parallel.across_nodes=true``): the same command runs on each of ``num_nodes``
    nodes with its own ``node_rank``; they meet at ``port`` of the host ``head``, which is the node of rank 0.
    ``launch/node.sh`` sets these four. The nodes wait ``meet_seconds`` for each other. On one node ``port`` is null:
    any free one.
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
    meet_seconds: int = 300
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)

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
        require_between("launch.meet_seconds", self.meet_seconds, 1, 86_400)

    @property
    def submits(self) -> bool:
        """Whether this command hands the job to a cluster."""
        return self.mode in SUBMITTING

    @property
    def cluster_nodes(self) -> int | None:
        """Nodes of the submitted job; None where only its template or the job itself knows."""
        return self.kubernetes.pods if self.mode == "kubernetes" else self.slurm.tasks or self.slurm.nodes

    @property
    def cluster_gpus(self) -> int | None:
        """GPUs of each node of the submitted job; None as above."""
        return self.kubernetes.gpus if self.mode == "kubernetes" else self.slurm.gpus_per_node
