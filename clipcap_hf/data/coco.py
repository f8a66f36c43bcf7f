"""Read caption annotations in COCO's format, which STAIR Captions and nocaps share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import listed


@dataclass
class CocoImage:
    """One image of an annotation file.

    Attributes:
        image_id: A whole number or a string.
        entry: The image's own entry (`file_name`, `domain`, ...); empty if the file lists only its captions.
        captions: As published, empty ones included.
    """

    image_id: int | str
    entry: dict[str, Any] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)

    @property
    def domain(self) -> str | None:
        return self.entry.get("domain")


def read_coco(path: str | Path, content: Any = None) -> list[CocoImage]:
    """Read the images of an annotation file with their captions: listed images first, then others with captions.

    Args:
        path: `captions_val2014.json`, `stair_captions_v1.2_val.json`, `nocaps_val_4500_captions.json`, ...
        content: The content of the file, if it was already read.

    Raises:
        ValueError: If the file is not in this format; the message names the file and the entry.
    """
    content = read_json(path) if content is None else content
    if not isinstance(content, dict) or not {"images", "annotations"} & content.keys():
        raise ValueError(
            f"{path} does not have the layout of COCO's captions (captions_val2014.json), with images and "
            f"annotations: it holds {kind_of(content)}."
        )
    images: dict[int | str, CocoImage] = {}
    for number, entry in enumerate(_entries(content, "images", path)):
        image_id = _image_id(entry, "id", f"{path}: image {number}")
        if image_id in images:
            raise ValueError(
                f"{path} lists the same image id twice: {image_id!r:.80}. Each image may have one entry with all its "
                "captions."
            )
        if entry.get("domain") is not None and not is_name(entry["domain"]):
            raise ValueError(f"{path}: image {number}: domain must be a string, not {entry['domain']!r:.80}.")
        images[image_id] = CocoImage(image_id, entry)
    for number, entry in enumerate(_entries(content, "annotations", path)):
        image_id = _image_id(entry, "image_id", f"{path}: annotation {number}")
        if not isinstance(entry.get("caption"), str):
            raise ValueError(
                f"{path}: annotation {number}: the caption must be a string, not {entry.get('caption')!r:.80}."
            )
        images.setdefault(image_id, CocoImage(image_id)).captions.append(entry["caption"])
    return list(images.values())


def _entries(content: dict, name: str, path: str | Path) -> list:
    entries = content.get(name)
    if entries is not None and not isinstance(entries, list):
        raise ValueError(f"{path}: {name} must be a list, not {entries!r:.80}.")
    return entries or []


def _image_id(entry: Any, name: str, place: str) -> int | str:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be like {{{name!r}: 42, ...}}, not {entry!r:.80}.")
    return check_image_id(entry.get(name), f"{place}: {name}")


def check_image_id(image_id: Any, place: str) -> int | str:
    """Return the image id if it is a whole number or a string; otherwise raise a ValueError that names the place."""
    if isinstance(image_id, bool) or not (isinstance(image_id, int) or is_name(image_id)):
        raise ValueError(f"{place} must be a whole number or a string, not {image_id!r:.80}.")
    if isinstance(image_id, int) and not -(2**63) <= image_id < 2**63:
        raise ValueError(f"{place} must fit into 64 bits, but is {image_id!s:.80}.")
    return image_id


def is_name(value: Any) -> bool:
    """Tell whether a value is text that can be encoded: JSON can hold half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def read_json(path: str | Path) -> Any:
    """Read a JSON file, with or without a byte-order mark; raise a ValueError that names a file that is not JSON."""
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file, or is incomplete: {error}") from error


def kind_of(content: Any) -> str:
    """Say in a few words what a JSON file holds instead of what was expected."""
    if isinstance(content, dict):
        return f"a dict with {listed([str(key)[:40] for key in content])}"
    return f"a {type(content).__name__}"
