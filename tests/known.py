"""Properties that are known not to hold for a type, and why: `{model_type: {property: reason}}`."""

KNOWN: dict[str, dict[str, str]] = {}
