"""Edit the attention of pretrained Hugging Face models at inference time.

model = attn_hooks.wrap(model, "act")              # one call, same object, same class
with attn_hooks.editing(model, PASTA(spans=...)):  # or for a while
    model.generate(...)
attn_hooks.unwrap(model)                           # bit for bit what it was
"""

from attn_hooks.blip_relevance import BlipRelevance
from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit
from attn_hooks.errors import AttnHooksError, EditError, UnsupportedArgumentError, UnsupportedModelError
from attn_hooks.layout import ImageSpan, PatchGrid, TokenKind, TokenLayout
from attn_hooks.methods.ablate import Ablate
from attn_hooks.methods.act import ACT
from attn_hooks.methods.agla import AGLA
from attn_hooks.methods.anchor import AnchorAttention
from attn_hooks.methods.damro import DAMRO
from attn_hooks.methods.dynamic_mask import DynamicMask
from attn_hooks.methods.eah import EAH
from attn_hooks.methods.head_affine import HeadAffine
from attn_hooks.methods.imbalanced import Imbalanced
from attn_hooks.methods.iti import ITI
from attn_hooks.methods.lofit import LoFiT
from attn_hooks.methods.moba import MoBA
from attn_hooks.methods.opera import Opera
from attn_hooks.methods.pai import PAI
from attn_hooks.methods.pasta import PASTA
from attn_hooks.methods.power import PowerAttention
from attn_hooks.methods.s2 import S2Attention
from attn_hooks.methods.sink_scale import SinkScale
from attn_hooks.methods.spin import SPIN
from attn_hooks.methods.streaming import Streaming
from attn_hooks.methods.trishape import TriShape
from attn_hooks.methods.var import VAR
from attn_hooks.methods.vcd import VCD
from attn_hooks.methods.vertical_slash import VerticalSlash
from attn_hooks.methods.vhr import VHR
from attn_hooks.methods.xattention import XAttention
from attn_hooks.model_info import LayerInfo, ModelInfo, inspect_model, layout_of
from attn_hooks.paths import recipes_dir, testbed_path
from attn_hooks.peft_registration import register_with_peft
from attn_hooks.registry import build_edit, methods
from attn_hooks.reporting import explain, report
from attn_hooks.spans import find_spans
from attn_hooks.storage import load_edits, save_edits
from attn_hooks.wrapping import EditNeverActedWarning, editing, edits_in_force, unwrap, wrap

__all__ = [
    "ACT",
    "AGLA",
    "DAMRO",
    "EAH",
    "ITI",
    "PAI",
    "PASTA",
    "SPIN",
    "VAR",
    "VCD",
    "VHR",
    "Ablate",
    "AnchorAttention",
    "AttentionCall",
    "AttnHooksError",
    "BlipRelevance",
    "DynamicMask",
    "Edit",
    "EditError",
    "EditNeverActedWarning",
    "HeadAffine",
    "ImageSpan",
    "Imbalanced",
    "LayerInfo",
    "LoFiT",
    "MoBA",
    "ModelInfo",
    "Opera",
    "PatchGrid",
    "PowerAttention",
    "S2Attention",
    "SinkScale",
    "Streaming",
    "TokenKind",
    "TokenLayout",
    "TriShape",
    "UnsupportedArgumentError",
    "UnsupportedModelError",
    "VerticalSlash",
    "XAttention",
    "build_edit",
    "editing",
    "edits_in_force",
    "explain",
    "find_spans",
    "inspect_model",
    "layout_of",
    "load_edits",
    "methods",
    "recipes_dir",
    "report",
    "save_edits",
    "testbed_path",
    "unwrap",
    "wrap",
]

register_with_peft()
