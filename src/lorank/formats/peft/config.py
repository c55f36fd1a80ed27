"""`adapter_config.json`: rank, scale and what else PEFT needs to know."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import AdapterError, enumerate_names, raise_problems
from ...planning import Bias
from ...variants import LoRA
from ..content import Content
from ..pattern import Pattern
from .layout import PARAMETERS, PARTS, layout_of

# Settings that change what the tensors mean, with the values that do not.
_MEANINGFUL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Initialisations for which PEFT takes the adapter's start out of the base weight when it loads the file.
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Settings that say how the adapter was trained, or for whom, and nothing about its tensors.
_HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "init_lora_weights", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying"),
        *("target_parameters", "trainable_token_indices"),
        "runtime_config",
    }
)

# What settings that lorank reads must be, where they are not null.
_KINDS: dict[str, Any] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "modules_to_save": (list, str),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
}

BIAS: dict[str, Bias] = {"none": "none", "lora_only": "adapted", "all": "all"}


def rank_alpha(spec: LoRA, blocks: int) -> tuple[int, float]:
    """Return rank and alpha of a layer whose factors are so many blocks: PEFT computes the same scale."""
    return blocks * spec.rank, spec.alpha * (math.sqrt(blocks) if spec.rank_stabilised else blocks)


def encode_config(content: Content, model: nn.Module) -> dict[str, Any]:
    """Return the configuration with which PEFT computes what the adapter does."""
    spec = content.spec
    stacks = [name for name, update in content.updates.items() if layout_of(update).kind == PARAMETERS]
    unknown = [
        name
        for name, update in content.updates.items()
        if layout_of(update).kind == PARTS or _read_by_pytorch(name, model)
    ]
    of_layer: dict[str, tuple[int, float]] = {}  # by the names that PEFT's patterns are matched with
    for name, update in content.updates.items():
        if name in stacks:
            of_layer |= {
                full: rank_alpha(update.spec_of(part), 1)
                for full, part in zip(parameters_of(content, [name]), update.factors, strict=True)
            }
        else:
            of_layer[name] = rank_alpha(update.spec, layout_of(update).blocks)
    for name, tie in content.tied.items():
        source = content.updates[tie.source]
        of_layer[name] = rank_alpha(source.spec, layout_of(source).blocks)
    rank, alpha = Counter(of_layer.values()).most_common(1)[0][0] if of_layer else (spec.rank, spec.alpha)
    config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, content),
        "auto_mapping": None,
        "base_model_name_or_path": _hub_id(getattr(config, "_name_or_path", None)),
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0
        if stacks
        else spec.dropout,  # PEFT refuses parameters with another; it is for training alone
        "use_rslora": spec.rank_stabilised,
        "use_dora": False,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "bias": next(theirs for theirs, ours in BIAS.items() if ours == content.bias),
        "fan_in_fan_out": any(u.host is not None and u.host.transposed for u in content.updates.values()),
        "target_modules": _target_modules(
            [name for name in [*content.updates, *content.tied] if name not in stacks], model
        ),
        "target_parameters": sorted(parameters_of(content, stacks)) or None,
        "exclude_modules": None,
        "trainable_token_indices": {name: ids for name, (ids, _) in sorted(content.tokens.items())} or None,
        "modules_to_save": sorted(content.copies) or None,
        "rank_pattern": {_exactly(n): r for n, (r, _) in sorted(of_layer.items()) if r != rank},
        "alpha_pattern": {_exactly(n): _number(a) for n, (_, a) in sorted(of_layer.items()) if a != alpha},
        "layers_to_transform": None,
        # PEFT refuses a file that has this alone. It would load the layers that it knows, and not these.
        "layers_pattern": [f"{name}: only lorank reads this layer" for name in unknown] or None,
    }


def _read_by_pytorch(name: str, model: nn.Module) -> bool:
    """Tell whether PyTorch reads a layer's weight without calling it: an adapter of PEFT has no effect there."""
    above = model.get_submodule(name.rpartition(".")[0])
    return isinstance(above, nn.MultiheadAttention | nn.TransformerEncoderLayer)


def parameters_of(content: Content, names: Iterable[str]) -> list[str]:
    """Return the full names of the parameters that are adapted in these modules."""
    return [f"{name}.{part}".removeprefix(".") for name in names for part in content.updates[name].factors]


def _target_modules(names: list[str], model: nn.Module) -> list[str] | str:
    """Return full names, which PEFT takes as endings too; where one is the end of another, an exact pattern."""
    layers = sorted(names)
    others = [name for name, _ in model.named_modules() if name not in layers]
    ambiguous = any(name.endswith(f".{layer}") for name in others for layer in layers if len(name) > len(layer))
    return "|".join(re.escape(layer) for layer in layers) if ambiguous or "" in layers else layers


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _hub_id(name: Any) -> str | None:
    """Return the name of a base on the hub. A local path differs from machine to machine, and so would the file."""
    is_id = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_id else None


def _task_type(model: nn.Module, content: Content) -> str | None:
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    # PEFT adds the head to modules_to_save by itself for these, so they are only true when it was trained.
    heads = {"classifier", "score"} & content.copies.keys()
    if name.endswith("ForSequenceClassification") and heads:
        return "SEQ_CLS"
    if name.endswith("ForTokenClassification") and heads:
        return "TOKEN_CLS"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration in a file; raises AdapterError for one that is absent or no JSON object."""
    if not path.is_file():
        raise AdapterError(f"{path.parent} has no {path.name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def check_config(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return problems and remarks: settings that change what the tensors mean and are not supported, and unknown ones.

    Raises AdapterError for a configuration of another method, or with values of the wrong kind, with which nothing
    more can be said about the file.
    """
    wrong = []
    if config.get("peft_type") != "LORA":
        wrong.append(f"peft_type is {config.get('peft_type')!r}; only LORA can be read")
    for key, kinds in _KINDS.items():
        if config.get(key) is not None and (isinstance(config[key], bool) or not isinstance(config[key], kinds)):
            wrong.append(f"{key} is {config[key]!r}")
    if config.get("bias") not in (None, *BIAS):
        wrong.append(f"bias is {config['bias']!r}; PEFT knows {', '.join(BIAS)}")
    raise_problems("adapter_config.json cannot be read", wrong)
    problems = [
        f"adapter_config.json: {key} is {config[key]!r}, which is not supported"
        for key, harmless in _MEANINGFUL.items()
        if key in config and config[key] not in harmless
    ]
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        problems.append("adapter_config.json: ensure_weight_tying with modules_to_save is not supported")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MOVES_BASE):
        problems.append(
            f"adapter_config.json: init_lora_weights is {init!r}: the adapter belongs to a base from which PEFT takes "
            "the adapter's start away when it loads; convert it in PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    unknown = sorted(key for key in config.keys() - _HARMLESS - _MEANINGFUL.keys() if config[key])
    remarks = [f"adapter_config.json: {enumerate_names(unknown)} is not known here and was ignored"] if unknown else []
    return problems, remarks


def spec_of(config: Mapping[str, Any], problems: list[str]) -> LoRA:
    """Return the global spec; what is wrong with it goes into `problems`."""
    try:
        return LoRA(
            rank=_default(config, "r"),
            alpha=_default(config, "lora_alpha"),
            dropout=config.get("lora_dropout") or 0.0,
            rank_stabilised=bool(config.get("use_rslora")),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        )
    except AdapterError as error:
        problems.append(f"adapter_config.json: {error}")
        return LoRA()


def alphas_of(config: Mapping[str, Any], layers: Iterable[str], problems: list[str]) -> dict[str, float]:
    """Return each layer's alpha: that of the first key of alpha_pattern that matches its name, or the global one."""
    return _by_pattern("alpha_pattern", config, _default(config, "lora_alpha"), layers, problems)


def ranks_of(config: Mapping[str, Any], layers: Iterable[str], problems: list[str]) -> dict[str, int]:
    """Return each layer's rank: that of the first key of rank_pattern that matches its name, or the global one."""
    return _by_pattern("rank_pattern", config, _default(config, "r"), layers, problems)


def _default(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return 8 if value is None else value  # PEFT's default for both


def _by_pattern(
    key: str, config: Mapping[str, Any], default: Any, layers: Iterable[str], problems: list[str]
) -> dict[str, Any]:
    patterns = []
    for text, value in (config.get(key) or {}).items():
        try:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value:
                raise AdapterError(f"{key} gives {text!r} the value {value!r}")
            patterns.append((Pattern(text), value))
        except AdapterError as error:
            problems.append(str(error))
    return {name: next((v for pattern, v in patterns if pattern.matches_end(name)), default) for name in layers}
