"""METEOR and SPICE, which only their authors' Java programs compute exactly."""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE

import numpy as np

from .formulas import Scores
from .java import JavaError, end, find_jar, java_process, java_timeout, run_java, timeout_reason


METEOR_JAR = "meteor/meteor-1.5.jar"


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[np.ndarray]) -> list[Scores]:
    """Compute METEOR 1.5 of groups of images and of each image (Denkowski and Lavie, 2014), in 0..1, for English.

    A group's score comes from summed statistics and is not the mean over images. Java starts once for all groups.

    Args:
        captions (`Sequence[str]`): n tokenized captions.
        references (`Sequence[Sequence[str]]`): n lists of tokenized references.
        groups (`Sequence[np.ndarray]`): The indices of each group's images.

    Raises:
        JavaError: If Java or pycocoevalcap is missing, or Java failed or hung.
    """
    jar = find_jar(METEOR_JAR, "METEOR")
    command = ("-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm")
    lines = [
        " ||| ".join(("SCORE", *map(_field, group), _field(caption))) for caption, group in zip(captions, references)
    ]
    with (
        tempfile.TemporaryDirectory(prefix="clipcap_meteor_") as folder,
        java_process(command, "METEOR", folder, stdin=PIPE, stdout=PIPE) as (process, failed),
        _Conversation(process, failed, java_timeout()) as java,
    ):
        # Write from a thread: if both pipes were full, Java and we would wait for each other forever.
        sender = threading.Thread(target=java.send, args=(lines,), daemon=True)
        sender.start()
        statistics = java.receive(len(lines))
        sender.join()
        results = []
        for group in groups:
            java.send([" ||| ".join(("EVAL", *(statistics[image] for image in group)))])
            *per_image, total = map(float, java.receive(len(group) + 1))
            results.append({"meteor": (total, np.array(per_image))})
    return results


def _field(text: str) -> str:
    return text.replace("|||", "").replace("  ", " ")  # "|||" separates fields in METEOR's protocol


class _Conversation:
    """Write lines to a Java process and read its answers; end it if they do not come in time."""

    def __init__(self, process, failed: Callable[[str], JavaError], timeout: float):
        self.process, self.failed, self.timeout = process, failed, timeout
        self.late = threading.Event()
        self.timer = threading.Timer(timeout, self._give_up)
        self.timer.daemon = True

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *exception):
        self.timer.cancel()

    def _give_up(self):
        self.late.set()
        end(self.process)

    def send(self, lines: Sequence[str]):
        try:
            self.process.stdin.write("".join(line + "\n" for line in lines).encode("utf-8"))
            self.process.stdin.flush()
        except OSError:  # Java has ended; `receive` says why
            pass

    def receive(self, count: int) -> list[str]:
        answers = []
        for _ in range(count):
            answer = self.process.stdout.readline().decode("utf-8").strip()
            if not answer:
                raise self.failed(timeout_reason(self.timeout) if self.late.is_set() else "stopped answering")
            answers.append(answer)
        return answers


# CoreNLP 3.6 accesses java.lang, which Java 9 and later forbid by default.
_OPEN_MODULES = ("--add-opens", "java.base/java.lang=ALL-UNNAMED")
_SPICE_JARS = ("spice-1.0.jar", "stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def spice_class_path(home: str | os.PathLike | None) -> str:
    """Return a class path of the jars in `home` and `home/lib`, with pycocoevalcap's in place of missing ones."""
    home = home or os.environ.get("CLIPCAP_SPICE_HOME")
    remedy = (
        "SPICE's jars are not shipped. Download SPICE-1.0 (https://panderson.me/spice) and Stanford CoreNLP 3.6.0 "
        f"(stanford-corenlp-full-2015-12-09), put {', '.join(_SPICE_JARS)} into one folder or its subfolder lib/, and "
        "name the folder by spice_home=... or the environment variable CLIPCAP_SPICE_HOME."
    )
    if not home:
        raise JavaError(remedy)
    folders = [Path(home).absolute(), Path(home).absolute() / "lib"]
    missing = {jar for jar in _SPICE_JARS if not any((folder / jar).is_file() for folder in folders)}
    if missing == {"spice-1.0.jar"}:  # pycocoevalcap ships this one and its libraries, but not CoreNLP
        try:
            bundled = find_jar("spice/spice-1.0.jar", "SPICE").parent
        except JavaError:
            raise JavaError(f"spice-1.0.jar not found in {home}. {remedy}") from None
        folders += [bundled, bundled / "lib"]
    elif missing:
        raise JavaError(f"{', '.join(sorted(missing))} not found in {home}. {remedy}")
    return os.pathsep.join(str(folder / "*") for folder in folders)


def spice(captions: Sequence[str], references: Sequence[Sequence[str]], home=None) -> Scores:
    """Compute SPICE, the mean over images, and of each image (Anderson et al., 2016), in 0..1, for English.

    SPICE is the F-score of scene-graph tuples. An image for which it has no number is NaN, as in the COCO evaluation.

    Args:
        captions (`Sequence[str]`): n tokenized captions.
        references (`Sequence[Sequence[str]]`): n lists of tokenized references.
        home (`str` or `Path`, *optional*): The folder with the jars; by default `CLIPCAP_SPICE_HOME` of the
            environment.

    Raises:
        JavaError: If Java or a jar is missing (the message says where to get it), or Java failed or hung.
    """
    class_path = spice_class_path(home)
    images = [
        {"image_id": image, "test": caption, "refs": list(group)}
        for image, (caption, group) in enumerate(zip(captions, references))
    ]
    with tempfile.TemporaryDirectory(prefix="clipcap_spice_") as folder:
        Path(folder, "in.json").write_text(json.dumps(images), encoding="utf-8")  # ASCII: non-ASCII is escaped
        command = (*_OPEN_MODULES, "-Xmx8G", "-cp", class_path, "edu.anu.spice.SpiceScorer", "in.json")
        run_java((*command, "-out", "out.json", "-subset", "-silent"), "SPICE", folder)
        scored = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
    by_image = {item["image_id"]: item["scores"]["All"]["f"] for item in scored}
    if sorted(by_image) != list(range(len(captions))):
        raise JavaError(f"SPICE returned scores of {len(by_image)} images for {len(captions)} captions.")
    per_image = np.array([np.nan if by_image[n] is None else by_image[n] for n in range(len(captions))], float)
    return {"spice": (float(per_image.mean()), per_image)}
