"""The special tokens that the active adapters want around a prompt."""

from torch import nn

from .baselines import SpecialTokens, special_tokens_of
from .surgery import named_or_active
from .tree import active_adapters, entries, unwrapped
from .variants import Adapter


def special_tokens(model: nn.Module, name: str | None = None) -> SpecialTokens | None:
    """Return the special tokens that an adapter with a prefix wants around every prompt; None for one without.

        tokens = lorank.special_tokens(model)
        ids = tokens.around(array("q", prompt_ids), 0, len(prompt_ids))  # [prefix][prompt][infix]

    Without a name it is the active adapters' tokens.
    """
    model = unwrapped(model)
    chosen = named_or_active(model, name, "tell the special tokens") if name or active_adapters(model) else []
    found = [entry for adapter in chosen for _, entry in entries(model, adapter).values()]
    return special_tokens_of(leaf for entry in found if isinstance(entry, Adapter) for leaf in entry.leaves())
