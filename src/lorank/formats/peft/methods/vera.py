"""VERA: two vectors a layer, `vera_lambda_b` and `vera_lambda_d`, and one random pair for all of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....errors import AdapterError
from ....hosts import FusedHost, LinearHost
from ....variants import Spec, VeRA
from ...content import Content, LayerUpdate
from ..layout import MATRIX, PARTS, Layout
from .base import Method, register

_PAIR = ("base_model.vera_A", "base_model.vera_B")


@register
class VeRAMethod(Method):
    peft_type = "VERA"
    specs = (VeRA,)
    adapted_bias = "vera_only"
    alpha_setting = None
    rank_patterns = False
    suffixes: ClassVar = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    harmless = frozenset({"projection_prng_key", "save_projection", "vera_dropout", "d_initial"})

    def layout(self, update: LayerUpdate) -> Layout:
        host = update.host
        plain = host is None or (isinstance(host, LinearHost) and not isinstance(host, FusedHost))
        return Layout(MATRIX if plain else PARTS)

    def rank_alpha(self, update: LayerUpdate, part: str) -> tuple[int, None]:
        return update.spec_of(part).rank, None

    def settings(self, content: Content) -> dict[str, Any]:
        spec = _spec(content)
        return {
            "vera_dropout": spec.dropout,
            "projection_prng_key": spec.seed,
            "save_projection": True,
            "d_initial": spec.initial,
        }

    def spec(self, config: Mapping[str, Any]) -> Spec:
        return VeRA(
            rank=256 if config.get("r") is None else config["r"],
            dropout=config.get("vera_dropout") or 0.0,
            seed=0 if config.get("projection_prng_key") is None else config["projection_prng_key"],
            initial=config.get("d_initial") or 0.1,
        )

    def shared(self, content: Content) -> dict[str, Tensor]:
        spec = _spec(content)
        if spec.projection is None:
            return {}
        return dict(zip(_PAIR, (matrix.clone() for matrix in spec.pair(*spec.projection)), strict=True))

    def take_shared(self, rest: dict[str, Tensor], spec: Spec) -> Spec:
        """Take the random pair out of a file's tensors; it has to be the one that its seed gives."""
        assert isinstance(spec, VeRA), "the method reads no other"
        A, B = (rest.pop(key.removeprefix("base_model."), rest.pop(key, None)) for key in _PAIR)
        if A is None or B is None:
            raise AdapterError(
                "the file has no vera_A and vera_B (save_projection=False), by which the sizes of its random pair are "
                "known; save it with save_projection=True"
            )
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != spec.rank or B.shape[1] != spec.rank:
            raise AdapterError(f"vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} are no pair of rank {spec.rank}")
        spec = dataclasses.replace(spec, projection=(B.shape[0], A.shape[1]))
        for own, theirs in zip(spec.pair(B.shape[0], A.shape[1]), (A, B), strict=True):
            if not torch.equal(own.to(theirs.dtype), theirs):
                raise AdapterError(
                    f"its random pair is not the one that the seed {spec.seed} gives, which lorank would compute with"
                )
        return spec


def _spec(content: Content) -> VeRA:
    """Return the spec of the layers, which knows the sizes of the pair."""
    found = next(iter(content.updates.values())).spec if content.updates else content.spec
    assert isinstance(found, VeRA), "the method writes no other"
    return found
