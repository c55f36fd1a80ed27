"""Inputs for a model of transformers, made from the signature of its forward and from its configuration."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .shrinking import SPECIAL

ROWS, TOKENS, ANSWER, SAMPLES = 2, 10, 6, 4000


def inputs_for(model: Any, changes: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
    """Return arguments of the model's forward. `changes` go before the rules; None drops an argument."""
    torch.manual_seed(1)
    maker = Maker(model)
    made = maker.arguments()
    changed = dict(changes if isinstance(changes, Mapping) else changes(model))
    made = {name: value for name, value in (made | changed).items() if value is not None}
    if "input_ids" not in changed:
        maker.place_tokens(made)
    return {name: value for name, value in made.items() if changed.get(name, value) is not None}


class Maker:
    """Makes the arguments that one model takes."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.taken = inspect.signature(model.forward).parameters
        self.required = {name for name, p in self.taken.items() if p.default is p.empty}

    def arguments(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, make in _MAKERS.items():
            if name in self.taken and (value := getattr(self, make)()) is not None:
                made[name] = value
        if "past_time_features" in made:
            made |= {"future_values": self.future(), "future_time_features": self.future_times()}
        if "past_values" in made and "past_time_features" not in made:
            made.pop("past_observed_mask", None)
        if "labels" in self.taken and (labels := self.labels(made)) is not None:
            made["labels"] = labels
        return made

    # text

    def text(self) -> Tensor:
        return torch.randint(5, min(SPECIAL - 5, self._look("vocab_size") or SPECIAL), (ROWS, TOKENS))

    def answer(self) -> Tensor:
        return torch.randint(5, SPECIAL - 5, (ROWS, ANSWER))

    def boxes(self) -> Tensor:
        corner = torch.randint(0, 40, (ROWS, TOKENS, 2))
        return torch.cat([corner, corner + torch.randint(1, 40, (ROWS, TOKENS, 2))], dim=-1)

    def labels(self, made: Mapping[str, Any]) -> Tensor | None:
        name = type(self.model).__name__
        if name.endswith("ForCTC"):
            return torch.randint(5, 30, (ROWS, 3))
        if name.endswith("Classification") and "Token" not in name:
            return torch.randint(0, self.config.num_labels, (ROWS,))
        if name.endswith(("ForCausalLM", "ForMaskedLM", "LMHeadModel", "ForConditionalGeneration")):
            return made["decoder_input_ids"] if "decoder_input_ids" in made else made.get("input_ids")
        return None

    # images

    def images(self) -> Tensor | None:
        if "image_grid_thw" in self.taken:
            size, times = self._look("patch_size"), self._look("temporal_patch_size") or 1
            return torch.randn(16 * ROWS, self._channels() * times * size * size)
        shape = (self._channels(), *self.image_size())
        if "spatial_shapes" in self.taken:
            return torch.randn(ROWS, 16, shape[0] * self._look("patch_size") ** 2)
        if type(self.model).__name__.endswith("VideoClassification"):
            return torch.randn(ROWS, self._look("num_frames", "frames_per_clip") or 4, *shape)
        return torch.randn(ROWS, 1, *shape) if "pixel_attention_mask" in self.taken else torch.randn(ROWS, *shape)

    def spatial_shapes(self) -> Tensor:
        return torch.tensor([[4, 4]] * ROWS)

    def patch_mask(self) -> Tensor | None:
        return torch.ones(ROWS, 16, dtype=torch.long) if "spatial_shapes" in self.taken else None

    def grid(self) -> Tensor:
        return torch.tensor([[1, 4, 4]] * ROWS)

    def image_size(self) -> tuple[int, int]:
        size = self._look("image_size", "img_size", "crop_size", "input_size")
        if isinstance(size, list | tuple):
            return (size[0], size[-1])
        if isinstance(size, Mapping):
            return (size["height"], size["width"])
        return (size or 64, size or 64)

    def image_sizes(self) -> Tensor:
        return torch.tensor([list(self.image_size())] * ROWS)

    def video(self) -> Tensor | None:
        if "input_ids" in self.taken or "pixel_values" in self.taken:
            return None
        frames = self._look("num_frames", "frames_per_clip") or 4
        return torch.randn(ROWS, frames, self._channels(), *self.image_size())

    def _channels(self) -> int:
        found = self._look("num_channels", "in_channels", "in_chans", "num_input_channels")
        return found if isinstance(found, int) else 3

    # sound

    def sound(self) -> Tensor:
        return torch.randn(ROWS, SAMPLES)

    def features(self) -> Tensor:
        mels = (
            self._look(
                "feature_projection_input_dim",
                "num_mel_bins",
                "input_feat_per_channel",
                "n_mels",
                "feature_size",
                "input_size",
            )
            or 16
        )
        if (
            self._look("max_source_positions")
            and self._look("num_mel_bins")
            and "Speech2" not in type(self.model).__name__
        ):
            return torch.randn(ROWS, mels, 2 * self._look("max_source_positions"))
        return torch.randn(ROWS, 48, mels)

    def features_mask(self) -> Tensor:
        return torch.ones(ROWS, max(self.features().shape[1:]), dtype=torch.long)

    # series

    def series(self) -> Tensor:
        config = self.config
        length = self._look("context_length", "prediction_length") or 16
        lags = max(getattr(config, "lags_sequence", None) or [0])
        channels = getattr(config, "num_input_channels", None)
        if "past_time_features" not in self.taken:
            return torch.randn((ROWS, length, channels) if channels else (ROWS, length))
        return torch.randn(ROWS, length + lags)

    def series_mask(self) -> Tensor:
        return torch.ones_like(self.series())

    def series_times(self) -> Tensor:
        return torch.zeros(*self.series().shape, self.config.num_time_features)

    def future(self) -> Tensor:
        return torch.randn(ROWS, self.config.prediction_length)

    def future_times(self) -> Tensor:
        return torch.zeros(ROWS, self.config.prediction_length, self.config.num_time_features)

    # what placeholders stand for

    def place_tokens(self, made: dict[str, Any]) -> None:
        """Put placeholders for images and sounds into the text, as many as the model makes vectors of them."""
        if "input_ids" not in made:
            return
        for kind, argument, names in _PLACEHOLDERS:
            name = f"get_{kind}_features"
            method = getattr(self.model, name, None) or getattr(self.model.base_model, name, None)
            token = next((v for n in names if isinstance(v := getattr(self.config, n, None), int)), None)
            if method is None or token is None or argument not in made:
                continue
            count = self._vectors(method, made) // ROWS
            placeholders = torch.full((ROWS, count), token)
            for name in ("input_ids", "labels"):
                if name in made:
                    made[name] = torch.cat([made[name][:, :2], placeholders, made[name][:, 2:]], dim=1)
        ids = made["input_ids"]
        if "labels" in made and made["labels"].shape == ids.shape:
            made["labels"] = ids.masked_fill(ids >= SPECIAL, -100)
        if "attention_mask" in made:
            made["attention_mask"] = torch.ones_like(ids)
        types = torch.zeros_like(ids)
        for kind, (_, _, names) in enumerate(_PLACEHOLDERS, start=1):
            for token in {getattr(self.config, name, None) for name in names} - {None}:
                types[ids == token] = kind
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self.taken and (
                name.startswith("mm") or type(self.model).__name__.startswith(("Gemma", "Pali"))
            ):
                made[name] = types

    def _vectors(self, method: Any, made: Mapping[str, Any]) -> int:
        taken = inspect.signature(method).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        passed = (
            {name for name in made if name not in _TEXT} if every and len(taken) <= 2 else _WITH if every else set()
        )
        given = {name: value for name, value in made.items() if name in taken or name in passed}
        if "input_ids" in given and taken["input_ids"].default is not inspect.Parameter.empty:
            del given["input_ids"]
        with torch.no_grad():
            found = method(**given)
        pooled = getattr(found, "pooler_output", None)
        found = getattr(found, "last_hidden_state", found) if pooled is None else pooled
        return sum(leaf.numel() // leaf.shape[-1] for leaf in _leaves(found))

    def _look(self, *names: str) -> Any:
        """Return the first of these attributes that the configuration or, level by level, one within it has."""
        for config in _levels(self.config):
            for name in names:
                value = getattr(config, name, None)
                if value is not None and not callable(value):
                    return value
        return None


def _levels(config: Any) -> Iterator[Any]:
    queue = [config]
    while queue:
        first = queue.pop(0)
        yield first
        inner = {name: getattr(first, name, None) for name in vars(first)}
        queue += [value for name, value in sorted(inner.items(), key=_seeing_first) if hasattr(value, "model_type")]


def _seeing_first(item: tuple[str, Any]) -> bool:
    return not any(word in item[0] for word in ("vision", "image", "backbone", "audio"))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


_MAKERS = {
    "input_ids": "text",
    "decoder_input_ids": "answer",
    "bbox": "boxes",
    "pixel_values": "images",
    "pixel_values_videos": "video",
    "spatial_shapes": "spatial_shapes",
    "pixel_attention_mask": "patch_mask",
    "image_grid_thw": "grid",
    "input_values": "sound",
    "input_features": "features",
    "input_features_mask": "features_mask",
    "past_values": "series",
    "past_observed_mask": "series_mask",
    "past_time_features": "series_times",
}

_WITH = {"image_merge_sizes", "image_sizes", "high_res_pixel_values", "padding_mask", "feature_attention_mask"}
_TEXT = {"input_ids", "attention_mask", "labels", "decoder_input_ids"}

_PLACEHOLDERS = [
    ("image", "pixel_values", ("image_token_id", "image_token_index", "image_pad_token_id")),
    ("video", "pixel_values_videos", ("video_token_id", "video_token_index")),
    ("audio", "input_features", ("audio_token_id", "audio_token_index")),
]
