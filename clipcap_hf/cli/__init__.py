"""The `clipcap` command."""

import argparse
import gc
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .. import __version__
from . import benchmark, caption, completion, convert, demo, embed, evaluate, export, reproduce, serve, train
from .output import escape, make_streams_safe, message_lines
from .parser import Parser, one_spelling


# Each has `add_parser(commands)`, and postpones slow imports until it runs; a default `check` comes before them.
COMMANDS = (demo, caption, train, embed, evaluate, reproduce, serve, convert, export, benchmark, completion)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = _parse(argv)
    if sys.stdout is None:  # closed by the caller (`>&-`); print() would silently drop everything
        print("clipcap: standard output is closed", file=sys.stderr)
        return 1
    make_streams_safe()
    try:
        if hasattr(arguments, "check"):
            arguments.check(arguments)  # what can be found out before anything slow is imported
        with _collecting_seldom():
            if getattr(arguments, "loads_models", True):
                _import_package()
            status = arguments.run(arguments)
        sys.stdout.flush()  # here, where a full disk still gives an error message
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has stopped (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if arguments.debug:
            raise
        print(f"clipcap: {_message(error)}", file=sys.stderr)
        return 1


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Look for garbage after 20,000 new objects, not 700: imports make a million that stay, and each look costs."""
    before = gc.get_threshold()
    gc.set_threshold(20_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    words = one_spelling(sys.argv[1:] if argv is None else list(argv))
    arguments, unknown = build_parser().parse_known_args(words)
    if unknown:
        arguments.parser.unknown(unknown)  # of the command, which prints its usage
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands, without slow imports."""
    parser = Parser(
        prog="clipcap", usage="clipcap [--version] COMMAND [OPTION ...]", description="Image captioning with ClipCap."
    )
    parser.add_argument("--version", action="version", version=f"clipcap {__version__}")
    parser.add_argument("--debug", action="store_true", help="on an error, print the traceback")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="clipcap")
    for command in COMMANDS:
        command.add_parser(commands)
    for leaf in leaves(parser):
        leaf.set_defaults(parser=leaf)
        if "--debug" not in leaf._option_string_actions:  # `train` has the Trainer's
            leaf.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="on an error, print the traceback"
            )
    return parser


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of all commands that have no subcommands."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return [parser]
    return [leaf for action in below for each in action.choices.values() for leaf in leaves(each)]


def _import_package():
    """Register the classes with transformers, and make sure that no model folder can run code."""
    from transformers import dynamic_module_utils

    from .. import _public  # noqa: F401

    # If a load does not pass `trust_remote_code`, transformers asks on standard input and accepts a piped "y". With no
    # time to answer, it refuses.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def _message(error: Exception) -> str:
    """Say in one line what went wrong; for an unexpected error, add how to see the traceback."""
    text = str(error).strip()
    if "execute" in text and "trust_remote_code" in text:
        return (
            "the model's folder or repository brings its own Python code, which the command line never runs. If you "
            "trust it, load it in Python with `trust_remote_code=True`."
        )
    if isinstance(error, pickle.UnpicklingError):  # its own text advises unsafe loading
        text = "a file of weights is damaged or holds more than tensors; it was not loaded"
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, which has not been imported here
        text = "out of memory on the accelerator: use a smaller --batch-size or --dtype bfloat16"
    elif isinstance(error, MemoryError):
        text = f"out of memory {text}".strip()
    elif not isinstance(error, (ValueError, OSError, ImportError)):
        # An unexpected error, whose text may say little.
        text = f"{type(error).__name__}: {escape(text)} (--debug prints the traceback)"
    return message_lines(text or type(error).__name__)
