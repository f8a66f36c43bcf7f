"""transformers' own tests for model authors, from the source distribution of the installed release.

None of them are part of this repository. They come from the folder that `TRANSFORMERS_TESTS` names (the `tests/` of a
source distribution or of a checkout of the installed release), or pip fetches them once into the user's cache.
"""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest
import transformers


PACKAGE = "transformers_released_tests"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipcap_hf"


class GenerationTesterMixin:
    """Stand-in for the mixin of transformers, which a source distribution lacks and a checkout has."""


class ExportTesterMixin:
    """Stand-in, like the one above."""


def _find_tests() -> Path:
    if folder := os.environ.get("TRANSFORMERS_TESTS"):
        if not (Path(folder) / "test_modeling_common.py").is_file():
            raise OSError(f"TRANSFORMERS_TESTS: {folder} has no test_modeling_common.py")
        return Path(folder)
    cached = CACHE / f"transformers-{transformers.__version__}-tests"
    if not cached.is_dir():
        _download_tests(cached)
    return cached


def _download_tests(target: Path):
    release = f"transformers-{transformers.__version__}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        command += ["--retries", "0", "--timeout", "10", "--dest", folder, release.replace("-", "==")]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with tarfile.open(next(Path(folder).glob("transformers-*.tar.gz"))) as archive:
            members = [member for member in archive if member.name.startswith(f"{release}/tests/")]
            archive.extractall(folder, members, filter="data")
        try:
            (Path(folder) / release / "tests").rename(target)
        except OSError:
            if not target.is_dir():  # another process was first
                raise


def _stand_in(name: str, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules.setdefault(name, module)


def _local_path(url: str) -> str:
    # The processor tests read pictures and films (and sound, which is not for us) of the Hub: any will do.
    from clipcap_hf.data import load_emoji

    name = url.rpartition("/")[2]
    if not name.endswith((".png", ".jpg", ".mp4")):
        return url
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = str(Path(folder) / name)
    picture = load_emoji("validation")[0]["image"].convert("RGB")
    if name.endswith(".mp4"):
        _save_film(picture.resize((64, 48)), path)
    else:
        picture.save(path)
    return path


def _save_film(picture, path: str, frames: int = 11, frames_per_second: int = 30):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=frames_per_second)
        stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def load(module: str) -> types.ModuleType:
    """Import a module of transformers' tests; skip the caller if they are not available."""
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("transformers' tests need `parameterized`", allow_module_level=True)
    try:
        folder = _find_tests()
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        reason = f"transformers {transformers.__version__} has no source distribution here ({error})"
        pytest.skip(reason, allow_module_level=True)
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[PACKAGE] = package
    # A checkout has the real ones; an error in importing those is an error of the suite, and not a reason to skip.
    if not (folder / "exporters" / "test_export.py").is_file():
        _stand_in(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    if not (folder / "generation" / "test_utils.py").is_file():
        _stand_in(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=_local_path)
    return importlib.import_module(f"{PACKAGE}.{module}")
