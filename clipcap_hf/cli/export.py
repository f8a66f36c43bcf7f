"""The command `clipcap export`."""

import argparse

from .arguments import add_model_argument


def add_parser(commands):
    export = commands.add_parser("export", help="write a captioner for other runtimes")
    kinds = export.add_subparsers(dest="kind", required=True, metavar="KIND")
    onnx = kinds.add_parser(
        "onnx",
        help="two ONNX graphs, for onnxruntime",
        usage="clipcap export onnx --model NAME --out DIR [OPTION ...]",
        description="Writes encoder.onnx (pixels to prefix), decoder.onnx (one decoding step of the language model, "
        "with its cache) and everything else that clipcap_hf.export.OnnxCaptioner needs.",
    )
    onnx.add_argument("folder", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)  # as it was called at first
    add_model_argument(onnx)
    onnx.add_argument("--out", required=True, metavar="DIR", help="folder for the files; must not exist")
    onnx.add_argument("--int8", action="store_true", help="quantise the matrix products to 8 bits")
    onnx.set_defaults(run=run, check=check)


def check(arguments):
    """Find the captioner's name, which stands with `--model` or alone."""
    if (arguments.model is None) == (arguments.folder is None):
        arguments.parser.error("give the captioner once: --model NAME")
    arguments.model = arguments.model or arguments.folder


def run(arguments) -> int:
    from ..export import export_onnx
    from .arguments import load_captioner

    model, processor = load_captioner(arguments.model, "cpu", prepack=False)
    folder = export_onnx(model.float(), processor, arguments.out, int8=arguments.int8)
    for path in sorted(folder.glob("*.onnx*")):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
