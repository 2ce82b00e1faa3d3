"""LoFiT, localized fine-tuning on head outputs, as a PEFT method.

Source: Yin, Ye, Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024, arXiv 2406.01563.

    model = get_peft_model(model, LofitConfig(heads=[(12, 3), (14, 7)], task_type="CAUSAL_LM"))

Everything of PEFT works with it: training, ``save_pretrained``, ``PeftModel.from_pretrained``, several adapters,
``disable_adapter``, ``merge_and_unload``. A process that loads such an adapter imports ``attn_hooks`` first.

Which heads: ``select_heads`` after a first stage with ``component="scale"`` and ``L1Penalty``. ``RedConfig`` is a
baseline on the feed-forward networks.
"""

from attn_hooks.lofit.config import PEFT_NAME as LOFIT
from attn_hooks.lofit.config import LofitConfig
from attn_hooks.lofit.layer import LofitLayer
from attn_hooks.lofit.model import LofitModel
from attn_hooks.lofit.peft_type import register
from attn_hooks.lofit.penalty import L1Penalty, add_l1_penalty
from attn_hooks.lofit.red import PEFT_NAME as RED
from attn_hooks.lofit.red import RedConfig, RedLayer, RedModel
from attn_hooks.lofit.selection import random_heads, rank_heads, read_top_heads, select_heads

__all__ = [
    "L1Penalty",
    "LofitConfig",
    "LofitLayer",
    "LofitModel",
    "RedConfig",
    "RedLayer",
    "RedModel",
    "add_l1_penalty",
    "random_heads",
    "rank_heads",
    "read_top_heads",
    "select_heads",
]

register(LOFIT, LofitConfig, LofitModel)
register(RED, RedConfig, RedModel)
