"""Run code in new Python processes, with fresh caches, that talk to the test server (or to none)."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent

# Hides the package, wherever it is installed. Like the package, it declares the operators of a torchvision that was
# built for another PyTorch; otherwise transformers could import no vision model there.
WITHOUT_PACKAGE = f"""
import runpy, sys
torchvision_names = runpy.run_path({str(ROOT / "clipcap_hf" / "_torchvision.py")!r})
torchvision_names["ensure_torchvision_imports"]()

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "clipcap_hf":
            raise ModuleNotFoundError("clipcap_hf is blocked")

sys.meta_path.insert(0, Block())
try:
    import clipcap_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is there")
"""


def weights_hash(state_dict) -> str:
    """Return the SHA-256 of names and bytes of weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


WEIGHTS_HASH = "import hashlib\n" + inspect.getsource(weights_hash)  # for processes of their own


def run_client(code: str, home: Path, hub=None, token: str | None = None, timeout: float = 240, **environment):
    """Run code in a new process and return what it put into `report`.

    The process finds the package at the front of its path, a Hugging Face home at `home`, and no network except the
    server.
    """
    home.mkdir(parents=True, exist_ok=True)
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
    variables |= {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # the server speaks Git LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    if hub is None:
        variables["HF_HUB_OFFLINE"] = "1"
    else:
        variables["HF_ENDPOINT"] = hub.endpoint
    if token is not None:
        variables["HF_TOKEN"] = token
    variables |= environment
    report = home / "report.json"
    script = "import json, os\nreport = {}\n" + code + f"\njson.dump(report, open({str(report)!r}, 'w'))\n"
    process = subprocess.run(
        [sys.executable, "-c", script], env=variables, cwd=home, capture_output=True, text=True, timeout=timeout
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    return json.loads(report.read_text())
