"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import clipcap_hf
import pytest


MODULES = [
    module.name
    for module in pkgutil.walk_packages(clipcap_hf.__path__, prefix="clipcap_hf.")
    if module.name.count(".") < 3  # the metric folders hold modules for `evaluate` to copy
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    # What examples elsewhere in the package take for granted.
    names = {"clipcap_hf": clipcap_hf, **{public: getattr(clipcap_hf, public) for public in clipcap_hf.__all__}}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = sum(bool(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert found >= 6
