"""Where HPSv3 lies between shots, and that its scores do not depend on it."""

import pytest
import torch

from storymem_dist.diffusion.host_swap import HostWeights
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.parallel.weight_memory import BETWEEN_SHOTS, ON_CPU, ON_DEVICE
from storymem_dist.render import scoring
from storymem_dist.weights.hpsv3 import HpsV3Files, open_hpsv3
from tests.helpers.hpsv3_frames import SIZES, frame
from tests.helpers.tiny_hpsv3 import write_package, write_tiny_hpsv3

CPU = torch.device("cpu")
FRAMES = torch.stack([frame(*SIZES["small"], number) for number in range(2)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> HpsV3Files:
    root = tmp_path_factory.mktemp("hpsv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(write_package(root / "site")))
        return open_hpsv3(str(write_tiny_hpsv3(root / "HPSv3")))


@pytest.fixture
def expected(files: HpsV3Files) -> list[float]:
    return files.load(CPU).rate(FRAMES).tolist()


def test_between_shots_no_weights_are_left_on_the_device(files: HpsV3Files, expected: list[float]) -> None:
    said: list[str] = []
    rating = scoring._Rating(files, CPU, BETWEEN_SHOTS, said.append)
    tensors = [*rating._model.network.parameters(), *rating._model.network.buffers()]
    for _ in range(2):
        assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {0}
        assert rating(FRAMES) == pytest.approx(expected, abs=1e-6)
    assert said == []


@pytest.mark.parametrize("place", [ON_DEVICE, BETWEEN_SHOTS])
def test_a_device_that_runs_out_of_memory_leaves_scoring_to_the_cpu_which_is_said_once(
    files: HpsV3Files, expected: list[float], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def is_full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    said: list[str] = []
    rating = scoring._Rating(files, CPU, place, said.append)
    if place == BETWEEN_SHOTS:
        monkeypatch.setattr(HostWeights, "enter_device", is_full)
    else:
        monkeypatch.setattr(rating._model, "rate", is_full)
    for _ in range(2):
        assert rating(FRAMES) == pytest.approx(expected, abs=1e-6)
    (message,) = said
    assert message.startswith("HPSv3 (0.0 GiB) has no room on cpu between shots and scores keyframes on the CPU")
    monkeypatch.setattr(rating._model, "rate", is_full)
    with pytest.raises(torch.OutOfMemoryError):
        rating(FRAMES)


def test_hpsv3_is_loaded_once_for_all_settings_that_name_the_same_weights(
    files: HpsV3Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    monkeypatch.setattr(
        scoring, "_Rating", lambda files, device, place, warn: loads.append(place) or (lambda frames: [])
    )
    shelf = scoring.scorer_shelf(CPU, {None: files}, place=ON_DEVICE)
    for threshold in (1.0, 2.0, 1.0):
        shelf(MemorySettings(similarity="hsv", quality="hpsv3", quality_threshold=threshold))
    assert loads == [ON_CPU], "a CPU is not short of device memory"
    shelf(MemorySettings(similarity="hsv", quality="sharpness"))
    assert loads == [ON_CPU]
