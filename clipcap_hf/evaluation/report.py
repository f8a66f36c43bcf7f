"""Write a report's files, and show it as tables for the terminal, the page and the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from .coco_files import write_results
from .evaluation_set import EvaluationSet
from .folder import PAGE, RESULTS, RESULTS_KEPT, SCORES, check_folder, is_one_of
from .page import write_page
from .paper import ENTIRE, paper_rows
from .run import DIVERSITY, METRIC_TITLES


HERE = "here"


def write_report(
    folder: str | Path,
    report: Mapping[str, Any],
    data: EvaluationSet,
    inputs: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write `results.json` (the leaderboards' form), `scores.json` (the report) and `index.html` (the page).

    Args:
        folder (`str` or `Path`): The folder, created if missing.
        report (`Mapping`): The report of [`evaluate_captions`].
        data ([`EvaluationSet`]): The data that it returned with the report.
        inputs, overwrite: What may be replaced, see [`check_folder`].

    Returns:
        `list[Path]`: The files written.

    Raises:
        ValueError: If a file is an input, or was not written by `clipcap evaluate`.
    """
    folder = Path(folder)
    check_folder(folder, inputs, overwrite)
    page, scores, results = (folder / name for name in (PAGE, SCORES, RESULTS))
    tables = [(title, score_table(report, part)) for part, title in parts(report)]
    write_page(page, report, data, tables, [diversity_line(report), *difference_lines(report)])
    keep = is_one_of(results, inputs)
    if keep:
        report = {**report, RESULTS_KEPT: True}
    # Scores first: they show that the captions in the folder are ours.
    write_text(scores, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    if keep:
        return [scores, page]
    write_results(results, {image["image_id"]: image["caption"] for image in report["per_image"]})
    return [scores, page, results]


def parts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the names and titles of the parts that were scored: the domains, then all images."""
    names = [name for name in report["scores"] if name != ENTIRE] + [ENTIRE]
    return [(name, f"{name}, {report['images'][name]:,} images") for name in names]


def score_table(report: Mapping[str, Any], part: str = ENTIRE) -> list[list[str]]:
    """Build a table: a header, the paper's rows for this benchmark if there are any, and our scores last.

    With rows of the paper, a column gives the millions of trained parameters.
    """
    paper = paper_rows(report["benchmark"], report["split"]) if report["benchmark"] else []
    trained = bool(paper)
    rows: list[tuple[str, int | None, Mapping[str, float]]] = [
        (f"paper: {row.method}", row.trainable_parameters, row.scores[part]) for row in paper if part in row.scores
    ]
    rows.append((HERE, _millions(report), report["scores"][part]))
    judging = [name for name in METRIC_TITLES if name not in DIVERSITY]
    shown = [name for name in judging if any(name in scores for *_, scores in rows)]
    table = [["", *(METRIC_TITLES[name] for name in shown), *(["trained"] if trained else [])]]
    for method, millions, scores in rows:
        row = [method, *(f"{scores[name]:.2f}" if name in scores else "–" for name in shown)]
        table.append(row + ([f"{millions} M" if millions is not None else "–"] if trained else []))
    return table


def _millions(report: Mapping[str, Any]) -> int | None:
    """Return the trainable parameters of the scored model, in millions."""
    parameters = report.get("model", {}).get("trainable_parameters")
    return None if parameters is None else round(parameters / 1e6)


def diversity_line(report: Mapping[str, Any]) -> str:
    """Describe how varied the captions are; empty if that was not computed."""
    scores = report["scores"][ENTIRE]
    if not all(name in scores for name in DIVERSITY):
        return ""
    return (
        f"{scores['vocabulary_size']:.0f} different words, {scores['mean_length']:.1f} words per caption, "
        f"distinct-1 {scores['distinct_1']:.2f} %, distinct-2 {scores['distinct_2']:.2f} %."
    )


def difference_lines(report: Mapping[str, Any]) -> list[str]:
    """Compare with the paper, a line per score: `CIDEr: paper 113.08 (...), here 53.99, difference -59.09`."""
    lines = []
    for entry in report.get("paper", {}).get("differences", ()):
        domain = "" if entry["domain"] == ENTIRE else f", {entry['domain']}"
        lines.append(
            f"{METRIC_TITLES[entry['metric']]}{domain}: paper {entry['paper']:.2f} ({entry['method']}), "
            f"here {entry['here']:.2f}, difference {entry['difference']:+.2f}"
        )
    return lines


def plain_summary(report: Mapping[str, Any]) -> str:
    """Summarize a report for the terminal."""
    name = f"{report['title']}, {report['split']}" if report["benchmark"] else report["data"]["source"]
    lines = [f"{name}: {report['data']['images']:,} images, {report['data']['references']:,} references"]
    for part, title in parts(report):
        lines += ["", title, *_aligned(score_table(report, part))]
    lines += ["", f"In percent. Tokenizer: {report['protocol']['tokenizer']}."]
    if diversity := diversity_line(report):
        lines.append(f"Captions: {diversity}")
    if differences := difference_lines(report):
        lines += ["", *differences, "", report["paper"]["unverified"]]
    for note in (*report["protocol"]["deviations"], *report["notes"]):
        lines.append(f"Note: {note}")
    return "\n".join(lines)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in table
    ]
