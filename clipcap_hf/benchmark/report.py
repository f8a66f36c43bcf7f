"""A report of `measure_speed` as a table and as a picture."""

from pathlib import Path
from typing import Any


def report_table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    limits = report["limits"]
    compiled = f", torch.compile {report['compile_mode']}" if report["compile_mode"] else ""
    lines = [
        f"{report['device']}, {report['threads']} threads, {report['dtype']}{compiled}: "
        f"{limits['matmul_flops'] / 1e9:.0f} GFLOP/s, {limits['read_bytes'] / 1e9:.1f} GB/s; medians of "
        f"{report['repeats']} rounds (min to max). ViT-B/32 and the shape of {report['language_model']}, random weights.",
        "",
        "| decoding | new tokens | batch | captions/s | naive | times as fast | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["captioning"]:
        ratio = row["ratio"]
        lines.append(
            f"| {'greedy' if row['beams'] == 1 else str(row['beams']) + ' beams'} | {row['new_tokens']} | {row['batch']} "
            f"| {row['captions_per_second']['median']:.1f} | {row['naive_captions_per_second']['median']:.2f} "
            f"| **{ratio['median']:.1f}** ({ratio['min']:.1f} to {ratio['max']:.1f}) "
            f"| {row['share_of_limit']:.0%} ({row['limit']}) |"
        )
    lines += ["", "| stage | images/s |", "|---|---|"]
    for row in report["stages"]:
        rate = row["images_per_second"]
        lines.append(f"| {row['stage']} | {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) |")
    if files := report["files"]:
        lines += [
            "",
            f"{files['files']} JPEG files of 640 x 480, read by {files['workers']} workers: "
            f"{files['images_per_second']:.1f} images/s, {files['share_of_bound']:.0%} of what the stages allow together "
            f"({files['bound_images_per_second']:.1f}), {files['images_per_second'] / files['slowest_stage_images_per_second']:.0%} "
            f"of the slower of model and reading alone; first caption after {files['seconds_to_first_caption']:.2f} s; memory grew by "
            f"{files['memory_growth_bytes'] / 1e6:.0f} MB in the last three quarters.",
        ]
    if report["scale"]:
        lines += ["", "| setting | ms a caption |", "|---|---|"]
        for name in dict.fromkeys(row["setting"] for row in report["scale"]):
            rows = [row for row in report["scale"] if row["setting"] == name]
            values = ", ".join(f"{row['value']}: {row['ms_per_caption']['median']:.0f}" for row in rows)
            lines.append(f"| {name} | {values} |")
    lines += ["", f"Peak memory {report['peak_memory_bytes'] / 2**30:.1f} GiB."]
    return "\n".join(lines)


def draw_report(path: str | Path, report: dict[str, Any]) -> bool:
    """Draw captions per second beside the naive way, and how cost grows; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, growth = figure.subplots(1, 2)
    rows = report["captioning"]
    labels = [
        f"{'greedy' if row['beams'] == 1 else str(row['beams']) + ' beams'}, {row['new_tokens']} tokens, batch {row['batch']}"
        for row in rows
    ]
    places = range(len(rows))
    bars.barh(places, [row["captions_per_second"]["median"] for row in rows], color="#2a7f62", label="clipcap_hf")
    naive = [row["naive_captions_per_second"]["median"] for row in rows]
    bars.barh(places, naive, color="#c44536", height=0.4, label="naive")
    for place, row in zip(places, rows):
        rate = row["captions_per_second"]["median"]
        bars.text(rate * 1.05, place, f"{row['ratio']['median']:.1f} times", va="center", fontsize=8)
    bars.set_yticks(places, labels, fontsize=8)
    bars.invert_yaxis()
    bars.set_xscale("log")
    bars.margins(x=0.25)
    bars.set_xlabel("captions per second")
    bars.legend(loc="lower right", fontsize=8)
    for name in dict.fromkeys(row["setting"] for row in report["scale"]):
        series = [row for row in report["scale"] if row["setting"] == name]
        growth.plot(
            [row["value"] for row in series],
            [row["ms_per_caption"]["median"] for row in series],
            marker="o",
            label=name.replace("_", " "),
        )
    growth.set_xscale("log", base=2)
    growth.set_yscale("log")
    for axis in (bars.xaxis, growth.xaxis, growth.yaxis):
        axis.set_major_formatter("{x:g}")
    growth.yaxis.set_minor_formatter("{x:g}")
    growth.set_xlabel("value (the others: prefix 10, 10 tokens, batch 8, greedy)")
    growth.set_ylabel("milliseconds a caption")
    if report["scale"]:
        growth.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return True
