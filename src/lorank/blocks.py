"""The repeated blocks of a transformer, and where in a block its two sublayers end."""

from dataclasses import dataclass

from torch import nn

from .adapted import base_class
from .errors import AdapterError, did_you_mean, enumerate_names
from .hosts import NoHost
from .names import Names


@dataclass(frozen=True)
class Sublayer:
    """Where the attention, or the feed-forward part, of a block ends: names in the block."""

    projection: str  # the last linear layer
    end: str  # the module whose output is added to the residual: a dropout behind the projection, or it itself


@dataclass(frozen=True)
class Anatomy:
    """What the parts of a kind of block are called in it."""

    attention: Sublayer
    feed_forward: Sublayer
    norm: str | None = None  # of blocks that end in a layer norm of the residual's sum (post-norm)


def _anatomy(attention: str, feed_forward: str, norm: str | None = None) -> Anatomy:
    """Return an anatomy of "projection dropout" pairs, or of projections alone."""
    ends = [Sublayer(words[0], words[-1]) for words in (attention.split(), feed_forward.split())]
    return Anatomy(ends[0], ends[1], norm)


# A block is of the first kind of which it has all the names.
_KINDS = (
    # BERT, RoBERTa, DeBERTa, ELECTRA
    _anatomy("attention.output.dense attention.output.dropout", "output.dense output.dropout", "output.LayerNorm"),
    _anatomy("attention.attn.o attention.dropout", "output.dense output.dropout", "output.LayerNorm"),  # MPNet
    _anatomy("attention.out_lin", "ffn.lin2 ffn.dropout", "output_layer_norm"),  # DistilBERT
    _anatomy("attn.c_proj attn.resid_dropout", "mlp.c_proj mlp.dropout"),  # GPT-2
    _anatomy("attn.attention.out_proj attn.attention.resid_dropout", "mlp.c_proj mlp.dropout"),  # GPT-Neo
    _anatomy("attn.out_proj attn.resid_dropout", "mlp.fc_out mlp.dropout"),  # GPT-J
    _anatomy("attention.dense post_attention_dropout", "mlp.dense_4h_to_h post_mlp_dropout"),  # GPT-NeoX
    _anatomy("self_attn.o_proj", "mlp.down_proj"),  # LLaMA, Mistral, Qwen, SmolLM
)


def stacks_of(names: Names) -> dict[str, list[str]]:
    """Return the model's stacks of blocks, {name of the list: names of its blocks}, in the model's order.

    A stack is a `ModuleList` of modules of one class that hold a sublayer each; lists in a block are no stacks.
    """
    found: dict[str, list[str]] = {}
    for name, module in names.modules.items():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not isinstance(module, nn.ModuleList) or inside or names.canonical[name] != name:
            continue
        blocks = [child for child in module._modules.values() if child is not None]
        alike = len({base_class(block) for block in blocks}) == 1
        if alike and any(blocks[0].children()) and not isinstance(blocks[0], nn.ModuleList):
            found[name] = [f"{name}.{child}".removeprefix(".") for child in module._modules]
    return found


def blocks_of(names: Names, purpose: str, stack: str = "") -> list[str]:
    """Return the names of the blocks of a model's stack.

    stack: the name of the list, of a model with several. Raises AdapterError where it is not known which is meant.
    """
    stacks = stacks_of(names)
    if stack:
        if stack not in stacks:
            raise AdapterError(f"{purpose}: there is no list of blocks '{stack}'; {did_you_mean(stack, stacks)}")
        return stacks[stack]
    if len(stacks) != 1:
        found = f"has {len(stacks)}: {enumerate_names(stacks)}; say which with stack=" if stacks else "has none"
        raise AdapterError(f"{purpose} needs to know the list of blocks (a ModuleList), and the model {found}")
    return next(iter(stacks.values()))


def anatomy_of(block: str, names: Names) -> Anatomy | None:
    """Return where the parts of a block are; None for a kind that is not known."""
    for kind in _KINDS:
        needed = [kind.attention.projection, kind.attention.end, kind.feed_forward.projection, kind.feed_forward.end]
        if all(f"{block}.{name}" in names.modules for name in [*needed, *([kind.norm] if kind.norm else [])]):
            return kind
    return None


def width_of(block: str, anatomy: Anatomy, names: Names) -> int:
    """Return the width of the residual stream that a block adds to."""
    projection = f"{block}.{anatomy.feed_forward.projection}"
    try:
        return names.host(projection).shape(names.modules[projection], "weight")[0]
    except NoHost as error:
        raise AdapterError(f"{projection}: {error}") from None
