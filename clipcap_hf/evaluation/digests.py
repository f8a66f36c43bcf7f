"""SHA-256 digests of records and of images."""

import hashlib
import json
from typing import Any

from PIL import Image


def digest(content: Any) -> str:
    """Return the SHA-256 of anything that JSON can hold; the order of keys does not count."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def image_digest(image: Any) -> str:
    """Return the SHA-256 of an image: of the bytes of a file, or of the pixels of an image in memory.

    Args:
        image: A path, URL, PIL image, bytes, or `{"path": ..., "bytes": ...}` as `datasets` stores images.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    try:
        with open(image, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:  # a URL, or a file that captioning will report
        return hashlib.sha256(str(image).encode("utf-8", "surrogatepass")).hexdigest()
