"""The two Java programs inside pycocoevalcap, run with care: PTBTokenizer and METEOR 1.5.

pycocoevalcap's own wrappers hang, leak processes or shift captions when Java is missing or dies, when the
locale writes decimal commas, when the package folder is read-only, or when a caption holds a line break or
`|||` (pycocoevalcap issue 15, coco-caption issues 6, 8, 17, 25). These wrappers raise JavaError, one line,
instead.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

from mmrstraj_jax.evaluation.ptb import one_line

PTB_NAME = "ptb-corenlp-3.4.1"
# The JVM's locale decides METEOR's decimal sign and both programs' charset; the user's must not.
_LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
# What pycocoevalcap drops after tokenising; the brackets never match, since -lowerCase writes them "-lrb-".
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


class JavaError(RuntimeError):
    """A Java program is missing, died, hung, or answered something else: one line that says which and what to
    do.
    """


def available() -> bool:
    """Whether a `java` command is on the PATH (it may still fail to run)."""
    return shutil.which("java") is not None


def _java() -> str:
    path = shutil.which("java")
    if path is None:
        raise JavaError("no `java` command was found; install a Java runtime, version 8 or newer")
    return path


def _jar(*parts: str) -> Path:
    # find_spec and not import: pycocoevalcap's modules import each other's Java paths
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise JavaError("the package pycocoevalcap, which brings the jar files, is not installed")
    jar = Path(spec.submodule_search_locations[0], *parts)
    if not jar.exists():
        raise JavaError(f"pycocoevalcap lacks its file {'/'.join(parts)}; install it again")
    return jar


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def ptb_tokenize(captions: list[str], timeout: float = 300.0) -> list[str]:
    """pycocoevalcap's tokens of each caption, joined by one space.

    Like the original, a caption's last word may depend on the caption after it: "zone A." keeps its full stop
    unless the next line begins with "The" or the like. Raises JavaError.
    """
    if not captions:
        return []
    jar = _jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    command = [_java(), *_LOCALE, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    text = "\n".join(one_line(caption) for caption in captions) + "\n"
    # A lone surrogate (half an emoji in broken JSON) has no UTF-8 form; PTB drops what it cannot read anyway.
    data = text.encode("utf-8", "replace")
    try:
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"], input=data, capture_output=True, timeout=timeout
        )
    except OSError as error:  # of another processor, or a script without its interpreter
        raise JavaError(f"{command[0]} cannot be run ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise JavaError(f"PTBTokenizer did not finish in {timeout:.0f} s") from None
    if done.returncode:
        raise JavaError(f"PTBTokenizer failed: {_last_line(done.stderr.decode('utf-8', 'replace'))}")
    lines = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if len(lines) != len(captions):
        raise JavaError(f"PTBTokenizer answered {len(lines)} lines for {len(captions)} captions")
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in lines
    ]


class Meteor:
    """METEOR 1.5 (`-l en -norm`, exact, stem, synonym and paraphrase matches) as a context manager.

    The process starts on entry and loads its paraphrases (7 s of processor time) while the caller does other
    work; it is killed on exit and after `timeout` seconds. Raises JavaError, also on entry.
    """

    def __init__(self, timeout: float = 900.0):
        self.timeout = timeout

    def __enter__(self) -> "Meteor":
        jar = _jar("meteor", "meteor-1.5.jar")
        if not jar.with_name("data").joinpath("paraphrase-en.gz").exists():  # METEOR would wait for ever
            raise JavaError("pycocoevalcap lacks its file meteor/data/paraphrase-en.gz; install it again")
        command = [_java(), "-Xmx2G", *_LOCALE, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._stderr = tempfile.TemporaryFile()  # a pipe that nobody reads fills up and blocks the program
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                cwd=jar.parent,
                start_new_session=True,  # of a script the children hold the pipes and must die too
            )
        except OSError as error:
            self._stderr.close()
            raise JavaError(f"{command[0]} cannot be run ({error.strerror})") from None
        self._timed_out = False
        self._watchdog = threading.Timer(self.timeout, self._on_timeout)
        self._watchdog.daemon = True
        self._watchdog.start()
        return self

    def _on_timeout(self) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __exit__(self, *_) -> None:
        self._watchdog.cancel()
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):  # what was still buffered for the dead process
                stream.close()

    def _failure(self) -> JavaError:
        if self._timed_out:
            return JavaError(f"METEOR 1.5 did not finish in {self.timeout:.0f} s and was stopped")
        self._kill()
        self._process.wait()
        self._stderr.seek(0)
        message = self._stderr.read().decode("utf-8", "replace")
        return JavaError(f"METEOR 1.5 stopped: {_last_line(message)}; it needs 2 GB of free memory")

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure() from None

    def _receive(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return line.decode("utf-8", "replace").strip()

    def score(self, references: list[list[str]], predictions: list[str]) -> tuple[float, list[float]]:
        """(score of the set, score of each item), 0 to 1, from tokenised text.

        The set's score comes from summed statistics, so it is not the mean of the items'.
        """
        statistics = []
        for refs, prediction in zip(references, predictions, strict=True):
            fields = [_field(text) for text in (*refs, prediction)]
            self._send(" ||| ".join(["SCORE", *fields]))
            statistics.append(self._receive())
        self._send(" ||| ".join(["EVAL", *statistics]))
        items = [self._number() for _ in predictions]
        return self._number(), items

    def _number(self) -> float:
        line = self._receive()
        try:
            return float(line)
        except ValueError:
            raise JavaError(f"METEOR 1.5 answered {line[:80]!r} where a number was expected") from None


def _field(text: str) -> str:
    # `|||` separates the protocol's fields; pycocoevalcap removes it from predictions and trips over
    # references
    return one_line(text).replace("|||", "").replace("  ", " ")
