"""Metrics of image captioning: BLEU, METEOR, ROUGE-L, CIDEr, SPICE, CLIPScore, exact match and diversity.

`score_captions` computes several of them with one tokenization. Each is also an `evaluate.Metric` in a folder of its
name; `load("cider")`, or `evaluate.load` with the folder's path, loads it without a network.
"""

from pathlib import Path

from .checks import METRICS, check_metrics, check_requirements
from .java import JavaError
from .scoring import document_frequencies, score_captions
from .tokenization import TOKENIZERS, tokenize


__all__ = [
    "METRICS",
    "TOKENIZERS",
    "JavaError",
    "check_metrics",
    "check_requirements",
    "document_frequencies",
    "load",
    "score_captions",
    "tokenize",
]


def load(name: str, **init_kwargs):
    """Load a metric of this package as an `evaluate.Metric`, without a network.

    Args:
        name (`str`): One of `METRICS`.
        init_kwargs: Options of the metric, such as `tokenizer="python"`, and of `evaluate.load` (`num_process`,
            `process_id`, `experiment_id`, `keep_in_memory`).

    Raises:
        ValueError: If there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; choose one of {', '.join(METRICS)}.")
    import evaluate  # takes seconds to import, and score_captions does not need it

    return evaluate.load(str(Path(__file__).parent / name), **init_kwargs)
