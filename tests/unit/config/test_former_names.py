"""Former names of presets go on working wherever a name can be given, and are listed nowhere."""

import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from storymem_dist.config.composing import compose_settings, register_schema, to_settings
from storymem_dist.config.former_names import FORMER_KEYS, FORMER_NAMES, with_present_keys
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.resources import config_folder
from tests.helpers.commands import run_in_fork

BEFORE = {
    "cfg2": ParallelSettings(cfg=2),
    "cfg2_ulysses2": ParallelSettings(cfg=2, ulysses=2),
    "cfg2_ulysses4": ParallelSettings(cfg=2, ulysses=4),
    "fsdp16_across_nodes": ParallelSettings(cfg=2, ulysses=8, weights="fsdp", shard_over="sequence", across_nodes=True),
    "fsdp2": ParallelSettings(ulysses=2, weights="fsdp"),
    "fsdp2_cfg2": ParallelSettings(cfg=2, weights="fsdp"),
    "fsdp2_offload": ParallelSettings(ulysses=2, weights="fsdp_offload"),
    "fsdp4": ParallelSettings(ulysses=4, weights="fsdp"),
    "fsdp4_cfg2_ulysses2": ParallelSettings(cfg=2, ulysses=2, weights="fsdp"),
    "fsdp8": ParallelSettings(ulysses=8, weights="fsdp"),
    "fsdp8_cfg2_ulysses4": ParallelSettings(cfg=2, ulysses=4, weights="fsdp"),
    "fsdp_offload": ParallelSettings(weights="fsdp_offload"),
    "replicas": ParallelSettings(),
    "ring2": ParallelSettings(ring=2),
    "ring3": ParallelSettings(ring=3),
    "single": ParallelSettings(num_replicas=1),
    "ulysses2": ParallelSettings(ulysses=2),
    "ulysses4": ParallelSettings(ulysses=4),
    "ulysses8": ParallelSettings(ulysses=8),
    "usp4": ParallelSettings(ring=2, ulysses=2),
    "zero3": ParallelSettings(num_replicas=1, weights="zero3"),
}
"""The 21 entries of ``conf/parallel`` before they were named by purpose."""


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_in_fork(arguments, seconds=120)


@pytest.mark.parametrize("name", BEFORE)
def test_every_name_that_ever_was_composes_to_the_same_settings(name: str) -> None:
    assert compose_settings([f"parallel={name}"]).parallel == BEFORE[name]


def test_the_table_holds_no_name_that_has_an_entry_of_its_own() -> None:
    entries = {path.stem for path in (config_folder() / "parallel").iterdir()}
    former = {name.partition("/")[2] for name in FORMER_NAMES}
    assert former.isdisjoint(entries) and former | entries >= set(BEFORE)


def test_an_experiment_of_ones_own_may_override_with_a_former_name(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\ndefaults:\n  - override /parallel: fsdp8\noutput: runs/mine\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    settings = compose_settings([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert settings.output == "runs/mine" and settings.parallel == BEFORE["fsdp8"]


def test_a_configuration_of_ones_own_above_render_may_override_with_a_former_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults:\n  - render\n  - override parallel: usp4\n  - _self_\n")
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        composed = compose("mine", overrides=[f"hydra.searchpath=[file://{config_folder()}]"])
    assert to_settings(composed).parallel == BEFORE["usp4"]


def test_help_lists_the_entries_of_conf_and_nothing_else() -> None:
    lines = run_command("--help").stdout.splitlines()
    groups = lines[lines.index("== Groups: GROUP=NAME ==") + 1 : lines.index("== Settings: KEY=VALUE ==")]
    listed = {group: names.split(", ") for group, _, names in (line.partition(": ") for line in groups if line)}
    lying = {
        folder.name: sorted(path.stem for path in folder.iterdir())
        for folder in config_folder().iterdir()
        if folder.is_dir()
    }
    assert listed == lying and len(lying["parallel"]) == 10
    assert not set(BEFORE) & set(listed["parallel"]) - {"replicas", "single"}


def test_a_typo_is_answered_with_the_entries_of_conf_alone() -> None:
    done = run_command("parallel=fdsp8")
    assert done.returncode == 2
    assert "fsdp_8gpu" in done.stderr and "usp4" not in done.stderr


def test_a_sweep_over_former_names_makes_a_point_of_each(tmp_path: Path) -> None:
    done = run_command(
        "-m", "model=tiny", "stories=examples", f"output={tmp_path}", "parallel=ulysses2,fsdp8", "launch.dry_run=true"
    )
    assert done.returncode == 0, done.stderr
    for point in ("parallel=ulysses2", "parallel=fsdp8"):
        assert f"in {tmp_path / point}\n" in done.stdout


@pytest.mark.parametrize(("former", "present"), FORMER_KEYS.items())
def test_a_former_name_of_a_setting_sets_the_present_one(former: str, present: str) -> None:
    assert with_present_keys([f"{former}=true", f"++{former}=a=b", "-m", "output=x"]) == [
        f"{present}=true",
        f"++{present}=a=b",
        "-m",
        "output=x",
    ]
    group, _, key = present.partition(".")
    assert getattr(getattr(compose_settings([f"{former}=true"]), group), key) is True
