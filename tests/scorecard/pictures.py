"""Image files of unusual kinds, all of one colour, and damaged ones."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageCms

COLOUR = (200, 100, 50)
GREY = 120

_SIZE = (24, 20)
# Releases of Pillow before this one write a TIFF in YCbCr and cannot read it.
_READS_YCBCR = int(PIL.__version__.partition(".")[0]) >= 13


def readable() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Files by name, with the colour that each looks like; JPEG and WebP may be off by a little."""
    plain = Image.new("RGB", _SIZE, COLOUR)
    palette = Image.new("P", _SIZE, 1)
    palette.putpalette([0, 0, 0, *COLOUR])
    grey, deep = (GREY,) * 3, np.full((20, 24), GREY * 256 + 77, np.uint16)
    first_of_two: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", _SIZE)]}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    images = {
        "plain.png": (plain, {}),
        "plain.jpg": (plain, {"quality": 95}),
        "plain.webp": (plain, {"lossless": True}),
        "plain.bmp": (plain, {}),
        "progressive.jpg": (plain, {"progressive": True}),
        "interlaced.tiff": (plain, {"compression": "tiff_lzw"}),
        "cmyk.jpg": (Image.new("CMYK", _SIZE, (55, 155, 205, 0)), {"quality": 100}),
        "cmyk.tiff": (Image.new("CMYK", _SIZE, (55, 155, 205, 0)), {}),
        **({"ycbcr.tiff": (plain.convert("YCbCr"), {})} if _READS_YCBCR else {}),
        "palette.png": (palette, {}),
        "palette.gif": (palette, {}),
        "transparent_palette.png": (palette, {"transparency": bytes([0, 128])}),
        "transparent_palette.gif": (palette, {"transparency": 0}),
        "transparent_colour.png": (plain, {"transparency": (1, 2, 3)}),
        "alpha.png": (Image.new("RGBA", _SIZE, (*COLOUR, 9)), {}),
        "alpha.webp": (Image.new("RGBA", _SIZE, (*COLOUR, 255)), {"lossless": True}),
        "animated.gif": (plain, first_of_two),
        "animated.png": (plain, first_of_two),
        "animated.webp": (plain, {**first_of_two, "lossless": True}),
        "pages.tiff": (plain, first_of_two),
        "profile.png": (plain, {"icc_profile": profile}),
        "profile.jpg": (plain, {"icc_profile": profile, "quality": 95}),
        "damaged_profile.png": (plain, {"icc_profile": b"no profile"}),
        "damaged_exif.jpg": (plain, {"exif": b"Exif\x00\x00no exif", "quality": 95}),
        "one_pixel.png": (Image.new("RGB", (1, 1), COLOUR), {}),
        "long.png": (Image.new("RGB", (900, 9), COLOUR), {}),
        "grey.png": (Image.new("L", _SIZE, GREY), {}),
        "grey_alpha.png": (Image.new("LA", _SIZE, (GREY, 9)), {}),
        "deep_grey.png": (Image.fromarray(deep), {}),
        "deep_grey.tiff": (Image.fromarray(deep), {}),
        "one_bit.png": (Image.new("1", _SIZE, 1), {}),
        "one_bit.tiff": (Image.new("1", _SIZE, 0), {"compression": "group4"}),
    }
    looks = {name: grey for name in images if "grey" in name}
    looks |= {"one_bit.png": (255,) * 3, "one_bit.tiff": (0,) * 3}
    files = {
        name: (_saved(image, name, how), looks.get(name, COLOUR)) for name, (image, how) in images.items()
    }
    pixel = np.array([value * 256 + 77 for value in COLOUR], ">u2").tobytes()
    deep_rgb = _png(24, 20, 16, 2, zlib.compress((b"\x00" + 24 * pixel) * 20))
    return {
        **files,
        "deep_rgb.png": (deep_rgb, COLOUR),
        "deep_grey_big_endian.tiff": (_saved(Image.fromarray(deep.astype(">u2")), "a.tiff", {}), grey),
        "jpeg_named.png": (files["plain.jpg"][0], COLOUR),
        "png_named.jpg": (files["plain.png"][0], COLOUR),
        "gif_named.jpeg": (files["palette.gif"][0], COLOUR),
        "trailing_garbage.jpg": (files["plain.jpg"][0] + b"garbage", COLOUR),
    }


def turned() -> dict[int, bytes]:
    """A JPEG by its EXIF orientation, whose upper half is white and lower half black once it is upright."""
    upright = Image.new("L", (32, 32))
    upright.paste(255, (0, 0, 32, 16))
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    files = {}
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = upright if turn is None else upright.transpose(turn)
        files[orientation] = _saved(image.convert("RGB"), "a.jpg", {"exif": exif, "quality": 95})
    return files


def damaged() -> dict[str, bytes]:
    """Files by name that are no whole image, or one that cannot be shown."""
    whole = {name: content for name, (content, _) in readable().items()}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    jpeg, png = _saved(noise, "a.jpg", {}), _saved(noise, "a.png", {})
    return {
        "empty.jpg": b"",
        "empty.png": b"",
        "text.jpg": b"this is no image",
        "html.jpg": b"<!DOCTYPE html><title>404 Not Found</title>",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pdf.jpg": b"%PDF-1.4\n",
        "zeros.jpg": bytes(2048),
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "half.webp": whole["plain.webp"][: len(whole["plain.webp"]) // 2],
        "half.tiff": whole["interlaced.tiff"][: len(whole["interlaced.tiff"]) // 3],
        "half.bmp": whole["plain.bmp"][: len(whole["plain.bmp"]) // 2],
        "head.gif": whole["palette.gif"][:20],
        "head.jpg": jpeg[:20],
        "signature.png": png[:8],
        "no_width.png": _png(0, 20, 8, 2, b""),
        "no_height.png": _png(20, 0, 8, 2, b""),
        "no_data.png": _png(20, 20, 8, 2, b""),
        "float.tiff": _saved(Image.fromarray(np.full((20, 24), 0.5, np.float32)), "a.tiff", {}),
        "integers.tiff": _saved(Image.fromarray(np.full((20, 24), 2**20, np.int32)), "a.tiff", {}),
        "thin.png": _saved(Image.new("L", (60_000, 1)), "a.png", {}),
        "tall.jpg": _saved(Image.new("L", (1, 60_000)), "a.jpg", {}),
        **({} if _READS_YCBCR else {"ycbcr.tiff": _saved(Image.new("YCbCr", _SIZE), "a.tiff", {})}),
    }


def bombs() -> dict[str, bytes]:
    """Small files that would fill the memory."""
    zeros = bytes(1 << 20)
    packed = zlib.compressobj()
    text = b"Comment\x00\x00" + b"".join(packed.compress(zeros) for _ in range(100)) + packed.flush()
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x00\x00\x00,"
    return {
        "huge.png": _png(2**31 - 1, 2**31 - 1, 8, 2, zlib.compress(bytes(1000))),
        "large.png": _png(20_000, 20_000, 8, 2, zlib.compress(bytes(1000))),
        "large.gif": gif + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\x00\x08\x00;",
        "large.bmp": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24, *[0] * 6),
        "text.png": _png(20, 20, 8, 2, zlib.compress(bytes(61 * 20)), extra=_chunk(b"zTXt", text)),
        "profile.png": _png(20, 20, 8, 2, zlib.compress(bytes(61 * 20)), extra=_chunk(b"iCCP", text)),
    }


def _saved(image: Image.Image, name: str, how: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    suffix = name.rpartition(".")[2]
    image.save(file, {"jpg": "jpeg"}.get(suffix, suffix), **how)
    return file.getvalue()


def _png(width: int, height: int, bits: int, kind: int, data: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
