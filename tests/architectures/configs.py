"""Tiny configurations: every field of a configuration class is cut down by name, sub-configurations included."""

from __future__ import annotations

import copy
import dataclasses
import re
import zlib
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, FFN = 64, 4, 2, 16, 2, 128, 128
IMAGE, MAX_LAYERS, WIDEST_STAGE = 64, 4, 128

# First match wins. An exact rule sets the value, a cap only lowers it.
EXACT = "exact"
CAP = "cap"
INT_RULES: list[tuple[str, str, int]] = [
    (r"(type_vocab_size|num_labels|num_classes|.*(coefficient|cost|weight|factor|stride|rate)s?)", CAP, 1 << 30),
    (r".*vocab_size.*|vocab|n_vocab|num_embeddings|vocab_sizes?", CAP, VOCAB),
    (r"(num_)?codebook_(size|vocab_size)|.*bins", CAP, 32),
    (r"rotary_dim|qk_(rope|nope)_head_dim|index_head_dim|.*rope_dim", CAP, 8),
    (r"qk_head_dim|v_head_dim|.*head_dim|.*head_size|d_kv|dim_head|d_head|.*_key_dim|.*_value_dim", CAP, HEAD_DIM),
    (r"(q|kv|o|v)_lora_rank|.*_rank", CAP, 16),
    (r"(moe|shared_expert|expert|moe_shared_expert)_(ffn_)?(intermediate|hidden)_size", CAP, 32),
    (
        r".*intermediate.*|.*ffn_(hidden_)?(dim|size)|d_ff|ff_dim|.*mlp_dim|d_inner|.*dim_feedforward|n_inner|"
        r"feed_forward_size|ffn_hidden_size|mlp_hidden_size|.*encoder_ffn.*",
        CAP,
        FFN,
    ),
    (
        r".*(num|n)_(hidden_)?layers?.*|n_layer|.*(encoder|decoder|hidden)_layers|depth|.*_depth|n_layers|"
        r"num_.*_blocks|num_.*layers.*|.*num_blocks|.*_num_layers|.*_layers",
        CAP,
        LAYERS,
    ),
    (
        r"num_key_value_heads|.*(num|n)_key_value_(attention_)?heads|num_kv_heads|n_kv_heads?|n_head_kv|"
        r"multi_query_group_num|num_query_groups",
        CAP,
        KV_HEADS,
    ),
    (r".*(num|n)_(.*_)?heads?|.*attention_heads|encoder_attention_heads|n_head|.*num_heads|.*_heads", CAP, HEADS),
    (r"(num|n)_(experts|local_experts|routed_experts)|moe_num_experts|num_.*experts", CAP, 4),
    (r".*(experts_per_tok(en)?|topk|top_k|moe_k|experts_topk)|n_group|topk_group|n_shared_experts", CAP, 2),
    (r"first_k_dense_replace|num_dense_layers", CAP, 1),
    (r"sliding_window.*|attention_window.*|attention_chunk_size|.*local_attention.*", CAP, 8),
    (r"max_source_positions", CAP, 20),
    (
        r".*max_position_embeddings|max_.*positions?|n_positions|n_ctx|.*context_length|max_seq_len|max_length|"
        r"max_sequence_length|seq_length|max_.*len",
        CAP,
        256,
    ),
    (r"(.*_)?image_size|.*img_size|input_size|.*max_image_size", EXACT, IMAGE),
    (r"patch_size|.*_patch_size", CAP, 16),
    (r"num_frames|frames_per_clip", CAP, 4),
    (r"num_mel_bins|n_mels|feature_size|input_feat_per_channel|mel_bins", CAP, 32),
    (r"num_queries|num_query_tokens|.*num_latents|num_detection_tokens|num_denoising|.*n_latents", CAP, 8),
    (r"window_size", CAP, 64),
    (
        r".*hidden_sizes?|.*hidden_dim|d_model|n_embd|.*embed_dim|dim|.*_embd|model_dim|embedding_size|.*d_model|"
        r"projection_dim|.*proj_dim|.*embedding_dim|.*_dim|.*_channels|.*_features|.*_width|width|channels|"
        r"pooler_output_size|.*_units|lru_width",
        CAP,
        HIDDEN,
    ),
]
COMPILED = [(re.compile(pattern), kind, value) for pattern, kind, value in INT_RULES]

LAYER_COUNT = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers")
LAYER_TYPE_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
STAGE_DEPTHS = ("depths", "stage_depths", "layers", "num_layers", "stage_num_blocks", "num_block_repeats")
PLACEHOLDERS = {"image": 100, "video": 101, "audio": 102}
ORDINARY_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "dec": 3, "sep": 4, "cls": 5, "unk": 6}
TOKEN_FIELD = re.compile(r".*token_(id|ids|index)|.*_token|.*_token_idx|boi_.*|eoi_.*")

# What the rules do not get right: fields of the configuration, or a dict for one of its sub-configurations.
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
NO_TIMM = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "backbone_config": RESNET}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
VIT4 = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
    "out_indices": [1, 2, 3, 4],
    "apply_layernorm": True,
    "reshape_hidden_states": False,
}
DINO4 = {"model_type": "dinov2", **VIT4}
NECK = {
    "neck_hidden_sizes": [16, 16, 16, 16],
    "fusion_hidden_size": 32,
    "reassemble_hidden_size": 64,
    "patch_size": 16,
}
DETR_IN = {"encoder_in_channels": [128, 256, 512]}  # the stages of the HGNet / ResNet of level 0
MROPE = ("paddleocr_vl_text",)
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"input_size": 1, "lags_sequence": [1, 2], "num_time_features": 2},
    "informer": {"input_size": 1, "lags_sequence": [1, 2], "num_time_features": 2},
    "time_series_transformer": {"input_size": 1, "lags_sequence": [1, 2], "num_time_features": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cosmos3_edge_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    },
    "dab-detr": NO_TIMM,
    "detr": NO_TIMM,
    "conditional_detr": NO_TIMM,
    "deformable_detr": NO_TIMM,
    "table-transformer": NO_TIMM,
    "depth_anything": {**NECK, "backbone_config": DINO4},
    "prompt_depth_anything": {**NECK, "backbone_config": DINO4},
    "zoedepth": {
        **NECK,
        "backbone_config": {"model_type": "beit", **{k: v for k, v in VIT4.items() if k != "apply_layernorm"}},
        "bottleneck_features": 32,
        "num_relative_features": 32,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"vocab_size": 128, "num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_audio": {"subsampling_conv_channels": (16, 8)},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 4, "index_kpool": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "janus_vqgan": {"num_patches": 4, "num_embeddings": 32, "base_channels": 32},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [4, 4],
        "max_position_embeddings": 16,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "gemma3": {"mm_tokens_per_image": 16},
    "step3p5": {"sliding_window": 8},
    "step3p7_text": {"sliding_window": 8},
    "xmod": {"default_language": "en_XX"},
    "upernet": {"backbone_config": RESNET, "pool_scales": [1, 2], "hidden_size": 32, "auxiliary_in_channels": 32},
    "wav2vec2-bert": {"feature_projection_input_dim": 80},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 8,
    },
    "tvp": {
        **NO_TIMM,
        "backbone_config": {**RESNET, "out_features": ["stage4"]},
        "visual_prompter_apply": "replace",
        "max_img_size": 64,
        "visual_prompt_size": 8,
    },
    "lw_detr": {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "out_indices": [1, 2],
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "image_size": 64,
            "pretrain_image_size": 64,
            "window_block_indices": [0],
        },
        "d_model": 64,
        "num_queries": 8,
        "projector_scale_factors": [1.0],
    },
    "molmo2_vision": {"image_size": [56, 56], "num_position_embeddings": 16},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}, "mm_tokens_per_image": 16},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "decision_transformer": {"n_head": 4},
    # their value projection has a head for every query head: only equal numbers work
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "longcat_flash": {"head_dim": 8},
    "hgnet_v2": {
        "stem_channels": [3, 8, 12],
        "stage_in_channels": [12, 16, 32, 64],
        "embedding_size": 12,
        "stage_mid_channels": [12, 12, 16, 24],
        "stage_out_channels": [16, 32, 64, 128],
        "hidden_sizes": [16, 32, 64, 128],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "mllama_vision_model": {"intermediate_layers_indices": [0], "max_num_tiles": 4, "vision_output_dim": 128},
    "chmv2": {
        "backbone_config": {
            "model_type": "dinov3_vit",
            "return_class_token": True,
            **VIT4,
            "reshape_hidden_states": True,
        },
        "post_process_channels": [16, 16, 16, 16],
        "fusion_hidden_size": 32,
        "head_hidden_size": 32,
    },
    "moshi_depth": {"num_codebooks": 12, "input_size": 64},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "num_heads": 4},
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 512},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64, "encoder_hash_byte_group_vocab": 512},
    "d_fine": {"decoder_in_channels": [64, 64, 64]},
    "rt_detr": {"decoder_in_channels": [64, 64, 64]},
    "rt_detr_v2": {"decoder_in_channels": [64, 64, 64]},
    "pp_doclayout_v2": {"decoder_in_channels": [64, 64, 64]},
    "pp_doclayout_v3": {"x4_feat_dim": 16, "decoder_in_channels": [64, 64, 64]},
    "pp_doclayout_v4": {"decoder_in_channels": [64, 64, 64]},
    "pvt": {"num_encoder_blocks": 4},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "oneformer": {"task_seq_len": 12},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 32},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "depth_pro": {
        "patch_size": 64,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [32, 32],
        "scaled_images_feature_dims": [64, 64, 32],
        "fusion_hidden_size": 32,
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "use_spatial_sampling": False, "downsample_rate": "1/2"},
    "perceiver": {
        "d_latents": 64,
        "d_model": 64,
        "num_self_attends_per_block": 2,
        "num_latents": 8,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "vibevoice_acoustic_tokenizer": {"num_filters": 4, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4, "depths": [1] * 7},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "llava_next": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "voxtral": {"audio_token_id": 102},
    "qwen2_audio": {"audio_token_index": 102},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "vits": {"upsample_initial_channel": 64, "vocab_size": 128, "spectrogram_bins": 33},
    "fastspeech2_conformer": {"vocab_size": 128},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
        "window_size_per_stage": [4, 4, 4, 4],
        "image_size": [64, 64],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "pix2struct_vision_model": {"patch_embed_hidden_size": 768, "seq_len": 64},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 768},
    "seggpt": {
        "image_size": [128, 64],
        "pretrain_image_size": 64,
        "num_hidden_layers": 4,
        "intermediate_hidden_state_indices": [0, 1, 2, 3],
        "merge_index": 0,
    },
    "vitmatte": {
        "fusion_hidden_sizes": [32, 16, 16, 8],
        "convstream_hidden_sizes": [8, 16, 16],
        "backbone_config": {
            "model_type": "vitdet",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "image_size": 64,
            "num_attention_heads": 4,
            "num_channels": 4,
            "patch_size": 16,
            "out_features": ["stage2"],
        },
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 103, "vision_end_token_id": 104},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 103, "vision_end_token_id": 104},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 105}, "image_token_id": 100},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 105}, "image_token_id": 100},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "backbone_hidden_size": 64,
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "llama4_vision_model": {
        "intermediate_size": 256,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    "instructblip": {"image_token_index": 100, "num_query_tokens": 8},
    "instructblipvideo": {"video_token_index": 101, "num_query_tokens": 8},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": (8, 16, 32, 64), "depths": (1, 1, 1, 1)},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "n_groups": 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "expand": 2,
    },
    "qwen4_exp_text": {
        "num_key_value_heads": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 128,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
    },
    "kosmos-2": {"latent_query_num": 4},
    "muse_glimmer_assistant": {"target_layer_ids": [0]},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 64,
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "input_size": 80,
    },
    "qwen2_5_omni_audio_encoder": {"max_source_positions": 128},
    "qwen3_omni_moe_audio_encoder": {"max_source_positions": 64},
    "qwen3_asr_encoder": {"max_source_positions": 64},
    "neucodec": {"semantic_model_config": {"feature_projection_input_dim": 80}},
    "fun_asr_nano_encoder": {"num_mel_bins": 32},
    "gemma4_vision": {"max_position_embeddings": 256, "position_embedding_size": 64, "pooling_kernel_size": 2},
}

# Fields that are None by default, where the model wants a number (or the number that the model derives is too large).
FILL_NONE = {
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "prediction_length": 4,
    "context_length": 16,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def rule_level(pattern: str) -> int:
    """Up to which level a rule applies: sizes of images and audio to 1, numbers of layers, tokens, experts to 2."""
    if any(word in pattern for word in ("vocab_size", "layers", "n_experts|", "experts)", "dense_layers")):
        return 2
    return int("image_size" in pattern or "patch_size" in pattern or "frames" in pattern or "queries" in pattern)


def special_token(name: str) -> int:
    """One id per special-token field name, the same in every sub-configuration."""
    stem = re.sub(r"_token.*$|_id$|_index$", "", name)
    return PLACEHOLDERS.get(stem, 103 + zlib.crc32(stem.encode()) % 25)


def shrink_int(name: str, value: int, level: int = 0) -> int:
    if TOKEN_FIELD.fullmatch(name):
        role = name[:3]
        if 0 <= value < 10 and role in ORDINARY_TOKENS:
            return value
        return ORDINARY_TOKENS[role] if role in ("pad", "bos", "eos", "dec") else special_token(name)
    for pattern, kind, limit in COMPILED:
        if pattern.fullmatch(name):
            if level > rule_level(pattern.pattern):
                return value
            return limit if kind == EXACT else min(value, limit)
    return value


def shrink_sequence(name: str, value: list | tuple, level: int = 0) -> list | tuple:
    kind = type(value)
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    if TOKEN_FIELD.fullmatch(name):
        return kind(v if 0 <= v < 10 else min(2, v) for v in value)
    if name in STAGE_DEPTHS:
        return kind(min(v, LAYERS) for v in value)
    if level == 2:
        return value
    if re.fullmatch(r".*(image_size|img_size|train_size)", name):
        return kind(IMAGE for _ in value)
    if level == 1:
        return value
    if re.fullmatch(r".*window_size.*", name):
        return kind(min(v, 4) for v in value)
    if re.fullmatch(
        r".*(hidden_sizes?|channels?|dims?|embed_dims?|.*hidden_dim|channel_list|embed_dim_per_stage)", name
    ):
        factor = 1
        while max(value) // factor > WIDEST_STAGE and all(v % (2 * factor) == 0 for v in value if v > 16):
            factor *= 2
        return kind(v // factor if v > 16 else v for v in value)
    return value


def layer_choice(default: PreTrainedConfig) -> tuple[str, int, list[int]] | None:
    """The field that counts the layers, its value, and the layers to keep: one of each kind, two at least."""
    for field in LAYER_COUNT:
        count = vars(default).get(field)
        if isinstance(count, int) and count > 0:
            break
    else:
        return None
    lists = [vars(default).get(name) for name in LAYER_TYPE_LISTS]
    lists = [v for v in lists if isinstance(v, (list, tuple)) and len(v) == count]
    kinds: dict[Any, int] = {}
    for layer in range(count):
        kinds.setdefault(tuple(str(v[layer]) for v in lists), layer)
    keep = sorted(kinds.values())[:MAX_LAYERS]
    for layer in range(count):
        if len(keep) < LAYERS and layer not in keep:
            keep.append(layer)
    return field, count, sorted(keep)


def shrink(
    default: PreTrainedConfig, override: dict[str, Any] | None = None, level: int = 0, top_level: bool = False
) -> PreTrainedConfig:
    """A tiny configuration of the class of `default`; fields come from `default`, cut down by name."""
    cls = type(default)
    override = dict(override if override is not None else OVERRIDES.get(cls.model_type, {}))
    pure = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    values: dict[str, Any] = {}
    base_fields = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    layers = layer_choice(default)
    for field in dataclasses.fields(cls):
        name = field.name
        value = vars(default).get(name, pure.get(name))
        if name in base_fields and not TOKEN_FIELD.fullmatch(name) or name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            sub = override.get(name)
            if isinstance(sub, dict) and "model_type" in sub:  # another class than the default's
                continue
            values[name] = shrink(value, merged(type(value).model_type, sub if isinstance(sub, dict) else {}), level)
            if isinstance(sub, dict):
                override.pop(name)
            continue
        if pure.get(name, value) is None and name not in LAYER_TYPE_LISTS and not TOKEN_FIELD.fullmatch(name):
            if name == "head_dim" and "qk_rope_head_dim" in pure:  # latent attention derives it
                continue
            if name in FILL_NONE and level == 0:
                values[name] = FILL_NONE[name]
            elif isinstance(value, int) and not isinstance(value, bool) and name == "num_key_value_heads":
                values[name] = shrink_int(name, value, level)
            continue
        if layers and isinstance(value, (list, tuple)) and len(value) == layers[1] and len(value) > 4:
            values[name] = type(value)(value[i] for i in layers[2])
        elif isinstance(value, bool):
            values[name] = value
        elif isinstance(value, int):
            values[name] = shrink_int(name, value, level)
        elif isinstance(value, (list, tuple)):
            values[name] = shrink_sequence(name, value, level)
        elif isinstance(value, (str, float)):
            values[name] = value
    if layers and layers[0] in values:
        values[layers[0]] = len(layers[2])
    if level == 0 and {"kv_lora_rank", "num_key_value_heads"} <= values.keys():
        # latent attention: as many key heads as query heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    heads = values.get("num_heads", values.get("num_attention_heads"))
    if level == 0 and isinstance(heads, (list, tuple)) and isinstance(values.get("embed_dim"), int):
        values["embed_dim"] = 8 * heads[0]  # Swin: the width doubles from stage to stage
    if isinstance(vars(default).get("_out_indices"), (list, tuple)) and not top_level:
        values.update(backbone_outputs(default, values, layers))
    values.update(override)
    config = cls(**copy.deepcopy(values))
    fit_mrope(config)
    return config


def backbone_outputs(default: PreTrainedConfig, values: dict[str, Any], layers: Any) -> dict[str, Any]:
    """As many feature maps as the default backbone returns, the last ones where it has fewer layers now."""
    names = vars(default).get("stage_names")
    if not names:
        return {}
    indices = [i % len(names) for i in default.out_indices]
    if layers is None or layers[0] not in values or len(names) != layers[1] + 1:
        return {"out_indices": indices}
    count = max(values[layers[0]], len(indices))
    return {layers[0]: count, "out_indices": list(range(count - len(indices) + 1, count + 1))}


def fit_mrope(config: PreTrainedConfig) -> None:
    """Sections of the multimodal rotary embedding that fit the head dimension."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    wanted = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()) or config.model_type in MROPE
    for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if "mrope_section" in parameters or (wanted and "rope_type" in parameters):
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            pairs = int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
            side = 3 * pairs // 8
            parameters["mrope_section"] = [side, side, pairs - 2 * side]


def merged(model_type: str, override: dict[str, Any]) -> dict[str, Any]:
    return {**OVERRIDES.get(model_type, {}), **override}


def tiny_config(model_type: str, level: int = 0) -> PreTrainedConfig:
    """Level 0 cuts everything; 1 keeps the widths of the default configuration, 2 sizes of images and patches too."""
    return shrink(CONFIG_MAPPING[model_type](), level=level, top_level=True)
