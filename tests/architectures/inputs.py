"""Dummy inputs for a tiny model, from the signature of its forward and its configuration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .configs import IMAGE


BATCH, TEXT, DECODER_TEXT, PADDED = 2, 12, 9, 3
AUDIO_SAMPLES, MEL_FRAMES = 4000, 64
FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN = 10, 90


Generator = Callable[["Context"], Any]


class Context:
    """What the generators need to know about one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: PreTrainedConfig = model.config
        signature = inspect.signature(model.forward).parameters.values()
        named = [p for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.names = [p.name for p in named]
        self.required = [p.name for p in named if p.default is p.empty]
        self.made: dict[str, Any] = {}
        self.given: dict[str, Any] = {}

    def configs(self) -> Iterator[PreTrainedConfig]:
        todo = [self.config]
        while todo:
            config = todo.pop(0)
            yield config
            todo += [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]

    def get(self, *names: str, default: Any = None, where: str = "") -> Any:
        """The first of `names` found, breadth first; `where` prefers sub-configurations whose name contains it."""
        configs = list(self.configs())
        if where:
            words = where.split()
            configs.sort(key=lambda c: not any(w in f"{c.model_type} {type(c).__name__}".lower() for w in words))
        for config in configs:
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def has_text_vocabulary(self) -> bool:
        return self.get("vocab_size") is not None


def pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return value["height"], value["width"]
    return (
        (value[0], value[1])
        if isinstance(value, (list, tuple)) and len(value) > 1
        else ((value[0], value[0]) if isinstance(value, (list, tuple)) else (value, value))
    )


def plain_tokens(length: int) -> Tensor:
    return torch.randint(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN, (BATCH, length))


def vision(ctx: Context) -> tuple[int, int, int, int, int]:
    """channels, height, width, patch height, patch width"""
    where = "vision image visual vit"
    height, width = pair(ctx.get("image_size", "img_size", "input_size", default=IMAGE, where=where))
    channels = ctx.get("num_channels", "in_channels", "in_chans", "image_channels", default=3, where=where)
    channels = channels if isinstance(channels, int) else 3
    patch = ctx.get("patch_size", "spatial_patch_size", default=16, where=where)
    ph, pw = pair(patch if not isinstance(patch, (list, tuple)) or len(patch) < 3 else patch[-2:])
    return channels, height, width, ph, pw


GRID = (1, 4, 4)  # frames, rows and columns of patches of one packed image or video


def packed_patches(ctx: Context) -> Tensor:
    channels, _, _, ph, pw = vision(ctx)
    temporal = ctx.get("temporal_patch_size", "patch_temporal", default=1, where="vision")
    temporal = temporal if isinstance(temporal, int) else temporal[0]
    t, h, w = GRID
    return torch.randn(BATCH * t * h * w, channels * temporal * ph * pw)


def pixel_values(ctx: Context) -> list[Tensor]:
    channels, height, width, ph, pw = vision(ctx)
    if {"image_grid_thw", "grid_thw", "image_grid_hws"} & set(ctx.names):
        packed = packed_patches(ctx)
        square = packed.view(packed.shape[0], -1, ph, pw)
        return [packed, square, square[None], packed.view(packed.shape[0], ph, pw, -1)]
    image = torch.randn(BATCH, channels, height, width)
    frames = ctx.get("num_frames", "frames_per_clip", default=2)
    video = torch.randn(BATCH, frames, channels, height, width)
    patches = torch.randn(BATCH, 16, channels * ph * pw)
    shapes = [image, image[:, None], video, patches]
    if ctx.get("num_frames", "tubelet_size", "frames_per_clip") is not None:
        shapes = [video, image, image[:, None], patches]
    if {"spatial_shapes", "pixel_position_ids"} & set(ctx.names):
        shapes = [patches, image, video]
    return shapes


def videos(ctx: Context) -> list[Tensor]:
    channels, height, width, ph, pw = vision(ctx)
    if {"video_grid_thw", "grid_thw"} & set(ctx.names):
        return [packed_patches(ctx)]
    frames = ctx.get("num_frames", "frames_per_clip", default=2)
    return [torch.randn(BATCH, frames, channels, height, width)]


def mel(ctx: Context) -> list[Tensor]:
    where = "audio speech encoder"
    bins = ctx.get(
        "num_mel_bins",
        "n_mels",
        "mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
        "input_feat_size",
        default=80,
        where=where,
    )
    source = ctx.get("max_source_positions", where=where)
    frames = 2 * source if source is not None else MEL_FRAMES
    wide = torch.randn(BATCH, bins, frames)
    long = torch.randn(BATCH, MEL_FRAMES, bins)
    return [wide, long, torch.randn(BATCH, 1, MEL_FRAMES, bins)]


def text(ctx: Context) -> Tensor:
    return plain_tokens(TEXT)


def ones(*names: str) -> Callable[[Context], Tensor | None]:
    """An all-ones mask as long as the first of `names` made already."""

    def make(ctx: Context) -> Tensor | None:
        for name in names:
            if name in ctx.made:
                value = ctx.made[name]
                return torch.ones(value.shape[:2], dtype=torch.long)
        return None

    return make


def pixel_mask(ctx: Context) -> Tensor | None:
    pixels = ctx.made.get("pixel_values")
    if pixels is None or pixels.dim() < 4:
        return None
    return torch.ones(pixels.shape[0], *pixels.shape[-2:], dtype=torch.long)


def boxes(ctx: Context) -> Tensor:
    limit = ctx.get("max_2d_position_embeddings", default=100)
    low = torch.randint(0, limit // 2, (BATCH, TEXT, 2))
    box = torch.cat([low, low + torch.randint(0, limit // 2 - 1, (BATCH, TEXT, 2))], -1)
    return box


def image_sizes(ctx: Context) -> Tensor:
    _, height, width, _, _ = vision(ctx)
    return torch.tensor([[height, width]] * BATCH)


def image_grid(ctx: Context) -> Tensor:
    return torch.tensor([GRID] * BATCH)


def hidden_states(ctx: Context) -> list[Tensor]:
    width = ctx.get("hidden_size", "d_model", "embed_dim", default=64)
    shapes = [torch.randn(BATCH, TEXT, width)]
    return [packed_patches(ctx), *shapes] if "grid_thw" in ctx.names else shapes


def wave(ctx: Context) -> list[Tensor]:
    channels = ctx.get("audio_channels", "num_channels", default=1)
    samples = torch.randn(BATCH, AUDIO_SAMPLES)
    if ctx.get("max_length", where="audio") and ctx.get("num_mel_bins"):  # AST: spectrogram
        return [torch.randn(BATCH, ctx.get("max_length"), ctx.get("num_mel_bins"))]
    return [
        samples,
        samples[:, None].expand(-1, channels if isinstance(channels, int) else 1, -1).contiguous(),
        plain_tokens(TEXT),
    ]


def decoder_ids(ctx: Context) -> Tensor:
    return plain_tokens(DECODER_TEXT)


def mel_mask(ctx: Context) -> Tensor | None:
    features = ctx.made.get("input_features", ctx.made.get("audio_mel"))
    if features is None:
        return None
    bins = mel(ctx)[1].shape[-1]
    frames = features.shape[-2] if features.shape[-1] == bins and features.dim() < 4 else features.shape[-1]
    return torch.ones(BATCH, frames, dtype=torch.long)


def patch_grid(ctx: Context) -> Tensor | None:
    return torch.tensor([[4, 4]] * BATCH) if "pixel_values" in ctx.made else None


def pixel_attention(ctx: Context) -> Tensor | None:
    pixels = ctx.made.get("pixel_values")
    if pixels is None:
        return None
    if pixels.dim() == 3:
        return torch.ones(pixels.shape[:2], dtype=torch.long)
    return torch.ones(*pixels.shape[:-3], *pixels.shape[-2:], dtype=torch.long)


def series(ctx: Context) -> list[Tensor]:
    context = ctx.get("context_length", default=16)
    channels = ctx.get("num_input_channels", default=1)
    lags = ctx.get("lags_sequence", default=[0])
    if "past_time_features" in ctx.names:
        return [torch.randn(BATCH, context + max(lags))]
    return [torch.randn(BATCH, context, channels), torch.randn(BATCH, context)]


def series_features(key: str, length: str) -> Generator:
    def make(ctx: Context) -> Tensor | None:
        steps = ctx.made["past_values"].shape[1] if length == "past" else ctx.get("prediction_length")
        return torch.randn(BATCH, steps, ctx.get(key, default=0)) if key else torch.ones(BATCH, steps)

    return make


def embeddings(length: int, *keys: str) -> Generator:
    def make(ctx: Context) -> Tensor:
        return torch.randn(BATCH, length, ctx.get(*keys, "hidden_size", "d_model", default=64))

    return make


# Name of a forward parameter -> value, list of candidate values, or None (leave it out).
# Order matters: a generator may read what those before it made.
OPTIONAL: dict[str, Generator] = {
    "pixel_values": pixel_values,
    "pixel_values_videos": videos,
    "image_grid_thw": image_grid,
    "video_grid_thw": image_grid,
    "grid_thw": image_grid,
    "image_sizes": image_sizes,
    "input_features": mel,
    "input_values": wave,
    "decoder_input_ids": decoder_ids,
    "bbox": boxes,
    "input_features_mask": mel_mask,
    "feature_attention_mask": mel_mask,
    "pixel_attention_mask": pixel_attention,
    "spatial_shapes": patch_grid,
    "image_merge_sizes": lambda ctx: torch.ones(BATCH, dtype=torch.long),
    "video_merge_sizes": lambda ctx: torch.ones(BATCH, dtype=torch.long),
    "target_sizes": patch_grid,
}
REQUIRED: dict[str, Generator] = {
    **OPTIONAL,
    "hidden_states": hidden_states,
    "inputs_embeds": hidden_states,
    "pixel_mask": pixel_mask,
    "image": pixel_values,
    "query_embeds": embeddings(8),
    "qformer_input_ids": text,
    "audio_mel": mel,
    "audio_mel_mask": lambda ctx: mel_mask(ctx) == 0,
    "past_values": series,
    "past_time_features": series_features("num_time_features", "past"),
    "past_observed_mask": series_features("", "past"),
    "future_values": series_features("", "future"),
    "future_time_features": series_features("num_time_features", "future"),
    "spectrogram": embeddings(TEXT, "model_in_dim"),
    "noise_embeds": embeddings(TEXT),
    "context_hidden_states": embeddings(TEXT),
    "merge_sizes": lambda ctx: torch.ones(BATCH, dtype=torch.long),
    "task_inputs": text,
    "vision_features": embeddings(16),
    "text_features": embeddings(TEXT),
    "vision_pos_encoding": embeddings(16),
}


# Whole input sets of single types; None leaves a parameter out, the rest is filled in as for the others.
def waveform(ctx: Context) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 1, AUDIO_SAMPLES)}


def fixed(**shapes: tuple[int, ...]) -> Callable[[Context], dict[str, Any]]:
    """Floating-point inputs of given shapes."""
    return lambda ctx: {name: torch.randn(*shape) for name, shape in shapes.items()}


def tokens(**lengths: int) -> Callable[[Context], dict[str, Any]]:
    return lambda ctx: {name: plain_tokens(length) for name, length in lengths.items()}


def both(*makers: Callable[[Context], dict[str, Any]]) -> Callable[[Context], dict[str, Any]]:
    return lambda ctx: {name: value for maker in makers for name, value in maker(ctx).items()}


def codebooks(name: str, count: int, length: int, flat: bool = False) -> Callable[[Context], dict[str, Any]]:
    shape = (BATCH * count, length) if flat else (BATCH, length, count)
    return lambda ctx: {name: torch.randint(3, 20, shape)}


def fastspeech(ctx: Context) -> dict[str, Any]:
    config = getattr(ctx.config, "model_config", ctx.config)
    durations = torch.full((BATCH, TEXT), 2)
    return {
        "input_ids": plain_tokens(TEXT),
        "attention_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
        "spectrogram_labels": torch.randn(BATCH, 2 * TEXT, config.num_mel_bins),
        "duration_labels": durations,
        "pitch_labels": torch.randn(BATCH, TEXT, 1),
        "energy_labels": torch.randn(BATCH, TEXT, 1),
    }


def decisions(ctx: Context) -> dict[str, Any]:
    config, steps = ctx.config, 5
    return {
        "states": torch.randn(BATCH, steps, config.state_dim),
        "actions": torch.randn(BATCH, steps, config.act_dim),
        "rewards": torch.randn(BATCH, steps, 1),
        "returns_to_go": torch.randn(BATCH, steps, 1),
        "timesteps": torch.arange(steps).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, steps),
    }


def flattened(ctx: Context) -> dict[str, Any]:
    _, _, _, ph, pw = vision(ctx)
    patches = torch.randn(BATCH, 16, 2 + ctx.get("num_channels", "channels", default=3) * ph * pw)
    patches[..., 0], patches[..., 1] = torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1
    return {"flattened_patches": patches, "attention_mask": None}


def tiles(ctx: Context) -> dict[str, Any]:
    channels, height, width, _, _ = vision(ctx)
    count = ctx.get("max_num_tiles", default=4)
    return {
        "pixel_values": torch.randn(BATCH, 1, count, channels, height, width),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, count, dtype=torch.long),
    }


def kosmos(ctx: Context) -> dict[str, Any]:
    slots = torch.zeros(BATCH, 24, dtype=torch.long)
    slots[:, 2 : 2 + ctx.config.latent_query_num] = 1
    return {"input_ids": plain_tokens(24), "image_embeds_position_mask": slots}


def qformer(ctx: Context) -> dict[str, Any]:
    width = ctx.config.encoder_hidden_size
    return {"encoder_hidden_states": torch.randn(BATCH, 16, width), "attention_mask": None}


def regions(ctx: Context) -> dict[str, Any]:
    return {"visual_feats": torch.randn(BATCH, 6, ctx.config.visual_feat_dim), "visual_pos": torch.rand(BATCH, 6, 4)}


def detr_text(ctx: Context) -> dict[str, Any]:
    width = ctx.config.hidden_size
    return {
        "vision_features": [torch.randn(BATCH, width, 4, 4)],
        "vision_pos_embeds": [torch.randn(BATCH, width, 4, 4)],
        "text_features": torch.randn(BATCH, TEXT, width),
    }


def mask_decoder(ctx: Context) -> dict[str, Any]:
    width = ctx.config.hidden_size
    return {
        "decoder_queries": torch.randn(BATCH, 8, width),
        "encoder_hidden_states": torch.randn(BATCH, 16, width),
        "backbone_features": [torch.randn(BATCH, width, side, side) for side in (16, 8, 4)],
        "prompt_features": torch.randn(BATCH, 6, width),
    }


def seggpt(ctx: Context) -> dict[str, Any]:
    _, height, width, _, _ = vision(ctx)
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: torch.randn(BATCH, 3, height // 2, width) for name in names}


def rag(ctx: Context) -> dict[str, Any]:
    docs = ctx.config.n_docs
    return {
        "input_ids": plain_tokens(TEXT),
        "context_input_ids": plain_tokens(TEXT * docs).view(BATCH * docs, TEXT),
        "context_attention_mask": torch.ones(BATCH * docs, TEXT, dtype=torch.long),
        "doc_scores": torch.randn(BATCH, docs),
        "decoder_input_ids": plain_tokens(DECODER_TEXT),
    }


def omdet(ctx: Context) -> dict[str, Any]:
    classes = plain_tokens(3 * BATCH).view(2 * BATCH, 3)
    mask = torch.ones_like(classes)
    tasks = plain_tokens(5)
    return {
        "classes_input_ids": classes,
        "classes_attention_mask": mask,
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }


def padded_mask(length: int) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, -PADDED:] = 0
    return mask


def packed_audio(ctx: Context) -> dict[str, Any]:
    frames = 200
    return {
        "input_features": torch.randn(ctx.get("num_mel_bins"), BATCH * frames),
        "feature_lens": torch.full((BATCH,), frames),
        "aftercnn_lens": torch.full((BATCH,), frames // 2),
    }


def packed_row(ctx: Context) -> dict[str, Any]:
    _, _, _, ph, pw = vision(ctx)
    return {"pixel_values": torch.randn(1, 3, ph, pw * 16 * BATCH), "target_sizes": patch_grid_of(BATCH)}


def patch_grid_of(images: int) -> Tensor:
    return torch.tensor([[4, 4]] * images)


def positioned_patches(ctx: Context) -> dict[str, Any]:
    channels, _, _, ph, pw = vision(ctx)
    cells = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], -1)
    return {
        "pixel_values": torch.randn(BATCH, 16, channels * ph * pw),
        "pixel_position_ids": cells.expand(BATCH, -1, -1).clone(),
    }


SPECIAL: dict[str, Callable[[Context], dict[str, Any]]] = {
    "fastspeech2_conformer": fastspeech,
    "fastspeech2_conformer_with_hifigan": fastspeech,
    "decision_transformer": decisions,
    "pix2struct": both(flattened, tokens(decoder_input_ids=DECODER_TEXT)),
    "pix2struct_vision_model": flattened,
    "mllama_vision_model": tiles,
    "kosmos-2": kosmos,
    "blip_2_qformer": qformer,
    "lxmert": regions,
    "sam3_detr_encoder": detr_text,
    "sam3_lite_text_detr_encoder": detr_text,
    "sam3_mask_decoder": mask_decoder,
    "sam3_lite_text_mask_decoder": mask_decoder,
    "seggpt": seggpt,
    "rag": rag,
    "omdet-turbo": omdet,
    "dac": waveform,
    "vibevoice_acoustic_tokenizer": waveform,
    "vibevoice_acoustic_tokenizer_encoder": lambda ctx: {"hidden_states": torch.randn(BATCH, 1, AUDIO_SAMPLES)},
    "musicgen_decoder": codebooks("input_ids", 4, TEXT, flat=True),
    "musicgen_melody_decoder": codebooks("input_ids", 4, TEXT, flat=True),
    "musicgen": codebooks("decoder_input_ids", 4, DECODER_TEXT, flat=True),
    "kyutai_speech_to_text": codebooks("input_ids", 33, TEXT),
    "phi4_multimodal_audio": lambda ctx: {
        "hidden_states": torch.randn(BATCH, MEL_FRAMES, ctx.config.input_size),
        "mask": torch.ones(BATCH, MEL_FRAMES, dtype=torch.bool),
    },
    "inkling_audio": lambda ctx: {"audio_input_ids": torch.randint(0, 8, (BATCH, 6, 32))},
    "speech-encoder-decoder": lambda ctx: {"input_values": torch.randn(BATCH, AUDIO_SAMPLES), "input_features": None},
    "qwen3_omni_moe_talker_code_predictor": lambda ctx: {
        "input_ids": None,
        "inputs_embeds": torch.randn(BATCH, TEXT, 64),
        "attention_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
    },
    "qwen3_omni_moe_talker_text": lambda ctx: {
        "input_ids": None,
        "inputs_embeds": torch.randn(BATCH, TEXT, 64),
        "attention_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
    },
    "qwen2_5_omni_audio_encoder": packed_audio,
    "qwen3_omni_moe_audio_encoder": packed_audio,
    "gemma4_vision": positioned_patches,
    "voxtral_realtime_text": lambda ctx: {"t_cond": torch.randn(1, 1, ctx.config.hidden_size)},
    "idefics2_perceiver": lambda ctx: {
        "context": torch.randn(BATCH, 16, ctx.config.hidden_size),
        "attention_mask": torch.ones(BATCH, 16),
    },
    "deepseek_ocr2_encoder": lambda ctx: {
        "inputs_embeds": torch.randn(BATCH, 144, ctx.config.hidden_size),
        "num_patches": 144,
    },
    "dots3_note_audio_encoder": lambda ctx: {
        "input_features": torch.randn(BATCH, ctx.get("feature_size"), MEL_FRAMES),
        "chunk_sample_lengths": torch.full((BATCH,), MEL_FRAMES * ctx.get("hop_length")),
    },
    "t5gemma2_decoder": lambda ctx: {
        "encoder_hidden_states": torch.randn(BATCH, 7, ctx.config.hidden_size),
    },
    "muse_glimmer_assistant": lambda ctx: {
        "context_hidden_states": torch.randn(BATCH, TEXT, 64 * len(ctx.config.target_layer_ids)),
    },
    "mimi_decoder": fixed(latents=(BATCH, 512, TEXT)),
    "pocket_tts_audio_tokenizer_decoder": fixed(latents=(BATCH, 512, TEXT)),
    "csm": codebooks("input_ids", 32, TEXT),
    "minicpm_ocr_vision": packed_row,
    "minicpmv4_6_vision": packed_row,
    "minicpmv4_7_vision": packed_row,
    "granite_speech5_encoder": lambda ctx: {"input_features": torch.randn(BATCH, 32, 4 * ctx.get("num_mel_bins"))},
    "granite_speech5_ctc": lambda ctx: {"input_features": torch.randn(BATCH, 32, 4 * ctx.get("num_mel_bins"))},
    "gemma4_audio": lambda ctx: {
        "input_features": torch.randn(BATCH, MEL_FRAMES, ctx.config.subsampling_conv_channels[0]),
        "attention_mask": torch.ones(BATCH, MEL_FRAMES, dtype=torch.bool),
    },
    "fun_asr_nano_encoder": lambda ctx: {
        "input_features": torch.randn(BATCH, TEXT, 7 * ctx.config.num_mel_bins),
        "input_features_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
    },
    "unlimited_ocr_vision_encoder": lambda ctx: {
        "patch_embeds": torch.randn(BATCH, ctx.config.hidden_size, 4, 4),
    },
    "qwen3_asr_encoder": lambda ctx: {
        "input_features": torch.randn(BATCH, ctx.get("num_mel_bins"), 200),
        "input_features_mask": torch.ones(BATCH, 200, dtype=torch.long),
    },
    "qwen2_5_omni_bigvgan": lambda ctx: {"mel_spectrogram": torch.randn(BATCH, ctx.config.mel_dim, TEXT)},
    "depth_pro": fixed(pixel_values=(BATCH, 3, 256, 256)),
    "pp_ocrv5_mobile_rec": fixed(pixel_values=(BATCH, 3, 96, 320)),
    "moshi_depth": lambda ctx: {
        "input_ids": plain_tokens(4),
        "last_hidden_state": torch.randn(BATCH, 1, ctx.config.input_size),
    },
    "musicgen_melody": both(
        codebooks("decoder_input_ids", 4, DECODER_TEXT, flat=True), fixed(input_features=(BATCH, TEXT, 12))
    ),
    "idefics": lambda ctx: {
        "pixel_values": torch.randn(BATCH, 1, 3, IMAGE, IMAGE),
        "image_attention_mask": torch.ones(BATCH, TEXT, 1, dtype=torch.long),
    },
    "llava": lambda ctx: {"image_sizes": None},
    "llava_next": fixed(pixel_values=(BATCH, 3, 3, IMAGE, IMAGE)),
    "llava_next_video": fixed(pixel_values=(BATCH, 3, 3, IMAGE, IMAGE)),
    "llava_onevision": fixed(pixel_values=(BATCH, 3, 3, IMAGE, IMAGE)),
    "mllama": tiles,
    "xclip_vision_model": lambda ctx: {"pixel_values": torch.randn(8, 3, IMAGE, IMAGE)},
    "muse_spark_audio": fixed(input_values=(BATCH, 3840)),
    "vibevoice_acoustic_tokenizer_decoder": fixed(latents=(BATCH, 64, TEXT)),
    "dia_decoder": both(
        codebooks("input_ids", 9, TEXT),
        lambda ctx: {
            "encoder_hidden_states": torch.randn(BATCH, 7, ctx.config.cross_hidden_size),
        },
    ),
    "kosmos_2_5_vision_model": lambda ctx: {**flattened(ctx), "attention_mask": torch.ones(BATCH, 16)},
    "reformer": lambda ctx: {"input_ids": plain_tokens(16), "attention_mask": padded_mask(16)},
    "autoformer": lambda ctx: {
        "past_time_features": torch.randn(BATCH, 18, 2),
        "future_time_features": torch.randn(BATCH, 4, 2),
        "past_values": torch.randn(BATCH, 18),
        "past_observed_mask": torch.ones(BATCH, 18),
        "future_values": torch.randn(BATCH, 4),
    },
    "informer": lambda ctx: SPECIAL["autoformer"](ctx),
    "time_series_transformer": lambda ctx: SPECIAL["autoformer"](ctx),
    "xmod": lambda ctx: {"lang_ids": torch.zeros(BATCH, dtype=torch.long)},
}
MODALITIES = {
    "image": (
        "pixel_values",
        "image_grid_thw",
        "image_merge_sizes",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "image_sizes",
        "pixel_attention_mask",
        "spatial_shapes",
        "pixel_mask",
    ),
    "video": ("pixel_values_videos", "video_grid_thw", "video_merge_sizes"),
    "audio": ("input_features", "input_values", "input_features_mask", "feature_attention_mask", "audio_mel"),
}


def choices(value: Any, index: int) -> Any:
    if isinstance(value, list):
        return value[min(index, len(value) - 1)] if value else None
    return value


def count_features(features: Any) -> int:
    """Rows of the embeddings that a model computed from one modality."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, (list, tuple)) and features:
        return sum(count_features(f) for f in features)
    raise TypeError(f"no features in {type(features).__name__}")


def modality_tokens(ctx: Context, inputs: dict[str, Any], modality: str) -> tuple[int, int] | None:
    """Placeholder id and number of embeddings of a modality, as its model computes them."""
    token = ctx.get(f"{modality}_token_id", f"{modality}_token_index")
    method = getattr(ctx.model, f"get_{modality}_features", None)
    main = MODALITIES[modality]
    if token is None or method is None or not any(name in inputs for name in main):
        return None
    parameters = inspect.signature(method).parameters
    given = {name: inputs[name] for name in parameters if name in inputs and name != "input_ids"}
    with torch.no_grad():
        features = method(**given)
    return token, count_features(features)


def add_text(ctx: Context, inputs: dict[str, Any]) -> None:
    """input_ids and attention_mask; a run of placeholders per modality in each row, padding at the end of the last."""
    runs: list[list[int]] = [[] for _ in range(BATCH)]
    kinds: list[list[int]] = [[] for _ in range(BATCH)]
    for kind, modality in enumerate(MODALITIES, 1):
        found = modality_tokens(ctx, inputs, modality)
        if found is None:
            continue
        token, total = found
        for row in range(BATCH):
            count = total // BATCH + (row < total % BATCH)
            prefix = "vision" if modality != "audio" else "audio"
            start, end = (ctx.get(f"{prefix}_{edge}_token_id") for edge in ("start", "end"))
            ids = [start] * (start is not None) + [token] * count + [end] * (end is not None)
            runs[row] += ids
            kinds[row] += [kind if i == token else 0 for i in ids]
    length = TEXT + max(map(len, runs))
    ids = plain_tokens(length)
    types = torch.zeros_like(ids)
    for row, run in enumerate(runs):
        if run:
            ids[row, 2 : 2 + len(run)] = torch.tensor(run)
            types[row, 2 : 2 + len(run)] = torch.tensor(kinds[row])
    inputs["input_ids"] = ids
    if "mm_token_type_ids" in ctx.names:
        inputs["mm_token_type_ids"] = types
    if "attention_mask" in ctx.names:
        mask = padded_mask(length)
        pad = ctx.get("pad_token_id", default=0)
        ids[-1, -PADDED:] = pad if isinstance(pad, int) and 0 <= pad < ctx.get("vocab_size", default=1) else 0
        inputs["attention_mask"] = mask


def candidates(model: nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Makers of input sets to try, the fullest first."""
    ctx = Context(model)
    present = [m for m, names in MODALITIES.items() if set(names) & set(ctx.names)]
    subsets = [present]
    if len(present) > 1:
        subsets += [[m] for m in present]
    if present and "input_ids" in ctx.names:
        subsets.append([])
    for subset in subsets:
        for variant in range(4 if subset else 2):
            left_out = {n for m, names in MODALITIES.items() if m not in subset for n in names}
            yield functools.partial(make_inputs, ctx, left_out, variant)


def make_inputs(ctx: Context, left_out: set[str], variant: int) -> dict[str, Any]:
    ctx.made = {}
    special = SPECIAL.get(ctx.config.model_type)
    ctx.given = {k: v for k, v in (special(ctx) if special is not None else {}).items() if k not in left_out}
    ctx.made.update(ctx.given)
    for name, generator in REQUIRED.items():
        if name in left_out or name not in ctx.names or name in ctx.made:
            continue
        if name in OPTIONAL or name in ctx.required:
            value = choices(generator(ctx), variant)
            if value is not None:
                ctx.made[name] = value
    ctx.made = {name: value for name, value in ctx.made.items() if value is not None}
    inputs = dict(ctx.made)
    if special is not None and "input_ids" in ctx.given:
        pass
    elif "input_ids" in ctx.names and "input_ids" not in left_out:
        add_text(ctx, inputs)
    elif "attention_mask" in ctx.required and "attention_mask" not in ctx.made:
        mask = ones("hidden_states", "inputs_embeds", "input_features")(ctx)
        if mask is not None:
            inputs["attention_mask"] = mask
    return inputs
