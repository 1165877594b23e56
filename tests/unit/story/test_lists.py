"""Lists of stories: rows of ``LIST.jsonl`` that are paths or whole storyboards, and prompts of ``PROMPTS.txt``."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import StoryBatch, load_storyboard, load_storyboards

SCENES = [{"scene_num": 1, "video_prompts": ["The sea."], "cut": [True]}]
STORY: dict[str, Any] = {"story_name": "The Lamp", "seed": 5, "scenes": SCENES}


def write_rows(folder: Path, *rows: object, name: str = "list.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A storyboard of one story, and one of two."""
    (tmp_path / "lamp.json").write_text(json.dumps(STORY))
    (tmp_path / "more").mkdir()
    (tmp_path / "more/two.yaml").write_text("---\n" + "---\n".join(yaml.safe_dump(STORY) for _ in range(2)))
    return tmp_path


def told(batch: StoryBatch) -> list[tuple[str, int, int | None]]:
    return [(story.story_id, story.priority, story.seed) for story in batch.stories]


def problems(batch: StoryBatch, folder: Path) -> list[str]:
    return [one.message.replace(f"{folder}/", "") for one in batch.rejected]


def test_a_row_is_a_path_or_a_storyboard_with_id_priority_and_seed_over_it(folder: Path) -> None:
    path = write_rows(
        folder,
        '"lamp.json"',
        {"path": "lamp.json", "id": "Lamp again", "priority": -2, "seed": 9},
        {"path": "more/two.yaml", "id": "pair", "priority": 3},
        {**STORY, "priority": 1},
        {**STORY, "id": 17, "seed": 6},
        {"story": STORY, "id": "wrapped", "seed": 8},
        {"path": str(folder / "more"), "seed": 0},
    )
    batch = load_storyboards(path)
    assert problems(batch, folder) == []
    assert told(batch) == [
        ("lamp", 0, 5),
        ("Lamp_again", -2, 9),
        ("pair-1", 3, 5),
        ("pair-2", 3, 5),
        ("list-4", 1, 5),
        ("17", 0, 6),
        ("wrapped", 0, 8),
        ("two-1", 0, 0),
        ("two-2", 0, 0),
    ]


def test_a_list_of_one_row_is_a_list(folder: Path) -> None:
    assert told(load_storyboards(write_rows(folder, '"lamp.json"'))) == [("lamp", 0, 5)]
    assert told(load_storyboards(write_rows(folder, {"path": "lamp.json", "priority": 2}))) == [("lamp", 2, 5)]
    assert load_storyboard(folder / "list.jsonl").priority == 2


def test_paths_are_searched_from_the_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lists").mkdir()
    path = write_rows(folder / "lists", {"path": "../lamp.json"}, {"path": "../more/*.yaml"})
    monkeypatch.chdir(folder / "more")
    batch = load_storyboards(path)
    assert [story.story_id for story in batch.stories] == ["lamp", "two-1", "two-2"]


BAD_ROWS: dict[str, tuple[object, str]] = {
    "a path of nothing": (
        {"path": "absent.json"},
        "list.jsonl, line 2: absent.json: no such file, folder or glob; allowed: one that holds *.json, *.json5,"
        " *.jsonl, *.ndjson, *.yaml, *.yml",
    ),
    "a path that is a number": (
        {"path": 7},
        "list.jsonl, story 2: line 2: path is the number 7; allowed: text",
    ),
    "a priority as text": (
        {"path": "lamp.json", "priority": "high"},
        "list.jsonl, story 2: line 2: priority is the text 'high'; allowed: a whole number from -1000000 to 1000000",
    ),
    "a seed below zero": (
        {"path": "lamp.json", "seed": -1},
        "list.jsonl, story 2: line 2: seed is the number -1; allowed: a whole number from 0 to 9223372036854775807",
    ),
    "an id of two lines": (
        {"path": "lamp.json", "id": "a\nb"},
        "list.jsonl, story 2: line 2: id holds the character U+000A; allowed: one line of text without control"
        " characters and characters that change its direction",
    ),
    "a broken line": (
        '{"path": lamp.json}',
        "list.jsonl, story 2: line 2, column 10: Expecting value; write a value here, or remove the comma or colon"
        " before it",
    ),
    "neither": (
        {"file": "lamp.json"},
        "list.jsonl, story 2: line 2: 'file' is no key of a row; write the storyboard's file as path",
    ),
    "a prompt": (
        {"prompt": "The sea."},
        "list.jsonl, story 2: line 2: the row has 'prompt' and no scenes; write scenes with shots, or prompts alone in"
        " a .txt file",
    ),
    "a key twice": (
        '{"path": "lamp.json", "path": "lamp.json"}',
        "list.jsonl, story 2: line 2: the key 'path' is written twice in one object; keep one of them",
    ),
    "a number": (
        "7",
        "list.jsonl, story 2: a storyboard is the number 7; allowed: an object with story_name, story_overview, scenes",
    ),
    "prompts": (
        {"path": "prompts.txt"},
        "list.jsonl, line 2: prompts.txt: a list of prompts cannot be a row of a list; give it next to the list",
    ),
    "a list": (
        '"list.jsonl"',
        "list.jsonl, line 2: list.jsonl: a list cannot be a row of a list; write its rows there",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_rejected_alone(folder: Path, case: str) -> None:
    row, expected = BAD_ROWS[case]
    (folder / "prompts.txt").write_text("The sea.\n")
    batch = load_storyboards(write_rows(folder, '"lamp.json"', row, {**STORY, "id": "own"}))
    assert [story.story_id for story in batch.stories] == ["lamp", "own"]
    assert problems(batch, folder) == [expected]


def test_a_row_with_unknown_keys_has_a_warning(folder: Path) -> None:
    path = write_rows(folder, {"path": "lamp.json", "prority": 3, "owner": "me", "notes": "mine"})
    assert load_storyboard(path).warnings == (
        f"{folder}/lamp.json: line 1: the key 'prority' is not used (did you mean 'priority'?)",
        f"{folder}/lamp.json: line 1: the key 'owner' is not used",
    )


def test_one_storyboard_in_two_rows_needs_ids(folder: Path) -> None:
    batch = load_storyboards(write_rows(folder, '"lamp.json"', '"lamp.json"'))
    assert problems(batch, folder) == [
        "list.jsonl, line 1: the story id 'lamp' is also that of list.jsonl, line 2; allowed: file names that differ"
        " before the suffix, or an id in each row of a list",
        "list.jsonl, line 2: the story id 'lamp' is also that of list.jsonl, line 1; allowed: file names that differ"
        " before the suffix, or an id in each row of a list",
    ]


def test_pictures_of_a_storyboard_in_a_row_are_searched_from_the_list(folder: Path) -> None:
    batch = load_storyboards(write_rows(folder, {**STORY, "reference_images": ["a.png"]}, '"lamp.json"'))
    assert problems(batch, folder)[0].startswith(
        "list.jsonl, story 1: reference_images, entry 1: the image a.png does not"
    )


def test_four_hundred_whole_storyboards_fit_into_a_list(folder: Path) -> None:
    long = {"story_name": "x", "scenes": [{"scene_num": 1, "video_prompts": ["The sea. " * 600], "cut": [True]}]}
    path = write_rows(folder, *(long | {"priority": number} for number in range(400)))
    assert path.stat().st_size > 2 * 2**20
    assert [story.priority for story in load_storyboards(path).stories] == list(range(400))


# -- prompts -----------------------------------------------------------------------------------------------------------

PROMPTS = """\
# what to try tonight
A red ball jumps on the meadow.

A blue box sinks.  # not a comment
\t蓝色的盒子在雪地里静止不动，夜晚的月亮照着它，风轻轻地吹过来。
🎬
A red ball jumps on the meadow.
"""


@pytest.mark.parametrize(
    "raw",
    [PROMPTS.encode(), PROMPTS.encode("utf-8-sig"), PROMPTS.replace("\n", "\r\n").encode(), PROMPTS.strip().encode()],
    ids=["plain", "byte order mark", "CRLF", "no line break at the end"],
)
def test_a_line_is_a_story_of_one_shot(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(raw)
    batch = load_storyboards(tmp_path / "prompts.txt")
    assert [[shot.prompt for shot in story.shots] for story in batch.stories] == [
        ["A red ball jumps on the meadow."],
        ["A blue box sinks.  # not a comment"],
        ["蓝色的盒子在雪地里静止不动，夜晚的月亮照着它，风轻轻地吹过来。"],
        ["🎬"],
        ["A red ball jumps on the meadow."],
    ]
    assert [story.story_id for story in batch.stories] == [
        "a_red_ball_jumps_on_the_meadow-277668",
        "a_blue_box_sinks_not_a_comment-266708",
        "蓝色的盒子在雪地里静止不动-929502",
        "prompt-749467",
        "a_red_ball_jumps_on_the_meadow-277668-2",
    ]
    assert batch.stories[0].name == "a red ball jumps on the meadow" and batch.all_warnings == ()


def test_a_thousand_prompts_are_a_thousand_stories_whose_ids_do_not_depend_on_their_places(tmp_path: Path) -> None:
    prompts = [f"A red ball jumps on the meadow, and after that it moves to hill number {n}." for n in range(1000)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts))
    ids = {story.shots[0].prompt: story.story_id for story in load_storyboards(path).stories}
    assert len(set(ids.values())) == 1000 and all(one.startswith("a_red_ball_jumps_on_the_mea") for one in ids.values())
    path.write_text("\n".join(["A sea.", *reversed(prompts)]))
    later = {story.shots[0].prompt: story.story_id for story in load_storyboards(path).stories}
    assert sum(later[prompt] == ids[prompt] for prompt in prompts) >= 998  # equal numbers are counted in order


BAD_TEXTS: dict[str, tuple[bytes, str]] = {
    "no prompt": (b"\n# none\n", ": there is no prompt in it; write one a line (lines that begin with # are skipped)"),
    "a storyboard": (
        b'{\n "story_name": "x"}',
        ": this looks like a storyboard, and each line of a .txt file is read as a prompt; name it .json, .jsonl or"
        " .yaml",
    ),
    "UTF-16": ("A sea.".encode("utf-16"), ": line 1: this is UTF-16 or UTF-32; save the file as UTF-8"),
    "too many": (b"a\n" * 10_001, ": 10001 prompts in one file; allowed: at most 10000"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_file_that_holds_no_prompts_is_explained(tmp_path: Path, case: str) -> None:
    raw, expected = BAD_TEXTS[case]
    (tmp_path / "a.txt").write_bytes(raw)
    (problem,) = load_storyboards(tmp_path / "a.txt").rejected
    assert problem.message == f"{tmp_path}/a.txt{expected}"


def test_a_prompt_that_cannot_be_rendered_is_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A sea.\nA\x1b[31m red sea.\n" + "x" * 10_001)
    batch = load_storyboards(tmp_path / "a.txt")
    assert len(batch.stories) == 1
    assert problems(batch, tmp_path) == [
        "a.txt, line 2, scene 1, shot 1: the prompt holds the control character U+001B; allowed: printable text",
        "a.txt, line 3, scene 1, shot 1: the prompt has 10001 characters; allowed: at most 10000",
    ]


def test_equal_prompts_without_end_take_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A sea.\n" * 10_000)
    batch = load_storyboards(tmp_path / "a.txt")
    assert len({story.story_id for story in batch.stories}) == 10_000


def test_folders_and_globs_take_no_prompts_by_accident(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Buy milk.")
    (tmp_path / "lamp.json").write_text(json.dumps(STORY))
    assert [story.story_id for story in load_storyboards(tmp_path).stories] == ["lamp"]
    with pytest.raises(StoryboardError, match="1 matched, no storyboard found"):
        load_storyboards(str(tmp_path / "*.txt"))
