"""The shape of the package: which modules import which, and how long a file may be."""

import ast
from pathlib import Path

import clipcap_hf
import pytest


PACKAGE = Path(clipcap_hf.__file__).parent
TESTS = Path(__file__).parent
LINES = {PACKAGE: 400, TESTS: 500}
FUNCTION_LINES = 60
# Where a reader looks for a concept; the first lines of the file name it.
CONCEPTS = {
    "prefix": "model/modeling_mapping.py",
    "mapping network": "model/modeling_mapping.py",
    "placeholder": "model/processing_clipcap.py",
    "beam search": "model/beam_search_clipcap.py",
    "frozen parts": "model/donors_clipcap.py",
    "model card": "model/model_card_clipcap.py",
    "embed the images": "data/embed.py",
    "nocaps": "evaluation/protocol.py",
    "cider": "metrics/formulas.py",
    "self-critical": "training/self_critical.py",
    "resume": "training/checkpoints.py",
    "onnx": "export.py",
}
# What is done in one place, and where; another one is a copy of it.
IN_ONE_PLACE = {
    "FileLock(": {"files.py"},
    "mkstemp(": {"files.py"},
    "umask(": {"files.py"},
    "os.replace(": {"files.py", "data/embeddings.py", "training/checkpoints.py"},  # shards; files of a whole model
    "torch.channels_last": {"model/modeling_vision.py", "benchmark/measure.py"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> list[tuple[ast.AST, str, int]]:
    """Return every import of this package in a file: the node, the module, and the number of leading dots."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node, alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            found.append((node, base, node.level))
            found += [(node, f"{base}.{alias.name}", node.level) for alias in node.names]
    return found


def import_graph() -> dict[str, set[str]]:
    """Return each module of the package with those that it imports, also inside functions."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        imported = {module for _, module, _ in imported_modules(path) if module in files and module != name}
        # `from . import x` in a package imports the module `x`; the package itself is being imported anyway.
        graph[name] = {module for module in imported if not name.startswith(f"{module}.")}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Follow the arrows from each module, and list every path that returns to its start."""
    found, done = [], set()

    def visit(module: str, path: list[str]):
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for imported in sorted(graph[module]):
                visit(imported, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_no_module_imports_itself_by_way_of_others():
    graph = import_graph()
    print(f"{len(graph)} modules, {sum(map(len, graph.values()))} imports of each other")
    assert len(graph) > 50 and "clipcap_hf.model.modeling_clipcap" in graph["clipcap_hf._public"]
    assert not circles(graph)


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.name)
def test_what_travels_to_the_hub_imports_siblings_only(path):
    """For remote code, transformers follows `from .x import y` and no other form of relative import."""
    siblings = {file.stem for file in path.parent.glob("*.py")}
    for node, module, level in imported_modules(path):
        assert module.partition(".")[0] != "clipcap_hf" or level == 1, ast.unparse(node)
        if level:
            assert isinstance(node, ast.ImportFrom) and node.module in siblings, ast.unparse(node)
    assert not [file for file in path.parent.iterdir() if file.is_dir() and file.name != "__pycache__"]


@pytest.mark.parametrize("folder", LINES, ids=lambda folder: folder.name)
def test_no_file_is_too_long_to_read(folder):
    too_long = {}
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES[folder]:
            too_long[name] = lines
    assert not too_long


@pytest.mark.parametrize("concept", CONCEPTS)
def test_file_of_a_concept_names_it_first(concept):
    docstring = ast.get_docstring(ast.parse((PACKAGE / CONCEPTS[concept]).read_text(encoding="utf-8")))
    assert concept in docstring.partition("\n\n")[0].lower()


def test_functions_read_top_down():
    """Docstrings and signatures do not count."""
    too_long = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
                name = f"{path.relative_to(PACKAGE).as_posix()}: {node.name}"
                if lines > FUNCTION_LINES:
                    too_long[name] = lines
    assert not too_long


@pytest.mark.parametrize("call", IN_ONE_PLACE)
def test_what_has_a_helper_is_not_written_again(call):
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in texts.items() if call in text} == IN_ONE_PLACE[call]
