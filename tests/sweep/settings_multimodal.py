"""Families of several modalities that differ from the rules."""

from typing import Any

import torch

from .settings import Settings


def _sizes(model: Any) -> dict[str, Any]:
    return {"image_sizes": torch.tensor([[32, 32]] * 2)}


def _tiles(model: Any) -> dict[str, Any]:
    """Two tiles an image: the whole, and the only part of it."""
    return {"pixel_values": torch.randn(2, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 2)}


_PINPOINTS = {"image_grid_pinpoints": [[32, 32]]}

_WIDE = {"hidden_size": 64, "num_attention_heads": 1}
_GEMMA4 = {"global_head_dim": 8, "hidden_size_per_layer_input": 8}
_SHORT: dict[str, Any] = {"attention_mask": None, "labels": None}


def _with_images(token: int, count: int) -> torch.Tensor:
    """A text in which `count` places of each row stand for an image."""
    return torch.cat([torch.randint(5, 95, (2, 3)), torch.full((2, count), token), torch.randint(5, 95, (2, 3))], dim=1)


_TIMM = Settings(not_run="needs the package timm, and that torchvision")


MULTIMODAL: dict[str, Settings] = {
    "mistral3": Settings(inputs=_sizes),
    "mistral_large4": Settings(inputs=_sizes),
    "lighton_ocr": Settings(inputs=_sizes),
    "llava_next": Settings(config=_PINPOINTS, inputs=_tiles),
    "llava_next_video": Settings(config=_PINPOINTS, inputs=_tiles),
    "llava_onevision": Settings(config=_PINPOINTS, inputs=_tiles),
    "vipllava": Settings(config={"vision_feature_layers": [-1, -2], "vision_config": {"num_hidden_layers": 3}}),
    "aria": Settings(config={"projector_patch_to_query_dict": {16: 8}}),
    "gemma3": Settings(config={"mm_tokens_per_image": 4}),
    "t5gemma2": Settings(config={"encoder": {"mm_tokens_per_image": 4}}, inputs={"labels": None}),
    "layoutlmv3": Settings(
        config={"input_size": 32, "coordinate_size": 5, "shape_size": 6, "max_2d_position_embeddings": 128}
    ),
    "lilt": Settings(config={"hidden_size": 48, "num_attention_heads": 4, "channel_shrink_ratio": 2}),
    "lxmert": Settings(
        inputs=lambda model: {
            "visual_feats": torch.randn(2, 4, model.config.visual_feat_dim),
            "visual_pos": torch.rand(2, 4, 4),
        }
    ),
    "mllama": Settings(
        config={"vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96}},
        inputs=lambda model: {
            "pixel_values": torch.randn(2, 1, 4, 3, 32, 32),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        },
    ),
    "instructblip": Settings(
        config={"image_token_index": 100}, inputs={"labels": None, "qformer_input_ids": torch.randint(5, 95, (2, 6))}
    ),
    "instructblipvideo": Settings(
        config={"video_token_index": 100},
        inputs={
            "labels": None,
            "qformer_input_ids": torch.randint(5, 95, (2, 6)),
            "pixel_values": torch.randn(2, 4, 3, 32, 32),
        },
    ),
    "x_clip": Settings(inputs={"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
    "videoprism": Settings(inputs={"pixel_values_videos": torch.randn(2, 4, 3, 32, 32)}),
    "idefics": Settings(
        inputs={"pixel_values": torch.randn(2, 1, 3, 32, 32), "image_attention_mask": torch.ones(2, 10, 1)}
    ),
    "flava": Settings(model="FlavaModel"),
    "florence2": Settings(inputs={"labels": None}),
    "blip_2": Settings(config={"image_token_index": 100}, inputs={"labels": None}),
    "bridgetower": Settings(
        config={"hidden_size": 64, "num_attention_heads": 1, "text_config": _WIDE, "vision_config": {"hidden_size": 64}}
    ),
    "kosmos2": Settings(
        config={"latent_query_num": 4},
        inputs={"image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0, 0]] * 2)},
    ),
    "tvp": Settings(config={"max_img_size": 64}),
    "rag": Settings(not_run="needs a retriever with an index of documents"),
    "llama4": Settings(config={"vision_config": {"intermediate_size": 128}}),
    "groupvit": Settings(
        config={"vision_config": {"num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4], "depths": [1, 1, 1]}}
    ),
    "gemma3n": Settings(
        model="Gemma3nForCausalLM",
        config={
            "intermediate_size": 48,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.5, 0.0],
        },
    ),
    "gemma4": Settings(model="Gemma4ForCausalLM", config=_GEMMA4),
    "gemma4_unified": Settings(model="Gemma4UnifiedForCausalLM", config=_GEMMA4),
    "chameleon": Settings(
        config={"vocabulary_map": {"<image>": 100} | {f"IMGIMG{chr(65 + i)}Z": 101 + i for i in range(10)}},
        inputs={"pixel_values": None},
    ),
    "emu3": Settings(
        config={"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101, "<|visual token 000000|>": 102}},
        inputs={"pixel_values": None},
    ),
    "pix2struct": Settings(
        config={"vision_config": {"patch_embed_hidden_size": 768}},
        inputs={
            "flattened_patches": torch.cat([torch.ones(2, 16, 2), torch.randn(2, 16, 768)], dim=-1),
            "labels": None,
        },
    ),
    "pi0": Settings(inputs={"state": torch.randn(2, 32), "actions": torch.randn(2, 8, 32), "timestep": torch.rand(2)}),
    "deepseek_vl_hybrid": Settings(inputs={"high_res_pixel_values": torch.randn(2, 3, 32, 32)}),
    "shieldgemma2": Settings(config={"mm_tokens_per_image": 4}, inputs={"labels": None}),
    "video_llama_3": Settings(inputs={"image_merge_sizes": torch.tensor([1, 1])}),
    "colpali": Settings(
        inputs=lambda model: {"input_ids": _with_images(model.config.vlm_config.image_token_index, 16)} | _SHORT
    ),
    "colqwen2": Settings(
        inputs=lambda model: (
            {
                "input_ids": _with_images(model.config.vlm_config.image_token_id, 4),
                "pixel_values": torch.randn(2, 16, 384),
            }
            | _SHORT
        )
    ),
    "colmodernvbert": Settings(
        inputs=lambda model: (
            {
                "input_ids": _with_images(model.config.vlm_config.image_token_id, 1),
                "pixel_values": torch.randn(2, 1, 3, 32, 32),
            }
            | _SHORT
        )
    ),
    "ernie4_5_vl_moe": Settings(
        config={
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        }
    ),
    "nemotron_h_omni": Settings(config={"vision_config": {"video_temporal_patch_size": 2}}),
    "muse_glimmer": Settings(inputs={"pixel_values": torch.randn(32, 384)}),
    "kimi_k25": Settings(inputs={"pixel_values": torch.randn(32, 3, 8, 8)}),
    "paddleocr_vl": Settings(inputs={"pixel_values": torch.randn(1, 32, 3, 8, 8)}),
    "inkling": Settings(inputs={"pixel_values": torch.randn(2, 1, 3, 32, 32)}),
    "fast_vlm": _TIMM,
    "perception_lm": _TIMM,
    "pe_video": _TIMM,
    "pe_audio_video": _TIMM,
    "layoutlmv2": Settings(not_run="needs the package detectron2"),
    "granite4_vision": Settings(config=_PINPOINTS | {"deepstack_layer_map": [[-1, 0]]}, inputs=_tiles),
    "granite_docling": Settings(inputs={"pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}),
}
