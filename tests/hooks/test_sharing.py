"""What the layers of a forward share, and what they must not."""

from __future__ import annotations

import copy

import torch

import attn_hooks
from attn_hooks import PASTA, HeadAffine, SinkScale
from tests.models import FAMILIES


def test_a_model_whose_layers_see_other_keys_is_edited_as_each_layer_needs() -> None:
    """Layers with and without a sliding window, one edit with heads and one without: as each edit alone in each layer."""
    model = FAMILIES["gpt_oss"]()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (2, 24), generator=generator)
    layers = range(model.config.num_hidden_layers)
    with torch.no_grad(), attn_hooks.editing(model, SinkScale(scale=3.0), PASTA(spans=[[(2, 5)]])):
        together = model(ids, use_cache=False).logits
    alone = [SinkScale(scale=3.0, layers=(layer,)) for layer in layers]
    alone += [PASTA(spans=[[(2, 5)]], layers=(layer,)) for layer in layers]
    with torch.no_grad(), attn_hooks.editing(model, *alone):
        torch.testing.assert_close(model(ids, use_cache=False).logits, together)


def test_a_copy_of_a_wrapped_model_shares_nothing_with_it() -> None:
    model = attn_hooks.wrap(FAMILIES["llama"](), attn_hooks.Ablate(heads={0: [1]}))
    ids = torch.randint(5, 50, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        other = copy.deepcopy(model)
        attn_hooks.unwrap(model)
        torch.testing.assert_close(other(ids).logits, expected)


def test_a_forward_without_gradients_keeps_nothing_from_training() -> None:
    model = FAMILIES["llama"]()
    edit = HeadAffine(gain=torch.full((model.config.num_hidden_layers, model.config.num_attention_heads), 0.7))
    assert edit.gain is not None
    edit.gain.requires_grad_()
    ids = torch.randint(3, 20, (2, 9))
    with attn_hooks.editing(model, edit):
        with torch.no_grad():
            before = model(ids).logits
        with torch.enable_grad():
            model(ids).logits.square().sum().backward()
        assert edit.gain.grad is not None
        assert bool((edit.gain.grad != 0).any(-1).all())
        with torch.no_grad():
            edit.gain.fill_(0.1)
            assert not torch.equal(model(ids).logits, before)
