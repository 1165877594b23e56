"""What an installed package finds: the files that lie next to the package in a checkout lie inside a wheel."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("conf", "examples", "launch", "slurm")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheels')"

if not (ROOT / "setup.py").exists():
    pytest.skip("needs a checkout", allow_module_level=True)
pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A wheel of this checkout, unpacked. Built from a copy, so that no build folder is left here."""
    source = tmp_path_factory.mktemp("source")
    for name in ("storymem_dist", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True, timeout=200)
    [wheel] = (source / "wheels").glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(source / "installed")
    yield source / "installed"


def test_every_file_next_to_the_package_is_inside_the_wheel(installed: Path) -> None:
    for name in FOLDERS:
        here = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()}
        there = installed / "storymem_dist" / "assets" / name
        assert {path.relative_to(there) for path in there.rglob("*") if path.is_file()} == here


def test_every_file_of_the_package_and_the_licence_are_inside_the_wheel(installed: Path) -> None:
    package = ROOT / "storymem_dist"
    here = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {Path("py.typed"), Path("weights/published.yaml"), Path("observe/report/script.js")} <= here
    assert [path for path in here if not (installed / "storymem_dist" / path).is_file()] == []
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


def test_every_console_script_names_a_function(installed: Path) -> None:
    [entry_points] = installed.glob("*.dist-info/entry_points.txt")
    scripts = ConfigParser()
    scripts.read_string(entry_points.read_text())
    assert len(scripts["console_scripts"]) == 7
    for target in scripts["console_scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "module", ["storymem_dist", "storymem_dist.cli", "storymem_dist.observe.report.cli", "storymem_dist.observe.feeder"]
)
def test_a_former_way_to_start_a_command_still_works(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "storymem" in done.stdout


def test_an_installed_command_finds_entries_former_names_and_examples(installed: Path, tmp_path: Path) -> None:
    arguments = ["stories=examples", "parallel=fsdp8", "--cfg", "job", "--resolve"]
    done = subprocess.run(
        [sys.executable, "-m", "storymem_dist.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"path: {installed / 'storymem_dist' / 'assets' / 'examples'}\n" in done.stdout
    assert "  ulysses: 8\n" in done.stdout and "  weights: fsdp\n" in done.stdout
