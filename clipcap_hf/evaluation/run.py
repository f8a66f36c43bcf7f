"""Captions and references in, a report out: the scores, all that made them, and the paper's row beside them."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import listed
from ..metrics import score_captions
from .coco_files import digest
from .paper import ENTIRE, UNVERIFIED, rows_to_compare
from .protocol import Benchmark, EvaluationSet, match
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
DIVERSITY = ("distinct_1", "distinct_2", *NOT_IN_PERCENT)  # describes captions, does not judge them


def default_metrics(
    benchmark: Benchmark | None, tokenizer: str, spice_home: str | os.PathLike | None = None
) -> list[str]:
    """The field's metrics that can be computed: METEOR and SPICE are for English and need Java, SPICE also its jars."""
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
    """Scores captions by a benchmark's protocol.

    Args:
        captions: a caption by image id, for example from [`read_results`].
        data: the images' references, for example from [`read_references`].
        benchmark: one of `BENCHMARKS`, whose number of images is asserted; None scores any captions.
        split: of the benchmark.
        metrics, tokenizer, empty_references, spice_home, clip_model: see `clipcap_hf.metrics.score_captions`; by default
            those of the benchmark, and of English without one.
        allow_subset: score what is there, and record that it is a part.
        config ([`ClipCapConfig`], *optional*): of the model, to find the paper's row for its variant.

    Returns:
        `(report, data)`: the report can be written as JSON (its `per_image` holds the captions and the scores of each
        image), and the data is what was scored, in the same order. Scores are in percent, as papers print them.

    Raises:
        ValueError: bad input, or a set of images that is not the benchmark's.
        JavaError: Java or a jar is missing, or Java failed or hung.
    """
    tokenizer = tokenizer or (benchmark.tokenizer if benchmark else "ptb")
    empty_references = empty_references or (benchmark.empty_references if benchmark else "error")
    metrics = list(metrics or default_metrics(benchmark, tokenizer, spice_home))
    predictions, data, protocol = match(captions, data, benchmark, split, allow_subset)
    if empty_references == "error":
        _refuse_empty_references(data)
    notes = []
    if empty := sum(not caption.strip() for caption in predictions):
        notes.append(f"{empty} captions are empty and score 0.")
    options = {"images": list(data.images)} if "clip_score" in metrics and data.images is not None else {}
    if clip_model:
        options["clip_model"] = clip_model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = score_captions(
            predictions,
            data.references,
            metrics,
            tokenizer,
            empty_references=empty_references,
            spice_home=spice_home,
            groups=data.domains,
            **options,
        )
    notes += list(dict.fromkeys(str(warning.message) for warning in caught))
    groups = scores.pop("groups", {})
    order = [domain for domain in benchmark.domains if domain in groups] if benchmark else []
    groups = {domain: groups[domain] for domain in [*order, *(domain for domain in groups if domain not in order)]}
    if benchmark and benchmark.domains and not groups:
        notes.append(f"The data names no domains, so that {', '.join(benchmark.domains)} were not scored.")

    report = {
        "benchmark": benchmark.name if benchmark else None,
        "title": benchmark.title if benchmark else None,
        "language": benchmark.language if benchmark else ("ja" if tokenizer == "ja" else "en"),
        "split": split,
        "dataset_id": benchmark.dataset_id if benchmark else None,
        "scores": {name: _percent(part) for name, part in {ENTIRE: scores, **groups}.items()},
        "images": {name: part["num_images"] for name, part in {ENTIRE: scores, **groups}.items()},
        "protocol": {
            "complete": protocol.complete,
            "expected_images": protocol.expected_images,
            "deviations": protocol.notes,
            "tokenizer": scores.get("tokenizer", "none"),
            "metrics": metrics,
            "empty_references": empty_references,
            **{name: scores[name] for name in ("clip_model", "clip_dtype") if name in scores},
        },
        "notes": notes,
        "data": data_record(data),
        "captions_sha256": digest(sorted(zip(map(str, data.ids), predictions))),
        "versions": versions(),
    }
    if benchmark and (rows := rows_to_compare(benchmark.name, split, config)):
        report["paper"] = {
            "differences": [difference for row in rows for difference in _differences(row, report["scores"])],
            "unverified": UNVERIFIED,
        }
    each = {name.removesuffix("_per_image"): values for name, values in scores.items() if name.endswith("_per_image")}
    report["per_image"] = [
        {
            "image_id": image,
            "caption": caption,
            **({"domain": data.domains[place]} if data.domains else {}),
            **{name: round(float(values[place]), 10) for name, values in each.items() if len(values) == len(data)},
        }
        for place, (image, caption) in enumerate(zip(data.ids, predictions))
    ]
    return report, data


def _refuse_empty_references(data: EvaluationSet) -> None:
    empty = [image for image, group in zip(data.ids, data.references) if any(not text.strip() for text in group)]
    if empty:
        raise ValueError(
            f"{len(empty)} images have references without text: {listed(empty)}. Leave such references out with "
            '--empty-references drop (empty_references="drop"), or count them as captions of no words with "keep", as '
            "published scores on STAIR do."
        )


def _percent(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: scores[name] * (1 if name in NOT_IN_PERCENT else 100) for name in METRIC_TITLES if name in scores}


def _differences(row, scores: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The paper's figures of a row beside those here, where both have the score."""
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
