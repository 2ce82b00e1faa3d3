"""The first stage of LoFiT: the L1 term in any training loop, the ranking by norms, and heads that a teacher has planted."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import Trainer, TrainingArguments

import attn_hooks
from attn_hooks import AttnHooksError
from attn_hooks.lofit import (
    L1Penalty,
    LofitConfig,
    LofitLayer,
    add_l1_penalty,
    random_heads,
    rank_heads,
    read_top_heads,
    select_heads,
)
from tests.families import build_tiny, family
from tests.hooks.tiny import HEAD_DIM, NUM_HEADS, NUM_LAYERS, logits, prompt, tiny_llama

ALL_HEADS = list(itertools.product(range(NUM_LAYERS), range(NUM_HEADS)))
WEIGHT = 0.03


def adapted(component: str = "scale", heads: Any = None, init_std: float = 1e-3, seed: int = 0) -> PeftModel:
    model = tiny_llama(seed=seed)
    return get_peft_model(model, LofitConfig(heads=heads, component=component, init_std=init_std))


def vectors_of(model: PeftModel) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def refusal(code: str) -> Any:
    return pytest.raises(AttnHooksError, match=rf"\[{code}\]")


# Heads whose scales another model hides


@pytest.mark.parametrize("seed", range(3))
def test_planted_heads_are_selected(seed: int) -> None:
    planted = random.Random(seed).sample(ALL_HEADS, 3)
    teacher = adapted(heads=planted, init_std=2.0, seed=seed).eval()
    torch.manual_seed(seed)
    model = adapted(seed=seed).eval()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-2, weight_decay=0.0
    )
    add_l1_penalty(optimizer, model, weight=5e-3)
    for step in range(150):
        tokens = prompt(batch=8, seed=100 + step)
        divergence = kl_div(
            model(tokens).logits.log_softmax(-1),
            logits(teacher, tokens).log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        optimizer.zero_grad()
        (divergence / tokens.numel()).backward()
        optimizer.step()
    ranked = rank_heads(model)
    assert sorted((layer, head) for layer, head, _ in ranked[:3]) == sorted(planted)
    assert ranked[2][2] > 1.5 * ranked[3][2]


# The L1 term


def one_step(model: PeftModel, weight: float | None) -> Tensor:
    """How plain SGD at a learning rate of 1 moves the vectors."""
    before = vectors_of(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    if weight is not None:
        add_l1_penalty(optimizer, model, weight)
    model(prompt(), labels=prompt()).loss.backward()
    optimizer.step()
    return vectors_of(model) - before


@pytest.mark.parametrize("component", ["scale", "offset"])
def test_the_penalty_is_the_gradient_of_the_absolute_values(component: str) -> None:
    torch.manual_seed(1)
    penalised = adapted(component, init_std=0.1)
    plain = adapted(component)
    plain.load_state_dict(penalised.state_dict())
    expected = one_step(plain, None) - WEIGHT * vectors_of(penalised).sign()
    torch.testing.assert_close(one_step(penalised, WEIGHT), expected)


def test_the_penalty_ends_when_its_handle_is_removed() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    add_l1_penalty(optimizer, model, WEIGHT).remove()
    before = vectors_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert torch.equal(vectors_of(model), before)


def test_under_accelerate() -> None:
    """Whose optimizer is a wrapper."""
    torch.manual_seed(1)
    model = adapted(init_std=0.1)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    add_l1_penalty(optimizer, model, WEIGHT)
    before = vectors_of(model)
    (0.0 * model(prompt(), labels=prompt()).loss).backward()
    optimizer.step()
    torch.testing.assert_close(vectors_of(model) - before, -WEIGHT * before.sign())


def trained(
    folder: Path, callbacks: list[Any], batch: int = 8, accumulation: int = 1, trains: int = 1, **options: Any
) -> PeftModel:
    torch.manual_seed(5)
    model = adapted()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = [{"input_ids": row, "labels": row} for row in prompt(batch=8)]
    trainer = Trainer(model, TrainingArguments(**(settings | options)), train_dataset=rows, callbacks=callbacks)
    for _ in range(trains):
        trainer.train()
    return model


def test_gradient_accumulation_leaves_the_penalty_as_it_is(tmp_path: Path) -> None:
    at_once = vectors_of(trained(tmp_path, [L1Penalty(WEIGHT)]))
    in_parts = vectors_of(trained(tmp_path, [L1Penalty(WEIGHT)], batch=2, accumulation=4))
    without = vectors_of(trained(tmp_path, []))
    assert (at_once - without).abs().max() > 1e-3
    torch.testing.assert_close(in_parts, at_once, rtol=1e-4, atol=1e-6)


def test_clipping_leaves_the_penalty_as_it_is(tmp_path: Path) -> None:
    """A task gradient clipped to almost nothing: only the penalty moves the vectors, 4 steps of lr * weight."""
    before = vectors_of(trained(tmp_path, [], learning_rate=0.0))
    after = vectors_of(trained(tmp_path, [L1Penalty(1e-4)], max_grad_norm=1e-12))
    far = before.abs() > 1e-5
    torch.testing.assert_close((after - before)[far], (-4 * 1e-2 * 1e-4 * before.sign())[far], rtol=1e-2, atol=1e-9)


def test_a_second_training_does_not_add_it_twice(tmp_path: Path) -> None:
    penalty = L1Penalty(1e-4)
    before = vectors_of(trained(tmp_path, [], learning_rate=0.0))
    after = vectors_of(trained(tmp_path, [penalty], max_grad_norm=1e-12, trains=2))
    far = before.abs() > 1e-4
    torch.testing.assert_close((after - before)[far], (-8 * 1e-2 * 1e-4 * before.sign())[far], rtol=1e-2, atol=1e-9)


def test_a_penalty_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    model = adapted()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with refusal("l1-without-effect"):
        add_l1_penalty(torch.optim.SGD(tiny_llama().parameters()), tiny_llama())
    with refusal("l1-without-effect"):
        add_l1_penalty(torch.optim.SGD(trainable[1:]), model)
    optimizer = torch.optim.SGD(trainable)
    add_l1_penalty(optimizer, model)
    with refusal("l1-without-effect"):
        optimizer.step()
    for weight in (-1.0, float("nan")):
        with refusal("bad-parameters"):
            add_l1_penalty(optimizer, model, weight)


# Both stages


def test_both_stages_under_trainer(tmp_path: Path) -> None:
    model = trained(tmp_path, [L1Penalty(5e-4)], optim="adamw_torch")
    heads = select_heads(model, share=0.1)
    assert len(heads) == 3
    model = model.unload()
    assert torch.equal(logits(model.eval()), logits(tiny_llama()))
    model = get_peft_model(model, LofitConfig(heads=heads))
    assert vectors_of(model).numel() == 3 * HEAD_DIM
    placed = {
        (layer.layer, head)
        for layer in model.modules()
        if isinstance(layer, LofitLayer)
        for head in layer.lofit_heads["default"].tolist()
    }
    assert placed == set(heads)


# The ranking


def with_norms(norms: dict[tuple[int, int], float], component: str = "scale") -> PeftModel:
    model = adapted(component, init_std=0.0)
    for layer in model.modules():
        if isinstance(layer, LofitLayer):
            rows = (layer.lofit_scale if component == "scale" else layer.lofit_offset)["default"].data
            for (at, head), norm in norms.items():
                if at == layer.layer:
                    # Not of one sign, and not in one coordinate: the norm is Euclidean.
                    rows[head] = norm * torch.tensor([0.6, -0.8, 0, 0, 0, 0, 0, 0])
    return model


@pytest.mark.parametrize("component", ["scale", "offset"])
def test_heads_are_ranked_by_their_norm(component: str, tmp_path: Path) -> None:
    norms = {(2, 5): 3.0, (0, 1): 2.0, (3, 7): 1.0}
    model = with_norms(norms, component)
    ranked = rank_heads(model)
    assert [(layer, head) for layer, head, _ in ranked[:3]] == list(norms)
    assert [norm for *_, norm in ranked[:4]] == pytest.approx([3.0, 2.0, 1.0, 0.0])
    assert sorted((layer, head) for layer, head, _ in ranked) == ALL_HEADS
    model.save_pretrained(tmp_path)
    assert rank_heads(tmp_path) == rank_heads(str(tmp_path)) == ranked


def test_how_many() -> None:
    model = with_norms({(2, 5): 3.0, (0, 1): 2.0, (3, 7): 1.0})
    assert select_heads(model) == [(2, 5)], "3 % of 32"
    assert select_heads(model, k=2) == [(2, 5), (0, 1)]
    assert select_heads(model, share=0.1) == [(2, 5), (0, 1), (3, 7)]
    assert len(select_heads(model, share=0.001)) == 1
    for wrong in ({"k": 0}, {"k": 33}, {"share": 0.0}, {"share": 1.5}, {"k": 3, "share": 0.1}):
        with refusal("bad-parameters"):
            select_heads(model, **wrong)


def test_of_several_adapters_one_is_ranked() -> None:
    model = with_norms({(2, 5): 3.0})
    model.add_adapter("other", LofitConfig(heads=[(1, 1)], component="offset"))
    assert select_heads(model, k=1) == [(2, 5)]
    assert select_heads(model, adapter_name="other") == [(1, 1)]
    model.base_model.set_adapter(["default", "other"])
    for call in (lambda: select_heads(model), lambda: select_heads(model, adapter_name="third")):
        with refusal("which-adapter"):
            call()
    with refusal("which-adapter"):
        select_heads(tiny_llama())


def test_diverged_vectors_are_not_ranked() -> None:
    with refusal("vectors-not-finite"):
        rank_heads(with_norms({(2, 5): float("nan")}))


def test_random_heads() -> None:
    model = tiny_llama()
    drawn = random_heads(model, k=8)
    assert len(set(drawn)) == 8 and set(drawn) <= set(ALL_HEADS)
    assert drawn == random_heads(adapted(), k=8), "of an adapted model, the same"
    assert drawn != random_heads(model, k=8, seed=1)
    assert len(random_heads(model)) == 1
    of_two_widths = build_tiny(family("laguna"))
    layers = attn_hooks.inspect_model(of_two_widths).layers
    every = [(layer.index, head) for layer in layers for head in range(layer.num_heads)]
    assert sorted(random_heads(of_two_widths, share=1.0)) == every


def test_the_paper_s_files(tmp_path: Path) -> None:
    path = tmp_path / "top_heads.npy"
    np.save(path, np.array([[13, 11], [0, 3], [31, 30]]))
    assert read_top_heads(path) == [(13, 11), (0, 3), (31, 30)]
    assert LofitConfig(heads=read_top_heads(path, k=2)).heads == [[0, 3], [13, 11]]
    with refusal("bad-parameters"):
        read_top_heads(path, k=4)
    np.save(path, np.zeros((3, 2)))
    with refusal("bad-top-heads"):
        read_top_heads(path)
    path.write_text("heads")
    with refusal("bad-top-heads"):
        read_top_heads(path)
    with refusal("bad-top-heads"):
        read_top_heads(tmp_path / "none.npy")
