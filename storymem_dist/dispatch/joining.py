"""The end of a chain: all its clips in one ``story.mp4``, made when it is missing or made of other clips.

    stories/<story>/story.mp4      the clips of all shots, joined without encoding again
    stories/<story>/story.json     which records it was made of; written after it

Knows a run folder and the shots of one story.
"""

from collections.abc import Sequence

from storymem_dist.artifacts.files import canonical_json, read_json, write_bytes
from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.video import concat_clips


def is_joined(run: RunFolder, story_id: str, fingerprints: Sequence[str]) -> bool:
    """Whether ``story.mp4`` is there and was made of the records with these fingerprints."""
    try:
        made_of = read_json(run.story_folder(story_id) / "story.json")
        num_bytes = run.story_video(story_id).stat().st_size
        return bool(made_of["fingerprints"] == list(fingerprints) and made_of["num_bytes"] == num_bytes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def join_story(run: RunFolder, story_id: str, records: Sequence[ShotRecord]) -> int:
    """Join the clips of all ``records``, in order; return the number of frames.

    Joining twice, even at once from two processes, gives the same file. Raises ``OSError`` and ``RunFolderError``.
    """
    clips = [run.shot(story_id, record.shot_id).files_of(record) / record.clip for record in records]
    num_frames = concat_clips(clips, run.story_video(story_id))
    made_of = {
        "fingerprints": [record.fingerprint for record in records],
        "num_bytes": run.story_video(story_id).stat().st_size,
        "num_frames": num_frames,
    }
    write_bytes(run.story_folder(story_id) / "story.json", canonical_json(made_of))
    return num_frames
