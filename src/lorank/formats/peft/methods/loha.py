"""LOHA: four factors a layer, `hada_w1_a` (out, rank), `hada_w1_b` (rank, in), `hada_w2_a` and `hada_w2_b`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ....variants import LoHa, Spec
from ...content import Content, LayerUpdate
from ..layout import Layout
from .base import Method, lycoris_layout, register


@register
class LoHaMethod(Method):
    peft_type = "LOHA"
    specs = (LoHa,)
    suffixes: ClassVar = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    # Dropout of whole rows and of the whole update: in training alone.
    harmless = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d"})

    def layout(self, update: LayerUpdate) -> Layout:
        return lycoris_layout(update)

    def settings(self, content: Content) -> dict[str, Any]:
        return {"rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False}

    def spec(self, config: Mapping[str, Any]) -> Spec:
        return LoHa(
            rank=8 if config.get("r") is None else config["r"],
            alpha=8 if config.get("alpha") is None else config["alpha"],
        )
