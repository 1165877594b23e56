"""A prompt of which the model knows no word is warned about; any other is not."""

from pathlib import Path

import pytest

from storymem_dist.config.composing import compose_settings, to_plain
from storymem_dist.config.points import Point
from storymem_dist.render.check import check_job
from tests.helpers.small_job import write_storyboard
from tools.nano import words


def warnings_of(tmp_path: Path, model: str, prompts: list[str]) -> list[str]:
    path = write_storyboard(tmp_path / "story.json", [[True] * len(prompts)])
    text = path.read_text()
    for index, prompt in enumerate(prompts):
        text = text.replace(f"story: scene 1, shot {index}", prompt)
    path.write_text(text)
    settings = compose_settings([f"model={model}", f"stories.path='{path}'", f"output='{tmp_path / 'run'}'"])
    [batch] = check_job([Point(settings=settings, plain=to_plain(settings), name="")]).batches
    return [one for one in batch.stories[0].warnings if "knows no word" in one]


def test_nano_knows_some_words_and_says_where_it_knows_none(tmp_path: Path) -> None:
    prompts = ["A red ball jumps.", "Zwei alte Fischer reparieren ihr Netz.", "An astronaut and the SNOW!", "!!!"]
    found = warnings_of(tmp_path, "nano", prompts)
    assert len(found) == 2
    assert "shot_02" in found[0] and "Zwei alte Fischer" in found[0]
    assert "shot_04" in found[1]


@pytest.mark.parametrize("prompt", ["qqq", "雪", "🎬"])
def test_a_tokenizer_that_reads_any_text_is_never_warned_about(tmp_path: Path, prompt: str) -> None:
    assert warnings_of(tmp_path, "tiny", [prompt]) == []


def test_the_words_of_the_page_are_those_of_the_tokenizer() -> None:
    page = (Path(__file__).parents[3] / "docs" / "nano.md").read_text()
    for word, _ in words.WORDS:
        assert f" {word}" in page or f"`{word}" in page, word
