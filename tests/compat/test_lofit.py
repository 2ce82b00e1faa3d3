"""LoFiT on every causal-LM family that uses the interface: acts, is disabled exactly, and merges; see tests/lofit for a few."""

from __future__ import annotations

import pytest
from peft import get_peft_model

from attn_hooks import AttnHooksError, inspect_model
from attn_hooks.lofit import LofitConfig
from tests.families import Family, build_tiny, causal_lm_families, token_ids
from tests.hooks.tiny import logits

# The code of what is refused, and where: at the start or at the merge.
REFUSED = {
    "deepseek_v4": "no-output-projection",
    "jetmoe": "no-output-projection",
    "moshi": "not-mergeable",
}


@pytest.mark.compat
@pytest.mark.parametrize("family", causal_lm_families(), ids=lambda family: family.name)
def test_family(family: Family) -> None:
    try:
        model = build_tiny(family)
        last = inspect_model(model).layers[-1]
    except Exception:
        pytest.skip("not one of the families of docs/compatibility.md")
    tokens = token_ids(family, model)
    plain = logits(model, tokens)
    try:
        model = get_peft_model(model, LofitConfig(heads=[(last.index, last.num_heads - 1)], init_std=1.0)).eval()
        edited = logits(model, tokens)
        assert (edited - plain).abs().max() > 1e-4
        with model.disable_adapter():
            assert (logits(model, tokens) == plain).all()
        merged = logits(model.merge_and_unload(), tokens)
    except AttnHooksError as refused:
        assert refused.code == REFUSED.get(family.name)
        return
    assert family.name not in REFUSED
    assert (merged - edited).abs().max() < 1e-5 * (1 + edited.abs().max())
