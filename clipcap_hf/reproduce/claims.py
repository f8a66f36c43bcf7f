"""The paper's claims: which numbers it gives for which captioner on which benchmark."""

from dataclasses import dataclass

from ..evaluation import BENCHMARKS, PAPER_ROWS, Benchmark, PaperRow


@dataclass(frozen=True)
class Table:
    """A table to reproduce.

    Attributes:
        name: What `clipcap reproduce --table` takes.
        benchmark: A name of `clipcap_hf.evaluation.BENCHMARKS`.
        split: That the claims are about.
        trained_on: The table whose training images the captioner saw; nocaps is scored with COCO's captioner.
        headline: The metric that the paper's page claims; None where the paper claims nothing.
        choose_on: The split for choosing between alternatives; None where no other split has references.
        train_images: As many as the paper trained on; None where the publisher's list changes.
    """

    name: str
    benchmark: str
    split: str
    trained_on: str
    headline: str | None = None
    choose_on: str | None = None
    train_images: int | None = None

    @property
    def protocol(self) -> Benchmark:
        return BENCHMARKS[self.benchmark]


TABLES = {
    table.name: table
    for table in (
        Table("coco", "coco-karpathy", "test", "coco", "bleu_4", "val", train_images=113_287),
        Table("conceptual-captions", "conceptual-captions", "val", "conceptual-captions", "cider"),
        Table("nocaps", "nocaps", "val", "coco", "cider"),
        # The paper claims nothing here: the same stages on data that is easier to get.
        Table("flickr8k", "flickr8k", "test", "flickr8k", choose_on="val", train_images=6000),
        Table("flickr30k", "flickr30k", "test", "flickr30k", choose_on="val", train_images=29_000),
        # Systems of others; their training is not the paper's, so only captions and captioners are scored.
        Table("stair", "stair", "val", "stair"),
    )
}
PAPER_TABLES = ("coco", "conceptual-captions", "nocaps")
TRAINABLE = ("coco", "conceptual-captions", "nocaps", "flickr8k", "flickr30k")

#: The paper's two captioners, as `--variant` names them: (mapping network, is the language model frozen, title).
VARIANTS = {
    "transformer": ("transformer", True, "ClipCap; Transformer"),
    "mlp": ("mlp", False, "ClipCap; MLP + GPT-2 tuning"),
}


@dataclass(frozen=True)
class Claim:
    """One number of a table: the paper's, or None where only the number of this run is shown."""

    table: str
    variant: str
    domain: str
    metric: str
    claimed: float | None

    @property
    def is_headline(self) -> bool:
        """Whether the paper's page lists it: BLEU-4 on COCO, CIDEr on the two others."""
        return self.claimed is not None and self.metric == TABLES[self.table].headline


def claims_of(table: str, variant: str) -> list[Claim]:
    """List the claims of a table about a variant; where the paper has none, what this run shows."""
    mapping_type, frozen, _ = VARIANTS[variant]
    rows = [row for row in _rows(table) if (row.mapping_type, row.freeze_language_model) == (mapping_type, frozen)]
    if not rows:
        return [Claim(table, variant, "entire", metric, None) for metric in ("bleu_4", "meteor", "cider")]
    return [
        Claim(table, variant, domain, metric, claimed)
        for row in rows
        for domain, scores in row.scores.items()
        for metric, claimed in scores.items()
    ]


def context_of(table: str) -> list[PaperRow]:
    """List the paper's other rows of a table, baselines and ablations, which are shown and not run."""
    return [row for row in _rows(table) if row.ablation or not row.is_clipcap]


def _rows(table: str) -> list[PaperRow]:
    found = TABLES[table]
    return [row for row in PAPER_ROWS if (row.benchmark, row.split) == (found.benchmark, found.split)]
