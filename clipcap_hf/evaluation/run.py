"""Score captions by a benchmark's protocol: the scores, how they were made, and the paper's scores."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import listed
from ..metrics import check_metrics, score_captions
from .evaluation_set import EvaluationSet
from .folder import WRITTEN_BY, captions_digest
from .paper import ENTIRE, UNVERIFIED, PaperRow, rows_to_compare
from .protocol import Benchmark, match
from .record import data_record, versions


METRIC_TITLES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "spice": "SPICE",
    "exact_match": "exact match",
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "vocabulary_size": "vocabulary",
    "mean_length": "mean length",
}
NOT_IN_PERCENT = ("vocabulary_size", "mean_length")
DIVERSITY = ("distinct_1", "distinct_2", *NOT_IN_PERCENT)  # these describe captions and do not judge them


def default_metrics(
    benchmark: Benchmark | None, tokenizer: str, spice_home: str | os.PathLike | None = None
) -> list[str]:
    """List the usual metrics that can be computed: METEOR and SPICE are for English and need Java.

    SPICE is included only if its jars are installed.
    """
    metrics = ["bleu", "rouge_l", "cider", "diversity"]
    if tokenizer == "ptb":
        metrics.append("meteor")
        if spice_home or os.environ.get("CLIPCAP_SPICE_HOME"):
            metrics.append("spice")
    return [*metrics, *(benchmark.extra_metrics if benchmark else ())]


def evaluate_captions(
    captions: Mapping[int | str, str],
    data: EvaluationSet,
    benchmark: Benchmark | None = None,
    split: str | None = None,
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: str | None = None,
    empty_references: str | None = None,
    spice_home: str | os.PathLike | None = None,
    clip_model: str | None = None,
    allow_subset: bool = False,
    config=None,
) -> tuple[dict[str, Any], EvaluationSet]:
    """Score captions by a benchmark's protocol.

    Args:
        captions (`Mapping[int | str, str]`): Captions by image id, for example from [`read_results`].
        data ([`EvaluationSet`]): The references, for example from [`read_references`].
        benchmark ([`Benchmark`], *optional*): One of `BENCHMARKS`, whose number of images is checked.
        split (`str`, *optional*): Its split.
        metrics, tokenizer, empty_references, spice_home, clip_model: See [`~clipcap_hf.metrics.score_captions`]. The
            defaults are those of the benchmark; without one, those for English.
        allow_subset (`bool`): Score only the images that have a caption, and record that they are a part.
        config ([`ClipCapConfig`], *optional*): The model's configuration, to find the paper's row for its variant.

    Returns:
        `(report, data)`: a report that can be written as JSON, with scores in percent as papers print them and with
        the caption and scores of each image in `per_image`; and the data that was scored, in the same order.

    Raises:
        ValueError: If the input is invalid, or the images are not those of the benchmark.
        JavaError: If Java or a jar is missing, or Java failed or hung.
    """
    tokenizer = tokenizer or (benchmark.tokenizer if benchmark else "ptb")
    empty_references = empty_references or (benchmark.empty_references if benchmark else "error")
    metrics = list(metrics or default_metrics(benchmark, tokenizer, spice_home))
    check_metrics(metrics)
    predictions, data, protocol = match(captions, data, benchmark, split, allow_subset)
    if empty_references == "error":
        _refuse_empty_references(data)
    options = {"tokenizer": tokenizer, "empty_references": empty_references, "spice_home": spice_home}
    scores, notes = _score(predictions, data, metrics, clip_model, **options)
    by_part = {ENTIRE: scores, **_in_order(scores.pop("groups", {}), benchmark)}
    report: dict[str, Any] = {
        "written_by": WRITTEN_BY,
        **_title(benchmark, split, tokenizer, data),
        "scores": {part: _percent(found) for part, found in by_part.items()},
        "images": {part: found["num_images"] for part, found in by_part.items()},
        "protocol": {
            "complete": protocol.complete,
            "expected_images": protocol.expected_images,
            "deviations": protocol.notes,
            "tokenizer": scores.get("tokenizer", "none"),
            "metrics": metrics,
            "empty_references": empty_references,
            **{name: scores[name] for name in ("clip_model", "clip_dtype") if name in scores},
        },
        "notes": [*_notes(predictions, benchmark, by_part), *notes],
        "data": data_record(data),
        "captions_sha256": captions_digest(dict(zip(data.ids, predictions))),
        "versions": versions(),
    }
    if benchmark and split and (rows := rows_to_compare(benchmark.name, split, config)):
        report["paper"] = {
            "differences": [difference for row in rows for difference in _differences(row, report["scores"])],
            "unverified": UNVERIFIED,
        }
    report["per_image"] = _per_image(scores, data, predictions)
    return report, data


def _refuse_empty_references(data: EvaluationSet) -> None:
    empty = [image for image, group in zip(data.ids, data.references) if any(not text.strip() for text in group)]
    if empty:
        raise ValueError(
            f"{len(empty)} images have references without text: {listed(empty)}. Leave such references out with "
            '--empty-references drop (empty_references="drop"), or count them as captions of no words with "keep", as '
            "published scores on STAIR do."
        )


def _score(
    predictions: list[str], data: EvaluationSet, metrics: list[str], clip_model: str | None, **options
) -> tuple[dict[str, Any], list[str]]:
    """Compute the scores, and return the metrics' warnings as notes."""
    if "clip_score" in metrics and data.images is not None:
        options["images"] = data.stored_images
    if clip_model:
        options["clip_model"] = clip_model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = score_captions(predictions, data.references, metrics, groups=data.domains, **options)
    return scores, list(dict.fromkeys(str(warning.message) for warning in caught))


def _in_order(groups: Mapping[str, Any], benchmark: Benchmark | None) -> dict[str, Any]:
    """Order the domains as the benchmark does; others follow."""
    order = [domain for domain in benchmark.domains if domain in groups] if benchmark else []
    return {domain: groups[domain] for domain in dict.fromkeys([*order, *groups])}


def _title(benchmark: Benchmark | None, split: str | None, tokenizer: str, data: EvaluationSet) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name if benchmark else None,
        "title": benchmark.title if benchmark else (data.title or None),
        "language": benchmark.language if benchmark else ("ja" if tokenizer == "ja" else "en"),
        "split": split,
        "dataset_id": benchmark.dataset_id if benchmark else None,
    }


def _notes(predictions: list[str], benchmark: Benchmark | None, parts: Mapping[str, Any]) -> list[str]:
    notes = []
    if empty := sum(not caption.strip() for caption in predictions):
        notes.append(f"{empty} captions are empty and score 0.")
    if benchmark and benchmark.domains and len(parts) == 1:
        notes.append(f"The data names no domains, so that {', '.join(benchmark.domains)} were not scored.")
    return notes


def _per_image(scores: Mapping[str, Any], data: EvaluationSet, predictions: list[str]) -> list[dict[str, Any]]:
    """List the id, caption and scores of each image; these scores are fractions."""
    each = {name.removesuffix("_per_image"): values for name, values in scores.items() if name.endswith("_per_image")}
    return [
        {
            "image_id": image,
            "caption": caption,
            **({"domain": data.domains[place]} if data.domains else {}),
            **{name: round(float(values[place]), 10) for name, values in each.items() if len(values) == len(data)},
        }
        for place, (image, caption) in enumerate(zip(data.ids, predictions))
    ]


def _percent(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: scores[name] * (1 if name in NOT_IN_PERCENT else 100) for name in METRIC_TITLES if name in scores}


def _differences(row: PaperRow, scores: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Compare a row of the paper with our scores, for each score that both have."""
    return [
        {
            "method": row.method,
            "domain": domain,
            "metric": metric,
            "paper": value,
            "here": scores[domain][metric],
            "difference": scores[domain][metric] - value,
        }
        for domain, values in row.scores.items()
        for metric, value in values.items()
        if metric in scores.get(domain, {})
    ]
