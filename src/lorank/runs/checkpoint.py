"""A run's checkpoint: one safetensors file, replaced in one step, that holds all a run needs to go on.

It has the adapter's parameters and buffers, the optimiser's moments and the random generators as tensors, and the place
in the data and the best scores as JSON in the header. No pickle, and no way to have half of it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, enumerate_names, raise_problems
from ..formats import safetensors_file
from ..surgery import adapter_parameters
from ..training import TrainState
from ..tree import entries

FILE = "checkpoint.safetensors"
_KEY = "lorank.run"


@dataclass
class Progress:
    """What a run remembers besides tensors."""

    data: str  # sha256 of the encoded examples
    base: str  # sha256 of some bits of each of its tensors
    recipe: str  # sha256 of the recipe
    threads: int
    device: str
    torch: str
    best: dict[str, float] = field(default_factory=dict)  # the scores of the adapter that is kept, and its step
    seconds: float = 0.0  # spent training so far
    tokens: int = 0  # read in training so far


def write(
    folder: Path,
    model: nn.Module,
    name: str,
    state: TrainState,
    progress: Progress,
    budget: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace the run's checkpoint; `budget` is that of `RankBudget.tensors`."""
    tensors = {f"train.{key}": tensor for key, tensor in state.tensors().items()}
    tensors |= {f"adapter.{key}": tensor for key, tensor in _own(model, name).items()}
    tensors |= {f"budget.{key}": tensor for key, tensor in (budget or {}).items()}
    packed = safetensors_file.pack(tensors, {_KEY: json.dumps(asdict(progress), sort_keys=True)})
    safetensors_file.write_atomically({folder / FILE: packed})


def read(folder: Path) -> tuple[dict[str, Tensor], TrainState, Progress, dict[str, Tensor]]:
    """Return the adapter's tensors, the state of the training, the run's progress and its budget of ranks."""
    path = folder / FILE
    _, tensors, metadata = safetensors_file.read(path)
    try:
        progress = Progress(**json.loads(metadata[_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is no checkpoint of a run, or of another lorank's ({error})") from None
    adapter, stored, budget = (
        {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        for prefix in ("adapter.", "train.", "budget.")
    )
    return adapter, TrainState.of(stored), progress, budget


@torch.no_grad()
def restore(model: nn.Module, name: str, adapter: dict[str, Tensor]) -> None:
    """Put stored values into an adapter, to the bit; raises AdapterError when the two do not have the same tensors."""
    own = _own(model, name)
    problems = []
    if missing := own.keys() - adapter.keys():
        problems.append(f"the checkpoint lacks {enumerate_names(sorted(missing), 3)}")
    if unknown := adapter.keys() - own.keys():
        problems.append(f"the checkpoint has {enumerate_names(sorted(unknown), 3)}, which this adapter has not")
    for key in own.keys() & adapter.keys():
        if own[key].shape != adapter[key].shape or own[key].dtype != adapter[key].dtype:
            problems.append(f"{key} is {tuple(adapter[key].shape)} {adapter[key].dtype} in the checkpoint")
    raise_problems("cannot resume", problems)
    for key, tensor in own.items():
        tensor.data.copy_(adapter[key])


def _own(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the adapter's parameters, and the buffers of its copies, by name."""
    found: dict[str, Any] = dict(adapter_parameters(model, name))
    for layer_name, (_, entry) in entries(model, name).items():
        found |= {f"{layer_name}.adapters.{name}.{key}": buffer for key, buffer in entry.named_buffers()}
    return found
