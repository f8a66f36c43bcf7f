"""`clipcap train`: options from flags and recipe files, and what is shown of a run."""

import logging
import sys


def add_parser(commands):
    # HfArgumentParser, whose import takes seconds, reads all that follows `train`: with this prefix character nothing
    # looks like an option here.
    train = commands.add_parser("train", help="train a captioner on your images", add_help=False, prefix_chars="\0")
    train.add_argument("rest", nargs="*")
    train.set_defaults(run=run)


def run(arguments) -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("clipcap_hf").setLevel(logging.INFO)
    args = parse(arguments.rest)
    if not (args[2].verbose or args[2].log_level in ("debug", "info")):
        _quiet()
    from ..training.run import run_training

    run_training(*args)
    return 0


def _quiet():
    """Keep load reports and the bars of small steps of transformers and datasets from the user."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def parse(rest: list[str]) -> tuple:
    """Read the options of a run from flags, or from a YAML or JSON file and flags. Flags win."""
    from transformers import HfArgumentParser

    from ..training.arguments import CaptioningArguments, DataArguments, ModelArguments

    parser = HfArgumentParser(
        (ModelArguments, DataArguments, CaptioningArguments),
        prog="clipcap train",
        usage="clipcap train [RECIPE.yaml] --data DATA --output_dir DIR [OPTION ...]",
        description="Train a captioner and save it with its scores, a curve, sample captions and a verdict. Options "
        "come from a YAML or JSON file, from flags, or from both; flags win.",
    )
    if rest and rest[0].endswith((".yaml", ".yml", ".json")):
        parser.set_defaults(**_recipe(rest[0], parser))
        rest = rest[1:]
    return parser.parse_args_into_dataclasses(rest)


def _recipe(path: str, parser) -> dict:
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)  # JSON is YAML
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options and their values.")
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path} has unknown options: {', '.join(unknown)}. See clipcap train --help.")
    # A bare no is False in YAML.
    values = {name: "no" if value is False and name.endswith("_strategy") else value for name, value in values.items()}
    for action in parser._actions:  # argparse checks the choices of flags only
        value = values.get(action.dest)
        if action.choices and value is not None and str(value) not in map(str, action.choices):
            choices = ", ".join(map(str, action.choices))
            raise ValueError(f"{path}: `{action.dest}` must be one of {choices}, but is {value!r}.")
    # As text, values are checked and converted as flags are ("2e-5" is text in YAML anyway).
    return {
        name: value if value is None or isinstance(value, (bool, list, dict)) else str(value)
        for name, value in values.items()
    }


if __name__ == "__main__":  # torchrun -m clipcap_hf.cli.train
    from . import main

    sys.exit(main(["train", *sys.argv[1:]]))
