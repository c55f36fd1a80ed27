"""What methods have in common whose factors start from data: they watch a few batches before they can be used.

`lorank.calibrate` runs the batches; until then an adapter of such a method refuses to run, rather than train from a
start that is not the method's.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..hosts import Host
from .lora import LoRAAdapter


class CalibratedAdapter(LoRAAdapter):
    """A low-rank update that has to see data first."""

    needs_gradient: bool = False  # of the loss, beside the inputs of its layer
    calibrated: bool = False
    watching: bool = False  # batches are being run for it

    @abstractmethod
    def begin(self, layer: nn.Module) -> None:
        """Begin to watch."""

    @abstractmethod
    def watch(self, layer: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Take note of the layer's input x; return the output y, which must not change in value.

        mask: which of the inputs count, (rows, tokens); None for all.
        """

    def watch_mirrored(self, host: Host, layer: nn.Module, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Take note of the input of another layer, which has the matrix transposed; return its output, unchanged."""
        return y  # an input of the transpose is none of the matrix

    def watch_weight(self, layer: nn.Module) -> Tensor:
        """Return what stands for the update in a layer that reads W + ΔW, while it is watching."""
        raise AdapterError(f"{type(self.spec).__name__} sees no inputs of a layer that only reads its weight")

    @abstractmethod
    def problem(self) -> str | None:
        """Return why what was seen is not enough; None when it is."""

    @abstractmethod
    def start(self, layer: nn.Module) -> None:
        """Set the factors from what was seen."""

    def end(self) -> None:
        """Forget what was seen."""
        self.watching = False
        vars(self).pop("mask", None)

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.watching:
            return self.watch(layer, x, y, vars(self).get("mask"))
        if not x.is_meta:  # where nothing is computed
            self.require_calibrated()
        return super().forward(layer, x, y)

    def run_mirrored(self, host: Host, layer: nn.Module, part: str, x: Tensor, y: Tensor) -> Tensor:
        if self.watching:
            return self.watch_mirrored(host, layer, part, x, y)
        if not x.is_meta:
            self.require_calibrated()
        return super().run_mirrored(host, layer, part, x, y)

    def change(self, layer: nn.Module) -> Tensor:
        if self.watching:
            return self.watch_weight(layer)
        if (
            getattr(layer.adapters, "kept", None) is not None
        ):  # a call is running; PyTorch also looks at weights to move
            self.require_calibrated()
        return super().change(layer)

    def delta_weight(self, layer: nn.Module) -> Tensor:
        self.require_calibrated()
        return super().delta_weight(layer)

    def at_start(self, layer: nn.Module) -> bool:
        return not self.calibrated or super().at_start(layer)

    def why_not_saved(self) -> str | None:
        return None if self.calibrated else "it has not seen its data yet; call lorank.calibrate first"

    def require_calibrated(self) -> None:
        """Raise AdapterError for an adapter that has not seen its data."""
        if not self.calibrated:
            raise AdapterError(
                f"{type(self.spec).__name__} starts from data: call lorank.calibrate(model, loss, batches) with a few "
                "batches before the adapter is used"
            )

    @torch.no_grad()
    def reset_parameters(self, layer: nn.Module) -> None:
        self.calibrated = False
        LoRAAdapter.reset_parameters(self, layer)

    def fill(self, tensors: Any, device: torch.device) -> None:
        super().fill(tensors, device)
        self.calibrated = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calibrated |= f"{prefix}A" in state_dict
