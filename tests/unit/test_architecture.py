"""Who may import what, where import-linter (see pyproject.toml) cannot look: submodules of other packages."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import storymem_dist

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "storymem_dist"

RULES = {
    "torch.distributed": ("parallel/", "selftest/", "launch/torchrun.py"),
    "hydra": ("cli/render.py", "config/", "launch/"),
    "omegaconf": ("cli/render.py", "config/", "launch/"),
    "wandb": ("observe/wandb/",),
    "prometheus_client": ("observe/prometheus.py",),
    "diffusers": ("models/wan/", "weights/", "diffusion/solver.py", "parallel/vae.py", "selftest/"),
    "deepspeed": ("parallel/zero3.py",),
    "accelerate": ("parallel/",),
    "starlette": ("observe/live/",),
    "uvicorn": ("observe/live/",),
    "storymem_dist.observe.live": ("observe/live/", "cli/report.py"),
}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports_in_package() -> dict[str, tuple[str, ...]]:
    return {path.relative_to(PACKAGE).as_posix(): tuple(imports_of(path)) for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("module", RULES)
def test_a_library_is_imported_only_where_it_belongs(module: str) -> None:
    offenders = {
        f"{where}: {name}"
        for where, names in imports_in_package().items()
        if not where.startswith(RULES[module])
        for name in names
        if name == module or name.startswith(f"{module}.")
    }
    assert not offenders


def test_the_check_sees_imports_of_every_form(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("def f():\n    import torch.distributed as dist\n\nfrom torch import distributed\n")
    assert {"torch.distributed"} <= set(imports_of(source))
    source.write_text("from torch import distributed\n")
    assert "torch.distributed" in set(imports_of(source))


PRINTING = ("print", "print_exc", "print_exception", "basicConfig", "StreamHandler", "Console", "ArgumentParser")
"""Names whose calls write to the terminal without the escapes of ``terminal``."""


def prints(tree: ast.AST) -> Iterator[int]:
    """Lines that write to the process's streams: calls of ``PRINTING``, and ``write`` of a standard stream."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in PRINTING and not (name == "print" and isinstance(node.func, ast.Attribute)):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr in ("write", "writelines", "buffer"):
            owner = node.value
            if isinstance(owner, ast.Attribute) and owner.attr.strip("_") in ("stdout", "stderr"):
                yield node.lineno


def test_only_the_terminal_package_prints() -> None:
    offenders = [
        f"{where}:{line}"
        for path in PACKAGE.rglob("*.py")
        if not (where := path.relative_to(PACKAGE).as_posix()).startswith("terminal/")
        for line in prints(ast.parse(path.read_text()))
    ]
    assert not offenders, "use storymem_dist.terminal: streams, rich_console, program.Parser"


def test_the_check_sees_printing_of_every_form() -> None:
    for text in (
        "print(1)",
        "sys.stderr.write('x')",
        "out = sys.stdout.write",
        "import traceback; traceback.print_exc()",
        "sys.__stderr__.write('x')",
        "logging.StreamHandler()",
        "rich.console.Console().print('x')",
        "argparse.ArgumentParser()",
    ):
        assert list(prints(ast.parse(text))), text
    assert not list(prints(ast.parse("console.print('x'); file.write('x')")))


def test_every_module_says_what_it_does() -> None:
    silent = [str(path) for path in PACKAGE.rglob("*.py") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_the_root_of_the_package_holds_at_most_eight_files() -> None:
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(files) <= 8, files


@pytest.mark.parametrize("folder", ["storymem_dist", "tests", "benchmarks"])
def test_no_module_is_longer_than_400_lines(folder: str) -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert sizes, "nothing was found"
    assert not {path: size for path, size in sizes.items() if size > 400}


def test_the_version_has_one_source_and_the_citation_agrees() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == project["version"]
    assert storymem_dist.__version__ == version("storymem_dist")
