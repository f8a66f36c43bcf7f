"""When a number counts as a reproduction: what rules it out, and how close it must be."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .claims import TABLES, VARIANTS, Claim
from .settings import Settings
from .stages import Captioner


TOLERANCES = {"cider": 1.0}  # in percent, as the paper prints them
OTHER_TOLERANCE = 0.5
SEEDS_FOR_DEVIATION = 3
RULE = (
    "Rule, stated before the run: a number is reproduced if it is within 1.0 CIDEr (0.5 for every other metric) of "
    "the claim, or within 2 standard deviations of at least 3 seeds. The decoding that counts is the chosen one "
    "({decoding}); others are shown beside it. A number is no reproduction if anything of the protocol differs: the "
    "column Verified then stays empty, and the reasons stand below the table."
)
# The language models and CLIPs that the paper may mean: GPT-2 small, ViT-B/32 or RN50x4.
PAPER_LANGUAGE_MODEL = ["gpt2", 12, 768]
PAPER_WIDTHS = (512, 640)


@dataclass(frozen=True)
class Score:
    """What one evaluation found.

    Attributes:
        table, split: What was scored.
        captioner: Of which captioner; the decoding is None for a results file.
        scores: In percent, by domain and metric.
        reasons: Why the numbers are no reproduction of the paper's; none if they are.
        report: Path of the evaluation's full report.
    """

    table: str
    split: str
    captioner: Captioner
    decoding: str | None
    scores: Mapping[str, Mapping[str, float]]
    reasons: tuple[str, ...]
    report: str


def reasons_against(
    settings: Settings,
    table: str,
    split: str,
    captioner: Captioner,
    evaluation: Mapping[str, Any],
    training: Mapping[str, Any],
) -> tuple[str, ...]:
    """List what makes the numbers of an evaluation no reproduction; empty if nothing does."""
    wanted, protocol = TABLES[table], evaluation["protocol"]
    reasons = []
    if settings.rehearsal:
        reasons.append("a rehearsal on made-up data")
    if split != wanted.split:
        reasons.append(f"the split {split}, and the claim is about {wanted.split}")
    if settings.limit:
        reasons.append(f"a limit of {settings.limit} images")
    reasons += protocol["deviations"]
    if wanted.protocol.tokenizer not in protocol["tokenizer"].split()[:1] or "not exact" in protocol["tokenizer"]:
        reasons.append(f"the tokenizer {protocol['tokenizer']}, and the protocol's is {wanted.protocol.tokenizer}")
    if settings.source != "results":
        reasons += _reasons_of_training(settings, table, captioner, training)
        reasons += _reasons_of_parts(captioner.variant, evaluation["parts"])
    return tuple(dict.fromkeys(reasons))


def _reasons_of_training(
    settings: Settings, table: str, captioner: Captioner, training: Mapping[str, Any]
) -> list[str]:
    wanted = TABLES[table].trained_on
    reasons = []
    if captioner.trained_on is None:
        reasons.append("nobody says what the captioner was trained on (--trained-on)")
    elif captioner.trained_on != wanted:
        reasons.append(f"a captioner trained on {captioner.trained_on}, and the claim's saw {wanted}")
    if settings.training:
        changed = ", ".join(f"{name}={value}" for name, value in settings.training.items())
        reasons.append(f"another recipe: {changed}")
    expected = TABLES[wanted].train_images
    if "images" in training and expected and training["images"] != expected:
        reasons.append(f"{training['images']} training images of {expected}")
    return reasons


def _reasons_of_parts(variant: str, parts: Mapping[str, Any]) -> list[str]:
    reasons = []
    if parts["mapping_type"] != VARIANTS[variant][0]:
        reasons.append(f"a captioner with the mapping {parts['mapping_type']}, not {VARIANTS[variant][0]}")
    if parts["language_model"] != PAPER_LANGUAGE_MODEL:
        kind, layers, width = parts["language_model"]
        reasons.append(f"another language model than GPT-2 small: {kind}, {layers} layers of {width}")
    if parts["clip_embed_dim"] not in PAPER_WIDTHS:
        reasons.append(f"another CLIP than the paper's: embeddings of width {parts['clip_embed_dim']}")
    return reasons


@dataclass(frozen=True)
class Number:
    """One number of the table: the mean over seeds, their standard deviation (None for one seed), and how many."""

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Number":
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def reproduces(self, claim: Claim) -> bool:
        """Whether it is as close to the claim as the rule wants."""
        if claim.claimed is None:
            return False
        allowed = TOLERANCES.get(claim.metric, OTHER_TOLERANCE)
        if self.deviation is not None and self.seeds >= SEEDS_FOR_DEVIATION:
            allowed = max(allowed, 2 * self.deviation)
        return abs(self.mean - claim.claimed) <= allowed + 1e-9
