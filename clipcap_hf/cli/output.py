"""Output of the commands: one record per line, whatever names and captions contain."""

import codecs
import json
import logging
import re
import sys


LONGEST_MESSAGE = 2000


def make_streams_safe():
    """Make standard output and error accept every character.

    File names may hold bytes that are not UTF-8: they are printed as they are. Other characters that the terminal or
    file cannot encode are printed as backslash escapes.
    """
    codecs.register_error("clipcap", _keep_bytes)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="clipcap")


def show_runs(verbose: bool = False):
    """Show what a training run says.

    Args:
        verbose (`bool`): Also show the messages, load reports and progress bars of transformers and datasets.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("clipcap_hf").setLevel(logging.INFO)
    if verbose:
        return
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _keep_bytes(error: UnicodeError):
    if not isinstance(error, UnicodeEncodeError):
        raise error
    error.end = error.start + 1  # one character at a time, since its neighbours may need the other handler
    is_byte = 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF
    return codecs.lookup_error("surrogateescape" if is_byte else "backslashreplace")(error)


def escape(text: str) -> str:
    r"""
    Write control characters and line separators as escapes, so that a field stays on its line and in its column.

    ```python
    >>> from clipcap_hf.cli.output import escape
    >>> print(escape("two\tcolumns\nand lines"))
    two\tcolumns\nand lines

    ```
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: found[0].encode("unicode_escape").decode(), text)


def message_lines(text: str) -> str:
    """Escape the lines of a message, which may repeat any input, and cut a long one in its middle."""
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return "\n".join(map(escape, text.split("\n")))  # names of files can hold codes that change the terminal


def json_line(record: dict) -> str:
    r"""
    Return JSON on one line of valid UTF-8.

    A byte of a file name that is not UTF-8 becomes an escape from `\udc80` to `\udcff`; Python's `json.loads` and
    `os.fsencode` restore the name.
    """
    text = json.dumps(record, ensure_ascii=False)
    return re.sub(r"[\ud800-\udfff\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
