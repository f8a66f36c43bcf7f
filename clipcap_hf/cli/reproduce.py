"""Reproduce the paper's tables: `clipcap reproduce`."""

import argparse
import logging
import sys
from pathlib import Path

from .arguments import add_device_arguments, positive, workers
from .output import show_runs


def add_parser(commands):
    reproduce = commands.add_parser(
        "reproduce",
        help="reproduce the tables of the ClipCap paper, with one command",
        description="Checks the publishers' data, embeds the images once, trains by the paper's recipe, evaluates by "
        "each benchmark's protocol, and writes the table 'Claimed | Verified | Status' as Markdown, JSON and HTML. "
        "Run the same command again after an interruption; torchrun divides every stage over processes.",
    )
    _add_table_arguments(reproduce.add_argument_group("what is reproduced"))
    how = reproduce.add_argument_group("what the paper does not say")
    how.add_argument(
        "--choose",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="decoding, clip, lengths, normalize, epochs, language-model, captions-end (see the guide)",
    )
    how.add_argument("--grid", action="store_true", help="compare the alternatives, on the validation split alone")
    _add_rehearsal_arguments(reproduce.add_argument_group("before the real run"))
    _add_run_arguments(reproduce.add_argument_group("device and output"))
    reproduce.set_defaults(run=run)


def _add_table_arguments(what):
    what.add_argument(
        "--table",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="coco, conceptual-captions, nocaps or all; flickr8k, flickr30k and stair have no claim of the paper "
        "(default: all)",
    )
    what.add_argument(
        "--variant", choices=["mlp", "transformer", "all"], default="all", help="the paper's captioner (default: all)"
    )
    what.add_argument(
        "--data", metavar="ROOT", help="folder of the publishers' files; what is missing is listed first"
    )
    what.add_argument(
        "--from",
        dest="source",
        nargs="+",
        default=["train"],
        metavar="SOURCE",
        help="train; official-weights PATH, a .pt file or the folder of all; or checkpoint DIR (default: train)",
    )
    what.add_argument(
        "--trained-on", metavar="TABLE", help="what a checkpoint, or weights of another name, were trained on"
    )
    what.add_argument("--results", metavar="FILE", help="score an existing results file of one table and variant")
    what.add_argument("--seeds", type=positive, default=1, metavar="N", help="captioners to train (default: 1)")


def _add_rehearsal_arguments(first):
    first.add_argument(
        "--rehearse",
        nargs="?",
        const="",
        metavar="FLICKR8K",
        help="run every stage on small made-up data, from emoji or from Flickr8k's files in this folder",
    )
    first.add_argument("--estimate", action="store_true", help="measure this device and print the hours of each stage")
    first.add_argument("--max-steps", type=positive, metavar="N", help="train so few steps, which is no reproduction")
    first.add_argument("--limit", type=positive, metavar="N", help="caption so few images, which is no reproduction")
    first.add_argument(
        "--allow-subset", action="store_true", help="score a part where images are missing, which is no reproduction"
    )


def _add_run_arguments(where):
    add_device_arguments(where)
    where.add_argument("--compile", action="store_true", help="compile the model for training")
    where.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at once (default: 32)")
    where.add_argument("--workers", type=workers, metavar="N", help="processes that read images")
    where.add_argument(
        "--tokenizer", choices=["ptb", "python"], help="python needs no Java, and is no reproduction (default: ptb)"
    )
    where.add_argument("--spice-home", metavar="DIR", help="folder with the jars of SPICE")
    where.add_argument(
        "--update-card", action="store_true", help="write the numbers into the card of --from checkpoint"
    )
    where.add_argument(
        "--out", default="clipcap-reproduction", metavar="DIR", help="folder for everything (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..metrics import JavaError
    from ..processes import process_state
    from ..reproduce import Settings, reproduce
    from ..reproduce.choices import read_choices

    _show_progress()
    source, path = _source(arguments)
    settings = {
        "tables": tuple(arguments.table),
        "variants": (arguments.variant,),
        "out": arguments.out,
        "source": source,
        "path": path,
        "trained_on": arguments.trained_on,
        "seeds": arguments.seeds,
        "chosen": read_choices(arguments.choose),
        "grid": arguments.grid,
        "training": {} if arguments.max_steps is None else {"max_steps": arguments.max_steps},
        "limit": arguments.limit,
        "tokenizer": None if arguments.tokenizer == "ptb" else arguments.tokenizer,
        "allow_subset": arguments.allow_subset,
        "device": arguments.device,
        "dtype": arguments.dtype or "float32",
        "compile": arguments.compile,
        "batch_size": arguments.batch_size,
        "workers": arguments.workers,
        "spice_home": arguments.spice_home,
        "update_card": arguments.update_card,
    }
    if arguments.estimate:
        return _estimate(Settings(**settings, data=arguments.data or "."))
    try:
        if arguments.rehearse is None:
            prepared = Settings(**settings, data=arguments.data)
        else:
            from ..reproduce.rehearsal import rehearsal_settings

            prepared = rehearsal_settings(Settings(**settings, data="."), arguments.rehearse or None)
        rows = reproduce(prepared)
    except KeyboardInterrupt:
        print("clipcap: interrupted; the same command goes on from here", file=sys.stderr)
        raise
    except JavaError as error:
        raise ValueError(error) from error
    if process_state().is_main_process:
        _show(prepared, rows)
    return 0


def _source(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """Return where the captions come from, and the path of it."""
    words = arguments.source
    if arguments.results is not None:
        if words != ["train"]:
            raise ValueError("--results is a file of captions already: leave out --from")
        return "results", arguments.results
    wanted = 1 if words[0] == "train" else 2
    if len(words) != wanted:
        raise ValueError("--from is train, official-weights PATH or checkpoint DIR")
    return words[0], words[1] if wanted == 2 else None


def _estimate(settings) -> int:
    from ..reproduce.estimate import estimate, estimate_text

    print(estimate_text(estimate(settings)))
    return 0


def _show(settings, rows):
    from ..reproduce.table import FILES, markdown

    out = Path(settings.out)
    if settings.grid:
        print((out / "grid.md").read_text(encoding="utf-8"))
        return
    print(markdown(settings, rows))
    print("Written: " + ", ".join(str(out / name) for name in (*FILES, "record.json")))
    if settings.rehearsal:
        print("The rehearsal is done: every stage ran. On the publishers' data: clipcap reproduce --data ROOT")


def _show_progress():
    """Show the losses of each training, which may take days, and none of what `clipcap train` says besides."""
    show_runs()
    logging.getLogger("clipcap_hf").setLevel(logging.WARNING)
    logging.getLogger("clipcap_hf.training.progress").setLevel(logging.INFO)


if __name__ == "__main__":  # torchrun -m clipcap_hf.cli.reproduce
    from . import main

    sys.exit(main(["reproduce", *sys.argv[1:]]))
