"""The field's files: results JSON and references in COCO's annotation format."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import listed, write_text
from .protocol import EvaluationSet, repeated_ids


RESULTS_FORM = '[{"image_id": 42, "caption": "a cat"}, ...]'


def read_results(path: str | Path) -> dict[int | str, str]:
    """Captions by image id, from a results file `[{"image_id": 42, "caption": "a cat"}, ...]`.

    Raises:
        ValueError: no such JSON, an entry that lacks something, or an image that has several captions.
    """
    entries = _read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a results file is a list {RESULTS_FORM}, not {_kind(entries)}.")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            raise ValueError(f"{path}: entry {number} is {entry!r:.80}, and should be like {RESULTS_FORM[1:-6]}.")
        _check_entry(entry, f"{path}: entry {number}")
    if repeated := repeated_ids([entry["image_id"] for entry in entries]):
        raise ValueError(
            f"{path}: images have more than one caption: {listed(repeated)}. Leave one of each; "
            "which one is scored must not be chance."
        )
    return {entry["image_id"]: entry["caption"] for entry in entries}


def write_results(path: str | Path, captions: Mapping[int | str, str]) -> None:
    """Writes a results file as the leaderboards take it; ids that are whole numbers are written as such."""
    entries = [{"image_id": _whole(image), "caption": caption} for image, caption in captions.items()]
    write_text(path, json.dumps(entries, ensure_ascii=False))


def read_references(path: str | Path) -> EvaluationSet:
    """References from COCO's annotation format, which nocaps and STAIR share, or from `{"image id": [captions]}`.

    Domains are read from the images' `domain`, as nocaps gives them. An image listed without captions stays, without
    references.
    """
    content = _read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        return _coco_references(path, content)
    if isinstance(content, dict) and content and all(isinstance(group, list) for group in content.values()):
        for image, group in content.items():
            for caption in group:
                _check_entry({"image_id": image, "caption": caption}, f"{path}: image {image}")
        return EvaluationSet(list(content), list(content.values()), source=str(path))
    raise ValueError(
        f'{path}: references are {{"annotations": [{{"image_id": 42, "caption": "a cat"}}, ...]}}, as COCO gives them, '
        f'or {{"42": ["a cat", ...]}}; this is {_kind(content)}.'
    )


def _coco_references(path, content: dict) -> EvaluationSet:
    groups, domains = {}, {}
    for number, image in enumerate(content.get("images") or ()):
        if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
            raise ValueError(f"{path}: image {number} is {image!r:.80}, without an id.")
        groups[image["id"]] = []
        domains[image["id"]] = image.get("domain")
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict) or "image_id" not in annotation or "caption" not in annotation:
            raise ValueError(f"{path}: annotation {number} is {annotation!r:.80}, without image_id or caption.")
        _check_entry(annotation, f"{path}: annotation {number}")
        groups.setdefault(annotation["image_id"], []).append(annotation["caption"])
    known = [domains.get(image) for image in groups]
    if any(known) and not all(known):
        without = [image for image, domain in zip(groups, known) if not domain]
        raise ValueError(f"{path}: some images have a domain and others have none: {listed(without)}.")
    return EvaluationSet(list(groups), list(groups.values()), known if any(known) else None, source=str(path))


def _check_entry(entry: dict, place: str) -> None:
    if isinstance(entry["image_id"], bool) or not isinstance(entry["image_id"], int | str):
        raise ValueError(f"{place}: image_id must be a whole number or a string, not {entry['image_id']!r:.80}.")
    if not isinstance(entry["caption"], str):
        raise ValueError(f"{place}: the caption must be a string, not {entry['caption']!r:.80}.")


def _whole(image: int | str) -> int | str:
    return int(image) if isinstance(image, str) and image.isdecimal() and str(int(image)) == image else image


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _kind(content: Any) -> str:
    return f"a dict with {listed(list(content))}" if isinstance(content, dict) else f"a {type(content).__name__}"


def digest(content: Any) -> str:
    """SHA-256 of what can be written as JSON, whatever the order of keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
