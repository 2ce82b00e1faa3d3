"""Sink dimensions are found where they were planted, and VAR finds its sinks with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import attn_hooks
from attn_hooks import VAR, AttnHooksError
from attn_hooks.sinks import find_sink_dims
from tests.hooks import snapshot, vlms
from tests.models import left_padded, llama, prompts

PLANTED, EVERYWHERE, TAU = 7, 12, 4.0


@pytest.fixture
def model() -> Any:
    """BOS carries dimension 7 through all layers; every other token dimension 12."""
    model = llama()
    embeddings = model.model.embed_tokens.weight.data
    embeddings[:, EVERYWHERE] = 30.0
    embeddings[1, EVERYWHERE] = 0.0
    embeddings[1, PLANTED] = -30.0
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_planted_dimension_is_found_at_its_token(model: Any, wrapped: bool) -> None:
    before = snapshot.take(model)
    if wrapped:
        attn_hooks.wrap(model, "sink_scale")
    ids, mask = left_padded((14, 9, 12))
    measured = find_sink_dims(model, tau=TAU, input_ids=ids, attention_mask=mask)
    assert measured.dims == (PLANTED,)
    about = {found.dim: found for found in measured.found}
    assert about.keys() == {PLANTED, EVERYWHERE}
    assert about[PLANTED].layers == measured.layers == (2, 3, 4)
    assert about[PLANTED].token_id == int(ids[about[PLANTED].row, about[PLANTED].position]) == 1
    assert measured.tokens == 35
    assert about[PLANTED].share == pytest.approx(3 / 35)
    assert about[EVERYWHERE].share == pytest.approx(32 / 35)
    assert TAU < about[PLANTED].strongest <= measured.strongest < 32**0.5
    attn_hooks.unwrap(model)
    assert snapshot.changes(before, model) == []


def test_padding_does_not_count(model: Any) -> None:
    """The pad token is massive in a dimension of its own."""
    model.model.embed_tokens.weight.data[0, 3] = 1000.0
    ids, mask = left_padded()
    assert 3 in {found.dim for found in find_sink_dims(model, tau=TAU, input_ids=ids).found}
    measured = find_sink_dims(model, tau=TAU, input_ids=ids, attention_mask=mask)
    assert 3 not in {found.dim for found in measured.found}


def test_what_is_measured_is_what_var_takes(model: Any) -> None:
    """BOS is then VAR's only sink, and without a sink in the image nothing is moved."""
    ids = prompts(image=True)
    dims = find_sink_dims(model, tau=TAU, input_ids=ids).dims
    with torch.no_grad():
        before = model(ids).logits
        with attn_hooks.editing(model, VAR(dims=dims, tau=TAU, summ=0.0, rho=0.0)):
            assert torch.equal(model(ids).logits, before)
        model.model.embed_tokens.weight.data[ids[0, 1], PLANTED] = -300.0
        before = model(ids).logits
        with attn_hooks.editing(model, VAR(dims=dims, tau=TAU, summ=0.0, rho=0.0)):
            after = model(ids).logits
    assert torch.equal(after, before)  # every image token is a sink: there is no other to give to


def test_an_offloaded_model(model: Any) -> None:
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert find_sink_dims(offloaded, tau=TAU, input_ids=prompts()).dims == (PLANTED,)


def test_a_prompt_with_images() -> None:
    case = vlms.CASES["llava"]
    text_config = case.config["text_config"] | {"num_hidden_layers": 3}
    model = replace(case, config=case.config | {"text_config": text_config}).model()
    model.get_input_embeddings().weight.data[vlms.BOS, PLANTED] = 100.0
    measured = find_sink_dims(model, tau=TAU, **case.inputs())
    assert (measured.dims, measured.layers) == ((PLANTED,), (2,))
    assert measured.tokens == int(case.inputs()["attention_mask"].sum())
    with pytest.raises(AttnHooksError, match="it has 2 layers"):
        find_sink_dims(case.model(), **case.inputs())


def test_nothing_is_found_where_nothing_stands_out() -> None:
    measured = find_sink_dims(llama(), input_ids=prompts())
    assert measured.found == measured.dims == ()
    assert 1.0 < measured.strongest < 32**0.5
