"""Random stories whose shots need each other in every way that a storyboard can say, for tests of graphs."""

from pathlib import Path

from hypothesis import strategies as st

from storymem_dist.story.schema import REFERENCES, Entity, Scene, Shot, ShotOptions, Story

NAMES = ("Mira", "Tom", "the harbour")


def story_of(story_id: str, *shots: Shot, **fields: object) -> Story:
    """A story of these shots in one scene, numbered in order."""
    scenes = (Scene(scene_num=1, shots=shots),)
    values = {"name": story_id, "overview": "", "scenes": scenes, **fields}
    return Story(story_id=story_id, entities=tuple(Entity(name=name) for name in NAMES), **values)  # type: ignore[arg-type]


def shot_of(index: int, prompt: str = "", **fields: object) -> Shot:
    """A cut, unless ``fields`` say more."""
    values = {"cut": True, "prompt": prompt or f"shot {index}", **fields}
    return Shot(index=index, index_in_scene=index, scene_num=1, **values)  # type: ignore[arg-type]


@st.composite
def stories(draw: st.DrawFn, story_id: str = "s", max_shots: int = 8, clip: Path | None = None) -> Story:
    """A story of 1 to ``max_shots`` shots; some of them are the given ``clip``."""
    shots = []
    for index in range(draw(st.integers(1, max_shots))):
        earlier = st.lists(st.integers(REFERENCES, index - 1), max_size=3, unique=True).map(
            lambda one: tuple(sorted(one))
        )
        shots.append(
            shot_of(
                index,
                f"{story_id} {index}",
                cut=draw(st.booleans()),
                remember=draw(st.sampled_from([True, True, True, False])),
                recall=draw(st.one_of(st.none(), earlier)),
                entities=tuple(draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True))),
                options=ShotOptions(seed=draw(st.sampled_from([None, None, 7]))),
                video=clip if clip is not None and draw(st.integers(0, 5)) == 0 else None,
            )
        )
    return story_of(story_id, *shots, priority=draw(st.sampled_from([0, 0, 1])))
