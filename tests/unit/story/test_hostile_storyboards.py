"""The time to refuse a hostile file grows no faster than its size: each shape is tried at a size and four times it."""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboards

UNITS = (
    *(
        "'\\'",
        '"\\"',
        "\\",
        '"',
        "'",
        "[",
        "{",
        '{"a":',
        "[{",
        ",",
        ", ",
        "/*",
        "//\n",
        "/",
        "```\n",
        "~~~\n",
        "}",
        "]",
    ),
    *(
        "1",
        "1:",
        "1.",
        "1_",
        "0x",
        "9e",
        "-",
        "+",
        "- ",
        "? ",
        "a: ",
        "&a ",
        "*a ",
        "!a ",
        "!",
        "|\n",
        ">\n",
        "%A\n",
        "<<: ",
    ),
    *(
        "\n",
        "\r",
        "\t",
        " ",
        "\u00a0",
        "\ufeff",
        "“",
        "…",
        "...",
        "True",
        "#",
        " #",
        '"a",',
        '{"a":1}\n',
        '{"a"\n',
        "a\n",
        "é",
        "🎬",
    ),
    *('{"scenes":', '[{"story":', "\\u0041", "---\n", "...\n", "`", "@", "null", "x"),
)
AROUND = {
    "alone": "{}",
    "in a text": '{{"story_name": "{}"}}',
    "in a list": '{{"scenes": [{}]}}',
    "a key": '{{"{}": 1, "scenes": []}}',
    "a value": '{{"seed": {}}}',
    "in JSON5": "{{a: {}}}",
    "a prompt": '{{"scenes": [{{"video_prompts": ["{}"], "cut": [true]}}]}}',
    "a YAML prompt": "scenes:\n- video_prompts:\n  - {}\n",
    "a YAML value": "a: {}",
    "a YAML text": 'a: "{}"',
    "in a fence": "```json\n{}\n```",
}
SUFFIXES = (".json", ".jsonl", ".yaml")
SMALL, LARGE = 3_000, 12_000
MOST_GROWTH = 9.0
"""For four times the size: 4 is linear, 16 quadratic."""

UNNOTICED_SECONDS = 0.15


def seconds(path: Path, text: str) -> float:
    """Processor time, so that a busy machine changes little."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    begun = time.process_time()
    try:
        batch = load_storyboards(path)
    except StoryboardError:
        batch = None
    taken = time.process_time() - begun
    for problem in batch.rejected if batch else ():
        assert problem.message.isprintable() and len(problem.message.removeprefix(str(path))) < 1000
    return taken


def repeated(around: str, unit: str, size: int) -> str:
    count = max(1, size // len(unit))
    return AROUND[around].format(
        "".join(unit.replace("a", f"k{i}") for i in range(count)) if "a" in unit else unit * count
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    around=st.sampled_from(sorted(AROUND)),
    unit=st.sampled_from(UNITS) | st.text(alphabet="'\"\\[]{},:#-?&*!|>%@`/ \n\t0a1e.é", min_size=1, max_size=4),
    suffix=st.sampled_from(SUFFIXES),
)
@example(around="alone", unit="'\\'", suffix=".json")
@example(around="in a list", unit="'\\'", suffix=".json")
@example(around="a YAML value", unit="1:", suffix=".yaml")
@example(around="a YAML value", unit="1", suffix=".yaml")
@example(around="a value", unit="1", suffix=".json")
def test_four_times_the_size_takes_about_four_times_as_long(
    tmp_path_factory: pytest.TempPathFactory, around: str, unit: str, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"hostile{suffix}"
    large = repeated(around, unit, LARGE)
    taken = seconds(path, large)
    if taken < UNNOTICED_SECONDS:
        return
    before = min(seconds(path, repeated(around, unit, SMALL)) for _ in range(3))
    taken = min(taken, *(seconds(path, large) for _ in range(2)))
    assert taken < MOST_GROWTH * max(before, UNNOTICED_SECONDS / 8), f"{before:.3f} s, then {taken:.3f} s"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("around", "unit", "suffix"),
    [
        ("alone", "'\\'", ".json"),
        ("alone", "'\\'", ".jsonl"),
        ("a YAML value", "1:", ".yaml"),
        ("a YAML value", "1", ".yaml"),
        ("a YAML value", "1.", ".yaml"),
        ("a value", "1", ".json"),
        ("in a list", '"a",', ".json"),
        ("a YAML prompt", "! ", ".yaml"),
        ("a YAML prompt", "#", ".yaml"),
        ("alone", '{"a"\n', ".jsonl"),
        ("alone", '{"a":1}\n', ".jsonl"),
        ("alone", "```\n", ".json"),
        ("alone", '{"scenes":', ".json"),
        ("alone", "- ", ".yaml"),
    ],
)
def test_a_file_just_under_the_size_limit_is_done_within_seconds(
    tmp_path: Path, around: str, unit: str, suffix: str
) -> None:
    text = repeated(around, unit, 2**20 // len(unit.replace("a", "k10000")) * len(unit) - 200)
    assert seconds(tmp_path / f"a{suffix}", text) < 20.0


def test_an_object_of_many_keys_is_checked_within_seconds(tmp_path: Path) -> None:
    keys = ", ".join(f'"sed{number % 1000:x}e{number // 1000:x}": 1' for number in range(50_000))
    assert seconds(tmp_path / "a.json", '{"scenes": [], ' + keys + "}") < 20.0


def test_the_most_shots_of_a_story_are_limited(tmp_path: Path) -> None:
    prompts, cuts = '"a",' * 10_001, "true," * 10_001
    path = tmp_path / "a.json"
    path.write_text(f'{{"scenes": [{{"video_prompts": [{prompts}], "cut": [{cuts}]}}]}}')
    (problem,) = load_storyboards(path).rejected
    assert problem.message == f"{path}, scene 1: more than 10000 shots; allowed: at most 10000"
