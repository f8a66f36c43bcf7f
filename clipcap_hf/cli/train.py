"""`clipcap train`: options from flags and recipe files, and what is shown of a run."""

import argparse
import os
import sys
from typing import Any

from ..ranges import ANY, TRAINING, number
from .arguments import DTYPES, add_device_arguments, pick_device
from .output import show_runs
from .parser import Parser, one_spelling
from .train_options import SHORT_NAMES, Option, read_options


# What people use first, shown by `--help`.
FIRST = {
    "captioner": ("model", "vision", "text", "mapping_type", "prefix_length", "freeze_language_model", "lora_r"),
    "data": ("data", "data_format", "images", "caption_column", "eval_data", "validation_share", "references"),
    "training": (
        "recipe",
        "num_train_epochs",
        "per_device_train_batch_size",
        "learning_rate",
        "metric_for_best_model",
        "early_stopping_patience",
        "generation_num_beams",
        "seed",
    ),
    "output": ("output_dir", "resume", "report_to", "verbose"),
}
MORE = {
    "more about the captioner": "ModelArguments",
    "more about the data": "DataArguments",
    "more about the training": "CaptioningArguments",
    "options of transformers' Trainer": "",
}
METAVARS = {"data": "DATA", "output_dir": "DIR", "images": "DIR", "model": "NAME", "vision": "NAME", "text": "NAME"}
TYPES = {"int": int, "float": float}


def add_parser(commands):
    train = commands.add_parser(
        "train",
        help="train a captioner on your images",
        usage="clipcap train [RECIPE.yaml] --data DATA --out DIR [OPTION ...]",
        description="Train a captioner and save it with its scores, a curve, sample captions and a verdict. Options "
        "come from a YAML or JSON file, from flags, or from both; flags win.",
    )
    _add_options(train)
    train.set_defaults(run=run, check=check)


def _add_options(parser: Parser):
    parser.add_argument("recipe_file", nargs="?", metavar="RECIPE.yaml", help="file of options and their values")
    options = read_options()
    for title, fields in FIRST.items():
        group = parser.add_argument_group(title)
        for field in fields:
            _add_option(group, options.pop(field))
        if title == "training":
            add_device_arguments(group, "float32")
            _add_option(group, options.pop("dataloader_num_workers"), "processes that read images (default: 0)")
    for title, owner in MORE.items():
        more = parser.add_more_arguments(title)
        for field in [field for field, option in options.items() if owner in ("", option.owner)]:
            _add_option(more, options.pop(field))


def _add_option(group, option: Option, text: str | None = None):
    text = (text or option.help).replace("%", "%%")
    settings: dict[str, Any] = {"dest": option.field, "default": argparse.SUPPRESS}
    if option.is_switch:
        group.add_argument(option.name, nargs="?", const=True, type=_switch, metavar="False", help=text, **settings)
        if option.default is True:
            no = f"--no-{option.name[2:]}"
            group.add_argument(no, action="store_false", help=argparse.SUPPRESS, **settings)
        return
    kind = option.kind.removesuffix(" | None")
    if option.default not in (None, "") and "default" not in text:
        text += f" (default: {option.default})"
    if "list[" in kind:
        settings["nargs"] = "+"
    if option.field == "debug":  # the command's own --debug has no value
        settings |= {"nargs": "?", "const": True}
    numbers = {"int": "N", "float": "X"}
    metavar = None if option.choices else METAVARS.get(option.field, numbers.get(kind, option.field.upper()))
    group.add_argument(
        option.name, type=_type(option.field, kind), choices=option.choices, metavar=metavar, help=text, **settings
    )


def _type(field: str, kind: str):
    return number(TYPES[kind], TRAINING.get(field, ANY)) if kind in TYPES else str


def _switch(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def run(arguments) -> int:
    args = dataclasses_of(arguments)
    show_runs(verbose=args[2].verbose or args[2].log_level in ("debug", "info"))
    from ..training.run import run_training

    run_training(*args)
    return 0


def check(arguments):
    """Find what is missing before anything slow is imported."""
    if arguments.recipe_file is None:
        missing = [name for field, name in (("data", "--data"), ("output_dir", "--out")) if field not in arguments]
        if missing:
            arguments.parser.error(f"the following arguments are required: {', '.join(missing)}")
    elif not arguments.recipe_file.endswith((".yaml", ".yml", ".json")):
        arguments.parser.error(
            f"unrecognized arguments: {arguments.recipe_file} (a file of options ends in .yaml, .yml or .json)"
        )


def parse(words: list[str]) -> tuple:
    """Return the three dataclasses of a run for a command line (without `clipcap train`)."""
    parser = Parser(prog="clipcap train")
    _add_options(parser)
    return dataclasses_of(parser.parse_args(one_spelling(words)))


def dataclasses_of(arguments: argparse.Namespace) -> tuple:
    """Read the options of a run from flags, or from a YAML or JSON file and flags. Flags win."""
    from transformers import HfArgumentParser

    from ..training.arguments import CaptioningArguments, DataArguments, ModelArguments

    parser = HfArgumentParser((ModelArguments, DataArguments, CaptioningArguments), prog="clipcap train")
    fields = {action.dest for action in parser._actions}
    flags = {name: value for name, value in vars(arguments).items() if name in fields}
    if isinstance(flags.get("debug"), bool):
        del flags["debug"]
    recipe = {} if arguments.recipe_file is None else _recipe(arguments.recipe_file, parser)
    device, dtype = (vars(arguments).get(name) or recipe.get(name) for name in ("device", "dtype"))
    values = {**recipe, **_device(device), **_precision(dtype), **flags}
    parser.set_defaults(**{name: value for name, value in values.items() if name in fields})
    return parser.parse_args_into_dataclasses([], look_for_args_file=False)


def _device(name: str | None) -> dict[str, bool]:
    if name is None:
        return {}
    kind, _, index = name.partition(":")
    if index and kind == "cuda":  # the Trainer takes all devices that it sees
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(index)] if len(visible) > int(index) and visible[0] else index
        name = kind
    pick_device(name)
    return {"use_cpu": kind == "cpu"}


def _precision(dtype: str | None) -> dict[str, bool]:
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    return {} if dtype is None else {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}


def _recipe(path: str, parser) -> dict:
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)  # JSON is YAML
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold options and their values.")
    values = {_field(name): value for name, value in values.items()}
    known = {action.dest for action in parser._actions} | {"device", "dtype"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path} has unknown options: {', '.join(unknown)}. See clipcap train --help-all.")
    options = read_options()
    for name, value in values.items():
        option = options.get(name)
        if value is None and option and "None" not in option.kind and option.default is not None:
            raise ValueError(f"{path}: `{name}` has no value: give it one, or leave it out.")
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


def _field(name: Any) -> str:
    """Return the field of a name in a recipe, which may be that of the command line."""
    option = one_spelling([f"--{name}"])[0]
    fields = {short: field for field, short in SHORT_NAMES.items()}
    plain = option.removeprefix("--").replace("-", "_")
    return fields.get(plain, plain)


if __name__ == "__main__":  # torchrun -m clipcap_hf.cli.train
    from . import main

    sys.exit(main(["train", *sys.argv[1:]]))
