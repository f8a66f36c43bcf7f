"""The `clipcap` command."""

import argparse
import os
import sys

from . import benchmark, caption, convert, demo, embed, evaluate, export, serve, train


# Each has `add_parser(commands)`, and imports what is slow to import when it runs.
COMMANDS = (demo, caption, train, embed, evaluate, serve, convert, export, benchmark)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough of it (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        # What a user can mend; anything else is a fault of ours and keeps its traceback.
        print(f"clipcap: {error}", file=sys.stderr)
        return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clipcap", description="Image captioning with ClipCap.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
