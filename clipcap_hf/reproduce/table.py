"""The table `Dataset | Model | Metric | Claimed | Verified | Status`, as Markdown, JSON and HTML."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.run import METRIC_TITLES
from ..files import write_text
from .choices import REPORTED_DECODINGS, differences
from .claims import TABLES, VARIANTS, Claim, claims_of, context_of
from .settings import Settings
from .status import RULE, Number, Score


HEAD = ("Dataset", "Model", "Metric", "Claimed", "Verified", "Status")
REHEARSAL = "REHEARSAL on made-up data: no number here says anything about the paper."
WRITTEN_BY = "clipcap reproduce"
FILES = ("table.md", "table.json", "table.html")


@dataclass(frozen=True)
class Row:
    """A row of the table: a claim, and what was found; `numbers` are by decoding, the one that counts first."""

    claim: Claim
    numbers: dict[str, Number]
    reasons: tuple[str, ...] = ()

    @property
    def verified(self) -> Number | None:
        """The number for the column Verified: none if nothing ran, or if it is no reproduction."""
        if self.reasons or not self.numbers:
            return None
        return next(iter(self.numbers.values()))

    @property
    def status(self) -> str:
        if not self.numbers:
            return ""
        if self.reasons:
            return f"not a reproduction ({self._all_numbers()})"
        if self.claim.claimed is None:
            return "no claim of the paper"
        if self.verified is not None and self.verified.reproduces(self.claim):
            return "reproduced"
        return f"not reproduced (tried: {', '.join(self.numbers)})"

    def cells(self) -> list[str]:
        """Return the six cells as text."""
        claim, table = self.claim, TABLES[self.claim.table]
        metric = METRIC_TITLES[claim.metric] + ("" if claim.domain == "entire" else f", {claim.domain}")
        claimed = "" if claim.claimed is None else f"{claim.claimed:.2f}"
        verified = "" if self.verified is None else self._all_numbers()
        dataset = f"{table.protocol.title}, {table.split}"
        return [dataset, VARIANTS[claim.variant][2], metric, claimed, verified, self.status]

    def _all_numbers(self) -> str:
        return "; ".join(f"{_text(number, self.claim)}, {decoding}" for decoding, number in self.numbers.items())

    def record(self) -> dict[str, Any]:
        """Return the row for the JSON file, with unrounded numbers."""
        claim = self.claim
        return {
            "benchmark": TABLES[claim.table].benchmark,
            "split": TABLES[claim.table].split,
            **asdict(claim),
            "headline": claim.is_headline,
            "verified": None if self.verified is None else self.verified.mean,
            "difference": None
            if self.verified is None or claim.claimed is None
            else self.verified.mean - claim.claimed,
            "numbers": {decoding: asdict(number) for decoding, number in self.numbers.items()},
            "not_a_reproduction": list(self.reasons),
            "status": self.status,
        }


def _text(number: Number, claim: Claim) -> str:
    text = f"{number.mean:.2f}"
    if number.deviation is not None:
        text += f" ± {number.deviation:.2f} of {number.seeds} seeds"
    return text if claim.claimed is None else f"{text} ({number.mean - claim.claimed:+.2f})"


def build_rows(settings: Settings, scores: Iterable[Score]) -> list[Row]:
    """Give each claim its numbers; claims that nothing was run for stay empty. The page's claims come first."""
    scores = list(scores)
    rows = []
    for table in settings.tables:
        for variant in settings.variants:
            mine = [score for score in scores if (score.table, score.captioner.variant) == (table, variant)]
            rows += [_row(claim, mine, settings) for claim in claims_of(table, variant)]
    return sorted(rows, key=lambda row: not row.claim.is_headline)


def _row(claim: Claim, scores: Sequence[Score], settings: Settings) -> Row:
    order = (settings.choices["decoding"], *REPORTED_DECODINGS)
    found: dict[str, list[float]] = {}
    reasons: list[str] = []
    for score in scores:
        if claim.metric in score.scores.get(claim.domain, {}):
            found.setdefault(score.decoding or "a results file", []).append(score.scores[claim.domain][claim.metric])
            reasons += score.reasons
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return Row(claim, {name: Number.of(found[name]) for name in names}, tuple(dict.fromkeys(reasons)))


def write_table(settings: Settings, rows: Sequence[Row]) -> list[Path]:
    """Write the table as Markdown, JSON and HTML."""
    folder = Path(settings.out)
    content = {
        "written_by": WRITTEN_BY,
        "rehearsal": settings.rehearsal,
        "rule": RULE.format(decoding=settings.choices["decoding"]),
        "choices": settings.choices,
        "source": settings.source,
        "rows": [row.record() for row in rows],
        "context": [
            {"benchmark": row.benchmark, "method": row.method, "ablation": row.ablation, "claimed": row.scores}
            for table in settings.tables
            for row in context_of(table)
        ],
    }
    texts = (markdown(settings, rows), json.dumps(content, indent=1, ensure_ascii=False) + "\n", _page(settings, rows))
    for name, text in zip(FILES, texts):
        write_text(folder / name, text)
    return [folder / name for name in FILES]


def markdown(settings: Settings, rows: Sequence[Row]) -> str:
    """Write the table, the rule and the choices as Markdown."""
    parts = [f"# {_title(settings)}"]
    if settings.rehearsal:
        parts.append(f"**{REHEARSAL}**")
    for title, chosen in _groups(rows):
        parts += [f"## {title}", markdown_table(HEAD, [row.cells() for row in chosen])]
    parts += [*why_not(settings, rows), *remarks(settings)]
    if context := _context(settings):
        title = "## The paper's baselines and ablations, not run"
        parts += [title, markdown_table(("Dataset", "Method", "Claimed"), context)]
    return "\n\n".join(parts) + "\n"


def why_not(settings: Settings, rows: Sequence[Row]) -> list[str]:
    """Say for each captioner and table why its numbers are no reproduction; of a rehearsal none is."""
    if settings.rehearsal:
        return []
    found = {(row.claim.table, row.claim.variant): row.reasons for row in rows if row.reasons and row.numbers}
    return [
        f"No reproduction: {TABLES[table].protocol.title}, {VARIANTS[variant][2]}: {'; '.join(reasons)}."
        for (table, variant), reasons in found.items()
    ]


def remarks(settings: Settings) -> list[str]:
    """Return the rule and the choices as sentences."""
    trains = settings.source == "train"  # what a captioner that was found was trained with is not a choice
    choices = settings.choices if trains else {"decoding": settings.choices["decoding"]}
    other = differences(choices)
    made = ", ".join(f"{name}={value}" for name, value in choices.items())
    return [
        RULE.format(decoding=settings.choices["decoding"]),
        f"What the paper does not say was chosen as {made}"
        + (f" (not the default: {', '.join(other)})." if other else " (the defaults)."),
        "In percent, as the paper prints them.",
    ]


def _title(settings: Settings) -> str:
    return "Rehearsal of a reproduction of ClipCap" if settings.rehearsal else "Reproduction of ClipCap"


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    groups = [
        ("The claims of the paper's page", [row for row in rows if row.claim.is_headline]),
        (
            "The other numbers of the paper's Table 1",
            [row for row in rows if row.claim.claimed is not None and not row.claim.is_headline],
        ),
        ("Without a claim of the paper", [row for row in rows if row.claim.claimed is None]),
    ]
    return [(title, chosen) for title, chosen in groups if chosen]


def _context(settings: Settings) -> list[tuple[str, str, str]]:
    lines = []
    for table in settings.tables:
        for row in context_of(table):
            claimed = "; ".join(
                f"{METRIC_TITLES[metric]}{'' if domain == 'entire' else ', ' + domain} {value:.2f}"
                for domain, scores in row.scores.items()
                for metric, value in scores.items()
            )
            lines.append((TABLES[table].protocol.title, row.method, claimed))
    return lines


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
.warning { border-left: 4px solid #c80; padding: .2rem .8rem; font-weight: 600; }
.scroll { overflow-x: auto; }
"""


def _page(settings: Settings, rows: Sequence[Row]) -> str:
    title = _title(settings)
    body = [f"<h1>{escape(title)}</h1>"]
    if settings.rehearsal:
        body.append(f'<p class="warning">{escape(REHEARSAL)}</p>')
    for name, chosen in _groups(rows):
        body += [f"<h2>{escape(name)}</h2>", _html_table(HEAD, [row.cells() for row in chosen])]
    body += [f"<p>{escape(line)}</p>" for line in (*why_not(settings, rows), *remarks(settings))]
    if context := _context(settings):
        body += ["<h2>The paper's baselines and ablations, not run</h2>"]
        body.append(_html_table(("Dataset", "Method", "Claimed"), context))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" '
        f'content="{WRITTEN_BY}">\n<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>'
        f"\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _html_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    cells += ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
    return '<div class="scroll"><table>' + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>"
