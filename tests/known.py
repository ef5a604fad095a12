"""Properties that are known not to hold for a type, and why: `{model_type: {property: reason}}`."""

_SPARSE = {"visibility_respected": "keys are chosen by a learned top-k, which follows the regularized hidden states"}
_POOLED = {"train_differs": "keys are pooled, so no key belongs to one token and TLM has nothing to hide"}
_GROUPS = "the tiny configuration counts key/value groups in a way that sdpa accepts only without a mask"
_MISFIT = dict.fromkeys(
    ("train_differs", "gradients_kept", "copies_are_independent", "checkpointing_repeats"), _GROUPS
)

KNOWN: dict[str, dict[str, str]] = {
    "axk2": _SPARSE,
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE,
    "mistral_large4": _SPARSE,
    "mistral_large4_text": _SPARSE,
    "cvt": _POOLED,
    "glpn": _POOLED,
    "pvt_v2": _POOLED,
    "segformer": _POOLED,
    "nemo_speechlm": _MISFIT,
    "nemotron3_5_transcribe_asr_audio": _MISFIT,
    "nemotron3_5_transcribe_audio": _MISFIT,
    "nemotron3_5_transcribe_word_timestamp": _MISFIT,
    "nemotron3_diarization": _MISFIT,
    "nemotron3_diarization_audio": _MISFIT,
    "vjepa2": {"backends_agree": "its eager attention ignores the mask"},
}
