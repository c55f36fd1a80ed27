"""The paper's claims on memory and storage (abstract, sections 1 and 4.2), recomputed with their assumptions."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ..baselines import Full
from ..models import attend_to_all, empty_base, recompute_activations
from ..surgery import adapt
from ..variants import LoRA
from .paper import trained_parameters
from .paper_rows import QV, Row
from .training import training_costs

_FULL = Row("", "Adam fine-tuning", "175B", "gpt3-175b", (Full(),))
_LORA = Row("", "LoRA, r = 4 on Wq and Wv", "18.8M", "gpt3-175b", (LoRA(rank=4),), QV)
_LENGTH = 2048  # tokens of the one text in the step that is simulated
_ASSUMED = (  # what is held, and for each trained parameter how many bytes of it beside two of weight
    ("FP16 weights and moments; gradients freed as they are used", 4),
    ("FP16 weights, gradients and moments", 6),
    ("FP16 weights and gradients, FP32 moments", 10),
    ("FP16 weights and gradients, FP32 moments and master copies", 14),
)


@dataclass(frozen=True)
class Holding:
    """Bytes that training GPT-3 175B takes, under one assumption about what is held."""

    held: str
    full: int  # fine-tuning with Adam
    lora: int

    @property
    def times(self) -> float:
        return self.full / self.lora


@dataclass(frozen=True)
class Claim:
    """A figure of the paper beside ours."""

    claim: str
    printed: str
    ours: str
    how: str


def holdings() -> Iterator[Holding]:
    """Yield what training takes without activations, which training over many GPUs recomputes and spreads over them.

    The last is a whole step of `lorank.train`, followed on the meta device: one text, activations computed again.
    """
    full, lora = trained_parameters(_FULL), trained_parameters(_LORA)
    for held, beside in _ASSUMED:
        yield Holding(held, (2 + beside) * full, 2 * full + (2 + beside) * lora)
    yield Holding(
        f"all of a step of lorank.train on {_LENGTH:,} tokens, FP16 base, activations recomputed",
        _step(None),
        _step(LoRA(rank=4)),
    )


@cache
def _step(spec: LoRA | None) -> int:
    """Return the peak of a step of training GPT-3 175B, or an adapter on it."""
    model = empty_base("gpt3-175b", "causal-lm", dtype=torch.float16).train()
    if spec is not None:
        adapt(model, spec, list(QV))
    attend_to_all(model)
    recompute_activations(model)
    ids = torch.zeros(1, _LENGTH, dtype=torch.long, device="meta")

    def loss() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return functional.cross_entropy(logits[0].float(), ids[0])

    return training_costs(model, loss, device="cuda").memory.total


def claims() -> Iterator[Claim]:
    """Yield the claims that follow from counts alone."""
    full, lora = trained_parameters(_FULL), trained_parameters(_LORA)
    base, file = 2 * full, 2 * lora
    least = next(holdings())
    yield Claim(
        *("memory of training with Adam, and with LoRA", "1.2 TB -> 350 GB, 3x less"),
        f"{least.full / 1e12:.2f} TB -> {least.lora / 1e9:.1f} GB, {least.times:.1f}x less",
        "weights and moments in FP16; with FP16 gradients fine-tuning takes "
        f"{8 * full / 1e12:.2f} TB: 1.2 TB lies between the two and is neither",
    )
    yield Claim(
        *("checkpoint, r = 4 on Wq and Wv", "35 MB", f"{file / 1e6:.2f} MB"),
        f"{lora:,} numbers in FP16: {file / 2**20:.1f} MiB; lorank saves float32, {2 * file / 1e6:.1f} MB",
    )
    yield Claim(
        *("checkpoint, fine-tuning / LoRA", "10,000x", f"{full / lora:,.0f}x"),
        "the printed 350 GB / 35 MB; trained parameters have the same ratio",
    )
    adapted = base + 100 * file
    yield Claim(
        *("100 adapted models", "354 GB, not 35 TB", f"{adapted / 1e9:.1f} GB, not {100 * base / 1e12:.1f} TB"),
        "one base and 100 adapters in FP16",
    )
    yield Claim(
        *("share of trained parameters, as small as", "0.01%", f"{lora / full:.4%}"),
        "r = 4 on Wq and Wv; Table 4's 4.7M would be 0.0027%",
    )
