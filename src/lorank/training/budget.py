"""RankBudget: which triplets of an AdaLoRA adapter are kept while it trains (Zhang et al. 2023, section 3.2)."""

import torch
from torch import Tensor, nn

from ..errors import AdapterError, enumerate_names
from ..names import label_of
from ..surgery import named_or_active
from ..tree import entries, unwrapped
from ..variants import AdaLoRAAdapter, Adapter


class RankBudget:
    """Drops the least important ranks of an AdaLoRA adapter, step by step, down to its spec's `target_rank` a layer.

        budget = lorank.RankBudget(model, steps=1000)
        def loss(batch): return model(**batch).loss + budget.penalty()
        for step in lorank.train(lorank.adapter_parameters(model), loss, batches, config):
            budget.update(step.index)

    An element's importance is |weight · gradient|, smoothed, times how uncertain that is (eq. 9 to 11); a triplet's is
    that of its E plus the means of its row of A and column of B (eq. 7). The budget falls from that of all triplets to
    the target along a cubic (eq. 12). What is dropped has E = 0 and may come back, until the last share of the steps.
    """

    def __init__(self, model: nn.Module, steps: int, name: str | None = None):
        """Look after an AdaLoRA adapter for a training of so many steps; without a name it is the active one.

        Raises AdapterError when it is of another method, or the steps leave none to drop ranks in.
        """
        model = unwrapped(model)
        self.adapters: dict[str, AdaLoRAAdapter] = {}
        chosen = named_or_active(model, name, "set a budget of ranks")
        for adapter_name in chosen:
            for layer_name, (_, entry) in entries(model, adapter_name).items():
                for leaf in entry.leaves() if isinstance(entry, Adapter) else ():
                    if isinstance(leaf, AdaLoRAAdapter):
                        self.adapters[label_of(layer_name, leaf.part)] = leaf
        if not self.adapters:
            raise AdapterError(f"cannot set a budget of ranks: {', '.join(chosen)} is no AdaLoRA adapter")
        self.spec, self.steps = next(iter(self.adapters.values())).spec, steps
        self.start, self.stop = round(self.spec.warmup * steps), steps - round(self.spec.settle * steps)
        if self.start >= self.stop or self.stop < 2:  # the first step is looked at, and a later one drops
            raise AdapterError(
                f"{steps} step{'s are' if steps > 1 else ' is'} too few to drop ranks between step {self.start} and "
                f"{self.stop}"
            )
        self.total = sum(leaf.E.numel() for leaf in self.adapters.values())
        # A stack of matrices has so many ranks in each.
        self.target = sum(leaf.spec.target_rank * leaf.E[..., 0].numel() for leaf in self.adapters.values())
        self.state: dict[str, Tensor] = {}  # running means by "label.name.importance" and ".uncertainty", and masks

    def penalty(self) -> Tensor:
        """Return the weighted mean of ‖BᵀB − 1‖ and ‖AAᵀ − 1‖, to be added to the loss; with gradient."""
        norms = []
        for leaf in self.adapters.values():
            for gram in (leaf.A @ leaf.A.mT, leaf.B.mT @ leaf.B):
                eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
                norms.append(torch.linalg.matrix_norm(gram - eye).mean().to(norms[0].device if norms else gram.device))
        return self.spec.orthogonality * torch.stack(norms).mean()

    def budget(self, index: int) -> int:
        """Return how many triplets may be left after a step; the first has index 1."""
        if index <= self.start:
            return self.total
        if index >= self.stop:
            return self.target
        left = 1 - (index - self.start) / (self.stop - self.start)
        return int((self.total - self.target) * left**3 + self.target)

    @torch.no_grad()
    def update(self, index: int) -> int:
        """Take note of the gradients of a step, set what falls out of the budget to zero, and return what is left.

        To be called after the optimiser's step, with the gradients still there, as in the body of `lorank.train`.
        Raises AdapterError late in a training of which it has not seen what came before.
        """
        needed = "importance" if index == self.stop else "dropped"
        if index >= self.stop and not any(key.endswith(f".{needed}") for key in self.state):
            raise AdapterError(f"this budget of ranks knows nothing of the steps before {index}; restore its tensors")
        if index < self.stop:
            self._observe()
        if self.start < index <= self.stop and (index == self.stop or index % self.spec.interval == 0):
            self._drop(self.total - self.budget(index))
        elif index > self.stop:
            for label, leaf in self.adapters.items():
                leaf.E.masked_fill_(self.state[f"{label}.dropped"].bool(), 0)
        for leaf in self.adapters.values():
            leaf.exhausted = index >= self.stop and not leaf.E.any()
        return sum(int(leaf.E.count_nonzero()) for leaf in self.adapters.values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what there is to store for the training to go on later."""
        return dict(self.state)

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Take up what `tensors` returned; raises AdapterError for that of another adapter."""
        state: dict[str, Tensor] = {}
        labels = set()
        for key, tensor in stored.items():
            label, _, kind = key.rpartition(".")
            label, _, name = (label, "", "E") if kind == "dropped" else label.rpartition(".")
            labels.add(label)
            leaf = self.adapters.get(label)
            if leaf is None or name not in ("A", "B", "E") or tensor.shape != getattr(leaf, name).shape:
                raise AdapterError(f"the stored budget of ranks is of another adapter: {key} {tuple(tensor.shape)}")
            state[key] = tensor.to(leaf.E.device, copy=True)  # a file's tensors are on the CPU
        lacking = sorted(self.adapters.keys() - labels) if labels else []
        if lacking:
            raise AdapterError(f"the stored budget of ranks lacks {enumerate_names(lacking)}")
        self.state = state

    def _observe(self) -> None:
        for label, leaf in self.adapters.items():
            for name in ("A", "B", "E"):
                weight = getattr(leaf, name)
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                now = (weight * gradient).abs()
                mean = self.state.get(f"{label}.{name}.importance", torch.zeros_like(now))
                spread = self.state.get(f"{label}.{name}.uncertainty", torch.zeros_like(now))
                mean = self.spec.beta1 * mean + (1 - self.spec.beta1) * now
                spread = self.spec.beta2 * spread + (1 - self.spec.beta2) * (now - mean).abs()
                self.state |= {f"{label}.{name}.importance": mean, f"{label}.{name}.uncertainty": spread}

    def _drop(self, number: int) -> None:
        """Set the E of so many triplets to zero, those that matter least."""
        scores = {label: self._score(label) for label in self.adapters}
        limit = float("-inf")
        if number:
            limit = float(torch.cat([score.flatten().cpu() for score in scores.values()]).kthvalue(number).values)
        for label, leaf in self.adapters.items():
            dropped = scores[label] <= limit
            leaf.E.masked_fill_(dropped, 0)
            self.state[f"{label}.dropped"] = dropped.to(torch.uint8)

    def _score(self, label: str) -> Tensor:
        """Return the importance of each triplet of an adapter, shaped like E."""
        A, B, E = (
            self.state[f"{label}.{name}.importance"] * self.state[f"{label}.{name}.uncertainty"] for name in "ABE"
        )
        return E + A.mean(dim=-1) + B.mean(dim=-2)
