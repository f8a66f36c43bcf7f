"""Format the results of `clipcap serve`: HTML cards and a table to download."""

import base64
import csv
import html
import io
import math

from PIL import Image, ImageOps

from .captioning import CaptionedImage
from .drawings import other_kind


STYLE = """
.clipcap-results {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem}
.clipcap-card {border: 1px solid var(--border-color-primary, #ccc); border-radius: 10px}
.clipcap-card {padding: .8rem; overflow: hidden}
.clipcap-card img {display: block; max-width: 100%; max-height: 15rem; margin: 0 auto .6rem; border-radius: 6px}
.clipcap-card .file {font-size: .8rem; opacity: .7; overflow-wrap: anywhere}
.clipcap-card .caption {display: flex; justify-content: space-between; gap: 1rem; font-size: 1.05rem; margin: .35rem 0}
.clipcap-card .probability {opacity: .7; white-space: nowrap; font-variant-numeric: tabular-nums}
.clipcap-card .note {font-size: .85rem; color: #8a5a00}
.clipcap-card .error {color: #b3261e; overflow-wrap: anywhere}
.clipcap-card table {font-size: .85rem; width: 100%; border-collapse: collapse}
.clipcap-card td {padding: .1rem .4rem .1rem 0; border: none}
.clipcap-take {display: flex; gap: 1.2rem; margin-bottom: .6rem}
.clipcap-take button, .clipcap-take a {text-decoration: underline; cursor: pointer}
"""


def results_page(results: list[tuple[CaptionedImage, str | None]], knows: str | None = None) -> str:
    """Show captioned images as HTML, those marked that look unlike what the captioner knows.

    Everything that a visitor sent is escaped.
    """
    cards = "".join(_card(*result, knows) for result in results)
    return f'{_copy_and_csv([result for result, _ in results])}<div class="clipcap-results">{cards}</div>'


def _copy_and_csv(results: list[CaptionedImage]) -> str:
    captions = "\n".join(caption for result in results for caption in result.captions)
    if not captions:
        return ""
    table = base64.b64encode(results_csv(results).encode("utf-8-sig")).decode()  # the mark lets Excel read UTF-8
    return (
        f'<div class="clipcap-take"><button data-captions="{html.escape(captions)}" '
        "onclick=\"navigator.clipboard.writeText(this.dataset.captions).then(() => this.textContent = 'Copied')\">"
        f'Copy captions</button><a download="captions.csv" href="data:text/csv;base64,{table}">Download CSV</a></div>'
    )


def results_csv(results: list[CaptionedImage]) -> str:
    """Write a table of file, caption, probability and error, one row per caption or error."""
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(["file", "caption", "probability", "error"])
    for result in results:
        if result.error:
            table.writerow([result.path, "", "", result.error])
        for caption, score in zip(result.captions, result.scores or []):
            table.writerow([result.path, caption, f"{math.exp(score):.4f}", ""])
    return file.getvalue()


def _card(result: CaptionedImage, thumbnail: str | None, knows: str | None) -> str:
    parts = []
    if thumbnail:
        parts.append(f'<img src="{thumbnail}" alt="{html.escape(result.path)}">')
    if result.error:
        parts.append(f'<div class="error">{html.escape(result.error)}</div>')
        return f'<div class="clipcap-card">{"".join(parts)}</div>'
    parts.append(f'<div class="file">{html.escape(result.path)}</div>')
    if other := other_kind(knows, result.drawn):
        parts.append(f'<div class="note">Looks like a {other}; this captioner knows {knows}s only.</div>')
    for caption, score in zip(result.captions, result.scores):
        parts.append(
            f'<div class="caption"><span>{html.escape(caption) or "<i>no words</i>"}</span>'
            f'<span class="probability" title="mean probability per token">{math.exp(score):.0%}</span></div>'
        )
    rows = "".join(
        f"<tr><td>{number}</td>"
        + "".join(f"<td>{html.escape(token) or '&nbsp;'} <small>{cosine:.2f}</small></td>" for token, cosine in tokens)
        + "</tr>"
        for number, tokens in enumerate(result.prefix_tokens, start=1)
    )
    parts.append(f"<details><summary>Tokens nearest to each prefix vector</summary><table>{rows}</table></details>")
    return f'<div class="clipcap-card">{"".join(parts)}</div>'


def thumbnail(image: Image.Image) -> str:
    """Make a small picture as a data URL."""
    file = io.BytesIO()
    ImageOps.contain(image, (320, 320)).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
