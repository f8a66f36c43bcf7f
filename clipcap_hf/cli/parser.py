"""The parser of the commands: one name per option, help in two lengths, and errors that say where to look."""

import argparse
import difflib
import os
import sys

from .output import message_lines


#: Other names of options: those of transformers' Trainer and of `generate`.
ALIASES = {
    "--output-dir": "--out",
    "--num-beams": "--beams",
    "--generation-num-beams": "--beams",
    "--num-workers": "--workers",
    "--dataloader-num-workers": "--workers",
    "--num-train-epochs": "--epochs",
    "--per-device-train-batch-size": "--batch-size",
}


def one_spelling(words: list[str]) -> list[str]:
    """
    Give each option its one name: `--num_beams=5` is `--beams=5`.

    ```python
    >>> from clipcap_hf.cli.parser import one_spelling
    >>> one_spelling(["train", "--output_dir", "my_captioner", "--learning_rate=1e-4"])
    ['train', '--out', 'my_captioner', '--learning-rate=1e-4']

    ```
    """
    spelled: list[str] = []
    for place, word in enumerate(words):
        if word == "--":  # only names of files follow
            return spelled + words[place:]
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
            word = ALIASES.get(name, name) + equals + value
        spelled.append(word)
    return spelled


class Parser(argparse.ArgumentParser):
    """A parser that shows the options people use first with `--help`, and the others only with `--help-all`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.more: list[argparse.Action] = []
        self.words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        self.words = list(args or [])
        return super().parse_known_args(args, namespace)

    def add_more_arguments(self, title: str) -> "MoreArguments":
        """Add a group of options that only `--help-all` shows."""
        if not self.more:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all options")
        return MoreArguments(self.add_argument_group(title), self.more)

    def format_help(self) -> str:
        texts = [action.help for action in self.more]
        for action in self.more:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(self.more, texts):
                action.help = text

    def format_help_all(self) -> str:
        """Return the help with every option."""
        return super().format_help()

    def error(self, message: str):
        files = [word for word in self.words if word[:1] == "-" and os.path.exists(word)]
        if files and "required" in message:
            message += f" (write ./{files[0]} for the file)"
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message_lines(message)}\n{self.prog} --help shows the options.\n")

    def unknown(self, words: list[str]):
        """Refuse options that do not exist, and name the nearest that does."""
        known = [name for action in self._actions for name in action.option_strings]
        near = [difflib.get_close_matches(word.partition("=")[0], known, n=1) for word in words if word[:1] == "-"]
        hint = f" (did you mean {near[0][0]}?)" if near and near[0] else ""
        if files := [word for word in words if os.path.lexists(word)]:
            hint = f" (write ./{files[0]} for the file)"
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


class MoreArguments:
    """A group of options that only `--help-all` shows."""

    def __init__(self, group, more: list[argparse.Action]):
        self.group = group
        self.more = more

    def add_argument(self, *names, **kwargs) -> argparse.Action:
        """Add an option, as to any group."""
        action = self.group.add_argument(*names, **kwargs)
        self.more.append(action)
        return action


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help_all(), end="")
        parser.exit()
