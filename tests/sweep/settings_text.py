"""Families of text, and of series, that differ from the rules."""

import torch

from .settings import Settings

_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}

TEXT: dict[str, Settings] = {
    "bamba": Settings(config=_MAMBA2 | {"attn_layer_indices": [1]}),
    "granitemoehybrid": Settings(config=_MAMBA2 | {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}),
    "falcon_h1": Settings(config=_MAMBA2 | {"mamba_d_ssm": 64}),
    "mamba2": Settings(config={"num_heads": 4, "head_dim": 16, "n_groups": 1}),
    "jamba": Settings(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "zamba": Settings(config={"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}),
    "zamba2": Settings(config={"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"]}),
    "recurrent_gemma": Settings(config={"num_hidden_layers": 3}),
    "gpt_neo": Settings(config={"attention_types": [[["global", "local"], 1]]}),
    "esm": Settings(config={"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 4}),
    "bros": Settings(config={"hidden_size": 64, "num_attention_heads": 2}),
    "dots1": Settings(config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "ministral": Settings(config={"head_dim": 8}),
    "hunyuan_v1_dense": Settings(config={"head_dim": 8}),
    "hunyuan_v1_moe": Settings(config={"head_dim": 8}),
    "hunyuan_vl": Settings(config={"text_config": {"head_dim": 8}}),
    "lfm2_moe": Settings(config={"layer_types": ["conv", "full_attention"]}),
    "blt": Settings(inputs={"use_cache": False}),
    "esmc": Settings(inputs={"input_ids": torch.randint(4, 24, (2, 10)), "labels": None}),
    "splinter": Settings(model="SplinterForQuestionAnswering", inputs={"input_ids": torch.randint(5, 95, (2, 10))}),
    "step3p7": Settings(config={"text_config": {"sliding_window": 8}}),
    "glm4v_moe": Settings(config={"text_config": {"head_dim": 16}}),
    "deepseek_v2": Settings(config={"num_experts_per_tok": 2, "n_routed_experts": 4}),
    "reformer": Settings(
        config={
            "axial_pos_embds_dim": (8, 24),
            "axial_pos_shape": (4, 4),
            "attn_layers": ["local", "lsh"],
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
        },
        inputs={"input_ids": torch.randint(5, 95, (2, 16)), "attention_mask": None, "labels": None},
    ),
    "perceiver": Settings(
        inputs={"input_ids": None, "attention_mask": None, "inputs": torch.randint(5, 95, (2, 16)), "labels": None}
    ),
    "squeezebert": Settings(config={"q_groups": 2, "k_groups": 2, "v_groups": 2}),
    "xmod": Settings(config={"default_language": "en_XX"}),
    "decision_transformer": Settings(
        model="DecisionTransformerModel",
        config={"state_dim": 5, "act_dim": 3},
        inputs={
            "states": torch.randn(2, 6, 5),
            "actions": torch.randn(2, 6, 3),
            "rewards": torch.randn(2, 6, 1),
            "returns_to_go": torch.randn(2, 6, 1),
            "timesteps": torch.arange(6).expand(2, 6),
            "attention_mask": torch.ones(2, 6, dtype=torch.long),
        },
    ),
    "mobilebert": Settings(config={"intra_bottleneck_size": 16}),
    "dbrx": Settings(
        config={
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32},
        }
    ),
    "xlstm": Settings(
        config={
            "chunk_size": 8,
            "hidden_size": 64,
            "embedding_dim": 64,
            "num_heads": 4,
            "qk_dim_factor": 1.0,
            "mode": "train",
            "return_last_states": False,
        },
        inputs={"input_ids": torch.randint(5, 95, (2, 16)), "labels": None, "attention_mask": None},
    ),
    "neomme": Settings(config={"head_dim": 16}),
}
