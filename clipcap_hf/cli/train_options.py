"""The options of `clipcap train`, read from the source of their dataclasses: importing these takes seconds."""

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any


OWN_CLASSES = ("ModelArguments", "DataArguments", "CaptioningArguments")
TRAINER_FILES = {"training_args.py": "TrainingArguments", "training_args_seq2seq.py": "Seq2SeqTrainingArguments"}
#: The command line's names of the fields that the Trainer names otherwise.
SHORT_NAMES = {
    "output_dir": "out",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "dataloader_num_workers": "workers",
    "generation_num_beams": "beams",
}


@dataclass
class Option:
    """A field of the dataclasses of a run.

    Args:
        field (`str`): Its name.
        owner (`str`): The class that has it.
        kind (`str`): Its type, as the source has it.
        help (`str`): What it does.
        default: Its default, if it stands in the source as a literal.
    """

    field: str
    owner: str
    kind: str
    help: str
    default: Any

    @property
    def name(self) -> str:
        """The option on the command line, such as `--learning-rate`."""
        return f"--{SHORT_NAMES.get(self.field, self.field).replace('_', '-')}"

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.kind in ("bool", "bool | None", "None | bool")

    @property
    def choices(self) -> tuple | None:
        """The values that it may take, if they are listed."""
        if not self.kind.startswith("Literal["):
            return None
        return ast.literal_eval(
            self.kind.removesuffix(" | None").removeprefix("Literal").replace("[", "(", 1)[:-1] + ",)"
        )


def read_options() -> dict[str, Option]:
    """Return all options by field name: those of this package first, then those of transformers alone."""
    own = Path(__file__).parents[1] / "training" / "arguments.py"
    options = {option.field: option for option in _fields(own, OWN_CLASSES)}
    spec = importlib.util.find_spec("transformers")  # found without importing it, which takes seconds
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    for file, owner in TRAINER_FILES.items():
        for option in _fields(folder / file, (owner,)):
            options.setdefault(option.field, option)
    return options


def _fields(path: Path, classes: tuple[str, ...]):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for line in node.body:
                if not isinstance(line, ast.AnnAssign) or "ClassVar" in ast.unparse(line.annotation):
                    continue
                if isinstance(line.target, ast.Name):
                    yield _option(line.target.id, line, node.name)


def _option(name: str, line: ast.AnnAssign, owner: str) -> Option:
    if isinstance(line.value, ast.Call) and ast.unparse(line.value.func) == "of_recipe":
        help = f"{_literal(line.value.args[0])} (default: recipe)."
        return Option(name, owner, ast.unparse(line.annotation), help, None)
    settings: dict[str | None, ast.expr] = {}
    if isinstance(line.value, ast.Call):  # field(default=..., metadata={"help": ...})
        settings = {keyword.arg: keyword.value for keyword in line.value.keywords}
    metadata = settings.get("metadata")
    pairs = zip(metadata.keys, metadata.values) if isinstance(metadata, ast.Dict) else ()
    texts = [_literal(value) for key, value in pairs if key is not None and _literal(key) == "help"]
    default = _literal(settings.get("default", None if settings else line.value))
    return Option(name, owner, ast.unparse(line.annotation), (texts or [""])[0] or "", default)


def _literal(node) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
