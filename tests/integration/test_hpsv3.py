"""The paper's setting from a fresh install: a story whose keyframes HPSv3 chooses, on small weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from storymem_dist.errors import ExtraNotInstalled, WeightsNotFound
from storymem_dist.memory.frames import resize_for_selection
from storymem_dist.weights.hpsv3 import open_hpsv3
from tests.helpers.small_job import records, render_small, write_storyboard
from tests.helpers.tiny_hpsv3 import write_package, write_tiny_hpsv3

SMALL_SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of the paper's benchmark with small models and clips. The weights lie where the download puts them."""
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site")))
    monkeypatch.chdir(tmp_path)
    write_tiny_hpsv3(tmp_path / "weights" / "HPSv3")
    torch.manual_seed(0)
    sizes = {"text_config": SMALL_SIZES, "vision_config": SMALL_SIZES | {"patch_size": 112}, "projection_dim": 8}
    CLIPModel(CLIPConfig(**sizes)).save_pretrained(tmp_path / "weights" / "clip-vit-base-patch32")
    return ["experiment=st_bench", "memory=storymem_hpsv3", "memory.quality=hpsv3"]


def test_a_story_is_rendered_with_the_papers_quality_test(tmp_path: Path, overrides: list[str]) -> None:
    """Every frame is a candidate, some are good enough; the kept ones have the scores of the pictures that are left."""
    stories, run = write_storyboard(tmp_path / "story.json", [[True, False]]), tmp_path / "run"
    choosing = [
        "memory.similarity_threshold=1.0",
        "memory.max_per_shot=9",
        "memory.quality_threshold=4.4",
        "sampler.num_frames=5",
    ]
    assert render_small(stories, run, *overrides, *choosing) == 0
    model = open_hpsv3("weights/HPSv3").load(torch.device("cpu"))
    verdicts = set()
    for record in records(run).values():
        assert record["inputs"]["memory.hpsv3_checkpoint"] == "weights/HPSv3"
        kept = [one["quality"] for one in record["memory"]["decisions"] if one["verdict"] == "kept"]
        assert min(kept) >= 4.4
        verdicts |= {one["verdict"] for one in record["memory"]["decisions"]}
        pictures = sorted((run / "stories" / "story" / "keyframes").glob(f"{record['shot_id']}_*.png"))
        for quality, picture in zip(kept, pictures, strict=True):
            frame_HWC = torch.from_numpy(np.array(Image.open(picture)))
            alone = model.rate(resize_for_selection(frame_HWC.permute(2, 0, 1)[None])).item()
            assert quality == pytest.approx(alone, abs=0.1), "bf16 rounds a batch in another order"
    assert verdicts == {"kept", "low_quality"}


def test_missing_parts_end_a_job_before_anything_is_made(tmp_path: Path, overrides: list[str]) -> None:
    stories, run = write_storyboard(tmp_path / "story.json", [[True]]), tmp_path / "run"
    (tmp_path / "weights" / "HPSv3" / "HPSv3.safetensors").unlink()
    with pytest.raises(WeightsNotFound, match="storymem-weights download hpsv3"):
        render_small(stories, run, *overrides)
    (tmp_path / "site" / "hpsv3" / "dataset" / "data_collator_qwen.py").write_text("")
    with pytest.raises(ExtraNotInstalled, match="pip install --no-deps hpsv3"):
        render_small(stories, run, *overrides)
    assert not run.exists()
