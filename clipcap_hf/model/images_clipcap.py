"""Any picture to upright RGB: files, URLs, bytes, base64 text, arrays, tensors and PIL images."""

import base64
import binascii
import io
import os
import re
import stat
import threading
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


# Raster formats only: Pillow passes PostScript, under any file name, to the `gs` program on PATH.
_RASTER_FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PCX", "PNG"),
    *("PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
)
_MAX_ASPECT_RATIO = 200  # transforms scale the shorter edge to 224 pixels, so a long edge could use up all memory
_MAX_URL_BYTES = 100 << 20
_URL_TIMEOUT = 30.0  # seconds for the whole download
_MIN_BASE64 = 64  # characters; shorter strings are paths


def raster_formats() -> tuple[str, ...]:
    """List the supported image formats that the installed Pillow and its plug-ins can read."""
    Image.init()
    return tuple(name for name in _RASTER_FORMATS if name in Image.OPEN)


def load_image(image: Any, timeout: float | None = None, enough: int | None = None) -> Image.Image:
    r"""
    Read an image of any kind as upright 8-bit RGB, with transparency on white.

    An array's dtype sets the range of its values: `bool` 0 or 1, `uint8` and the other integers 0 to 255, `uint16` 0
    to 65535, floating point 0 to 1. Values outside the range are refused.

    Args:
        image: A path, an http(s) or data URL, base64 text, bytes, a binary file, a row `{"bytes": ..., "path": ...}`
            of `datasets`, a `PIL.Image.Image`, or an array or tensor of shape (height, width), (height, width,
            channels) or (channels, height, width) with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels. If the
            shape is ambiguous, channels come last in arrays and first in tensors.
        timeout (`float`, *optional*): Seconds for the whole download of a URL; 30 by default.
        enough (`int`, *optional*): Pixels of the shorter edge that are enough. A JPEG decoder then gives a half, a
            quarter or an eighth of the size for less work, where that is no less. By default it gives all pixels.

    Raises:
        ValueError: If it is not a readable, complete image within the size limits. The message names the image.
    """
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        return _load_row(image, timeout, enough)
    if isinstance(image, Image.Image):
        return _convert(getattr(image, "filename", "") or "the image", image)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _convert("the array", _array_to_picture(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode("the bytes", io.BytesIO(image), enough)
    if isinstance(image, (str, os.PathLike)):
        return _load_named(os.fspath(image), timeout, enough)
    if hasattr(image, "read"):
        return _decode(shorten(getattr(image, "name", "the file")), image, enough)
    raise ValueError(
        f"{type(image).__name__}: not an image (pass a path, URL, bytes, base64 text, array, tensor or PIL image)"
    )


def edge_that_is_enough(image_processor: Any) -> int | None:
    """Return twice the longest edge that an image processor asks for, in pixels: more changes next to nothing."""
    size = getattr(image_processor, "size", None) or {}
    names = ("shortest_edge", "longest_edge", "height", "width")
    edges = [size.get(name) if hasattr(size, "get") else getattr(size, name, None) for name in names]
    return 2 * max(edge or 0 for edge in edges) or None


def flat_list_of_images(images: Any) -> list:
    """Flatten a single image, a (nested) list of images or a 4-D array to a list of images."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flat_list_of_images(item)]
    return [images]


def stored_images(images: Any) -> Any:
    """Return a column or rows of `datasets` with paths and bytes in place of decoded images; others unchanged.

    `datasets` itself decodes with every plug-in of Pillow, and raises whatever error that raises.
    """
    if not type(images).__module__.startswith("datasets."):
        return images
    rows: Any = images if hasattr(images, "cast_column") else getattr(images, "source", None)
    name = getattr(images, "column_name", "image")
    feature: Any = (getattr(rows, "features", None) or {}).get(name)
    if getattr(feature, "_type", None) != "Image" or getattr(rows, "format", {"type": None})["type"] is not None:
        return images
    rows = rows.cast_column(name, type(feature)(decode=False))
    return rows if hasattr(images, "cast_column") else rows[name]


def shorten(value: Any, most: int = 250) -> str:
    """Shorten a long text for a message."""
    text = str(value)
    return text if len(text) <= most else f"{text[:80]}... ({len(text)} characters)"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright 8-bit RGB: apply EXIF rotation, put transparency on white, scale 16-bit grey down."""
    # A plain convert("RGB") turns transparent backgrounds black and clips 16-bit grey to white.
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith(("I", "F")):
        return _grey_to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("it has NaN or infinite pixels")
    if image.mode == "F" and pixels.max() <= 1:
        scale = 255.0  # floating-point images are in [0, 1] by convention; some TIFF files hold 0 to 255
    else:
        # "I" has 32 bits, but in practice holds 8-bit or 16-bit pictures.
        scale = 255 / 65535 if image.mode.startswith("I;16") or pixels.max() > 255 else 1.0
    return Image.fromarray((pixels * scale).clip(0, 255).round().astype(np.uint8))


# -- rows, paths, URLs and base64 text


def _load_row(row: dict, timeout: float | None, enough: int | None) -> Image.Image:
    if row.get("bytes") is not None:
        return _decode(shorten(row.get("path") or "the bytes"), io.BytesIO(row["bytes"]), enough)
    if row.get("path") is None:
        raise ValueError("the row holds neither the bytes nor the path of an image")
    return load_image(row["path"], timeout, enough)


def _load_named(name: str | bytes, timeout: float | None, enough: int | None) -> Image.Image:
    path = os.fsdecode(name)
    shown = shorten(path)
    if scheme := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://|data:", path):
        if scheme[0] == "data:":
            return _decode(shown, io.BytesIO(_decode_base64(shown, path.partition(",")[2])), enough)
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(f"{shown}: only http, https and data URLs are read (pass a file by its path)")
        return _decode(shown, io.BytesIO(fetch(path, timeout)), enough)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        if len(path) >= _MIN_BASE64 and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", path):
            try:
                return _decode(shown, io.BytesIO(_decode_base64(shown, path)), enough)
            except ValueError:
                raise ValueError(f"{shown}: no such file, and not the base64 text of a readable image") from None
        absent = isinstance(error, FileNotFoundError)
        reason = "no such file" if absent else getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{shown}: {reason}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{shown}: a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{shown}: not a regular file")  # reading a pipe could block forever
    if status.st_size == 0:
        raise ValueError(f"{shown}: the file is empty")
    return _decode(shown, Path(path), enough)


def _decode_base64(shown: str, text: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{shown}: not a readable image (base64: {error})") from error


# -- encoded pictures


def _decode(name: str, file: Any, enough: int | None) -> Image.Image:
    try:
        with Image.open(file, formats=raster_formats()) as opened:
            if enough is not None:
                opened.draft(None, (enough, enough))  # only JPEG files can
            return _convert(name, opened)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused, the image is too large or too narrow ({error})") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a readable image (no supported image format)") from error
    except ValueError as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise ValueError(f"{name}: not a readable image ({shorten(error)})") from error
    # Pillow's decoders raise errors of any kind on damaged files.
    except Exception as error:
        raise ValueError(f"{name}: not a readable image ({shorten(error)})") from error


def _convert(name: str, image: Image.Image) -> Image.Image:
    """Apply [`to_rgb`], and name the image in errors."""
    name = shorten(name)
    width, height = image.size
    if image.format not in (None, *_RASTER_FORMATS):
        raise ValueError(f"{name}: not a readable image (the format {image.format} is not supported)")
    if min(image.size) == 0:
        raise ValueError(f"{name}: the image has no pixels ({width} x {height})")
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"{name}: refused, the image is too large or too narrow ({width} x {height} pixels)")
    try:
        return to_rgb(image)
    # Images that were opened lazily are decoded here.
    except Exception as error:
        raise ValueError(f"{name}: not a readable image ({shorten(error)})") from error


# -- arrays


def _array_to_picture(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    pixels = _channels_last(array, channels_first)
    return Image.fromarray(np.ascontiguousarray(_to_8_bit(pixels)))


def _channels_last(array: np.ndarray, first_if_both: bool) -> np.ndarray:
    """Arrange an array as (height, width) or (height, width, channels), with 2 to 4 channels."""
    if array.ndim == 2:
        return array
    first, last = (array.ndim == 3 and 1 <= array.shape[place] <= 4 for place in (0, -1))
    if not (first or last):
        raise ValueError(
            "an image is an array (height, width), (height, width, channels) or (channels, height, width) with 1 to 4 "
            f"channels; got the shape {tuple(array.shape)}"
        )
    if first and (first_if_both or not last):
        array = np.moveaxis(array, 0, -1)
    return array[..., 0] if array.shape[-1] == 1 else array


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8 or pixels.size == 0:
        return pixels.astype(np.uint8)
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"an image is an array of integer or floating-point numbers, got {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ValueError("the array has NaN or infinite pixels")
    top = {"f": 1, "u": 65535 if pixels.dtype == np.uint16 else 255, "i": 255}[pixels.dtype.kind]
    if pixels.min() < 0 or pixels.max() > top * (1 + 1e-3 if top == 1 else 1):  # resized floats can slightly exceed 1
        raise ValueError(
            f"pixels of dtype {pixels.dtype} must lie in 0 to {top}, these lie in {pixels.min():g} to "
            f"{pixels.max():g} (pass uint8 for 0 to 255)"
        )
    return (pixels * (255.0 / top)).round().clip(0, 255).astype(np.uint8)


# -- URLs


class _WebRedirects(HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(("http://", "https://")):
            raise URLError(f"redirected to {shorten(newurl)}, which is not http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, timeout: float | None = None) -> bytes:
    """Download an http(s) URL within `timeout` seconds in all (30 by default), including the name look-up."""
    shown = shorten(url)
    timeout = _URL_TIMEOUT if timeout is None else timeout
    if timeout <= 0:
        raise ValueError(f"`timeout` must be a number of seconds above 0, got {timeout}.")
    found: list[bytes | Exception] = []

    def download():
        try:
            found.append(_download(url, timeout))
        except Exception as error:  # raised again by the caller
            found.append(error)

    # A socket's own timeout restarts with each byte from a slow server.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(timeout)
    result = found[0] if found else TimeoutError(f"not complete after {timeout:g} seconds")
    if isinstance(result, (OSError, HTTPException, ValueError)):
        reason = f"{type(result).__name__}: {shorten(result)}"
        raise ValueError(f"{shown}: could not be fetched ({reason})") from result
    if isinstance(result, Exception):
        raise result
    if len(result) > _MAX_URL_BYTES:
        raise ValueError(f"{shown}: refused, the file has more than {_MAX_URL_BYTES >> 20} MB")
    return result


def _download(url: str, timeout: float) -> bytes:
    # Not with huggingface_hub's session, which refuses all requests if `HF_HUB_OFFLINE` is set.
    deadline = time.monotonic() + timeout
    request = Request(url, headers={"User-Agent": "clipcap_hf"})
    data = bytearray()
    with build_opener(_WebRedirects).open(request, timeout=timeout) as response:
        while chunk := response.read1(1 << 16):
            data += chunk
            if len(data) > _MAX_URL_BYTES:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {timeout:g} seconds")
        else:
            if response.length:  # read1 cannot tell a lost connection from the end
                raise HTTPException(f"the connection ended {response.length} bytes early")
    return bytes(data)


__all__ = ["load_image", "to_rgb"]
