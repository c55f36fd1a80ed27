"""Recipe: everything that says how a run is made. Its fields are the keys of a YAML file and the flags of `train`."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import AdapterError, did_you_mean, raise_problems
from ..extras import require

# As `variants.METHODS`, in the order of the help; written out so that the help needs no torch. A test compares the two.
METHODS = (
    *("lora", "dora", "pissa", "olora", "milora", "eva", "lora-ga", "lora-fa"),
    *("vera", "adalora", "loha", "lokr"),
)
# As `baselines.BASELINES`.
BASELINES = (
    *("full", "bitfit", "top-k", "adapter-h", "adapter-l", "adapter-p", "adapter-d"),
    *("prefix-embedding", "prefix-layer"),
)
# Keys of a recipe that are fields of methods, where these have them.
SHARED = ("rank", "alpha", "dropout", "rank_stabilised", "init")
TASKS = ("auto", "causal-lm", "classification", "regression")


def _key(default: Any, panel: str, text: str) -> Any:
    """Return a field with its place and its line in the help."""
    metadata = {"panel": panel, "help": text}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_DATA, _ADAPTER, _TRAINING, _OUTPUT = "Model and data", "Adapter", "Training", "Output"


@dataclass(frozen=True)
class Recipe:
    """What to train on what, and how. Raises AdapterError that names every field that is wrong."""

    model: str = _key("", _DATA, "the base: a hub id, a folder, or a GGUF file")
    data: str = _key(
        "",
        _DATA,
        "training data: a .jsonl, .json, .csv, .tsv or .parquet file or its address, or a hub data set (id or "
        "id:configuration)",
    )
    eval_data: str | None = _key(
        None, _DATA, "held-out data; without it, `eval_share` of the training data is held out"
    )
    split: str = _key("train", _DATA, "split of a hub data set to train on")
    eval_split: str = _key("validation", _DATA, "split of `eval_data` when that is a hub data set")
    eval_share: float = _key(0.05, _DATA, "share of the data to hold out, at most 1,000 records; 0 for none")
    limit: int | None = _key(None, _DATA, "use the first so many training records")
    eval_limit: int | None = _key(None, _DATA, "use the first so many held-out records")
    reader: str | None = _key(
        None, _DATA, "make prompts and completions of a published data set: e2e, webnlg, dart, samsum, wikisql, mnli"
    )
    task: str = _key("auto", _DATA, "causal-lm, classification or regression; auto tells by the columns")
    prompt: str | None = _key(None, _DATA, "column with the prompt, or a template such as 'Q: {question}\\nA:'")
    completion: str | None = _key(None, _DATA, "column with the completion, or a template")
    messages: str | None = _key(None, _DATA, "column with chat messages")
    text: str | None = _key(None, _DATA, "column with the text, or a template")
    text_pair: str | None = _key(None, _DATA, "column with a second text, for pairs")
    label: str | None = _key(None, _DATA, "column with the label, or the number for regression")
    chat: bool = _key(False, _DATA, "put prompt and completion into the chat template, as a user's turn and its answer")
    system: str | None = _key(None, _DATA, "system message for `chat`")
    train_on: str = _key("completion", _DATA, "completion, or all: the prompt too")
    max_length: int | None = _key(
        None, _DATA, "cut examples to so many tokens; default: what the model reads, at most 1,024"
    )
    model_options: dict[str, Any] = _key({}, _DATA, "values in the base's configuration, {cls_dropout: 0.1}")

    targets: list[str] = _key(
        ["all-linear"], _ADAPTER, "layers to adapt: names, patterns, all-linear, attention, !exclusions"
    )
    method: str = _key("lora", _ADAPTER, f"{', '.join(METHODS + BASELINES)}; or several as one, lora+prefix-embedding")
    method_options: dict[str, Any] = _key({}, _ADAPTER, "what else the method has, {option: value}")
    rank: int | None = _key(None, _ADAPTER, "rank of the update; default: 8, of vera 256, of adalora 12")
    alpha: float | None = _key(None, _ADAPTER, "numerator of the scale alpha/rank; default: twice the rank")
    dropout: float = _key(0.0, _ADAPTER, "dropout on the update's input")
    rank_stabilised: bool = _key(False, _ADAPTER, "scale by alpha/√rank")
    init: str = _key("kaiming", _ADAPTER, "kaiming or gaussian")
    calibrate: int = _key(8, _ADAPTER, "batches that methods see first that start from data (eva, lora-ga)")
    ranks: dict[str, int] = _key({}, _ADAPTER, "rank by pattern, {pattern: rank}")
    alphas: dict[str, float] = _key({}, _ADAPTER, "alpha by pattern, {pattern: alpha}")
    bias: str = _key("none", _ADAPTER, "train biases: none, adapted or all")
    tie: bool = _key(False, _ADAPTER, "adapt layers that share a weight, an embedding and its head, as one")
    train_also: list[str] | None = _key(
        None, _ADAPTER, "modules to train whole, as a copy; default: a classifier's head"
    )
    init_adapter: str | None = _key(None, _ADAPTER, "start from this adapter, or run, instead of from nothing")

    steps: int | None = _key(None, _TRAINING, "optimiser steps; overrides epochs")
    epochs: float = _key(1.0, _TRAINING, "passes over the data")
    batch_size: int = _key(8, _TRAINING, "examples in a batch")
    accumulate: int = _key(1, _TRAINING, "batches whose gradients make one step, weighted by tokens")
    learning_rate: float | None = _key(None, _TRAINING, "highest rate; default: suggested from the model's shape")
    schedule: str = _key("linear", _TRAINING, "constant, linear or cosine")
    warmup: float = _key(0.05, _TRAINING, "steps of linear warm-up, or below 1 a share of all steps")
    lora_plus: float = _key(1.0, _TRAINING, "how many times as fast B learns as A (LoRA+: about 16)")
    weight_decay: float = _key(0.0, _TRAINING, "weight decay of AdamW")
    betas: list[float] = _key([0.9, 0.999], _TRAINING, "betas of AdamW")
    epsilon: float = _key(1e-8, _TRAINING, "epsilon of AdamW")
    clip: float | None = _key(1.0, _TRAINING, "largest norm of the gradient; none for no limit")
    label_smoothing: float = _key(0.0, _TRAINING, "label smoothing")
    dtype: str = _key("auto", _TRAINING, "of the base: float32, bfloat16, mixed; auto: bfloat16 on a GPU")
    gradient_checkpointing: bool = _key(False, _TRAINING, "recompute activations: less memory, more time")
    eval_every: int | None = _key(None, _TRAINING, "steps between evaluations; default: ten in a run")
    eval_epochs: float | None = _key(None, _TRAINING, "the same in passes over the data, where eval_every is not given")
    checkpoint_every: int | None = _key(None, _TRAINING, "steps between checkpoints; default: as eval_every")
    best: str | None = _key(None, _TRAINING, "score that decides which adapter is kept; default: loss, or accuracy")
    device: str = _key("auto", _TRAINING, "auto, cpu, cuda, cuda:1, mps")
    seed: int = _key(0, _TRAINING, "of initialisation, order and dropout")

    output: str | None = _key(None, _OUTPUT, "the run's folder; default: runs/<data>-<model>")
    tensorboard: bool = _key(False, _OUTPUT, "also write TensorBoard's event files into the run")
    wandb: str | None = _key(None, _OUTPUT, "also log to this Weights & Biases project")

    def __post_init__(self) -> None:
        problems = [f"{name} is missing" for name in ("model", "data") if not getattr(self, name)]
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            fixed = _as(kind, value)
            if fixed is _WRONG:
                problems.append(f"{name} is {value!r}; it must be {_kind_name(kind)}")
            else:
                object.__setattr__(self, name, fixed)
        if not problems:
            problems = _value_problems(self)
        raise_problems("the recipe cannot be used", problems)

    def to_yaml(self) -> str:
        """Return the recipe as YAML with every key."""
        yaml = require("yaml", "writing a recipe")
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=100)

    @staticmethod
    def names() -> list[str]:
        """Return the keys of a recipe."""
        return [field.name for field in dataclasses.fields(Recipe)]

    @staticmethod
    def of(path: str | None, *overrides: Mapping[str, Any]) -> "Recipe":
        """Return the recipe in a YAML file under overrides, of which the later ones win.

        Relative paths in it are taken from the working directory. Raises AdapterError for a file that is no recipe and
        for unknown keys, with the nearest known one.
        """
        keys = {} if path is None else read_yaml(Path(path))
        if {"table", "row", "tasks"} <= keys.keys():
            raise AdapterError(f"{path} is a row of the paper's tables, for several runs: lorank reproduce {path}")
        for given in overrides:
            keys |= given
        unknown = [name for name in keys if name not in Recipe.names()]
        raise_problems(
            "the recipe cannot be used",
            [f"there is no key '{name}'; {_hint(name)}" for name in unknown],
        )
        return Recipe(**keys)


def options_of(spec: type[Any]) -> list[str]:
    """Return the fields of a method's spec that a recipe sets in `method_options`."""
    others = (*SHARED, "dtype", "projection")  # the base decides on these
    return [field.name for field in dataclasses.fields(spec) if field.name not in others]


def _hint(name: str) -> str:
    """Return what may have been meant by a key that there is not."""
    from ..baselines import BASELINES as OTHERS
    from ..variants import METHODS as SPECS

    own = [method for method, spec in {**SPECS, **OTHERS}.items() if name in options_of(spec)]
    if own:
        return f"it is an option of {', '.join(own)}: method_options={{{name}: ...}}"
    return did_you_mean(name, Recipe.names())


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Return `key=value` words of a command line as a mapping; values are read as YAML."""
    yaml = require("yaml", "reading a recipe")
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise AdapterError(
                f"{assignment!r} is no key=value; known keys are {', '.join(Recipe.names()[:8])} and more"
            )
        name = name.strip().replace("-", "_")
        if get_type_hints(Recipe).get(name) in (str, str | None):
            found[name] = None if text == "null" else as_typed(name, text)
            continue
        try:
            found[name] = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            found[name] = text  # a list of targets has brackets and stars that mean something else in YAML
    return found


def as_typed(name: str, value: Any) -> Any:
    """Return a value as it was meant on a command line: a shell passes the \\n of a template on as two signs."""
    templates = ("prompt", "completion", "text", "text_pair", "system")
    return value.replace("\\n", "\n") if name in templates and isinstance(value, str) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML file; raises AdapterError for one that is none, or has a key twice."""
    yaml = require("yaml", "reading a recipe")
    if not path.is_file():
        near = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise AdapterError(f"there is no recipe {path}; {did_you_mean(path.name, near)}")
    try:
        text = path.read_text(encoding="utf-8")
        keys, written = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not YAML: {error}") from None
    if not isinstance(keys, dict):
        raise AdapterError(f"{path} holds {keys!r:.60}, not keys with values")
    names = [key.value for key, _ in written.value]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:  # YAML would take the last of them
        raise AdapterError(f"{path} has {', '.join(doubled)} twice")
    return {str(name): value for name, value in keys.items()}


_WRONG = object()


def _as(kind: Any, value: Any) -> Any:
    """Return a value as a field's type has it, or _WRONG."""
    if kind is Any:
        return value
    options = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None or (value == "none" and type(None) in options):
        return None if type(None) in options else _WRONG
    kind = options[0]
    origin = getattr(kind, "__origin__", kind)
    if origin is list:
        inner = get_args(kind)[0]
        items = _split(value) if isinstance(value, str) else value
        items = [items] if isinstance(items, int | float) else items
        fixed = [_as(inner, item) for item in items] if isinstance(items, list | tuple) else [_WRONG]
        return _WRONG if _WRONG in fixed else fixed
    if origin is dict:
        inner = get_args(kind)[1]
        fixed = {str(k): _as(inner, v) for k, v in value.items()} if isinstance(value, Mapping) else {"": _WRONG}
        return _WRONG if _WRONG in fixed.values() else fixed
    if kind is str:
        return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else _WRONG
    if kind is bool:
        return value if isinstance(value, bool) else _WRONG
    if isinstance(value, bool):
        return _WRONG
    if isinstance(value, str):  # YAML reads 2e-4 as text
        try:
            value = float(value)
        except ValueError:
            return _WRONG
    if not isinstance(value, int | float) or not math.isfinite(value):
        return _WRONG
    if kind is int:
        return int(value) if value == int(value) else _WRONG
    return float(value)


def _split(text: str) -> list[str]:
    """Return the items of a list in words: split at commas, but not at those in brackets of any kind."""
    return [item.strip() for item in re.split(r",(?![^\[({]*[\])}])", text) if item.strip()]


def _kind_name(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    options = get_args(kind) if type(None) in get_args(kind) else (kind,)
    texts = {list: "a list", dict: "values by pattern, {pattern: value}"}
    return " or ".join(names.get(option) or texts[option.__origin__] for option in options)


def _value_problems(recipe: Recipe) -> list[str]:
    problems = []
    for name, known in (
        ("task", TASKS),
        ("train_on", ("completion", "all")),
        ("schedule", ("constant", "linear", "cosine")),
        ("dtype", ("auto", "float32", "bfloat16", "mixed")),
        ("bias", ("none", "adapted", "all")),
        ("init", ("kaiming", "gaussian")),
    ):
        if getattr(recipe, name) not in known:
            problems.append(f"{name} is {getattr(recipe, name)!r}; it must be one of {', '.join(known)}")
    for method in recipe.method.split("+"):
        if method not in METHODS + BASELINES:
            problems.append(f"method is '{method}'; {did_you_mean(method, METHODS + BASELINES)}")
    for name in (
        "rank",
        "calibrate",
        "batch_size",
        "accumulate",
        "steps",
        "limit",
        "eval_limit",
        "eval_every",
        "checkpoint_every",
        "max_length",
    ):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            problems.append(f"{name} is {value}; it must be at least 1")
    for name in ("eval_share", "dropout", "label_smoothing"):
        if not 0 <= getattr(recipe, name) < 1:
            problems.append(f"{name} is {getattr(recipe, name)}; it must lie in [0, 1)")
    for name in ("epochs", "eval_epochs", "learning_rate", "clip", "lora_plus"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            problems.append(f"{name} is {value}; it must be above 0")
    if not 0 <= recipe.seed < 2**32:
        problems.append(f"seed is {recipe.seed}; it must lie between 0 and {2**32 - 1}")
    if len(recipe.betas) != 2 or not all(0 <= beta < 1 for beta in recipe.betas):
        problems.append(f"betas are {recipe.betas}; they must be two numbers in [0, 1)")
    for name in ("weight_decay", "epsilon"):
        if not getattr(recipe, name) >= 0:
            problems.append(f"{name} is {getattr(recipe, name)}; it may not be negative")
    if recipe.warmup < 0:
        problems.append(f"warmup is {recipe.warmup}; it may not be negative")
    if recipe.alpha == 0:
        problems.append("alpha is 0; nothing would train")
    if recipe.system and not recipe.chat:
        problems.append("system needs chat: it goes into the chat template")
    return problems
