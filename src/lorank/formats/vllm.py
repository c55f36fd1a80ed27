"""A PEFT adapter for consumers that know one rank and one scale: vLLM, and others that read no `rank_pattern`.

Older versions of vLLM read `r` and `lora_alpha` for all layers alike and misscale the exceptions without a
word; all of them refuse what is no pair of factors. So every layer is padded with zeros to the largest rank, and
scales that differ are folded into B. The result is an ordinary file of PEFT's layout, and is read as one.
"""

from pathlib import Path

from torch import nn

from ..errors import raise_problems
from ..names import Names
from ..variants import LoRA
from . import peft
from .content import Content, Given, LayerUpdate, nothing_to_tell
from .pairs import beyond_pairs, pairs_of, uniform

NATIVE, WRITES, to_be_told = ("lora",), True, nothing_to_tell

_LARGEST_RANK = 16  # that vLLM takes unless it is told otherwise


def detect(path: Path) -> bool:
    """Return False: what is written here is PEFT's layout, which that format reads."""
    return False


def read(path: Path, names: Names | None, given: Given) -> Content:
    """Read an adapter in PEFT's layout."""
    return peft.read(path, names, given)


def write(content: Content, path: Path, model: nn.Module | None) -> list[str]:
    """Write an adapter with one rank and scale for all layers into a directory; return what was folded for that.

    Raises AdapterError for what vLLM cannot load: DoRA, convolutions, stacks of experts, heads and biases and tokens
    that were trained beside the updates.
    """
    problems = beyond_pairs(content)
    pairs = pairs_of(content, problems)
    raise_problems("vLLM cannot load this adapter", problems)
    rank, scale, pairs, notes = uniform(pairs)
    spec = LoRA(rank=rank, alpha=rank * scale)
    notes += [f"the tie of {name} with {tie.source} is lost: each has its own" for name, tie in content.tied.items()]
    folded = Content(spec, about=content.about, task=content.task, base_model=content.base_model)
    for name, pair in pairs.items():
        source = content.updates.get(name)
        update = LayerUpdate(spec, {"weight": {"A": pair.A.contiguous(), "B": pair.B.contiguous()}}, lookup=pair.lookup)
        update.transposed = source is not None and source.transposed
        if source is not None and list(source.tensors) == ["weight"]:
            update.fingerprints, update.matrices = source.fingerprints, source.matrices
        folded.updates[name] = update
    peft.write(folded, path, model)
    if rank > _LARGEST_RANK:
        notes.append(f"its rank is {rank}: start vLLM with --max-lora-rank {rank} or more")
    return notes
