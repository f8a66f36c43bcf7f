"""Damage files at random and run the commands on them: `python damages.py --cases 2000`.

Each case flips or cuts bytes of one file (see damage_samples.py) and runs one command on it in a child process. It
fails if the command ends with anything but one clear line that names the file, hangs, asks for absurd amounts of
memory, or says that all is well although rows are lost. Damage that leaves a file valid is no failure.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from damage_samples import IMAGES, PICTURES, build, cases


DEADLINE = 300.0  # seconds for a case that takes less than one, on a machine that does other work too
COMPUTING = 30  # seconds of computing, of which that case takes less than one
MEMORY = 4 << 30  # bytes for a case, beyond those of this process


@dataclass
class Outcome:
    """What a command did: its exit status (None: an exception got out; negative: a signal), and what it printed."""

    status: int | None
    out: str
    err: str
    seconds: float


def damage(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Flip a few bytes, or cut some off or out."""
    how = draw.choice(["flip", "flip", "flip", "cut", "cut", "hole", "zeros"])
    place = draw.randrange(len(content))
    if how == "flip":
        damaged = bytearray(content)
        places = [draw.randrange(len(content)) for _ in range(draw.choice([1, 1, 1, 3, 10]))]
        if draw.random() < 0.3:  # headers are short, and most of what can go wrong is in them
            places = [place % min(len(content), 512) for place in places]
        for place in places:
            damaged[place] ^= draw.randrange(1, 256)
        return bytes(damaged), f"flip {places}"
    if how == "cut":
        return content[:place], f"cut at {place}"
    length = min(draw.choice([1, 10, 100]), len(content) - place)
    between = bytes(length) if how == "zeros" else b""
    return content[:place] + between + content[place + length :], f"{how} of {length} at {place}"


def run(argv: list, folder: Path, typed: str = "") -> Outcome:
    """Run a command line in a forked child, within a deadline and a limit of memory."""
    start = time.monotonic()
    (folder / "stdin").write_text(typed)
    child = os.fork()
    if not child:
        _in_child(list(map(str, argv)), folder)
    status = None
    while status is None and time.monotonic() - start < DEADLINE:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        time.sleep(0.002)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = -signal.SIGALRM
    out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Outcome(None if status == 77 else status, out, err, time.monotonic() - start)


def _in_child(argv: list[str], folder: Path):
    from clipcap_hf.cli import main

    os.setpgid(0, 0)
    os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
    _redirect(folder)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (COMPUTING, COMPUTING))
    os.chdir(folder)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # a test runner may have its own
    status = 77
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _redirect(folder: Path):
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)


# -- what is wrong with an outcome


def faults(case, outcome: Outcome, folder: Path, out: Path) -> list[str]:
    """List what a command did wrong on a damaged file."""
    if outcome.status in (-signal.SIGALRM, -signal.SIGXCPU):
        return ["hang"]
    if outcome.status is not None and outcome.status < 0:
        return [f"killed by signal {-outcome.status}"]
    if outcome.status is None or "Traceback (most recent" in outcome.err:
        return ["traceback"]
    found = []
    if "--debug prints the traceback" in outcome.err:
        found.append("an unexpected error")
    if re.search("out of memory|allocate|MemoryError", outcome.err):
        found.append("absurd sizes")
    if outcome.status == 0:
        return found + _losses(case, outcome, folder, out)
    lines = [line for line in outcome.err.splitlines() if line.startswith("clipcap: ")]
    if not lines:
        found.append("no line that says what is wrong")
    elif not any(name in line for line in lines for name in _names(case, folder)):
        found.append("the file is not named")
    if case.command == "caption" and case.kind not in ("json", "safetensors") and len(outcome.out.splitlines()) != 3:
        found.append("the other images were not captioned")
    return found


def _names(case, folder: Path) -> list[str]:
    """List what a message may name: the file, or for the files of a model or a data set their folder."""
    if case.kind in PICTURES:
        return [case.file]
    return [case.file, str((folder / case.file).parent)]


def _losses(case, outcome: Outcome, folder: Path, out: Path) -> list[str]:
    """Compare the rows that a successful command accounts for with those that there are."""
    rows = ROWS[case.command](outcome, out)
    told = sum(map(int, re.findall(r"(\d+) [^\n]*?(?:left out|cannot be read|could not be)", outcome.err)))
    if rows + told < IMAGES:
        return [f"silent loss: {rows} of {IMAGES} rows, {told} named"]
    named = case.file in outcome.err + _failed(out) or re.search(r"left out, the first is \S", outcome.err)
    if rows < IMAGES and not named and case.kind != "tar":
        return ["what is left out is not named"]
    return []


def _embedded(outcome: Outcome, out: Path) -> int:
    rows = sum(int(count) for count in re.findall(r": (\d+) images, embeddings", outcome.out))
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(out))
    stored = sum(map(len, data.values())) if isinstance(data, DatasetDict) else len(data)
    assert stored == rows, f"{stored} rows are stored, {rows} are named"
    return rows


def _failed(out: Path) -> str:
    return "".join(path.read_text() for path in out.rglob("failed.jsonl"))


def _trained(outcome: Outcome, out: Path) -> int:
    assert (out / "model.safetensors").is_file() and (out / "scores.json").is_file()
    if "Training data: a stream" in outcome.err:
        return IMAGES  # `embed`, which reads the same streams, counts their rows
    return sum(map(int, re.findall(r"Training data: (\d+) images", outcome.err)))


def _evaluated(outcome: Outcome, out: Path) -> int:
    return len(json.loads((out / "results.json").read_text()))


def _converted(outcome: Outcome, out: Path) -> int:
    found = re.search(r": (\d+) images with \d+ captions", outcome.out)
    if found:
        return int(found[1])
    return IMAGES if (out / "model.safetensors").is_file() else 0


ROWS = {
    "caption": lambda outcome, out: len([json.loads(line)["captions"][0] for line in outcome.out.splitlines()]),
    "embed": _embedded,
    "train": _trained,
    "evaluate": _evaluated,
    "convert": _converted,
}


# -- the loop


def main(argv: list[str] | None = None) -> int:
    """Run the cases and print the failures and how many there were of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--only", default="", help="a part of the names of the cases to run")
    parser.add_argument("--keep", help="folder that keeps what failed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        return _loop(Path(root), options)


def _loop(root: Path, options) -> int:
    build(root / "samples")
    chosen = [case for case in cases(root / "samples") if options.only in case.name]
    chosen = chosen[:: max(1, len(chosen) // max(1, options.cases))]
    for case in chosen:  # whole files pass, and what the commands import is there when a child starts
        _check_whole(case, root)
    start, failures, seconds, codes = time.monotonic(), Counter(), Counter(), Counter()
    for number in range(options.first, options.first + options.cases):
        case = chosen[number % len(chosen)]
        folder, out = _copy(root, case)
        file = folder / case.file
        damaged, how = damage(file.read_bytes(), random.Random(f"{options.seed}-{number}"))
        file.unlink()  # a link to the sample
        file.write_bytes(damaged)
        outcome = run(case.argv(folder, out), root / "case")
        try:
            wrong = faults(case, outcome, folder, out)
        except Exception as error:
            wrong = [f"the output is wrong: {type(error).__name__}: {error}"]
        seconds[case.command] += outcome.seconds
        codes[case.command, outcome.status] += 1
        for fault in wrong:
            failures[fault] += 1
            print(f"{number} {case.name}, {how}: {fault}\n{outcome.out[-300:]}{outcome.err[-1500:]}", flush=True)
        if number % 100 == 99:
            print(f"{number + 1} cases, {sum(failures.values())} failures", file=sys.stderr, flush=True)
        if wrong and options.keep:
            shutil.copytree(root / "case", f"{options.keep}/{number}", dirs_exist_ok=True)
    print(f"{options.cases} cases in {time.monotonic() - start:.0f} s: {sum(failures.values())} failures")
    print({name: f"{value:.0f} s" for name, value in seconds.items()}, dict(codes))
    for fault, count in failures.most_common():
        print(f"{count:5} {fault}")
    return int(bool(failures))


def _copy(root: Path, case) -> tuple[Path, Path]:
    shutil.rmtree(root / "case", ignore_errors=True)
    shutil.copytree(root / "samples" / case.sample, root / "case" / "data", copy_function=os.link)
    return root / "case" / "data", root / "case" / "out"


def _check_whole(case, root: Path):
    from clipcap_hf.cli import main as clipcap

    folder, out = _copy(root, case)
    here, kept = os.getcwd(), [os.dup(number) for number in (1, 2)]
    os.chdir(root / "case")
    _redirect(root / "case")
    try:
        status = clipcap(list(map(str, case.argv(folder, out))))
        sys.stdout.flush()
    finally:
        os.chdir(here)
        for number, old in zip((1, 2), kept):
            os.dup2(old, number)
            os.close(old)
    outcome = Outcome(status, *((root / "case" / name).read_text() for name in ("stdout", "stderr")), 0)
    if status or (wrong := faults(case, outcome, folder, out)):
        raise AssertionError(f"{case.name} fails on whole files: {status or wrong}\n{outcome.out}{outcome.err}")


if __name__ == "__main__":
    sys.exit(main())
