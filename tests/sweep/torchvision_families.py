"""The families of torchvision, which is optional: its wheel is looked for in `.cache/torchvision` too.

    pip install --no-deps --target .cache/torchvision torchvision==0.28.0

The wheel's own operators are compiled for CUDA and do not load with a CPU build of torch. Their schemas are declared
here, so that the package can be imported, and `nms`, which detection needs, is computed with torch alone.
This holds for the whole process, and transformers would use the package too: the sweep gives it one of its own.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .procedure import Case

PLACE = Path(__file__).parents[2] / ".cache" / "torchvision"
_ALIVE: list[torch.library.Library] = []  # declarations end with their library
HOW = "For it: pip install --no-deps --target .cache/torchvision torchvision==0.28.0"

# What torchvision gives a fake implementation on import, whether its own is there or not.
_SCHEMAS = [
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
]


def available() -> bool:
    """Tell whether torchvision can be imported, from the environment or from the cache."""
    return PLACE.is_dir() or importlib.util.find_spec("torchvision") is not None


def families() -> list[str]:
    """Return a name for every model family of torchvision; none where it is absent."""
    if not available():
        return []
    return [f"torchvision.{name}" for name in _MODELS]


def models() -> ModuleType:
    """Import torchvision.models, after what it misses has been declared."""
    if PLACE.is_dir() and str(PLACE) not in sys.path:
        sys.path.append(str(PLACE))
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _ALIVE.append(library)
        importlib.import_module("torchvision.ops").boxes.nms = _nms
    return importlib.import_module("torchvision.models")


def case_of(name: str) -> Case:
    """Return what the procedure runs for a family of torchvision."""
    maker, kind, options, shape = _MODELS[name]
    make = models().get_model_builder(maker)

    def build() -> nn.Module:
        return Named(make(weights=None, **options))

    train_mode = kind != "detection"  # which wants boxes there, and computes its losses only
    return Case(f"torchvision.{name}", maker, kind, build, lambda model: _inputs(kind, shape), train_mode)


class Named(nn.Module):
    """A model of torchvision, called with names."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> Any:
        return self.model(*images) if isinstance(images, tuple) else self.model(images)


def _inputs(kind: str, shape: tuple[int, ...]) -> Mapping[str, Any]:
    torch.manual_seed(1)
    if kind == "detection":
        return {"images": [torch.rand(shape), torch.rand(shape)]}
    return {"images": (torch.randn(2, *shape), torch.randn(2, *shape)) if kind == "flow" else torch.randn(2, *shape)}


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the indices of the boxes that no better box overlaps by more than `threshold`, best first."""
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(boxes[left, :2], boxes[best, :2])
        high = torch.minimum(boxes[left, 2:], boxes[best, 2:])
        common = (high - low).clamp(min=0).prod(dim=1)
        left = left[common <= threshold * (area[left] + area[best] - common)]
    return torch.stack(kept) if kept else scores.new_zeros(0, dtype=torch.long)


_IMAGE = (3, 64, 64)
_FEW = {"num_classes": 5}
_DETECTOR: dict[str, Any] = {"weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 64}
_BOXES = _DETECTOR | {
    "box_score_thresh": 0.0,
    "box_detections_per_img": 4,
    "rpn_post_nms_top_n_test": 8,
    "rpn_pre_nms_top_n_test": 16,
}
_DENSE = _DETECTOR | {"score_thresh": 0.0, "detections_per_img": 4, "topk_candidates": 16}
_SSD: dict[str, Any] = {"weights_backbone": None, "num_classes": 3, "detections_per_img": 4, "topk_candidates": 16}

# family: the maker, the kind, its options, the shape of one input
_MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "alexnet": ("alexnet", "vision", _FEW, _IMAGE),
    "convnext": ("convnext_tiny", "vision", _FEW, _IMAGE),
    "densenet": ("densenet121", "vision", _FEW, _IMAGE),
    "efficientnet": ("efficientnet_b0", "vision", _FEW, _IMAGE),
    "efficientnet_v2": ("efficientnet_v2_s", "vision", _FEW, _IMAGE),
    "googlenet": ("googlenet", "vision", _FEW | {"aux_logits": False, "init_weights": False}, _IMAGE),
    "inception_v3": ("inception_v3", "vision", _FEW | {"aux_logits": False, "init_weights": False}, (3, 96, 96)),
    "maxvit": ("maxvit_t", "vision", _FEW, (3, 224, 224)),
    "mnasnet": ("mnasnet0_5", "vision", _FEW, _IMAGE),
    "mobilenet_v2": ("mobilenet_v2", "vision", _FEW, _IMAGE),
    "mobilenet_v3": ("mobilenet_v3_small", "vision", _FEW, _IMAGE),
    "regnet_x": ("regnet_x_400mf", "vision", _FEW, _IMAGE),
    "regnet_y": ("regnet_y_400mf", "vision", _FEW, _IMAGE),
    "resnet": ("resnet18", "vision", _FEW, _IMAGE),
    "resnext": ("resnext50_32x4d", "vision", _FEW, _IMAGE),
    "shufflenet_v2": ("shufflenet_v2_x0_5", "vision", _FEW, _IMAGE),
    "squeezenet": ("squeezenet1_1", "vision", _FEW, _IMAGE),
    "swin": ("swin_t", "vision", _FEW, _IMAGE),
    "swin_v2": ("swin_v2_t", "vision", _FEW, _IMAGE),
    "vgg": ("vgg11_bn", "vision", _FEW, _IMAGE),
    "vit": ("vit_b_16", "vision", _FEW | {"image_size": 64}, _IMAGE),
    "wide_resnet": ("wide_resnet50_2", "vision", _FEW, _IMAGE),
    "deeplabv3": ("deeplabv3_mobilenet_v3_large", "segmentation", _FEW | {"weights_backbone": None}, _IMAGE),
    "fcn": ("fcn_resnet50", "segmentation", _FEW | {"weights_backbone": None}, _IMAGE),
    "lraspp": ("lraspp_mobilenet_v3_large", "segmentation", _FEW | {"weights_backbone": None}, _IMAGE),
    "mc3": ("mc3_18", "video", _FEW, (3, 4, 32, 32)),
    "mvit": ("mvit_v2_s", "video", _FEW, (3, 16, 224, 224)),
    "r2plus1d": ("r2plus1d_18", "video", _FEW, (3, 4, 32, 32)),
    "r3d": ("r3d_18", "video", _FEW, (3, 4, 32, 32)),
    "s3d": ("s3d", "video", _FEW, (3, 16, 224, 224)),
    "swin3d": ("swin3d_t", "video", _FEW, (3, 4, 32, 32)),
    "raft": ("raft_small", "flow", {}, (3, 128, 128)),
    "faster_rcnn": ("fasterrcnn_mobilenet_v3_large_320_fpn", "detection", _BOXES, _IMAGE),
    "fcos": ("fcos_resnet50_fpn", "detection", _DENSE, _IMAGE),
    "keypoint_rcnn": ("keypointrcnn_resnet50_fpn", "detection", _BOXES, _IMAGE),
    "mask_rcnn": ("maskrcnn_resnet50_fpn", "detection", _BOXES, _IMAGE),
    "retinanet": ("retinanet_resnet50_fpn", "detection", _DENSE, _IMAGE),
    "ssd": ("ssd300_vgg16", "detection", _SSD, (3, 300, 300)),
    "ssdlite": ("ssdlite320_mobilenet_v3_large", "detection", _SSD, (3, 320, 320)),
}
