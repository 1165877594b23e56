"""The memory of one shot: the bank of what it may use, and the keyframes of it that the shot is shown.

What belongs to the bank is planned (``dispatch.needs``); keyframes of earlier shots come from the run folder, given
images from the storyboard. Knows pictures and memory rules; nothing of models or queues.
"""

from storymem_dist.dispatch.protocol import ShotHistory, ShotJob
from storymem_dist.memory.bank import Keyframe, MemoryBank, Recall, given_keyframes, reference_keyframes
from storymem_dist.memory.entities import recall_entities
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.render.given import given_image
from storymem_dist.story.modes import M2V


def memory_bank(job: ShotJob, history: ShotHistory) -> MemoryBank:
    """Return what the memory of a shot may use, in the order of the story, images at the size of its clip.

    Raises ``StoryboardError`` when a given image cannot be read.
    """
    return MemoryBank((*_references(job), *_given(job), *history.keyframes))


def recall(bank: MemoryBank, job: ShotJob, memory: MemorySettings) -> Recall:
    """Return the keyframes that the shot is shown: by entity where that is planned, else sink and window."""
    if job.kind != M2V:
        return Recall(keyframes=(), decisions=())
    if job.needs.entities:
        return recall_entities(bank, job.needs.entities, memory)
    return bank.recall(memory)


def _references(job: ShotJob) -> list[Keyframe]:
    """The story's reference images, if the shot recalls them, and those of its entities.

    Their slots are positions among all of the story's, its own first and then those of each entity.
    """
    wanted = {slot for entity in job.needs.entities for slot in entity.references}
    if job.needs.references:
        wanted |= set(range(len(job.story.reference_images)))
    paths = [*job.story.reference_images, *(path for entity in job.story.entities for path in entity.references)]
    slots = sorted(wanted)
    images = [given_image(paths[slot], job.sampler) for slot in slots]
    return list(reference_keyframes(images, slots))


def _given(job: ShotJob) -> list[Keyframe]:
    """The images that joined the memory before earlier shots, where this shot has them, and before this one."""
    shots = {job.index: range(len(job.shot.references))} if job.kind == M2V else {}
    wanted: dict[int, list[int]] = {index: list(positions) for index, positions in shots.items()}
    for index, position in job.needs.given:
        wanted.setdefault(index, []).append(position)
    of_story = job.story.shots if wanted else ()
    keyframes: list[Keyframe] = []
    for index, positions in sorted(wanted.items()):
        references = of_story[index].references
        keyframes += given_keyframes(
            [given_image(references[position].path, job.sampler) for position in positions],
            shot_index=index,
            slots=[position - len(references) for position in positions],
            is_sink=[references[position].is_sink for position in positions],
        )
    return keyframes
