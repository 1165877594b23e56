"""Keyframe selection, dedupe and window against results of the original code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from storymem_dist.memory.bank import Keyframe, MemoryBank
from storymem_dist.memory.frames import resize_for_selection, selection_size
from storymem_dist.memory.keyframes import choose_keyframes
from storymem_dist.memory.scorers import HsvSimilarity, Similarity, clip_pixels
from storymem_dist.memory.settings import MemorySettings
from tests.helpers.golden import load_golden
from tests.helpers.memory_stubs import MeanAbsoluteDifference, MeanBrightness

TENSORS, MANIFEST = load_golden("frames")
_, EXPECTED = load_golden("keyframes")


def clip(name: str) -> Tensor:
    return TENSORS[f"clip.{name}.frames"][TENSORS[f"clip.{name}.index"]]


def similarity_named(name: str) -> Similarity:
    return {"mad": MeanAbsoluteDifference, "hsv": HsvSimilarity}[name]()


def keyframe_of(image: Tensor, shot_index: int, slot: int = 0) -> Keyframe:
    return Keyframe(image=image, shot_index=shot_index, slot=slot, frame_index=0)


@pytest.mark.parametrize("row", EXPECTED["smart_resize"], ids=lambda row: "x".join(map(str, row["hw"])))
def test_the_selection_size_is_the_reference_s(row: dict[str, Any]) -> None:
    assert list(selection_size(*row["hw"])) == row["resized_hw"]


def test_the_resized_frame_equals_the_reference_s_in_every_bit() -> None:
    first_clip = next(iter(MANIFEST["clips"]))
    assert torch.equal(resize_for_selection(clip(first_clip)[:1])[0], TENSORS["expected.resized"])


def test_the_clip_input_equals_the_reference_s() -> None:
    first_clip = next(iter(MANIFEST["clips"]))
    pixels = clip_pixels(clip(first_clip)[:1])[:, :, ::3, ::3]
    torch.testing.assert_close(pixels, TENSORS["expected.clip_preprocess"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("row", EXPECTED["selection"], ids=lambda row: f"{row['clip']}-{row['similarity']}")
def test_the_chosen_frames_are_the_reference_s(row: dict[str, Any]) -> None:
    chosen = choose_keyframes(
        clip(row["clip"]),
        MemoryBank([keyframe_of(torch.zeros_like(clip(row["clip"])[0]), 0)]),
        similarity_named(row["similarity"]),
        MeanBrightness(),
        MemorySettings(),
        shot_index=1,
    )
    assert [d.frame_index for d in chosen.decisions if d.slot is not None] == row["indices"]
    assert chosen.threshold == row["final_threshold"]
    assert {d.frame_index for d in chosen.decisions if d.verdict == "low_quality"} <= set(row["low_quality_frames"])


@pytest.mark.parametrize("row", EXPECTED["selection"], ids=lambda row: f"{row['clip']}-{row['similarity']}")
def test_similarities_and_low_quality_frames_are_the_reference_s(row: dict[str, Any]) -> None:
    frames = resize_for_selection(clip(row["clip"]))
    quality = MeanBrightness()
    low = [index for index, frame in enumerate(frames) if quality.score(frame) < quality.threshold]
    assert low == row["low_quality_frames"]

    similarity = similarity_named(row["similarity"])
    features = similarity.describe(frames)
    selected = row["passes"][0]["indices"][:1]
    for index, expected in zip(row["first_pass_frames_compared"], row["first_pass_similarities"], strict=True):
        assert similarity.compare(features[selected[-1]], features[index : index + 1]).item() == pytest.approx(
            expected, abs=1e-5
        )
        if index in row["passes"][0]["indices"]:
            selected.append(index)


@pytest.mark.parametrize("row", EXPECTED["dedupe"], ids=lambda row: row["id"])
def test_duplicates_of_the_bank_are_dropped_as_the_reference_does(row: dict[str, Any]) -> None:
    images = TENSORS.get(f"bank.{row['id']}", [])
    bank = MemoryBank(keyframe_of(image, index) for index, image in enumerate(images))
    similarity = similarity_named(row["similarity"])
    chosen = choose_keyframes(clip(row["clip"]), bank, similarity, MeanBrightness(), MemorySettings(), shot_index=9)

    assert [keyframe.slot for keyframe in chosen.kept] == row["kept_slots"]
    assert [keyframe.frame_index for keyframe in chosen.kept] == row["kept_frame_indices"]
    assert all(torch.equal(keyframe.image, clip(row["clip"])[keyframe.frame_index]) for keyframe in chosen.kept)
    selected = [decision for decision in chosen.decisions if decision.slot is not None]
    assert [decision.frame_index for decision in selected] == row["selected_indices"]
    for decision, expected in zip(selected, row["similarity_matrix_selected_x_bank"], strict=True):
        assert decision.bank_similarity == (pytest.approx(max(expected), abs=1e-5) if expected else None)


def keyframe_from_file_name(name: str) -> Keyframe:
    scene, shot, slot = int(name[:2]), int(name[3:5]), int(name[name.index("keyframe") + 8 : -4])
    return keyframe_of(torch.zeros(3, 1, 1, dtype=torch.uint8), scene * 100 + shot, slot)


@pytest.mark.parametrize(
    "row",
    [row for row in EXPECTED["window"] if row["fix"] < row["max_memory_size"]],
    ids=lambda row: f"{len(row['bank'])}-max{row['max_memory_size']}-fix{row['fix']}",
)
def test_the_window_is_the_reference_s(row: dict[str, Any]) -> None:
    bank = MemoryBank(map(keyframe_from_file_name, row["bank"]))
    settings = MemorySettings(max_keyframes=row["max_memory_size"], num_fixed=row["fix"])
    recalled = [(keyframe.shot_index, keyframe.slot) for keyframe in bank.recall(settings).keyframes]
    expected = [keyframe_from_file_name(name) for name in row["selected"]]
    assert recalled == [(keyframe.shot_index, keyframe.slot) for keyframe in expected]


@pytest.mark.parametrize(
    "row",
    [row for row in EXPECTED["window"] if row["fix"] == row["max_memory_size"] < len(row["bank"])],
    ids=lambda row: f"{len(row['bank'])}-max{row['max_memory_size']}-fix{row['fix']}",
)
def test_with_every_place_fixed_the_window_is_exactly_the_oldest(row: dict[str, Any]) -> None:
    """The original code adds the whole bank here again; this bug is not reproduced."""
    bank = MemoryBank(map(keyframe_from_file_name, row["bank"]))
    settings = MemorySettings(max_keyframes=row["max_memory_size"], num_fixed=row["fix"])
    assert bank.recall(settings).keyframes == bank.keyframes[: row["fix"]]
