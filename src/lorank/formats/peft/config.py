"""`adapter_config.json`: rank, scale and what else PEFT needs to know of every method."""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import AdapterError, enumerate_names, raise_problems
from ...planning import Bias
from ...variants import Spec
from ..content import Content
from ..pattern import Pattern
from .layout import PARAMETERS, PARTS
from .methods import METHODS, Method, method_of

# What settings that lorank reads must be, where they are not null.
_KINDS: dict[str, Any] = {
    "task_type": str,
    "r": int,
    "init_r": int,
    "alpha": (int, float),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "vera_dropout": (int, float),
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "modules_to_save": (list, str),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "enable_lora": list,
    "peft_version": str,
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".gguf", ".safetensors", ".txt")


def encode_config(content: Content, model: nn.Module | None) -> dict[str, Any]:
    """Return the configuration with which PEFT computes what the adapter does, on a model where that is known."""
    method = method_of(content)
    layouts = {name: method.layout(update) for name, update in content.updates.items()}
    stacks = [name for name, layout in layouts.items() if layout.kind == PARAMETERS]
    unknown = [
        name
        for name, layout in layouts.items()
        if layout.kind == PARTS or (model is not None and _read_by_pytorch(name, model))
    ]
    reasons = [f"{name}: only lorank reads this layer" for name in unknown]
    of_layer: dict[str, tuple[int, float | None]] = {}  # by the names that PEFT's patterns are matched with
    for name, update in content.updates.items():
        if name in stacks:
            paths = zip(parameters_of(content, [name]), update.tensors, strict=True)
            of_layer |= {full: method.rank_alpha(update, part) for full, part in paths}
        else:
            of_layer[name] = method.rank_alpha(update, next(iter(update.tensors)))
    for name, tie in content.tied.items():
        of_layer[name] = method.rank_alpha(content.updates[tie.source], "weight")
    rank, alpha = Counter(of_layer.values()).most_common(1)[0][0] if of_layer else (content.spec.rank, None)
    ranks = {_exactly(n): r for n, (r, _) in sorted(of_layer.items()) if r != rank}
    alphas = {_exactly(n): _number(a) for n, (_, a) in sorted(of_layer.items()) if a is not None and a != alpha}
    if (ranks or alphas) and not method.rank_patterns:
        reasons.append(
            f"{method.peft_type} has one rank and alpha for all layers in PEFT, and this adapter has several"
        )
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or content.base_model
    settings = {
        "peft_type": method.peft_type,
        "task_type": _task_type(model, content),
        "auto_mapping": None,
        "base_model_name_or_path": hub_id(base),
        "revision": None,
        "inference_mode": True,
        method.rank_setting: rank,
        "target_modules": _target_modules(
            [name for name in [*content.updates, *content.tied] if name not in stacks], model
        ),
        "modules_to_save": sorted(content.copies) or None,
        "layers_to_transform": None,
        **method.settings(content),
    }
    if method.alpha_setting is not None and alpha is not None:
        settings[method.alpha_setting] = _number(alpha)
    if method.rank_patterns:
        settings |= {"rank_pattern": ranks, "alpha_pattern": alphas, "exclude_modules": None}
    if method.adapted_bias is not None:
        settings["bias"] = {"none": "none", "adapted": method.adapted_bias, "all": "all"}[content.bias]
        settings["fan_in_fan_out"] = any(update.transposed for update in content.updates.values())
    elif content.biases:
        reasons.append(f"{method.peft_type} trains no biases in PEFT, and this adapter does")
    if method.peft_type == "LORA":
        settings["target_parameters"] = sorted(parameters_of(content, stacks)) or None
        if stacks:
            settings["lora_dropout"] = 0.0  # PEFT refuses parameters with another; it is for training alone
            settings["peft_version"] = "0.19.1"  # the first that had stacks as they are written here
    elif content.tokens:
        reasons.append(f"{method.peft_type} trains no rows of tokens in PEFT, and this adapter does")
    if content.tokens or method.peft_type == "LORA":
        settings["trainable_token_indices"] = {n: ids for n, (ids, _) in sorted(content.tokens.items())} or None
    # PEFT refuses a file that has this alone. It would load what it knows, and not the rest.
    settings["layers_pattern"] = reasons or None
    return settings


def _read_by_pytorch(name: str, model: nn.Module) -> bool:
    """Tell whether PyTorch reads a layer's weight without calling it: an adapter of PEFT has no effect there."""
    above = model.get_submodule(name.rpartition(".")[0])
    return isinstance(above, nn.MultiheadAttention | nn.TransformerEncoderLayer)


def parameters_of(content: Content, names: Iterable[str]) -> list[str]:
    """Return the full names of the parameters that are adapted in these modules."""
    return [f"{name}.{part}".removeprefix(".") for name in names for part in content.updates[name].tensors]


def _target_modules(names: list[str], model: nn.Module | None) -> list[str] | str:
    """Return full names, which PEFT takes as endings too; where one is the end of another, an exact pattern."""
    layers = sorted(names)
    others = [name for name, _ in model.named_modules() if name not in layers] if model is not None else []
    ambiguous = any(name.endswith(f".{layer}") for name in others for layer in layers if len(name) > len(layer))
    return "|".join(re.escape(layer) for layer in layers) if ambiguous or "" in layers else layers


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def hub_id(name: Any) -> str | None:
    """Return a name on the hub, None for paths and other values: a path differs from machine to machine."""
    if not isinstance(name, str):
        return None
    is_id = _HUB_ID.fullmatch(name) and not name.lower().endswith(_FILES) and not Path(name).exists()
    return name if is_id else None


def _task_type(model: nn.Module | None, content: Content) -> str | None:
    if model is None:
        return {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}.get(content.task or "")
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


def check_config(config: Mapping[str, Any]) -> tuple[Method, list[str], list[str]]:
    """Return the method, problems and remarks: settings that change what the tensors mean, and unknown ones.

    Raises AdapterError for a configuration of another method, or with values of the wrong kind, with which nothing
    more can be said about the file.
    """
    wrong = []
    method = METHODS.get(str(config.get("peft_type")))
    if method is None:
        wrong.append(f"peft_type is {config.get('peft_type')!r}; {', '.join(METHODS)} can be read")
    for key, kinds in _KINDS.items():
        if config.get(key) is not None and (isinstance(config[key], bool) or not isinstance(config[key], kinds)):
            wrong.append(f"{key} is {config[key]!r}")
    adapted = method.adapted_bias if method is not None else None
    if adapted and config.get("bias") not in (None, "none", adapted, "all"):
        wrong.append(f"bias is {config['bias']!r}; PEFT knows none, {adapted} and all")
    raise_problems("adapter_config.json cannot be read", wrong)
    assert method is not None, "another was refused"
    problems = [
        f"adapter_config.json: {key} is {config[key]!r}, which is not supported"
        for key, harmless in method.meaningful.items()
        if key in config and config[key] not in harmless
    ]
    problems += method.problems(config)
    unknown = sorted(key for key in config.keys() - method.known if config[key])
    remarks = [f"adapter_config.json: {enumerate_names(unknown)} is not known here and was ignored"] if unknown else []
    return method, problems, remarks


def bias_of(config: Mapping[str, Any], method: Method) -> Bias:
    """Return which biases were trained."""
    bias = config.get("bias") or "none"
    return "none" if bias == "none" or not method.adapted_bias else "all" if bias == "all" else "adapted"


def spec_of(config: Mapping[str, Any], method: Method, problems: list[str]) -> Spec:
    """Return the global spec; what is wrong with it goes into `problems`."""
    try:
        return method.spec(config)
    except (AdapterError, TypeError, ValueError) as error:
        problems.append(f"adapter_config.json: {error}")
        return method.specs[0]()


def spec_by_pattern(config: Mapping[str, Any], method: Method, spec: Spec, layer: str, problems: list[str]) -> Spec:
    """Return a layer's spec: with rank and alpha of the first keys of the patterns that match its name."""
    fields: dict[str, Any] = {}
    if method.rank_patterns:
        fields["rank"] = _by_pattern("rank_pattern", config, spec.rank, layer, problems)
        if method.alpha_setting is not None:
            fields["alpha"] = _by_pattern("alpha_pattern", config, getattr(spec, "alpha", None), layer, problems)
    try:
        return dataclasses.replace(spec, **fields)
    except AdapterError as error:
        problems.append(f"adapter_config.json: {layer}: {error}")
        return spec


def _by_pattern(key: str, config: Mapping[str, Any], default: Any, layer: str, problems: list[str]) -> Any:
    for text, value in (config.get(key) or {}).items():
        try:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value:
                raise AdapterError(f"{key} gives {text!r} the value {value!r}")
            if _pattern(text).matches_end(layer):
                return value
        except AdapterError as error:
            problems.append(str(error))
    return default


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> Pattern:
    return Pattern(text)
