"""The base class of the metrics' `evaluate` modules.

`evaluate.load` runs a copy of a metric's script outside of the package. So the scripts hold only descriptions, and
import this module by its full name.
"""

import datasets
import evaluate

from .checks import check_predictions, check_references
from .scoring import score_captions


INPUTS = """
Args:
    predictions (`list[str]`): one caption per image; an empty one is legal and scores 0.
    references (`list[list[str]]` or `list[str]`): the reference captions of each image, at least one.
    tokenizer (`str`): "ptb" (the standard, needs Java), "python" (close to it, not exact), "ja", "characters" or
        "none"; when loading the metric or when computing it.
    per_image (`bool`, defaults to `False`): also return `NAME_per_image`, an array with the score of each image.
    empty_references (`str`, defaults to "error"): "drop" or "keep" references without text instead.
"""


class CaptionMetric(evaluate.Metric):
    """A caption metric as an `evaluate.Metric`; a subclass names the metric and describes it.

    Keyword arguments of `score_captions` may be given when the metric is loaded or when it is computed.
    """

    metric: str
    description_text: str
    citation_text: str
    reference_urls_list: tuple[str, ...] = ()
    inputs_text = INPUTS
    option_names: tuple[str, ...] = ("tokenizer", "per_image", "empty_references")

    def __init__(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name) for name in self.option_names if name in kwargs}
        super().__init__(*args, **kwargs)

    def _features(self) -> datasets.Features:
        text = datasets.Value("string")
        return datasets.Features({"predictions": text, "references": datasets.Sequence(text)})

    def _info(self):
        return evaluate.MetricInfo(
            description=self.description_text,
            citation=self.citation_text,
            inputs_description=self.inputs_text,
            features=self._features(),
            reference_urls=list(self.reference_urls_list),
        )

    def _check(self, batch: dict) -> dict:
        """Check a batch and bring it to one form, so that a column never mixes strings and lists."""
        predictions = check_predictions(batch["predictions"])
        # Empty references are checked when computing, since the option for them may be given there.
        return {
            "predictions": predictions,
            "references": check_references(batch["references"], len(predictions), "keep"),
        }

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add a batch of captions and their references."""
        super().add_batch(**self._check({"predictions": predictions, "references": references, **kwargs}))

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one caption and its references."""
        batch = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in batch.items()})

    def _compute(self, *, predictions, references=None, **options):
        options = {"per_image": False, **self.options, **options}
        return score_captions(predictions, references, self.metric, **options)
