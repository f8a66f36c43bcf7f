"""What was done: each finished stage leaves a file with its result, so that a killed run goes on after it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_text
from ..processes import process_state
from .energy import joules


class Ledger:
    """The stages of a run in a folder.

    A stage that began under other settings, or on other data, is an error: its half-done work must not be continued.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder) / "stages"

    def run(self, name: str, depends_on: dict[str, Any], work: Callable[[], Any], say: Callable[[str], None] = print):
        """Do the work of a stage, or return its result if it was done before.

        Args:
            name: Of the stage, and of its file.
            depends_on: All that the result depends on.
            work: Returns the result, which can be written as JSON. Under torchrun every process does its share.
            say: Tells the user what is done.

        Raises:
            ValueError: The stage was begun with something else in `depends_on`.
        """
        state = process_state()
        depends_on = json.loads(json.dumps(depends_on))
        begun = self._read(name, "begun") or {}
        done = self._read(name, "done")
        self._check_same(name, begun, depends_on)
        state.wait_for_everyone()  # before anyone writes, all have read
        if done is not None:
            return done["result"]
        if state.is_main_process:
            say(f"{name} ...")
            sessions, timed = begun.get("sessions", 0) + 1, begun.get("timed", [])
            begun = {"depends_on": depends_on, "sessions": sessions, "timed": timed}
            self._write(name, "begun", begun)
        started, energy_before = time.monotonic(), joules()
        try:
            result = work()
        except BaseException:  # Ctrl-C too: what the session cost is part of the stage's cost
            if state.is_main_process:
                begun["timed"] = [*begun["timed"], _cost(started, energy_before)]
                self._write(name, "begun", begun)
            raise
        if state.is_main_process:
            begun["timed"] = [*begun["timed"], _cost(started, energy_before)]
            self._write(name, "begun", begun)
            self._write(name, "done", {"result": result})
        state.wait_for_everyone()
        return (self._read(name, "done") or {})["result"]

    def is_done(self, name: str) -> bool:
        """Tell whether a stage has left its result."""
        return self._read(name, "done") is not None

    def costs(self) -> dict[str, dict[str, Any]]:
        """Return the seconds, and joules where the device tells, of each finished stage: the sum of its sessions.

        A session that was killed could not write its time: `sessions_without_time` counts those.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.done.json")):
            name = path.name.removesuffix(".done.json")
            begun = self._read(name, "begun") or {"sessions": 0, "timed": []}
            timed = begun["timed"]
            cost: dict[str, Any] = {"seconds": round(sum(each["seconds"] for each in timed), 1)}
            if timed and all("joules" in each for each in timed):
                cost["joules"] = sum(each["joules"] for each in timed)
            cost["sessions"] = begun["sessions"]
            if without := begun["sessions"] - len(timed):
                cost["sessions_without_time"] = without
            found[name] = cost
        return found

    def _check_same(self, name: str, begun: dict[str, Any], depends_on: dict[str, Any]):
        if not begun:
            return
        old = begun["depends_on"]
        changed = sorted(key for key in {*old, *depends_on} if old.get(key) != depends_on.get(key))
        if changed:
            raise ValueError(
                f"{self.folder.parent}: the stage {name!r} was begun with other values of {', '.join(changed)}: name "
                "another folder by --out, or restore what it was."
            )

    def _read(self, name: str, kind: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.{kind}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _write(self, name: str, kind: str, content: dict[str, Any]):
        write_text(self.folder / f"{name}.{kind}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _cost(started: float, energy_before: float | None) -> dict[str, Any]:
    """Return the seconds, and the joules where the device tells, since a session began."""
    cost: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    energy = joules()
    if energy is not None and energy_before is not None:
        cost["joules"] = round(energy - energy_before)
    return cost
