"""Plain PyTorch building blocks: attention, feed forward, norm, RoPE, LoRA, NF4, the head's loss, the transformer."""
