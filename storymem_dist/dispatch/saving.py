"""From a rendered shot to files and a record in its attempt's folder, not yet published.

Knows the record's schema and the run folder's; nothing of leases or of who renders.
"""

import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from storymem_dist.artifacts.files import json_ready
from storymem_dist.artifacts.records import ShotRecord, StoredKeyframe
from storymem_dist.artifacts.shot_folder import ClipFiles, ShotFolder, keyframe_name, tail_name
from storymem_dist.dispatch.jobs import RenderedShot
from storymem_dist.dispatch.plan import BatchPart, PlannedShot


def save_shot(
    folder: ShotFolder,
    part: BatchPart,
    shot: PlannedShot,
    rendered: RenderedShot,
    *,
    attempt_id: str,
    host: Mapping[str, Any],
    check: Callable[[], None],
) -> ShotRecord:
    """Write clip, keyframes and tail into the attempt's folder and return the record that names them.

    ``host`` goes into the part of the record that may differ between equal runs. ``check`` is called before every
    frame and image; what it raises ends the writing. Raises ``OSError``.
    """
    began = time.monotonic()
    files = ClipFiles(
        clip=rendered.clip,
        keyframes=[(kept.slot, kept.frame_index, kept.image) for kept in rendered.keyframes],
        tail=rendered.tail,
        fps=part.sampler.fps,
    )
    stored = folder.save_attempt(attempt_id, files, part.video, check)
    num_frames, _, height, width = rendered.clip.shape
    return ShotRecord(
        story_id=shot.story.story_id,
        shot_id=shot.shot.shot_id,
        shot_index=shot.shot.index,
        scene_num=shot.shot.scene_num,
        index_in_scene=shot.shot.index_in_scene,
        prompt=shot.shot.prompt,
        cut=shot.shot.cut,
        kind=shot.kind,
        mode=shot.mode,
        seed=shot.seed,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=part.sampler.fps,
        clip="clip.mp4",
        keyframes=tuple(
            StoredKeyframe(slot=kept.slot, frame_index=kept.frame_index, file=keyframe_name(kept.slot))
            for kept in rendered.keyframes
        ),
        tail=tuple(tail_name(number) for number in range(len(rendered.tail))),
        memory=json_ready(rendered.memory),
        inputs=json_ready(shot.inputs),
        fingerprint=shot.fingerprint,
        predecessor=shot.predecessor,
        config_hash=part.config_hash,
        files=stored,
        timing={
            "stage_seconds": {**json_ready(rendered.stage_seconds), "save": time.monotonic() - began},
            "committed_at": time.time(),
        },
        host=json_ready({"attempt_id": attempt_id, "host": socket.gethostname(), **part.host, **host}),
    )
