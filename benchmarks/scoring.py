"""What share of the time of scoring a run is decoding its clips?

    python -m benchmarks.scoring
    python -m benchmarks.scoring --clips 4      # quick

Makes a run folder of stories of ten shots, 81 frames of 832x480 each. A few clips are drawn and encoded once; the
others have their pictures and other bytes, so that nothing is found in the cache. Scores it with tiny random models in
the formats of the published ones.

"decode" is reading clips into RGB frames; "hash" is the SHA-256 of every clip; "models" are resizing and the forwards
of both models; "measures" need no weights; "rest" is everything else. The second call finds everything in the cache.
Seconds are the processor's, of one thread, so that other work on the machine does not count. With the published models
on a CPU the models take most of the time instead: they are for GPUs.
"""

import gzip
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from benchmarks.harness import make_parser, print_table, write_json
from storymem_dist.artifacts.records import ShotRecord, describe_file
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import VideoSettings, write_clip
from storymem_dist.evaluation import clips as clips_module
from storymem_dist.evaluation import tasks
from storymem_dist.evaluation.models import HEAD_FILE, Models
from storymem_dist.evaluation.scoring import score_run
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.files import quick_digest
from storymem_dist.models.viclip import ViClip, ViClipConfig
from storymem_dist.story.schema import Scene, Shot, Story
from storymem_dist.weights.viclip import VOCABULARY_FILE

SHOTS_PER_STORY = 10
NUM_DRAWN = 4
FRAMES, HEIGHT, WIDTH, FPS = 81, 480, 832, 16
CPU = torch.device("cpu")


def main() -> None:
    """Measure, print and write."""
    parser = make_parser("scoring", __doc__)
    parser.add_argument("--clips", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        root, settings = Path(name) / "run", write_models(Path(name) / "weights")
        make_run(root, arguments.clips)
        rows = [measure(root, settings, "first call"), measure(root, settings, "second call")]
    print_table(rows)
    write_json(arguments.json, "scoring", {"clips": arguments.clips, "rows": rows}, CPU)


def measure(root: Path, settings: EvaluationSettings, name: str) -> dict[str, Any]:
    """Score the run once; seconds by part."""
    parts = dict.fromkeys(("decode", "hash", "models", "measures"), 0.0)
    models = Models(settings, CPU)
    for one in models.usable:  # loading takes seconds of imports, once for each process
        models.load(one)
    with ExitStack() as stack:
        for part, owner, function in (
            ("decode", tasks, "read_clip"),
            ("hash", clips_module, "_digest"),
            ("models", tasks, "_judged"),
            ("measures", tasks, "describe"),
        ):
            stack.enter_context(timed(parts, part, owner, function))
        began = time.process_time()
        score_run(root, models)
        seconds = time.process_time() - began
    row: dict[str, Any] = {"": name, "seconds": seconds, **parts, "rest": seconds - sum(parts.values())}
    return row | {"share of decoding": parts["decode"] / seconds}


@contextmanager
def timed(parts: dict[str, float], part: str, owner: Any, function: str) -> Iterator[None]:
    """Add the time that ``owner.function`` takes to ``parts[part]``."""
    original: Callable[..., Any] = getattr(owner, function)

    def timing(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return original(*args, **options)
        finally:
            parts[part] += time.process_time() - began

    with patch.object(owner, function, timing):
        yield


def make_run(root: Path, num_clips: int) -> None:
    """A run folder of committed shots; each has the pictures of one of ``NUM_DRAWN`` drawn clips."""
    run = RunFolder(root)
    run.open()
    drawn = [root / f"drawn_{number}.mp4" for number in range(min(NUM_DRAWN, num_clips))]
    for number, path in enumerate(drawn):
        write_clip(path, draw(number), FPS, VideoSettings())
    for first in range(0, num_clips, SHOTS_PER_STORY):
        prompts = [f"A kite over the sea, picture {index}." for index in range(min(SHOTS_PER_STORY, num_clips - first))]
        shots = tuple(
            Shot(index=index, index_in_scene=index, scene_num=1, prompt=prompt, cut=index % 2 == 0)
            for index, prompt in enumerate(prompts)
        )
        scenes = (Scene(scene_num=1, shots=shots),)
        story = Story(story_id=f"story_{first // SHOTS_PER_STORY:03d}", name="Kite", overview="A kite.", scenes=scenes)
        run.write_storyboard(story)
        for shot in shots:
            commit(run, story, shot, drawn[(first + shot.index) % len(drawn)], first + shot.index)


def commit(run: RunFolder, story: Story, shot: Shot, drawn: Path, number: int) -> None:
    """Commit a shot whose clip has the pictures of ``drawn`` and a hash of its own: an empty MP4 box follows."""
    place = run.shot(story.story_id, shot.shot_id)
    attempt = place.attempt_folder("a")
    attempt.mkdir(parents=True)
    clip = attempt / "clip.mp4"
    clip.write_bytes(drawn.read_bytes() + struct.pack(">I4sQ", 16, b"free", number))
    record = ShotRecord(
        story_id=story.story_id,
        shot_id=shot.shot_id,
        shot_index=shot.index,
        scene_num=1,
        index_in_scene=shot.index,
        prompt=shot.prompt,
        cut=shot.cut,
        kind="t2v",
        mode="t2v",
        seed=0,
        num_frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        fps=FPS,
        clip=clip.name,
        clip_sample=quick_digest(clip),
        keyframes=(),
        tail=(),
        memory={"recalled": [], "decisions": []},
        inputs={},
        fingerprint=f"{number:064x}"[::-1],
        predecessor=None,
        config_hash="",
        files={clip.name: describe_file(clip)},
        timing={"stage_seconds": {}, "committed_at": 0.0},
        host={"attempt_id": "a"},
    )
    assert place.publish(record, may_publish=lambda: True)
    place.repair_views(record)


def draw(number: int) -> torch.Tensor:
    """``uint8 [F, 3, H, W]``: waves that move, with the detail of a photograph (film grain that stays)."""
    generator = torch.Generator().manual_seed(number)
    grain = torch.randn(1, 3, HEIGHT, WIDTH, generator=generator) * 6
    rows, columns = torch.arange(HEIGHT)[:, None] / 37, torch.arange(WIDTH) / 53
    frames = []
    for frame in range(FRAMES):
        waves = torch.stack([torch.sin(rows + (c + number) * columns + frame / 9) for c in range(1, 4)])
        frames.append((128 + 70 * waves[None] + grain).clamp(0, 255).to(torch.uint8))
    return torch.cat(frames)


def write_models(root: Path) -> EvaluationSettings:
    """Tiny random models in the published formats; both see frames of 224 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    viclip, clip_l, head = (root / name for name in ("viclip", "clip_l", "aesthetic"))
    for folder in (viclip, head):
        folder.mkdir(parents=True)
    sizes = ViClipConfig(
        patch_size=56, vision_dim=64, vision_layers=1, text_dim=64, text_layers=1, embed_dim=32, vocabulary=2 * 256 + 3
    )
    state = ViClip(sizes).state_dict()
    save_file({key: torch.randn_like(value) * 0.1 for key, value in state.items()}, viclip / "model.safetensors")
    (viclip / VOCABULARY_FILE).write_bytes(gzip.compress(b"#version: tiny\nt h"))
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        patch_size=56,
        projection_dim=32,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(clip_l)
    torch.save({"weight": torch.randn(1, 32), "bias": torch.zeros(1)}, head / HEAD_FILE)
    return EvaluationSettings(viclip=str(viclip), clip_l=str(clip_l), aesthetic=str(head), device="cpu")


if __name__ == "__main__":
    main()
