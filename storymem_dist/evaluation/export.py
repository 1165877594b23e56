"""The clips of a run under the names that other programs read, without copying them where the file system can.

    OUT/STORY/01_02.mp4         layout ``storymem``: scene and shot in it, as StoryMem's own script names them
    OUT/STORY/001_002.mp4       layout ``entitybench``: as EntityBench's evaluator reads them; STORY is the episode
    OUT/storymem_export.json    which file came from where; written first, too, so that an export that broke off can
                                be repeated

A clip of a run holds its own frames alone: what a continued shot was given to go on from is in the shot before, and
nowhere twice. Knows run folders and names; nothing of scores.
"""

import errno
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storymem_dist.errors import RunFolderError
from storymem_dist.evaluation.clips import ShotClip, StoryClips, find_clips
from storymem_dist.files import canonical_json, link_or_replace, read_json, replacing, resolve_inside, write_bytes
from storymem_dist.observe.run.files import RunFiles

LAYOUTS: Mapping[str, str] = {"storymem": "{scene:02d}_{shot:02d}.mp4", "entitybench": "{scene:03d}_{shot:03d}.mp4"}
"""Names of files by layout; both numbers begin with 1."""

MANIFEST = "storymem_export.json"
EXPORT_FORMAT = 1

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)
"""Why a file system does not link: another one, none of its own, too many of a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was exported: numbers of files, how many of them are copies, and a sentence for each that was left out."""

    num_files: int
    num_copied: int
    left_out: Sequence[str]


def export_run(root: Path, out: Path, layout: str) -> Export:
    """Put every finished clip of the run at ``root`` into ``out``, a new or empty folder or an earlier export.

    Raises ``RunFolderError`` where either cannot be used.
    """
    files = RunFiles(root)
    stories, left_out = find_clips(files)
    left_out += [
        f"{story.story_id}: {len(story.shots)} of {story.num_shots} shots are there"
        for story in stories
        if not story.is_whole
    ]
    if not any(story.shots for story in stories):
        raise RunFolderError(f"{root}: there is no finished shot to export")
    try:
        before = _files_of_earlier_export(out)
        named = [one for story in stories for one in _names(story, LAYOUTS[layout])]
        stale = before - {name for name, _ in named}
        manifest = {
            "format": EXPORT_FORMAT,
            "layout": layout,
            "run": str(root.resolve()),
            "run_id": files.run_id,
            "left_out": left_out,
        }
        begun = [{"file": name} for name in sorted({name for name, _ in named} | before)]
        write_bytes(out / MANIFEST, canonical_json({**manifest, "is_whole": False, "files": begun}))
        entries = [_export_shot(files.root, shot, out, name) for name, shot in named]
        for name in stale:
            _remove(out, name)
        write_bytes(out / MANIFEST, canonical_json({**manifest, "is_whole": True, "files": entries}))
    except OSError as error:
        raise RunFolderError(f"{root} cannot be exported to {out}: {error}") from error
    copied = sum(not entry["linked"] for entry in entries)
    return Export(num_files=len(entries), num_copied=copied, left_out=left_out)


def _files_of_earlier_export(out: Path) -> set[str]:
    """Files that an earlier export has left in ``out``. Raises ``RunFolderError`` for a folder of something else."""
    if not out.exists():
        out.mkdir(parents=True)
    if not out.is_dir():
        raise RunFolderError(f"{out} is not a folder")
    try:
        earlier = read_json(out / MANIFEST)
        names = [str(entry["file"]) for entry in earlier["files"]]
    except FileNotFoundError:
        if any(out.iterdir()):
            raise RunFolderError(
                f"{out} is not empty and not an earlier export (it has no {MANIFEST}); give a new or empty folder"
            ) from None
        return set()
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{out / MANIFEST} is damaged ({error}); remove the folder, or give another one") from None
    return {name for name in names if _is_inside(out, name)}


def _is_inside(out: Path, name: str) -> bool:
    try:
        return resolve_inside(out, name).is_file()
    except OSError:
        return False


def _remove(out: Path, name: str) -> None:
    """Remove a file of an earlier export, and the folder of its story if that is empty then."""
    path = resolve_inside(out, name)
    path.unlink()
    if path.parent != out.resolve() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _names(story: StoryClips, pattern: str) -> list[tuple[str, ShotClip]]:
    """The clips of a story by their file's name in the export."""
    names = (pattern.format(scene=scene, shot=number) for scene, number in _places(story))
    return [(f"{story.story_id}/{name}", shot) for name, shot in zip(names, story.shots, strict=True)]


def _export_shot(root: Path, shot: ShotClip, out: Path, name: str) -> dict[str, Any]:
    """Link or copy a clip; return what the manifest says of it."""
    record, path = shot.record, out / name
    path.parent.mkdir(exist_ok=True)
    return {
        "file": name,
        "linked": _link_or_copy(resolve_inside(root, shot.clip), path),
        "story": record.story_id,
        "shot": record.shot_id,
        "scene_num": record.scene_num,
        "clip": shot.clip,
        "sha256": shot.sha256,
        "fingerprint": record.fingerprint,
        "prompt": record.prompt,
        "cut": record.cut,
        "num_frames": record.num_frames,
        "fps": record.fps,
    }


def _places(story: StoryClips) -> list[tuple[int, int]]:
    """Scene and shot of each clip. Scenes are counted where the storyboard gives two of them one number, or none."""
    written = [(shot.record.scene_num, shot.record.index_in_scene + 1) for shot in story.shots]
    if len(set(written)) == len(written) and all(scene > 0 for scene, _ in written):
        return written
    places, scene = list[tuple[int, int]](), 0
    for _, number in written:
        scene += number == 1 or not places
        places.append((scene, number))
    return places


def _link_or_copy(source: Path, path: Path) -> bool:
    """Make ``path`` a hard link to ``source``, or a copy where that cannot be; whether it is a link."""
    try:
        link_or_replace(source, path)
        return True
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    with replacing(path, durable=False) as temporary:
        shutil.copyfile(source, temporary)
    return False
