"""A job's weights from prepared folders: no LoRA is needed, and the wrong preparation is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storymem_dist import StoryMemPipeline
from storymem_dist.cli.weights import main
from storymem_dist.errors import CheckpointError
from storymem_dist.weights.bundle import open_weights
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.lora import LoraSettings, storymem_lora
from storymem_dist.weights.prepare import prepare_checkpoint
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint


@pytest.fixture
def settings(tmp_path: Path) -> ModelSettings:
    """Both base models prepared, the second with StoryMem's MI2V LoRA; no LoRA folder is named."""
    tiny = generate_tiny_checkpoint(tmp_path / "tiny")
    prepare_checkpoint(open_checkpoint(tiny.t2v_dir, "t2v"), {"high_noise": [], "low_noise": []}, tmp_path / "t2v")
    loras = {name: [lora] for name, lora in storymem_lora(tiny.lora_dir, "mi2v").items()}
    i2v = open_checkpoint(tiny.i2v_dir, "i2v")
    prepare_checkpoint(i2v, loras, tmp_path / "i2v", storymem_folder="Wan2.2-MI2V-A14B")
    return ModelSettings(t2v_checkpoint=str(tmp_path / "t2v"), i2v_checkpoint=str(tmp_path / "i2v"))


def test_prepared_and_original_weights_render_the_same_pixels(tmp_path: Path) -> None:
    tiny = generate_tiny_checkpoint(tmp_path / "tiny")
    main(["prepare", str(tiny.t2v_dir), str(tmp_path / "t2v"), "--dtype", "float32"])
    lora = ["--storymem-lora", str(tiny.lora_dir)]
    main(["prepare", str(tiny.i2v_dir), str(tmp_path / "i2v"), "--dtype", "float32", *lora])
    memory = [torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)]
    size = {"num_frames": 5, "height": 32, "width": 48, "steps": 2}
    clips = []
    for folders in ((tiny.t2v_dir, tiny.i2v_dir, tiny.lora_dir), (tmp_path / "t2v", tmp_path / "i2v", None)):
        paths = [str(folder) if folder else None for folder in folders]
        with StoryMemPipeline(*paths, device="cpu", dtype="float32") as pipeline:
            clips.append((pipeline.generate_t2v("a fox", **size), pipeline.generate_m2v("a fox", memory, **size)))
    for original, prepared in zip(*clips, strict=True):
        assert torch.equal(original, prepared)


@pytest.mark.parametrize("continuation", ["none", "mi2v"])
def test_a_job_with_prepared_weights_merges_nothing(settings: ModelSettings, continuation: str) -> None:
    weights = open_weights(settings, ("t2v", "m2v"), continuation)
    assert [checkpoint.layout for checkpoint in weights.checkpoints.values()] == ["prepared", "prepared"]
    assert all(loras == [] for by_expert in weights.loras.values() for loras in by_expert.values())
    assert weights.identity("t2v") != weights.identity("m2v")


def test_weights_prepared_for_another_continuation_are_refused(settings: ModelSettings) -> None:
    with pytest.raises(CheckpointError, match=r"this job needs Wan2\.2-MM2V-A14B"):
        open_weights(settings, ("t2v", "m2v"), "mm2v")


def test_a_lora_that_was_not_merged_is_refused(settings: ModelSettings, tmp_path: Path) -> None:
    file = tmp_path / "tiny/StoryMem/Wan2.2-MI2V-A14B/backbone_high_noise.safetensors"
    with_lora = replace(settings, loras=[LoraSettings(path=str(file))])
    with pytest.raises(CheckpointError, match=r"model\.loras are not the ones merged"):
        open_weights(with_lora, ("t2v",), "none")
