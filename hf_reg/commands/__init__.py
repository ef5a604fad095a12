"""What the commands of `hf-reg` do. Nothing here imports torch before a command needs it."""
