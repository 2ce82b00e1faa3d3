"""The L1 term of LoFiT's first stage: lambda * sum of |A|, for any task loss and any training loop.

Its gradient, lambda * sign(A), is added as the optimizer steps, and not to the loss: there it would be counted once for each
batch that is accumulated, and be missing from losses that the trainer computes by itself, DPO's above all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attn_hooks.errors import error
from attn_hooks.lofit.config import METHOD
from attn_hooks.lofit.layer import LofitLayer

PUBLISHED_WEIGHT = 5e-4


def add_l1_penalty(optimizer: Optimizer, model: nn.Module, weight: float = PUBLISHED_WEIGHT) -> RemovableHandle:
    """From now on each ``optimizer.step()`` adds ``weight * sign`` to the gradient of LoFiT's trainable vectors in ``model``.

    Once for a training loop of one's own, after ``accelerator.prepare`` if there is one. It comes after clipping, and after a
    ``GradScaler`` has undone its scale. ``handle.remove()`` ends it. The default is the paper's for TruthfulQA and MQuAKE on 7B.

    Raises ``EditError`` if the model has no such vectors or the optimizer does not step them themselves (but flat copies, as
    DeepSpeed's does), at a step also if one has no gradient.
    """
    if not 0 <= weight < float("inf"):
        raise error("bad-parameters", method=METHOD, detail=f"weight: must be 0 or more (got {weight})")
    vectors = {
        name: parameter
        for place, layer in model.named_modules()
        if isinstance(layer, LofitLayer)
        for name, parameter in layer.named_parameters(prefix=place)
        if "lofit_" in name.removeprefix(place) and parameter.requires_grad
    }
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not vectors:
        raise error("l1-without-effect", reason="the model has no vectors of LoFiT that are trained")
    for name, parameter in vectors.items():
        if id(parameter) not in stepped:
            raise error("l1-without-effect", reason=f"the optimizer does not step {name} itself")

    def before_step(*_: Any) -> None:
        for name, parameter in vectors.items():
            if parameter.grad is None:
                raise error("l1-without-effect", reason=f"{name} has no gradient at a step of the optimizer")
            parameter.grad.add_(torch.sign(parameter.detach()).to(parameter.grad), alpha=weight)

    # accelerate's wrapper calls the optimizer inside, and hooks on the wrapper never run.
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    handle: RemovableHandle = optimizer.register_step_pre_hook(before_step)
    return handle


class L1Penalty(TrainerCallback):
    """``add_l1_penalty`` for ``Trainer`` and what derives from it: ``callbacks=[L1Penalty(5e-4)]``.

    ``weight``: the paper's lambda. Training and evaluation losses are logged without the term.
    """

    def __init__(self, weight: float = PUBLISHED_WEIGHT) -> None:
        self.weight = weight
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        self._handle = add_l1_penalty(kwargs["optimizer"], kwargs["model"], self.weight)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Also of a training that was interrupted, whose optimizer the next one may go on with."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
