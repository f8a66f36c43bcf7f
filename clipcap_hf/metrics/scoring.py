"""Captions and references in, scores out: checks, one tokenization, then every metric asked for."""

import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from . import formulas
from .java import find_jar, find_java
from .ngrams import Corpus
from .tokenization import PTB_JAR, check_tokenizer, tokenize, tokenize_streams, tokenizer_record


# The metrics of text alone, in the order in which results list them; clip_score also needs the images.
TEXT_METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice", "exact_match", "diversity")
METRICS = (*TEXT_METRICS, "clip_score")
EMPTY_REFERENCES = ("error", "drop", "keep")
UNTOKENIZED = ("exact_match", "clip_score")  # work on the text as it is


def _listed(values):
    """NumPy arrays and pandas columns as lists; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def check_predictions(predictions: Sequence[str]) -> list[str]:
    """The captions as a list, or a ValueError saying which one is no string. An empty caption is legal."""
    predictions = _listed(predictions)
    if isinstance(predictions, str) or not isinstance(predictions, Sequence):
        raise ValueError(f"predictions must be a list of strings, one caption an image, not {predictions!r}.")
    for image, caption in enumerate(predictions):
        if not isinstance(caption, str):
            raise ValueError(f"predictions[{image}] must be a string (one caption an image), not {caption!r}.")
        _check_unicode(caption, f"predictions[{image}]")
    return list(predictions)


def _check_unicode(text: str, place: str):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not valid Unicode (a lone surrogate): {text!r}.") from error


def check_references(references: Sequence, images: int, empty: str = "error") -> list[list[str]]:
    """The references as a list of lists, or a ValueError saying what is wrong with which. One string stands for [it].

    `empty` says what to do with empty reference strings: "error", "drop" or "keep".
    """
    if empty not in EMPTY_REFERENCES:
        raise ValueError(f"empty_references must be one of {', '.join(EMPTY_REFERENCES)}, not {empty!r}.")
    references = _listed(references)
    if isinstance(references, str) or not isinstance(references, Sequence):
        raise ValueError(f"references must be a list with the reference captions of each image, not {references!r}.")
    if len(references) != images:
        raise ValueError(
            f"There are {images} predictions and {len(references)} references; each prediction needs the list of its "
            "image's reference captions, in the same order."
        )
    checked = []
    for image, group in enumerate(references):
        group = [group] if isinstance(group, str) else _listed(group)
        if not isinstance(group, Sequence):
            raise ValueError(f"references[{image}] must be a string or a list of strings, not {group!r}.")
        if not len(group):
            raise ValueError(f"Image {image} has no references; leave it out of the predictions or give it some.")
        for number, reference in enumerate(group):
            if not isinstance(reference, str):
                raise ValueError(f"references[{image}][{number}] must be a string, not {reference!r}.")
            if not reference.strip() and empty == "error":
                raise ValueError(
                    f'references[{image}][{number}] is empty. Pass empty_references="drop" to leave such references '
                    'out, or "keep" to count them as captions of no words, as published scores on STAIR do.'
                )
        group = [reference for reference in group if empty != "drop" or reference.strip()]
        if not group:
            raise ValueError(f"Image {image} has only empty references; leave it out of the predictions.")
        checked.append(group)
    return checked


def document_frequencies(references: Sequence, tokenizer: str | None = "ptb", empty_references: str = "error") -> dict:
    """Document frequencies of a corpus for CIDEr, to weigh n-grams by it instead of by the references scored.

    Args:
        references: one string, or a list of strings, an image of the corpus.
        tokenizer, empty_references: as in `score_captions`; use the same ones there.

    Returns:
        `{"num_documents": images, "document_frequency": {"a cat": 12, ...}}`, which can be stored as JSON.
    """
    references = check_references(references, len(references), empty_references)
    flat = iter(tokenize([reference for group in references for reference in group], tokenizer))
    return formulas.document_frequencies([[next(flat) for _ in group] for group in references])


def _load_frequencies(source: Mapping | str | os.PathLike | None) -> Mapping | None:
    if source is None or isinstance(source, Mapping):
        return source
    with open(source, encoding="utf-8") as file:
        return json.load(file)


def check_requirements(
    metrics: Sequence[str], tokenizer: str | None, spice_home: str | os.PathLike | None = None
) -> None:
    """Raises what `score_captions` would raise without Java, the jars or the Japanese tokenizer.

    For those who first spend an hour on captions.
    """
    from .java_scores import spice_class_path

    name = check_tokenizer(tokenizer)
    if name == "ptb" and set(metrics) - set(UNTOKENIZED):
        find_java("The PTB tokenizer")
        find_jar(PTB_JAR, "The PTB tokenizer")
    if name == "ja":
        tokenize(["あ"], name)
    if "meteor" in metrics:
        find_java("METEOR")
        find_jar("meteor/meteor-1.5.jar", "METEOR")
    if "spice" in metrics:
        find_java("SPICE")
        spice_class_path(spice_home)


def score_captions(
    predictions: Sequence[str],
    references: Sequence | None = None,
    metrics: Sequence[str] = ("bleu", "meteor", "rouge_l", "cider"),
    tokenizer: str | None = "ptb",
    *,
    per_image: bool = True,
    empty_references: str = "error",
    document_frequencies: Mapping | str | os.PathLike | None = None,
    spice_home: str | os.PathLike | None = None,
    images: Sequence | None = None,
    clip_model: str = "openai/clip-vit-base-patch32",
    groups: Sequence | None = None,
) -> dict:
    """Scores captions by several metrics with one tokenization, so that Java starts once for it.

    Args:
        predictions: n captions. An empty one is legal and scores 0.
        references: n lists of one or more captions, or n strings. Only `diversity` and `clip_score` go without.
        metrics: names out of `METRICS`.
        tokenizer: see `clipcap_hf.metrics.tokenization`; `"ptb"` is the standard for English.
        per_image: also return each score for each image.
        empty_references: what to do with references without text: "error", "drop" them, or "keep" them as captions
            of no words, as the published scores on STAIR (whose data has some) do.
        document_frequencies: for CIDEr, what the function of that name returned, or the path of a JSON file of it.
        spice_home: for SPICE, the folder with the jars; by default the environment variable CLIPCAP_SPICE_HOME.
        images: for CLIPScore, n images: paths, PIL images or bytes.
        clip_model: for CLIPScore, a CLIP by Hub id, folder or open_clip name.
        groups: the group of each image, such as its domain in nocaps. Each group is also scored as an evaluation of
            its own (with its own document frequencies), without starting Java again.

    Returns:
        A flat dict: each score under its name (`bleu_1` to `bleu_4`, `meteor`, `rouge_l`, `cider`, `spice`,
        `exact_match`, `distinct_1`, `distinct_2`, `vocabulary_size`, `mean_length`, `clip_score`,
        `ref_clip_score`), as a float; with `per_image`, `NAME_per_image` as an array of shape (n,); then
        `num_images`, `tokenizer` (`"python (not exact)"` for the approximation), and for CLIPScore `clip_model`
        and `clip_dtype`; with `groups`, `groups`: such a dict for each group. Scores are fractions, CIDEr goes up to 10; papers print them times 100.

    Raises:
        ValueError: bad input; the message says which caption and what to do.
        JavaError: Java or a jar is missing, or Java failed or hung.
    """
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"Unknown metrics {unknown}; choose from {', '.join(METRICS)}.")
    record = tokenizer_record(tokenizer)
    predictions = check_predictions(predictions)
    if not predictions:
        raise ValueError("There are no predictions to score; pass at least one caption.")
    if references is not None:
        references = check_references(references, len(predictions), empty_references)
    elif set(metrics) - {"diversity", "clip_score"}:
        raise ValueError("references is missing; only diversity and clip_score can be computed without references.")

    groups = None if groups is None else _group_indices(groups, len(predictions))
    everything = np.arange(len(predictions))
    tokenized = _tokenize_corpus(predictions, references, tokenizer) if set(metrics) - set(UNTOKENIZED) else {}
    options = {
        "frequencies": _load_frequencies(document_frequencies) if "cider" in metrics else None,
        "spice_home": spice_home,
        "images": images,
        "clip_model": clip_model,
    }
    subsets = [everything, *(groups or {}).values()]
    results = [{} for _ in subsets]
    for name in (name for name in METRICS if name in metrics):
        for result, found in zip(results, _score(name, predictions, references, tokenized, subsets, options)):
            for key, value in found.items():
                if isinstance(value, str):  # what a metric records of itself
                    result[key] = value
                    continue
                result[key] = value[0]
                if per_image:
                    result[f"{key}_per_image"] = value[1]
    for subset, result in zip(subsets, results):
        result["num_images"] = len(subset)
        if tokenized:
            result["tokenizer"] = record
    if groups is not None:
        results[0]["groups"] = dict(zip(groups, results[1:]))
    return results[0]


def _group_indices(groups: Sequence, images: int) -> dict:
    """For each group, in order of appearance, the indices of its images."""
    if len(groups) != images:
        raise ValueError(f"There are {images} predictions and {len(groups)} groups; name the group of each image.")
    indices = {}
    for image, group in enumerate(groups):
        indices.setdefault(group, []).append(image)
    return {group: np.array(found) for group, found in indices.items()}


def _score(
    name: str, predictions, references, tokenized: dict, subsets: list[np.ndarray], options: dict
) -> list[dict]:
    """The scores by one metric of subsets of the images, the first of which is all of them."""
    captions, tokens = tokenized.get("captions"), tokenized.get("references")
    if name == "meteor":
        from .java_scores import meteor

        return meteor(captions, tokens, subsets)
    if name in ("spice", "clip_score"):  # slow, and the mean over images: computed once
        if name == "spice":
            from .java_scores import spice

            found = spice(captions, tokens, options["spice_home"])
        else:
            from .clip import clip_scores

            found = clip_scores(predictions, options["images"], references, options["clip_model"])
        return [
            {
                key: value if isinstance(value, str) else (float(value[1][subset].mean()), value[1][subset])
                for key, value in found.items()
            }
            for subset in subsets
        ]
    results = []
    for subset in subsets:
        if name == "exact_match":
            found = formulas.exact_match(_take(predictions, subset), _take(references, subset))
        elif name == "diversity":
            found = formulas.diversity(_take(captions, subset))
        else:
            corpora = tokenized["corpora"]
            key = subset.tobytes()
            if key not in corpora:
                corpora[key] = Corpus(_take(captions, subset), _take(tokens, subset))
            if name == "cider":
                found = formulas.cider(corpora[key], options["frequencies"])
            else:
                found = {"bleu": formulas.bleu, "rouge_l": formulas.rouge_l}[name](corpora[key])
        results.append(found)
    return results


def _take(values: list, indices: np.ndarray) -> list:
    return [values[index] for index in indices]


def _tokenize_corpus(predictions: list[str], references: list[list[str]] | None, tokenizer: str | None) -> dict:
    """Tokenizes references and captions as two streams, as the COCO evaluation does, and groups them again.

    `corpora` takes the counted n-grams of each subset of images, which several metrics share.
    """
    flat = [reference for group in references or () for reference in group]
    flat, captions = tokenize_streams((flat, predictions), tokenizer)
    if references is None:
        return {"captions": captions}
    flat = iter(flat)
    references = [[next(flat) for _ in group] for group in references]
    return {"captions": captions, "references": references, "corpora": {}}
