"""Described and real machines; nonsense is refused in one sentence with the nearest that is possible."""

from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import yaml

from storymem_dist.errors import ConfigError
from storymem_dist.hardware import GIB
from storymem_dist.planner.hardware import (
    HERE,
    Hardware,
    HardwareSettings,
    complete,
    hardware_here,
    known_device,
    known_hardware,
    known_names,
)
from storymem_dist.resources import config_folder

DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100_80g",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100_80g",
    "NVIDIA A100 80GB PCIe": "a100_80g",
    "NVIDIA A100-PCIE-40GB": "a100_40g",
    "NVIDIA L40S": "l40s_48g",
    "NVIDIA GeForce RTX 4090": "rtx4090_24g",
    "NVIDIA GeForce RTX 5090": "rtx5090_32g",
    "NVIDIA H20": None,
    "Tesla V100-SXM2-32GB": None,
}


def test_every_entry_of_the_group_is_a_complete_machine() -> None:
    assert set(known_names()) == {name for name in DEVICES.values() if name}
    for name in known_names():
        one = known_hardware(name)
        assert (one.name, one.num_gpus, one.found_here) == (name, 8, False)
        assert one.memory_bytes is not None and 20 * GIB < one.memory_bytes < one.host_memory_bytes


@pytest.mark.parametrize(("reported", "expected"), DEVICES.items())
def test_a_driver_s_name_finds_its_entry(reported: str, expected: str | None) -> None:
    found = known_device(reported)
    assert (found and found.name) == expected


def test_the_group_s_files_hold_settings_of_the_schema_alone() -> None:
    fields = set(HardwareSettings.__dataclass_fields__)
    for path in (config_folder() / "hardware").glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert set(values) <= fields, path
        assert HardwareSettings(**values).name == path.stem


def test_figures_of_an_entry_can_be_changed() -> None:
    found = complete(HardwareSettings(name="h100_80g", nodes=64, memory_gib=40.0, price_per_gpu_hour=2.5))
    assert (found.num_gpus, found.memory_gib, found.price_per_gpu_hour) == (512, 40.0, 2.5)
    assert found.link_gb_per_s == known_hardware("h100_80g").link_gb_per_s


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodes": 0}, "hardware.nodes=0 is not possible; the nearest that is: 1"),
        ({"gpus_per_node": -8}, "hardware.gpus_per_node=-8 is not possible; the nearest that is: 1"),
        ({"gpus_per_node": 1.5}, "hardware.gpus_per_node=1.5 is not allowed; it must be a whole number, 1 at least"),
        ({"memory_gib": -1.0}, "hardware.memory_gib=-1.0 is not possible; the nearest that is: 0.25"),
        ({"memory_gib": float("nan")}, "hardware.memory_gib=nan is not allowed; it must be a number, 0.25 at least"),
        ({"link_gb_per_s": float("inf")}, "hardware.link_gb_per_s=inf is not possible; the nearest that is: 100000"),
        ({"price_per_gpu_hour": "much"}, "hardware.price_per_gpu_hour='much' is not allowed; it must be a number"),
        ({"nodes": True}, "hardware.nodes=True is not allowed; it must be a whole number"),
    ],
    ids=str,
)
def test_nonsense_is_refused_with_the_nearest_that_is_possible(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HardwareSettings(**given)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("given", "near"), [("h100", "h100_80g"), ("H200", "h200"), ("rtx5090", "rtx5090_32g")])
def test_an_unknown_name_is_answered_with_the_nearest(given: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"hardware='{given}' is not known; the nearest is hardware={near} "):
        complete(HardwareSettings(name=given))


@pytest.mark.parametrize("name", ["../secrets", "/etc/passwd", ""])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="is not known"):
        complete(HardwareSettings(name=name))


def test_a_processor_has_host_memory_and_shares_its_cores() -> None:
    alone, many = (hardware_here(torch.device("cpu"), ranks_per_node=ranks) for ranks in (1, 4096))
    assert (alone.name, alone.memory_bytes, alone.found_here) == (HERE, None, True)
    assert many.gpus_per_node == 4096 and many.peak_tflops < alone.peak_tflops / 10


def on_gpu(name: str, free_gib: float = 70.0) -> Hardware:
    properties = Mock(major=9, total_memory=96 * GIB, multi_processor_count=78)
    with (
        patch.object(torch.cuda, "get_device_name", return_value=name),
        patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        return hardware_here(torch.device("cuda"), nodes=2, ranks_per_node=4, free_bytes=int(free_gib * GIB))


def test_a_real_card_has_its_known_rates_and_the_memory_that_is_free() -> None:
    found = on_gpu("NVIDIA H100 80GB HBM3")
    assert (found.num_gpus, found.memory_gib, found.found_here) == (8, pytest.approx(70), True)
    assert found.peak_tflops == known_hardware("h100_80g").peak_tflops


def test_a_card_without_an_entry_gets_its_own_peak() -> None:
    assert on_gpu("NVIDIA H20").peak_tflops == 148.0
    assert on_gpu("NVIDIA Future X").peak_tflops == pytest.approx(7.5 * 78)


def test_the_default_of_the_group_is_this_machine() -> None:
    assert (Path(config_folder()) / "hardware" / "here.yaml").exists()
    assert HardwareSettings() == HardwareSettings(name=HERE)
