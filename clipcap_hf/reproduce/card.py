"""The numbers in the model card of each captioner: as scores, and as rows of the table."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.card import update_card
from ..files import write_text
from .settings import Settings
from .status import Score
from .table import HEAD, Row, markdown_table, remarks


BEGIN, END = "<!-- clipcap reproduce -->", "<!-- end of clipcap reproduce -->"


def write_cards(
    settings: Settings, scores: Sequence[Score], rows: Sequence[Row], folders: dict[str, Path]
) -> list[Path]:
    """Write the numbers into the cards of captioners. A rehearsal, or what is no reproduction, is never written.

    Args:
        settings: Of the run.
        scores, rows: What was found.
        folders: Of the captioners, by their name.

    Returns:
        The cards that were written.
    """
    written = []
    for name, folder in folders.items():
        mine = [score for score in scores if score.captioner.name == name and may_be_written(settings, score)]
        for score in mine:
            update_card(folder, json.loads(Path(score.report).read_text(encoding="utf-8")))
        if mine:
            variant, tables = mine[0].captioner.variant, {score.table for score in mine}
            shown = [
                row for row in rows if row.claim.variant == variant and row.claim.table in tables and row.verified
            ]
            _write_section(folder / "README.md", settings, shown)
            written.append(folder / "README.md")
    return written


def may_be_written(settings: Settings, score: Score) -> bool:
    """Whether a score may go into a card: it counts, and it is of the decoding that counts."""
    return not settings.rehearsal and not score.reasons and score.decoding == settings.choices["decoding"]


def _write_section(card: Path, settings: Settings, rows: Sequence[Row]):
    table = markdown_table(HEAD, [row.cells() for row in rows])
    section = "\n\n".join([BEGIN + "\n## Reproduction of the paper", table, *remarks(settings), END])
    text = card.read_text(encoding="utf-8")
    start, stop = text.find(BEGIN), text.find(END)
    if 0 <= start < stop:
        text = text[:start] + section + text[stop + len(END) :]
    else:
        text = text.rstrip("\n") + "\n\n" + section + "\n"
    write_text(card, text)
