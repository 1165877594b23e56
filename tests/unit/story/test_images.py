"""Reference images keep their colours whatever their bits, profile or format; what has no clear meaning is refused."""

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from storymem_dist.errors import StoryboardError
from storymem_dist.story.images import open_reference_image, pixel_rule

RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (16, 1))
GREY = (RAMP >> 8).astype(np.uint8)
RGB = Image.fromarray(np.dstack([GREY, GREY[:, ::-1], np.full_like(GREY, 60)]))


def pixels(path: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    image = open_reference_image(path, said.append)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int), said


def grey_png(path: Path, extra: bytes = b"") -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = RAMP.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RAMP)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    data = [chunk(b"IHDR", header), extra and chunk(b"tRNS", extra), chunk(b"IDAT", zlib.compress(raw))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(data) + chunk(b"IEND", b""))


def tiff(path: Path, values: Any, *, bits: int, white: int = 1, sign: int = 1, **tags: int) -> None:
    """A grey TIFF, uncompressed, with the tags that Pillow does not write; ``tags``: others, such as ``t281``."""
    height, width = values.shape
    data = values.tobytes()
    shorts = [(256, width), (257, height), (258, bits), (259, 1), (262, white), (277, 1), (278, height), (339, sign)]
    shorts += [(int(tag[1:]), value) for tag, value in tags.items()]
    entries = [(tag, 3, value) for tag, value in shorts] + [(273, 4, 200), (279, 4, len(data))]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0)
    path.write_bytes(head.ljust(200, b"\0") + data)


GREYS: dict[str, Callable[[Path], object]] = {
    "16.png": grey_png,
    "16.tiff": lambda path: Image.fromarray(RAMP).save(path),
    "16 white is 0.tiff": lambda path: tiff(path, (65535 - RAMP).astype("<u2"), bits=16, white=0),
    "12 in 16.tiff": lambda path: tiff(path, RAMP >> 4, bits=16, t281=4095),
    "32 holding 8.tiff": lambda path: Image.fromarray(GREY.astype(np.int32)).save(path),
    "32 holding 16.tiff": lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path),
    "float to 1.tiff": lambda path: Image.fromarray((GREY / 255).astype(np.float32)).save(path),
    "float to 255.tiff": lambda path: Image.fromarray(GREY.astype(np.float32)).save(path),
}


@pytest.mark.parametrize("name", GREYS)
def test_a_grey_picture_of_more_bits_looks_like_its_8_bits(tmp_path: Path, name: str) -> None:
    GREYS[name](tmp_path / name)
    found, said = pixels(tmp_path / name)
    assert np.abs(found - GREY[:, :, None].astype(int)).max() <= 1
    assert bool(said) == (name in ("32 holding 16.tiff", "float to 255.tiff")), said
    assert pixel_rule(tmp_path / name) == "scaled"


def test_a_picture_that_becomes_almost_black_or_has_another_gamma_has_a_warning(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tiff", RAMP >> 4, bits=16)
    assert pixels(tmp_path / "a.tiff")[1] == [
        "the picture has 16-bit numbers up to 4095 only, so it is almost black (white is 65535)"
    ]
    linear = PngImagePlugin.PngInfo()
    linear.add(b"gAMA", struct.pack(">I", 100_000))
    RGB.save(tmp_path / "a.png", pnginfo=linear)
    assert pixels(tmp_path / "a.png")[1] == ["the picture says that its gamma is 1; it is read as sRGB"]


def test_the_transparent_value_of_a_16_bit_picture_is_white(tmp_path: Path) -> None:
    grey_png(tmp_path / "a.png", extra=struct.pack(">H", int(RAMP[0, 3])))
    found, _ = pixels(tmp_path / "a.png")
    assert found[0, 3].tolist() == [255, 255, 255] and found[0, 4].tolist() == [4, 4, 4]


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "wide range": (
        lambda path: Image.fromarray(RAMP.astype(np.int32) * 30_000).save(path),
        "has 32-bit numbers from 0 to 1966050000, and nothing says what is white; save it with 8 or 16 bits",
    ),
    "below zero": (
        lambda path: Image.fromarray(RAMP.astype(np.int32) - 9).save(path),
        "has 32-bit numbers from -9 to 65526, and nothing says what is white",
    ),
    "16 bits with a sign": (
        lambda path: tiff(path, (RAMP >> 1).astype("<i2"), bits=16, sign=2),
        "has 16-bit numbers from 0 to 32767, and nothing says what is white",
    ),
    "floats to 2": (
        lambda path: Image.fromarray((RAMP / 32767.5).astype(np.float32)).save(path),
        "has floating-point numbers from 0 to 2, and nothing says what is white; save it with numbers from 0 to 1",
    ),
    "floats to 65535": (
        lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
        "has floating-point numbers from 0 to 65535, and nothing says what is white",
    ),
    "not a number": (
        lambda path: Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path),
        "has floating-point numbers that are NaN or infinite; save it as PNG",
    ),
    "32 bits without a sign": (
        lambda path: tiff(path, RAMP.astype("<u4") * 65537, bits=32),
        "has 32-bit numbers from 0 to 4294967295, and nothing says what is white",
    ),
    "colours of 64 bits": (
        lambda path: tiff(path, RAMP.astype("<f8"), bits=64, sign=3),
        "is a kind of TIFF that is not read (raw, or colours of 32 bits, for example); save it as PNG or JPEG",
    ),
    "16 bits in planes": (
        lambda path: tiff(path, RAMP, bits=16, t284=2),
        "is a TIFF of more than 8 bits in separate planes; save it as PNG",
    ),
    "a raw picture's preview": (
        lambda path: tiff(path, GREY, bits=8, t254=1),
        "begins with a preview of 256 x 16 pixels, as raw pictures of cameras do; save it as PNG or JPEG",
    ),
    "a strip": (
        lambda path: Image.new("L", (251, 1)).save(path),
        "has 251 x 1 pixels; allowed: at most 250 times as long as wide",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_picture_whose_white_is_not_known_is_refused(tmp_path: Path, case: str) -> None:
    make, problem = REFUSED[case]
    make(tmp_path / "a.tiff")
    with pytest.raises(StoryboardError) as caught:
        open_reference_image(tmp_path / "a.tiff")
    assert str(caught.value).startswith(f"the image {tmp_path}/a.tiff {problem}")


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def wide_profile() -> bytes:
    """sRGB's profile with the primaries of Display P3."""
    profile = bytearray(srgb_profile())
    primaries = {b"rXYZ": (0.515, 0.241, -0.001), b"gXYZ": (0.292, 0.692, 0.042), b"bXYZ": (0.157, 0.067, 0.784)}
    (num_tags,) = struct.unpack(">I", profile[128:132])
    for index in range(num_tags):
        name, offset, _ = struct.unpack(">4sII", profile[132 + 12 * index : 144 + 12 * index])
        if name in primaries:
            fixed = [round(value * 65536) for value in primaries[name]]
            profile[offset + 8 : offset + 20] = struct.pack(">iii", *fixed)
    return bytes(profile)


def as_lab(path: Path) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(RGB, to_lab).save(path)


needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
KEPT: dict[str, tuple[str, Callable[[Path], object], int]] = {
    "LAB": ("a.tiff", as_lab, 40),  # two conversions through 8 bits of a colour at the edge of sRGB
    "CMYK": ("a.tiff", lambda path: RGB.convert("CMYK").save(path), 1),
    "sRGB profile": ("a.png", lambda path: RGB.save(path, icc_profile=srgb_profile()), 0),
    "a profile that is none": ("a.png", lambda path: RGB.save(path, icc_profile=b"junk"), 0),
    "a profile of another kind": ("a.png", lambda path: RGB.save(path, icc_profile=lab_profile()), 0),
    "BMP": ("a.bmp", lambda path: RGB.save(path), 0),
    "WebP": ("a.webp", lambda path: RGB.save(path, lossless=True), 0),
    "PNG of another name": ("a.jpg", lambda path: RGB.save(path, format="PNG"), 0),
    "MPO": ("a.jpg", lambda path: RGB.save(path, "MPO", save_all=True, append_images=[RGB], quality=95), 20),
}


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize("case", KEPT)
def test_a_colour_picture_keeps_its_colours(tmp_path: Path, case: str) -> None:
    name, make, most = KEPT[case]
    make(tmp_path / name)
    found, said = pixels(tmp_path / name)
    assert np.abs(found - np.asarray(RGB).astype(int)).max() <= most
    assert said == []
    assert pixel_rule(tmp_path / name) == ("scaled" if case == "LAB" else "")


@needs_avif
def test_avif_is_read_by_its_content(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.avif", quality=100)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.avif").read_bytes())
    for name in ("a.avif", "a.jpg"):
        found, _ = pixels(tmp_path / name)
        assert np.abs(found - np.asarray(RGB).astype(int)).max() <= 12


def test_a_picture_of_a_wide_gamut_is_converted_and_its_fingerprint_says_so(tmp_path: Path) -> None:
    grey = Image.merge("RGB", [Image.fromarray(GREY)] * 3)
    red = Image.new("RGB", (4, 4), (200, 40, 40))
    for name, image in (("grey", grey), ("red", red)):
        image.save(tmp_path / f"{name}.png", icc_profile=wide_profile())
    found, said = pixels(tmp_path / "grey.png")
    assert np.abs(found - GREY[:, :, None].astype(int)).max() <= 6 and said == []
    (red_, green, blue) = pixels(tmp_path / "red.png")[0][0, 0]
    assert red_ > 210 and green < 40 and blue < 40, "the same light needs a purer red in sRGB"
    assert pixel_rule(tmp_path / "red.png") == "profile"
    red.putalpha(0)
    red.save(tmp_path / "clear.png", icc_profile=wide_profile())
    assert pixels(tmp_path / "clear.png")[0][0, 0].tolist() == [255, 255, 255]


ANIMATED = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_the_first_frame_of_several_is_used_and_said(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name == "a.webp" else {}
    ANIMATED[0].save(tmp_path / name, save_all=True, append_images=ANIMATED[1:], **options)
    found, said = pixels(tmp_path / name)
    assert found[0, 0].tolist() == [255, 0, 0]
    assert said == ["the picture has 3 frames; the first is used"]


def test_a_gif_of_one_frame_is_a_picture(tmp_path: Path) -> None:
    ANIMATED[0].save(tmp_path / "a.gif")
    found, said = pixels(tmp_path / "a.gif")
    assert found[0, 0].tolist() == [255, 0, 0] and said == []


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.jpg"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_turned_picture_is_upright(tmp_path: Path, name: str, bits: int) -> None:
    if (name, bits) == ("a.jpg", 16):
        pytest.skip("JPEG has 8 bits")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY if bits == 8 else RAMP).save(tmp_path / name, exif=exif)
    found, _ = pixels(tmp_path / name)
    assert found.shape == (256, 16, 3)
    assert np.abs(found[:, :, 0] - np.arange(256)[:, None]).max() <= 3


HEIC = bytes.fromhex("0000001866747970686569630000000068656963") + bytes(400)


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_heic_without_its_extra_names_the_command(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(HEIC)
    with pytest.raises(StoryboardError) as caught:
        open_reference_image(tmp_path / name)
    assert str(caught.value) == (
        f"the image {tmp_path / name} is HEIC, a phone's format; pip install 'storymem_dist[heif]' to read it,"
        " or save it as JPEG or PNG"
    )


def test_heic_is_read_with_its_extra(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
    pillow_heif.register_heif_opener()
    RGB.save(tmp_path / "a.heic", quality=95)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.heic").read_bytes())
    for name in ("a.heic", "a.jpg"):
        found, _ = pixels(tmp_path / name)
        assert np.abs(found - np.asarray(RGB).astype(int)).max() <= 12
