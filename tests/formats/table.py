"""Host x method x format: what each file format makes of each method on each kind of layer, found out by doing it.

    python -m tests.formats.table --write docs/formats.md

puts the table into the page; `test_table.py` holds the page against it.
"""

import argparse
import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorank
from lorank import AdapterError
from lorank.formats import FORMATS
from lorank.formats.content import Content, gather
from lorank.formats.fitting import fit
from lorank.names import Names
from lorank.variants import Spec

from .. import models
from ..contract.cases import CASES, SPECS, Images

METHODS = ("lora", "dora", "pissa", "olora", "milora", "eva", "lora-ga", "lora-fa", "vera", "adalora", "loha", "lokr")
WRITTEN = ("peft", "vllm", "gguf", "mlx", "kohya", "loralib")
EQUAL, FOLDED, LORANK = "equal", "folded", "lorank alone"


@dataclass(frozen=True)
class Row:
    """A kind of layer, in a model that as many formats as possible know."""

    build: Callable[[], nn.Module]
    targets: list[str]
    inputs: Callable[[], Tensor]


def _of_case(name: str) -> Row:
    case = CASES[name]
    return Row(case.model, case.targets, case.inputs)


def _language_model(build: Callable[..., nn.Module], targets: list[str], **options: Any) -> Row:
    return Row(lambda: build(**options).eval(), targets, models.ids)


HOSTS: dict[str, Row] = {
    "Linear": _language_model(models.llama, ["q_proj", "down_proj"]),
    "Conv1D of transformers": _language_model(models.gpt2, ["c_attn", "c_proj"]),
    "parts of a fused projection": _language_model(models.gpt2, ["c_attn[q,v]"]),
    "Embedding": _language_model(models.llama, ["embed_tokens"]),
    "Conv2d": Row(lambda: _images(nn.Conv2d(6, 8, 3)), ["layer"], lambda: torch.randn(2, 6, 7, 7)),
    "Conv2d, grouped": Row(lambda: _images(nn.Conv2d(6, 8, 3, groups=2)), ["layer"], lambda: torch.randn(2, 6, 7, 7)),
    "Conv1d": _of_case("conv-1d"),
    "Conv3d": _of_case("conv-3d"),
    "ConvTranspose": _of_case("conv-transpose-2d"),
    "MultiheadAttention": _of_case("attention"),
    "LSTM, GRU, RNN": _of_case("gru"),
    "Bilinear": _of_case("bilinear"),
    "experts": _of_case("experts"),
}


def _images(layer: nn.Module) -> nn.Module:
    return Images(layer).eval()


def outcome(host: str, method: str, formats: tuple[str, ...] = WRITTEN) -> dict[str, str]:
    """Return what becomes of an adapter in each format: one of the three words above, or why it is refused."""
    row, spec = HOSTS[host], SPECS[method]
    torch.manual_seed(0)
    base, x = row.build(), row.inputs()
    model = copy.deepcopy(base)
    try:
        lorank.adapt(model, spec, row.targets)
        if isinstance(spec, lorank.EVA | lorank.LoRAGA):
            lorank.calibrate(model, lambda x: _logits(model(x)).square().sum(), [x, x])
    except AdapterError as error:
        return dict.fromkeys(formats, _reason(error))
    models.disturb(model)
    with torch.no_grad():
        y, effect = _output(model, x), _output(model, x) - _output(base, x)
    assert effect.abs().max() > 1e-3
    found = {}
    for name in formats:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _written(model, base, spec, x, y, name, Path(folder) / _FILES.get(name, "adapter"))
    return found


_FILES = {"gguf": "adapter.gguf", "kohya": "adapter.safetensors", "loralib": "adapter.pt"}


def _written(model: Any, base: Any, spec: Spec, x: Tensor, y: Tensor, name: str, path: Path) -> str:
    """Write, read and compare; returns what became of the adapter. Outputs that differ are a fault."""
    content = gather(model, "default")
    try:
        notes = FORMATS[name].write(content, path, model)
    except AdapterError as error:
        return _reason(error)
    fresh = copy.deepcopy(base)
    if name == "peft":
        theirs = _with_peft(copy.deepcopy(base), path)
        if theirs is not None:
            torch.testing.assert_close(_output(theirs, x), y, rtol=1e-4, atol=1e-4)
        lorank.load(fresh, path)
        torch.testing.assert_close(_output(fresh, x), y, rtol=1e-5, atol=1e-5)
        if theirs is None:
            return LORANK
        own = spec.variant in ("lora", "dora") or theirs.peft_config["default"].peft_type.value != "LORA"
        return EQUAL if own else FOLDED
    read = _read(name, path, fresh, content)
    fit(fresh, read, "default", activate=True, allow_other_base=False)
    torch.testing.assert_close(_output(fresh, x), y, rtol=1e-4, atol=1e-4)
    same = all(type(update.spec) is type(spec) and update.spec.rank == spec.rank for update in read.updates.values())
    folded = [note for note in notes if "alpha" not in note]
    return EQUAL if same and (not folded or name in ("loralib", "kohya")) else FOLDED


def _read(name: str, path: Path, model: nn.Module, content: Content) -> Content:
    given = FORMATS[name].to_be_told(content)
    if name == "loralib":  # not in a process of its own, which takes its time and has its own tests
        module: Any = FORMATS[name]
        return module.decode(torch.load(path, weights_only=True), Names(model), given)
    return FORMATS[name].read(path, Names(model), given)


def _with_peft(base: Any, path: Path) -> Any:
    """Return the base with the adapter as the real PEFT loads it; None when PEFT refuses the file."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(path)).eval()
    except ValueError as error:
        assert "layers_pattern" in str(error)
        return None


def _output(model: Any, x: Tensor) -> Tensor:
    return _logits(model(x)).detach()


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _reason(error: AdapterError) -> str:
    """Return the first reason of an error, without the names and numbers of this very model."""
    lines = str(error).splitlines()
    text = lines[1] if len(lines) > 1 else lines[0].partition(": ")[2] or lines[0]
    text = re.sub(r"^[\w.\[\]]+: ", "", text.strip())
    text = re.sub(r"\(?\d+ x \d+\)?", "...", text)
    text = re.sub(r"weights of an? \w+; known are .*", "weights of a model of this class", text)
    text = re.sub(r", and this kernel is .*", "", text)
    text = re.sub(r"its parts .* are matrices", "its parts are matrices", text)
    return re.sub(r"(?:[a-z_]\w*\.)+(?:\d+\.|\w+\.)*\w+(?:\[\w+\])?", "the layer", text)


SIGNS = {EQUAL: "=", FOLDED: "≈", LORANK: "◦"}


def lines() -> Iterator[str]:
    """Yield the table and its footnotes."""
    reasons: dict[str, int] = {}
    yield "| layer | format | " + " | ".join(METHODS) + " |"
    yield "|---" * (2 + len(METHODS)) + "|"
    for host in HOSTS:
        found = {method: outcome(host, method) for method in METHODS}
        for name in WRITTEN:
            cells = []
            for method in METHODS:
                what = found[method][name]
                cells.append(SIGNS.get(what) or str(reasons.setdefault(what, len(reasons) + 1)))
            yield f"| {host} | {name} | " + " | ".join(cells) + " |"
    yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason}"


def published(page: Path) -> dict[tuple[str, str, str], str]:
    """Return {(host, method, format): outcome} as a page has it."""
    text = page.read_text(encoding="utf-8").partition("<!-- table -->\n")[2]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    words = {sign: what for what, sign in SIGNS.items()} | reasons
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    methods = rows[0][2:]
    return {
        (host, method, name): words[cell]
        for host, name, *cells in rows[2:]
        for method, cell in zip(methods, cells, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="put the table into this page, after the line <!-- table -->")
    page: Path | None = parser.parse_args().write
    text = "\n".join(lines()) + "\n"
    if page is None:
        print(text)
        return
    before, _, _ = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    page.write_text(f"{before}<!-- table -->\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
