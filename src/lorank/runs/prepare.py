"""From a recipe to everything a run needs: data, model, adapter, schedule. Nothing is trained or written here."""

import dataclasses
import hashlib
import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..accounting import Memory, StepCosts, training_costs
from ..baselines import Full, SpecialTokens
from ..copies import count, own_parameters
from ..data import Example, Order, Text, hold_out, open_source, rendering_of
from ..errors import AdapterError, dtype_name, enumerate_names
from ..formats.safetensors_file import encoded
from ..models import (
    Base,
    attend_to_all,
    empty_base,
    heads_of,
    label_order,
    load_base,
    load_tokenizer,
    longest,
    recompute_activations,
)
from ..names import lies_in
from ..planned import Plan
from ..prefixes import special_tokens
from ..surgery import adapt
from ..tasks import CausalLM, Classification, Regression, Task, Tensors
from ..tasks.base import to_device
from ..training import RankBudget, TrainConfig
from ..training.rate import suggested_rate
from ..variants import AdaLoRA, Spec
from .columns import choose_columns, named_labels
from .method import methods_of, show_data, targets_of
from .precision import compute_in_bfloat16
from .recipe import Recipe
from .starting import start_from
from .subject import ADAPTER, AdapterSubject, Subject, WholeModel

_PROBED = 4096  # numbers of each tensor that tell one base from another
_LONGEST = 1024  # tokens, unless the recipe says otherwise


@dataclass
class Prepared:
    """A run that is ready to start."""

    recipe: Recipe  # with everything that was left open filled in
    base: Base
    task: Task
    plan: Plan
    config: TrainConfig
    train: list[Example]
    held_out: list[Example]
    order: Order
    device: torch.device
    subject: Subject
    remarks: list[str]  # what was chosen or cut, for the user to see

    @property
    def model(self) -> Any:
        return self.base.model

    def data_digest(self) -> str:
        """Return the sha256 of the encoded examples, those to train on and the held-out ones."""
        sha = hashlib.sha256()
        for example in [*self.train, *self.held_out]:
            labels = example.labels.tobytes() if isinstance(example.labels, array) else repr(example.labels).encode()
            sha.update(example.ids.tobytes() + labels + (example.types.tobytes() if example.types else b""))
        return sha.hexdigest()

    def base_digest(self) -> str:
        """Return the sha256 of some of the bits of each of the base's tensors, evenly spread over it."""
        sha = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if ".adapters." not in name:
                every = max(1, parameter.numel() // _PROBED)
                probed = parameter.detach().flatten()[::every].cpu().contiguous()
                sha.update(f"{name} {tuple(parameter.shape)}".encode() + encoded(probed))
        return sha.hexdigest()

    def recipe_digest(self) -> str:
        """Return the sha256 of the recipe, but for where things are: they have digests of their own."""
        moved = dict.fromkeys(("model", "data", "eval_data", "init_adapter", "output"), "-")
        return hashlib.sha256(dataclasses.replace(self.recipe, **moved).to_yaml().encode()).hexdigest()

    def largest_batch(self) -> list[Example]:
        """Return the longest examples that can come together in a batch."""
        return sorted(self.train, key=lambda example: len(example.ids))[-self.recipe.batch_size :]


def prepare(recipe: Recipe) -> Prepared:
    """Return a run that is ready to start; raises AdapterError for anything that would not work later."""
    remarks: list[str] = []
    device = choose_device(recipe.device)
    methods_of(recipe)  # raises for what they do not have, before anything is fetched
    tokenizer = load_tokenizer(recipe.model)
    records = open_source(recipe.data, recipe.split, recipe.limit, recipe.reader)
    recipe = choose_columns(recipe, records)
    held = (
        open_source(recipe.eval_data, recipe.eval_split, recipe.eval_limit, recipe.reader) if recipe.eval_data else None
    )
    classes = recipe.label if recipe.task == "classification" else None
    records, names = named_labels(records, classes)
    held, _ = named_labels(held, classes, wanted=False)
    if names is not None:
        names = label_order(recipe.model, names)
    if held is None and recipe.eval_share:
        records, held = hold_out(records, recipe.eval_share, recipe.seed, recipe.eval_limit or 1000)
        remarks.append(f"held out {len(held):,} of {len(held) + len(records):,} records for evaluation (eval_share)")
    task = make_task(recipe, tokenizer, names)
    train, held_out = task.examples(records), task.examples(held) if held is not None else []

    seed_everything(recipe.seed)
    # An adapter is kept in float32 whatever the base is; a base that is trained itself would round small steps away.
    dtype = choose_dtype(recipe.dtype, device)
    mixed = recipe.dtype == "mixed"
    if (recipe.method, recipe.dtype) == ("full", "auto"):
        dtype, mixed = torch.float32, dtype == torch.bfloat16
    changed = recipe.model_options
    base = load_base(recipe.model, recipe.task, dtype=dtype, labels=names, tokenizer=tokenizer, changed=changed)
    plan = adapt_base(recipe, base.model, base.fresh)
    special = special_tokens(base.model) if not plan.whole else None
    task.max_length = allowed_length(recipe.max_length, base.model, tokenizer, special)
    train, cut = task.cut(train)
    held_out, cut_held = task.cut(held_out)
    if not train:
        raise AdapterError("there is nothing to train on: no example has a trained token")
    remarks += task.remarks(train) + cut + [f"held out: {remark}" for remark in cut_held]
    task.surround(special, [*train, *held_out])
    base.model.to(device)
    if mixed:
        compute_in_bfloat16(base.model, device)

    order = Order([len(example.ids) for example in train], recipe.batch_size, recipe.seed)
    recipe, config = _schedule(recipe, order, base, remarks)
    plan, seen = show_data(recipe, plan, base.model, task, train, order, device)
    remarks += seen
    if isinstance(plan.spec, AdaLoRA):
        RankBudget(base.model, config.steps or 0, ADAPTER)  # raises for too few steps
    if recipe.init_adapter is not None:
        remarks += start_from(recipe.init_adapter, base.model, plan, task.about())
    subject = _subject(plan, base, task, train, order, device)
    recipe = dataclasses.replace(
        recipe,
        model=_from_anywhere(recipe.model),
        data=_from_anywhere(recipe.data),
        eval_data=recipe.eval_data and _from_anywhere(recipe.eval_data),
        init_adapter=recipe.init_adapter and _from_anywhere(recipe.init_adapter),
        dtype="mixed" if mixed else dtype_name(dtype),
        device=str(device),
        max_length=task.max_length + len(special or ()),
        train_also=[name for name in plan.copies if name not in plan.arranged],
        rank=plan.spec.rank if plan.spec is not None else None,
        alpha=getattr(plan.spec, "alpha", None),
        best=_choose_best(recipe, task),
    )
    return Prepared(recipe, base, task, plan, config, train, held_out, order, device, subject, remarks)


def allowed_length(wanted: int | None, model: Any, tokenizer: Any, special: SpecialTokens | None = None) -> int:
    """Return to how many tokens examples are cut; raises AdapterError for more than the model reads.

    special: tokens that are put around each of them, for which there has to be room.
    """
    most, around = longest(model.config, tokenizer), len(special or ())
    if wanted is not None and wanted > most:
        raise AdapterError(f"max_length is {wanted:,}; this model reads at most {most:,} tokens")
    if (wanted or most) - around < 2:
        raise AdapterError(f"{around:,} special tokens leave no room in a context of {wanted or most:,}")
    return (wanted or min(most, _LONGEST)) - around


def _subject(
    plan: Plan, base: Base, task: Task, examples: list[Example], order: Order, device: torch.device
) -> Subject:
    """Return what the run trains."""
    if not plan.whole:
        return AdapterSubject(base.model)
    first = to_device(task.collate([examples[i] for i in next(order.from_batch(0))]), device)
    base.model.eval()  # no dropout: a run that is resumed does it again
    return WholeModel(base.model, base.tokenizer, lambda: task.loss(base.model, first)[0])


def adapt_base(recipe: Recipe, model: Any, fresh: Sequence[str] = ()) -> Plan:
    """Put the recipe's adapter on a base, of which the `fresh` modules have random values."""
    if recipe.gradient_checkpointing:
        recompute_activations(model)
    methods = methods_of(recipe)
    if any(isinstance(method, Full) for method in methods):
        return _whole(recipe, model, methods)
    heads = heads_of(model, fresh) if recipe.task != "causal-lm" else []
    train_also = heads if recipe.train_also is None else recipe.train_also
    untrained = [name for name in fresh if not lies_in(name, train_also)]
    if untrained:
        raise AdapterError(
            f"{enumerate_names(untrained, 3)} would stay at random values: the checkpoint has none for it; "
            f"name it in train_also (by default {enumerate_names(heads)})"
        )
    return adapt(
        model,
        methods,
        targets_of(recipe, methods),
        ADAPTER,
        ranks=recipe.ranks,
        alphas=recipe.alphas,
        train_also=train_also,
        bias=recipe.bias,  # type: ignore[arg-type]
        tie=recipe.tie,
    )


def _whole(recipe: Recipe, model: Any, methods: Sequence[object]) -> Plan:
    """Return the plan of training all of a base; raises AdapterError for keys that have no meaning then."""
    refused = [name for name in ("train_also", "bias") if getattr(recipe, name) not in (None, "none", [])]
    refused += ["other methods beside it"] if len(methods) > 1 else []
    refused += ["targets"] if targets_of(recipe, [Full()]) is not None else []
    if refused:
        raise AdapterError(f"full trains all parameters, and takes no {enumerate_names(refused)}")
    total = count(own_parameters(model))
    return Plan(ADAPTER, None, (), {}, {}, "none", {}, total, baselines=(Full(),))


def memory_of(prepared: Prepared) -> Memory | str:
    """Return what a step takes on the run's largest batch, or why that cannot be told; see `step_costs`."""
    recipe, task = prepared.recipe, prepared.task
    if recipe.dtype == "mixed":
        return "mixed precision keeps activations of both dtypes and bfloat16 copies of weights, which are not counted"
    labels = len(task.labels) if isinstance(task, Classification) else 1
    changed = recipe.model_options
    model = empty_base(recipe.model, recipe.task, dtype=getattr(torch, recipe.dtype), labels=labels, changed=changed)
    adapt_base(recipe, model)
    batch = task.collate(prepared.largest_batch())
    costs = step_costs(model, task, batch, accumulate=recipe.accumulate > 1, device=prepared.device.type)
    return costs if isinstance(costs, str) else costs.memory


def step_costs(
    model: Any, task: Task, batch: Tensors, *, accumulate: bool = False, device: str = "cpu", moments: int = 2
) -> StepCosts | str:
    """Return what a step on a batch takes, counted on an adapted model on the meta device, or why that cannot be told.

    accumulate, device, moments: as `training_costs` has them.

    Some models look at the values of their tensors, and there are none on the meta device. The model can be used for
    nothing else afterwards.
    """
    rows, width = batch["input_ids"].shape
    inputs = to_device(batch, torch.device("meta"))
    if isinstance(task, CausalLM):
        inputs["labels"] = batch["labels"]  # how many of them are trained does count
    else:
        model.config.pad_token_id = model.config.pad_token_id or 0
    mask = batch.get("attention_mask", torch.ones(rows, width, dtype=torch.long))
    inputs["attention_mask"] = mask.to("meta")
    if bool(mask.all()):
        attend_to_all(model)
    elif getattr(model.config, "_attn_implementation", None) == "sdpa":
        # As transformers makes it. One of four dimensions is taken as it is; the values of another would be looked at.
        inputs["attention_mask"] = torch.empty(rows, 1, width, width, dtype=torch.bool, device="meta")
    options: Any = {"accumulate": accumulate, "device": device, "moments": moments}
    try:
        return training_costs(model.train(), lambda: task.loss(model, inputs), **options)
    except (NotImplementedError, RuntimeError) as error:
        return str(error).splitlines()[0]


def make_task(recipe: Recipe, tokenizer: Any, labels: Sequence[str] | None) -> Task:
    """Return the recipe's task; its columns must have been chosen."""
    max_length = recipe.max_length or _LONGEST
    if recipe.task == "causal-lm":
        rendering = rendering_of(dataclasses.asdict(recipe), tokenizer)
        options: Any = {"train_on": recipe.train_on, "label_smoothing": recipe.label_smoothing}
        return CausalLM(tokenizer, max_length, rendering, **options)
    assert recipe.text is not None and recipe.label is not None, "chosen before"
    pair = Text(recipe.text_pair) if recipe.text_pair else None
    parts = (tokenizer, max_length, Text(recipe.text), pair, recipe.label)
    if recipe.task == "regression":
        if recipe.label_smoothing:
            raise AdapterError("label_smoothing has no meaning for a regression")
        return Regression(*parts)
    return Classification(*parts, labels=labels or (), label_smoothing=recipe.label_smoothing)


def _from_anywhere(name: str) -> str:
    """Return a path as one that holds in any working directory; a hub id stays as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def choose_device(wanted: str) -> torch.device:
    """Return the device of that name; `auto` takes an accelerator where there is one."""
    if wanted == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterError(f"device {wanted!r} cannot be used: {reason}") from None
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name for weights; `auto` is bfloat16 on GPUs that compute in it, else float32."""
    if wanted == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    return torch.float32 if wanted == "mixed" else getattr(torch, wanted)


def _choose_best(recipe: Recipe, task: Task) -> str:
    best = recipe.best or task.best
    if best not in task.scores:
        raise AdapterError(f"best is '{best}'; a {task.kind} run has the scores {', '.join(task.scores)}")
    return best


def _schedule(recipe: Recipe, order: Order, base: Base, remarks: list[str]) -> tuple[Recipe, TrainConfig]:
    steps = recipe.steps or math.ceil(recipe.epochs * order.per_pass / recipe.accumulate)
    rate = recipe.learning_rate
    if rate is None:
        config = getattr(base.model.config, "get_text_config", lambda: base.model.config)()
        method = methods_of(recipe)[0]
        scale, pace = (method.scale, 1.0) if isinstance(method, Spec) else (2.0, method.pace)
        if not isinstance(getattr(config, "hidden_size", None), int):
            raise AdapterError("no learning rate can be suggested for this model: it has no hidden_size; give one")
        rate = suggested_rate(config.hidden_size, scale, pace)
        remarks.append(
            f"learning_rate {rate:g} is a suggestion, from the width {config.hidden_size} and the "
            f"{f'scale {scale:g}' if isinstance(method, Spec) else 'method'}: a rule of thumb to start from"
        )
    warmup = round(recipe.warmup * steps) if recipe.warmup < 1 else round(recipe.warmup)
    if warmup > steps:
        raise AdapterError(f"warmup is {warmup} steps, and the run has {steps}")
    every = recipe.eval_every or max(10, math.ceil(steps / 10))
    if recipe.eval_every is None and recipe.eval_epochs is not None:
        every = max(1, round(recipe.eval_epochs * order.per_pass / recipe.accumulate))
    beta1, beta2 = recipe.betas
    config = TrainConfig(
        steps=steps,
        learning_rate=rate,
        schedule=recipe.schedule,  # type: ignore[arg-type]
        warmup=warmup,
        weight_decay=recipe.weight_decay,
        betas=(beta1, beta2),
        epsilon=recipe.epsilon,
        clip=recipe.clip,
        accumulate=recipe.accumulate,
        lora_plus=recipe.lora_plus,
    )
    output = recipe.output or f"runs/{Path(recipe.data).stem}-{Path(recipe.model.rstrip('/')).name}"
    filled = {"steps": steps, "learning_rate": rate, "eval_every": every, "output": output}
    checkpoint_every = recipe.checkpoint_every or every
    return dataclasses.replace(recipe, **filled, checkpoint_every=checkpoint_every), config


def seed_everything(seed: int) -> None:
    """Seed Python's and PyTorch's random generators."""
    random.seed(seed)
    torch.manual_seed(seed)
