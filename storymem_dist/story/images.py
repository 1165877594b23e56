"""Reads the reference images of a storyboard: fully decoded, upright, RGB. Knows nothing about the size of clips."""

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from storymem_dist.errors import StoryboardError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_IMAGE_PIXELS = 64 * 10**6


def open_reference_image(path: Path) -> Image.Image:
    """Return the image in ``path`` as 8-bit RGB, turned upright (EXIF), transparency laid over white.

    Decodes it whole, so that a truncated file is found. Raises ``StoryboardError`` with the path and what is allowed.
    """
    allowed = f"allowed: a readable {', '.join(IMAGE_FORMATS)} file of at most {MAX_IMAGE_PIXELS // 10**6} megapixels"
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise StoryboardError(f"the image {path} {problem}; {allowed}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; the limit below decides
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise StoryboardError(f"the image {path} has {image.width} x {image.height} pixels; {allowed}")
                upright = ImageOps.exif_transpose(image)
                if upright.has_transparency_data:
                    over_white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(over_white, upright.convert("RGBA"))
                return upright.convert("RGB")
    except StoryboardError:
        raise
    except Exception as error:  # decoders raise many types for damaged files: OSError, SyntaxError, struct.error, ...
        problem = " ".join(str(error).split())[:200]
        raise StoryboardError(f"the image {path} cannot be read ({problem}); {allowed}") from None
