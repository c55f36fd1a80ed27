"""What a training needs, besides the parameters, to go on where it was interrupted, as tensors: no pickle."""

import random

import torch
from torch import Tensor, nn

from ..errors import AdapterError


class TrainState:
    """Where a training stands: steps done, the optimiser's moments, the random generators.

    Give one to `train`, which keeps it current. `tensors()` is what to store after a step; `TrainState.of(stored)`
    goes on from there, given the same parameters, with their values of that moment, and the batches that follow.
    On the same machine, with the same number of threads, the steps are then the same to the bit.

        state = TrainState()
        for step in lorank.train(parameters, loss, batches, config, state=state):
            safetensors.torch.save_file(state.tensors(), "state.safetensors")
    """

    def __init__(self) -> None:
        self.step = 0
        self._optimiser: torch.optim.Optimizer | None = None
        self._stored: dict[str, Tensor] = {}

    @staticmethod
    def of(stored: dict[str, Tensor]) -> "TrainState":
        """Return the state that `tensors()` described; raises AdapterError for anything else."""
        missing = {"step", "random.torch", "random.python"} - stored.keys()
        if missing:
            raise AdapterError(f"this is no state of a training: it lacks {', '.join(sorted(missing))}")
        if stored["step"].numel() != 1:
            raise AdapterError(f"this is no state of a training: its step has the shape {tuple(stored['step'].shape)}")
        state = TrainState()
        state.step, state._stored = int(stored["step"]), dict(stored)
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors, {name: tensor}; those of the optimiser are its own, not copies."""
        if self._optimiser is None:
            return dict(self._stored)
        found = {
            "step": torch.tensor(self.step),
            "random.torch": torch.get_rng_state(),
            "random.python": _python_random(),
        }
        if torch.cuda.is_available():
            found |= {f"random.cuda.{i}": generator for i, generator in enumerate(torch.cuda.get_rng_state_all())}
        for index, moments in self._optimiser.state_dict()["state"].items():
            found |= {f"optimiser.{index}.{name}": tensor for name, tensor in moments.items()}
        return found

    def attach(self, optimiser: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
        """Take up an optimiser of parameters, in the order that it has them in.

        What there is of an earlier one is put into it and into the random generators.
        """
        if self.step:
            stored = self.tensors()
            moments = _moments(stored)
            shapes = {index: tuple(found["exp_avg"].shape) for index, found in moments.items()}
            wrong = [i for i, shape in shapes.items() if i >= len(trained) or shape != tuple(trained[i].shape)]
            if wrong or len(moments) != len(trained):
                raise AdapterError(
                    f"the stored state belongs to other parameters: {len(moments)} then, {len(trained)} now"
                    + (f", and number {wrong[0]} had the shape {shapes[wrong[0]]}" if wrong else "")
                )
            _restore_random(stored)
            optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
        self._optimiser, self._stored = optimiser, {}


def _moments(stored: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return copies of an optimiser's moments by the number of the parameter; the stored ones stay as they are."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        kind, _, rest = key.partition(".")
        index, _, name = rest.partition(".")
        if kind == "optimiser" and index.isdecimal():
            moments.setdefault(int(index), {})[name] = tensor.clone()
    unknown = [index for index, found in moments.items() if found.keys() != {"step", "exp_avg", "exp_avg_sq"}]
    if unknown:
        names = ", ".join(sorted(moments[unknown[0]]))
        raise AdapterError(f"the stored state is not AdamW's: of parameter {unknown[0]} it has {names}")
    return moments


def _restore_random(stored: dict[str, Tensor]) -> None:
    try:
        version, *values = stored["random.python"].tolist()
        random.setstate((version, tuple(values), None))
        torch.set_rng_state(stored["random.torch"].cpu())
    except (RuntimeError, TypeError, ValueError) as error:
        raise AdapterError(f"the stored state's random generators cannot be set: {error}") from None
    generators = sorted(key for key in stored if key.startswith("random.cuda."))
    if generators and torch.cuda.device_count() == len(generators):
        torch.cuda.set_rng_state_all([stored[f"random.cuda.{i}"].cpu() for i in range(len(generators))])


def _python_random() -> Tensor:
    version, values, _ = random.getstate()
    return torch.tensor([version, *values], dtype=torch.int64)
