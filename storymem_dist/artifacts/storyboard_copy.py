"""A story as it was read, in its run folder: one JSON file, and small copies of its pictures for reports.

    storyboard.json                       the story; what it does not set is not written
    references/reference_<n>.jpg          the story's reference images, then those of its entities
    references/<shot>_reference_<n>.jpg   pictures that join the memory before a shot; 1 is the last one
    references/<shot>_start.jpg           the picture that a shot begins with

Knows stories and their pictures; nothing of shots that were rendered.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from storymem_dist.errors import StoryboardError
from storymem_dist.events import json_ready
from storymem_dist.files import canonical_json, read_limited, write_bytes
from storymem_dist.story.images import open_reference_image
from storymem_dist.story.schema import Story

_ALWAYS_WRITTEN = ("reference_images", "seed", "style", "source", "warnings")
"""Fields of a story with a default that are written in any case."""

_LONGEST_SIDE = 512


def write_storyboard(folder: Path, story: Story) -> None:
    """Write ``story`` into its folder if it is new or has changed. Raises ``OSError``."""
    path = folder / "storyboard.json"
    data = canonical_json(json_ready(_as_written(story)))
    try:
        is_written = read_limited(path, len(data)) == data
    except OSError:
        is_written = False
        path.parent.mkdir(parents=True, exist_ok=True)
    if not is_written:
        write_bytes(path, data)
    for name, image in _pictures(story):
        _write_small_copy(image, folder / "references" / f"{name}.jpg")


def _as_written(value: Any) -> Any:
    """A story as mappings, without the fields that have their default."""
    if is_dataclass(value) and not isinstance(value, type):
        always = _ALWAYS_WRITTEN if isinstance(value, Story) else ()
        return {
            field.name: _as_written(getattr(value, field.name))
            for field in fields(value)
            if field.name in always or field.default is MISSING or getattr(value, field.name) != field.default
        }
    if isinstance(value, tuple):
        return [_as_written(item) for item in value]
    return value


def _pictures(story: Story) -> Iterator[tuple[str, Path]]:
    images = (*story.reference_images, *(image for entity in story.entities for image in entity.references))
    yield from ((f"reference_{position}", image) for position, image in enumerate(images))
    for shot in story.shots:
        for position, reference in enumerate(shot.references):
            yield f"{shot.shot_id}_reference_{len(shot.references) - position}", reference.path
        if shot.start_image is not None:
            yield f"{shot.shot_id}_start", shot.start_image


def _write_small_copy(image: Path, copy: Path) -> None:
    """Write a small JPEG of a picture unless it is there and newer. None of a picture that cannot be read."""
    with contextlib.suppress(OSError):
        if copy.stat().st_mtime >= image.stat().st_mtime:
            return
    try:
        small = open_reference_image(image)
    except StoryboardError:
        return  # planning refuses the story
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    copy.parent.mkdir(exist_ok=True)
    write_bytes(copy, buffer.getvalue(), durable=False)
