"""A job's weights from prepared folders: no LoRA is needed, and the wrong preparation is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from storymem_dist.build import open_weights
from storymem_dist.errors import CheckpointError
from storymem_dist.models.settings import ModelSettings
from storymem_dist.models.wan.checkpoints import open_checkpoint
from storymem_dist.models.wan.lora import LoraSettings, storymem_lora
from storymem_dist.models.wan.prepare import prepare_checkpoint
from storymem_dist.models.wan.tiny_checkpoint import generate_tiny_checkpoint


@pytest.fixture
def settings(tmp_path: Path) -> ModelSettings:
    """Both base models prepared, the second with StoryMem's MI2V LoRA; no LoRA folder is named."""
    tiny = generate_tiny_checkpoint(tmp_path / "tiny")
    prepare_checkpoint(open_checkpoint(tiny.t2v_dir, "t2v"), {"high_noise": [], "low_noise": []}, tmp_path / "t2v")
    loras = {name: [lora] for name, lora in storymem_lora(tiny.lora_dir, "mi2v").items()}
    i2v = open_checkpoint(tiny.i2v_dir, "i2v")
    prepare_checkpoint(i2v, loras, tmp_path / "i2v", storymem_folder="Wan2.2-MI2V-A14B")
    return ModelSettings(t2v_checkpoint=str(tmp_path / "t2v"), i2v_checkpoint=str(tmp_path / "i2v"))


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
