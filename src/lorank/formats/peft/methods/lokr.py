"""LOKR: `lokr_w1` and `lokr_w2`, or their factors `_a` (rows, rank) and `_b` (rank, columns)."""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from ....errors import AdapterError
from ....variants import LoKr, Spec
from ...content import Content, LayerUpdate
from ..layout import PARTS, Layout
from .base import Method, lycoris_layout, register


@register
class LoKrMethod(Method):
    peft_type = "LOKR"
    specs = (LoKr,)
    suffixes: ClassVar = {
        **{"C": "lokr_w1", "CB": "lokr_w1_a", "CA": "lokr_w1_b"},
        **{"D": "lokr_w2", "DB": "lokr_w2_a", "DA": "lokr_w2_b"},
    }
    harmless = frozenset(
        {
            *("rank_dropout", "module_dropout", "use_effective_conv2d", "decompose_both", "decompose_factor"),
            "rank_dropout_scale",
        }
    )

    def layout(self, update: LayerUpdate) -> Layout:
        specs = {(s.factor, s.decompose_both) for s in map(update.spec_of, update.tensors) if isinstance(s, LoKr)}
        # PEFT 0.21 multiplies a whole D (out₂, in₂, kernel) of a Conv1d with C along the wrong dimensions.
        misread = len(update.shapes.get("weight", ())) == 3 and "D" in update.tensors["weight"]
        return lycoris_layout(update) if len(specs) == 1 and not misread else Layout(PARTS)

    def settings(self, content: Content) -> dict[str, Any]:
        spec = content.spec
        assert isinstance(spec, LoKr), "the method writes no other"
        return {
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "use_effective_conv2d": False,
            "decompose_both": spec.decompose_both,
            "decompose_factor": spec.factor,
        }

    def spec(self, config: Mapping[str, Any]) -> Spec:
        return LoKr(
            rank=8 if config.get("r") is None else config["r"],
            alpha=8 if config.get("alpha") is None else config["alpha"],
            factor=-1 if config.get("decompose_factor") is None else config["decompose_factor"],
            decompose_both=bool(config.get("decompose_both")),
        )

    def written(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the tensors with the kernel of a Conv2d in D, which PEFT has there."""
        D = tensors.get("D")
        if D is None or D.dim() != 2 or len(shape) != 4 or D.shape[1] % prod(shape[2:]):
            return dict(tensors)
        return {**tensors, "D": D.unflatten(1, (-1, *shape[2:]))}

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with D as a matrix, or a stack of them as C is.

        Raises AdapterError for that of a Conv1d, with which PEFT computes something else than a Kronecker product.
        """
        D, C = tensors.get("D"), tensors.get("C", tensors.get("CB"))
        if D is not None and C is not None and D.dim() == 3 and C.dim() == 2:
            raise AdapterError(
                f"a lokr_w2 is {tuple(D.shape)}, of a Conv1d: PEFT multiplies it with lokr_w1 along other dimensions "
                "than those of a Kronecker product, which lorank cannot compute; merge the adapter in PEFT"
            )
        return {**tensors, "D": D.flatten(1)} if D is not None and D.dim() == 4 else dict(tensors)
