"""The demo's steps: two adapters for two tasks on one base, trained, compared, switched and merged."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import formats
from ..data import Completion, Example, Order, Text, in_order
from ..evaluation import Decoding, complete
from ..health import Watch
from ..merging import merged
from ..models import Base, load_base
from ..planning import Plan
from ..surgery import activate, adapt, adapter_parameters
from ..tasks import CausalLM
from ..tasks.base import evaluating
from ..training import Step, TrainConfig, train
from ..variants import LoRA
from .data import Pair

TARGETS = ["q_proj", "v_proj"]
SPEC = LoRA(rank=8, alpha=32)


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    steps: int
    batch_size: int
    scored: int  # held-out examples


FULL = Size(steps=60, batch_size=16, scored=120)
QUICK = Size(steps=8, batch_size=12, scored=24)


@dataclass(frozen=True)
class Skill:
    """One of the demo's two tasks."""

    name: str
    says: str  # for the table
    rendering: Completion


SKILLS = (
    Skill(
        "describe",
        "say what a function does",
        Completion(Text("Function: {call}\nDescription:"), Text(" {line}")),
    ),
    Skill(
        "name",
        "name a function by its description",
        Completion(Text("Description: {line}\nFunction:"), Text(" {name}")),
    ),
)


@dataclass(frozen=True)
class Score:
    """What held-out examples say about a model."""

    loss: float  # mean over the tokens of the answers
    perplexity: float
    right: int  # answers that are the true one, word for word
    asked: int


class Demo:
    """One base, and the skills it learns."""

    def __init__(self, folder: Path, train_pairs: Sequence[Pair], held_out: Sequence[Pair], size: Size):
        self.folder, self.size = folder, size
        self.base: Base = load_base(str(folder), "causal-lm", dtype=torch.float32)
        self.tasks = {skill.name: CausalLM(self.base.tokenizer, 128, skill.rendering) for skill in SKILLS}
        self.records = [vars(pair) for pair in train_pairs]
        self.asked = [vars(pair) for pair in held_out[: size.scored]]
        self.plans: dict[str, Plan] = {}
        self.start = self._bits()

    @property
    def model(self) -> Any:
        return self.base.model

    def learn(self, skill: Skill) -> Iterator[tuple[Step, int]]:
        """Train the skill's adapter, yielding each step and how many tokens it read; the base stays as it is."""
        task, size = self.tasks[skill.name], self.size
        torch.manual_seed(0)
        self.plans[skill.name] = adapt(self.model, SPEC, TARGETS, skill.name)
        examples, _ = task.cut(task.encode(self.records))
        order = Order([len(example.ids) for example in examples], size.batch_size, seed=0)
        config = TrainConfig(steps=size.steps, learning_rate=2e-3, schedule="linear", warmup=min(4, size.steps // 4))
        watch = Watch(self.model, skill.name)
        batches = (task.collate([examples[i] for i in numbers]) for numbers in order.from_batch())
        tokens = 0

        def loss(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
            nonlocal tokens
            tokens += int(batch["attention_mask"].sum())
            return task.loss(self.model, batch)

        self.model.train()
        for step in train(adapter_parameters(self.model, skill.name), loss, batches, config):
            watch()
            yield step, tokens
            tokens = 0

    def score(self, skill: Skill, adapter: str | None) -> Score:
        """Score the base, or an adapter on it, on held-out examples of a skill."""
        self.switch(adapter)
        task = self.tasks[skill.name]
        examples: list[Example] = task.encode(self.asked)
        batches = in_order([len(example.ids) for example in examples], 2 * self.size.batch_size)
        with evaluating(self.model):
            measured = task.measure(self.model, (task.collate([examples[i] for i in b]) for b in batches))
        truth = [skill.rendering.after.of(record).strip() for record in self.asked]
        said = self.answers(skill, adapter, self.asked)
        right = sum(a == b for a, b in zip(said, truth, strict=True))
        return Score(measured["loss"], measured["perplexity"], right, len(truth))

    def answers(self, skill: Skill, adapter: str | None, records: Sequence[dict[str, Any]]) -> list[str]:
        """Return the first line that the base, or an adapter on it, writes for each record."""
        self.switch(adapter)
        tokenizer = self.base.tokenizer
        prompts = [skill.rendering.prompt(record) for record in records]
        decoding = Decoding(max_new_tokens=24 if skill.name == "describe" else 12)
        found = dict(complete(self.model, tokenizer, prompts, decoding, batch_size=2 * self.size.batch_size))
        return [found[i].strip().partition("\n")[0] for i in range(len(records))]

    def switch(self, adapter: str | None) -> None:
        """Make one adapter the active one, or none."""
        activate(self.model, *([adapter] if adapter else []))
        self.model.eval()

    def facts(self, folder: Path) -> dict[str, Any]:
        """Save the adapters into a folder, try merging and switching, and return what came of it."""
        sizes, differences = {}, {}
        for skill in SKILLS:
            target = folder / skill.name
            formats.save(self.model, target, skill.name, about=self.tasks[skill.name].about())
            sizes[skill.name] = sum(file.stat().st_size for file in target.glob("adapter_*"))
            differences[skill.name] = self.merge_difference(skill)
        self.switch(None)
        return {
            "base_parameters": self.plans[SKILLS[0].name].base_parameters,
            "base_bytes": sum(tensor.numel() * tensor.element_size() for tensor in self._own()),
            "trainable_parameters": {name: plan.trainable_parameters for name, plan in self.plans.items()},
            "adapter_bytes": sizes,
            "merged_differs_by": {name: difference for name, (difference, _) in differences.items()},
            "largest_logit": {name: largest for name, (_, largest) in differences.items()},
            "base_unchanged": self.is_as_it_was(),
        }

    def side_by_side(self) -> list[dict[str, str]]:
        """Return what the base and both adapters say to a few held-out prompts of each skill, and the truth."""
        records = self.asked[:3]
        found = []
        for skill in SKILLS:
            who = (None, *(other.name for other in SKILLS))
            told = {adapter or "base": self.answers(skill, adapter, records) for adapter in who}
            for i, record in enumerate(records):
                truth = skill.rendering.after.of(record).strip()
                said = {name: answers[i] for name, answers in told.items()}
                found.append({"skill": skill.name, "prompt": skill.rendering.prompt(record), **said, "truth": truth})
        return found

    def merge_difference(self, skill: Skill) -> tuple[float, float]:
        """Return the largest difference that merging makes to a logit, and the largest logit, on a held-out prompt."""
        self.switch(skill.name)
        prompt = self.base.tokenizer(skill.rendering.prompt(self.asked[0]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            unmerged = self.model(prompt).logits
            with merged(self.model, skill.name):
                folded = self.model(prompt).logits
        return float((unmerged - folded).abs().max()), float(unmerged.abs().max())

    def is_as_it_was(self) -> bool:
        """Tell whether every weight of the base is what it was before the first adapter, to the bit."""
        return self._bits() == self.start

    def _bits(self) -> list[int]:
        """Return a checksum of each of the base's tensors, by its bits."""
        return [int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in self._own()]

    def _own(self) -> list[torch.Tensor]:
        return [p for name, p in self.model.named_parameters() if ".adapters." not in name]
