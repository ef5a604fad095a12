"""Properties that are known not to hold for a type, and why: `{model_type: {property: reason}}`."""

_POOLED = {"train_differs": "keys are pooled, so no key belongs to one token and TLM has nothing to hide"}

KNOWN: dict[str, dict[str, str]] = {
    "cvt": _POOLED,
    "glpn": _POOLED,
    "pvt_v2": _POOLED,
    "segformer": _POOLED,
    "vjepa2": {"backends_agree": "its eager attention ignores the mask"},
}

# Types with attention in which no FFN is found, and why; every other type with attention must have one.
WITHOUT_FFN: dict[str, str] = {
    "sam3_lite_text_mask_decoder": "has none: its layers are projections and convolutions",
    "sam3_mask_decoder": "has none: its layers are projections and convolutions",
    "superglue": "its MLPs map keypoints joined with messages, so that no layer undoes another's width",
}
