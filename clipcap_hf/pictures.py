"""Pictures: images with their captions, and the curve of a training run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .assets import FONT
from .files import whole_file


def draw_captions(
    path: str | Path,
    data: Mapping,
    captions: Mapping[str, list[str]],
    titles: Mapping[str, str] | None = None,
    per_split: int = 18,
    columns: int = 6,
):
    """Draw a grid of images from each split, with caption (green if correct) and reference below each.

    Args:
        path (`str` or `Path`): The PNG file to write.
        data (`Mapping`): Rows of each split, with the columns `image` and `captions`.
        captions (`Mapping[str, list[str]]`): The captioner's caption for each row.
        titles (`Mapping[str, str]`, *optional*): Titles of the splits.
        per_split (`int`): Images to draw from each split, evenly spread.
        columns (`int`): Images per row of the grid.
    """
    cell_width, cell_height, size, margin = 270, 206, 128, 10
    picked = {split: _evenly(len(texts), per_split) for split, texts in captions.items()}
    rows = sum(-(-len(indices) // columns) for indices in picked.values())
    title_height = 34
    grid = Image.new("RGB", (columns * cell_width, rows * cell_height + len(captions) * title_height), "white")
    draw = ImageDraw.Draw(grid)
    # The basic layout draws any text that an untrained captioner may write; Raqm refuses some.
    font, title_font = (
        ImageFont.truetype(str(FONT), points, layout_engine=ImageFont.Layout.BASIC) for points in (13, 18)
    )
    top = 0
    for split, texts in captions.items():
        draw.text((margin, top + 8), (titles or {}).get(split, split), fill="black", font=title_font)
        top += title_height
        for cell, index in enumerate(picked[split]):
            row = data[split][index]
            x, y = (cell % columns) * cell_width, top + (cell // columns) * cell_height
            image = ImageOps.pad(row["image"].convert("RGB"), (size, size), color="white")
            grid.paste(image, (x + (cell_width - size) // 2, y + 4))
            right = texts[index] in row["captions"]
            lines = [(texts[index], "#137333" if right else "#b3261e"), (row["captions"][0], "#5f6368")]
            for line, (text, colour) in enumerate(lines):
                text = _fit(text, font, cell_width - margin)
                draw.text((x + cell_width / 2, y + size + 10 + 24 * line), text, fill=colour, font=font, anchor="ma")
        top += -(-len(picked[split]) // columns) * cell_height
    with whole_file(path) as scratch:
        grid.save(scratch, format="PNG")


def _evenly(length: int, limit: int) -> list[int]:
    return torch.linspace(0, length - 1, min(limit, length)).long().tolist()


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def draw_curve(path: str | Path, log_history: list[dict], metric: str = "cider") -> bool:
    """Draw the losses and a metric over the training steps.

    Args:
        path (`str` or `Path`): The PNG file to write.
        log_history (`list[dict]`): `trainer.state.log_history`.
        metric (`str`): Metric that evaluation logged as `eval_METRIC`.

    Returns:
        `bool`: Whether the curve was drawn, which needs matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.add_subplot()
    for key, label, style in (("loss", "training loss", "-"), ("eval_loss", "held-out loss", "o-")):
        if points := [(entry["step"], entry[key]) for entry in log_history if key in entry]:
            losses.plot(*zip(*points), style, label=label, markersize=4)
    losses.set(xlabel="step", ylabel="loss")
    handles, labels = losses.get_legend_handles_labels()
    if points := [(entry["step"], entry[f"eval_{metric}"]) for entry in log_history if f"eval_{metric}" in entry]:
        name = {"cider": "CIDEr"}.get(metric, metric)
        scores = losses.twinx()
        scores.plot(*zip(*points), "s--", color="tab:green", label=name, markersize=4)
        scores.set(ylabel=name)
        handles, labels = handles + scores.lines, [*labels, name]
    if handles:
        # Above the axes, where no curve runs through it.
        losses.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    return True
