"""Bases from the hub, a folder or a GGUF file, through transformers."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import padding_id
from .errors import AdapterError, did_you_mean, enumerate_names, nearest, raise_problems
from .extras import require
from .shapes import SHAPES, configuration_of

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}


# Architectures whose positions are counted from the padding's number on, so that they read two tokens less.
_COUNTED_FROM_PADDING = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet", "longformer"),
        *("data2vec-text", "ibert", "esm"),
    }
)


@dataclass(frozen=True)
class Base:
    """A loaded base and what goes with it."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    fresh: list[str]  # modules for which the checkpoint has no weights: they start at random and must be trained


def load_base(
    name: str,
    task: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    labels: Sequence[str] | None = None,
    tokenizer: Any = None,
    changed: Mapping[str, Any] | None = None,
) -> Base:
    """Return a base for a task, in eval mode.

    name: a hub id, a folder, or a GGUF file, whose weights are dequantised.
    task: "causal-lm", "classification" or "regression".
    labels: the names of a classifier's outputs; None leaves them as the checkpoint has them.
    changed: values in its configuration, such as rates of dropout.

    Raises AdapterError when there is no such model, and when a language model's weights are not all in it.
    """
    tokenizer = tokenizer or load_tokenizer(name)
    transformers = require("transformers", "loading a model")
    options: dict[str, Any] = {}
    if task == "classification" and labels is not None:
        names = list(labels)
        options = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {label: i for i, label in enumerate(names)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
    elif task == "regression":
        options = {"num_labels": 1, "problem_type": "regression", "ignore_mismatched_sizes": True}
    source, gguf = _location(name)
    if gguf:
        options |= {"gguf_file": gguf, "quantization_config": transformers.GgufConfig(dequantize=True)}
    if changed:
        options = _configured(name, changed, options)
    cls = getattr(transformers, _CLASSES[task])
    with _reading(name), quiet(bars=not Path(source).is_dir()):
        model, info = cls.from_pretrained(source, dtype=dtype or "auto", output_loading_info=True, **options)
    if task == "causal-lm" and _reads_both_ways(transformers, model.config):
        raise AdapterError(f"{name} is no causal language model: it is an encoder, which sees the tokens that follow")
    fresh = sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})
    if task == "causal-lm" and fresh:
        raise AdapterError(f"{name} is no causal language model: its checkpoint lacks {enumerate_names(fresh, 3)}")
    padding = padding_of_classifier(model.config, tokenizer) if task != "causal-lm" else None
    if padding is not None:
        model.config.get_text_config().pad_token_id = padding
    return Base(model.to(device).eval(), tokenizer, _modules_with(model, fresh))


# Values that a model reads from its configuration where they are there, and that its class of it does not name.
_UNNAMED = ("cls_dropout",)


def _configured(name: str, changed: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of from_pretrained with a configuration in which some values are changed."""
    config = configuration(name)
    unknown = [key for key in changed if not hasattr(config, key) and key not in _UNNAMED]
    hints = [f"there is no '{key}'; {did_you_mean(key, [*config.to_dict(), *_UNNAMED])}" for key in unknown]
    raise_problems(f"cannot change the configuration of {name}", hints)
    own = {key: value for key, value in options.items() if key not in ("gguf_file", "ignore_mismatched_sizes")}
    for key, value in {**own, **changed}.items():
        setattr(config, key, value)
    return {key: value for key, value in options.items() if key not in own} | {"config": config}


def computing(changed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the changed values of a configuration that count at inference, where nothing is dropped out."""
    return {key: value for key, value in (changed or {}).items() if "drop" not in key}


def padding_of_classifier(config: Any, tokenizer: Any) -> int | None:
    """Return the padding that a decoder's classifier must know, to find the last token before it; None for encoders.

    It is that of `Task.collate`, whatever the configuration says.
    """
    if type(config) in require("transformers", "loading a model").MODEL_FOR_MASKED_LM_MAPPING:
        return None
    return padding_id(tokenizer)


def empty_base(
    name: str,
    task: str,
    *,
    dtype: torch.dtype | None = None,
    labels: int = 2,
    changed: Mapping[str, Any] | None = None,
) -> Any:
    """Return a base on the meta device, from its configuration alone.

    name: a hub id, a folder, a GGUF file, or one of `shapes.SHAPES`. changed: values in its configuration.
    """
    config = configuration(name)
    for key, value in (changed or {}).items():
        setattr(config, key, value)
    if task != "causal-lm":
        config.num_labels = 1 if task == "regression" else labels
    cls = getattr(require("transformers", "building a model"), _CLASSES[task])
    with _reading(name), quiet(), torch.device("meta"):
        return cls.from_config(config, dtype=dtype or torch.float32).eval()


def configuration(name: str) -> Any:
    """Return the configuration of a base; nothing else of it is read."""
    if _is_shape(name):
        with quiet():
            return configuration_of(name)
    transformers = require("transformers", "reading a model's configuration")
    source, gguf = _location(name)
    with _reading(name), quiet():
        return transformers.AutoConfig.from_pretrained(source, **({"gguf_file": gguf} if gguf else {}))


def task_of(name: str) -> str | None:
    """Return what a base is for when its configuration says that it is a classifier or a regression."""
    config = configuration(name)
    if not any(text.endswith("ForSequenceClassification") for text in config.architectures or ()):
        return None
    return "regression" if config.num_labels == 1 else "classification"


def known_labels(name: str) -> list[str]:
    """Return the names of the labels in a base's configuration: LABEL_0, ... where nobody gave them names."""
    config = configuration(name)
    return [config.id2label[i] for i in range(config.num_labels)] if config.id2label else []


def label_order(name: str, labels: Sequence[str]) -> list[str]:
    """Return labels in the order of the base's own classifier where it has just these, so that its head stays right."""
    own = known_labels(name)
    return own if sorted(own) == sorted(labels) else list(labels)


def checkpoint_folder(name: str) -> Path:
    """Return the folder with a base's files; of a base on the hub they are fetched first."""
    source, gguf = _location(name)
    if gguf:
        raise AdapterError(
            f"{name} is a GGUF file, not a checkpoint of safetensors; --in-memory merges into its weights"
        )
    if Path(source).is_dir():
        return Path(source)
    hub = require("huggingface_hub", "fetching a model")
    with _reading(name):
        kept = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]
        return Path(hub.snapshot_download(source, allow_patterns=kept))


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a base."""
    transformers = require("transformers", "loading a tokenizer")
    source, gguf = _location(name)
    with _reading(name), quiet():
        return transformers.AutoTokenizer.from_pretrained(source, **({"gguf_file": gguf} if gguf else {}))


def heads_of(model: Any, fresh: Sequence[str]) -> list[str]:
    """Return the modules to train whole with a classifier: all outside its encoder, and all that start at random."""
    prefix = getattr(model, "base_model_prefix", "")
    outside = [
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    ]
    return [*outside, *(name for name in fresh if name.partition(".")[0] not in outside)]


def longest(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a model can read, as its configuration or tokenizer says."""
    config = getattr(config, "text_config", config)
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    if getattr(config, "model_type", "") in _COUNTED_FROM_PADDING:
        limits = [limit and limit - 2 for limit in limits]
    limits.append(getattr(tokenizer, "model_max_length", None))
    return min((int(limit) for limit in limits if limit), default=1024)


def recompute_activations(model: Any) -> None:
    """Turn on gradient checkpointing, in the way in which gradients pass a frozen embedding."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers' newer name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _is_shape(name: str) -> bool:
    """Tell whether a name is that of a built-in shape; a folder of that name is a folder."""
    return name in SHAPES and not Path(name).expanduser().exists()


_UNMASKED = "lorank-unmasked"


def attend_to_all(model: Any) -> None:
    """Let a model on the meta device take a batch for one without padding.

    Of such a batch transformers makes no mask for PyTorch's attention, but finds that out by looking at values, which
    are not there. For an attention that has no function for masks it does not look. Other attention always has a mask.
    """
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        transformers = require("transformers", "building a model")
        transformers.AttentionInterface.register(_UNMASKED, transformers.AttentionInterface()["sdpa"])
        model.set_attn_implementation(_UNMASKED)


def _location(name: str) -> tuple[str, str | None]:
    """Return what from_pretrained takes, and the name of the GGUF file in it, if it is one."""
    if _is_shape(name):
        raise AdapterError(f"{name} is a shape without weights: it can be planned, not loaded")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AdapterError(f"there is no file {name}")
        require("gguf", "reading a GGUF file")
        require("accelerate", "reading a GGUF file")
        return str(path.parent), path.name
    if name.startswith("paper/") and not path.exists():
        raise AdapterError(f"there is no shape {name}; {did_you_mean(name, list(SHAPES))}")
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.exists():
        raise AdapterError(f"there is no folder {name}")
    if path.is_dir() and not (path / "config.json").is_file():
        inside = sorted(str(found.parent) for found in path.glob("*/config.json"))
        hint = f"; there are models in {enumerate_names(inside)}" if inside else ""
        adapter = (
            " (it is an adapter: give its base as model, and it as adapter)"
            if (path / "adapter_config.json").is_file()
            else ""
        )
        raise AdapterError(f"{name} is no model: it has no config.json{adapter}{hint}")
    return str(path) if path.is_dir() else name, None


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "" if Path(name).expanduser().exists() else " (it is no folder here, so it was looked for on the hub)"
        near = nearest(name, list(SHAPES)) if where else []
        shape = f"; lorank plan knows the shape {near[0]}" if near else ""
        raise AdapterError(f"cannot load {name}{where}: {first}{shape}") from error


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence transformers' remarks, which are checked here, and its bars unless something is to be downloaded."""
    logging = require("transformers", "loading a model").utils.logging
    level, hidden = logging.get_verbosity(), logging.is_progress_bar_enabled() and not bars
    logging.set_verbosity_error()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hidden:
            logging.enable_progress_bar()


def _reads_both_ways(transformers: Any, config: Any) -> bool:
    """Tell whether a model of the class for causal language models is an encoder with a head for masked words."""
    masked = transformers.MODEL_FOR_MASKED_LM_MAPPING
    return (
        type(config) in masked
        and getattr(config, "is_decoder", None) is False
        and not getattr(config, "is_encoder_decoder", False)
    )


def _modules_with(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """Return the modules that own tensors of these names, each once."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
