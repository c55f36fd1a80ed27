"""The families of transformers: which there are, which class of each is run, and how a tiny one is built."""

import importlib
import inspect
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here is downloaded

import transformers
from transformers import PreTrainedModel

from .configurations import SETTINGS, Settings
from .inputs import inputs_for
from .procedure import Case, NotRunError
from .shrinking import Shrinker

_ROOT = Path(transformers.__file__).parent / "models"
_NO_FAMILIES = {"auto", "deprecated"}

# A class whose name ends so is preferred, the first most.
_HEADS = [
    *("ForConditionalGeneration", "ForCausalLM", "ForMaskedLM", "LMHeadModel", "ForCTC"),
    *("ForImageClassification", "ForVideoClassification", "ForAudioClassification", "ForObjectDetection"),
    *("ForSemanticSegmentation", "ForUniversalSegmentation", "ForInstanceSegmentation", "ForDepthEstimation"),
    *("ForSequenceClassification", "ForPreTraining", "ForPrediction", "Model"),
]

_KINDS = [
    ("pixel_values_videos", "video"),
    ("input_values", "audio"),
    ("input_features", "audio"),
    ("pixel_values", "vision"),
    ("flattened_patches", "vision"),
    ("past_values", "time series"),
]


def families() -> list[str]:
    """Return the name of every folder of transformers' models that holds a model."""
    folders = (path for path in _ROOT.iterdir() if path.name not in _NO_FAMILIES)
    return sorted(folder.name for folder in folders if any(folder.glob("modeling_*.py")))


def case_of(family: str) -> Case:
    """Return what the procedure runs for a family; raises what building it raises."""
    settings = SETTINGS.get(family, Settings())
    if settings.not_run:
        raise NotRunError(settings.not_run)
    cls = model_class(family, settings.model)

    def build() -> PreTrainedModel:
        kind: Any = cls.config_class
        return cls(Shrinker().shrink(kind, settings.config))

    def inputs(model: PreTrainedModel) -> dict[str, Any]:
        return inputs_for(model, settings.inputs)

    return Case(family, cls.__name__, kind_of(cls), build, inputs, train_mode=settings.train_mode)


def model_class(family: str, name: str | None = None) -> type[PreTrainedModel]:
    """Return the class of a family that is run: with the most parts, and among those with the best head."""
    found: dict[str, type[PreTrainedModel]] = {}
    for file in sorted((_ROOT / family).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        found |= {key: value for key, value in vars(module).items() if _is_model(value, module.__name__)}
    if name is not None:
        return found[name]
    if not found:
        raise NotRunError("has no model class with a configuration of its own")
    return min(found.values(), key=lambda cls: (-len(_parts(cls)), -_inputs(cls), _rank(cls.__name__)))


def _is_model(value: Any, module: str) -> bool:
    if not (inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module):
        return False
    return inspect.isclass(value.config_class) and not value.__name__.endswith("PreTrainedModel")


def _parts(cls: type[PreTrainedModel]) -> set[str]:
    config = cls.config_class
    return {*getattr(config, "sub_configs", {}), *(getattr(config, "sub_configs_defaults", None) or {})}


def _inputs(cls: type[PreTrainedModel]) -> int:
    """Count the kinds of input that a model of several parts takes."""
    taken = inspect.signature(cls.forward).parameters
    return sum(name in taken for name in ("input_ids", *(name for name, _ in _KINDS))) if len(_parts(cls)) > 1 else 0


def _rank(name: str) -> int:
    return next((i for i, ending in enumerate(_HEADS) if name.endswith(ending)), len(_HEADS))


def kind_of(cls: type[PreTrainedModel]) -> str:
    """Return the modality of a model by what its forward takes."""
    taken = inspect.signature(cls.forward).parameters
    other = next((kind for name, kind in _KINDS if name in taken), None)
    if "input_ids" in taken and other:
        return f"text + {other}"
    if other is None:
        return "encoder-decoder" if "decoder_input_ids" in taken else "text"
    return "audio to text" if other == "audio" and "decoder_input_ids" in taken else other
