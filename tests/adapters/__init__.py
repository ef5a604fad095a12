"""SORSA and BA-LoRA on PEFT."""
