"""Score captions: check the input, tokenize once, then compute each metric."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from . import formulas
from .checks import NEED_NO_REFERENCES, UNTOKENIZED, check_metrics, check_predictions, check_references
from .clip import DEFAULT_CLIP, clip_scores
from .formulas import Scores
from .ngrams import Corpus
from .tokenization import tokenize, tokenize_streams, tokenizer_record


def score_captions(
    predictions: Sequence[str],
    references: Sequence | None = None,
    metrics: str | Sequence[str] = ("bleu", "meteor", "rouge_l", "cider"),
    tokenizer: str | None = "ptb",
    *,
    per_image: bool = True,
    empty_references: str = "error",
    document_frequencies: Mapping | str | os.PathLike | None = None,
    spice_home: str | os.PathLike | None = None,
    images: Sequence | None = None,
    clip_model: str = DEFAULT_CLIP,
    groups: Sequence | None = None,
) -> dict[str, Any]:
    """Score captions by several metrics with one tokenization, so that Java starts once for it.

    Args:
        predictions (`Sequence[str]`): n captions. An empty caption is allowed and scores 0.
        references (`Sequence`, *optional*): n lists of one or more captions, or n strings. Only `diversity` and
            `clip_score` do not need them.
        metrics (`str` or `Sequence[str]`): Names in `METRICS`.
        tokenizer (`str`, *optional*): See `clipcap_hf.metrics.tokenization`; `"ptb"` is the standard for English.
        per_image (`bool`): Also return each score for each image.
        empty_references (`str`): What to do with references without text: `"error"`, `"drop"` them, or `"keep"` them
            as captions without words, as published scores on STAIR do, whose data has some.
        document_frequencies (`Mapping` or path, *optional*): For CIDEr, the result of [`document_frequencies`], or the
            path of a JSON file that holds it.
        spice_home (`str` or path, *optional*): For SPICE, the folder with its jars; by default `CLIPCAP_SPICE_HOME` of
            the environment.
        images (`Sequence`, *optional*): For CLIPScore, n paths, PIL images or bytes, read when indexed.
        clip_model (`str`): For CLIPScore, a CLIP by Hub id, folder or open_clip name.
        groups (`Sequence`, *optional*): The group of each image, such as its domain in nocaps. Each group is also
            scored on its own, with its own document frequencies, without starting Java again.

    Returns:
        `dict`: Each score as a float under its name (`bleu_1` to `bleu_4`, `meteor`, `rouge_l`, `cider`, `spice`,
        `exact_match`, `distinct_1`, `distinct_2`, `vocabulary_size`, `mean_length`, `clip_score`, `ref_clip_score`);
        with `per_image`, `NAME_per_image` as an array of shape (n,); `num_images`; `tokenizer` (`"python (not exact)"`
        for the approximation); for CLIPScore `clip_model` and `clip_dtype`; with `groups`, a dictionary like this for
        each group under `groups`. Scores are fractions (CIDEr goes up to 10); papers print them times 100.

    Raises:
        ValueError: If the input is invalid; the message names the caption and says what to do.
        JavaError: If Java or a jar is missing, or Java failed or hung.
    """
    metrics = check_metrics(metrics)
    record = tokenizer_record(tokenizer)
    predictions = check_predictions(predictions)
    if not predictions:
        raise ValueError("There are no predictions to score; pass at least one caption.")
    if references is not None:
        references = check_references(references, len(predictions), empty_references)
    elif set(metrics) - set(NEED_NO_REFERENCES):
        raise ValueError("references is missing; only diversity and clip_score can be computed without references.")
    places = {} if groups is None else _places_by_group(groups, len(predictions))
    inputs = _Inputs(
        predictions,
        references,
        parts=[np.arange(len(predictions)), *places.values()],
        frequencies=_load_frequencies(document_frequencies) if "cider" in metrics else None,
        spice_home=spice_home,
        images=images,
        clip_model=clip_model,
    )
    tokenized = bool(set(metrics) - set(UNTOKENIZED))
    if tokenized:
        inputs.tokenize(tokenizer)
    scores = [SCORERS[name](inputs) for name in metrics]
    results = [
        _flat(of_part, len(part), record if tokenized else None, per_image)
        for part, of_part in zip(inputs.parts, zip(*scores))
    ]
    if groups is not None:
        results[0]["groups"] = dict(zip(places, results[1:]))
    return results[0]


@dataclass
class _Inputs:
    """What the metrics read: checked texts, their tokens, and which images are scored together.

    `parts` holds indices of images: of all images first, then of each group.
    """

    predictions: list[str]
    references: list[list[str]] | None
    parts: list[np.ndarray]
    frequencies: Mapping | None
    spice_home: str | os.PathLike | None
    images: Sequence | None
    clip_model: str
    captions: list[str] = field(default_factory=list)  # the predictions, tokenized
    tokens: list[list[str]] = field(default_factory=list)  # the references, tokenized

    def tokenize(self, tokenizer: str | None) -> None:
        """Tokenize references and captions as two streams, as the COCO evaluation does."""
        flat = [reference for group in self.references or () for reference in group]
        flat, self.captions = tokenize_streams((flat, self.predictions), tokenizer)
        rest = iter(flat)
        self.tokens = [[next(rest) for _ in group] for group in self.references or ()]

    @cached_property
    def corpora(self) -> list[Corpus]:
        """Counted n-grams of each part, which several metrics share."""
        return [Corpus(_take(self.captions, part), _take(self.tokens, part)) for part in self.parts]


def _meteor(inputs: _Inputs) -> list[Scores]:
    from .java_scores import meteor

    return meteor(inputs.captions, inputs.tokens, inputs.parts)


def _spice(inputs: _Inputs) -> list[Scores]:
    from .java_scores import spice

    return _means(spice(inputs.captions, inputs.tokens, inputs.spice_home), inputs.parts)


def _clip_score(inputs: _Inputs) -> list[dict[str, Any]]:
    return _means(clip_scores(inputs.predictions, inputs.images, inputs.references, inputs.clip_model), inputs.parts)


def _exact_match(inputs: _Inputs) -> list[Scores]:
    return _means(formulas.exact_match(inputs.predictions, inputs.references or []), inputs.parts)


def _diversity(inputs: _Inputs) -> list[Scores]:
    return [formulas.diversity(_take(inputs.captions, part)) for part in inputs.parts]


# For each metric, a function that returns its scores for each part.
SCORERS: dict[str, Callable[[_Inputs], list]] = {
    "bleu": lambda inputs: [formulas.bleu(corpus) for corpus in inputs.corpora],
    "meteor": _meteor,
    "rouge_l": lambda inputs: [formulas.rouge_l(corpus) for corpus in inputs.corpora],
    "cider": lambda inputs: [formulas.cider(corpus, inputs.frequencies) for corpus in inputs.corpora],
    "spice": _spice,
    "exact_match": _exact_match,
    "diversity": _diversity,
    "clip_score": _clip_score,
}


def _means(scores: Mapping[str, Any], parts: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Compute the mean of each part from scores per image; text that a metric records is kept."""
    return [
        {
            name: value if isinstance(value, str) else (float(value[1][part].mean()), value[1][part])
            for name, value in scores.items()
        }
        for part in parts
    ]


def _flat(scores: Sequence[Mapping[str, Any]], images: int, record: str | None, per_image: bool) -> dict[str, Any]:
    """Build the flat dictionary that `score_captions` returns, from all metrics' scores of one part."""
    result: dict[str, Any] = {}
    for name, value in ((name, value) for of_metric in scores for name, value in of_metric.items()):
        if isinstance(value, str):  # a setting that the metric records
            result[name] = value
            continue
        result[name] = value[0]
        if per_image:
            result[f"{name}_per_image"] = value[1]
    result["num_images"] = images
    if record is not None:
        result["tokenizer"] = record
    return result


def _places_by_group(groups: Sequence, images: int) -> dict[Any, np.ndarray]:
    """Return the indices of each group's images, with groups in order of appearance."""
    if len(groups) != images:
        raise ValueError(f"There are {images} predictions and {len(groups)} groups; name the group of each image.")
    places: dict[Any, list[int]] = {}
    for image, group in enumerate(groups):
        places.setdefault(group, []).append(image)
    return {group: np.array(found) for group, found in places.items()}


def _take(values: list, places: np.ndarray) -> list:
    return [values[place] for place in places]


def document_frequencies(references: Sequence, tokenizer: str | None = "ptb", empty_references: str = "error") -> dict:
    """Count document frequencies, by which CIDEr then weighs n-grams instead of by the references that are scored.

    Args:
        references (`Sequence`): A string or a list of strings for each image of the corpus.
        tokenizer, empty_references: See [`score_captions`], which must get the same ones.

    Returns:
        `dict`: `{"num_documents": images, "document_frequency": {"a cat": 12, ...}}`, which can be stored as JSON.
    """
    references = check_references(references, len(references), empty_references)
    flat = iter(tokenize([reference for group in references for reference in group], tokenizer))
    return formulas.document_frequencies([[next(flat) for _ in group] for group in references])


def _load_frequencies(source: Mapping | str | os.PathLike | None) -> Mapping | None:
    if source is None or isinstance(source, Mapping):
        return source
    try:
        with open(source, encoding="utf-8") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: document frequencies must be a JSON file: {error}") from error
