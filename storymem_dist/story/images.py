"""Reads the reference images of a storyboard: fully decoded, upright, 8-bit sRGB. Knows nothing about clips."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from storymem_dist.errors import StoryboardError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIC")
MAX_IMAGE_PIXELS = 64 * 10**6
MAX_ASPECT = 250
"""A longer strip would be scaled to gigabytes before it is cut to the shape of a clip."""

_ALLOWED = f"allowed: a readable {', '.join(IMAGE_FORMATS)} file of at most {MAX_IMAGE_PIXELS // 10**6} megapixels"
_PILLOW_NAMES = {"HEIC": "HEIF"}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEIF_EXTRA = "pip install 'storymem_dist[heif]'"
_BITS_TAG, _WHITE_TAG, _ORIENTATION_TAG, _SIGN_TAG = 258, 262, 274, 339
"""TIFF: bits of a number; 0 where white is the lowest number; above 4 if turned by 90 degrees; 2 if there are signs."""

_KIND_TAG, _MAXIMUM_TAG, _PLANES_TAG = 254, 281, 284
"""TIFF: odd if the picture is a preview of another one; the number that is white; 2 if each colour is stored alone."""

_SRGB_GAMMA = 0.45455
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_LEFT_AS_IT_IS = 3
"""Largest difference (of 255) that a colour profile makes and is taken for sRGB, whose pixels are left as they are."""

_DARK = 4096
"""A picture of 16-bit numbers that are all below is one of 12 bits or less, and nothing in it says so."""

_MIN_MAX_OF_BYTES = 16.0
"""Smallest maximum of a picture of numbers from 0 to 255 that are stored as floats; below, the scale is not clear."""


def open_reference_image(path: Path, on_change: Callable[[str], None] = lambda what: None) -> Image.Image:
    """Return the image in ``path`` as 8-bit RGB, turned upright (EXIF), transparency laid over white.

    Pictures of more bits are scaled, LAB and pictures with another colour profile are converted to sRGB. Of an
    animation, the first frame is read. ``on_change`` receives a sentence about what is not used or had to be guessed.
    Decodes the file whole, so that a truncated one is found. Raises ``StoryboardError`` with the path and what is
    allowed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; the limit below decides
            with _opened(path) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise StoryboardError(f"the image {path} has {image.width} x {image.height} pixels; {_ALLOWED}")
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise StoryboardError(
                        f"the image {path} has {image.width} x {image.height} pixels; allowed: at most"
                        f" {MAX_ASPECT} times as long as wide"
                    )
                if image.format != "MPO" and (num_frames := getattr(image, "n_frames", 1)) > 1:
                    on_change(f"the picture has {num_frames} frames; the first is used")
                    image.seek(0)
                _check_tiff(image, path)
                gamma = image.info.get("gamma", _SRGB_GAMMA)
                if abs(gamma - _SRGB_GAMMA) > 0.02 and not {"srgb", "icc_profile"} & image.info.keys():
                    on_change(f"the picture says that its gamma is {gamma:g}; it is read as sRGB")
                return _as_rgb(image, path, on_change)
    except StoryboardError:
        raise
    except Image.DecompressionBombError:
        raise StoryboardError(f"the image {path} has too many pixels; {_ALLOWED}") from None
    except UnidentifiedImageError:
        raise StoryboardError(f"the image {path} is {_unidentified(path)}; {_ALLOWED}") from None
    except Exception as error:  # decoders raise many types for damaged files: OSError, SyntaxError, struct.error, ...
        problem = " ".join(str(error).split())[:200]
        raise StoryboardError(f"the image {path} cannot be read ({problem}); {_ALLOWED}") from None


def pixel_rule(path: Path) -> str:
    """Return how the numbers of the file become pixels: "" if they are the pixels, else a word for fingerprints.

    Reads the header alone. "" for a file that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(path) as image:
                if image.mode in ("LAB", "I", "F") or image.mode.startswith("I;"):
                    return "scaled"
                if image.format == "TIFF" and image.getexif().get(_ORIENTATION_TAG, 1) > 4:
                    return "turned"
                return "" if _to_srgb(image) is None else "profile"
    except Exception:  # as in open_reference_image; the file is refused when it is opened
        return ""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise StoryboardError(f"the image {path} {problem}; {_ALLOWED}")
    with path.open("rb") as file:  # given a path, Pillow maps the file, and scrambles TIFF pictures that are turned
        start = file.read(64)
        file.seek(0)
        if not start:
            raise StoryboardError(f"the image {path} is empty (0 bytes); {_ALLOWED}")
        if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS and b"avif" not in start:
            _read_heic_too(path)
        Image.init()
        names = [_PILLOW_NAMES.get(name, name) for name in IMAGE_FORMATS]
        with Image.open(file, formats=[name for name in names if name in Image.OPEN]) as image:
            yield image


def _unidentified(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(4) in _TIFF_STARTS:
            return "a kind of TIFF that is not read (raw, or colours of 32 bits, for example); save it as PNG or JPEG"
    return "none of the formats that are read, or damaged at its start"


def _check_tiff(image: Image.Image, path: Path) -> None:
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_PLANES_TAG) == 2 and max(tags.get(_BITS_TAG, (8,))) > 8:  # Pillow reads such planes as 8-bit numbers
        raise StoryboardError(f"the image {path} is a TIFF of more than 8 bits in separate planes; save it as PNG")
    if tags.get(_KIND_TAG, 0) & 1:
        raise StoryboardError(
            f"the image {path} begins with a preview of {image.width} x {image.height} pixels, as raw pictures of"
            " cameras do; save it as PNG or JPEG"
        )


def _read_heic_too(path: Path) -> None:
    """Make Pillow read HEIC. Raises ``StoryboardError`` when the extra is not installed."""
    try:
        import pillow_heif
    except ImportError:
        raise StoryboardError(
            f"the image {path} is HEIC, a phone's format; {_HEIF_EXTRA} to read it, or save it as JPEG or PNG"
        ) from None
    pillow_heif.register_heif_opener()


def _as_rgb(image: Image.Image, path: Path, on_change: Callable[[str], None]) -> Image.Image:
    to_srgb = _to_srgb(image)
    upright = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        upright = _as_bytes(image, upright, path, on_change)
    elif image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        upright = _transformed(upright, to_rgb)
    elif to_srgb is not None:
        upright = to_srgb(upright)
    if upright.has_transparency_data:
        over_white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(over_white, upright.convert("RGBA"))
    return upright.convert("RGB")


def _as_bytes(image: Image.Image, upright: Image.Image, path: Path, on_change: Callable[[str], None]) -> Image.Image:
    """``upright``, a grey picture of 16 or 32 bits, as 8-bit grey, with alpha if one of its values is transparent.

    ``image`` is the file, whose tags say what the numbers mean.
    """
    values = np.asarray(upright)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        scaled = _floats_as_bytes(values, path, on_change)
    else:
        bits = 16 if image.format == "PNG" else int(tags.get(_BITS_TAG, (16,))[0])
        is_signed = tags.get(_SIGN_TAG, (1,))[0] == 2
        if bits == 32 and not is_signed:
            values = values.astype(np.int32, copy=False).view(np.uint32)
        elif bits == 16 and (white := tags.get(_MAXIMUM_TAG)) and int(values.max()) <= white[0] < 65535:
            bits = int(white[0]).bit_length()
        scaled = _integers_as_bytes(values, bits, is_signed, path, on_change)
    if tags.get(_WHITE_TAG) == 0:
        scaled = 255 - scaled
    grey = Image.fromarray(scaled.astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _integers_as_bytes(values: Any, bits: int, is_signed: bool, path: Path, on_change: Callable[[str], None]) -> Any:
    lowest, highest = int(values.min()), int(values.max())
    if bits <= 16 and not is_signed:
        if bits == 16 and 0 < highest < _DARK:
            on_change(f"the picture has 16-bit numbers up to {highest} only, so it is almost black (white is 65535)")
        return np.clip(values, 0, 2**bits - 1) >> max(0, bits - 8)
    if lowest < 0 or highest > 65535 or (bits <= 16 and highest > 255):
        raise StoryboardError(
            f"the image {path} has {bits}-bit numbers from {lowest} to {highest}, and nothing says what is white;"
            " save it with 8 or 16 bits, without a sign"
        )
    if highest <= 255:
        return values
    on_change(f"the picture has {bits}-bit numbers up to {highest}; read as 16-bit numbers (white is 65535)")
    return values >> 8


def _floats_as_bytes(values: Any, path: Path, on_change: Callable[[str], None]) -> Any:
    lowest, highest = float(values.min()), float(values.max())
    if lowest >= 0.0 and highest <= 1.0:
        return np.rint(values * 255.0)
    if lowest >= 0.0 and _MIN_MAX_OF_BYTES <= highest <= 255.0:
        on_change(f"the picture has floating-point numbers up to {highest:g}; white is taken to be 255")
        return values
    if not np.isfinite(values).all():
        raise StoryboardError(f"the image {path} has floating-point numbers that are NaN or infinite; save it as PNG")
    raise StoryboardError(
        f"the image {path} has floating-point numbers from {lowest:g} to {highest:g}, and nothing says what is white;"
        " save it with numbers from 0 to 1, or with 8 or 16 bits"
    )


def _to_srgb(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """What converts ``image`` from its colour profile to sRGB; None where its pixels can be used as they are."""
    icc = image.info.get("icc_profile")
    if not icc or image.mode not in ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK"):
        return None
    mode = "CMYK" if image.mode == "CMYK" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if profile.profile.xcolor_space.strip() != mode:
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError):
        return None
    if mode == "RGB" and _is_srgb(transform):
        return None

    def convert(upright: Image.Image) -> Image.Image:
        if mode == "CMYK":
            return _transformed(upright, transform)
        alpha = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
        converted = _transformed(upright.convert("RGBA" if alpha else "RGB").convert("RGB"), transform)
        if alpha is not None:
            converted.putalpha(alpha)
        return converted

    return convert


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "only a transform in place returns nothing"
    return converted


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(9, 81, 3)
    converted = np.asarray(_transformed(Image.fromarray(colours), transform))
    return bool(np.abs(converted.astype(int) - colours.astype(int)).max() <= _LEFT_AS_IT_IS)
