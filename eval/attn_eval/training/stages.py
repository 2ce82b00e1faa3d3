"""One stage of training on transformers' ``Trainer``: resumed after a kill, stopped at a loss that is not finite."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from attn_eval.errors import EvaluationError
from attn_eval.runner import progress_bars
from attn_eval.training.encoding import (
    CompletionCollator,
    OpenPromptEncoder,
    PreferenceCollator,
    completion_features,
    pad_token,
    preference_features,
    sequence_log_probabilities,
)
from attn_eval.training.examples import Completion, DataSplits, Preference
from attn_eval.training.recipe import LofitRecipe, Stage

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
LAST_GOOD = "last_good"
LOG = "log.json"


class LossNotFinite(Exception):
    """The loss of a step is nan or infinite."""


class StoppingTrainer(Trainer):
    """Keeps the trained numbers of the last finite loss, and stops where a loss is not finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_good: dict[str, Tensor] = {}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        computed = self.task_loss(model, inputs, *args, **kwargs)
        loss = computed[0] if isinstance(computed, tuple) else computed
        if not bool(torch.isfinite(loss.detach())):
            raise LossNotFinite(f"the loss is {float(loss.detach()):g} at step {self.state.global_step + 1}")
        if model.training:
            self.last_good = {name: value.detach().clone() for name, value in _trained(self.model)}
        return computed

    def task_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The mean cross-entropy of the labels, over all batches of a step."""
        return super().compute_loss(model, inputs, *args, **kwargs)

    def restore_last_good(self) -> None:
        """Put back the trained numbers that gave the last finite loss."""
        with torch.no_grad():
            for name, value in _trained(self.model):
                if name in self.last_good:
                    value.copy_(self.last_good[name])


class PreferenceTrainer(StoppingTrainer):
    """DPO (arXiv 2305.18290) with the sigmoid loss; the reference is the model without its adapter.

    loss = -log sigmoid(beta * ((log p(chosen) - log p(rejected)) - (log r(chosen) - log r(rejected))))
    """

    def __init__(self, *args: Any, beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta
        # The mean over pairs is divided by the trainer when batches are accumulated.
        self.model_accepts_loss_kwargs = False

    def task_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        policy = sequence_log_probabilities(outputs.logits, inputs["labels"])
        gained = policy - inputs["reference"].to(policy)
        chosen, rejected = gained.chunk(2)
        loss = -nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean()
        returns_outputs = kwargs.get("return_outputs", bool(args and args[0]))
        return (loss, outputs) if returns_outputs else loss


class ConsoleProgress(TrainerCallback):
    """A bar over the steps, and the log in a file, written anew at each entry."""

    def __init__(self, progress: Progress, title: str, log: Path) -> None:
        self.progress, self.title, self.log = progress, title, log
        self.bar: TaskID | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        write_json(self.log, state.log_history)
        last = state.log_history[-1]
        shown = ", ".join(f"{key} {last[key]:.4f}" for key in ("loss", "eval_loss") if key in last)
        if self.bar is not None and shown:
            self.progress.update(self.bar, description=f"{self.title}, {shown}")


def train_stage(
    model: Any,
    tokenizer: Any,
    splits: DataSplits,
    stage: Stage,
    recipe: LofitRecipe,
    folder: Path,
    title: str,
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train what is trainable of a PEFT model, and save its adapter to ``folder/adapter``.

    A training that was stopped goes on at its last whole epoch.

    Args:
        model: of ``get_peft_model``.
        tokenizer: of the model.
        splits: the training and validation examples; without the latter nothing is measured between epochs.
        stage: how.
        recipe: seed, evaluation batch and DPO's beta.
        folder: holds checkpoints, ``log.json`` and the adapter.
        title: of the progress bar.
        callbacks: e.g. the L1 penalty.
        console: where progress goes; the standard error output by default.

    Returns:
        The log: losses by epoch and step.

    Raises:
        EvaluationError: the loss, or a trained number, is not finite. The last good state is in ``folder/last_good``.
    """
    console = console or Console(stderr=True)
    trainer = _trainer(model, tokenizer, splits, stage, recipe, folder, callbacks)
    checkpoints = folder / CHECKPOINTS
    resumed = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    with progress_bars(console) as progress:
        trainer.add_callback(ConsoleProgress(progress, title, folder / LOG))
        try:
            trainer.train(resume_from_checkpoint=resumed)
            if not all(bool(value.isfinite().all()) for _, value in _trained(model)):
                raise LossNotFinite(f"trained numbers are not finite behind step {trainer.state.global_step}")
        except LossNotFinite as stopped:
            raise _stopped(trainer, stopped, stage, folder) from stopped
    save_adapter(model, folder / ADAPTER)
    shutil.rmtree(checkpoints, ignore_errors=True)
    write_json(folder / LOG, trainer.state.log_history)
    return list(trainer.state.log_history)


def save_adapter(model: Any, folder: Path) -> None:
    """Save a PEFT model's adapter; the folder is there as a whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in two steps, so that a kill never leaves half a file."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@torch.no_grad()
def reference_log_probabilities(model: Any, features: Sequence[dict[str, Any]], batch_size: int, pad: int) -> None:
    """Give each of `preference_features` its ``reference``: (chosen, rejected) of the model without its adapter."""
    collate = PreferenceCollator(pad)
    with model.disable_adapter():
        for first in range(0, len(features), batch_size):
            here = features[first : first + batch_size]
            batch = {name: value.to(model.device) for name, value in collate(here).items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            chosen, rejected = sequence_log_probabilities(logits, batch["labels"]).chunk(2)
            for feature, *pair in zip(here, chosen.tolist(), rejected.tolist(), strict=True):
                feature["reference"] = tuple(pair)


def _trainer(
    model: Any,
    tokenizer: Any,
    splits: DataSplits,
    stage: Stage,
    recipe: LofitRecipe,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> StoppingTrainer:
    measured = len(splits.validation) > 0
    if stage.early_stopping is not None and not measured:
        raise EvaluationError("early_stopping needs validation examples, and the data have none")
    stopping = [EarlyStoppingCallback(stage.early_stopping)] if stage.early_stopping is not None else []
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        learning_rate=stage.learning_rate,
        num_train_epochs=stage.epochs,
        per_device_train_batch_size=stage.batch_size // stage.accumulation,
        gradient_accumulation_steps=stage.accumulation,
        per_device_eval_batch_size=recipe.eval_batch_size,
        optim="adamw_torch",
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        **({"gradient_checkpointing": True} if recipe.gradient_checkpointing else {}),
        eval_strategy="epoch" if measured else "no",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=stage.early_stopping is not None,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to="none",
        seed=recipe.seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
    )
    encoder, pad = OpenPromptEncoder(tokenizer), pad_token(tokenizer)
    options: dict[str, Any] = {"callbacks": [*callbacks, *stopping]}
    if isinstance(splits.train[0], Preference):
        train, validation = (
            preference_features(encoder, [row for row in part if isinstance(row, Preference)])
            for part in (splits.train, splits.validation)
        )
        model.eval()
        for part in (train, validation):
            reference_log_probabilities(model, part, recipe.eval_batch_size, pad)
        trainer: StoppingTrainer = PreferenceTrainer(
            model, arguments, PreferenceCollator(pad), train, validation or None, beta=recipe.dpo_beta, **options
        )
    else:
        train, validation = (
            completion_features(encoder, [row for row in part if isinstance(row, Completion)])
            for part in (splits.train, splits.validation)
        )
        trainer = StoppingTrainer(model, arguments, CompletionCollator(pad), train, validation or None, **options)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    set_seed(recipe.seed)
    return trainer


def _stopped(trainer: StoppingTrainer, stopped: LossNotFinite, stage: Stage, folder: Path) -> EvaluationError:
    kept = "nothing was trained by then"
    if trainer.last_good:
        trainer.restore_last_good()
        save_adapter(trainer.model, folder / LAST_GOOD)
        kept = f"the adapter of the last finite loss is in {folder / LAST_GOOD}"
    return EvaluationError(
        f"{stopped}, so training stopped; {kept}. Lower the learning_rate ({stage.learning_rate:g}), or use dtype: float32, "
        "and begin anew with --overwrite"
    )


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def final_losses(log: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The last training and validation loss of a log."""
    return {
        name: next(
            (float(entry[name]) for entry in reversed(log) if name in entry and math.isfinite(entry[name])), None
        )
        for name in ("loss", "eval_loss")
    }
