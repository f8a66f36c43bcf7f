"""The package declares its imports, installs completely, and is what the tests import."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

import clipcap_hf
import pytest
from clipcap_hf.extras import install_hint
from packaging.requirements import Requirement


CLONE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_cfg():
    config = configparser.ConfigParser()
    config.read(CLONE / "setup.cfg")
    return config


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def declared(lines: str) -> dict[str, Requirement]:
    """Return requirements by name, without those that name other extras of this package."""
    requirements = [Requirement(line) for line in lines.splitlines() if line]
    return {normalized(each.name): each for each in requirements if normalized(each.name) != "clipcap-hf"}


def imports(folder: Path) -> set[tuple[str, bool]]:
    """Return the other packages that a folder imports, and whether each import is at the top of its module."""
    found = set()
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found |= {(name.partition(".")[0], node in tree.body) for name in names}
    return {(name, top) for name, top in found if name not in sys.stdlib_module_names and name != "clipcap_hf"}


installed_modules = cache(packages_distributions)  # reads every package's list of files


def distributions(module: str) -> set[str]:
    """Return the packages that a module may come from; one that is not installed is assumed to have its name."""
    return {normalized(name) for name in installed_modules().get(module, [module])}


def test_imports_are_declared(setup_cfg):
    core = set(declared(setup_cfg["options"]["install_requires"]))
    extras = set().union(*(declared(lines) for lines in setup_cfg["options.extras_require"].values()))
    found = imports(Path(clipcap_hf.__file__).parent)
    assert {"torch", "PIL", "yaml"} <= {name for name, _ in found}
    # Imported only where installed: torchvision comes with timm and open_clip; trackers are what `report_to` names.
    found = {(name, top) for name, top in found if name not in ("torchvision", "trackio", "wandb")}
    for name, top in sorted(found):
        assert distributions(name) & (core if top else core | extras), f"setup.cfg does not declare {name}"


def test_declared_packages_are_imported(setup_cfg):
    found = {package for name, _ in imports(Path(clipcap_hf.__file__).parent) for package in distributions(name)}
    assert set(declared(setup_cfg["options"]["install_requires"])) <= found


def test_imports_of_tests_are_declared(setup_cfg):
    groups = setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()
    everything = set().union(*map(declared, groups))
    own = {path.stem for folder in ("tests", "examples") for path in (CLONE / folder).rglob("*.py")}
    for name in sorted({name for name, top in imports(CLONE / "tests") if top} - own):
        assert distributions(name) & everything, f"setup.cfg does not declare {name}, which tests import"


def test_bounds(setup_cfg):
    """Each package has one lower bound, which `.ci/run lowest` tests; transformers has an upper one, too."""
    groups = dict(setup_cfg["options.extras_require"])
    pinned = groups.pop("dev")
    assert all(each.specifier for each in declared(pinned).values())
    constraints = subprocess.run(
        [sys.executable, CLONE / ".ci" / "lower_bounds.py"], capture_output=True, text=True, check=True
    ).stdout.split()
    lowest = {normalized(name): bound for name, _, bound in (line.partition("==") for line in constraints)}
    for lines in (setup_cfg["options"]["install_requires"], *groups.values()):
        for name, requirement in declared(lines).items():
            assert lowest[name] in requirement.specifier
            assert f">={lowest[name]}" in str(requirement.specifier)
    assert "<" in str(declared(setup_cfg["options"]["install_requires"])["transformers"].specifier)


def test_the_version_stands_in_one_place():
    assert version("clipcap-hf") == clipcap_hf.__version__


def test_install_hints_name_packages():
    hint = install_hint("serve")
    assert hint.startswith("pip install 'gradio") and ">=6.31" in hint
    assert re.fullmatch(r"pip install 'peft>=[\d.]+'", install_hint("lora"))


def test_processes_import_what_the_tests_import():
    code = "import clipcap_hf; print(clipcap_hf.__file__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == clipcap_hf.__file__
    module = [sys.executable, "-m", "clipcap_hf.cli", "--help"]
    assert subprocess.run(module, capture_output=True, text=True).returncode == 0


def test_the_package_is_the_installed_one():
    place = Path(distribution("clipcap-hf").locate_file("clipcap_hf/__init__.py"))
    if place.exists():
        assert place.samefile(clipcap_hf.__file__)
    else:  # installed editable: a finder leads to the clone
        assert Path(clipcap_hf.__file__).is_relative_to(CLONE)


def install(clone: Path, folder: Path) -> set[str]:
    """Install a clone into a folder and return the modules that are there."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", folder, clone], check=True, capture_output=True, timeout=300)
    return {path.relative_to(folder).as_posix() for path in (folder / "clipcap_hf").rglob("*.py")}


def test_a_moved_module_is_not_installed_again(tmp_path):
    clone = tmp_path / "clone"
    package = clone / "clipcap_hf"
    package.mkdir(parents=True)
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, clone)
    (package / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (package / "old.py").touch()
    (package / "py.typed").touch()
    assert install(clone, tmp_path / "first") == {"clipcap_hf/__init__.py", "clipcap_hf/old.py"}
    assert (tmp_path / "first" / "clipcap_hf" / "py.typed").is_file()  # type checkers read the package's annotations

    (package / "folder").mkdir()
    (package / "folder" / "__init__.py").touch()
    (package / "old.py").rename(package / "folder" / "new.py")
    assert install(clone, tmp_path / "second") == {
        "clipcap_hf/__init__.py",
        "clipcap_hf/folder/__init__.py",
        "clipcap_hf/folder/new.py",
    }
    assert (tmp_path / "second" / "clipcap_hf-1.2.3.dist-info").is_dir()
    assert not (clone / "build").exists()
