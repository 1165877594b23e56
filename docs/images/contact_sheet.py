"""The picture of the README: three frames of every shot of a run folder, under the shot's prompt.

python docs/images/contact_sheet.py runs/demo docs/images/demo.jpg
"""

import json
import sys
import textwrap
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

TITLE, LABEL, PROMPT = ImageFont.load_default(15), ImageFont.load_default(11), ImageFont.load_default(10)
GAP, HEAD, WIDTH = 6, 70, 144
SHOWN = (0, 0.5, 1)
"""Which frames are shown: the first, the middle and the last one."""
PROMPT_LETTERS, PROMPT_LINES = 27, 2


def frames_of(clip: Path) -> list[Image.Image]:
    """All frames of a clip."""
    with av.open(str(clip)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def band_of(story: Path, columns: int) -> Image.Image:
    """One story: a column for each shot, with its mode, the keyframes that it added to the memory, and its prompt."""
    name = json.loads((story / "storyboard.json").read_text())["name"]
    clips = sorted(story.glob("shot_*.mp4"))
    first = frames_of(clips[0])[0]
    height = WIDTH * first.height // first.width
    band = Image.new("RGB", (GAP + columns * (WIDTH + GAP), HEAD + len(SHOWN) * (height + 2) + 12), "white")
    draw = ImageDraw.Draw(band)
    draw.text((GAP, 5), name, font=TITLE, fill="black")
    for number, clip in enumerate(clips, start=1):
        record, frames = json.loads(clip.with_suffix(".json").read_text()), frames_of(clip)
        left, count = GAP + (number - 1) * (WIDTH + GAP), len(record["keyframes"])
        draw.text((left, 27), f"{number}  {record['mode'].upper()}", font=LABEL, fill="#333")
        if count:
            added = f"+{count} keyframe{'' if count == 1 else 's'}"
            draw.text((left + WIDTH - draw.textlength(added, font=LABEL), 27), added, font=LABEL, fill="#777")
        lines = textwrap.wrap(record["prompt"], PROMPT_LETTERS, max_lines=PROMPT_LINES, placeholder=" ...")
        draw.multiline_text((left, 42), "\n".join(lines), font=PROMPT, fill="#555", spacing=1)
        for row, share in enumerate(SHOWN):
            frame = frames[round(share * (len(frames) - 1))].resize((WIDTH, height), Image.Resampling.LANCZOS)
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
    sheet.save(picture, quality=72, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
