import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.cost import CostModel
from storymem_dist.dispatch.plan import PlannedShot, plan_story
from storymem_dist.dispatch.shot_check import check_shots, longest_sampler
from storymem_dist.dispatch.shot_settings import own_settings, rounding, sampler_inputs, shot_cost, shot_sampler
from storymem_dist.errors import LayoutError, StoryboardError
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.story.loading import StoryBatch
from storymem_dist.story.schema import Scene, Shot, ShotOptions, ShotReference, Story
from tests.helpers.fake_renderer import make_part
from tests.helpers.videos import write_video

JOB = SamplerSettings(num_frames=17, height=32, width=48, num_inference_steps=4)


def make_shot(index: int = 0, *, cut: bool = True, options: dict[str, Any] | None = None, **fields: Any) -> Shot:
    return Shot(
        index=index,
        index_in_scene=index,
        scene_num=1,
        prompt=f"shot {index}",
        cut=cut,
        options=ShotOptions(**(options or {})),
        **fields,
    )


def make_story(*shots: Shot, **fields: Any) -> Story:
    return Story(story_id="s", name="s", overview="", scenes=(Scene(scene_num=1, shots=shots),), **fields)


def planned(*shots: Shot, job: SamplerSettings = JOB, **fields: Any) -> tuple[PlannedShot, ...]:
    part = make_part(Path("unused"), [])
    inputs = {
        kind: {**sampler_inputs(kind, job), "weights": kind, "video.crf": 18, "pixel_version": 1}
        for kind in ("t2v", "m2v")
    }
    part = dataclasses.replace(part, sampler=job, inputs=inputs)
    return plan_story(0, part, make_story(*shots, **fields), {})


# -- lengths and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "num_frames", "said"),
    [
        ({"num_frames": 81}, 81, ""),
        ({"num_frames": 80}, 81, "80 frames became 81 frames (4n+1)"),
        ({"num_frames": 79}, 81, "79 frames became 81 frames (4n+1)"),
        ({"num_frames": 78}, 77, "78 frames became 77 frames (4n+1)"),
        ({"num_frames": 2}, 1, "2 frames became 1 frames (4n+1)"),
        ({"duration": 5.0}, 81, "5 s at 16 frames per second, 80 frames, became 81 frames (4n+1)"),
        ({"duration": 81 / 16}, 81, ""),
        ({"duration": 0.01}, 1, "0.01 s at 16 frames per second, 0.16 frames, became 1 frames (4n+1)"),
        ({}, 17, ""),
    ],
)
def test_a_length_becomes_the_nearest_4n_plus_1_frames_and_the_rounding_is_said(
    options: dict[str, Any], num_frames: int, said: str
) -> None:
    shot = make_shot(options=options)
    own = shot_sampler(shot, JOB)
    assert own.num_frames == num_frames and rounding(shot, own) == said


def test_a_shots_settings_go_over_the_jobs_and_the_rest_stays() -> None:
    options = {"num_inference_steps": 9, "guidance_scale": (2.0, 1.0), "negative_prompt": "none of this"}
    own = shot_sampler(make_shot(options=options), JOB)
    changed = {
        "num_inference_steps": 9,
        "guidance_scale_high": 2.0,
        "guidance_scale_low": 1.0,
        "negative_prompt": "none of this",
    }
    assert own == dataclasses.replace(JOB, **changed)


def test_a_shot_without_settings_has_the_jobs_sampler_itself() -> None:
    assert shot_sampler(make_shot(options={"seed": 3}), JOB) is JOB
    assert shot_sampler(make_shot(options={"duration": 3.0}, video=Path("a.mp4")), JOB) is JOB


@pytest.mark.parametrize(
    ("job", "options"),
    [
        (JOB, {"num_inference_steps": 1001}),
        (JOB, {"guidance_scale": (101.0, 1.0)}),
        (JOB, {"duration": 601.0, "num_frames": None}),
        (
            dataclasses.replace(JOB, solver="euler", sigmas=[0.9, 0.6, 0.4, 0.1]),
            {"num_inference_steps": 3},
        ),
    ],
)
def test_what_the_sampler_refuses_is_refused_with_the_shots_place(
    job: SamplerSettings, options: dict[str, Any]
) -> None:
    job = dataclasses.replace(job, fps=20)
    with pytest.raises(StoryboardError, match=r"^shot_03: sampler\."):
        shot_sampler(make_shot(2, options=options), job)


def test_one_frame_is_allowed_for_a_cut_and_not_for_a_continuation() -> None:
    assert shot_sampler(make_shot(1, options={"num_frames": 1}), JOB).num_frames == 1
    with pytest.raises(StoryboardError, match=r"shot_02: .*leaves nothing new"):
        shot_sampler(make_shot(1, cut=False, options={"num_frames": 1}), JOB)
    assert shot_sampler(make_shot(1, options={"num_frames": 1}), JOB).continuation == JOB.continuation


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_shot_with_settings_has_the_fingerprint_of_a_job_with_them() -> None:
    options = {"num_frames": 33, "num_inference_steps": 9, "guidance_scale": (1, 1)}
    job = dataclasses.replace(
        JOB, num_frames=33, num_inference_steps=9, guidance_scale_high=1.0, guidance_scale_low=1.0
    )
    (own,) = planned(make_shot(options=options))
    (same,) = planned(make_shot(), job=job)
    assert own.inputs == same.inputs and own.fingerprint == same.fingerprint
    assert "sampler.negative_prompt" not in own.inputs, "no step reads it"


def test_settings_that_repeat_the_jobs_change_nothing() -> None:
    (own,) = planned(make_shot(options={"num_frames": 17, "num_inference_steps": 4}))
    (plain,) = planned(make_shot())
    assert own.fingerprint == plain.fingerprint


def test_a_settings_change_reaches_the_shot_and_those_that_need_it() -> None:
    before = planned(make_shot(0), make_shot(1), make_shot(2))
    after = planned(make_shot(0), make_shot(1, options={"num_inference_steps": 9}), make_shot(2))
    assert [one.fingerprint != other.fingerprint for one, other in zip(before, after, strict=True)] == [
        False,
        True,
        True,
    ]
    assert after[1].inputs["sampler.num_inference_steps"] == 9 and after[2].inputs["sampler.num_inference_steps"] == 4


def test_pictures_and_clips_are_inputs_by_their_content_and_not_by_their_path(tmp_path: Path) -> None:
    def fingerprints(folder: str, colour: int) -> list[str]:
        there = tmp_path / folder
        there.mkdir()
        still = there / "still.png"
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(still)
        clip = write_video(there / "clip.mp4", 6 + colour)
        shots = [
            make_shot(0, start_image=still),
            make_shot(1, video=clip),
            make_shot(2, references=(ShotReference(path=still),)),
        ]
        return [planned(shot)[0].fingerprint for shot in shots]

    one, same, other = fingerprints("a", 1), fingerprints("b", 1), fingerprints("c", 2)
    assert one == same and not set(one) & set(other)


def test_a_clip_that_is_replaced_under_its_name_is_another_input(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 6)
    (before,) = planned(make_shot(0, video=clip))
    write_video(clip, 7)
    (after,) = planned(make_shot(0, video=clip))
    assert before.fingerprint != after.fingerprint


def test_a_given_clip_depends_on_the_file_and_the_sizes_and_on_nothing_of_rendering(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", 6)
    (given,) = planned(make_shot(0, video=clip))
    (elsewhere,) = planned(
        dataclasses.replace(make_shot(0, video=clip), prompt="another text"),
        job=dataclasses.replace(JOB, num_inference_steps=9, seed=5, num_frames=33),
    )
    (larger,) = planned(make_shot(0, video=clip), job=dataclasses.replace(JOB, height=64))
    (slower,) = planned(make_shot(0, video=clip), job=dataclasses.replace(JOB, fps=8))
    assert given.kind == given.mode == "given" and given.cost > 0
    assert given.fingerprint == elsewhere.fingerprint
    assert len({given.fingerprint, larger.fingerprint, slower.fingerprint}) == 3
    assert "weights" not in given.inputs and "prompt" not in given.inputs and given.inputs["video.crf"] == 18


def test_a_start_image_makes_a_shot_mi2v_at_any_place(tmp_path: Path) -> None:
    still = tmp_path / "still.png"
    Image.new("RGB", (8, 8)).save(still)
    first, second = planned(make_shot(0, start_image=still), make_shot(1, start_image=still))
    assert [(shot.kind, shot.mode) for shot in (first, second)] == [("m2v", "mi2v")] * 2


def test_a_file_that_is_gone_rejects_its_story_with_the_shot(tmp_path: Path) -> None:
    for field in ("start_image", "video"):
        with pytest.raises(StoryboardError, match=f"shot_02: {field}: .*gone.* cannot be read"):
            planned(make_shot(0), make_shot(1, **{field: tmp_path / "gone"}))


def test_a_shot_that_is_not_remembered_has_another_fingerprint() -> None:
    (plain,) = planned(make_shot(0))
    (forgotten,) = planned(make_shot(0, remember=False))
    assert forgotten.inputs == {**plain.inputs, "remember": False}


# -- cost and record ---------------------------------------------------------------------------------------------------


def test_the_cost_of_a_shot_is_that_of_its_own_sizes_steps_and_passes() -> None:
    cost = CostModel(num_frames=17, height=32, width=48, num_inference_steps=4)
    options = {"num_frames": 33, "num_inference_steps": 8, "guidance_scale": (1.0, 1.0)}
    own = shot_cost(cost, shot_sampler(make_shot(options=options), JOB), JOB)
    assert (own.num_frames, own.num_inference_steps, own.passes_per_step) == (33, 8, 1)
    assert shot_cost(cost, JOB, JOB) is cost


def test_the_record_says_what_the_storyboard_sets_for_the_shot_alone(tmp_path: Path) -> None:
    shot = make_shot(
        2,
        options={"duration": 1.0, "seed": 7},
        name="the bridge",
        start_image=tmp_path / "still.png",
        references=(ShotReference(path=tmp_path / "a.png", is_sink=True),),
        remember=False,
        entities=("Mira",),
        recall=(0,),
    )
    assert own_settings(shot, shot_sampler(shot, JOB)) == {
        "duration": 1.0,
        "seed": 7,
        "rounding": "1 s at 16 frames per second, 16 frames, became 17 frames (4n+1)",
        "name": "the bridge",
        "start_image": "still.png",
        "references": [{"path": "a.png", "sink": True}],
        "remember": False,
        "entities": ["Mira"],
        "recall": [0],
    }
    assert own_settings(make_shot(), JOB) == {}


# -- checks before anything is loaded ----------------------------------------------------------------------------------


def checked(*stories: Story, job: SamplerSettings = JOB, **options: Any) -> StoryBatch:
    return check_shots(StoryBatch(stories=stories, rejected=()), job, MemorySettings(), **options)


def test_a_story_that_cannot_be_rendered_is_rejected_alone() -> None:
    good = make_story(make_shot(0), make_shot(1, options={"num_frames": 33}))
    bad = dataclasses.replace(make_story(make_shot(0, options={"num_inference_steps": 5000})), story_id="bad")
    batch = checked(good, bad)
    assert batch.stories == (good,)
    (rejected,) = batch.rejected
    assert rejected.source == "bad"
    assert rejected.message.startswith("bad, scene 1, shot_01: sampler.num_inference_steps=5000")


def test_what_a_layout_refuses_is_said_with_the_shot() -> None:
    def refuse(own: SamplerSettings) -> None:
        if own.guidance_scale_high == 1:
            raise LayoutError("parallel.cfg=2 needs two passes")

    story = make_story(make_shot(0), make_shot(1, options={"guidance_scale": (1.0, 1.0)}))
    batch = checked(story, refuse=refuse)
    assert not batch.stories and batch.rejected[0].message == "s, scene 1, shot_02: parallel.cfg=2 needs two passes"


def test_roundings_are_said_once_for_a_story() -> None:
    shots = [make_shot(index, options={"duration": 5.0}) for index in range(3)]
    (story,) = checked(make_story(*shots)).stories
    assert story.warnings == (
        "s, scene 1, shot_01: 5 s at 16 frames per second, 80 frames, became 81 frames (4n+1) (and 2 more shots)",
    )


def test_stories_of_one_file_are_named_and_what_memory_does_not_use_is_said_once() -> None:
    one = dataclasses.replace(make_story(make_shot(0, options={"duration": 5.0})), source=Path("all.jsonl"))
    stories = [dataclasses.replace(one, story_id=name) for name in ("a", "b")]
    batch = check_shots(StoryBatch(stories=tuple(stories), rejected=()), JOB, MemorySettings(recall="entities"))
    assert [story.warnings[0].split(":")[0] for story in batch.stories] == [
        f"all.jsonl (story {name}), scene 1, shot_01" for name in ("a", "b")
    ]
    (said,) = batch.warnings
    assert said.startswith("all.jsonl (story a) (and 1 more): memory.recall=entities recalls as window here")


def test_a_negative_prompt_without_guidance_has_a_warning() -> None:
    shots = [make_shot(0, options={"negative_prompt": "red", "guidance_scale": (1.0, 1.0)}), make_shot(1)]
    (story,) = checked(make_story(*shots)).stories
    assert story.warnings == ("s, scene 1, shot_01: negative_prompt is not used, for guidance is 1",)


def test_a_clip_of_its_start_image_alone_is_refused() -> None:
    batch = checked(make_story(make_shot(0, start_image=Path("a.png"), options={"num_frames": 1})))
    assert "shot_01: a clip of one frame is its start_image alone" in batch.rejected[0].message


def test_a_start_image_is_refused_with_the_lora_of_five_frames() -> None:
    job = dataclasses.replace(JOB, continuation="mm2v")
    batch = checked(make_story(make_shot(0, start_image=Path("a.png"))), job=job)
    assert "shot_01: a start_image cannot be used with sampler.continuation=mm2v" in batch.rejected[0].message


@pytest.mark.parametrize(("num_frames", "is_enough"), [(4, False), (5, True)])
def test_a_continuation_of_a_clip_that_is_too_short_is_refused_with_the_cure(
    tmp_path: Path, num_frames: int, is_enough: bool
) -> None:
    clip = write_video(tmp_path / "a.mp4", num_frames, fps=16)
    job = dataclasses.replace(JOB, continuation="mm2v")
    batch = checked(make_story(make_shot(0, video=clip), make_shot(1, cut=False)), job=job)
    assert bool(batch.stories) is is_enough
    if not is_enough:
        assert "shot_02: " in batch.rejected[0].message and "has 4; make that shot longer" in batch.rejected[0].message
    short = make_story(make_shot(0, options={"num_frames": num_frames}), make_shot(1, cut=False))
    assert bool(checked(short, job=job).stories), "4 becomes 5 frames"


def test_a_clip_that_is_too_long_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "a.mp4", 20, fps=1)
    job = dataclasses.replace(JOB, fps=1000)
    batch = checked(make_story(make_shot(0, video=clip)), job=job)
    assert "20,000 frames at 1000 frames per second; allowed: at most 10,001 frames" in batch.rejected[0].message


def test_a_clip_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_video(tmp_path / "a.mp4", 20, fps=16)
    monkeypatch.setattr("storymem_dist.dispatch.shot_check.host_memory_bytes", lambda: 2**16)
    batch = checked(make_story(make_shot(0, video=clip)))
    assert "a quarter of the memory" in batch.rejected[0].message


def test_a_clip_that_cannot_be_read_rejects_its_story(tmp_path: Path) -> None:
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"no video")
    batch = checked(make_story(make_shot(0), make_shot(1, video=clip)))
    assert batch.rejected[0].message.startswith(f"s, scene 1, shot_02: {clip} is not a video")


def test_the_longest_shot_is_the_one_with_the_most_frames() -> None:
    stories = [make_story(make_shot(0), make_shot(1, options={"num_frames": 33}))]
    assert longest_sampler(stories, JOB).num_frames == 33
    short = [make_story(make_shot(0, options={"num_frames": 5}))]
    assert longest_sampler(short, JOB).num_frames == 5
    assert longest_sampler([], JOB) is JOB
