"""Every file that is no storyboard gives one message with the line and the cure, in seconds; so does every picture."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from storymem_dist.errors import StoryboardError
from storymem_dist.story.loading import load_storyboard
from tests.unit.story.test_storyboard_messages import GOOD, STORY_RULE, message_for

SUFFIXES = "allowed: .json, .json5, .jsonl, .ndjson, .yaml, .yml"
OR_PROMPTS = ", or .txt with a prompt a line"
CUT_SHORT = "the text ends in the middle of the storyboard; it was cut short, write it out to its end"
IF_PROMPT = "if this is a prompt, put the prompt in quotes"
QUOTED = "allowed: text; put the text in quotes"
SCENES = "allowed: a list of scenes"
EMPTY = ": the file is empty; a storyboard holds story_name, story_overview and scenes"
DEEP = ": nested too deeply; a storyboard nests 4 levels"
TOO_LARGE = ": larger than 1 MiB, the most a storyboard may have"

FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.json", b"", EMPTY),
    "only white space": ("a.yaml", b" \n\t\n", EMPTY),
    "only a byte order mark": ("a.json", b"\xef\xbb\xbf", EMPTY),
    "another suffix": ("a.md", b"{}", f": the suffix .md is not a storyboard's; {SUFFIXES}{OR_PROMPTS}"),
    "no suffix": ("a", b"{}", f": the suffix (none) is not a storyboard's; {SUFFIXES}{OR_PROMPTS}"),
    "Windows-1252": (
        "a.json",
        b'{\n"story_name": "\x93quoted\x94"}',
        ": not UTF-8: byte 0x93 in line 2 (offset 17); save the file as UTF-8",
    ),
    "UTF-16": ("a.json", "{}".encode("utf-16"), ": line 1: this is UTF-16 or UTF-32; save the file as UTF-8"),
    "a NUL byte": (
        "a.yaml",
        b"a: 1\nb: \0",
        ": a NUL byte in line 2; this is not a text file in UTF-8, save it as UTF-8",
    ),
    "a list": ("a.json", b"[1, 2]", f": a storyboard is a list of 2; allowed: an object with {STORY_RULE}"),
    "a number": ("a.json", b"NaN", f": a storyboard is the number nan; allowed: an object with {STORY_RULE}"),
    "broken JSON": (
        "a.json",
        b'{\n "story_name": "x"\n "scenes": []}',
        ": not valid JSON or JSON5, line 3, column 2: Expecting ',' delimiter;"
        ' a comma is missing, or a " inside a text needs a \\ before it',
    ),
    "JSON cut short": (
        "a.json",
        b'{"story_name": "x',
        f": not valid JSON or JSON5, line 1: {CUT_SHORT}",
    ),
    "broken JSON5": (
        "a.json5",
        b"{story_name: 'x',\n scenes: }",
        ': not valid JSON or JSON5, line 2, column 10: Unexpected "}"; correct what stands there',
    ),
    "long JSON5": (
        "a.json5",
        b"{story_name: '" + b"x" * 40_000 + b"'}",
        ": not valid JSON, line 1, column 2: Expecting property name enclosed in double quotes (comments and trailing"
        " commas are allowed; the rest of JSON5, such as keys without quotes, only in files of up to 32 KiB)",
    ),
    "a key twice in JSON": (
        "a.json",
        b'{"seed": 1, "seed": 2}',
        ": the key 'seed' is written twice in one object; keep one of them",
    ),
    "a key twice in JSON5": (
        "a.json5",
        b"{seed: 1, seed: 2}",
        ": the key 'seed' is written twice in one object; keep one of them",
    ),
    "a key twice in YAML": (
        "a.yaml",
        b"style: a\nseed: 1\nseed: 2",
        ": line 3: the key 'seed' is written twice in one mapping; keep one of them",
    ),
    "deep JSON": ("a.json", b"[" * 200_000, DEEP),
    "deep JSON5": ("a.json5", b"/**/" + b"[" * 15_000 + b"x", DEEP),
    "deep YAML": ("a.yaml", b"[" * 1_000_000, ": line 1: nested too deeply; a storyboard nests 4 levels"),
    "deep block YAML": ("a.yaml", b"- " * 100_000, ": line 1: nested too deeply; a storyboard nests 4 levels"),
    "a YAML bomb": (
        "a.yaml",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        f": line 2: YAML aliases (*a) are not allowed; write the value out, or {IF_PROMPT}",
    ),
    "a YAML object": (
        "a.yaml",
        b"a: !!python/object/apply:os.system ['true']",
        ": line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed; remove it, or"
        f" {IF_PROMPT}",
    ),
    "two YAML documents": ("a.yaml", b"a: 1\n---\nb: 2", ": 2 stories; load_storyboards reads them all"),
    "broken YAML": (
        "a.yaml",
        b"a: [1, 2\n",
        f": not valid YAML, line 2, column 1: did not find expected ',' or ']'; {IF_PROMPT}",
    ),
    "a tab in YAML": (
        "a.yaml",
        b"scenes:\n\t- a",
        ": not valid YAML, line 2, column 1: found character that cannot start any token; indent with spaces, or"
        f" {IF_PROMPT}",
    ),
    "a control character in YAML": (
        "a.yaml",
        b"a: 1\nb: \x07",
        ": not valid YAML, line 2: the control character U+0007; remove it",
    ),
    "a YAML key that is a list": (
        "a.yaml",
        b"? [a]\n: b",
        f": line 1: a key is a list or an object; write text before the colon; {IF_PROMPT}",
    ),
    "a date for a name": (
        "a.yaml",
        b"scenes: 1\nstory_name: 2024-13-45",
        f": story_name is the date '2024-13-45'; {QUOTED}",
    ),
    "a number of 5000 digits": (
        "a.json",
        b'{"scenes": ' + b"1" * 5000 + b"}",
        f": scenes is a number of 5000 digits; {SCENES}",
    ),
    "a number of 5000 digits in YAML": (
        "a.yaml",
        b"scenes: " + b"1" * 5000,
        f": scenes is a number of 5000 characters; {SCENES}",
    ),
    "a number in base 60": (
        "a.yaml",
        b"scenes: " + b"1:" * 5000 + b"1",
        f": scenes is a number of 10001 characters; {SCENES}",
    ),
    "curly quotes": (
        "a.json",
        "{\n “story_name”: “x”}".encode(),
        ': not valid JSON, line 2: the curly quote “; write straight quotes " around keys and texts',
    ),
    "an ellipsis": (
        "a.json",
        b'{"scenes": [\n ...\n]}',
        ": not valid JSON, line 2: an ellipsis (...); write out what it stands for",
    ),
    "Python's words": ("a.json", b'{"a": [\nTrue]}', ": not valid JSON, line 2: True is Python's; write true"),
    "Python's None": ("a.json5", b"{'a': None}", ": not valid JSON or JSON5, line 1: None is Python's; write null"),
    "a line break in a text": (
        "a.json",
        b'{"a": "one\ntwo"}',
        ": not valid JSON, line 1: a line break inside a text; write \\n or a space, or end the text before it",
    ),
    "words before the storyboard": (
        "a.json",
        b'Here it is:\n{"a": 1}',
        ": not valid JSON, line 1: the file begins with 'Here it is:'; remove all that is before the first {",
    ),
    "words after the storyboard": (
        "a.json",
        b'{"a": 1}\nI hope this helps!',
        ": not valid JSON, line 2: 'I hope this helps!' follows after the storyboard's end; remove it, or write several"
        " storyboards as a list or one a line",
    ),
    "a quote inside a text": (
        "a.json",
        b'{"a": "He says "go" twice"}',
        ": not valid JSON or JSON5, line 1, column 17: Expecting ',' delimiter;"
        ' a comma is missing, or a " inside a text needs a \\ before it',
    ),
    "two fences": (
        "a.json",
        b"```\n{}\n```\nor\n```\n{}\n```",
        ": 2 Markdown fences (lines 1, 5); leave one in each file",
    ),
    "a bad storyboard in a fence": (
        "a.json",
        b'Here:\n```json\n{"a" 1}\n```',
        ": not valid JSON or JSON5, line 3, column 6: Expecting ':' delimiter; a key is followed by a colon and"
        " its value",
    ),
    "GB 18030": (
        "a.json",
        '{"story_name": "面包师"}'.encode("gb18030"),
        ": not UTF-8: byte 0xc3 in line 1 (offset 16); save the file as UTF-8",
    ),
    "storyboards in two places": (
        "a.json",
        b'{"draft": {"scenes": []}, "final": {"scenes": []}}',
        ": there are storyboards under 'draft', 'final'; keep one, or write them as a list",
    ),
    "ten megabytes of letters": ("a.json", b"x" * 10_000_000, TOO_LARGE),
    "ten megabytes of noise": ("a.yaml", bytes(range(256)) * 40_000, TOO_LARGE),
}


@pytest.mark.parametrize("case", FILES)
def test_an_unreadable_file_is_explained(tmp_path: Path, case: str) -> None:
    name, raw, expected = FILES[case]
    path = tmp_path / name
    path.write_bytes(raw)
    assert message_for(path) == expected


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["a.json5", "a.yaml"])
@pytest.mark.parametrize(
    "unit", [b"/*", b'"', b"'", b",", b"a:", b"[]", b'{"a":', b"//\n", b"\\", b"\xe2\x80\x9c", b"- ", b"? ", b"&a "]
)
def test_just_under_the_size_limit_any_repetition_is_refused_without_hanging(
    tmp_path: Path, name: str, unit: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(unit * (2**20 // len(unit)))
    message_for(path)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    assert message_for(tmp_path / "a.json") == ": no such file"


def test_a_path_that_no_file_system_takes_is_explained(tmp_path: Path) -> None:
    assert message_for(tmp_path / ("x" * 300 + ".json")) == ": cannot be read: File name too long"
    with pytest.raises(StoryboardError) as caught:
        load_storyboard(tmp_path / "a\0.json")
    assert str(caught.value) == f"{tmp_path}/a\\x00.json: cannot be read: embedded null byte"


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert message_for(tmp_path / "a.json") == ": this is not a regular file"


IMAGE_RULE = "allowed: a readable PNG, JPEG, WEBP, BMP, TIFF, GIF, AVIF, HEIC file of at most 64 megapixels"


def truncated_png(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "a folder": (Path.mkdir, "is not a file"),
    "text": (lambda path: path.write_text("not an image"), "is none of the formats that are read, or damaged"),
    "empty": (Path.touch, "is empty (0 bytes)"),
    "truncated": (truncated_png, "cannot be read (image file is truncated"),
    "a format that runs programs": (
        lambda path: Image.new("RGB", (8, 8)).save(path, format="EPS"),
        "is none of the formats that are read, or damaged",
    ),
    "too large": (
        lambda path: Image.new("1", (9000, 8000)).save(path),
        "has 9000 x 8000 pixels",
    ),
    "a decompression bomb": (
        lambda path: Image.new("1", (20000, 20000)).save(path),
        "has too many pixels; allowed: a readable",
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_unreadable_reference_image_is_explained(tmp_path: Path, case: str) -> None:
    make, problem = IMAGES[case]
    image = tmp_path / "face.png"
    make(image)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    path = tmp_path / "lamp.json"
    path.write_text(json.dumps(GOOD | {"reference_images": ["good.png", "face.png"]}))
    message = message_for(path)
    assert message.startswith(f": reference_images, entry 2: the image {image} {problem}")
    assert message.endswith(IMAGE_RULE)
