"""The same edit gives the same tokens whatever computes it: PyTorch, the kernels alone, or an epilogue on plain attention.

On a CPU the kernels run in Triton's interpreter, on a short prompt.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import attn_hooks
from attn_hooks import engine
from attn_kernels import AttentionInputs
from attn_kernels.edited_attention import dispatch
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.lowering import LoweredEdits, lower

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, NEW = (512, 24) if torch.cuda.is_available() else (70, 4)
EDITS = {
    "pasta": attn_hooks.PASTA(spans=[[(10, 20)]], alpha=0.05),
    "act": attn_hooks.ACT(alpha=1.5),
    "sink_scale": attn_hooks.SinkScale(scale=4.0),
    "head_affine": attn_hooks.HeadAffine(gain=torch.linspace(0.5, 1.5, 48).reshape(8, 6)),
}


@pytest.fixture(scope="module")
def model():
    model = AutoModelForCausalLM.from_pretrained(attn_hooks.testbed_path("testbed-lm"), dtype=torch.float32)
    return model.to(DEVICE).eval()


def generate(model, edit: attn_hooks.Edit) -> tuple[list[int], set[str]]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(10, model.config.vocab_size, (1, PROMPT), generator=generator).to(DEVICE)
    with attn_hooks.editing(model, edit), torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        paths = {path for _, path, _ in attn_hooks.wrapping.wrapping_of(model, "test").recorder.paths}
    return tokens[0, PROMPT:].tolist(), paths


@pytest.mark.parametrize("name", EDITS)
def test_paths_agree(name: str, model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "has_kernels", lambda inputs: False)
    expected, paths = generate(model, EDITS[name])
    assert paths <= {"pytorch", "backend + affine"}

    monkeypatch.setattr(engine, "has_kernels", lambda inputs: True)
    monkeypatch.setattr(dispatch, "on_gpu", lambda inputs: True)
    by_kernels, paths = generate(model, EDITS[name])
    assert "decode" in paths and "pytorch" not in paths
    assert by_kernels == expected

    def plain(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        output, log_sum_exp = edited_flash(inputs, lower(inputs, []), with_log_sum_exp=True)
        assert log_sum_exp is not None
        return output, log_sum_exp

    def by_epilogue(inputs: AttentionInputs, lowered: LoweredEdits) -> dispatch.Path:
        is_decode = inputs.num_queries == 1
        return dispatch.Path("decode" if is_decode else "vendor + epilogue", "test")

    if name == "head_affine":
        return
    # float32 has no vendor attention that returns its log-sum-exp, so plain attention is the kernel's here.
    monkeypatch.setattr(dispatch, "vendor_attention", plain)
    monkeypatch.setattr(dispatch, "vendor_refusal", lambda inputs: None)
    monkeypatch.setattr(dispatch, "choose", by_epilogue)
    by_vendor, paths = generate(model, EDITS[name])
    assert paths == {"vendor + epilogue", "decode"}
    assert by_vendor == expected
