"""The notebook of the examples runs from top to bottom in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path


NOTEBOOK = Path(__file__).parents[1] / "examples" / "train_on_your_images.ipynb"


def test_notebook(tmp_path):
    """Run the code cells with fewer images, and with fewer epochs than these would get."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    code = "\n".join(cells)
    for as_printed, here in (("COUNT = 300", "COUNT = 60"), ('"my-captioner"]', '"my-captioner", "--epochs", "2"]')):
        assert code.count(as_printed) == 1
        code = code.replace(as_printed, here)
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert "Verdict: " in result.stderr and "Traceback" not in result.stderr
    captions = (tmp_path / "captions.csv").read_text(encoding="utf-8").splitlines()
    assert captions[0] == "image,caption" and len(captions) == 1 + len(list(tmp_path.glob("new-images/*.png")))
    assert "\n".join(captions[:8]) in result.stdout
    scores = json.loads((tmp_path / "my-scores" / "scores.json").read_text(encoding="utf-8"))
    assert scores["scores"]["entire"]["cider"] >= 0
    assert (tmp_path / "my-captioner" / "samples.png").is_file() and (tmp_path / "my-scores" / "index.html").is_file()
