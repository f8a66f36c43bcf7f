"""Know unchanged files again, so that weights in a folder are hashed once and not at every load.

Git's index does the same: a file whose size, times and inode are what they were has the content that it had. The
hashes are kept in the Hugging Face folder of the user's home, in a file of 64 characters for each state of a folder.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants

from .packages_clipcap import donor_folder


# Within this many seconds a file may change again without a change of its times.
_COARSEST_TIME = 2.0


def files_state(name: str, reading: dict[str, Any]) -> str | None:
    """
    Describe the files in the folder of a model by what changes when they do.

    Args:
        name (`str`): The folder, or `"package:NAME"`.
        reading (`dict`): What else decides what is read from them, among it the `subfolder`.

    Returns:
        A text, or `None` if there is no such folder, or a file is so new that it may change unnoticed.
    """
    try:
        folder = Path(donor_folder(name), reading.get("subfolder", ""))
        stats = [(file.name, file.stat()) for file in os.scandir(folder)]
    except (OSError, ValueError):  # loading says what is wrong with the name
        return None
    newest = max((max(stat.st_mtime, stat.st_ctime) for _, stat in stats), default=time.time())
    if time.time() - newest < _COARSEST_TIME:
        return None
    files = sorted((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino) for name, s in stats)
    versions = [torch.__version__, transformers.__version__]
    return json.dumps([os.path.realpath(folder), files, reading, versions], sort_keys=True)


def hash_once(state: str | None, compute: Callable[[], str]) -> str:
    """Return the hash that belongs to a state: the one that is remembered, or else a new one, which then is.

    Where it cannot be written, or there is no state, it is computed each time.
    """
    if state is None:
        return compute()
    place = Path(constants.HF_HOME) / "clipcap_hf" / "hashes" / hashlib.sha256(state.encode()).hexdigest()
    try:
        known = place.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        known = ""
    if len(known) == 64 and set(known) <= set("0123456789abcdef"):
        return known
    found = compute()
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(found, encoding="ascii")  # half a hash is known by its length
    return found


__all__ = ["files_state", "hash_once"]
