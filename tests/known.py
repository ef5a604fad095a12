"""Properties that are known not to hold for a type, and why: `{model_type: {property: reason}}`."""

_SPARSE = {"visibility_respected": "keys are chosen by a learned top-k, which follows the regularized hidden states"}
_POOLED = {"train_differs": "keys are pooled, so no key belongs to one token and TLM has nothing to hide"}

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
    "vjepa2": {"backends_agree": "its eager attention ignores the mask"},
}
