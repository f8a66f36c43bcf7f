"""Write a report as one HTML file: scores, and the worst, median and best images with their captions."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from .digests import digest
from .evaluation_set import EvaluationSet
from .folder import GENERATOR


SHOWN = 12  # images of each kind
SIDE = 320  # pixels of an image's longer side
RANKED_BY = ("cider", "exact_match", "bleu_4")  # the first that was computed

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --dim: #777; --bar: #4a7dbd; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; }
.dim { color: var(--dim); }
.note { border-left: 4px solid #c80; padding: .2rem .8rem; background: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
.tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .9rem; }
.tiles dt { font-size: .85rem; color: var(--dim); }
.tiles dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.histogram { display: flex; align-items: flex-end; gap: 2px; height: 7rem; max-width: 40rem; }
.histogram div { flex: 1; background: var(--bar); min-height: 1px; }
.axis { display: flex; justify-content: space-between; max-width: 40rem; font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; display: flex; flex-direction: column; }
.card img { width: 100%; height: 11rem; object-fit: contain; background: #fff; display: block; }
.card div { padding: .6rem .8rem; overflow-wrap: anywhere; }
.caption { font-weight: 600; }
.card ul { margin: .4rem 0 0; padding-left: 1.1rem; font-size: .9rem; color: var(--dim); }
.score { display: flex; justify-content: space-between; gap: .5rem; font-size: .85rem; color: var(--dim); }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; border-radius: .5rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
"""


def write_page(
    path: str | Path,
    report: Mapping[str, Any],
    data: EvaluationSet,
    tables: Sequence[tuple[str, list[list[str]]]],
    remarks: Sequence[str] = (),
) -> None:
    """Write the page, which contains its images and loads nothing.

    Args:
        path (`str` or `Path`): The HTML file.
        report (`Mapping`): The report of [`evaluate_captions`].
        data ([`EvaluationSet`]): The data that was scored, in the order of the report. Without images, the page shows
            text only.
        tables (`Sequence`): Titles and tables of the scores.
        remarks (`Sequence[str]`): Lines below the tables.
    """
    title = _title_of(report)
    body = [*_heading(title, report), *_scores(report, tables, remarks), *_images(report, data), _record(report)]
    write_text(path, _document(title, "\n".join(body)))


def _title_of(report: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (report["title"] or "Captions", report["split"])))


def _heading(title: str, report: Mapping[str, Any]) -> list[str]:
    model = report.get("model", {}).get("name")
    origin = f"Captions by {model}" if model else f"Captions of {report.get('captions_file', 'a results file')}"
    return [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{escape(origin)}. {report["data"]["images"]:,} images, '
        f"{report['data']['references']:,} references, tokenizer {escape(report['protocol']['tokenizer'])}.</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in (*report["protocol"]["deviations"], *report["notes"])),
    ]


def _scores(report: Mapping[str, Any], tables: Sequence, remarks: Sequence[str]) -> list[str]:
    body = ["<h2>Scores, in percent</h2>"]
    for heading, table in tables:
        body.append((f"<h3>{escape(heading)}</h3>" if len(tables) > 1 else "") + _table(table))
    below = [*remarks, report.get("paper", {}).get("unverified")]
    return body + [f'<p class="dim">{escape(remark)}</p>' for remark in below if remark]


def _images(report: Mapping[str, Any], data: EvaluationSet) -> list[str]:
    """Draw how the scores are distributed, and show the worst, median and best images."""
    per_image = report["per_image"]
    metric = next((name for name in RANKED_BY if name in per_image[0]), None)
    if metric is None:
        return []
    values = [image[metric] for image in per_image]
    # Many images may have the same score: those shown are spread over all of them, not the first in the data.
    order = sorted(range(len(values)), key=lambda place: (values[place], digest(str(data.ids[place]))))
    body = _histogram(values, metric)
    for heading, places in _picked(order):
        cards = "\n".join(_card(report, data, place, metric) for place in places)
        body.append(f'<h2>{heading}</h2>\n<div class="cards">\n{cards}\n</div>')
    return body


def _record(report: Mapping[str, Any]) -> str:
    record = {name: value for name, value in report.items() if name not in ("per_image", "scores", "paper", "notes")}
    text = escape(json.dumps(record, ensure_ascii=False, indent=2))
    return f"<details><summary>What made these numbers</summary><pre>{text}</pre></details>"


def _document(title: str, body: str) -> str:
    # The page is in English; captions are marked with their own language.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{GENERATOR}\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(table: list[list[str]]) -> str:
    head, *rows = table
    if len(rows) == 1:  # nothing to compare with, so show tiles, which fit on any screen
        tiles = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in zip(head[1:], rows[0][1:])
        )
        return f'<dl class="tiles">{tiles}</dl>'
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    drawn = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n{drawn}\n</table></div>'


def _picked(order: list[int]) -> list[tuple[str, list[int]]]:
    """Pick the worst, middle and best images, given in ascending order; if there are few, all of them."""
    if len(order) <= 3 * SHOWN:
        return [("All images, the worst first", order)]
    middle = (len(order) - SHOWN) // 2
    return [
        (f"The worst {SHOWN}", order[:SHOWN]),
        (f"{SHOWN} in the middle", order[middle : middle + SHOWN]),
        (f"The best {SHOWN}", order[: -SHOWN - 1 : -1]),
    ]


def _card(report: Mapping[str, Any], data: EvaluationSet, place: int, ranked_by: str) -> str:
    image = report["per_image"][place]
    language = escape(report["language"])
    picture = _picture(data, place)
    domain = f" · {escape(image['domain'])}" if "domain" in image else ""
    references = "".join(f'<li dir="auto" lang="{language}">{escape(text)}</li>' for text in data.references[place])
    caption = escape(image["caption"]) or "(empty)"
    return (
        f'<div class="card">{picture}<div>'
        f'<p class="score"><span>{escape(str(image["image_id"]))}{domain}</span>'
        f"<span>{_title(ranked_by)} {100 * image[ranked_by]:.1f}</span></p>"
        f'<p class="caption" dir="auto" lang="{language}">{caption}</p><ul>{references}</ul></div></div>'
    )


def _title(metric: str) -> str:
    from .run import METRIC_TITLES

    return METRIC_TITLES[metric]


def _picture(data: EvaluationSet, place: int) -> str:
    if data.images is None:
        return ""
    from ..model.processing_clipcap import load_image

    image = load_image(data.images[place])
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    content = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="" loading="lazy" width="{image.width}" height="{image.height}" '
        f'src="data:image/webp;base64,{content}">'
    )


def _histogram(values: Sequence[float], metric: str) -> list[str]:
    """Draw how many images have which score, in bars of equal width."""
    top = max(values)
    if not top:
        return []
    bars = 24
    counts = [0] * bars
    for value in values:
        counts[min(int(value / top * bars), bars - 1)] += 1
    drawn = "".join(
        f'<div style="height:{100 * count / max(counts):.1f}%" '
        f'title="{100 * top * bar / bars:.0f} to {100 * top * (bar + 1) / bars:.0f}: {count} images"></div>'
        for bar, count in enumerate(counts)
    )
    return [
        f"<h2>{_title(metric)} by image</h2>",
        f'<div class="histogram" role="img" aria-label="Number of images by {_title(metric)}">{drawn}</div>',
        f'<div class="axis dim"><span>0</span><span>{100 * top:.0f}</span></div>',
        f'<p class="dim">The highest bar is {max(counts):,} images; '
        f"{sum(100 * value < 0.05 for value in values):,} have 0.0.</p>",
    ]
