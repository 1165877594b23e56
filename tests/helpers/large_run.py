"""A run folder of many stories, made by copying the records and events of one small fake run. Clips are hard links."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.story.schema import Scene, Story
from tests.helpers.fake_run import START_TIME, FakeRun

SENTENCE = "The camera follows slowly; lanterns, ropes and wet stone in warm, low light. "
_TIME = re.compile(r'"wall_time":([0-9.]+)')


def large_run(
    root: Path, *, num_stories: int, num_shots: int, longest: int = 0, num_replicas: int = 8, prompt_length: int = 600
) -> FakeRun:
    """Return a finished run of ``num_stories`` stories, two at least, of ``num_shots`` shots, on ``num_replicas``.

    The first story has ``longest`` shots, if that is more. Prompts have about ``prompt_length`` characters.
    """
    sizes = (max(longest, num_shots), num_shots)
    run = FakeRun(root, num_stories=2, num_shots=sizes[0])
    run.stories = [
        _with_long_prompts(_shortened(story, size), prompt_length)
        for story, size in zip(run.stories, sizes, strict=True)
    ]
    run.num_stories, run.num_shots = 1, sizes[0] + (num_stories - 1) * num_shots  # as the job announces them
    ends = [START_TIME]
    with run.replica(0, num_replicas=num_replicas) as replica:
        for number, story in enumerate(run.stories):
            run.folder.write_storyboard(story)
            for shot in range(len(story.shots)):
                run.shot(replica, number, shot)
            run.finish_story(replica, number)
            ends.append(replica.clock.now)
        run.finish(replica)
    copy_story(run, num_stories, num_replicas, seconds=ends[2] - ends[1], began=ends[1])
    return run


def copy_story(run: FakeRun, num_stories: int, num_replicas: int, *, seconds: float, began: float) -> None:
    """Copy ``story_1`` to all higher numbers, with its events, whose first is at ``began``, in turn on the replicas."""
    (events,) = run.root.glob("events/*.jsonl")
    lines = events.read_text().splitlines()
    first, last = lines[0], lines[-1]
    copied = [line for line in lines if '"story_id":"story_1"' in line]
    journals: dict[int, list[str]] = {}
    for number in range(2, num_stories):
        story_id, replica = f"story_{number}", number % num_replicas
        _copy_folder(run.root / "stories" / "story_1", run.root / "stories" / story_id)
        journal = journals.setdefault(replica, [_moved(first, replica, 0.0)])
        later = START_TIME - began + seconds * (number // num_replicas)
        journal += [_moved(line, replica, later).replace("story_1", story_id) for line in copied]
    for replica, journal in journals.items():
        end = float(_TIME.search(journal[-1])[1]) - float(_TIME.search(last)[1])  # type: ignore[index]
        path = run.root / "events" / f"copy-r{replica}.jsonl"
        path.write_text("".join(f"{line}\n" for line in [*journal, _moved(last, replica, end)]))


def _moved(line: str, replica: int, later: float) -> str:
    """An event of replica 0 as another replica sends it, later."""
    line = re.sub(r'"writer":"[^"]*","replica":\d+', f'"writer":"copy-r{replica}","replica":{replica}', line)
    return _TIME.sub(lambda found: f'"wall_time":{float(found[1]) + later}', line)


def _copy_folder(source: Path, target: Path) -> None:
    for folder, _, names in os.walk(source):
        place = target / Path(folder).relative_to(source)
        place.mkdir()
        for name in names:
            path = Path(folder) / name
            if name.endswith(".json") and Path(folder) == source and name != "storyboard.json":
                record = ShotRecord.from_json(json.loads(path.read_bytes()))
                (place / name).write_bytes(replace(record, story_id=target.name).to_json())
            else:
                os.link(path, place / name)


def _shortened(story: Story, num_shots: int) -> Story:
    scenes = (replace(scene, shots=scene.shots[: num_shots - scene.shots[0].index]) for scene in story.scenes)
    return replace(story, scenes=tuple(scene for scene in scenes if scene.shots and scene.shots[0].index < num_shots))


def _with_long_prompts(story: Story, length: int) -> Story:
    def lengthened(scene: Scene) -> Scene:
        words = SENTENCE * (length // len(SENTENCE))
        return replace(scene, shots=tuple(replace(shot, prompt=f"{shot.prompt} {words}") for shot in scene.shots))

    return replace(story, scenes=tuple(map(lengthened, story.scenes)))
