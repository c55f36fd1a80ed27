"""A run's checkpoint: one safetensors file, replaced in one step, that holds all a run needs to go on.

It has what is trained, parameters and buffers, the optimiser's moments and the random generators as tensors, and the
place in the data and the best scores as JSON in the header. No pickle, and no way to have half of it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ..errors import AdapterError
from ..formats import safetensors_file
from ..training import TrainState

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
    own: Mapping[str, Tensor],
    state: TrainState,
    progress: Progress,
    budget: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace the run's checkpoint; `own` are the tensors that training changes, `budget` those of `RankBudget`."""
    tensors = {f"train.{key}": tensor for key, tensor in state.tensors().items()}
    tensors |= {f"adapter.{key}": tensor for key, tensor in own.items()}
    tensors |= {f"budget.{key}": tensor for key, tensor in (budget or {}).items()}
    packed = safetensors_file.pack(tensors, {_KEY: json.dumps(asdict(progress), sort_keys=True)})
    safetensors_file.write_atomically({folder / FILE: packed})


def read(folder: Path) -> tuple[dict[str, Tensor], TrainState, Progress, dict[str, Tensor]]:
    """Return the tensors that were trained, the state of the training, the run's progress and its budget of ranks."""
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
