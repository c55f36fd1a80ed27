"""Families of images and of video that differ from the rules."""

from typing import Any

import torch
from transformers import ResNetConfig, SwinConfig

from .settings import Settings


def _made(kind: Any, sizes: dict[str, Any], *features: str) -> Any:
    """Return the configuration of a backbone that gives these features."""
    return kind(**sizes, out_features=list(features))


_SWIN: dict[str, Any] = {"image_size": 64, "window_size": 2}
_FOUR_LAYERS = {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}}
_RESNET_SIZES = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
_RESNET = _made(ResNetConfig, _RESNET_SIZES, "stage2", "stage3", "stage4")
_LAST_OF_RESNET = _made(ResNetConfig, _RESNET_SIZES, "stage4")
_DETR = Settings(
    config={"backbone_config": _LAST_OF_RESNET, "use_timm_backbone": False, "num_feature_levels": 1},
    inputs={"pixel_values": torch.randn(2, 3, 64, 64)},
)
_REAL_TIME = Settings(
    config={
        "backbone_config": _RESNET,
        "encoder_in_channels": [32, 32, 64],
        "decoder_in_channels": [32, 32, 32],
        "num_denoising": 0,
    },
    inputs={"pixel_values": torch.randn(2, 3, 64, 64)},
)
_SWIN_SIZES = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 2,
    "drop_path_rate": 0.0,
}
_SWIN_BACKBONE = _made(SwinConfig, _SWIN_SIZES, "stage1", "stage2", "stage3", "stage4")
_GROUNDED = Settings(
    config={"backbone_config": _SWIN_BACKBONE, "num_queries": 4, "num_feature_levels": 4, "max_text_len": 10},
    inputs={"pixel_values": torch.randn(2, 3, 64, 64)},
)
_EFFICIENT = {
    "width_coefficient": 1.0,
    "hidden_dim": 1280,
    "in_channels": (32, 16, 24, 40, 80, 112, 192),
    "out_channels": (16, 24, 40, 80, 112, 192, 320),
}


def _pair(model: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 2, 3, 64, 64)}


_SEGMENT = Settings(
    config={
        "vision_config": {"output_channels": 32, "num_pos_feats": 16},
        "prompt_encoder_config": {"image_embedding_size": 4},
    }
)
_HIERA = {
    "backbone_config": {
        "hidden_size": 16,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 1, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [],
    },
    "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}

_SESSION = Settings(not_run="its forward takes a session that holds a video, not tensors")
_TIMM = Settings(not_run="needs the package timm, and that torchvision")


VISION: dict[str, Settings] = {
    "swin": Settings(config=_SWIN),
    "swinv2": Settings(config=_SWIN),
    "donut": Settings(config=_SWIN),
    "swin2sr": Settings(config=_SWIN | {"embed_dim": 24, "num_heads": [2, 2, 2, 2]}),
    "bit": Settings(config={"embedding_size": 64, "hidden_sizes": [64, 64, 64, 64], "num_groups": 8}),
    "efficientnet": Settings(config=_EFFICIENT),
    "dpt": Settings(config={"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}),
    "depth_anything": Settings(config=_FOUR_LAYERS),
    "prompt_depth_anything": Settings(config=_FOUR_LAYERS),
    "zoedepth": Settings(
        config=_FOUR_LAYERS
        | {"bottleneck_features": 32, "fusion_hidden_size": 32, "neck_hidden_sizes": [16, 16, 16, 16]}
    ),
    "tipsv2_dpt": Settings(config=_FOUR_LAYERS),
    "chmv2": Settings(config=_FOUR_LAYERS),
    "detr": _DETR,
    "conditional_detr": _DETR,
    "dab_detr": _DETR,
    "table_transformer": _DETR,
    "deformable_detr": _DETR,
    "rt_detr": _REAL_TIME,
    "rt_detr_v2": _REAL_TIME,
    "d_fine": _REAL_TIME,
    "deimv2": _REAL_TIME,
    "pp_doclayout_v2": _REAL_TIME,
    "pp_doclayout_v3": _REAL_TIME,
    "pp_doclayout_v4": _REAL_TIME,
    "grounding_dino": _GROUNDED,
    "mm_grounding_dino": _GROUNDED,
    "mask2former": Settings(
        config={"backbone_config": _SWIN_BACKBONE, "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64},
        inputs={"pixel_values": torch.randn(2, 3, 64, 64)},
    ),
    "upernet": Settings(config={"backbone_config": _SWIN_BACKBONE}, inputs={"pixel_values": torch.randn(2, 3, 64, 64)}),
    "mobilevit": Settings(config={"hidden_sizes": (32, 32, 32)}, inputs={"pixel_values": torch.randn(2, 3, 256, 256)}),
    "mobilevitv2": Settings(inputs={"pixel_values": torch.randn(2, 3, 256, 256)}),
    "hgnet_v2": Settings(config={"hidden_sizes": (256, 512, 1024, 2048)}),
    "lightglue": Settings(config={"filter_threshold": 0.0}, inputs=_pair),
    "efficientloftr": Settings(inputs=_pair),
    "vitmatte": Settings(config={"convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [32, 16, 16, 8]}),
    "omdet_turbo": Settings(config={"backbone_config": _SWIN_BACKBONE}),
    "textnet": Settings(config={"hidden_sizes": (64, 64, 128, 256, 512)}),
    "sam": _SEGMENT,
    "sam_hq": _SEGMENT,
    "align": Settings(config={"vision_config": _EFFICIENT}),
    "levit": Settings(
        config={"image_size": 64, "patch_size": 16, "hidden_sizes": (32, 64, 96), "num_attention_heads": (2, 4, 6)}
    ),
    "seggpt": Settings(
        config={"image_size": [64, 32]},
        inputs={
            "pixel_values": torch.randn(2, 3, 32, 32),
            "prompt_pixel_values": torch.randn(2, 3, 32, 32),
            "prompt_masks": torch.randn(2, 3, 32, 32),
        },
    ),
    "superglue": Settings(config={"hidden_size": 256, "matching_threshold": 0.0}, inputs=_pair),
    "oneformer": Settings(
        config={
            "backbone_config": _SWIN_BACKBONE,
            "conv_dim": 64,
            "mask_dim": 64,
            "hidden_dim": 64,
            "is_training": False,
        },
        inputs={"pixel_values": torch.randn(2, 3, 64, 64), "task_inputs": torch.randint(5, 95, (2, 77))},
    ),
    "lw_detr": Settings(config={"backbone_config": {"image_size": 64, "num_windows": 4}}),
    "sam2": Settings(
        config={"vision_config": _HIERA, "prompt_encoder_config": {"image_size": 64}},
        inputs={"pixel_values": torch.randn(2, 3, 64, 64)},
    ),
    "sapiens2": Settings(model="Sapiens2Model"),
    "slanet": Settings(model="SLANetForTableRecognition"),
    "slanext": Settings(model="SLANeXtForTableRecognition"),
    "vitpose_backbone": Settings(model="VitPoseBackbone"),
    "pp_ocrv6_small_rec": Settings(
        model="PPOCRV6SmallRecForTextRecognition", inputs={"pixel_values": torch.randn(2, 3, 48, 320)}
    ),
    "pp_ocrv5_mobile_rec": Settings(inputs={"pixel_values": torch.randn(2, 3, 48, 320)}),
    "dinat": Settings(not_run="needs the package natten, whose kernels are compiled"),
    "edgetam_video": _SESSION,
    "sam2_video": _SESSION,
    "sam3_tracker_video": _SESSION,
    "sam3_video": _SESSION,
    "timm_backbone": _TIMM,
    "timm_wrapper": _TIMM,
    "edgetam": _TIMM,
}
