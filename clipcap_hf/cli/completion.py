"""The command `clipcap completion`."""

import argparse


SCRIPT = """\
# clipcap completion: add `eval "$(clipcap completion)"` to ~/.bashrc, or to ~/.zshrc after
# `autoload -U bashcompinit && bashcompinit`.
_clipcap() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" command="" words=""
    local at
    for ((at = 1; at < COMP_CWORD; at++)); do
        case "${{COMP_WORDS[at]}}" in -*) ;; *) command="$command ${{COMP_WORDS[at]}}" ;; esac
    done
    case "$command " in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _clipcap clipcap
"""


def add_parser(commands):
    completion = commands.add_parser(
        "completion",
        usage="clipcap completion",
        help="print a script that completes commands and options in the shell",
        description='Prints a script for bash and zsh: eval "$(clipcap completion)".',
    )
    completion.set_defaults(run=run, loads_models=False)


def run(arguments) -> int:
    from . import build_parser

    words = _words(build_parser(), "")
    # Longest first: `convert official`, then `convert`, then the bare command.
    cases = [
        f'        "{command} "*) words="{" ".join(words[command])}" ;;' for command in sorted(words, reverse=True)
    ]
    print(SCRIPT.format(cases="\n".join(cases)), end="")
    return 0


def _words(parser: argparse.ArgumentParser, command: str) -> dict[str, list[str]]:
    """Return the words that may follow each command: its subcommands and options."""
    words: dict[str, list[str]] = {command: []}
    for action in parser._actions:
        words[command] += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            words[command] += action.choices
            for name, below in action.choices.items():
                words |= _words(below, f"{command} {name}")
    return words
