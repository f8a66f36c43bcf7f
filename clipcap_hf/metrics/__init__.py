"""The scores of image captioning: BLEU, METEOR, ROUGE-L, CIDEr, SPICE, CLIPScore, exact match and diversity.

Each is an `evaluate.Metric` in a folder of its name; `load("cider")`, or `evaluate.load` with the folder's path, loads
it without a network. `score_captions` computes several at once, with a single tokenization.
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
        name: One of `METRICS`.
        **init_kwargs: For the metric, such as `tokenizer="python"`, and for `evaluate.load`, such as
            `num_process`, `process_id`, `experiment_id`, `keep_in_memory`.

    Raises:
        ValueError: There is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; choose one of {', '.join(METRICS)}.")
    import evaluate  # seconds to import, and not needed for score_captions

    return evaluate.load(str(Path(__file__).parent / name), **init_kwargs)
