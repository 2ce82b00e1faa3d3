"""head_affine and ablate against the same change made at o_proj's input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_hooks
from attn_hooks import Ablate, Edit, HeadAffine
from tests.methods.cases import GAIN, OFFSET
from tests.models import left_padded, llama


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def affine(layer: int, z: Tensor) -> Tensor:
    return z * GAIN[layer][:, None] + OFFSET[layer]


def silence(layer: int, z: Tensor) -> Tensor:
    z = z.clone()
    for at, head in ((1, 2), (3, 0)):
        if at == layer:
            z[..., head, :] = 0
    return z


@pytest.mark.parametrize(
    ("edit", "change"),
    [(HeadAffine(gain=GAIN, offset=OFFSET), affine), (Ablate(heads=((1, 2), (3, 0))), silence)],
    ids=["head_affine", "ablate"],
)
def test_equals_a_hook_on_the_output_projection(edit: Edit, change) -> None:
    model = llama()
    ids, mask = left_padded()
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, index=index: (change(index, args[0].unflatten(-1, (4, 8))).flatten(-2),)
        )
        for index, layer in enumerate(model.model.layers)
    ]
    expected = model(ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    with attn_hooks.editing(model, edit):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited, expected, rtol=1e-6, atol=1e-6)


def test_nested_lists_as_a_recipe_gives_them() -> None:
    assert torch.equal(HeadAffine(gain=GAIN.tolist()).gain, GAIN)
