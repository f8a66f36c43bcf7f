"""Strict checks of the input of `score_captions`, so that nothing is scored by mistake."""

import os
from collections.abc import Sequence

from .clip import DEFAULT_CLIP, check_clip
from .java import find_jar, find_java
from .tokenization import PTB_JAR, check_tokenizer, tokenize


# Metrics that read only texts, in the order of results; clip_score needs the images too.
TEXT_METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice", "exact_match", "diversity")
METRICS = (*TEXT_METRICS, "clip_score")
EMPTY_REFERENCES = ("error", "drop", "keep")
UNTOKENIZED = ("exact_match", "clip_score")  # these read the text itself
NEED_NO_REFERENCES = ("diversity", "clip_score")


def check_metrics(metrics: str | Sequence[str]) -> tuple[str, ...]:
    """Return the metrics' names in the order of `METRICS`, or raise a ValueError that lists the names.

    ```python
    >>> from clipcap_hf.metrics import check_metrics
    >>> check_metrics(["cider", "bleu"])
    ('bleu', 'cider')

    ```
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [str(name)[:80] for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"Unknown metrics {', '.join(unknown[:5])}; choose from {', '.join(METRICS)}.")
    if not names:
        raise ValueError(f"No metrics were named; choose from {', '.join(METRICS)}.")
    return tuple(name for name in METRICS if name in names)


def check_predictions(predictions: Sequence[str]) -> list[str]:
    """Return the captions as a list, or raise a ValueError that names the one that is not a string.

    An empty caption is legal.
    """
    predictions = _to_list(predictions)
    if isinstance(predictions, str) or not isinstance(predictions, Sequence):
        raise ValueError(f"predictions must be a list of strings, one caption per image, not {_short(predictions)}.")
    for image, caption in enumerate(predictions):
        if not isinstance(caption, str):
            raise ValueError(f"predictions[{image}] must be a string (one caption per image), not {_short(caption)}.")
        _check_unicode(caption, f"predictions[{image}]")
    return list(predictions)


def check_references(references: Sequence, images: int, empty: str = "error") -> list[list[str]]:
    """Return the references as a list of lists, or raise a ValueError that names the faulty one.

    Args:
        references (`Sequence`): A list of captions, or a string, for each image.
        images (`int`): Number of images.
        empty (`str`): What to do with references without text: `"error"`, `"drop"` or `"keep"`.
    """
    if empty not in EMPTY_REFERENCES:
        raise ValueError(f"empty_references must be one of {', '.join(EMPTY_REFERENCES)}, not {_short(empty)}.")
    references = _to_list(references)
    if isinstance(references, str) or not isinstance(references, Sequence):
        raise ValueError(
            f"references must be a list with the reference captions of each image, not {_short(references)}."
        )
    if len(references) != images:
        raise ValueError(
            f"There are {images} predictions and {len(references)} references; each prediction needs the list of its "
            "image's reference captions, in the same order."
        )
    return [_check_group(group, image, empty) for image, group in enumerate(references)]


def _check_group(group, image: int, empty: str) -> list[str]:
    group = [group] if isinstance(group, str) else _to_list(group)
    if not isinstance(group, Sequence):
        raise ValueError(f"references[{image}] must be a string or a list of strings, not {_short(group)}.")
    if not len(group):
        raise ValueError(f"Image {image} has no references; leave it out of the predictions or give it some.")
    for number, reference in enumerate(group):
        if not isinstance(reference, str):
            raise ValueError(f"references[{image}][{number}] must be a string, not {_short(reference)}.")
        _check_unicode(reference, f"references[{image}][{number}]")
        if not reference.strip() and empty == "error":
            raise ValueError(
                f'references[{image}][{number}] is empty. Pass empty_references="drop" to leave such references '
                'out, or "keep" to count them as captions of no words, as published scores on STAIR do.'
            )
    kept = [reference for reference in group if empty != "drop" or reference.strip()]
    if not kept:
        raise ValueError(f"Image {image} has only empty references; leave it out of the predictions.")
    return kept


def check_requirements(
    metrics: Sequence[str],
    tokenizer: str | None,
    spice_home: str | os.PathLike | None = None,
    clip_model: str | None = None,
) -> None:
    """Raise the errors of `score_captions` for unknown names and for missing Java, jars, tokenizers or CLIPs.

    Call it before spending an hour on captions.
    """
    from .java_scores import METEOR_JAR, spice_class_path

    metrics = check_metrics(metrics)
    name = check_tokenizer(tokenizer)
    if name == "ptb" and set(metrics) - set(UNTOKENIZED):
        find_java("The PTB tokenizer")
        find_jar(PTB_JAR, "The PTB tokenizer")
    if name == "ja":
        tokenize(["あ"], name)
    if "meteor" in metrics:
        find_java("METEOR")
        find_jar(METEOR_JAR, "METEOR")
    if "spice" in metrics:
        find_java("SPICE")
        spice_class_path(spice_home)
    if "clip_score" in metrics:
        check_clip(clip_model or DEFAULT_CLIP)


def _to_list(values):
    """Turn NumPy arrays and pandas columns into lists; leave anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _check_unicode(text: str, place: str):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not valid Unicode (a lone surrogate): {_short(text)}.") from error


def _short(value) -> str:
    """Shorten a value for a message; it may be a whole file."""
    text = repr(value[:80] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= 80 else text[:80] + "..."
