"""Families of sound that differ from the rules."""

from typing import Any

import torch

from .settings import Settings

_CODEC = Settings(inputs={"input_values": torch.randn(2, 1, 4000)})
_TWO_VIEWS = Settings(inputs={"input_values": torch.randn(2, 1, 3200), "input_features": torch.randn(2, 10, 32)})
_MASKED = Settings(inputs={"input_features": torch.randn(2, 48, 16), "attention_mask": torch.ones(2, 48)})


def _channels_first(model: Any) -> dict[str, Any]:
    return {"input_features": torch.randn(2, 16, 48)}


def _with_sound(model: Any) -> dict[str, Any]:
    """A text in which 64 places of each row stand for the sound."""
    token = model.config.audio_token_id
    ids = torch.cat([torch.randint(5, 95, (2, 4)), torch.full((2, 64), token), torch.randint(5, 95, (2, 4))], dim=1)
    mask = torch.ones(2, 256, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == token, -100),
        "feature_attention_mask": mask if "flamingo" not in model.config.model_type else None,
        "input_features_mask": mask if "flamingo" in model.config.model_type else None,
    }


SPEECH: dict[str, Settings] = {
    "dac": _CODEC,
    "encodec": _CODEC,
    "xcodec": _CODEC,
    "lasr": _MASKED,
    "parakeet": _MASKED,
    "clvp": Settings(inputs=_channels_first),
    "audio_spectrogram_transformer": Settings(
        config={"max_length": 48, "num_mel_bins": 32}, inputs={"input_values": torch.randn(2, 48, 32)}
    ),
    "speecht5": Settings(
        model="SpeechT5ForSpeechToText",
        inputs={"input_values": torch.randn(2, 4000), "decoder_input_ids": torch.randint(5, 80, (2, 6))},
    ),
    "speech_encoder_decoder": Settings(inputs={"input_features": None, "inputs": None}),
    "seamless_m4t": Settings(model="SeamlessM4TForSpeechToText"),
    "seamless_m4t_v2": Settings(model="SeamlessM4Tv2ForSpeechToText"),
    "bark": Settings(model="BarkSemanticModel"),
    "dia": Settings(inputs={"decoder_input_ids": torch.randint(5, 80, (2, 6, 9)), "labels": None}),
    "musicgen": Settings(inputs={"decoder_input_ids": torch.randint(5, 80, (8, 6)), "labels": None}),
    "musicgen_melody": Settings(
        inputs={
            "decoder_input_ids": torch.randint(5, 80, (8, 6)),
            "input_features": torch.randn(2, 8, 12),
            "labels": None,
        }
    ),
    "neucodec": _TWO_VIEWS,
    "xcodec2": _TWO_VIEWS,
    "pe_audio": _CODEC,
    "vibevoice": _CODEC,
    "glmasr": Settings(
        inputs=lambda model: {
            "input_features": torch.randn(2, 16, 48),
            "input_features_mask": torch.ones(2, 48, dtype=torch.long),
        }
    ),
    "clap": Settings(
        config={
            "audio_config": {
                "spec_size": 64,
                "window_size": 2,
                "num_mel_bins": 16,
                "patch_embeds_hidden_size": 16,
                "hidden_size": 128,
                "num_attention_heads": [2, 2, 2, 2],
                "depths": [1, 1, 1, 1],
                "patch_size": 4,
            }
        },
        inputs={"input_features": torch.randn(2, 1, 256, 16), "is_longer": torch.tensor([[False], [False]])},
    ),
    "pop2piano": Settings(inputs={"input_features": None}),
    "granite_speech": Settings(inputs={"input_features": torch.randn(2, 48, 32)}),
    "granite_speech_plus": Settings(inputs={"input_features": torch.randn(2, 48, 32)}),
    "granite_speech5": Settings(
        inputs={"input_features": torch.randn(2, 48, 64), "attention_mask": torch.ones(2, 48, dtype=torch.long)}
    ),
    "voxtral": Settings(
        config={"audio_config": {"intermediate_size": 128}}, inputs={"input_features": torch.randn(2, 16, 256)}
    ),
    "voxtral_realtime": Settings(inputs=_channels_first),
    "fastspeech2_conformer": Settings(model="FastSpeech2ConformerModel"),
    "qwen2_audio": Settings(inputs=_with_sound),
    "musicflamingo": Settings(inputs=_with_sound),
    "kyutai_speech_to_text": Settings(inputs={"input_ids": torch.randint(5, 95, (2, 10, 33)), "labels": None}),
    "gradium_phonon_tts": Settings(config={"flow_head_config": {"condition_dim": 32}}),
    "pocket_tts": Settings(config={"flow_head_config": {"condition_dim": 32}}),
    "fun_asr_nano": Settings(config={"adaptor_config": {"intermediate_size": 8}}),
    "qwen2_5_omni": Settings(inputs={"input_features": None}),
    "qwen3_omni_moe": Settings(inputs={"input_features": None}),
    "vits": Settings(
        config={
            "noise_scale": 0.0,
            "noise_scale_duration": 0.0,
            "upsample_rates": [4, 4],
            "upsample_kernel_sizes": [8, 8],
            "upsample_initial_channel": 32,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
        }
    ),
    "mimi": Settings(model="MimiModel", inputs={"input_values": torch.randn(2, 1, 4000)}),
    "vibevoice_acoustic_tokenizer": Settings(
        model="VibeVoiceAcousticTokenizerModel", inputs={"input_values": torch.randn(2, 1, 4000)}
    ),
    "pocket_tts_audio_tokenizer": Settings(
        model="PocketTTSAudioTokenizerModel", inputs={"input_values": torch.randn(2, 1, 4000)}
    ),
    "higgs_audio_v2_tokenizer": Settings(not_run="needs the package torchaudio"),
}
