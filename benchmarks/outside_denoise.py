"""What share of a shot's time is outside denoising (conditioning, decoding, choosing keyframes, saving)?

    python -m benchmarks.outside_denoise                    # A14B, 480p and 720p, 40 and 4 steps, 1 and 8 GPUs
    python -m benchmarks.outside_denoise --sizes 480p --repeats 1                                  # quick

**Predicted** without a GPU: FLOPs divided by speed. Denoising is the cost model's step with ten memory keyframes; its
speed is ``--peak-tflops`` times ``--utilisation``. Eight GPUs are assumed to be eight times as fast. No layout quite
reaches this, so the shares for eight GPUs are upper bounds. The VAE is counted on fake tensors, at the cost model's
``VAE_SLOWNESS``; with eight GPUs a rank computes its own columns and their halos. Conditioning is the most expensive
mode (MI2V): ten keyframes, each encoded alone, and a first frame with its blank clip. CLIP describes every frame of the
clip and the keyframes of ten earlier shots, on one GPU, at the VAE's speed. A job encodes its texts once and caches
them; the table shows the encoder's FLOPs, but the shares leave them out.

**Measured** on this machine, with one thread. Choosing keyframes: resizing and sharpness, without CLIP's forward.
Saving: an MP4 with the default settings, three keyframes and five tail frames as PNGs, hashes, the record, and every
flush to the disk. The clip has full size and 81 frames: smooth noise of several scales that drifts, with a little
grain. Both are work of the processor, also on a machine with GPUs, and only the leader does it.

"in turn": a shot is saved before the next one begins (``dispatch.overlap_saving=false``, or no other shot is ready).
"overlapped": the next shot of another story is rendered while one is saved. Saving then takes no time of the GPUs,
unless it takes longer than a shot.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from benchmarks.harness import make_parser, print_table, write_json
from benchmarks.vae_parallel import CPU_ATTENTION, count
from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.shot_folder import ClipFiles, ShotFolder, new_attempt_id
from storymem_dist.artifacts.video import VideoSettings
from storymem_dist.dispatch.cost import VAE_SLOWNESS, VAE_TFLOP_PER_PIXEL_FRAME, CostModel
from storymem_dist.memory.bank import Keyframe, MemoryBank
from storymem_dist.memory.keyframes import choose_keyframes
from storymem_dist.memory.scorers import SharpnessQuality
from storymem_dist.memory.settings import MemorySettings

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
NUM_FRAMES = 81
NUM_KEYFRAMES = 10
NUM_TAIL_FRAMES = 5
KEPT_FRAMES = (0, 30, 60)
SHOTS_BEFORE = 10
NUM_GPUS = (1, 8)
SAMPLERS = {"40 steps, guidance": (40, 2), "4 steps": (4, 1)}
_TERA = 1e12


def main() -> None:
    """Count, measure, print and write."""
    parser = make_parser("outside_denoise", __doc__)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of a GPU (default: an H100)")
    parser.add_argument("--utilisation", type=float, default=0.65, help="share of the peak that denoising reaches")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="folder for the saved clips (default: the system's temporary folder)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows, counted, measured = [], [], []
    for size in arguments.sizes:
        work = count_work(*SIZES[size])
        counted.append({"size": size, **work.row()})
        times = measure(*SIZES[size], arguments.folder, arguments.repeats)
        measured.append({"size": size, **{name: round(seconds, 2) for name, seconds in times.items()}})
        for num_gpus in NUM_GPUS:
            for sampler, (num_steps, num_passes) in SAMPLERS.items():
                speed = arguments.peak_tflops * arguments.utilisation
                seconds = predict(SIZES[size], work, num_gpus, num_steps, num_passes, speed)
                rows.append({"size": size, "GPUs": num_gpus, "sampler": sampler, **shares(seconds, times)})
    print('Counted TFLOP ("decode, planner": the cost model\'s estimate)')
    print_table(counted)
    print("\nMeasured seconds on this machine, one thread")
    print_table(measured)
    print('\nA shot with ten memory keyframes: predicted seconds; "save" and a part of "choose" are measured')
    print_table(rows)
    results = {"counted": counted, "measured": measured, "shares": rows}
    write_json(arguments.json, "outside_denoise", results, torch.device("cpu"))


# -- predicted ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """TFLOP of one shot outside denoising; for the VAE by number of GPUs, of the busiest GPU."""

    condition: dict[int, float]
    decode: dict[int, float]
    planned_decode: float
    clip: float
    text: float

    def row(self) -> dict[str, Any]:
        """The columns of the table."""
        row: dict[str, Any] = {}
        for num_gpus in NUM_GPUS:
            row[f"condition, {num_gpus} GPU"] = round(self.condition[num_gpus], 1)
            row[f"decode, {num_gpus} GPU"] = round(self.decode[num_gpus], 1)
        return row | {
            "decode, planner": round(self.planned_decode, 1),
            "CLIP": round(self.clip, 2),
            "text, once": round(self.text, 2),
        }


def count_work(height: int, width: int) -> Work:
    """Count everything at this size."""
    condition, decode = {}, {}
    for num_gpus in NUM_GPUS:
        whole_clip = count("encode", num_gpus, height, width)["flops"]
        one_frame = count("encode", num_gpus, height, width, num_frames=1)["flops"]
        condition[num_gpus] = (whole_clip + NUM_KEYFRAMES * one_frame) / _TERA
        decode[num_gpus] = count("decode", num_gpus, height, width)["flops"] / _TERA
    num_images = NUM_FRAMES + len(KEPT_FRAMES) * (1 + SHOTS_BEFORE)
    return Work(
        condition=condition,
        decode=decode,
        planned_decode=VAE_TFLOP_PER_PIXEL_FRAME * NUM_FRAMES * height * width,
        clip=_count(
            lambda: CLIPVisionModel(CLIPVisionConfig()), lambda clip: clip(torch.zeros(num_images, 3, 224, 224))
        ),
        text=_count(_umt5_xxl, lambda encoder: encoder(torch.zeros(1, 512, dtype=torch.long))),
    )


def _count(make: Callable[[], Any], run: Callable[[Any], object]) -> float:
    """TFLOP of ``run`` with a model of fake weights."""
    with FakeTensorMode(), torch.no_grad():
        model = make()
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
            run(model)
    return flops.get_total_flops() / _TERA


def _umt5_xxl() -> UMT5EncoderModel:
    config = UMT5Config(
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        d_kv=64,
        vocab_size=256384,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def predict(
    size: tuple[int, int], work: Work, num_gpus: int, num_steps: int, num_passes: int, tflop_per_second: float
) -> dict[str, float]:
    """Seconds of each stage of a shot on the GPUs."""
    cost = CostModel(num_frames=NUM_FRAMES, height=size[0], width=size[1])
    slow = tflop_per_second / VAE_SLOWNESS
    return {
        "denoise": num_steps * num_passes * cost.forward_tflop(NUM_KEYFRAMES) / tflop_per_second / num_gpus,
        "condition": work.condition[num_gpus] / slow,
        "decode": work.decode[num_gpus] / slow,
        "choose": work.clip / slow,
    }


def shares(seconds: dict[str, float], measured: dict[str, float]) -> dict[str, Any]:
    """Seconds of all stages, and the share of a shot that is not denoising."""
    save = measured["save"]
    seconds = seconds | {"choose": seconds["choose"] + measured["choose without CLIP"], "save": save}
    others = sum(seconds.values()) - seconds["denoise"] - save
    row: dict[str, Any] = {f"{name} s": round(value, 1) for name, value in seconds.items()}
    row["in turn %"] = round(100 * (others + save) / (seconds["denoise"] + others + save), 1)
    row["overlapped %"] = round(100 * others / (seconds["denoise"] + others), 1)
    return row


# -- measured ----------------------------------------------------------------------------------------------------------


def measure(height: int, width: int, folder: Path | None, repeats: int) -> dict[str, float]:
    """Median seconds of choosing and saving on this machine."""
    clip = moving_clip(height, width)
    files = ClipFiles(
        clip=clip,
        keyframes=[(slot, frame, clip[frame]) for slot, frame in enumerate(KEPT_FRAMES)],
        tail=clip[-NUM_TAIL_FRAMES:],
        fps=16,
    )
    rounds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            rounds.append(_save(ShotFolder(Path(root), "shot_01"), files) | {"choose without CLIP": _choose(clip)})
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def moving_clip(height: int, width: int) -> Tensor:
    """``uint8 [81, 3, H, W]``: noise of five scales, each drifting at its own speed, and grain of two levels."""
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for level in range(5):
        cells = (2 + height // (16 * 2**level), 2 + width // (16 * 2**level))
        coarse = torch.randn(1, 3, *cells, generator=generator)
        picture = F.interpolate(coarse, size=(height, width + NUM_FRAMES * 4), mode="bicubic", align_corners=False)[0]
        pictures.append(picture * 2.0**level)
    frames = []
    for index in range(NUM_FRAMES):
        layers = [picture[..., index * (level % 4) :][..., :width] for level, picture in enumerate(pictures)]
        grain = torch.randn(3, height, width, generator=generator)
        frames.append((128 + 3.5 * torch.stack(layers).sum(0) + 2 * grain).clamp(0, 255).to(torch.uint8))
    return torch.stack(frames)


def _save(folder: ShotFolder, files: ClipFiles) -> dict[str, float]:
    """Save and publish as a job does; return seconds of the wall clock and of the processor."""
    attempt_id = new_attempt_id("0" * 64, "benchmark")
    began, began_computing = time.perf_counter(), time.thread_time()
    stored = folder.save_attempt(attempt_id, files, VideoSettings())
    record = _record(attempt_id, files, dict(stored))
    folder.publish(record, may_publish=lambda: True)
    folder.repair_views(record)
    seconds = {"save": time.perf_counter() - began, "save, computing": time.thread_time() - began_computing}
    return seconds | {"clip MB": (folder.attempt_folder(attempt_id) / "clip.mp4").stat().st_size / 1e6}


def _record(attempt_id: str, files: ClipFiles, stored: dict[str, Any]) -> ShotRecord:
    num_frames, _, height, width = files.clip.shape
    return ShotRecord(
        story_id="story",
        shot_id="shot_01",
        shot_index=0,
        scene_num=1,
        index_in_scene=0,
        prompt="",
        cut=True,
        kind="t2v",
        mode="t2v",
        seed=0,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=files.fps,
        clip="clip.mp4",
        keyframes=(),
        tail=(),
        memory={},
        inputs={},
        fingerprint="0" * 64,
        predecessor=None,
        config_hash="",
        files=stored,
        timing={},
        host={"attempt_id": attempt_id},
    )


class _NoForward:
    """Stands in for CLIP: similarity of made-up vectors, which take no time."""

    def describe(self, frames_NCHW: Tensor) -> Tensor:
        """Unit vectors, all different."""
        angles = torch.arange(len(frames_NCHW)) / NUM_FRAMES
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def compare(self, one: Tensor, many: Tensor) -> Tensor:
        """Cosines."""
        return many.double() @ one.double()


def _choose(clip: Tensor) -> float:
    """Seconds of choosing keyframes, without CLIP."""
    kept = [Keyframe(image=clip[0], shot_index=shot, slot=0, frame_index=0) for shot in range(SHOTS_BEFORE)]
    began = time.perf_counter()
    choose_keyframes(clip, MemoryBank(tuple(kept)), _NoForward(), SharpnessQuality(), MemorySettings(), shot_index=1)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
