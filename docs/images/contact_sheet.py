"""The picture of the README: first and last frame of every shot of a run folder.

python docs/images/contact_sheet.py runs/demo docs/images/demo.jpg
"""

import json
import sys
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

TITLE, LABEL = ImageFont.load_default(14), ImageFont.load_default(11)
GAP, HEAD = 6, 44


def frames_of(clip: Path) -> list[Image.Image]:
    """All frames of a clip."""
    with av.open(str(clip)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def band_of(story: Path, columns: int) -> Image.Image:
    """One story: a column for each shot, with its mode and the number of keyframes that it added to the memory."""
    name = json.loads((story / "storyboard.json").read_text())["name"]
    clips = sorted(story.glob("shot_*.mp4"))
    width, height = frames_of(clips[0])[0].size
    band = Image.new("RGB", (GAP + columns * (width + GAP), HEAD + 2 * height + 12), "white")
    draw = ImageDraw.Draw(band)
    draw.text((GAP, 5), name, font=TITLE, fill="black")
    for number, clip in enumerate(clips, start=1):
        record, frames = json.loads(clip.with_suffix(".json").read_text()), frames_of(clip)
        left, count = GAP + (number - 1) * (width + GAP), len(record["keyframes"])
        added = f"+{count} keyframe{'' if count == 1 else 's'}"
        draw.text((left, 27), f"{number}  {record['mode'].upper()}", font=LABEL, fill="#333")
        draw.text((left + width - draw.textlength(added, font=LABEL), 27), added, font=LABEL, fill="#777")
        for row, frame in enumerate((frames[0], frames[-1])):
            band.paste(frame, (left, HEAD + row * (height + 2)))
    return band


def main(run: Path, picture: Path) -> None:
    """Write the contact sheet of ``run`` to ``picture``."""
    stories = sorted(path for path in (run / "stories").iterdir() if path.is_dir())
    columns = max(len(list(story.glob("shot_*.mp4"))) for story in stories)
    bands = [band_of(story, columns) for story in stories]
    sheet = Image.new("RGB", (bands[0].width, sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    sheet.save(picture, quality=62, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
