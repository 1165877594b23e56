"""Makes a finished single-device ``WanDiT`` run over a replica's ranks, without changing what it computes.

The order matters: sequence parallelism first (it rewires attention), compilation second (it captures the rewired
blocks), FSDP last (it wraps them). Guidance and the VAE are split elsewhere; ``storymem_dist.parallel.loading`` reads
the weights.
"""

from storymem_dist.models.compile import compile_blocks
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.fsdp import shard_weights
from storymem_dist.parallel.mesh import ReplicaMesh
from storymem_dist.parallel.sequence import apply_sequence_parallel
from storymem_dist.parallel.settings import SHARDED, ParallelSettings


def parallelize(dit: WanDiT, mesh: ReplicaMesh, settings: ParallelSettings) -> WanDiT:
    """Rewire ``dit`` (usually on the meta device) for ``mesh`` and return it; its parameters' names do not change.

    ``weights="zero3"`` is not handled here: DeepSpeed takes over weights that are loaded already
    (``storymem_dist.parallel.zero3``). ``compile="auto"`` compiles nothing: a job decides before. Raises
    ``LayoutError`` when ulysses does not divide the heads.
    """
    dit.eval().requires_grad_(False)
    apply_sequence_parallel(dit, mesh)
    if settings.compile is True:
        compile_blocks(dit, has_messages=mesh.ulysses.size > 1)
    if settings.weights in SHARDED and not settings.streams_blocks:
        assert mesh.shard_mesh is not None, "start_session starts a process group for sharded weights"
        shard_weights(
            dit,
            mesh.shard_mesh,
            offload=settings.weights == "fsdp_offload",
            prefetch_blocks=settings.prefetch_blocks,
        )
    return dit
