"""Optional packages: how to install the extras that setup.cfg names."""

import shlex
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement


def install_hint(extra: str) -> str:
    """
    Return the command that installs the packages of an extra, with or without a clone of the repository.

    ```python
    >>> from clipcap_hf.extras import install_hint
    >>> install_hint("metrics")
    "pip install 'pycocoevalcap>=1.2'"

    ```
    """
    try:
        requirements = [Requirement(line) for line in requires("clipcap-hf") or ()]
    except PackageNotFoundError:  # running from a clone that is not installed
        return f"pip install '.[{extra}]'"
    # An extra's requirements have the marker `extra == "NAME"`.
    chosen = [each for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
    return shlex.join(["pip", "install", *(f"{each.name}{each.specifier}" for each in chosen)])
