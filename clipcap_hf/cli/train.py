"""`clipcap train`"""

import logging
import sys


def add_parser(commands):
    # Everything after `train`, options included, is left to HfArgumentParser, whose import takes seconds: with this
    # prefix nothing looks like an option here.
    train = commands.add_parser("train", help="train a captioner on your images", add_help=False, prefix_chars="\0")
    train.add_argument("rest", nargs="*")
    train.set_defaults(run=run)


def run(arguments) -> int:
    from ..training.run import run_training

    logging.basicConfig(format="%(message)s")
    logging.getLogger("clipcap_hf").setLevel(logging.INFO)
    args = parse(arguments.rest)
    scores = run_training(*args)
    if args[2].process_index == 0:
        for name, value in scores.items():
            print(f"{name:<32}{value:>14.4f}" if isinstance(value, float) else f"{name:<32}{value:>14}")
        print(f"The captioner, its scores and sample captions are in {args[2].output_dir}")
    return 0


def parse(rest: list[str]) -> tuple:
    """The arguments of a run from flags, or from a YAML or JSON file and flags, which win."""
    from transformers import HfArgumentParser

    from ..training.arguments import CaptioningArguments, DataArguments, ModelArguments

    parser = HfArgumentParser(
        (ModelArguments, DataArguments, CaptioningArguments),
        prog="clipcap train",
        usage="clipcap train [RECIPE.yaml] --data DATA --output_dir DIR [OPTION ...]",
        description="Trains a captioner with Trainer and saves it with its scores, a curve and sample captions. Options "
        "come from a YAML or JSON file, from flags, or both; flags win.",
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
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options and their values.")
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path} has options that there are not: {', '.join(unknown)}. See clipcap train --help.")
    # A bare no is False in YAML.
    values = {name: "no" if value is False and name.endswith("_strategy") else value for name, value in values.items()}
    for action in parser._actions:  # argparse checks the choices of flags alone
        value = values.get(action.dest)
        if action.choices and value is not None and str(value) not in map(str, action.choices):
            choices = ", ".join(map(str, action.choices))
            raise ValueError(f"{path}: `{action.dest}` must be one of {choices}, but is {value!r}.")
    # As text, they are checked and converted as flags are ("2e-5" is text in YAML anyway).
    return {
        name: value if value is None or isinstance(value, (bool, list, dict)) else str(value)
        for name, value in values.items()
    }


if __name__ == "__main__":  # torchrun -m clipcap_hf.cli.train
    from . import main

    sys.exit(main(["train", *sys.argv[1:]]))
