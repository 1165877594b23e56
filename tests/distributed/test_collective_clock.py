"""A rank that waits for another in a collective of the forward or of the VAE has that time on its clock."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist

from storymem_dist.models.attention import Attend
from storymem_dist.parallel.guidance import ParallelGuidance
from storymem_dist.parallel.mesh import ReplicaMesh
from storymem_dist.parallel.sequence import SequenceParallelAttend, TokenSplit
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.vae import parallelize_vae
from tests.distributed.test_parallel_vae import golden_vae, inputs
from tests.helpers.ranks import run_ranks

LATE_SECONDS = 0.3


def seams(ulysses: ReplicaMesh, ring: ReplicaMesh, cfg: ReplicaMesh) -> dict[str, tuple[ReplicaMesh, Callable]]:
    """Everything that calls collectives while a clip is rendered, by name, with the mesh whose clock it has."""
    x_BlNH = torch.ones(1, 3, 2, 8)

    def split(mesh: ReplicaMesh) -> TokenSplit:
        tokens = TokenSplit(mesh)
        tokens.start(torch.empty(1, 6, 4))
        return tokens

    def attend(mesh: ReplicaMesh) -> Callable:
        attention = SequenceParallelAttend(Attend("auto"), split(mesh))
        return lambda: attention(x_BlNH, x_BlNH, attention.begin(x_BlNH))

    expert = SimpleNamespace(name="high_noise", guidance_scale=3.5, run=lambda *args: torch.ones(4))
    vae = golden_vae()
    assert ulysses.shard.group is not None
    parallelize_vae(vae, ulysses.shard.group, ulysses.clock)
    pixels, latents = inputs((2, 5, 1))
    text = torch.ones(1, 1, 4)
    return {
        "sum": (ulysses, lambda: ulysses.shard.sum(torch.ones(1))),
        "ulysses": (ulysses, attend(ulysses)),
        "join": (ulysses, lambda: split(ulysses).join(torch.ones(1, 3, 4))),
        "ring": (ring, attend(ring)),
        "cfg": (cfg, lambda: ParallelGuidance(cfg.cfg).velocity(expert, text, text, text, text, text)),
        "vae decode": (ulysses, lambda: vae.decode(latents)),
        "vae encode": (ulysses, lambda: vae.encode(pixels)),
    }


def seconds_by_seam() -> tuple[dict[str, float], bool]:
    """Seconds on this rank's clock when the other one comes late to each seam; whether a clock is kept untouched."""
    dist.init_process_group("gloo")
    layouts = [ParallelSettings(device="cpu", **{axis: 2}) for axis in ("ulysses", "ring", "cfg")]
    meshes = [start_session(layout).mesh for layout in layouts]
    seconds = {}
    for name, (mesh, call) in seams(*meshes).items():
        assert mesh.clock is not None
        dist.barrier()
        mesh.clock.take()
        if dist.get_rank() == 1:
            time.sleep(LATE_SECONDS)
        call()
        seconds[name] = mesh.clock.take()
        assert mesh.clock.take() == 0.0, "what was taken is not counted again"
    compiled = start_session(ParallelSettings(device="cpu", ulysses=2, compile=True))
    return seconds, compiled.mesh.clock is None


def test_waiting_for_a_late_rank_is_counted_wherever_ranks_meet() -> None:
    (waited, _), (late, no_clock_in_compiled_code) = run_ranks(seconds_by_seam, 2)
    assert set(waited) == {"sum", "ulysses", "join", "ring", "cfg", "vae decode", "vae encode"}
    assert {name: seconds for name, seconds in waited.items() if seconds < 0.8 * LATE_SECONDS} == {}
    assert all(seconds > 0.0 for seconds in late.values())
    assert no_clock_in_compiled_code
