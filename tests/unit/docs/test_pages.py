"""What README and ``docs/`` say about names, files, exit codes and variables is true; their links lead somewhere."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from PIL import Image

import storymem_dist
from storymem_dist import StoryMemPipeline, errors
from storymem_dist.config.former_names import FORMER_NAMES
from storymem_dist.config.schema import RenderConfig
from storymem_dist.story.loading import load_storyboard
from storymem_dist.terminal.program import INTERRUPTED
from tests.unit.docs.markdown import (
    DOCS,
    PAGES,
    README,
    ROOT,
    anchors_of,
    blocks_of,
    inline_code_of,
    links_of,
    table_of,
)

RUNNING, SETTINGS, LAYOUTS = (ROOT / "docs" / f"{name}.md" for name in ("running", "settings", "layouts"))
CONF = ROOT / "conf"
GROUPS = {folder.name for folder in CONF.iterdir() if folder.is_dir()}


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def entries(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_readme_is_short() -> None:
    assert README.stat().st_size < 9000


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=page_name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors_of(target), f"{link}: no such heading"


def test_the_readme_links_every_page() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(README) if not link.startswith("https:")}
    assert set(DOCS) - {ROOT / "docs" / "README.md"} <= linked


def test_pictures_are_small() -> None:
    assert all(path.stat().st_size < 200_000 for path in (ROOT / "docs" / "images").glob("*.jpg"))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_are_there(page: Path) -> None:
    tops = "storymem_dist|conf|launch|slurm|tests|benchmarks|examples|docs"
    for code in inline_code_of(page):
        if re.fullmatch(rf"({tops})/[\w/.*\-]*", code):
            assert list(ROOT.glob(code.rstrip("/"))), f"{code}: no such file"
        elif re.fullmatch(r"\w+/\w+\.py", code):
            assert (ROOT / "storymem_dist" / code).is_file(), f"{code}: no such file in storymem_dist/"


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_table_of_groups_lists_every_entry() -> None:
    rows = {names_in(group)[0]: listed for group, listed, _ in table_of(SETTINGS, "group")}
    assert set(rows) == GROUPS | {"dispatch", "video"}
    for group in GROUPS:
        hidden = {"none"} if group == "stories" else set()  # not chosen by name
        assert set(names_in(rows[group])) == entries(group) - hidden, group


def test_the_table_of_presets_lists_every_preset_and_every_former_name() -> None:
    assert {names_in(preset)[0] for preset, *_ in table_of(LAYOUTS, "preset")} == entries("parallel")
    former = {f"parallel/{name}" for names, _ in table_of(LAYOUTS, "former name") for name in names_in(names)}
    assert former == {name for name in FORMER_NAMES if name.startswith("parallel/")}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_settings_exist(page: Path) -> None:
    for code in inline_code_of(page):
        for word in code.split():
            key, equals, value = word.partition("=")
            if equals and key in GROUPS and re.fullmatch(r"\w+", value):
                assert value in entries(key), f"{code}: conf/{key}/ has no {value}.yaml"
            elif re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", key) and key.split(".")[0] in settings_of(RenderConfig):
                assert_setting(key)


def assert_setting(key: str) -> None:
    """``key`` is a dotted path into the schema."""
    kind: Any = RenderConfig
    for name in key.split("."):
        fields = settings_of(kind) if dataclasses.is_dataclass(kind) else {}
        assert name in fields, f"{key}: no such setting ({name})"
        kind = fields[name]


def settings_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


# -- codes and variables -----------------------------------------------------------------------------------------------

WORDS_OF_CODES = {
    1: ("crash",),
    2: ("setting", "layout", "extra"),
    3: ("storyboard",),
    4: ("weights", "missing", "damaged"),
    5: ("folder",),
    6: ("shots",),
}
"""What the errors of each code are about."""


def test_exit_codes_are_those_of_the_errors() -> None:
    meanings = {int(code): meaning for code, meaning in table_of(RUNNING, "code")}
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.StoryMemError)]
    assert {kind.exit_code for kind in kinds} == set(WORDS_OF_CODES), "teach this test the new exit code"
    assert set(meanings) == {0, 75, INTERRUPTED, *WORDS_OF_CODES}
    for code, words in WORDS_OF_CODES.items():
        assert all(word in meanings[code] for word in words), code
    assert "exit 75" in (ROOT / "launch" / "batch.sh").read_text()


def test_every_environment_variable_is_explained() -> None:
    named = set(re.findall(r"STORYMEM_[A-Z_]+", RUNNING.read_text()))
    python = "".join(path.read_text() for path in (ROOT / "storymem_dist").rglob("*.py"))
    scripts = "".join(
        path.read_text() for folder in ("launch", "slurm") for path in (ROOT / folder).iterdir() if path.is_file()
    )
    read = set(re.findall(r'"(STORYMEM_[A-Z_]+)"', python)) | set(re.findall(r"\bSTORYMEM_[A-Z_]+", scripts))
    assert named == read


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, SETTINGS], ids=page_name)
def test_example_storyboards_can_be_loaded(page: Path, tmp_path: Path) -> None:
    (block,) = blocks_of(page, "yaml")
    for name in yaml.safe_load(block.text).get("reference_images", []):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "story.yaml").write_text(block.text)
    story = load_storyboard(tmp_path / "story.yaml")
    assert [shot.cut for shot in story.shots] == [True, False]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")], ids=page_name)
def test_python_examples_import_and_call_what_exists(page: Path) -> None:
    for block in blocks_of(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module or ""), alias.name) for alias in node.names)
            elif isinstance(node, ast.Call):
                assert_call(node)


def assert_call(node: ast.Call) -> None:
    """A call of this package's names, or of a pipeline's methods, has arguments that fit."""
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    target = getattr(storymem_dist, name) if name in storymem_dist.__all__ else getattr(StoryMemPipeline, name, None)
    if target is None:
        return
    given = [*([None] if inspect.isfunction(target) and "." in target.__qualname__ else []), *node.args]
    inspect.signature(target).bind(*given, **{keyword.arg or "": keyword.value for keyword in node.keywords})
