"""check: after a backward pass, does every adapter parameter really train?"""

import torch
from torch import Tensor, nn

from .errors import AdapterError, enumerate_names, raise_problems
from .idle import idle_experts, is_idle
from .names import label_of
from .surgery import adapter_parameters, named_or_active
from .tokens import TokenRows
from .tree import active_adapters, adapter_names, base_modules, entries, unwrapped
from .variants import Adapter, LoRAAdapter, Update


def check(model: nn.Module, name: str | None = None, *, moved: bool = False) -> list[str]:
    """Raise unless every parameter of the active adapters got a finite, non-zero gradient.

    Call it after `loss.backward()` and before the gradients are cleared; in the body of `lorank.train` they are
    there. On the first step one factor of each pair is zero, so the other's gradient is zero too, and that is in
    order. With `moved=True`, after a few optimiser steps, every factor must have a gradient, and no update may be
    zero still. Returns remarks that are no errors: how many tokens of an adapted embedding did not occur, which experts
    of a mixture saw no token while others did, and dropout that does nothing because the model is in eval mode.

    Raises AdapterError that names every parameter without a gradient, and the likely cause.
    """
    model = unwrapped(model)
    problems: list[str] = []
    remarks: list[str] = []
    if name is not None and name in adapter_names(model) and name not in active_adapters(model):
        raise AdapterError(f"cannot check: adapter '{name}' is not active, so that it gets no gradient")
    chosen = named_or_active(model, name, "check")
    parameters = {key: p for adapter in chosen for key, p in adapter_parameters(model, adapter).items()}
    if all(parameter.grad is None for parameter in parameters.values()):
        raise AdapterError("cannot check: " + _why_no_gradient(model, chosen))
    dropout: dict[str, float] = {}
    unmoved: list[str] = []
    idle: set[int] = set()  # factors that may stand still, because their partner moves first
    for adapter in chosen:
        for layer_name, (layer, entry) in entries(model, adapter).items():
            for leaf in entry.leaves() if isinstance(entry, Adapter) else ():
                if isinstance(leaf, TokenRows) and _saw_no_token(leaf):
                    idle.add(id(leaf.offset))
                    remarks.append(f"{layer_name}: none of the {len(leaf.tokens)} trained tokens occurred")
                elif moved and isinstance(leaf, Update) and not leaf.exhausted and leaf.at_start(layer):
                    unmoved.append(layer_name)
                if not moved:
                    groups = [[leaf._parameters.get(key) for key in group] for group in leaf.partners]
                    together = [[p for p in group if p is not None] for group in groups]
                    idle |= {id(p) for group in together if any(map(_has_gradient, group)) for p in group}
                if isinstance(leaf, Update) and not isinstance(leaf, TokenRows):
                    probability = getattr(leaf.spec, "dropout", 0.0)
                    if probability and not leaf.training:
                        dropout[adapter] = probability
                    if leaf.exhausted:
                        idle |= {id(parameter) for parameter in leaf.parameters()}
                        remarks.append(f"{layer_name}: all its ranks were dropped")
                        continue
                    remarks += _unseen_tokens(layer_name, leaf) + _idle_of_stack(layer_name, leaf)
    remarks += [f"'{a}': dropout {p} has no effect in eval mode; model.train() turns it on" for a, p in dropout.items()]
    experts = idle_experts({key for key, p in parameters.items() if not _has_gradient(p)}, parameters)
    unmoved = [name for name in dict.fromkeys(unmoved) if not is_idle(f"{name}.", experts)]
    if unmoved:
        problems.append(
            f"{enumerate_names(unmoved, 3)}: its update is still zero after your steps; is it in the optimiser? Make "
            "that from lorank.adapter_parameters(model), after adapt"
        )
    remarks += [f"{n}: {len(i)} experts saw no token ({enumerate_names(sorted(i))})" for n, i in experts.items()]
    for key, parameter in parameters.items():
        problem = _gradient_problem(parameter, idle=id(parameter) in idle or is_idle(key, experts))
        if problem and not (parameter.grad is None and is_idle(key, experts)):
            problems.append(f"{key} {problem}")
    if problems:
        problems.append(_advice(model))
    raise_problems("these adapter parameters do not train", problems)
    return remarks


class Watch:
    """Looks after the parameters of an adapter in its first steps.

    Called after every optimiser step, it raises when a parameter got no gradient in the first one, and when, a few
    steps later, one never had a gradient other than zero or still has the values that it started from. It holds a
    copy of them until then.
    """

    def __init__(self, model: nn.Module, name: str, steps: int = 5):
        """Watch the first `steps` steps, of which there must be two for both factors of a pair to move."""
        self.model, self.name, self.patience = model, name, steps
        self.seen = 0
        self.start = {key: p.detach().clone() for key, p in adapter_parameters(model, name).items()}
        self.idle = set(self.start)  # without a gradient so far

    def __call__(self) -> list[str]:
        """Return remarks as `check` does; raises AdapterError for parameters that do not train."""
        self.seen += 1
        if self.seen > self.patience:
            return []
        now = adapter_parameters(self.model, self.name)
        self.idle -= {key for key in self.idle if _has_gradient(now[key])}
        if self.seen == 1:
            return check(self.model, self.name)
        if self.seen < self.patience:
            return []
        experts = idle_experts(self.idle, now)
        still = [key for key, start in self.start.items() if torch.equal(now[key].detach(), start)]
        problems = [f"{key} never had a gradient other than zero" for key in sorted(self.idle)]
        problems = [problem for problem in problems if not is_idle(problem, experts)]
        problems += [
            f"{key}: is it in the optimiser, and is the learning rate above 0?"
            for key in still
            if not is_idle(key, experts)
        ]
        self.start = {}
        raise_problems(f"these adapter parameters have not moved in {self.patience} steps", problems)
        return [
            f"{name}: {len(idle)} experts saw no token in {self.patience} steps ({enumerate_names(sorted(idle))})"
            for name, idle in experts.items()
        ]


def _gradient_problem(parameter: Tensor, idle: bool) -> str | None:
    gradient = parameter.grad
    if not parameter.requires_grad:
        return "has requires_grad=False"
    if gradient is None:
        return "has no gradient: its layer was not run, or its output is not part of the loss"
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if not torch.isfinite(gradient).all():
        return "has a gradient with NaN or Inf"
    if not idle and not gradient.any():
        return "has a gradient of zeros"
    return None


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _unseen_tokens(layer_name: str, leaf: Update) -> list[str]:
    if not isinstance(leaf, LoRAAdapter) or not leaf.host.lookup or leaf.A.grad is None or not leaf.B.detach().any():
        return []
    unseen = int((leaf.A.grad == 0).all(dim=0).sum())
    return [f"{layer_name}: {unseen:,} of {leaf.A.shape[1]:,} tokens got no gradient"] if unseen else []


def _saw_no_token(leaf: TokenRows) -> bool:
    """Tell whether rows of an embedding got gradients of zero, as they do where none of these tokens occurs."""
    gradient = leaf.offset.grad
    return leaf.host.lookup and gradient is not None and not gradient.any()


def _idle_of_stack(layer_name: str, leaf: Update) -> list[str]:
    """Return a remark for the experts of a stack of matrices that got no gradient."""
    gradients = [factor.grad for factor in leaf.parameters() if factor.dim() == 3 and factor.grad is not None]
    if not gradients:
        return []
    busy = torch.stack([gradient.flatten(1).any(dim=1) for gradient in gradients]).any(dim=0)
    idle = int((~busy).sum())
    label = label_of(layer_name, leaf.part)
    return [f"{label}: {idle} of {len(busy)} experts saw no token"] if 0 < idle < len(busy) else []


def _why_no_gradient(model: nn.Module, chosen: list[str]) -> str:
    names = ", ".join(f"'{name}'" for name in chosen)
    return (
        f"no parameter of adapter {names} has a gradient. Call check after loss.backward() and before the gradients "
        f"are cleared. {_advice(model)}"
    )


def _advice(model: nn.Module) -> str:
    """Return the likely cause: checkpointing that stops at inputs without gradient, above all."""
    for _, module in base_modules(model):
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
        if getattr(module, "gradient_checkpointing", False) and reentrant:
            return (
                "The model uses reentrant gradient checkpointing, which passes no gradient on when its inputs need "
                "none, and a frozen embedding's output needs none: enable it with use_reentrant=False, or call "
                "model.enable_input_require_grads()"
            )
    return (
        "Likely causes: the model code reads the layer's weight without calling the layer, the layer is not used for "
        "this input, the forward ran under no_grad or in a checkpoint with use_reentrant=True, or the model computes "
        "its gradients in a function of its own, which passes none on when its inputs need none (on a transformers "
        "model model.enable_input_require_grads() mends that)"
    )
