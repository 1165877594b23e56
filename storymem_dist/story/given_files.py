"""Finds the files that a storyboard names (pictures, clips, LoRAs) and checks what can be checked without models."""

from functools import partial
from pathlib import Path

from storymem_dist.errors import StoryboardError
from storymem_dist.story.images import open_reference_image
from storymem_dist.story.values import read_text
from storymem_dist.story.warnings import Warnings


class GivenFiles:
    """The files of one storyboard. Relative paths are searched in ``folder``; a picture is decoded once."""

    def __init__(self, folder: Path, warnings: Warnings) -> None:
        self._folder = folder
        self._warnings = warnings
        self._seen: set[tuple[str, Path]] = set()

    def image(self, value: object, where: str, key: str, place: str) -> Path:
        """The absolute path of a readable picture. Raises ``StoryboardError``."""
        path = self.path(value, where, key)
        if ("image", path) not in self._seen:
            try:
                open_reference_image(path, partial(self._warnings.add, place=place))
            except StoryboardError as error:
                raise StoryboardError(f"{where}: {key.rstrip(',')}: {error}") from None
            self._seen.add(("image", path))
        return path

    def video(self, value: object, where: str, key: str, place: str) -> Path:
        """The absolute path of a clip that can be decoded. Raises ``StoryboardError``."""
        from storymem_dist.story.videos import video_facts  # few storyboards need the decoders

        path = self.path(value, where, key)
        if ("video", path) not in self._seen:
            try:
                facts = video_facts(path)
            except StoryboardError as error:
                raise StoryboardError(f"{where}: {key}: {error}") from None
            for note in facts.notes:
                self._warnings.add(f"the clip {path.name}: {note}", place)
            self._seen.add(("video", path))
        return path

    def lora(self, value: object, where: str, key: str) -> Path:
        """The absolute path of a LoRA: a file or a folder. Raises ``StoryboardError``."""
        path = self.path(value, where, key)
        if "://" in str(value):
            raise StoryboardError(f"{where}: {key}: {value} is an address; download the LoRA and give its file's path")
        try:
            if path.exists():
                return path
            problem = "does not exist"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        raise StoryboardError(
            f"{where}: {key}: the LoRA {path} {problem}; allowed: a file, or a folder with the files of both experts"
        )

    def path(self, value: object, where: str, key: str) -> Path:
        """``value`` as an absolute path. Raises ``StoryboardError`` when it is not text."""
        return (self._folder / read_text(value, where, key, self._warnings)).absolute()
