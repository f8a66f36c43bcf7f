"""The command `clipcap benchmark`."""

import json
import sys
from pathlib import Path

from ..extras import install_hint
from ..files import write_text
from .arguments import add_beams_argument, add_device_arguments, not_negative, pick_device, positive


def add_parser(commands):
    benchmark = commands.add_parser(
        "benchmark",
        usage="clipcap benchmark [OPTION ...]",
        help="measure how fast this machine captions",
        description="Captions at real sizes with random weights, stage by stage and as a whole, compared with a naive "
        "way (one image at a time, no cache) and the lower bound set by memory bandwidth or matmul speed. Prints a "
        "table and writes benchmark.json and benchmark.png.",
    )
    benchmark.add_argument(
        "--out", default="clipcap-benchmark", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    benchmark.add_argument(
        "--overwrite", action="store_true", help="also replace files in --out that clipcap benchmark did not write"
    )
    benchmark.add_argument(
        "--language-model",
        choices=["gpt2", "smollm2", "tiny"],
        default="gpt2",
        help="shape of the language model (default: %(default)s)",
    )
    for name, default, what in (
        ("batch-sizes", [1, 64], "images at once in greedy decoding"),
        ("beam-batch-sizes", [32], "images at once in beam search"),
        ("new-tokens", [10, 20], "lengths of the captions"),
    ):
        benchmark.add_argument(f"--{name}", type=positive, nargs="+", default=default, metavar="N", help=what)
    add_beams_argument(benchmark, default=5)
    benchmark.add_argument("--repeats", type=positive, default=3, metavar="N", help="rounds (default: %(default)s)")
    benchmark.add_argument(
        "--files",
        type=not_negative,
        default=2000,
        metavar="N",
        help="JPEG files to caption; 0 for none (default: %(default)s)",
    )
    benchmark.add_argument("--no-scale", action="store_true", help="do not measure how cost grows")
    add_device_arguments(benchmark, default="float32", default_dtype="float32")
    benchmark.add_argument(
        "--compile",
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        metavar="MODE",
        help="decode with a static cache and torch.compile: reduce-overhead, default",
    )
    benchmark.set_defaults(run=run)


def run(arguments) -> int:
    import torch
    from transformers.utils import logging

    from ..benchmark import draw_report, measure_speed, report_table

    out = Path(arguments.out)
    _check_folder(out, arguments.overwrite)
    logging.set_verbosity_error()
    report = measure_speed(
        language_model=arguments.language_model,
        batch_sizes=arguments.batch_sizes,
        beam_batch_sizes=arguments.beam_batch_sizes,
        num_beams=arguments.beams,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        device=str(pick_device(arguments.device)),
        dtype=getattr(torch, arguments.dtype),
        compile_mode=arguments.compile,
        files=arguments.files,
        scale=not arguments.no_scale,
        progress=sys.stderr.isatty(),
    )
    write_text(out / "benchmark.json", json.dumps(report, indent=2) + "\n")
    print(report_table(report))
    if not draw_report(out / "benchmark.png", report):
        print(f"clipcap: no picture without matplotlib: {install_hint('train')}", file=sys.stderr)
    return 0


def _check_folder(out: Path, overwrite: bool):
    """Refuse to replace results that `clipcap benchmark` did not write."""
    from ..benchmark.measure import WRITTEN_BY

    try:
        report = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    ours = isinstance(report, dict) and report.get("written_by") == WRITTEN_BY
    foreign = [name for name in ("benchmark.json", "benchmark.png") if (out / name).exists()]
    if foreign and not ours and not overwrite:
        raise ValueError(
            f"{out} has files that {WRITTEN_BY} did not write: {', '.join(foreign)}. Name another folder by --out, or "
            "replace them with --overwrite."
        )
