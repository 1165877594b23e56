"""Finding storyboards: files, folders, globs, lists; one bad file never stops the others."""

import json
from pathlib import Path

import pytest

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboards

PATTERNS = "*.json, *.json5, *.jsonl, *.ndjson, *.yaml, *.yml"


def write_story(path: Path, name: str = "A story") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene = {"scene_num": 1, "video_prompts": ["The sea."], "cut": [True]}
    path.write_text(json.dumps({"story_name": name, "story_overview": "", "scenes": [scene]}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three stories, and files that are no stories."""
    for name in ("b.json", "a.json5", "c.YML"):
        write_story(tmp_path / "stories" / name)
    write_story(tmp_path / "stories/below/d.json")
    write_story(tmp_path / "stories/.hidden.json")
    (tmp_path / "stories/folder.json").mkdir()
    (tmp_path / "stories/notes.txt").write_text("no story")
    return tmp_path / "stories"


def ids(batch: object) -> list[str]:
    return [story.story_id for story in batch.stories]  # type: ignore[attr-defined]


def test_a_file_is_one_story(folder: Path) -> None:
    batch = load_storyboards(str(folder / "b.json"))
    assert (ids(batch), batch.rejected) == (["b"], ())


def test_a_folder_is_its_storyboards_sorted_without_subfolders_and_hidden_files(folder: Path) -> None:
    batch = load_storyboards(folder)
    assert (ids(batch), batch.rejected) == (["a", "b", "c"], ())


def test_the_order_does_not_depend_on_the_order_in_which_the_disk_lists_files(tmp_path: Path) -> None:
    names = [f"story_{number * 7 % 40:02d}" for number in range(40)]
    for name in names:
        write_story(tmp_path / f"{name}.json")
    assert ids(load_storyboards(tmp_path)) == ids(load_storyboards(str(tmp_path / "*.json"))) == sorted(names)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.json", ["b"]), ("*", ["a", "b", "c"]), ("**/*.json", ["b", "d"]), ("[ab].*", ["a", "b"])],
)
def test_a_glob_takes_the_storyboards_among_its_matches(folder: Path, pattern: str, expected: list[str]) -> None:
    assert ids(load_storyboards(str(folder / pattern))) == expected


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write_story(tmp_path / "story [1].json")
    assert ids(load_storyboards(tmp_path / "story [1].json")) == ["story__1_"]


def test_a_list_keeps_its_order_and_takes_a_file_once(folder: Path) -> None:
    batch = load_storyboards([folder / "c.YML", str(folder / "*.json"), folder, folder / "below/../b.json"])
    assert (ids(batch), batch.rejected) == (["c", "b", "a"], ())


def test_a_path_in_the_home_folder_may_begin_with_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert ids(load_storyboards("~/stories/b.json")) == ["b"]


def test_a_bad_file_is_rejected_with_its_message_and_stops_no_other(folder: Path) -> None:
    (folder / "bad.json").write_text("{")
    batch = load_storyboards([folder, folder / "absent.json", folder / "*.absent"])
    assert ids(batch) == ["a", "b", "c"]
    assert [(problem.source, problem.message) for problem in batch.rejected] == [
        (
            folder / "absent.json",
            f"{folder / 'absent.json'}: no such file, folder or glob; allowed: one that holds {PATTERNS}",
        ),
        (folder / "*.absent", f"{folder / '*.absent'}: nothing matched, no storyboard found; allowed: {PATTERNS}"),
        (
            folder / "bad.json",
            f"{folder / 'bad.json'}: not valid JSON, line 1: the text ends in the middle of the storyboard; it was cut"
            " short, write it out to its end",
        ),
    ]


def test_two_files_of_one_story_id_are_both_rejected_and_name_each_other(folder: Path) -> None:
    write_story(folder / "below/B.yaml")
    batch = load_storyboards([folder, folder / "below"])
    assert ids(batch) == ["a", "c", "d"]
    first, second = folder / "b.json", folder / "below/B.yaml"
    assert [(problem.source, problem.message) for problem in batch.rejected] == [
        (
            first,
            f"{first}: the story id 'b' is also that of {second}; allowed: file names that differ before the suffix",
        ),
        (
            second,
            f"{second}: the story id 'B' is also that of {first}; allowed: file names that differ before the suffix",
        ),
    ]


def test_when_every_file_is_bad_the_batch_says_so_for_each(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("")
    (tmp_path / "b.json").write_text("[]")
    batch = load_storyboards(tmp_path)
    assert (len(batch.stories), len(batch.rejected)) == (0, 2)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoryboardError) as caught:
        load_storyboards(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no storyboard in this folder; looked for {PATTERNS}"
        f" (subfolders are not searched: use {tmp_path}/**/*.json)"
    )


def test_a_glob_of_other_files_is_refused(folder: Path) -> None:
    with pytest.raises(StoryboardError) as caught:
        load_storyboards(str(folder / "*.txt"))
    assert str(caught.value) == f"{folder}/*.txt: 1 matched, no storyboard found; allowed: {PATTERNS}"


def test_a_glob_without_a_match_is_refused(folder: Path) -> None:
    with pytest.raises(StoryboardError, match="nothing matched"):
        load_storyboards(str(folder / "*.xml"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], f"stories is an empty list; allowed: files, folders or globs of {PATTERNS}"),
        ("", f"stories='' is not a path; allowed: files, folders or globs of {PATTERNS}"),
        ("a\0b", f"stories='a\\x00b' is not a path; allowed: files, folders or globs of {PATTERNS}"),
        (7, f"stories holds 7; allowed: files, folders or globs of {PATTERNS}"),
        ([None], f"stories holds None; allowed: files, folders or globs of {PATTERNS}"),
        ("~nobody-of-that-name/x.json", "~nobody-of-that-name/x.json: cannot be read: "),
        ("x" * 300, f"{'x' * 300}: cannot be read: File name too long"),
    ],
)
def test_a_request_that_names_nothing_is_explained(spec: object, message: str) -> None:
    with pytest.raises(StoryboardError) as caught:
        load_storyboards(spec)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_a_file_name_that_no_terminal_can_show_is_escaped_in_messages(tmp_path: Path) -> None:
    (tmp_path / "line\nbreak\udcff.json").write_text("{")
    (problem,) = load_storyboards(tmp_path).rejected
    assert problem.message.startswith(f"{tmp_path}/line\\nbreak\\udcff.json: not valid JSON")
