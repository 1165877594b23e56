"""The project's own code on fake CUDA tensors: what meets is on one device, and a step waits for nothing."""

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from storymem_dist.diffusion import conditioning
from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped, PromptEmbeds
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.settings import SOLVERS, SamplerSettings
from storymem_dist.diffusion.solver import Solver
from storymem_dist.diffusion.step_cache import attach_step_cache
from storymem_dist.diffusion.text_cache import attach_text_cache
from storymem_dist.memory.scorers import CLIP_BATCH, ClipSimilarity
from storymem_dist.models.attention import attend_with_lse
from storymem_dist.models.quantized_linear import LINEARS, quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS, TINY
from storymem_dist.models.wan.text_encoder import TextEncoder, empty_text_encoder
from storymem_dist.models.wan.vae import WanVae
from storymem_dist.parallel import working_memory
from storymem_dist.parallel.loading import local_part, place_experts
from storymem_dist.pipeline import StoryMemPipeline, to_image_tensor
from storymem_dist.render import clip as render_clip
from storymem_dist.render.build import Engine
from storymem_dist.render.clip import ClipRequest, ClipSampler, to_uint8
from storymem_dist.weights import loading
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.lora import LoraFile, LoraModule, ScaledLora, merge
from tests.helpers.fake_cuda import (
    CUDA,
    HOST_READS,
    TO_DEVICE,
    TO_HOST,
    Crossings,
    fake_cuda,
    really,
    without_cuda,
)

NUM_STEPS = 10
GUIDANCE: Any = {"boundary_ratio": 0.9, "guidance_scale_high": 4.0, "guidance_scale_low": 3.0}
READ_AT = 8
"""The finite check of ``denoise``."""


@pytest.fixture
def crossings() -> Iterator[Crossings]:
    with fake_cuda() as crossings, torch.no_grad():
        yield crossings


def tiny_expert(
    kind: str,
    dtype: torch.dtype = torch.bfloat16,
    linears: str = "exact",
    num_layers: int = TINY.t2v.num_layers,
    device: torch.device | str = CUDA,
) -> WanDiT:
    """As ``parallel.loading`` builds one."""
    config = replace(TINY.t2v if kind == "t2v" else TINY.i2v, num_layers=num_layers)
    with torch.device("meta"):
        dit = WanDiT(config, dtype=dtype)
    quantize_linears(dit.blocks, linears)
    attach_step_cache(dit)
    attach_text_cache(dit)
    dit.eval().requires_grad_(False)
    return dit.to_empty(device=device)


def tiny_experts(kind: str, **formats: Any) -> ExpertPair:
    experts = {name: tiny_expert(kind, **formats) for name in EXPERTS}
    return ExpertPair(**experts, **GUIDANCE)


def tiny_vae() -> WanVae:
    return WanVae(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)).to(CUDA)


def image() -> Tensor:
    return torch.zeros(3, 40, 40, dtype=torch.uint8)


def request(mode: str = "t2v", *, num_memory: int = 2, **sampler: Any) -> ClipRequest:
    """A small clip; all inputs lie on the CPU, as prompts from the cache and keyframes from files do."""
    settings = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": NUM_STEPS} | sampler
    prompt = torch.zeros(7, TINY.t2v.text_dim)
    return ClipRequest(
        mode=mode,
        prompt=PromptEmbeds(prompt_LE=prompt, negative_LE=None if sampler.get("guidance_scale_low") == 1 else prompt),
        seed=0,
        sampler=SamplerSettings(**settings),
        memory_images=[] if mode == "t2v" else [image()] * num_memory,
        first_frame=image() if mode == "mi2v" else None,
        motion_frames=image().expand(5, -1, -1, -1) if mode == "mm2v" else None,
    )


class Rendering:
    """A clip rendered on fake CUDA; ``of_steps`` is what crossed devices from the end of one step to that of the next.

    The first interval begins after the noise has gone to the device.
    """

    def __init__(self, crossings: Crossings, monkeypatch: pytest.MonkeyPatch, **formats: Any) -> None:
        self._crossings = crossings
        self.of_steps: list[list[str]] = []
        # Solvers compute their weights once, on the CPU, with real numbers; the same goes for noise.
        monkeypatch.setattr(render_clip, "Solver", really(Solver))
        contents = count()  # fake pictures have none
        monkeypatch.setattr(conditioning, "content_key", lambda images: next(contents))
        self.sampler = ClipSampler(
            load_experts=lambda kind: tiny_experts(kind, **formats),
            guidance=LocalGuidance(),
            vae=tiny_vae(),
            device=CUDA,
        )

    def run(self, clip: ClipRequest, *, stop_before: int | None = None, **options: Any) -> Tensor:
        num_asked = 0

        def should_stop() -> bool:
            nonlocal num_asked
            if num_asked == 0:
                self._crossings.take()
            num_asked += 1
            return num_asked - 1 == stop_before

        return self.sampler.sample(
            clip,
            should_stop=should_stop,
            on_step=lambda _: self.of_steps.append(self._crossings.take()),
            **options,
        )


@pytest.mark.parametrize(
    ("mode", "solver", "scale"),
    [("t2v", "unipc", 3.5), ("m2v", "dpmpp", 3.5), ("mi2v", "euler", 1.0), ("mm2v", "unipc", 1.0)],
)
def test_a_step_waits_for_nothing(
    crossings: Crossings, monkeypatch: pytest.MonkeyPatch, mode: str, solver: str, scale: float
) -> None:
    rendering = Rendering(crossings, monkeypatch)
    pixels = rendering.run(request(mode, solver=solver, guidance_scale_low=scale, guidance_scale_high=scale))
    *steps, after = [*rendering.of_steps, crossings.take()]
    assert len(steps) == NUM_STEPS
    assert set(steps.pop(READ_AT - 1)) == {HOST_READS}
    assert steps == [[]] * (NUM_STEPS - 1)
    assert set(after) == {HOST_READS}, "the last look at what is finite; decoding is on the device"
    assert (pixels.device, pixels.shape) == (CUDA, (3, 9, 32, 48))
    assert to_uint8(pixels).device == CUDA


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_step_cache_makes_the_host_wait_once_a_step(
    crossings: Crossings, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    """Both sums that decide are read at once. (A fake sum is 1, so a threshold of 1 is not met either.)"""
    rendering = Rendering(crossings, monkeypatch)
    rendering.run(request(num_inference_steps=4, step_cache_threshold=threshold, boundary_ratio_t2v=0.0))
    assert rendering.of_steps == [[], *[[HOST_READS] * 2] * 3]


def test_an_expert_that_waits_on_the_host_comes_once_and_is_never_copied_back(
    crossings: Crossings, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cuda(monkeypatch)
    experts = {name: tiny_expert("t2v") for name in EXPERTS}
    num_tensors = len(list(experts["high_noise"].parameters()))
    _, residency = place_experts(experts.items(), device=CUDA, weights="replicated", swap=True)
    rendering = Rendering(crossings, monkeypatch)
    rendering.sampler = ClipSampler(
        load_experts=lambda kind: ExpertPair(**experts, **GUIDANCE, residency=residency),
        guidance=LocalGuidance(),
        vae=tiny_vae(),
        device=CUDA,
    )
    rendering.run(request(num_inference_steps=4, boundary_ratio_t2v=0.9))
    copied = [TO_DEVICE] * num_tensors
    assert [step for step in rendering.of_steps if step] == [copied, copied]


def test_streamed_blocks_come_in_every_pass_and_nothing_else_does(
    crossings: Crossings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts were read into host memory; on the device, no more than two blocks of one of them have memory."""
    without_cuda(monkeypatch)
    monkeypatch.setattr(working_memory, "free_device_memory_bytes", lambda device: 0)
    experts = {name: tiny_expert("t2v", num_layers=5, device="cpu") for name in EXPERTS}
    _, residency = place_experts(experts.items(), device=CUDA, weights="replicated", swap=False, stream=True)
    parameters = [parameter for expert in experts.values() for parameter in expert.parameters()]
    assert {parameter.device for parameter in parameters} == {CUDA}
    one = experts["high_noise"]
    per_block = len(list(one.blocks[0].parameters()))
    held: list[int] = []

    def note(*_: object) -> None:
        held.append(sum(1 for parameter in parameters if parameter.untyped_storage().nbytes()))

    for expert in experts.values():
        for block in expert.blocks:
            block.register_forward_hook(note)
    rendering = Rendering(crossings, monkeypatch)
    rendering.sampler = ClipSampler(
        load_experts=lambda kind: ExpertPair(**experts, **GUIDANCE, residency=residency),
        guidance=LocalGuidance(),
        vae=tiny_vae(),
        device=CUDA,
    )
    crossings.take()
    rendering.run(request(num_inference_steps=4, boundary_ratio_t2v=0.9))
    outside = len(list(one.parameters())) - 5 * per_block
    assert set(held) == {outside + 2 * per_block}
    first, later = outside + 11 * per_block, 10 * per_block  # two passes; one block is there before the next begins
    counts = [len(step) for step in rendering.of_steps]
    assert sorted(counts) == sorted([first, first, later, later])
    assert {noted for step in rendering.of_steps for noted in step} == {TO_DEVICE}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_checkpoint_is_continued_on_the_device(
    crossings: Crossings, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    rendering = Rendering(crossings, monkeypatch)
    clip = request(solver=solver, num_inference_steps=5)
    with pytest.raises(DenoiseStopped) as stopped:
        rendering.run(clip, stop_before=3)
    state = stopped.value.state
    assert {tensor.device for name, tensor in tensors_of(state).items() if name != "step_index"} == {CUDA}
    rendering.of_steps.clear()
    rendering.run(clip, resume=on_host(state))
    assert rendering.of_steps == [[], []]


def tensors_of(state: DenoiseState) -> dict[str, Tensor]:
    return {"latents": state.latents, **state.solver_state}


def on_host(state: DenoiseState) -> DenoiseState:
    """As it is read from a file."""
    kept = {name: tensor.cpu() for name, tensor in state.solver_state.items()}
    return replace(state, latents=state.latents.cpu(), solver_state=kept)


@pytest.mark.parametrize(
    ("dtype", "linears"),
    [(torch.float32, "exact"), *((torch.bfloat16, linears) for linears in LINEARS)],
)
def test_all_formats_compute_on_the_device(crossings: Crossings, dtype: torch.dtype, linears: str) -> None:
    expert = tiny_experts("m2v", dtype=dtype, linears=linears).select(500)
    latents = torch.empty(1, 36, 3, 4, 6, device=CUDA)
    text = torch.empty(1, 7, TINY.i2v.text_dim, device=CUDA)
    timestep, positions = torch.full((1,), 500, device=CUDA), torch.arange(3, device=CUDA)
    velocity = expert.run("cond", latents, timestep, text, positions)
    assert (velocity.device, velocity.dtype, velocity.shape) == (CUDA, torch.float32, (1, 16, 3, 4, 6))
    assert crossings.take() == []


@pytest.mark.parametrize("backend", ["auto", "sdpa_cudnn", "sdpa_flash", "sdpa_math"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_kernels_give_what_ring_attention_merges(
    crossings: Crossings, backend: str, dtype: torch.dtype
) -> None:
    q, k = (torch.empty(1, length, 4, 16, device=CUDA, dtype=dtype) for length in (10, 7))
    out, lse = attend_with_lse(q, k, k, backend)
    assert (out.device, out.dtype, out.shape) == (CUDA, dtype, (1, 10, 4, 16))
    assert (lse.device, lse.dtype, lse.shape) == (CUDA, torch.float32, (1, 4, 10))
    assert crossings.take() == []


def test_a_text_goes_to_the_device_once_and_comes_back_as_an_embedding(crossings: Crossings) -> None:
    config = TINY.text_encoder
    encoder = TextEncoder(empty_text_encoder(config).to_empty(device=CUDA), lambda text, **_: {"input_ids": [3, 4, 1]})
    (embedding,) = encoder.encode(["a fox"])
    assert (embedding.device, embedding.shape) == (CUDA, (3, config.dim))
    assert crossings.take() == [TO_DEVICE]


def test_clips_of_the_pipeline_are_on_the_device_and_can_be_remembered(
    crossings: Crossings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering = Rendering(crossings, monkeypatch)
    encoder: Any = SimpleNamespace(encode=lambda texts: [torch.empty(5, TINY.t2v.text_dim, device=CUDA) for _ in texts])
    parts: Any = dict.fromkeys(("session", "experts", "loras", "vae", "_model", "_weights"))
    engine = Engine(clips=rendering.sampler, _text_encoder=encoder, **parts)
    monkeypatch.setattr(StoryMemPipeline, "_engine_for", lambda *_: engine)
    pipeline = StoryMemPipeline(None, None, enable_offload=False)
    size: Any = {"num_frames": 9, "height": 32, "width": 48, "steps": 1}
    first = pipeline.generate_t2v("a fox", **size)
    second = pipeline.generate_mi2v("its den", [first[0, :, 0]], first_frame=first[0, :, -1], **size)
    assert {(video.device, video.shape) for video in (first, second)} == {(CUDA, (1, 3, 9, 32, 48))}
    kept = [*pipeline._embeds.values(), to_image_tensor(first[0, :, 0])]
    assert {tensor.device.type for tensor in kept} == {"cpu"}, "what is kept between clips takes no device memory"


def test_clip_describes_frames_of_either_device_for_the_host(crossings: Crossings) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(vision_config=sizes | {"patch_size": 112}, text_config=sizes, projection_dim=8))
    similarity = ClipSimilarity(model, CUDA)
    crossings.take()
    features = similarity.describe(torch.zeros(CLIP_BATCH + 1, 3, 40, 40, dtype=torch.uint8))
    assert (features.device.type, features.shape) == ("cpu", (CLIP_BATCH + 1, 8))
    assert [noted for noted in crossings.take() if noted != TO_DEVICE] == [TO_HOST]


class Weights:
    """A ``TensorSource`` of nothing."""

    name, max_concurrent_reads, bytes_read = "nothing", 1, 0

    def __init__(self, shapes: dict[str, torch.Size], dtype: torch.dtype) -> None:
        self._tensors = {key: torch.empty(shape, dtype=dtype) for key, shape in shapes.items()}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> torch.Size:
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        return self._tensors[key][rows or slice(None)]


class AtOnce(Executor):
    """Fake tensors belong to one thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("linears", LINEARS)
def test_weights_are_merged_and_quantized_on_the_device(
    crossings: Crossings, monkeypatch: pytest.MonkeyPatch, linears: str, streamed: bool
) -> None:
    """All that crosses devices is what was read: each weight once, and the two halves of the LoRA.

    Streamed weights then go back to the host, so that they have the bits of those that stay.
    """
    monkeypatch.setattr(loading, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(merge, "require_finite", lambda *_: 1.0)  # it looks at values, which fake tensors lack
    expert = tiny_expert("t2v", linears=linears, device="cpu" if streamed else CUDA)
    shapes = {name: value.shape for name, value in expert.named_parameters() if not name.endswith("row_scale")}
    key = "blocks.0.ffn.0.weight"
    halves = {"down": torch.Size((2, shapes[key][1])), "up": torch.Size((shapes[key][0], 2))}
    source: Any = Weights(halves, torch.bfloat16)
    module = LoraModule(
        down_key="down", up_key="up", rank=2, in_features=shapes[key][1], out_features=shapes[key][0], alpha=None
    )
    lora = LoraFile(path=Path("lora"), source=source, modules={key.removesuffix(".weight"): module}, identity="")
    part_of = partial(local_part, merge_on=CUDA if streamed else None)
    load_dit_weights(expert, Weights(shapes, torch.float32), [ScaledLora(lora)], local_part=part_of)
    crossed = crossings.take()
    assert crossed.count(TO_DEVICE) == len(shapes) + 2
    assert crossed.count(TO_HOST) == (len(list(expert.parameters())) if streamed else 0)
    assert len(crossed) == crossed.count(TO_DEVICE) + crossed.count(TO_HOST)
    assert {parameter.device.type for parameter in expert.parameters()} == {"cpu" if streamed else "cuda"}
