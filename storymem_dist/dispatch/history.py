"""Reads what a shot starts from: keyframes and tail of the shots before it, and the state of an earlier attempt.

The former depend on committed records and images only. Knows a run folder and a story's graph; nothing of how a memory
bank chooses among the keyframes.
"""

import os

from storymem_dist.artifacts.records import DamagedRecord
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.diffusion.denoise import DenoiseState
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.protocol import ShotHistory
from storymem_dist.dispatch.story_graph import StoryGraph
from storymem_dist.errors import RunFolderError
from storymem_dist.hardware import machine_fault
from storymem_dist.memory.bank import Keyframe


class DamagedHistory(Exception):
    """The record or an image of ``shot`` cannot be used; the record was set aside."""

    def __init__(self, shot: PlannedShot, message: str) -> None:
        super().__init__(message)
        self.shot = shot


def read_history(run: RunFolder, story: StoryGraph, shot: PlannedShot) -> ShotHistory:
    """Return what ``shot`` needs of the shots before it: keyframes for its memory, and the tail that it continues.

    Raises ``DamagedHistory`` naming the first shot whose files cannot be used.
    """
    keyframes: list[Keyframe] = []
    remembered = frozenset(shot.needs.memory)
    tail = None
    for before in story.shots[: shot.index]:
        continues = shot.needs.continues and before.index == shot.index - 1
        if not continues and before.index not in remembered:
            continue
        folder = run.shot(story.story_id, before.shot_id)
        try:
            record = folder.require_record(before.fingerprint)
            remembers = before.index in remembered
            images, end = folder.read_images(record, keyframes=remembers, tail=continues)
        except DamagedRecord as damage:
            raise DamagedHistory(before, str(damage)) from damage
        if continues:
            tail = end
        if remembers:
            keyframes += [
                Keyframe(image=image, shot_index=before.index, slot=kept.slot, frame_index=kept.frame_index)
                for image, kept in zip(images, record.keyframes, strict=True)
            ]
    return ShotHistory(keyframes=tuple(keyframes), tail=tail)


def read_checkpoint(run: RunFolder, shot: PlannedShot) -> DenoiseState | None:
    """Return the denoising state at which an earlier attempt at ``shot`` stopped, or None.

    Raises ``RunFolderError`` after removing one that is damaged, and ``MachineError`` when it cannot be read.
    """
    path = run.checkpoint(shot.story_id, shot.shot_id, shot.fingerprint)
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink() or not path.is_file():
            raise RunFolderError(f"the step checkpoint {path} is a link or not a regular file")
        return DenoiseState.load(path, fingerprint=shot.fingerprint)
    except RunFolderError as error:
        if fault := machine_fault(error, while_writing=True):
            raise fault from error
        path.unlink(missing_ok=True)
        raise
