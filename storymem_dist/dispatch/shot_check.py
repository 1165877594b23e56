"""Checks what the shots of storyboards set for themselves against the settings of a job, before anything is loaded.

A story with a shot that cannot be rendered is rejected alone. What can be seen in a storyboard without a job was
checked when it was read (``story.shots``). Knows nothing of weights and ranks: ``refuse`` does.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.needs import memory_warnings
from storymem_dist.dispatch.shot_settings import rounding, shot_sampler
from storymem_dist.errors import StoryboardError, StoryMemError
from storymem_dist.hardware import GIB, host_memory_bytes
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.story.loading import RejectedStoryboard, StoryBatch
from storymem_dist.story.modes import MI2V, MM2V, NO_CONTINUATION, NUM_GIVEN_FRAMES
from storymem_dist.story.schema import Shot, Story
from storymem_dist.story.videos import MAX_FRAMES, num_frames_at, video_facts

_SHARE_OF_MEMORY = 4  # of a host, for the frames of a given clip; choosing keyframes takes up to three times as much

Refuse = Callable[[SamplerSettings], None]
"""Raises ``StoryMemError`` for a shot's settings that cannot run here."""


def check_shots(
    batch: StoryBatch, sampler: SamplerSettings, memory: MemorySettings, refuse: Refuse = lambda own: None
) -> StoryBatch:
    """Return ``batch`` without the stories that have a shot that cannot be rendered; these are in ``rejected``.

    The others say in warnings which lengths are rounded, and what ``memory`` does not use. ``sampler`` is the job's.
    ``refuse`` is called with the settings of each shot that has its own.
    """
    stories, rejected = [], list(batch.rejected)
    of_file = Counter(story.source for story in batch.stories)
    of_memory: dict[str, list[str]] = {}
    for story in batch.stories:
        source = story.source or story.story_id
        where = f"{source} (story {story.story_id})" if of_file[story.source] > 1 and story.source else f"{source}"
        try:
            notes = _check_story(story, sampler, refuse)
        except StoryMemError as error:
            rejected.append(RejectedStoryboard(source=source, message=f"{where}, {error}"))
        else:
            warnings = [f"{where}, {words}" for words in notes]
            stories.append(replace(story, warnings=(*story.warnings, *warnings)) if warnings else story)
            for words in memory_warnings(story, memory):
                of_memory.setdefault(words, []).append(where)
    said = (f"{at[0]}{f' (and {len(at) - 1} more)' if len(at) > 1 else ''}: {words}" for words, at in of_memory.items())
    return replace(batch, stories=tuple(stories), rejected=tuple(rejected), warnings=(*batch.warnings, *said))


def longest_sampler(stories: Sequence[Story], sampler: SamplerSettings) -> SamplerSettings:
    """Return the settings of the shot with the most frames, of those that are rendered; ``sampler`` if there is none.

    Raises ``StoryboardError`` for a shot whose settings are refused.
    """
    own = [shot_sampler(shot, sampler) for story in stories for shot in story.shots if shot.video is None]
    return max(own, key=lambda one: one.num_frames, default=sampler)


def _check_story(story: Story, sampler: SamplerSettings, refuse: Refuse) -> list[str]:
    notes: dict[str, list[str]] = {}
    num_before = 0
    for shot in story.shots:
        try:
            num_before, said = _check_shot(shot, sampler, refuse, num_before)
        except StoryMemError as error:
            raise StoryboardError(f"scene {shot.scene_num}, {error}") from error
        for kind, what in said.items():
            notes.setdefault(kind, []).append(f"scene {shot.scene_num}, {shot.shot_id}: {what}")
    return [one[0] + (f" (and {len(one) - 1} more shots)" if len(one) > 1 else "") for one in notes.values()]


def _check_shot(shot: Shot, sampler: SamplerSettings, refuse: Refuse, num_before: int) -> tuple[int, dict[str, str]]:
    """Return the frames of the clip that the next shot may continue, and a sentence by kind: what to know about it."""
    if shot.video is not None:
        return _check_given(shot, sampler), {}
    own = shot_sampler(shot, sampler)
    if own is not sampler:
        try:
            refuse(own)
        except StoryMemError as error:
            raise StoryboardError(f"{shot.shot_id}: {error}") from error
    if shot.start_image is not None and sampler.continuation == MM2V:
        raise StoryboardError(
            f"{shot.shot_id}: a start_image cannot be used with sampler.continuation={MM2V}, whose LoRA continues"
            f" from five frames; use sampler.continuation={MI2V} or {NO_CONTINUATION}, or leave it out"
        )
    if shot.start_image is not None and own.num_frames == 1:
        raise StoryboardError(
            f"{shot.shot_id}: a clip of one frame is its start_image alone, with nothing to render; use at least 5"
        )
    notes = {}
    if how := rounding(shot, own):
        notes["rounding"] = how
    if shot.options.negative_prompt and not own.needs_negative_prompt:
        notes["negative_prompt"] = "negative_prompt is not used, for guidance is 1"
    return own.num_frames - _check_continuation(shot, sampler, num_before), notes


def _check_continuation(shot: Shot, sampler: SamplerSettings, num_before: int) -> int:
    """Return how many frames the shot repeats of the one before it, which has ``num_before``."""
    if shot.cut or shot.index == 0 or shot.start_image is not None or sampler.continuation == NO_CONTINUATION:
        return 0
    needed = NUM_GIVEN_FRAMES[sampler.continuation]
    if num_before < needed:
        raise StoryboardError(
            f"{shot.shot_id}: sampler.continuation={sampler.continuation} continues from the last {needed} frames of"
            f" the shot before it, which has {num_before}; make that shot longer, or write cut: true"
        )
    return needed


def _check_given(shot: Shot, sampler: SamplerSettings) -> int:
    """Return the number of frames of a given clip at the rate of the job."""
    assert shot.video is not None
    try:
        facts = video_facts(shot.video)
    except StoryboardError as error:
        raise StoryboardError(f"{shot.shot_id}: {error}") from error
    num_frames = num_frames_at(facts, sampler.fps)
    num_bytes, room = 3 * num_frames * sampler.height * sampler.width, host_memory_bytes() // _SHARE_OF_MEMORY
    if num_frames > MAX_FRAMES or num_bytes > room:
        limit = f"{MAX_FRAMES:,} frames"
        if num_bytes > room:
            limit = f"{room / GIB:.1f} GiB of frames (a quarter of the memory); these have {num_bytes / GIB:.1f} GiB"
        raise StoryboardError(
            f"{shot.shot_id}: the clip {shot.video} has {facts.seconds:.0f} s, {num_frames:,} frames at {sampler.fps}"
            f" frames per second; allowed: at most {limit}; cut it into several shots"
        )
    return num_frames
