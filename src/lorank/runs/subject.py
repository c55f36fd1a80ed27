"""What a run trains: an adapter on a frozen base, or all of the base."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, enumerate_names
from ..formats import save
from ..health import Watch
from ..idle import idle_experts, is_idle
from ..models import quiet
from ..surgery import adapter_parameters
from ..tree import entries

ADAPTER = "default"  # the adapter's name on the model of a run
ABOUT = "lorank.json"  # beside a whole model: what it was trained for, as an adapter's file says it


class Subject(ABC):
    """What a run trains of a model, keeps as its result, and takes up again from a checkpoint."""

    kept: ClassVar[str]  # the folder of the result, in that of the run

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what the optimiser gets, by name."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return all that training changes, by name: what a checkpoint has to hold."""

    @abstractmethod
    def keep(self, run: Path, about: Mapping[str, Any]) -> None:
        """Save the result into a run's folder, in the place of an earlier one."""

    def recover(self, run: Path) -> None:
        """Remove, or finish, what a process that was killed has left of a write."""
        for partial in [*run.glob(".*.partial"), *(run / self.kept).glob(".*.partial")]:
            if partial.is_file():
                partial.unlink()

    def watch(self, steps: int) -> Callable[[], list[str]]:
        """Return what looks after the first steps: it returns remarks, and raises when something does not train."""
        return list


class AdapterSubject(Subject):
    """An adapter; the base is frozen."""

    kept = "adapter"

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return adapter_parameters(self.model, ADAPTER)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(adapter_parameters(self.model, ADAPTER))
        for layer_name, (_, entry) in entries(self.model, ADAPTER).items():  # copies have buffers too
            found |= {f"{layer_name}.adapters.{ADAPTER}.{key}": buffer for key, buffer in entry.named_buffers()}
        return found

    def keep(self, run: Path, about: Mapping[str, Any]) -> None:
        save(self.model, run / self.kept, ADAPTER, about=about)

    def watch(self, steps: int) -> Callable[[], list[str]]:
        return Watch(self.model, ADAPTER, steps=steps)


class WholeModel(Subject):
    """All parameters of the base that the loss depends on, trained in place."""

    kept = "model"

    def __init__(self, model: Any, tokenizer: Any, loss: Callable[[], Tensor]) -> None:
        """Take a model, and a function that runs it on a batch: what gets no gradient from it is left as it is."""
        super().__init__(model)
        self.tokenizer = tokenizer
        model.requires_grad_(True)
        loss().backward()
        named = dict(model.named_parameters())
        without = {name for name, parameter in named.items() if parameter.grad is None}
        experts = idle_experts(without, named)  # others may see a token in another batch
        self.unused = sorted(name for name in without if not is_idle(name, experts))
        self._trained = {name: parameter for name, parameter in named.items() if name not in set(self.unused)}
        for name, parameter in named.items():
            parameter.grad = None
            parameter.requires_grad_(name in self._trained)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._trained

    def tensors(self) -> dict[str, Tensor]:
        return {**self._trained, **dict(self.model.named_buffers())}

    def watch(self, steps: int) -> Callable[[], list[str]]:
        remarks = []
        if self.unused:
            remarks = [f"the loss does not depend on {enumerate_names(self.unused, 3)}, which stay as they are"]

        def once() -> list[str]:
            said, remarks[:] = remarks[:], []
            return said

        return once

    def recover(self, run: Path) -> None:
        super().recover(run)
        target, partial, old = run / self.kept, run / f".{self.kept}.partial", run / f".{self.kept}.old"
        if old.exists() and not target.exists():  # killed between the two renames of `keep`
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)

    def keep(self, run: Path, about: Mapping[str, Any]) -> None:
        """Save a whole checkpoint, as transformers has it, with the tokenizer; the old one goes when it is there."""
        target, partial, old = run / self.kept, run / f".{self.kept}.partial", run / f".{self.kept}.old"
        self.recover(run)
        try:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            with quiet():
                self.model.save_pretrained(partial)
                self.tokenizer.save_pretrained(partial)
            (partial / ABOUT).write_text(json.dumps(dict(about), indent=2) + "\n", encoding="utf-8")
            if target.exists():
                target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise AdapterError(f"cannot write {target}: {error.strerror or error}") from error


@torch.no_grad()
def restore(subject: Subject, stored: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's values into a subject, to the bit; raises AdapterError when their tensors differ."""
    own = subject.tensors()
    problems = []
    if missing := own.keys() - stored.keys():
        problems.append(f"the checkpoint lacks {enumerate_names(sorted(missing), 3)}")
    if unknown := stored.keys() - own.keys():
        problems.append(f"the checkpoint has {enumerate_names(sorted(unknown), 3)}, which this run does not train")
    for key in own.keys() & stored.keys():
        if own[key].shape != stored[key].shape or own[key].dtype != stored[key].dtype:
            problems.append(f"{key} is {tuple(stored[key].shape)} {stored[key].dtype} in the checkpoint")
    if problems:
        raise AdapterError(f"cannot resume: {'; '.join(problems)}")
    for key, tensor in own.items():
        tensor.data.copy_(stored[key])
