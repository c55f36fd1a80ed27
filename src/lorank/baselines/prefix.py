"""Prefixes: special tokens around the prompt, of which embeddings or activations are trained (paper, section 5.1)."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import anatomy_of, blocks_of, stacks_of, width_of
from ..errors import AdapterError, raise_problems
from ..names import Names
from ..variants import Adapter, materialised
from .base import Arrangement, Baseline, Build, Inserted, register, whole_number_problems
from .special import Running, SpecialTokens


@dataclass(frozen=True)
class Prefix(Baseline):
    """Special tokens in front of the prompt (prefix, the paper's l_p) and behind it (infix, l_i)."""

    merges = False
    pace = 5.0
    prefix: int = 8
    infix: int = 8

    def __post_init__(self) -> None:
        problems = whole_number_problems(self, prefix=0, infix=0)
        if not problems and not self.prefix + self.infix:
            problems = ["prefix and infix are 0: there would be nothing to train"]
        raise_problems(f"{self.variant} cannot be used", problems)

    def arrange(self, model: nn.Module, names: Names) -> Arrangement:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore
        if not isinstance(embedding, nn.Embedding):
            raise AdapterError(f"{self.variant} needs a model with an embedding of tokens (get_input_embeddings)")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise AdapterError(f"{self.variant} is for models of one stack; this one has an encoder and a decoder")
        name = next(name for name, module in names.modules.items() if module is embedding)
        running = Running(SpecialTokens(embedding.num_embeddings, self.prefix, self.infix))
        return Arrangement(inserted=self.modules(name, embedding, running, names))

    @abstractmethod
    def modules(self, name: str, embedding: nn.Embedding, running: Running, names: Names) -> dict[str, Build]:
        """Return what is to run with the embedding of that name, and with other modules."""

    def around(self) -> int:
        return self.prefix + self.infix

    def inference(self) -> str:
        return f"{self.around()} more tokens to read in every input, and as much less room in its context"


@register("prefix-embedding")
@dataclass(frozen=True)
class PrefixEmbedding(Prefix):
    """The special tokens have trained embeddings: d · (prefix + infix) parameters."""

    prefix: int = 64

    def modules(self, name: str, embedding: nn.Embedding, running: Running, names: Names) -> dict[str, Build]:
        found: dict[str, Build] = {
            name: lambda device: SpecialEmbedding(self, running, embedding, device, embedding.embedding_dim)
        }
        stacks = list(stacks_of(names).values())
        return found | ({stacks[0][0]: lambda device: IdsNeeded(self, running)} if len(stacks) == 1 else {})


@register("prefix-layer")
@dataclass(frozen=True)
class PrefixLayer(Prefix):
    """The special tokens have trained activations at every block: L · d · (prefix + infix) parameters.

    stack: the name of the list of blocks, of a model with several.

    What the blocks below make of the tokens is replaced by trained rows, at the input of every block. (The paper says
    "after every Transformer layer"; rows after the last one would have no effect.)
    """

    stack: str = ""

    def modules(self, name: str, embedding: nn.Embedding, running: Running, names: Names) -> dict[str, Build]:
        found: dict[str, Build] = {name: lambda device: SpecialMarks(self, running)}
        blocks = blocks_of(names, self.variant, self.stack)
        anatomy = anatomy_of(blocks[0], names)
        width = width_of(blocks[0], anatomy, names) if anatomy is not None else embedding.embedding_dim

        def build(last: bool) -> Build:
            return lambda device: SpecialActivations(self, running, embedding, device, width, last)

        return found | {block: build(block == blocks[-1]) for block in blocks}


class SpecialMarks(Inserted):
    """At the embedding: notes where the special tokens are, which the embedding itself does not know."""

    prepares = True

    def __init__(self, spec: Prefix, running: Running):
        super().__init__()
        self.spec, self.running = spec, running

    def prepare(self, layer: Any, x: Tensor) -> Tensor:
        return self.running.begin(x, layer.num_embeddings)

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y

    def start(self) -> None:
        """There is nothing to initialise."""


class IdsNeeded(SpecialMarks):
    """At the first block: a batch that comes here without having been embedded would run as if there were no prefix."""

    def prepare(self, layer: nn.Module, x: Tensor) -> Tensor:
        self.running.at_first_block()
        return x


class _Rows(SpecialMarks):
    """A trained row for each special token."""

    def __init__(
        self, spec: Prefix, running: Running, embedding: nn.Embedding, device: torch.device | None, width: int
    ):
        super().__init__(spec, running)
        weight = embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (len(running.tokens), width)
        self.rows = nn.Parameter(torch.empty(shape, device=device or weight.device, dtype=dtype))
        self.spread = _spread(embedding)
        if not self.rows.is_meta:
            with torch.no_grad():
                self.start()

    def start(self) -> None:
        nn.init.normal_(self.rows, std=self.spread)

    def reset_parameters(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Embedding):
            self.spread = _spread(layer)  # on the meta device it was not known
        super().reset_parameters(layer)

    def extra_repr(self) -> str:
        return str(self.spec)


class SpecialEmbedding(_Rows):
    """At the embedding: the rows are what the special tokens are embedded as."""

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        ids = self.running.ids
        return y if ids is None else self.running.put(materialised(self.rows, y), ids, y)


class SpecialActivations(_Rows):
    """At a block: the rows are what the special tokens enter it as."""

    def __init__(
        self,
        spec: Prefix,
        running: Running,
        embedding: nn.Embedding,
        device: torch.device | None,
        width: int,
        last: bool,
    ):
        super().__init__(spec, running, embedding, device, width)
        self.last = last

    def prepare(self, layer: nn.Module, x: Tensor) -> Tensor:
        checkpointed = bool(getattr(layer, "gradient_checkpointing", False)) and layer.training
        ids = self.running.at_block(x, checkpointed, self.last)
        return x if ids is None else self.running.put(materialised(self.rows, x), ids, x)


def _spread(embedding: Any) -> float:
    """Return how far the embeddings of the vocabulary spread, so that special tokens begin as long as others are."""
    weight = embedding.weight
    if weight.is_meta:
        return 0.02  # what most models are initialised with; `reset` looks again
    return float(weight.detach().float().std()) * float(getattr(embedding, "embed_scale", 1.0))


def special_tokens_of(leaves: Iterable[Adapter]) -> SpecialTokens | None:
    """Return the special tokens of adapters that are active together; None when they have none."""
    return next((leaf.running.tokens for leaf in leaves if isinstance(leaf, SpecialMarks)), None)
