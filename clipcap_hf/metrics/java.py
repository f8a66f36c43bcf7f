"""Run Java tools (PTB tokenizer, METEOR, SPICE) so that they can neither hang nor leave files behind.

Every process has a deadline, works in a temporary folder, gets its text encoding by a flag, and is ended with all its
children.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from ..extras import install_hint


# The JVM's default charset follows the locale; without this, captions turn to "?" under LANG=C.
ENCODING_FLAGS = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
DEFAULT_TIMEOUT = 900.0


class JavaError(RuntimeError):
    """Java or a jar is missing, or Java failed or did not answer in time."""


def java_timeout() -> float:
    """Return how many seconds a Java process may take: `CLIPCAP_JAVA_TIMEOUT` of the environment, or 900."""
    return float(os.environ.get("CLIPCAP_JAVA_TIMEOUT", DEFAULT_TIMEOUT))


def find_java(purpose: str) -> str:
    """Find the `java` program; the error says that `purpose` needs it."""
    java = shutil.which("java")
    if java is None:
        raise JavaError(
            f"{purpose} needs Java and there is no `java` on the PATH. Install a Java runtime (8 or newer), or leave "
            'METEOR and SPICE out and pass tokenizer="python", whose scores are close to the standard but not exact.'
        )
    return java


def find_jar(relative_path: str, purpose: str) -> Path:
    """Find a jar of pycocoevalcap without importing it."""
    spec = importlib.util.find_spec("pycocoevalcap")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        jar = Path(root, relative_path)
        if jar.is_file():
            return jar
    raise JavaError(
        f"{purpose} needs {relative_path} of the package pycocoevalcap: {install_hint('metrics')}. Without it, "
        'BLEU, ROUGE-L and CIDEr run with tokenizer="python", whose scores are close to the standard but not exact.'
    )


def end(process: subprocess.Popen) -> None:
    """End the process and its children: if `java` is a wrapper script, the real program is a child."""
    if process.returncode is not None:
        return  # another process may have its number by now
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, see start_new_session
        else:
            process.kill()
    except ProcessLookupError:
        pass
    process.wait()


@contextmanager
def java_process(arguments, purpose: str, cwd, **streams):
    """Start `java arguments` in the folder `cwd`, yield (process, failed), and end it on leaving, whatever happens.

    `failed(reason)` builds the `JavaError` to raise, with the last lines that Java wrote to its error stream.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [find_java(purpose), *ENCODING_FLAGS, *map(str, arguments)],
            cwd=cwd,
            stderr=errors,
            start_new_session=True,
            **streams,
        )

        def failed(reason: str) -> JavaError:
            errors.seek(0)
            tail = errors.read()[-2000:].decode("utf-8", "replace").strip()
            return JavaError(f"{purpose}: Java {reason}." + (f" It wrote:\n{tail}" if tail else ""))

        try:
            yield process, failed
        finally:
            end(process)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except OSError:  # text was still buffered when the process ended
                        pass


def timeout_reason(timeout: float) -> str:
    return f"did not answer within {timeout:g} s and was ended (the limit is CLIPCAP_JAVA_TIMEOUT, in seconds)"


def run_java(arguments, purpose: str, cwd) -> None:
    """Run `java arguments` in `cwd` to its end. Results go to files, since a grandchild could keep a pipe open."""
    timeout = java_timeout()
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with java_process(arguments, purpose, cwd, **streams) as (process, failed):
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise failed(timeout_reason(timeout)) from None
        if code != 0:
            raise failed(f"ended with exit code {code}")
