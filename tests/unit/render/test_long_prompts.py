"""A prompt that the text encoder cuts is never cut without a word: a warning for its shot, or its story is refused."""

import bisect
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from storymem_dist.cli import doctor
from storymem_dist.errors import ConfigError, StoryboardError
from storymem_dist.launch.forecast import describe
from storymem_dist.models.wan.text_encoder import MAX_TOKENS, clean_prompt
from storymem_dist.render.check import CheckedJob, check_job
from storymem_dist.weights import prompt_lengths
from storymem_dist.weights.bundle import open_weights, with_generated_weights
from storymem_dist.weights.text_encoder import load_tokenizer
from tests.helpers.small_job import render_small, small_point, small_settings

WORD = "lantern "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def write(path: Path, *prompts: str, **extra: object) -> Path:
    scene = {"scene_num": 1, "video_prompts": list(prompts), "cut": [True] * len(prompts)}
    path.write_text(json.dumps({"story_name": path.stem, "story_overview": "", "scenes": [scene], **extra}))
    return path


def checked(folder: Path, *overrides: str) -> CheckedJob:
    return check_job([small_point(f"stories.path='{folder}'", *overrides)])


@functools.cache
def tokenizer() -> Any:
    settings = small_settings()
    weights = open_weights(with_generated_weights(settings.model), ["t2v"], settings.sampler.continuation)
    return load_tokenizer(weights.any_checkpoint.tokenizer_path)


def num_tokens(text: str) -> int:
    return len(tokenizer()(clean_prompt(text), verbose=False)["input_ids"])


@functools.cache
def longest_that_fits() -> str:
    """The most words that the text encoder reads whole."""
    counts = range(1, MAX_TOKENS + 1)
    fitting = bisect.bisect_right(counts, MAX_TOKENS, key=lambda count: num_tokens(WORD * count))
    return (WORD * fitting).strip()


def test_the_limit_is_met_exactly_and_what_is_lost_is_named(folder: Path) -> None:
    fits = longest_that_fits()
    write(folder / "a.json", "A door.", fits, f"{fits} and the whole end is lost")
    (story,) = checked(folder).batches[0].stories
    (warning,) = story.warnings
    count = num_tokens(story.shots[2].prompt)
    assert warning.startswith(
        f"{folder}/a.json, scene 1, shot_03: the prompt has {count} tokens, and the text encoder reads 512; lost from "
    )
    assert "lost from 'and the whole end is lost' on" in warning or "the whole end is lost' on" in warning
    assert story.shots[2].prompt.endswith("lost"), "the prompt itself stays as it was written"


def test_style_and_prompt_count_together(folder: Path) -> None:
    fits = longest_that_fits()
    write(folder / "a.json", fits, style="Film.")
    write(folder / "b.json", fits)
    first, second = checked(folder).batches[0].stories
    assert "shot_01: style and prompt together have" in first.warnings[0] and second.warnings == ()


def test_the_text_is_counted_as_it_is_cleaned(folder: Path) -> None:
    fits = longest_that_fits()
    write(folder / "a.json", fits.replace(" ", " \n\t  "))
    (story,) = checked(folder).batches[0].stories
    assert story.warnings == ()


def test_refuse_rejects_the_story_and_renders_the_others(folder: Path) -> None:
    long = WORD * 600
    write(folder / "a.json", long, "A door.", long)
    write(folder / "b.json", "A door.")
    (batch,) = checked(folder, "stories.long_prompts=refuse").batches
    assert [story.story_id for story in batch.stories] == ["b"]
    (problem,) = batch.rejected
    assert problem.source == folder / "a.json"
    assert problem.message.startswith(f"{folder}/a.json, scene 1, shot_01: the prompt has ")
    assert problem.message.endswith(" (and 1 more shots); shorten it, or render it with stories.long_prompts=warn")


def test_refusing_all_stories_ends_the_job_before_it_begins(folder: Path) -> None:
    write(folder / "a.json", WORD * 600)
    with pytest.raises(StoryboardError, match=r"no storyboard can be rendered: .*stories\.long_prompts=warn"):
        checked(folder, "stories.long_prompts=refuse")


def test_a_negative_prompt_that_is_cut_is_said_where_it_is_read(folder: Path) -> None:
    write(folder / "a.json", "A door.")
    long = f"sampler.negative_prompt='{WORD * 600}'"
    guided, unguided = "sampler.guidance_scale_high=3", "sampler.guidance_scale_high=1"
    both = "sampler.guidance_scale_low=1"
    (warning,) = checked(folder, long, guided, both).batches[0].warnings
    assert warning.startswith("sampler.negative_prompt has ")
    assert checked(folder, long, unguided, both).batches[0].warnings == ()
    with pytest.raises(ConfigError, match=r"sampler\.negative_prompt has .*stories\.long_prompts=warn"):
        checked(folder, long, guided, both, "stories.long_prompts=refuse")


def test_short_prompts_load_no_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lengths, "load_tokenizer", None)
    write(folder / "a.json", "A door. " * 50)
    assert checked(folder).batches[0].stories[0].warnings == ()


def test_another_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stories\.long_prompts='cut' is not allowed; use one of: warn, refuse"):
        small_settings("stories.long_prompts=cut")


def test_warnings_of_stories_reach_events_dry_runs_and_the_doctor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "a.json", WORD * 600, lyric_line="la")
    unknown = f"{folder}/a.json: unknown keys are not used: 'lyric_line'"
    long = f"{folder}/a.json, scene 1, shot_01: the prompt has "
    said = describe([small_point(f"stories.path='{folder}'", f"output='{tmp_path / 'dry'}'")])
    assert f"warning: {unknown}\n" in said and f"warning: {long}" in said

    assert render_small(folder, tmp_path / "run", "sampler.num_inference_steps=1") == 0
    events = [
        json.loads(line) for path in (tmp_path / "run/events").iterdir() for line in path.read_text().splitlines()
    ]
    warned = [event["message"] for event in events if event.get("source") == "stories"]
    assert len(warned) == 2 and warned[0] == unknown and warned[1].startswith(long)

    findings = list(doctor.job.check_stories(small_settings(f"stories.path='{folder}'")))
    assert [(finding.state, finding.name) for finding in findings] == [
        ("ok", "files"),
        ("warning", "text"),
        ("warning", "text"),
    ]
    assert findings[1].value == unknown and findings[2].value.startswith(long)
