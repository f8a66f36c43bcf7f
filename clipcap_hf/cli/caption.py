"""`clipcap caption`"""

import argparse
import json
import os
import sys

from .arguments import add_device_arguments, load_captioner, not_negative, positive


def add_parser(commands):
    caption = commands.add_parser(
        "caption",
        help="caption image files",
        description="Prints a line for each image, in order: the path, a tab, the caption. Files that cannot be read are "
        "listed on standard error, and the exit status is then 1. Under torchrun the processes divide the images, and the "
        "first prints for all.",
    )
    caption.add_argument("paths", nargs="+", metavar="PATH", help="image files, folders or glob patterns")
    caption.add_argument(
        "--model",
        default="emoji-mini",
        help="a folder, a Hub id, emoji-mini, the embedded captioner of emoji drawings, or photo-mini, one of photographs "
        "(default: %(default)s)",
    )
    caption.add_argument(
        "--beams", type=positive, default=1, metavar="N", help="beam search with N beams (default: greedy)"
    )
    caption.add_argument(
        "--captions", type=positive, default=1, metavar="N", help="print the N best captions, tab-separated"
    )
    caption.add_argument("--prompt", help="a beginning that every caption continues")
    caption.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest caption, in tokens")
    caption.add_argument(
        "--explain",
        type=_number_of_tokens,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="below each caption, the N vocabulary tokens nearest to each prefix vector, with their cosines (default: 1)",
    )
    caption.add_argument("--json", action="store_true", help='print {"image": ..., "captions": [...]} lines')
    caption.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images at once (default: %(default)s)"
    )
    caption.add_argument(
        "--workers", type=not_negative, metavar="N", help="processes that read images (default: by their number)"
    )
    add_device_arguments(caption)
    caption.set_defaults(run=run)


def _number_of_tokens(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens; images stand before --explain")
    return positive(text)


def run(arguments) -> int:
    from ..captioning import caption_files
    from ..files import find_images
    from ..processes import process_state

    paths, errors = find_images(arguments.paths)
    failed = bool(errors)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may hold any bytes
        sys.stdout.reconfigure(errors="surrogateescape")
    speaks = process_state().is_main_process  # under torchrun, for all
    for error in errors if speaks else ():
        print(f"clipcap: {error}", file=sys.stderr)
    if not paths:
        return 1
    model, processor = load_captioner(arguments.model, arguments.device, arguments.dtype)
    workers = arguments.workers
    if workers is None:
        # Starting a process costs as much as reading some dozens of images.
        workers = 0 if len(paths) < 64 else min(4, os.cpu_count() or 1)
    generate_kwargs = {
        "num_beams": max(arguments.beams, arguments.captions),
        "num_return_sequences": arguments.captions,
    }
    if arguments.max_new_tokens:
        generate_kwargs["max_new_tokens"] = arguments.max_new_tokens
    results = caption_files(
        model,
        processor,
        paths,
        batch_size=arguments.batch_size,
        num_workers=workers,
        prompt=arguments.prompt,
        explain=arguments.explain,
        progress=sys.stderr.isatty() and len(paths) > arguments.batch_size,
        **generate_kwargs,
    )
    for result in results:
        if not speaks:
            continue
        if result.error:
            failed = True
            print(f"clipcap: {result.error}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps(_record(result), ensure_ascii=False), flush=True)
        else:
            print(result.path, *result.captions, sep="\t", flush=True)
            for number, tokens in enumerate(result.prefix_tokens or [], start=1):
                print(f"  {number}", *(f"{token!r} {cosine:.3f}" for token, cosine in tokens), sep="\t", flush=True)
    # torchrun kills the other processes as soon as one fails, and the first may still have lines to print.
    return int(failed and speaks)


def _record(result) -> dict:
    record = {"image": result.path, "captions": result.captions}
    if result.prefix_tokens is not None:
        record["prefix"] = [
            [{"token": token, "cosine": round(cosine, 4)} for token, cosine in tokens]
            for tokens in result.prefix_tokens
        ]
    return record
