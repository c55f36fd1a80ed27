"""LORA: a pair of factors a layer, for LoRA and for all that is LoRA once it is trained; with `use_dora`, DoRA."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ....variants import EVA, DoRA, LoRA, LoRAFA, LoRAGA, LowRank, MiLoRA, OLoRA, PiSSA, Spec
from ...content import Content, LayerUpdate
from ..layout import BLOCKS, KERNEL, PARAMETERS, PARTS, Layout, layout_of
from .base import Method, register

# Initialisations for which PEFT takes the adapter's start out of the base weight when it loads the file.
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(?:\.[^.]+){0,2})"
)

# Versions before 0.11 called it a parameter, later ones a module with a weight.
_MAGNITUDE = re.compile(r"(?:(?P<path>.*)\.)?lora_magnitude_vector(?:\.[^.]+){0,2}")


@register
class LoRAMethod(Method):
    peft_type = "LORA"
    specs = (LoRA, DoRA, PiSSA, OLoRA, MiLoRA, LoRAGA, LoRAFA, EVA)
    adapted_bias = "lora_only"
    alpha_setting = "lora_alpha"
    pairs = True
    suffixes: ClassVar = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    meaningful: ClassVar = {
        "lora_bias": (False, None),
        "use_qalora": (False, None),
        "layer_replication": (None, []),
        "alora_invocation_tokens": (None, []),
        "use_bdlora": (None, False),
        "arrow_config": (None,),
        "kasa_config": (None,),
        "monteclora_config": (None,),
    }
    harmless = frozenset(
        {
            *(
                "lora_dropout",
                "use_rslora",
                "use_dora",
                "init_lora_weights",
                "megatron_config",
                "megatron_core",
                "loftq_config",
            ),
            *("eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
            *("ensure_weight_tying", "target_parameters", "trainable_token_indices", "runtime_config"),
            *("enable_lora", "merge_weights"),  # of PEFT 0.1 and 0.2
        }
    )

    def layout(self, update: LayerUpdate) -> Layout:
        found = layout_of(update)
        dora = any(isinstance(update.spec_of(part), DoRA) for part in update.tensors)
        # PEFT has no DoRA of parameters, and takes the norms of a fused projection for all its parts at once.
        return Layout(PARTS) if dora and found.kind in (BLOCKS, PARAMETERS) else found

    def rank_alpha(self, update: LayerUpdate, part: str) -> tuple[int, float]:
        """Return rank and alpha of the pair in the file, of which the rank may be several times the spec's."""
        spec, layout = update.spec_of(part), self.layout(update)
        assert isinstance(spec, LowRank)
        times = spec.factor_rank // spec.rank
        times *= layout.blocks if layout.kind == BLOCKS or layout.blocks > 1 else 1
        return times * spec.rank, spec.alpha * (times**0.5 if spec.rank_stabilised else times)

    def settings(self, content: Content) -> dict[str, Any]:
        spec = content.spec
        assert isinstance(spec, LowRank)
        return {
            "lora_dropout": spec.dropout,
            "use_rslora": spec.rank_stabilised,
            "use_dora": any(isinstance(u.spec_of(part), DoRA) for u in content.updates.values() for part in u.tensors),
            "init_lora_weights": "gaussian" if getattr(spec, "init", None) == "gaussian" else True,
        }

    def spec(self, config: Mapping[str, Any]) -> Spec:
        fields = {
            "rank": 8 if config.get("r") is None else config["r"],  # PEFT's default for both
            "alpha": 8 if config.get("lora_alpha") is None else config["lora_alpha"],
            "dropout": config.get("lora_dropout") or 0.0,
            "rank_stabilised": bool(config.get("use_rslora")),
        }
        if config.get("use_dora"):
            return DoRA(**fields)
        return LoRA(**fields, init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming")

    def beside_pair(self, update: LayerUpdate, part: str) -> dict[str, Tensor]:
        magnitude = update.tensors.get(part, {}).get("magnitude")
        if magnitude is None:
            return {}
        if self.layout(update).kind == KERNEL:
            magnitude = magnitude.view(1, -1, *[1] * (len(update.shapes[part]) - 2))
        return {"magnitude": magnitude}

    def problems(self, config: Mapping[str, Any]) -> list[str]:
        found = []
        if config.get("ensure_weight_tying") and config.get("modules_to_save"):
            found.append("adapter_config.json: ensure_weight_tying with modules_to_save is not supported")
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_MOVES_BASE):
            found.append(
                f"adapter_config.json: init_lora_weights is {init!r}: the adapter belongs to a base from which PEFT "
                "takes the adapter's start away when it loads; convert it in PEFT (save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
        return found

    def match(self, path: str) -> tuple[str, str] | None:
        magnitude = _MAGNITUDE.fullmatch(path)
        if magnitude is not None:
            return magnitude["path"] or "", "magnitude"
        factor = _FACTOR.fullmatch(path)
        if factor is None or not _is_tail(factor["kind"], factor["rest"]):
            return None
        return factor["path"] or "", "A" if factor["kind"].endswith("A") else "B"


def _is_tail(kind: str, rest: str) -> bool:
    """`.weight` or `.<adapter>.weight` after lora_A; nothing or `.<adapter>` after lora_embedding_A."""
    if kind.startswith("lora_embedding"):
        return rest.count(".") <= 1
    return rest.endswith(".weight")
