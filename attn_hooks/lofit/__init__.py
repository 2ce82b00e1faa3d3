"""LoFiT, localized fine-tuning on head outputs, as a PEFT method.

Source: Yin, Ye, Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv 2406.01563.

    model = get_peft_model(model, LofitConfig(heads=[(12, 3), (14, 7)], task_type="CAUSAL_LM"))

Everything of PEFT works with it: training, ``save_pretrained``, ``PeftModel.from_pretrained``, several adapters,
``disable_adapter``, ``merge_and_unload``. A process that loads such an adapter imports ``attn_hooks`` first.
"""

from attn_hooks.lofit.config import LofitConfig
from attn_hooks.lofit.layer import LofitLayer
from attn_hooks.lofit.model import LofitModel
from attn_hooks.lofit.peft_type import register

__all__ = ["LofitConfig", "LofitLayer", "LofitModel"]

register(LofitConfig, LofitModel)
