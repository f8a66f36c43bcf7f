"""Table 1 of the ClipCap paper as data.

Source: Mokady, Hertz, Bermano, "ClipCap: CLIP Prefix for Image Captioning", arXiv:2111.09734, Table 1. Scores are in
percent, as in the paper (CIDEr 113.08 is 1.1308). The paper does not state its decoding.
"""

from dataclasses import dataclass


# The name of the whole among the domains, which nocaps has.
ENTIRE = "entire"
UNVERIFIED = (
    "The paper's figures are copied from its Table 1. They were never reproduced with this package, which was made "
    "without the paper's data sets and weights; the paper does not state its decoding either."
)


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Table 1.

    Attributes:
        benchmark (`str`): A name in `clipcap_hf.evaluation.BENCHMARKS`.
        split (`str`): Its split.
        method (`str`): The method's name in the paper.
        scores (`dict[str, dict[str, float]]`): Scores in percent by domain (`"entire"` for all images) and by the name
            of the metric in this package.
        trainable_parameters (`int`): Millions of trained parameters.
        training_hours (`int`): Hours of training.
        training_device (`str`, *optional*): The GPU, if the table names it.
        mapping_type (`str`, *optional*): `"mlp"` or `"transformer"`; `None` for methods other than ClipCap.
        freeze_language_model (`bool`, *optional*): Whether this ClipCap variant freezes GPT-2.
        ablation (`bool`): Whether the paper shows it as an ablation.
    """

    benchmark: str
    split: str
    method: str
    scores: dict[str, dict[str, float]]
    trainable_parameters: int
    training_hours: int
    training_device: str | None = None
    mapping_type: str | None = None
    freeze_language_model: bool | None = None
    ablation: bool = False

    @property
    def is_clipcap(self) -> bool:
        return self.mapping_type is not None


_MLP = {"mapping_type": "mlp", "freeze_language_model": False}
_TRANSFORMER = {"mapping_type": "transformer", "freeze_language_model": True}


def _conceptual(method, rouge_l, cider, spice, *training, **variant) -> PaperRow:
    scores = {ENTIRE: {"rouge_l": rouge_l, "cider": cider, "spice": spice}}
    return PaperRow("conceptual-captions", "val", method, scores, *training, **variant)


def _nocaps(method, in_domain, near_domain, out_domain, entire, *training, **variant) -> PaperRow:
    domains = {"in-domain": in_domain, "near-domain": near_domain, "out-domain": out_domain, ENTIRE: entire}
    scores = {domain: {"cider": cider, "spice": spice} for domain, (cider, spice) in domains.items()}
    return PaperRow("nocaps", "val", method, scores, *training, **variant)


def _coco(method, bleu_4, meteor, cider, spice, *training, **variant) -> PaperRow:
    scores = {ENTIRE: {"bleu_4": bleu_4, "meteor": meteor, "cider": cider, "spice": spice}}
    return PaperRow("coco-karpathy", "test", method, scores, *training, **variant)


PAPER_ROWS = (
    _conceptual("VLP", 24.35, 77.57, 16.59, 115, 1200, "V100"),
    _conceptual("ClipCap; MLP + GPT-2 tuning", 26.71, 87.26, 18.5, 156, 80, "GTX1080", **_MLP),
    _conceptual("ClipCap; Transformer", 25.12, 71.82, 16.07, 43, 72, "GTX1080", **_TRANSFORMER),
    _nocaps("BUTD", (74.3, 11.5), (56.9, 10.3), (30.1, 8.1), (54.3, 10.1), 52, 960),
    _nocaps("Oscar", (79.6, 12.3), (66.1, 11.5), (45.3, 9.7), (63.8, 11.2), 135, 74),
    _nocaps(
        "ClipCap; MLP + GPT-2 tuning", (79.73, 12.2), (67.69, 11.26), (49.35, 9.7), (65.7, 11.1), 156, 7, **_MLP
    ),
    _nocaps(
        "ClipCap; Transformer", (84.85, 12.14), (66.82, 10.92), (49.14, 9.57), (65.83, 10.86), 43, 6, **_TRANSFORMER
    ),
    _coco("BUTD", 36.2, 27.0, 113.5, 20.3, 52, 960, "M40"),
    _coco("VLP", 36.5, 28.4, 117.7, 21.3, 115, 48, "V100"),
    _coco("Oscar", 36.58, 30.4, 124.12, 23.17, 135, 74, "V100"),
    _coco("ClipCap; Transformer", 33.53, 27.45, 113.08, 21.05, 43, 6, "GTX1080", **_TRANSFORMER),
    _coco("ClipCap; MLP + GPT-2 tuning", 32.15, 27.1, 108.35, 20.12, 156, 7, "GTX1080", **_MLP),
    _coco(
        "ClipCap; Transformer + GPT-2 tuning", 32.22, 27.79, 109.83, 20.63, 167, 7,
        mapping_type="transformer", freeze_language_model=False, ablation=True,
    ),
    _coco(
        "ClipCap; MLP, GPT-2 frozen", 27.39, 24.4, 92.38, 18.04, 32, 6,
        mapping_type="mlp", freeze_language_model=True, ablation=True,
    ),
)  # fmt: skip


def paper_rows(benchmark: str, split: str | None = None) -> list[PaperRow]:
    """Return the paper's rows for a benchmark and split; none if the paper does not report on it."""
    return [row for row in PAPER_ROWS if row.benchmark == benchmark and split in (None, row.split)]


def rows_to_compare(benchmark: str, split: str, config=None) -> list[PaperRow]:
    """Return the paper's rows to compare a model with.

    Args:
        benchmark (`str`): The benchmark that was scored.
        split (`str`): Its split.
        config ([`ClipCapConfig`], *optional*): The model's configuration, to find the row of its variant. Without it,
            and for variants that are not in the paper, the rows are those of the paper's two main variants.
    """
    rows = [row for row in paper_rows(benchmark, split) if row.is_clipcap]
    same = [
        row
        for row in rows
        if config is not None
        and row.mapping_type == config.mapping_type
        and row.freeze_language_model == config.freeze_language_model
    ]
    return same or [row for row in rows if not row.ablation]
