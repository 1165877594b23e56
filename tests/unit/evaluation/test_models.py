"""ViCLIP, its words and the aesthetic path equal VBench 0.1.5 on the same weights and frames."""

from pathlib import Path

import pytest
import torch

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.evaluation.frames import clip_pixels, middle_frames, small_frames
from storymem_dist.evaluation.models import AESTHETIC, VICLIP, Models
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.models.viclip import ViClip, ViClipConfig, config_of
from storymem_dist.weights.viclip import ClipTokens, load_viclip
from tests.helpers import score_weights
from tests.helpers.score_weights import expected, write_aesthetic, write_clip_l, write_viclip
from tests.helpers.sine_models import CONTEXT, TEXTS, wave_frames, write_words

VIDEOS = {"landscape": (17, 60, 100), "portrait": (81, 90, 50), "large": (9, 240, 416), "short": (5, 224, 224)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("weights")
    settings = EvaluationSettings(
        viclip=str(write_viclip(root / "viclip")),
        clip_l=str(write_clip_l(root / "clip_l")),
        aesthetic=str(write_aesthetic(root / "aesthetic")),
        device="cpu",
    )
    found = Models(settings, CPU)
    assert found.load(VICLIP) and found.load(AESTHETIC), found.missing
    return found


def test_the_words_are_those_of_vbench(tmp_path: Path) -> None:
    write_words(tmp_path / "words.gz")
    tokens = ClipTokens(tmp_path / "words.gz", CONTEXT)
    assert tokens(TEXTS).tolist() == expected()["tokens"]
    assert tokens.length(TEXTS[3]) == 2 and tokens.length(TEXTS[2]) > CONTEXT


@pytest.mark.parametrize("name", VIDEOS)
def test_a_clip_has_the_feature_of_vbench(models: Models, name: str) -> None:
    frames = wave_frames(*VIDEOS[name])
    feature = models.clip_feature(frames[middle_frames(len(frames))])
    torch.testing.assert_close(feature, torch.tensor(expected()["video_features"][name]), atol=1e-5, rtol=0)
    similarity = feature @ models.text_features(TEXTS[:1])[0]
    assert similarity.item() == pytest.approx(expected()["similarity_to_first_text"][name], abs=1e-5)


def test_texts_have_the_features_of_vbench(models: Models) -> None:
    wanted = torch.tensor(expected()["text_features"])
    torch.testing.assert_close(models.text_features(TEXTS), wanted, atol=1e-5, rtol=0)
    assert [models.is_cut(text) for text in TEXTS] == [False, True, True, False]


@pytest.mark.parametrize("name", VIDEOS)
def test_the_aesthetic_score_is_that_of_vbench(models: Models, name: str) -> None:
    score = models.aesthetic_scores(wave_frames(*VIDEOS[name])).mean().item()
    assert score == pytest.approx(expected()["aesthetic"][name], abs=1e-5)


def test_the_features_of_the_fixture_differ_from_each_other() -> None:
    """Else the tests above could not fail."""
    videos = torch.tensor(list(expected()["video_features"].values()))
    assert torch.cdist(videos, videos).fill_diagonal_(1).min() > 1e-2
    assert max(expected()["aesthetic"].values()) - min(expected()["aesthetic"].values()) > 1e-4


def test_frames_for_viclip_are_rounded_and_those_for_the_aesthetic_score_are_not() -> None:
    frames = wave_frames(2, 60, 100)
    in_8_bits, plain = clip_pixels(frames, in_8_bits=True), clip_pixels(frames, in_8_bits=False)
    assert 0 < (in_8_bits - plain).abs().max() < 0.2
    assert in_8_bits.shape == (2, 3, 224, 224)


@pytest.mark.parametrize("size", [(60, 100), (90, 50), (240, 416), (224, 224)])
def test_small_frames_are_all_that_viclip_sees(size: tuple[int, int]) -> None:
    frames = wave_frames(3, *size)
    small = small_frames(frames)
    assert small.shape == (3, 3, 224, 224) and small.dtype == torch.uint8
    assert clip_pixels(small, in_8_bits=True).equal(clip_pixels(frames, in_8_bits=True))


@pytest.mark.parametrize(
    ("num_frames", "chosen"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, [0, 1, 2, 2, 2, 2, 2, 2]),
        (1, [0] * 8),
        (81, [4, 14, 24, 34, 44, 54, 64, 75]),
    ],
)
def test_the_frames_in_the_middle_of_eight_parts(num_frames: int, chosen: list[int]) -> None:
    assert middle_frames(num_frames) == chosen


def test_the_published_sizes_are_read_from_the_weights() -> None:
    with torch.device("meta"):
        state = ViClip(ViClipConfig()).state_dict()
    assert config_of({key: tuple(value.shape) for key, value in state.items()}) == ViClipConfig()
    assert sum(value.numel() for value in state.values()) == 427_590_144, "1.71 GB in fp32, as published"
    with pytest.raises(CheckpointError, match=r"it has no vision_encoder\.conv1\.weight"):
        config_of({})


def test_both_packagings_are_the_same_model(tmp_path: Path) -> None:
    one, _ = load_viclip(write_viclip(tmp_path / "safetensors"), CPU)
    other, _ = load_viclip(write_viclip(tmp_path / "pth", as_pth=True), CPU)
    assert all(torch.equal(one.state_dict()[key], value) for key, value in other.state_dict().items())


def test_wrong_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsNotFound, match="there are no weights of ViCLIP"):
        load_viclip(tmp_path / "nowhere", CPU)
    folder = write_viclip(tmp_path / "viclip")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load_viclip(folder, CPU)
    weights.write_bytes(whole)
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="not a list of merges"):
        load_viclip(folder, CPU)
    state = score_weights.viclip_state()
    del state["vision_encoder.ln_pre.bias"]
    monkeypatch.setattr(score_weights, "viclip_state", lambda: state)
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*first vision_encoder\.ln_pre\.bias"):
        load_viclip(write_viclip(tmp_path / "incomplete"), CPU)


def test_a_missing_model_is_said_and_the_other_one_works(tmp_path: Path) -> None:
    settings = EvaluationSettings(
        viclip=str(tmp_path / "none"),
        clip_l=str(write_clip_l(tmp_path / "clip_l")),
        aesthetic=str(write_aesthetic(tmp_path / "aesthetic")),
    )
    models = Models(settings, CPU)
    assert models.usable == (AESTHETIC,) and models.load(AESTHETIC) and not models.load(VICLIP)
    assert "storymem-weights download viclip" in models.missing[VICLIP]
    (tmp_path / "aesthetic" / "sa_0_4_vit_l_14_linear.pth").write_bytes(b"PK\x03\x04 damaged")
    damaged = Models(settings, CPU)
    assert damaged.usable == (AESTHETIC,) and not damaged.load(AESTHETIC) and damaged.usable == ()
    assert "cannot be read as a state dict" in damaged.missing[AESTHETIC]
