"""The methods that need an image, on a tiny random model of each family of vision-language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attn_hooks
from attn_hooks import AGLA, DAMRO, EAH, PAI, SPIN, VAR, VCD, VHR, AttnHooksError, Edit, Imbalanced, Opera
from attn_hooks.methods.var import sink_strength
from tests.hooks import vlms

# A prefix LM, whose attention is not causal and not edited.
FAMILIES = sorted(set(vlms.CASES) - {"paligemma"})


@dataclass(frozen=True)
class Case:
    """A method with parameters that change nothing and some that do, given a model and its inputs."""

    active: Callable[[Any, dict[str, Any]], Edit]
    neutral: Callable[[Any, dict[str, Any]], Edit]


def var(p: float) -> Callable[[Any, dict[str, Any]], Edit]:
    def edit(model: Any, inputs: dict[str, Any]) -> Edit:
        """Half of the first prompt's image tokens are sinks."""
        (first, *_) = attn_hooks.inspect_model(model).layers
        entered: list[torch.Tensor] = []
        handle = model.get_submodule(first.decoder_layer).register_forward_pre_hook(
            lambda _layer, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
        is_image = attn_hooks.layout_of(model, **inputs).is_image[0]
        tau = float(sink_strength(entered[0], (0,))[0, is_image].median())
        return VAR(dims=(0,), tau=tau, summ=0.0, rho=0.0, p=p, layers=(first.index,))

    return edit


def same(edit: Edit) -> Callable[[Any, dict[str, Any]], Edit]:
    """For every model."""
    return lambda _model, _inputs: edit


LAYERS = (0, 1)
REFUSED = {
    (method, family)
    for method in ("damro", "imbalanced")
    for family in FAMILIES
    if family not in ("llava", "llava, full features")
} | {
    # Crops and videos, and towers whose normalisation is not known.
    *(("agla", family) for family in FAMILIES if not family.startswith("llava") and family != "gemma3"),
    *(("agla", family) for family in FAMILIES if family.startswith("llava_")),
    ("vcd", "blip-2"),
    ("vcd", "instructblip"),
    ("vhr", "gemma3"),
    # Positions of their own, sliding windows, and generation without the model's forward.
    *(("opera", family) for family in FAMILIES if "qwen" in family or "blip" in family or "gemma" in family),
}
CASES = {
    "agla": Case(
        active=same(AGLA(beta=0.0, keep=0.5, layers=LAYERS)), neutral=same(AGLA(alpha=0.0, beta=0.0, layers=LAYERS))
    ),
    "damro": Case(active=same(DAMRO(beta=0.0, tokens=3)), neutral=same(DAMRO(alpha=0.0, beta=0.0))),
    "eah": Case(active=same(EAH(threshold=0.0)), neutral=same(EAH(threshold=1.0))),
    "imbalanced": Case(
        active=same(Imbalanced(gamma=1.0, alpha=2.0, layers=LAYERS)),
        neutral=same(Imbalanced(gamma=1.0, alpha=0.0, beta=0.0, layers=LAYERS)),
    ),
    "opera": Case(
        active=same(Opera(faithful="code", alpha=30.0, candidates=100)),
        neutral=same(Opera(alpha=0.0, candidates=vlms.VOCAB_SIZE)),
    ),
    "pai": Case(
        active=same(PAI(gamma=1.0, alpha=2.0, layers=LAYERS)), neutral=same(PAI(gamma=1.0, alpha=0.0, layers=LAYERS))
    ),
    "spin": Case(active=same(SPIN(r=0.5)), neutral=same(SPIN(eps=1.0))),
    "var": Case(active=var(p=0.0), neutral=var(p=1.0)),
    "vcd": Case(active=same(VCD(beta=0.0)), neutral=same(VCD(alpha=0.0, beta=0.0))),
    "vhr": Case(active=same(VHR(layers=LAYERS)), neutral=same(VHR(alpha=1.0, layers=LAYERS))),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_it_acts_on_every_family_and_leaves_no_trace(method: str, family: str) -> None:
    """A padded batch with two images or more, none and one; prompt and decode."""
    model, inputs = vlms.CASES[family].model(), vlms.CASES[family].inputs()
    before = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    active, neutral = CASES[method].active(model, inputs), CASES[method].neutral(model, inputs)
    if (method, family) in REFUSED:
        with pytest.raises(AttnHooksError, match=type(model).__name__):
            attn_hooks.wrap(model, active)(**inputs)
        return
    with attn_hooks.editing(model, neutral):
        torch.testing.assert_close(model(**inputs).logits[real], before[real], rtol=1e-4, atol=1e-5)
    with attn_hooks.editing(model, active):
        after = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        (done,) = attn_hooks.report(model).edits
    with_image, without = ((after[row] - before[row])[real[row]].abs().max() for row in (0, 1))
    assert with_image > 1e-6 > without
    assert done.calls["decode"] == 2 * max(1, len(done.layers))
    assert torch.equal(model(**inputs).logits, before)
