"""Training: resumed, stopped early, stopped at a loss that is not finite, and DPO's loss against its formula."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import set_seed

from attn_eval.errors import EvaluationError
from attn_eval.training.encoding import OpenPromptEncoder
from attn_eval.training.examples import Completion, DataSplits, Preference
from attn_eval.training.measuring import continuation_scores
from attn_eval.training.recipe import LofitRecipe
from attn_eval.training.stages import (
    ADAPTER,
    CHECKPOINTS,
    LAST_GOOD,
    LOG,
    LossNotFinite,
    PreferenceTrainer,
    StoppingTrainer,
    _trainer,
    final_losses,
    train_stage,
)
from attn_hooks.lofit import LofitConfig
from attn_hooks.lofit.saved import read_adapter

HEADS = [(0, 1), (1, 2)]
ROWS = [Completion(str(number), f"{number} and", f" {number}", (str(number),)) for number in range(8)]
PAIRS = [Preference(str(number), f"{number} and", " yes", " no") for number in range(6)]


def recipe(**tuning: Any) -> LofitRecipe:
    return LofitRecipe.model_validate(
        {
            "name": "tiny",
            "model": "tiny",
            "data": {"set": "kinship"},
            "selection": {"learning_rate": 1e-2},
            "tuning": {"learning_rate": 1e-2, "epochs": 2, "batch_size": 4} | tuning,
        }
    )


def adapted(model: Any) -> Any:
    set_seed(0)
    return get_peft_model(copy.deepcopy(model), LofitConfig(heads=HEADS, task_type="CAUSAL_LM"))


def splits(rows: Any = ROWS, validation: int = 2) -> DataSplits:
    return DataSplits(rows[validation:], rows[:validation], rows, "made here")


def fit(
    model: Any, tokenizer: Any, folder: Path, data: DataSplits | None = None, **tuning: Any
) -> list[dict[str, Any]]:
    asked = recipe(**tuning)
    return train_stage(model, tokenizer, data or splits(), asked.tuning, asked, folder, "tiny")


def vectors(folder: Path) -> torch.Tensor:
    return torch.stack(list(read_adapter(folder)[1].values()))


def test_training_lowers_the_loss_and_leaves_an_adapter_and_its_log(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    seen = DataSplits(ROWS, ROWS, ROWS, "made here")
    log = fit(adapted(model), tokenizer, tmp_path, seen, learning_rate=0.3, epochs=4)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / LOG).read_text()) == log
    assert final_losses(log)["eval_loss"] == losses[-1]
    assert vectors(tmp_path / ADAPTER).shape == (2, 8)
    assert not (tmp_path / CHECKPOINTS).exists()


def test_a_training_that_was_stopped_goes_on_to_the_same_adapter(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(adapted(model), tokenizer, tmp_path / "whole", epochs=3)
    whole = StoppingTrainer.task_loss
    steps = 0

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += self.model.training
        if steps > 4:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(StoppingTrainer, "task_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(adapted(model), tokenizer, tmp_path / "parts", epochs=3)
    assert not (tmp_path / "parts" / ADAPTER).exists()
    monkeypatch.setattr(StoppingTrainer, "task_loss", whole)
    log = fit(adapted(model), tokenizer, tmp_path / "parts", epochs=3)
    assert torch.equal(vectors(tmp_path / "whole" / ADAPTER), vectors(tmp_path / "parts" / ADAPTER))
    assert [entry["epoch"] for entry in log if "eval_loss" in entry] == [1.0, 2.0, 3.0]


def test_the_same_seed_trains_the_same_and_accumulation_changes_nothing(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    for name, settings in (("one", {}), ("again", {}), ("accumulated", {"accumulation": 2})):
        fit(adapted(model), tokenizer, tmp_path / name, **settings)
    one, again, accumulated = (vectors(tmp_path / name / ADAPTER) for name in ("one", "again", "accumulated"))
    assert torch.equal(one, again)
    torch.testing.assert_close(one, accumulated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["completions", "preferences"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    rows: Any, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loss_nan_after(2, PreferenceTrainer if rows is PAIRS else StoppingTrainer, monkeypatch)
    with pytest.raises(EvaluationError, match=r"the loss is nan at step 3, so training stopped.*last_good") as caught:
        fit(adapted(model), tokenizer, tmp_path, splits(rows), epochs=9, batch_size=2)
    assert "Lower the learning_rate (0.01)" in str(caught.value)
    assert vectors(tmp_path / LAST_GOOD).isfinite().all()
    assert not (tmp_path / ADAPTER).exists()


def make_loss_nan_after(steps: int, trainer: type[StoppingTrainer], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer.task_loss
    trained = 0

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal trained
        trained += self.model.training
        computed = whole(self, *args, **kwargs)
        return computed * float("nan") if trained > steps else computed

    monkeypatch.setattr(trainer, "task_loss", poisoned)


def test_the_last_good_state_is_the_one_before_the_step_that_broke_it(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = adapted(model)
    before = [value.detach().clone() for value in adapter.parameters() if value.requires_grad]
    asked = recipe()
    trainer = _trainer(adapter, tokenizer, splits(), asked.tuning, asked, tmp_path, ())
    batch = trainer.data_collator([trainer.train_dataset[0]])
    adapter.train()
    trainer.compute_loss(adapter, batch)
    with torch.no_grad():
        for value in adapter.parameters():
            if value.requires_grad:
                value.fill_(float("inf"))
    with pytest.raises(LossNotFinite, match="the loss is nan at step 1"):
        trainer.compute_loss(adapter, batch)
    trainer.restore_last_good()
    after = [value for value in adapter.parameters() if value.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_early_stopping_ends_training_and_keeps_the_best_epoch(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    log = fit(adapted(model), tokenizer, tmp_path, learning_rate=30.0, epochs=12, early_stopping=1)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) < 12
    assert losses[-1] >= min(losses)
    scored = adapted(model)
    scored.load_adapter(str(tmp_path / ADAPTER), "kept")
    scored.set_adapter("kept")
    kept = _mean_loss(scored.eval(), tokenizer, ROWS[:2])
    assert kept == pytest.approx(min(losses), rel=1e-4)
    with pytest.raises(EvaluationError, match="early_stopping needs validation examples"):
        fit(adapted(model), tokenizer, tmp_path / "none", splits(validation=0), early_stopping=1)


def _mean_loss(model: Any, tokenizer: Any, rows: list[Completion]) -> float:
    encoder = OpenPromptEncoder(tokenizer)
    pairs = [(row.prompt, row.completion) for row in rows]
    tokens = sum(len(tokenizer(row.completion)["input_ids"]) + 1 for row in rows)
    return -sum(continuation_scores(model, encoder, pairs, 4, end=True)) / tokens


def test_dpo_is_its_formula_with_the_model_without_adapter_as_reference(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = adapted(model)
    with torch.no_grad():
        for value in adapter.parameters():
            if value.requires_grad:
                value.normal_(std=0.5)
    asked = recipe(batch_size=2)
    trainer = _trainer(adapter, tokenizer, splits(PAIRS), asked.tuning, asked, tmp_path, ())
    rows = [trainer.train_dataset[0], trainer.train_dataset[1]]
    loss = trainer.compute_loss(adapter.eval(), trainer.data_collator(rows))
    encoder, expected = OpenPromptEncoder(tokenizer), []
    for pair in PAIRS[2:4]:
        asked_for = [(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
        policy = continuation_scores(adapter, encoder, asked_for, 2, end=True)
        reference = continuation_scores(model, encoder, asked_for, 2, end=True)
        margin = (policy[0] - policy[1]) - (reference[0] - reference[1])
        expected.append(-torch.nn.functional.logsigmoid(torch.tensor(0.5 * margin)))
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    assert abs(float(loss.detach()) - 0.6931) > 1e-3


def test_dpo_begins_at_log_2_and_falls(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    log = fit(adapted(model), tokenizer, tmp_path, splits(PAIRS), learning_rate=0.3, epochs=4, accumulation=2)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0] < 0.70
