"""convert: an adapter file in another format, with what became of it said, and the outputs compared if wanted."""

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError, did_you_mean, raise_problems
from .formats import FORMATS, Content, Given, detect, load, read, writable, write
from .formats.content import not_finite, other_tensors, tensors_of_updates
from .formats.fitting import bind
from .surgery import remove
from .tree import unwrapped


@dataclass
class Conversion:
    """What converting did. Printing it says what was kept, and what the new file says in another way."""

    source: Path
    target: Path
    source_format: str
    target_format: str
    layers: int
    methods: dict[str, int]  # {method: layers}
    kept: list[str]
    folded: list[str]
    remarks: list[str]
    content: Content = field(repr=False)  # what was read, and written
    verified: "Verification | None" = None

    @property
    def told(self) -> Given:
        """What a reader of the result has to be told."""
        return FORMATS[self.target_format].to_be_told(self.content)

    def to_json(self) -> dict[str, Any]:
        facts = {name: value for name, value in vars(self).items() if name != "content"}
        verified = None if self.verified is None else asdict(self.verified)
        return facts | {"source": str(self.source), "target": str(self.target), "verified": verified}

    def __str__(self) -> str:
        methods = ", ".join(f"{number} of {method}" for method, number in self.methods.items())
        lines = [f"{self.source_format} to {self.target_format}: {self.layers} layers ({methods}), {self.target}"]
        lines += [f"kept: {text}" for text in self.kept]
        lines += [f"written in another way: {text}" for text in self.folded]
        lines += [f"note: {text}" for text in self.remarks]
        if self.verified is not None:
            lines.append(str(self.verified))
        return "\n".join(lines)


@dataclass(frozen=True)
class Verification:
    """How the outputs of a model with the source compare with those with the result, on the same inputs."""

    largest_difference: float  # of any number in the outputs
    largest_output: float
    effect: float  # the largest difference that the adapter makes to the base
    inputs: list[int] = field(default_factory=list)  # shape

    @property
    def equal(self) -> bool:
        """Whether the two agree up to rounding: to a thousandth of the adapter's effect, or of float32."""
        return self.largest_difference <= max(1e-3 * self.effect, 1e-5 * self.largest_output)

    def __str__(self) -> str:
        verdict = "the outputs agree" if self.equal else "THE OUTPUTS DIFFER"
        return (
            f"{verdict}: by at most {self.largest_difference:.2g} of {self.largest_output:.3g}, where the adapter "
            f"makes a difference of {self.effect:.3g}"
        )


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "peft",
    model: nn.Module | None = None,
    *,
    allow_pickle: bool = False,
    alpha: float | None = None,
    parts: tuple[str, ...] = (),
) -> Conversion:
    """Write an adapter file in another format, and return what became of it.

    source: a file or directory in any format that lorank reads; it is told by what it holds.
    to: the format to write, one of `lorank.formats.FORMATS`.
    model: of the architecture that the adapter is for; it may be on the meta device. Needed for formats whose names or
        rows depend on it (GGUF, torchtune, kohya), and for layers other than matrices.
    allow_pickle, alpha, parts: as for `load`.

    Raises AdapterError, which lists all that is wrong with the source or impossible in the new format, before anything
    is written.
    """
    if to not in FORMATS:
        hint = did_you_mean(to, writable(), "formats that can be written are")
        raise AdapterError(f"cannot convert: unknown format '{to}'; {hint}")
    content = read(source, model, allow_pickle=allow_pickle, alpha=alpha, parts=parts)
    problems = content.obstacles() + not_finite(tensors_of_updates(content), other_tensors(content))
    if model is not None:
        bind(unwrapped(model), content, problems)
    if not (content.updates or content.copies or content.tokens or content.biases or content.inserted):
        problems.append("it holds no adapter")
    raise_problems(f"cannot convert {source}", problems)
    path = Path(target).expanduser()
    folded = write(content, path, to, None if model is None else unwrapped(model))
    if to not in ("peft", "vllm", "lorank") and any(update.fingerprints for update in content.updates.values()):
        content.remarks.append("the format has no place for what recognises the base: another one will not be noticed")
    methods = Counter(update.spec_of(part).variant for update in content.updates.values() for part in update.tensors)
    return Conversion(
        source=Path(source),
        target=path,
        source_format=detect(Path(source).expanduser()) or "",
        target_format=to,
        layers=len(content.updates),
        methods=dict(methods),
        kept=_kept(content),
        folded=folded,
        remarks=content.remarks,
        content=content,
    )


def _kept(content: Content) -> list[str]:
    kept = [f"{name}, trained whole" for name in content.copies]
    kept += [f"the bias of {name}" for name in content.biases]
    kept += [str(baseline) for baseline in content.baselines]
    kept += [f"rows of {len(ids)} tokens of {name}" for name, (ids, _) in content.tokens.items()]
    return kept + [f"the tie of {name} with {tie.source}" for name, tie in content.tied.items()]


@torch.no_grad()
def verify(
    model: nn.Module,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    inputs: dict[str, Tensor],
    told: Given | None = None,
    told_target: Given | None = None,
) -> Verification:
    """Compare the outputs of a model with one adapter file and with another, on the same inputs, in eval mode.

    told, told_target: what the files do not say themselves. The model is as it was afterwards. Raises AdapterError
    when one of the two does not load.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        outputs = [_output(model, inputs)]
        for path, given in ((source, told or Given()), (target, told_target or Given())):
            load(model, path, "verified", allow_other_base=True, **vars(given))
            try:
                outputs.append(_output(model, inputs))
            finally:
                remove(model, "verified")
    finally:
        for module, mode in modes.items():
            module.training = mode
    base, before, after = outputs
    return Verification(
        largest_difference=float((after - before).abs().max()),
        largest_output=float(before.abs().max()),
        effect=float((before - base).abs().max()),
        inputs=list(next(iter(inputs.values())).shape),
    )


def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name).float()
    raise AdapterError(f"cannot compare outputs of {type(model).__name__}: they have no logits and no hidden states")
