"""Captions and references in, scores out: checks, one tokenization, then every metric asked for."""

import json
import os
from collections.abc import Mapping, Sequence

from . import scores
from .ngrams import Corpus
from .tokenization import tokenize, tokenize_streams, tokenizer_record


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
    return list(predictions)


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
    return scores.document_frequencies([[next(flat) for _ in group] for group in references])


def _load_frequencies(source: Mapping | str | os.PathLike | None) -> Mapping | None:
    if source is None or isinstance(source, Mapping):
        return source
    with open(source, encoding="utf-8") as file:
        return json.load(file)


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
        clip_model: for CLIPScore, a CLIP model on the Hub or in a folder.

    Returns:
        A flat dict: each score under its name (`bleu_1` to `bleu_4`, `meteor`, `rouge_l`, `cider`, `spice`,
        `exact_match`, `distinct_1`, `distinct_2`, `vocabulary_size`, `mean_length`, `clip_score`,
        `ref_clip_score`), as a float; with `per_image`, `NAME_per_image` as an array of shape (n,); then
        `num_images`, `tokenizer` (`"python (not exact)"` for the approximation), and for CLIPScore `clip_model`
        and `clip_dtype`. Scores are fractions, CIDEr goes up to 10; papers print them times 100.

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

    result = {}
    tokenized = {}
    if set(metrics) - set(UNTOKENIZED):
        tokenized = _tokenize_corpus(predictions, references, tokenizer)
    for name in (name for name in METRICS if name in metrics):
        if name == "clip_score":
            from .clip import clip_scores

            found = clip_scores(predictions, images, references, clip_model)
            result.update({key: found.pop(key) for key in ("clip_model", "clip_dtype")})
        elif name == "exact_match":
            found = scores.exact_match(predictions, references)
        elif name == "diversity":
            found = scores.diversity(tokenized["captions"])
        elif name == "cider":
            found = scores.cider(tokenized["corpus"], _load_frequencies(document_frequencies))
        elif name == "meteor":
            from .java_scores import meteor

            found = meteor(tokenized["captions"], tokenized["references"])
        elif name == "spice":
            from .java_scores import spice

            found = spice(tokenized["captions"], tokenized["references"], spice_home)
        else:
            found = {"bleu": scores.bleu, "rouge_l": scores.rouge_l}[name](tokenized["corpus"])
        for key, (value, values) in found.items():
            result[key] = value
            if per_image:
                result[f"{key}_per_image"] = values
    result["num_images"] = len(predictions)
    if tokenized:
        result["tokenizer"] = record
    return result


def _tokenize_corpus(predictions: list[str], references: list[list[str]] | None, tokenizer: str | None) -> dict:
    """Tokenizes references and captions as two streams, as the COCO evaluation does, and groups them again."""
    flat = [reference for group in references or () for reference in group]
    flat, captions = tokenize_streams((flat, predictions), tokenizer)
    if references is None:
        return {"captions": captions}
    flat = iter(flat)
    references = [[next(flat) for _ in group] for group in references]
    return {"captions": captions, "references": references, "corpus": Corpus(captions, references)}
