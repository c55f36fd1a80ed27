"""A run: training with evaluation, checkpoints and resume, as a generator of events."""

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import in_order
from ..errors import AdapterError, enumerate_names
from ..extras import require
from ..formats.safetensors_file import write_atomically
from ..tasks import Tensors
from ..tasks.base import evaluating, to_device
from ..training import RankBudget, Step, TrainState, train
from ..variants import AdaLoRA
from ..version import __version__
from . import checkpoint, metrics
from .prepare import Prepared, seed_everything
from .recipe import Recipe
from .subject import ADAPTER, restore

RECIPE, FACTS = "recipe.yaml", "run.json"


@dataclass(frozen=True)
class Trained:
    """An optimiser step was done."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    memory: int  # bytes, at most so far: on the GPU, or of the process


@dataclass(frozen=True)
class Evaluated:
    """The held-out data was scored."""

    step: int
    scores: dict[str, float]
    kept: bool  # it is the best so far, and the adapter was saved


@dataclass(frozen=True)
class Stopped:
    """The run ended: done, or on request with a checkpoint to go on from."""

    step: int
    done: bool
    best: dict[str, float]
    seconds: float


Event = Trained | Evaluated | Stopped


class Run:
    """A prepared run in its folder.

    folder/recipe.yaml   the recipe with everything filled in
    folder/run.json      versions, device, command, result
    folder/metrics.jsonl every step's numbers; loss.png draws them
    folder/adapter/      the best adapter so far (the last one, when nothing is held out); of full training, model/
    folder/checkpoint.safetensors
    """

    def __init__(self, prepared: Prepared, *, resume: bool = False):
        """Make the folder, or take up the run in it. Raises AdapterError when it holds another run."""
        self.prepared, self.recipe = prepared, prepared.recipe
        assert self.recipe.output is not None, "chosen in prepare"
        self.folder = Path(self.recipe.output).expanduser()
        self.state = TrainState()
        self.stopping = False
        self.budget: RankBudget | None = None  # of ranks, of AdaLoRA
        self._stored_budget: dict[str, Tensor] = {}
        self.progress = checkpoint.Progress(
            data=prepared.data_digest(),
            base=prepared.base_digest(),
            recipe=prepared.recipe_digest(),
            threads=torch.get_num_threads(),
            device=str(prepared.device),
            torch=torch.__version__,
        )
        self.remarks: list[str] = []
        metrics.require_libraries(self.recipe.tensorboard, self.recipe.wandb)
        if resume:
            self._take_up()
        else:
            self._make_folder()

    def stop(self) -> None:
        """Have the run end after the current step, with a checkpoint."""
        self.stopping = True

    def events(self) -> Iterator[Event]:
        """Train, and yield what happens."""
        recipe, model, config = self.recipe, self.prepared.model, self.prepared.config
        subject = self.prepared.subject
        assert config.steps is not None and recipe.eval_every and recipe.checkpoint_every, "chosen in prepare"
        if self.state.step >= config.steps:
            yield self._finish()  # again: it may have been killed after its last checkpoint
            return
        if self.state.step == 0:
            seed_everything(recipe.seed)  # whatever else was drawn since the run was prepared
        log = metrics.Metrics(
            self.folder,
            after=self.state.step,
            tensorboard=recipe.tensorboard,
            wandb=recipe.wandb,
            config=asdict(recipe),
        )
        try:
            if self.state.step == 0 and self.prepared.held_out:
                yield self._evaluate(log)
            if isinstance(self.prepared.plan.spec, AdaLoRA):
                self.budget = RankBudget(model, config.steps, ADAPTER)
                self.budget.restore(self._stored_budget)
            watch = subject.watch(min(5, config.steps - self.state.step))
            model.train()
            began = time.perf_counter()
            for step in train(subject.parameters(), self._loss, self._batches(), config, state=self.state):
                self.remarks += watch()
                if self.budget is not None:
                    self.budget.update(step.index)
                yield self._note(step, time.perf_counter() - began, log)
                last = step.index == config.steps
                if self.prepared.held_out and (last or step.index % recipe.eval_every == 0):
                    yield self._evaluate(log)
                if last and not self.progress.best:
                    self._keep()
                    if self.prepared.held_out:
                        self.remarks.append(f"no evaluation had a number for '{self._best}': the last adapter was kept")
                if last or self.stopping or step.index % recipe.checkpoint_every == 0:
                    checkpoint.write(self.folder, subject.tensors(), self.state, self.progress, self._budget_tensors())
                if self.stopping and not last:
                    break
                began = time.perf_counter()
        finally:
            log.close()
        yield self._finish()

    _tokens = 0  # read since the last step

    def _note(self, step: Step, seconds: float, log: metrics.Metrics) -> Trained:
        """Write down the numbers of a step."""
        speed, memory, loss = self._tokens / seconds, peak_memory(self.prepared.device), float(step.loss)
        self.progress.seconds += seconds
        self.progress.tokens, self._tokens = self.progress.tokens + self._tokens, 0
        log.add(
            step.index,
            loss=loss,
            learning_rate=step.learning_rate,
            grad_norm=float(step.grad_norm),
            trained=step.weight,
            tokens_per_second=round(speed, 1),
            seconds=round(self.progress.seconds, 3),
            memory=memory,
        )
        return Trained(step.index, self.prepared.config.steps or 0, loss, step.learning_rate, speed, memory)

    @property
    def _best(self) -> str:
        """The score by which adapters are compared."""
        return self.recipe.best or self.prepared.task.best

    def _finish(self) -> Stopped:
        """Draw the loss and write down the result."""
        step, best, seconds = self.state.step, self.progress.best, self.progress.seconds
        metrics.plot(self.folder, metrics.read(self.folder), self.folder.name)
        self._tell_if_worse(best)
        numbers = {key: metrics.plain(value) for key, value in best.items()}
        self._write_facts({"steps_done": step, "best": numbers, "seconds": seconds})
        return Stopped(step, step >= (self.prepared.config.steps or 0), best, seconds)

    def _tell_if_worse(self, best: Mapping[str, float]) -> None:
        """Add a remark when what is kept is worse than what training began with; that itself is never kept."""
        name = self._best
        first = next((one[f"eval_{name}"] for one in metrics.read(self.folder) if f"eval_{name}" in one), None)
        if first is None or name not in best:
            return
        more = self.prepared.task.scores[name]
        if best[name] < first if more else best[name] > first:
            self.remarks.append(
                f"training made it worse: {name} was {first:.4f} before it, and is {best[name]:.4f} in what was kept "
                f"(step {int(best['step']):,}); try another learning rate, or more steps"
            )

    def _batches(self) -> Iterator[Tensors]:
        examples, task = self.prepared.train, self.prepared.task
        for numbers in self.prepared.order.from_batch(self.state.step * self.prepared.config.accumulate):
            batch = task.collate([examples[i] for i in numbers])
            self._tokens += int(batch["attention_mask"].sum())
            yield to_device(batch, self.prepared.device)

    def _loss(self, batch: Tensors) -> tuple[Tensor, int]:
        summed, weight = self.prepared.task.loss(self.prepared.model, batch)
        return summed if self.budget is None else summed + weight * self.budget.penalty(), weight

    def _budget_tensors(self) -> dict[str, Tensor]:
        return self._stored_budget if self.budget is None else self.budget.tensors()

    def _evaluate(self, log: metrics.Metrics) -> Evaluated:
        """Score the held-out examples, and keep the adapter if it is the best so far."""
        prepared = self.prepared
        lengths = [len(example.ids) for example in prepared.held_out]
        batches = in_order(lengths, 2 * self.recipe.batch_size)
        with evaluating(prepared.model):
            collated = (prepared.task.collate([prepared.held_out[i] for i in numbers]) for numbers in batches)
            scores = prepared.task.measure(prepared.model, (to_device(batch, prepared.device) for batch in collated))
        step = self.state.step
        log.add(step, **{f"eval_{name}": value for name, value in scores.items()})
        score, before = scores[self._best], self.progress.best.get(self._best)
        more = self.prepared.task.scores[self._best]
        better = before is None or (score > before if more else score < before)
        if step and better and score == score:  # NaN is not better
            self.progress.best = {"step": step, **scores}
            self._keep()
            return Evaluated(step, scores, True)
        return Evaluated(step, scores, False)

    def _keep(self) -> None:
        """Save what was trained as the run's result."""
        about = {**self.prepared.task.about(), "max_length": self.recipe.max_length, "lorank": __version__}
        if self.recipe.model_options:
            about["model_options"] = self.recipe.model_options
        self.prepared.subject.keep(self.folder, about)

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise AdapterError(f"{self.folder} is no folder; output= names another")
        if self.folder.exists() and any(self.folder.iterdir()):
            again = f"; lorank train --resume {self.folder} goes on with it" if (self.folder / RECIPE).is_file() else ""
            raise AdapterError(f"the folder {self.folder} is not empty{again}; output= names another")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdapterError(f"cannot make the folder {self.folder}: {error.strerror}") from None
        write_atomically({self.folder / RECIPE: self.recipe.to_yaml().encode()})
        self._write_facts({})

    def _take_up(self) -> None:
        """Put the checkpoint's values into the prepared run; raises AdapterError when it was another's."""
        if not (self.folder / checkpoint.FILE).is_file():
            self.remarks.append("the run was stopped before its first checkpoint: it begins anew")
            return
        own, self.state, found, self._stored_budget = checkpoint.read(self.folder)
        other = [what for what in ("data", "base", "recipe") if getattr(found, what) != getattr(self.progress, what)]
        if other:
            raise AdapterError(
                f"cannot resume {self.folder}: the {' and the '.join(other)} changed since it began; "
                "start a new run with another output, or put back what it began with"
            )
        changed = [
            f"{what} {getattr(found, what)} then, {getattr(self.progress, what)} now"
            for what in ("threads", "device", "torch")
            if getattr(found, what) != getattr(self.progress, what)
        ]
        if changed:
            self.remarks.append(f"the last digits will differ from an uninterrupted run: {enumerate_names(changed)}")
        restore(self.prepared.subject, own)
        self.progress = found
        self.prepared.subject.recover(self.folder)
        if self.state.step >= (self.prepared.config.steps or 0):
            self.remarks.append(f"all {self.state.step:,} steps of this run are done; nothing is left to train")

    def _write_facts(self, result: dict[str, Any]) -> None:
        prepared = self.prepared
        facts = {
            "lorank": __version__,
            "versions": {name: _version(name) for name in ("torch", "transformers", "datasets", "safetensors")},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(prepared.device),
            "threads": torch.get_num_threads(),
            "command": sys.argv,
            "trainable_parameters": prepared.plan.trainable_parameters,
            "base_parameters": prepared.plan.base_parameters,
            "examples": len(prepared.train),
            "held_out": len(prepared.held_out),
            **result,
        }
        write_atomically({self.folder / FACTS: (json.dumps(facts, indent=2) + "\n").encode()})


def stored_recipe(folder: str) -> Recipe:
    """Return the recipe of a run that is to be resumed."""
    path = Path(folder).expanduser()
    if not (path / RECIPE).is_file():
        raise AdapterError(f"there is no run in {folder}: it has no {RECIPE}")
    return Recipe.of(str(path / RECIPE), {"output": str(path)})


def peak_memory(device: torch.device) -> int:
    """Return the most memory used so far: by tensors on a GPU, or by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return require("psutil", "measuring memory").Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
