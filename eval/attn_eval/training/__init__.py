"""Fine-tuning of a few heads (LoFiT): its data, its recipes and the commands ``attn-hooks lofit select|train|eval``."""
