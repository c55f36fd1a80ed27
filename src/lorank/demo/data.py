"""Data without a download: what the standard library says about its own functions.

Every public function and method with a docstring gives a pair: how it is called, and the first line of what is said
about it. There are thousands of them, written by people, under the PSF licence, on every machine that runs this.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_HELD_OUT = 8  # one module in so many is held out, by the hash of its name
_LONGEST = 90  # characters of a call or of a description


@dataclass(frozen=True)
class Pair:
    """A function and what is said about it."""

    module: str  # "json.decoder"
    call: str  # "JSONDecoder.decode(self, s)"
    name: str  # "decode"
    line: str  # "Return the Python representation of ``s``."

    @property
    def held_out(self) -> bool:
        """Whether the whole package that it comes from is kept from training, so that nothing leaks."""
        package = self.module.partition(".")[0].lstrip("_")  # _pydecimal and decimal say the same
        return hashlib.sha256(package.encode()).digest()[0] % _HELD_OUT == 0


def pairs() -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on and the held-out ones, in an order that depends on them alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: dict[str, Pair] = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _LEFT_OUT & set(inside.parts):
            module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
            for pair in _pairs_of(path, module):
                seen.setdefault(pair.line, pair)  # the same words twice would be held out and trained on
    ordered = sorted(seen.values(), key=lambda pair: hashlib.sha256(f"{pair.call}{pair.line}".encode()).digest())
    train, held_out = [pair for pair in ordered if not pair.held_out], [pair for pair in ordered if pair.held_out]
    if len(train) < 500 or len(held_out) < 50:
        raise AdapterError(
            f"the standard library in {root} has only {len(train) + len(held_out)} functions with a description; it "
            "seems to be installed without its source. Train on data of your own: lorank train --help"
        )
    return train, held_out


def _pairs_of(path: Path, module: str) -> Iterator[Pair]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # templates and old code that are no Python of today
        return
    yield from _visit(tree, module, "")


def _visit(node: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[Pair]:
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _visit(child, module, f"{child.name}.")
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        line = (ast.get_docstring(child) or "").strip().partition("\n")[0].strip()
        call = f"{prefix}{child.name}({ast.unparse(child.args)})"
        whole = line.endswith(".") and len(line.split()) >= 4 and line[0].isupper()
        if whole and len(line) <= _LONGEST and len(call) <= _LONGEST and child.name not in line:
            yield Pair(module, call, child.name, line)
