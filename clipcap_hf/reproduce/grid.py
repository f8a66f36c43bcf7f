"""The comparison of what the paper does not say, on the validation split alone: no claim is touched by it."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.run import METRIC_TITLES
from ..files import write_text
from .choices import CHOICES, differences
from .settings import Settings
from .status import Number, Score
from .table import markdown_table


METRICS = ("bleu_4", "meteor", "cider")


def write_grid(settings: Settings, scores: Sequence[Score]) -> list[Path]:
    """Write `grid.md` and `grid.json`: for each captioner and decoding its scores, the mean over seeds."""
    groups: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        other = ", ".join(f"{name}={value}" for name, value in differences(dict(score.captioner.choices)).items())
        groups.setdefault((score.table, score.split, score.captioner.variant, other, score.decoding), []).append(score)
    lines = []
    for key, found in groups.items():
        numbers = {
            metric: Number.of([score.scores["entire"][metric] for score in found])
            for metric in METRICS
            if metric in found[0].scores["entire"]
        }
        lines.append((key, numbers))
    folder = Path(settings.out)
    content = [
        dict(zip(("table", "split", "variant", "choices", "decoding"), key))
        | {"scores": {m: n.mean for m, n in numbers.items()}}
        for key, numbers in lines
    ]
    write_text(folder / "grid.json", json.dumps({"rehearsal": settings.rehearsal, "rows": content}, indent=1) + "\n")
    write_text(folder / "grid.md", _markdown(settings, lines))
    return [folder / "grid.md", folder / "grid.json"]


def _markdown(settings: Settings, lines) -> str:
    shown = [metric for metric in METRICS if all(metric in numbers for _, numbers in lines)]
    head = [
        "Table",
        "Split",
        "Variant",
        "Other choices than the default",
        "Decoding",
        *(METRIC_TITLES[m] for m in shown),
    ]
    rows = [[*key, *(f"{numbers[metric].mean:.2f}" for metric in shown)] for key, numbers in lines]
    title = "# What the paper does not say, compared on the validation split"
    questions = "\n".join(f"- `{choice.name}`: {choice.question}" for choice in CHOICES.values())
    note = (
        "A rehearsal on made-up data: the numbers mean nothing."
        if settings.rehearsal
        else "One choice differs at a time."
    )
    return "\n\n".join([title, note, markdown_table(head, rows), questions]) + "\n"
