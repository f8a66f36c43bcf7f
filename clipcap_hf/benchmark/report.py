"""Show a report of `measure_speed` as a table and as a picture."""

from pathlib import Path
from typing import Any


def report_table(report: dict[str, Any]) -> str:
    """Format the report as Markdown."""
    lines = [*_heading(report), *_captioning(report), *_stages(report)]
    if report["files"]:
        lines += ["", _files(report["files"])]
    if report["scale"]:
        lines += _scale(report)
    return "\n".join([*lines, "", f"Peak memory {report['peak_memory_bytes'] / 2**30:.1f} GiB."])


def _heading(report: dict[str, Any]) -> list[str]:
    limits = report["limits"]
    compiled = f", torch.compile {report['compile_mode']}" if report["compile_mode"] else ""
    return [
        f"{report['device']}, {report['threads']} threads, {report['dtype']}{compiled}: "
        f"{limits['matmul_flops'] / 1e9:.0f} GFLOP/s, {limits['read_bytes'] / 1e9:.1f} GB/s; medians of "
        f"{report['repeats']} rounds (min to max). ViT-B/32 and the shape of {report['language_model']}, random "
        "weights.",
        "",
    ]


def _captioning(report: dict[str, Any]) -> list[str]:
    lines = [
        "| decoding | new tokens | batch | captions/s | naive | times as fast | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["captioning"]:
        ratio = row["ratio"]
        lines.append(
            f"| {_decoding(row)} | {row['new_tokens']} | {row['batch']} "
            f"| {row['captions_per_second']['median']:.1f} | {row['naive_captions_per_second']['median']:.2f} "
            f"| **{ratio['median']:.1f}** ({ratio['min']:.1f} to {ratio['max']:.1f}) "
            f"| {row['share_of_limit']:.0%} ({row['limit']}) |"
        )
    return lines


def _decoding(row: dict[str, Any]) -> str:
    return "greedy" if row["beams"] == 1 else f"{row['beams']} beams"


def _stages(report: dict[str, Any]) -> list[str]:
    rates = [(row["stage"], row["images_per_second"]) for row in report["stages"]]
    return ["", "| stage | images/s |", "|---|---|"] + [
        f"| {stage} | {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) |" for stage, rate in rates
    ]


def _files(files: dict[str, Any]) -> str:
    of_slower = files["images_per_second"] / files["slowest_stage_images_per_second"]
    readers = f"{files['workers']} processes" if files["workers"] else "threads"
    return (
        f"{files['files']} JPEG files of 640 x 480, read by {readers}: "
        f"{files['images_per_second']:.1f} images/s, {files['share_of_bound']:.0%} of what the stages allow together "
        f"({files['bound_images_per_second']:.1f}), {of_slower:.0%} of the slower of model and reading alone; first "
        f"caption after {files['seconds_to_first_caption']:.2f} s; memory grew by "
        f"{files['memory_growth_bytes'] / 1e6:.0f} MB in the last three quarters."
    )


def _scale(report: dict[str, Any]) -> list[str]:
    lines = ["", "| setting | ms per caption |", "|---|---|"]
    for name in dict.fromkeys(row["setting"] for row in report["scale"]):
        rows = [row for row in report["scale"] if row["setting"] == name]
        values = ", ".join(f"{row['value']}: {row['ms_per_caption']['median']:.0f}" for row in rows)
        lines.append(f"| {name} | {values} |")
    return lines


def draw_report(path: str | Path, report: dict[str, Any]) -> bool:
    """Draw captions per second, ours and naive, and how cost grows; return False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, growth = figure.subplots(1, 2)
    _draw_captioning(bars, report["captioning"])
    _draw_growth(growth, report["scale"])
    figure.savefig(path, dpi=130)
    return True


def _draw_captioning(axes, rows: list[dict[str, Any]]) -> None:
    labels = [f"{_decoding(row)}, {row['new_tokens']} tokens, batch {row['batch']}" for row in rows]
    places = range(len(rows))
    axes.barh(places, [row["captions_per_second"]["median"] for row in rows], color="#2a7f62", label="clipcap_hf")
    naive = [row["naive_captions_per_second"]["median"] for row in rows]
    axes.barh(places, naive, color="#c44536", height=0.4, label="naive")
    for place, row in zip(places, rows):
        rate = row["captions_per_second"]["median"]
        axes.text(rate * 1.05, place, f"{row['ratio']['median']:.1f} times", va="center", fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("captions per second")
    axes.legend(loc="lower right", fontsize=8)


def _draw_growth(axes, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["setting"] for row in rows):
        series = [row for row in rows if row["setting"] == name]
        values, costs = zip(*((row["value"], row["ms_per_caption"]["median"]) for row in series))
        axes.plot(values, costs, marker="o", label=name.replace("_", " "))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("value (the others: prefix 10, 10 tokens, batch 8, greedy)")
    axes.set_ylabel("milliseconds per caption")
    if rows:
        axes.legend(fontsize=8)
