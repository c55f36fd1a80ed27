"""ADALORA: three tensors a layer, `lora_A`, `lora_B` and `lora_E`, which is (rank, 1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ....hosts import ConvHost, FusedHost, LinearHost
from ....variants import AdaLoRA, Spec
from ...content import Content, LayerUpdate
from ..layout import MATRIX, PARTS, Layout
from .base import Method, register


@register
class AdaLoRAMethod(Method):
    peft_type = "ADALORA"
    specs = (AdaLoRA,)
    adapted_bias = "lora_only"
    rank_setting = "init_r"
    alpha_setting = "lora_alpha"
    rank_patterns = False  # its rank_pattern is a mask of the triplets of each layer
    suffixes: ClassVar = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    harmless = frozenset(
        {
            *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            *("lora_dropout", "use_rslora", "init_lora_weights", "megatron_core", "qalora_group_size"),
        }
    )
    meaningful: ClassVar = {"use_dora": (False, None), "lora_bias": (False, None)}

    def layout(self, update: LayerUpdate) -> Layout:
        host = update.host
        plain = host is None or (isinstance(host, LinearHost) and not isinstance(host, FusedHost))
        # Of a grouped one PEFT takes as many inputs as of an ordinary one, which is no update of its weight.
        flat = isinstance(host, ConvHost) and len(update.shapes["weight"]) == 4 and update.groups == 1
        return Layout(MATRIX if plain or flat else PARTS)

    def settings(self, content: Content) -> dict[str, Any]:
        spec = content.spec
        assert isinstance(spec, AdaLoRA), "the method writes no other"
        return {
            "lora_dropout": spec.dropout,
            "target_r": spec.target_rank,
            "tinit": 0,
            "tfinal": 0,
            "deltaT": spec.interval,
            "beta1": spec.beta1,
            "beta2": spec.beta2,
            "orth_reg_weight": spec.orthogonality,
            "total_step": 1,  # PEFT refuses a file without one; the training is over
            "rank_pattern": None,
        }

    def spec(self, config: Mapping[str, Any]) -> Spec:
        rank = 12 if config.get("init_r") is None else config["init_r"]
        alpha = 8 if config.get("lora_alpha") is None else config["lora_alpha"]
        return AdaLoRA(
            rank=rank,
            alpha=alpha if alpha > 0 else rank,  # as PEFT takes it
            dropout=config.get("lora_dropout") or 0.0,
            target_rank=min(rank, config.get("target_r") or 8),
            interval=config.get("deltaT") or 1,
            beta1=0.85 if config.get("beta1") is None else config["beta1"],
            beta2=0.85 if config.get("beta2") is None else config["beta2"],
            orthogonality=0.5 if config.get("orth_reg_weight") is None else config["orth_reg_weight"],
        )

    def read(self, tensors: Mapping[str, Tensor], spec: Spec) -> Spec:
        """Return the spec of a layer of which only the triplets that were kept are in the file, at the same scale."""
        assert isinstance(spec, AdaLoRA), "the method reads no other"
        rank = max(tensors["A"].shape[0], 1) if "A" in tensors and tensors["A"].dim() == 2 else spec.rank
        if rank >= spec.rank:
            return spec
        alpha = spec.alpha * rank / spec.rank
        return dataclasses.replace(spec, rank=rank, alpha=alpha, target_rank=min(rank, spec.target_rank))

    def written(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {**tensors, "E": tensors["E"][..., None]}

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with E as a vector; a layer of which no triplet was kept gets one of zeros."""
        A, B, E = (tensors.get(name) for name in ("A", "B", "E"))
        if E is None:
            return dict(tensors)
        E = E.flatten(-2) if E.dim() > 1 else E
        if A is not None and B is not None and A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == E.numel() == 0:
            return {"A": A.new_zeros(1, A.shape[1]), "B": B.new_zeros(B.shape[0], 1), "E": E.new_zeros(1)}
        return {**tensors, "E": E}
