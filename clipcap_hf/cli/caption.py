"""The command `clipcap caption`."""

import argparse
import sys
from contextlib import nullcontext

from .arguments import (
    add_beams_argument,
    add_model_argument,
    add_reduce_jpeg_argument,
    add_rerank_arguments,
    add_speed_arguments,
    beams,
    check_rerank,
    load_captioner,
    load_reranker,
    positive,
)
from .output import escape, json_line


def add_parser(commands):
    caption = commands.add_parser(
        "caption",
        help="caption image files",
        usage="clipcap caption PATH [PATH ...] [OPTION ...]",
        description="Prints a line for each image, in order: the path, a tab, the caption; or writes them to a file "
        "with --out. Control characters are escaped. Files that cannot be read are listed on standard error, and the "
        "exit status is then 1. Under torchrun the processes divide the images, and the first prints for all.",
    )
    caption.add_argument("paths", nargs="+", metavar="PATH", help="image files, folders or glob patterns")
    add_model_argument(caption, default="photo-mini")
    decoding = caption.add_argument_group("captions")
    add_beams_argument(decoding, default="the captioner's own; 3 for photo-mini, 1 for most", reranks=True)
    decoding.add_argument("--captions", type=beams, default=1, metavar="N", help="give the N best captions per image")
    add_rerank_arguments(decoding)
    decoding.add_argument("--prompt", help="text that every caption continues")
    decoding.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest caption, in tokens")
    decoding.add_argument(
        "--explain",
        type=_number_of_tokens,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="below each caption, the N vocabulary tokens nearest to each prefix vector, with cosines (default: 1)",
    )
    output = caption.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help='print {"image": ..., "captions": [...]} lines in UTF-8; a byte of a name that is not UTF-8 becomes an '
        "escape (\\udc80 to \\udcff)",
    )
    output.add_argument("--out", metavar="FILE", help="write a .csv, .tsv or .jsonl file, line by line")
    output.add_argument("--sidecar", action="store_true", help="write a .txt file next to each image")
    output.add_argument(
        "--skip-existing",
        action="store_true",
        help="skip images that --out or --sidecar already have, for example after an interruption",
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing --out and --sidecar files")
    speed = caption.add_argument_group("speed")
    add_speed_arguments(speed)
    add_reduce_jpeg_argument(speed)
    caption.set_defaults(run=run, check=check)


def _number_of_tokens(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens; images go before --explain")
    return positive(text)


def run(arguments) -> int:
    from ..files import find_images, lock_file
    from ..processes import keep_freed_memory, process_state

    keep_freed_memory()
    paths, errors = find_images(arguments.paths)
    writes = process_state().is_main_process  # under torchrun one process writes for all
    for error in errors if writes else ():
        print(f"clipcap: {escape(error)}", file=sys.stderr)
    if not paths:
        return 1
    with lock_file(arguments.out) if arguments.out is not None and writes else nullcontext():
        return _run(arguments, paths, errors, writes)


def _run(arguments, paths: list[str], errors: list[str], writes: bool) -> int:
    table, sidecars = _open_outputs(arguments, paths)
    outputs = [output for output in (table, sidecars) if output is not None]
    todo = [path for path in paths if not outputs or any(path not in output for output in outputs)]
    failed = len(errors)
    if todo:
        model, processor = load_captioner(arguments.model, arguments.device, arguments.dtype)
        results = _caption(arguments, model, processor, todo)
        failed += _write(arguments, results, table, sidecars, writes)
    if outputs and writes:
        where = arguments.out or "sidecars"
        print(f"{where}: {len(todo) - failed + len(errors)} images captioned, {len(paths) - len(todo)} done before")
    # torchrun kills all processes when one fails, and the first may still have lines to print.
    return int(failed > 0 and writes)


def check(arguments):
    """Refuse options that do not go together."""
    check_rerank(arguments)
    keeps = arguments.out is not None or arguments.sidecar
    if (arguments.skip_existing or arguments.overwrite) and not keeps:
        raise ValueError("--skip-existing and --overwrite go with --out or --sidecar")
    if arguments.skip_existing and arguments.overwrite:
        raise ValueError("choose one of --skip-existing and --overwrite")
    if arguments.json and keeps:
        raise ValueError("--json prints; for a file use --out captions.jsonl")
    if arguments.explain and keeps and not str(arguments.out).endswith(".jsonl"):
        raise ValueError("--explain goes with printed captions or --out FILE.jsonl")


def _open_outputs(arguments, paths: list[str]):
    from .caption_output import CaptionTable, Sidecars

    existing = {"skip_existing": arguments.skip_existing, "overwrite": arguments.overwrite}
    table = CaptionTable(arguments.out, arguments.captions, **existing) if arguments.out is not None else None
    sidecars = Sidecars(paths, **existing) if arguments.sidecar else None
    return table, sidecars


def _caption(arguments, model, processor, paths: list[str]):
    from ..captioning import caption_files
    from ..drawings import KINDS
    from ..model.reranking_clipcap import DEFAULT_BEAMS
    from .arguments import reading_workers

    reranks = check_rerank(arguments)
    default = DEFAULT_BEAMS if reranks else model.generation_config.num_beams or 1
    generate_kwargs = {
        "num_beams": max(arguments.beams or default, arguments.captions),
        "num_return_sequences": arguments.captions,
    }
    if reranks:
        generate_kwargs["rerank"] = load_reranker(arguments, model, processor)
    if arguments.max_new_tokens:
        generate_kwargs["max_new_tokens"] = arguments.max_new_tokens
    return caption_files(
        model,
        processor,
        paths,
        batch_size=arguments.batch_size,
        num_workers=reading_workers(arguments.workers, len(paths), model.device),
        prompt=arguments.prompt,
        explain=arguments.explain,
        progress=sys.stderr.isatty() and len(paths) > arguments.batch_size,
        tell_drawings=arguments.model in KINDS,
        reduce_jpeg=arguments.reduce_jpeg,
        **generate_kwargs,
    )


def _write(arguments, results, table, sidecars, writes: bool) -> int:
    """Print or save each result as it comes, and return the number of images that could not be read."""
    from ..drawings import KINDS, other_kind

    failed, opened, unlike = 0, False, []
    try:
        for result in results:
            if not writes:
                continue
            if table is not None and not opened:
                table.open()  # only now, when the first captions exist, so that a failed start leaves the file alone
                opened = True
            if result.error:
                failed += 1
                print(f"clipcap: {escape(result.error)}", file=sys.stderr)
                continue
            if other_kind(KINDS.get(arguments.model), result.drawn):
                unlike.append(result.path)
            if table is not None and result.path not in table:
                table.add(result.path, result.captions, _record(result))
            if sidecars is not None and result.path not in sidecars:
                sidecars.add(result.path, result.captions)
            if table is None and sidecars is None:
                _print(arguments, result)
    finally:
        if table is not None:
            table.close()
    if unlike:
        _warn(arguments.model, unlike)
    return failed


def _warn(model: str, unlike: list[str]):
    """Say once which images are not of the kind that the embedded captioner knows."""
    from ..drawings import KINDS, other_kind
    from ..files import listed

    kind = KINDS[model]
    other = other_kind(kind, drawn=kind == "photograph")
    looks = f"looks like a {other}" if len(unlike) == 1 else f"look like {other}s"
    print(
        f"clipcap: {len(unlike)} of these images {looks}, but {model} knows {kind}s only, so the captions are "
        f"probably wrong: {listed([escape(path) for path in unlike], 3)}",
        file=sys.stderr,
    )


def _print(arguments, result):
    if arguments.json:
        print(json_line(_record(result)), flush=True)
        return
    print(escape(result.path), *map(escape, result.captions), sep="\t", flush=True)
    for number, tokens in enumerate(result.prefix_tokens or [], start=1):
        print(f"  {number}", *(f"{token!r} {cosine:.3f}" for token, cosine in tokens), sep="\t", flush=True)


def _record(result) -> dict:
    record = {"image": result.path, "captions": result.captions}
    if result.prefix_tokens is not None:
        record["prefix"] = [
            [{"token": token, "cosine": round(cosine, 4)} for token, cosine in tokens]
            for tokens in result.prefix_tokens
        ]
    return record
