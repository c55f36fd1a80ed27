"""Parts of a fused projection: `c_attn[q,v]`, `qkv_proj[q,k]`, `gate_up_proj[up]`.

Which rows of the fused weight belong to which part is known by the class of the module that splits the output,
not by the layer, so it stands in a table by that class. A layout that is not in the table is refused: there is
nothing in a weight from which it could be told.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AdditiveHost, NoHost


@dataclass(frozen=True)
class RowLayout:
    """Rows of a fused weight seen as (groups, width), where each part is one range of the width.

    One group is the contiguous layout; one group a head is GPT-NeoX's interleaved one.
    """

    groups: int
    parts: dict[str, tuple[int, int]]  # part -> (start, stop) within a group, in rows

    @property
    def width(self) -> int:
        """Rows of one group."""
        return max(stop for _, stop in self.parts.values())

    @property
    def rows(self) -> int:
        """Rows of the whole weight."""
        return self.groups * self.width

    def index(self, part: str) -> Tensor:
        """Return the row numbers of a part, (rows of the part,), int64."""
        start, stop = self.parts[part]
        return torch.arange(self.rows, device="cpu").view(self.groups, self.width)[:, start:stop].reshape(-1)


def consecutive(groups: int = 1, **sizes: int) -> RowLayout:
    """Return the layout with the named parts one after the other in every group; sizes in rows of a group."""
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[part] = (start, start + size)
        start += size
    return RowLayout(groups, parts)


class FusedHost(AdditiveHost):
    """A view of another host's layer as the parts of its fused projection."""

    def __init__(self, base: AdditiveHost, layout: RowLayout):
        self.base = base
        self.layout = layout
        self.transposed = base.transposed
        self.multiplies_rows = base.multiplies_rows

    def parts(self, layer: nn.Module) -> tuple[str, ...]:
        return tuple(self.layout.parts)

    def attribute(self, layer: nn.Module, part: str) -> str:
        return self.base.attribute(layer, "weight")

    def _rows_of(self, W: Tensor, part: str) -> Tensor:
        start, stop = self.layout.parts[part]
        return W.unflatten(0, (self.layout.groups, self.layout.width))[:, start:stop]  # a view: (groups, size, in)

    def matrix(self, layer: nn.Module, part: str) -> Tensor:
        return self._rows_of(self.base.matrix(layer, "weight"), part).flatten(0, 1)

    def stored(self, layer: nn.Module, part: str, W: Tensor) -> Tensor:
        return self.base.stored(layer, "weight", self.padded(part, W))

    def write(self, layer: nn.Module, part: str, W: Tensor) -> None:
        rows = self._rows_of(self.base.matrix(layer, "weight").data, part)
        rows.copy_(W.view_as(rows))

    def padded(self, part: str, W: Tensor) -> Tensor:
        """Return rows of a part (rows of the part, in) as a whole matrix (rows, in), zero elsewhere."""
        start, stop = self.layout.parts[part]
        grouped = W.unflatten(0, (self.layout.groups, stop - start))
        return F.pad(grouped, (0, 0, start, self.layout.width - stop)).flatten(0, 1)

    def down(self, layer: nn.Module, part: str, x: Tensor, A: Tensor) -> Tensor:
        return self.base.down(layer, "weight", x, A)

    def up(self, layer: nn.Module, part: str, z: Tensor, B: Tensor) -> Tensor:
        return self.base.up(layer, "weight", z, B)  # (..., rows of the part)

    def whole(self, layer: nn.Module, part: str, x: Tensor, W: Tensor) -> Tensor:
        return self.base.whole(layer, "weight", x, W)

    def without_bias(self, layer: nn.Module, part: str, y: Tensor) -> Tensor:
        return self.base.without_bias(layer, "weight", y)

    def channel(self, layer: nn.Module, part: str, v: Tensor) -> Tensor:
        start, stop = self.layout.parts[part]
        grouped = v.unflatten(0, (self.layout.groups, stop - start))
        padded = F.pad(grouped, (start, self.layout.width - stop)).flatten()
        return self.base.channel(layer, "weight", padded)

    def add(self, layer: nn.Module, part: str, y: Tensor, update: Tensor) -> Tensor:
        start, stop = self.layout.parts[part]
        grouped = update.to(y.dtype).unflatten(-1, (self.layout.groups, stop - start))
        return y + F.pad(grouped, (start, self.layout.width - stop)).flatten(-2)

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.base.apply(layer, x)

    def example(self, layer: nn.Module) -> Tensor:
        return self.base.example(layer)


Layout = Callable[[Any, Any], RowLayout]  # (owner, layer) -> layout; what they have depends on their classes

_LAYOUTS: dict[tuple[str, str], Layout] = {}


def register_layout(owners: str, layer_name: str, layout: Layout) -> None:
    """Make a layout known: `owners` are qualified names of the classes that hold and split the layer."""
    for owner in owners.split():
        _LAYOUTS[owner, layer_name] = layout


def layout_of(owner: nn.Module, layer_name: str, layer: nn.Module, rows: int) -> RowLayout:
    """Return the row layout of a fused layer from its owner's class; raises NoHost when it is not known."""
    for cls in type(owner).__mro__:
        find = _LAYOUTS.get((f"{cls.__module__}.{cls.__qualname__}", layer_name))
        if find is not None:
            layout = find(owner, layer)
            if layout.rows != rows:
                raise NoHost(f"its layout in {cls.__name__} has {layout.rows} rows, its weight {rows}")
            return layout
    owners = sorted({owner.rpartition(".")[2] for owner, name in _LAYOUTS if name == layer_name})
    hint = f"; '{layer_name}' is known in {', '.join(owners)}" if owners else ""
    raise NoHost(
        f"the row layout of '{layer_name}' in {type(owner).__name__} is not known, so its parts cannot be told apart"
        f"{hint}. Adapt the whole layer, or register the layout with lorank.hosts.register_layout"
    )


def _thirds(owner: Any, layer: Any) -> RowLayout:
    size = _rows(layer) // 3
    return consecutive(q=size, k=size, v=size)


def _gpt2(owner: Any, layer: Any) -> RowLayout:
    size: int = owner.embed_dim
    if owner.is_cross_attention:
        return consecutive(k=size, v=size)
    return consecutive(q=size, k=size, v=size)


def _gpt_bigcode(owner: Any, layer: Any) -> RowLayout:
    if owner.is_cross_attention:
        raise NoHost("transformers' GPTBigCode cannot run its cross attention, so its layout is not known")
    if owner.multi_query:
        return consecutive(q=owner.embed_dim, k=owner.kv_dim, v=owner.kv_dim)
    return consecutive(owner.num_heads, q=owner.head_dim, k=owner.head_dim, v=owner.head_dim)


def _per_head(size: str) -> Layout:
    """Interleaved head by head; the attribute `size` of the owner is the size of one head."""

    def layout(owner: Any, layer: Any) -> RowLayout:
        head: int = getattr(owner, size)
        heads = _rows(layer) // (3 * head)
        return consecutive(heads, q=head, k=head, v=head)

    return layout


def _falcon(owner: Any, layer: Any) -> RowLayout:
    head: int = owner.head_dim
    if owner.new_decoder_architecture:
        return consecutive(owner.num_kv_heads, q=owner.num_heads // owner.num_kv_heads * head, k=head, v=head)
    if owner.multi_query:
        return consecutive(q=owner.num_heads * head, k=head, v=head)
    return consecutive(owner.num_heads, q=head, k=head, v=head)


def _codegen(owner: Any, layer: Any) -> RowLayout:
    shards = 4  # the model was trained on four cores and keeps their order, with v before k
    size = owner.head_dim * owner.num_attention_heads // shards
    return consecutive(shards, q=size, v=size, k=size)


def _grouped_query(owner: Any, layer: Any) -> RowLayout:
    size = owner.num_key_value_heads * owner.head_dim
    return consecutive(q=_rows(layer) - 2 * size, k=size, v=size)


def _gate_up(owner: Any, layer: Any) -> RowLayout:
    size = _rows(layer) // 2
    return consecutive(gate=size, up=size)


def _rows(layer: Any) -> int:
    return layer.nf if hasattr(layer, "nf") else layer.out_features


_MODELS = "transformers.models."


def _models(*owners: str) -> str:
    return " ".join(f"{_MODELS}{package}.modeling_{package}.{cls}" for package, cls in (o.split(":") for o in owners))


_GPT2_LIKE = (
    "gpt2:GPT2Attention",
    "imagegpt:ImageGPTAttention",
    "decision_transformer:DecisionTransformerGPT2Attention",
)
register_layout(_models(*_GPT2_LIKE), "c_attn", _gpt2)
register_layout(_models("gpt_bigcode:GPTBigCodeAttention"), "c_attn", _gpt_bigcode)
register_layout(_models("gpt_neox:GPTNeoXAttention"), "query_key_value", _per_head("head_size"))
register_layout(_models("gpt_neox_japanese:GPTNeoXJapaneseAttention"), "query_key_value", _per_head("head_size"))
register_layout(
    _models("bloom:BloomAttention", "persimmon:PersimmonAttention"), "query_key_value", _per_head("head_dim")
)
register_layout(_models("deberta:DisentangledSelfAttention"), "in_proj", _per_head("attention_head_size"))
register_layout(_models("falcon:FalconAttention"), "query_key_value", _falcon)
register_layout(_models("codegen:CodeGenAttention"), "qkv_proj", _codegen)
register_layout(_models("phi3:Phi3Attention", "phi4_multimodal:Phi4MultimodalAttention"), "qkv_proj", _grouped_query)
register_layout(_models("dbrx:DbrxAttention"), "Wqkv", _grouped_query)
register_layout(_models("mpt:MptAttention", "modernbert:ModernBertAttention"), "Wqkv", _thirds)
_VISION = ("blip:BlipAttention", "blip_2:Blip2Attention", "vitdet:VitDetAttention", "sam:SamVisionAttention")
register_layout(_models(*_VISION, "qwen2_vl:VisionAttention", "timesformer:TimesformerSelfAttention"), "qkv", _thirds)
_GATED = ("phi3:Phi3MLP", "phi4_multimodal:Phi4MultimodalMLP", "glm:GlmMLP", "glm4:Glm4MLP")
register_layout(_models(*_GATED), "gate_up_proj", _gate_up)
