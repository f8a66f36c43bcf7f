"""Result files as the leaderboards take them, and references in COCO's annotation format."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..data.coco import check_image_id, kind_of, read_coco, read_json
from ..files import listed, write_text
from .evaluation_set import EvaluationSet, repeated_ids


RESULTS_FORM = '[{"image_id": 42, "caption": "a cat"}, ...]'


def read_results(path: str | Path) -> dict[int | str, str]:
    """Read captions by image id from a results file `[{"image_id": 42, "caption": "a cat"}, ...]`.

    Raises:
        ValueError: If the file is not JSON of this form, or an image has several captions.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a results file is a list {RESULTS_FORM}, not {kind_of(entries)}.")
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
    """Write a results file for the leaderboards; ids made of digits become whole numbers."""
    entries = [{"image_id": _whole(image), "caption": caption} for image, caption in captions.items()]
    write_text(path, json.dumps(entries, ensure_ascii=False))


def read_references(path: str | Path) -> EvaluationSet:
    """Read references from COCO's annotation format, which nocaps and STAIR share, or from `{"image id": [captions]}`.

    Domains come from the field `domain` of the images, as in nocaps. Images that are listed without captions are kept,
    without references.
    """
    content = read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        return _coco_references(path, content)
    if isinstance(content, dict) and content and all(isinstance(group, list) for group in content.values()):
        for image, group in content.items():
            for caption in group:
                _check_entry({"image_id": image, "caption": caption}, f"{path}: image {image:.80}")
        return EvaluationSet(list(content), list(content.values()), source=str(path))
    raise ValueError(
        f'{path}: references are {{"annotations": [{{"image_id": 42, "caption": "a cat"}}, ...]}}, as COCO gives '
        f'them, or {{"42": ["a cat", ...]}}; this is {kind_of(content)}.'
    )


def _coco_references(path: str | Path, content: dict) -> EvaluationSet:
    images = read_coco(path, content)
    domains = [image.domain for image in images]
    if any(domains) and not all(domains):
        without = [image.image_id for image in images if not image.domain]
        raise ValueError(f"{path}: some images have a domain and others have none: {listed(without)}.")
    return EvaluationSet(
        [image.image_id for image in images],
        [image.captions for image in images],
        [domain for domain in domains if domain] or None,
        source=str(path),
    )


def _check_entry(entry: dict, place: str) -> None:
    check_image_id(entry["image_id"], f"{place}: image_id")
    if not isinstance(entry["caption"], str):
        raise ValueError(f"{place}: the caption must be a string, not {entry['caption']!r:.80}.")


def _whole(image: int | str) -> int | str:
    # More than 18 digits are a name, and Python refuses to convert thousands of them.
    whole = isinstance(image, str) and image.isdecimal() and len(image) <= 18 and str(int(image)) == image
    return int(image) if whole else image
