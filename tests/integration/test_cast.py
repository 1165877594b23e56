"""Two characters in one story, seen by the judge of ``tools/nano``: shots recall one or the other by name and by
entity, and a memory by entity brings back a character who was away for eleven shots, where a window does not.
"""

from pathlib import Path

import pytest
import torch

from tools.nano.cast import Cast, Character, render, seen

pytestmark = pytest.mark.timeout(900)

RED, BLUE = (
    Character(name="Ruby", colour="red", shape="ball"),
    Character(name="Bo", colour="blue", shape="box"),
)
SETTINGS = ("memory.num_fixed=1", "sampler.num_inference_steps=8")
"""One place of four for the sink: with A14B's sizes that is three of ten."""


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    return Cast(folder=tmp_path_factory.mktemp("cast") / "stories", g=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def by_entity(cast: Cast) -> Path:
    """The run folder of all stories with a memory by entity."""
    cast.two("two", RED, BLUE)
    cast.away("away", RED, BLUE)
    render(cast.folder, cast.folder.parent / "by_entity", "memory.recall=entities", *SETTINGS)
    return cast.folder.parent / "by_entity"


def test_shots_show_the_character_that_they_recall_by_name_or_by_entity(cast: Cast, by_entity: Path) -> None:
    wanted = cast.wanted["two"]
    assert [wanted[number]["colour"] for number in (3, 4, 5, 6)] == ["red", "blue", "blue", "red"]
    found = {number: seen(by_entity, "two", number) for number in wanted}
    assert {number: verdict.colour for number, verdict in found.items()} == {
        number: shot["colour"] for number, shot in wanted.items()
    }, found
    assert all(found[number].background == shot["background"] for number, shot in wanted.items()), found


def test_a_memory_by_entity_knows_a_character_who_was_away_and_a_window_does_not(cast: Cast, by_entity: Path) -> None:
    assert seen(by_entity, "away", 14).colour == "red"
    window = cast.folder.parent / "window"
    render(cast.folder / "away.yaml", window, "memory.recall=window", *SETTINGS)
    assert seen(window, "away", 14).colour == "blue", "what the window holds is the other character"
