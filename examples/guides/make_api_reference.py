"""Write api.md, the reference of the public names, from their docstrings.

python examples/guides/make_api_reference.py
"""

import inspect
from pathlib import Path

import clipcap_hf


PAGE = Path(__file__).with_name("api.md")


def reference() -> str:
    """Return the page."""
    sections = ["# API reference\n\nMade from the docstrings by `make_api_reference.py`.\n"]
    for name in sorted(clipcap_hf.__all__):
        item = getattr(clipcap_hf, name)
        if isinstance(item, str):
            continue  # folders of the embedded models
        sections.append(f"## {name}\n\n{documentation(item)}\n")
        if inspect.isclass(item):
            for method, function in sorted(vars(item).items()):
                function = inspect.unwrap(getattr(function, "__func__", function))
                if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                    sections.append(f"### {name}.{method}\n\n{documentation(function)}\n")
    return "\n".join(sections)


def documentation(item) -> str:
    """Return a docstring as a block of plain text: its indentation carries the meaning."""
    text = inspect.cleandoc(vars(item).get("__doc__") or "" if inspect.isclass(item) else item.__doc__ or "")
    return f"````text\n{text}\n````"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
