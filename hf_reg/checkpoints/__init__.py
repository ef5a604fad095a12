"""Checkpoints that stock transformers and PEFT load: the `hf_reg` block beside the weights, loading and verifying."""
