"""The methods that the paper compares LoRA with. One file each: a spec, and what it runs with the model's modules."""

from .base import BASELINES, Arrangement, Baseline, Inserted
from .bitfit import BitFit
from .bottleneck import AdapterD, AdapterH, AdapterL, AdapterP
from .full import Full
from .prefix import PrefixEmbedding, PrefixLayer, special_tokens_of
from .special import SpecialTokens
from .top_k import TopK

__all__ = [
    "BASELINES",
    "AdapterD",
    "AdapterH",
    "AdapterL",
    "AdapterP",
    "Arrangement",
    "Baseline",
    "BitFit",
    "Full",
    "Inserted",
    "PrefixEmbedding",
    "PrefixLayer",
    "SpecialTokens",
    "TopK",
    "special_tokens_of",
]
