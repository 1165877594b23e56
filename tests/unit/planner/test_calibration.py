"""What was measured here comes before what was shipped, survives processes that write at once, and damage."""

import json
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.planner.calibration import (
    FITTED,
    GUESSED,
    MEASURED,
    keep_calibrated,
    load_constants,
    load_shipped,
    record_measured,
)
from storymem_dist.planner.hardware import Hardware, hardware_here, known_hardware
from storymem_dist.planner.measuring import ON_CPU, calibrate

CPU = torch.device("cpu")
SMALL = replace(ON_CPU, num_tokens=64, dim=64, ffn_dim=176, num_heads=2, channels=4, side=16, copied=2**20)


@pytest.fixture
def here() -> Hardware:
    return hardware_here(CPU)


def record(hardware: Hardware, cache: Path, ratio: float, **changes: Any) -> None:
    values = {"predicted_seconds": 2.0, "measured_seconds": 2.0 * ratio, "num_steps": 40}
    record_measured(hardware, **(values | changes), cache=cache)


def test_without_measurements_the_shipped_constants_say_where_they_come_from(tmp_path: Path) -> None:
    h100 = load_constants(known_hardware("h100_80g"), cache=tmp_path)
    assert (h100.how, h100) == (FITTED, load_shipped(known_hardware("h100_80g")))
    assert "fitted on Wan2.2's published 326.9 s" in str(h100) and "old" in str(h100)
    assert load_constants(known_hardware("l40s_48g"), cache=tmp_path).how == GUESSED


def test_an_unknown_device_gets_usual_constants_and_says_so(tmp_path: Path) -> None:
    strange = replace(known_hardware("h100_80g"), device="Acme Foo 7")
    assert "not known" in str(load_constants(strange, cache=tmp_path))


def test_renders_here_correct_the_prediction_by_their_median(tmp_path: Path, here: Hardware) -> None:
    for ratio in (1.2, 1.5, 1.3):
        record(here, tmp_path, ratio)
    found = load_constants(here, cache=tmp_path)
    assert (found.step_factor, found.num_renders) == (pytest.approx(1.3), 3)
    assert "3 renders here took 1.30 times as long" in str(found)
    assert found.without_renders == load_shipped(here)


def test_measurements_of_a_device_count_for_its_entry_in_the_group(tmp_path: Path) -> None:
    found_here = replace(known_hardware("h100_80g"), device="NVIDIA H100 80GB HBM3")
    record(found_here, tmp_path, 1.1)
    assert load_constants(known_hardware("h100_80g"), cache=tmp_path).step_factor == pytest.approx(1.1)
    assert load_constants(known_hardware("h200"), cache=tmp_path).step_factor == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"measured_seconds": 0.0},
        {"measured_seconds": float("nan")},
        {"measured_seconds": -1.0},
        {"measured_seconds": 1e9},
        {"predicted_seconds": 0.0},
        {"num_steps": 0},
    ],
    ids=str,
)
def test_seconds_that_cannot_be_are_not_kept(tmp_path: Path, here: Hardware, changes: dict[str, float]) -> None:
    record(here, tmp_path, 1.0, **changes)
    assert load_constants(here, cache=tmp_path).num_renders == 0


def test_only_the_last_renders_are_kept(tmp_path: Path, here: Hardware) -> None:
    for _ in range(70):
        record(here, tmp_path, 3.0)
    for _ in range(40):
        record(here, tmp_path, 1.5)
    found = load_constants(here, cache=tmp_path)
    assert (found.num_renders, found.step_factor) == (64, pytest.approx(1.5))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 7'),
        lambda text: text.replace("2.6", '"x"'),
        lambda text: text.replace("2.6", "2.6e300"),
        lambda text: "",
    ],
    ids=["cut", "list", "format", "word", "large", "empty"],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(
    damage: Callable[[str], str], tmp_path: Path, here: Hardware, caplog: pytest.LogCaptureFixture
) -> None:
    record(here, tmp_path, 1.3)
    (file,) = (tmp_path / "planner").glob("*.json")
    file.write_text(damage(file.read_text()))
    with caplog.at_level(logging.WARNING):
        assert load_constants(here, cache=tmp_path) == load_shipped(here)
    assert f"{file} is damaged and not used" in caplog.text
    record(here, tmp_path, 1.4)
    assert load_constants(here, cache=tmp_path).step_factor == pytest.approx(1.4)


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path, here: Hardware) -> None:
    (tmp_path / "planner").write_text("a file where a folder should be")
    record(here, tmp_path, 1.3)
    assert not keep_calibrated(here, load_shipped(here), cache=tmp_path)
    assert load_constants(here, cache=tmp_path) == load_shipped(here)
    with pytest.raises(ConfigError, match=r"what was measured cannot be kept .* STORYMEM_CACHE"):
        calibrate(CPU, cache=tmp_path, clock=lambda run, device: 1.0, shapes=SMALL)


def write_ten(cache: str) -> None:
    for _ in range(10):
        record(hardware_here(CPU), Path(cache), 1.25)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, here: Hardware) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_ten, args=(str(tmp_path),)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert load_constants(here, cache=tmp_path).num_renders == 30


def test_calibrating_measures_this_machine_and_is_remembered(tmp_path: Path, here: Hardware) -> None:
    record(here, tmp_path, 3.0)
    found = calibrate(CPU, link_rate=3e9, cache=tmp_path, shapes=SMALL, clock=lambda run, device: (run(), 0.01)[1])
    assert found.link == pytest.approx(3e9 / (here.link_gb_per_s * 1e9))
    products = 2 * 64 * 64 * (6 * 64 + 2 * 176) / (8 * 0.01)
    assert found.linear == pytest.approx(products / (here.peak_tflops * 1e12))
    assert found.memory == pytest.approx(2 * 2**20 / 0.01 / (here.memory_gb_per_s * 1e9))
    assert found.how == MEASURED and found.age_days == 0 and "measured here: storymem-plan calibrate" in str(found)
    assert load_constants(here, cache=tmp_path) == found  # what renders measured before is dropped
    record(here, tmp_path, 1.1)
    assert load_constants(here, cache=tmp_path) == replace(found, step_factor=pytest.approx(1.1), num_renders=1)


def test_constants_tell_their_age(tmp_path: Path, here: Hardware) -> None:
    old = replace(load_shipped(here), date=(date.today() - timedelta(days=9)).isoformat())
    keep_calibrated(here, old, cache=tmp_path)
    assert load_constants(here, cache=tmp_path).age_days == 9
    assert "9 days old" in str(load_constants(here, cache=tmp_path))
    (file,) = (tmp_path / "planner").glob("*.json")
    assert json.loads(file.read_text())["renders"] == []
