"""Read images inside archives and repositories, whose paths the rows of streams hold."""

from typing import Any

import fsspec


def with_bytes(image: dict[str, Any], protocols: tuple[str, ...] = ("zip", "hf")) -> dict[str, Any]:
    """
    Return the row of an image with its bytes, if its path has one of the protocols; otherwise as it is.

    Args:
        image (`dict`): With the keys `path` and `bytes`.
        protocols (`tuple[str, ...]`): Such as `"zip"` for `zip://1.png::/data/images.zip`.
    """
    path = image["path"]
    if image["bytes"] is not None or path is None or path.partition("://")[0] not in protocols:
        return image
    with fsspec.open(path, "rb") as file:
        return {**image, "bytes": file.read()}
