"""Shrink a configuration of transformers: the same architecture with few, small layers.

A field is made small by what its name says: `hidden_size` is a width, `num_hidden_layers` a depth. Configurations
within it are shrunk in the same way. What the names do not tell is in `configurations`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 128
SPECIAL = 100  # the first id of placeholders; text is drawn from below

WIDTH, HIDDEN, HEADS, KEY_VALUE_HEADS, DEPTH = 32, 48, 4, 2, 2

# The first pattern that a field's name matches as a whole decides about it.
_BY_NAME: list[tuple[str, Any]] = [
    (r".*attention_types|.*_types?", None),
    (r"layer_norm_.*|initializer.*|.*_p|.*dropout.*|.*_eps|.*epsilon", None),
    (r"type_vocab_sizes?|.*_type_vocab_size", None),
    (r"(.*_)?vocab_size", VOCABULARY),
    (r"(src|tgt|codebook|.*_codebook)_?(vocab_)?size|codebook_size|num_embeds", VOCABULARY),
    (r"num_(kv_heads|key_value_heads)|.*num_(key_value|kv)_heads|num_key_value_attention_heads", KEY_VALUE_HEADS),
    (r"(num_)?kv_heads|multi_query_group_num", KEY_VALUE_HEADS),
    (r".*(attention_heads?|attn_heads|num_heads|n_heads?|attention_head_count|num_.*_heads|_heads)|heads", HEADS),
    (r"(qk_)?(nope|rope)_head_dim|qk_(nope|rope)_head_dim|rotary_dim", 8),
    (r".*head_(dim|size)|d_kv|kv_channels|attention_head_size|d_head|head_dim_.*", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (
        r".*(intermediate|ffn|mlp|feedforward|feed_forward|inner)_?(hidden_)?(size|dim)(_.*)?|d_ff|n_inner|d_inner",
        HIDDEN,
    ),
    (r"dim_feedforward|.*_dim_feedforward|.*linear_units|intermediate_multiple_size", HIDDEN),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers", 1),
    (r"(num_)?kv_shared_layers|num_kv_shared_layers|num_nextn_predict_layers|num_mtp.*", 0),
    (r".*num_(hidden_)?layers|n_layers?|.*_layers|num_blocks|.*_depth|depth|layers|.*num_hidden_layers", DEPTH),
    (r"(num|n|moe_num|.*_num)_(routed_|local_)?experts|ffn_num_experts|num_local_experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|n_groups", 1),
    (r".*(experts_per_tok(en)?|topk_experts|moe_k|moe_topk|num_selected_experts|top_k_experts)", 2),
    (r"max_.*position.*|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length", 128),
    (r"(sliding_window|local_attention|attention_window|attention_chunk_size|sliding_window_size)", 8),
    (r"(.*_)?image_size|crop_size|img_size|pretrain_image_size", 32),
    (r"(.*_)?patch_size", 8),
    (r"num_mel_bins|n_mels|num_mels|feature_size|num_mel_channels", 16),
    (r"(hidden_size|d_model|dim|n_embd|embed_dim|emb_dim|model_dim|width)", WIDTH),
    (
        r".*(hidden_size|hidden_dim|embed_dim|embedding_size|embedding_dim|projection_dim|proj_size|d_model|proj_dim)",
        WIDTH,
    ),
    (r"(.*_)?(output|input|feature|fusion|hidden|mask_feature|codevector|latent)_(size|dim)", WIDTH),
    (r".*num_queries|num_query_tokens|num_latents|num_denoising", 8),
    (r"decoder_n_points|train_num_points", None),
    (r"num_frames|frames_per_clip", 4),
    (r".*(mamba_n_heads|mamba_num_heads)", HEADS),
    (r"state_size|ssm_state_size|mamba_d_state", 8),
    (r"(mamba_)?chunk_size", 8),
    (r"max_source_positions|max_target_positions|max_length", 128),
    (r"upsample_groups", WIDTH),
    (r"num_labels", 3),
]

_DIVISOR = 8  # of widths that are given in lists
_NEEDED = {"vocab_size": VOCABULARY, "prediction_length": 8}  # where there is no default
_LAYER_TYPES = ("layer_types", "layers_block_type")

_TOKEN = re.compile(r".*(token_id|token_index|_start_id|_end_id|_bos_id|_eos_id|_token|_newline_id|_patch_id)s?")
_COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "sep_token_id": 2}


def rule(name: str) -> int | None:
    """Return how large the field of this name is made; None where its name does not tell."""
    return next((value for pattern, value in _BY_NAME if re.fullmatch(pattern, name)), None)


class Shrinker:
    """Makes configurations small. One shrinker makes one model's, so that its parts agree on special tokens."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}

    def shrink(self, cls: type[PreTrainedConfig], changes: Mapping[str, Any], default: Any = None) -> PreTrainedConfig:
        """Return a small configuration of a class; `changes` go before every rule, and may be nested."""
        default = cls() if default is None else default
        fields = {field.name: _default(field) for field in dataclasses.fields(cls) if field.init}
        made: dict[str, Any] = {}
        for name in self._nested(cls, default):
            inner = _read(default, name)
            change = changes.get(name, {})
            if isinstance(change, PreTrainedConfig) or change is None:
                made[name] = change
                continue
            change = dict(change)
            kind = change.pop("class", type(inner))
            made[name] = self.shrink(kind, change, inner if kind is type(inner) else None)
        for name, value in fields.items():
            if name in made or name in changes:
                continue
            actual = _read(default, name, value)
            if name in _LAYER_TYPES and (actual is None or isinstance(actual, list | tuple)):
                self._few_layers(name, actual, made, changes)
            elif name == "rope_parameters":
                self._rope(cls, actual, made)
            elif name == "num_key_value_heads" and (actual is None or "kv_lora_rank" in fields):
                made[name] = HEADS if "kv_lora_rank" in fields else KEY_VALUE_HEADS
            elif name == "embed_dim" and any(
                isinstance(_read(default, n), list | tuple) for n in ("num_heads", "depths")
            ):
                made[name] = actual // _DIVISOR if isinstance(actual, int) else _scaled(actual)
            elif actual is None and name in _NEEDED:
                made[name] = _NEEDED[name]
            elif value is not None or _TOKEN.fullmatch(name):  # the others are computed by the class
                small = self._small(name, actual)
                if small != value:
                    made[name] = small
        made |= {name: value for name, value in changes.items() if name not in made}
        return cls(**made)

    @staticmethod
    def _nested(kind: type[PreTrainedConfig], default: Any) -> list[str]:
        known = {*getattr(kind, "sub_configs", {}), *(getattr(kind, "sub_configs_defaults", None) or {})}
        return [name for name in sorted(known) if isinstance(_read(default, name), PreTrainedConfig)]

    @staticmethod
    def _few_layers(name: str, types: Any, made: dict[str, Any], changes: Mapping[str, Any]) -> None:
        """Keep one layer of each type, of which there are several."""
        kinds = list(dict.fromkeys(types or ()))
        if len(kinds) > 1 and "num_hidden_layers" not in changes:
            made[name] = kinds
            made["num_hidden_layers"] = len(kinds)

    @staticmethod
    def _rope(kind: type[PreTrainedConfig], actual: Any, made: dict[str, Any]) -> None:
        rope = {"rope_type": "default", "rope_theta": 10000.0} if actual is None else dict(actual)
        if rope.get("rope_theta", 0) is None:
            rope["rope_theta"] = 10000.0
        nested = any(isinstance(value, dict) for value in rope.values())
        if not nested and "mrope_section" in {*rope, *getattr(kind, "ignore_keys_at_rope_validation", ())}:
            rope["mrope_section"] = [2, 1, 1]
        if rope != actual and actual is not None:
            made["rope_parameters"] = rope

    def _small(self, name: str, value: Any) -> Any:
        if isinstance(value, bool | str | dict | float):
            return _switched_off(name, value)
        if _TOKEN.fullmatch(name) and not _holds_booleans(value):
            return self._token(name, value)
        if isinstance(value, int):
            small = rule(name)
            return value if small is None else min(value, small) if value > 0 else value
        if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            return type(value)(_small_list(name, list(value)))
        return value

    def _token(self, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._token(f"{name}-{i}", item) for i, item in enumerate(value))
        if value is None or value < 0:
            return value
        if name in _COMMON:
            return _COMMON[name]
        name = name.replace("token_index", "token_id")
        return self.tokens.setdefault(name, SPECIAL + len(self.tokens) % (VOCABULARY - SPECIAL))


def _holds_booleans(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value)


def _switched_off(name: str, value: Any) -> Any:
    """Return the value without what would make two forward passes differ."""
    if isinstance(value, float) and re.search(r"dropout|drop_path|drop_rate|layer_?drop|jitter|mask_.*_prob", name):
        return 0.0
    return False if name == "apply_spec_augment" else value


_ONES = r"depths|num_blocks|layers|.*num_layers|blocks_per_stage|block_sizes|num_block_repeats"
_WIDTHS = (
    r".*hidden_sizes|embed_dims|(output|out|neck)_channels|num_channels_.*|dims|embed_dim|.*hidden_dims|.*conv_dim|"
    r"convstream_.*|feature_dims"
)


def _small_list(name: str, value: list[int]) -> list[int]:
    if re.fullmatch(_ONES, name):
        return [1] * len(value)
    if re.fullmatch(_WIDTHS, name):
        return _scaled(value)
    if re.fullmatch(r"image_size|patch_size|crop_size", name):
        return [min(n, 32 if n > 64 else 8) for n in value]
    return value


def _scaled(widths: Sequence[int]) -> list[int]:
    """Divide widths by one number, the same for all lists, so that those that must agree still do."""
    return [width if width < 2 * _DIVISOR else max(1, width // _DIVISOR) for width in widths]


def _read(config: Any, name: str, otherwise: Any = None) -> Any:
    """Return an attribute; one that differs from layer to layer is read from where the global value lies."""
    try:
        return getattr(config, name, otherwise)
    except Exception:
        return vars(config).get(name, otherwise)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
