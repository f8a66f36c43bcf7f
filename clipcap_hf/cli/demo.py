"""The command `clipcap demo`."""

from pathlib import Path

from .arguments import positive, seed
from .output import show_runs


def add_parser(commands):
    demo = commands.add_parser(
        "demo",
        usage="clipcap demo [OPTION ...]",
        help="train a captioner of emoji from scratch, offline, in minutes",
        description="Encodes the embedded emoji drawings with the embedded image tower, trains a captioner from "
        "scratch, scores it on two held-out splits next to baselines, and saves it with a picture of its captions.",
    )
    demo.add_argument(
        "--out", default="clipcap-demo", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    demo.add_argument(
        "--language", choices=["en", "ja"], default="en", help="language of the captions (default: %(default)s)"
    )
    demo.add_argument("--seed", type=seed, default=0, help="seed of the training (default: %(default)s)")
    demo.add_argument(
        "--epochs", type=positive, help="passes over the training set (default: as many as fit into a few minutes)"
    )
    demo.set_defaults(run=run)


def run(arguments) -> int:
    from ..demo import run_demo, summary

    show_runs()
    kwargs = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    report = run_demo(arguments.out, language=arguments.language, seed=arguments.seed, **kwargs)
    print(summary(Path(arguments.out), report))
    return 0
