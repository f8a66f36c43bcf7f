"""Everything that made the numbers: settings, data, code, versions, device, hours and energy."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..evaluation.record import versions
from ..files import write_text
from .ledger import Ledger
from .settings import Settings
from .stages import pick_device


RECORD = "record.json"


def write_record(settings: Settings, data: dict[str, Any], ledger: Ledger, reports: list[str]) -> Path:
    """Write `record.json`; the weights and captions are recorded by digest in the reports that it names."""
    path = Path(settings.out) / RECORD
    content = {
        "settings": settings.record(),
        "data": data,
        "commit": commit(),
        "versions": versions(),
        "device": describe_device(pick_device(settings.device)),
        "stages": ledger.costs(),
        "reports": reports,
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def commit() -> str | None:
    """Return the commit of the clone that this package runs from, marked if files were changed; None without one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "record.py"):  # a package that is installed in some other repository's folder
            return None
        found = git("rev-parse", "HEAD")
        return f"{found} with changes" if git("status", "--porcelain", ".") else found
    except (OSError, subprocess.TimeoutExpired):
        return None


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name the device that the models computed on."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {
        "type": device.type,
        "name": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
