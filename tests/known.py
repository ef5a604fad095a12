"""Properties that are known not to hold for a type, and why: `{model_type: {property: reason}}`."""

_POOLED = {"train_differs": "keys are pooled, so no key belongs to one token and TLM has nothing to hide"}

KNOWN: dict[str, dict[str, str]] = {
    "cvt": _POOLED,
    "glpn": _POOLED,
    "pvt_v2": _POOLED,
    "segformer": _POOLED,
    "vjepa2": {"backends_agree": "its eager attention ignores the mask"},
}
