"""What a family must show to count as compatible, each check on a tiny random model of it."""

from __future__ import annotations

import functools
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

import attn_hooks
from attn_hooks.call import AttentionCall
from attn_hooks.edit import Reads, Scope, Writes
from attn_kernels import Primitive, Regroup
from tests.compat.known_gaps import NOT_BUILT
from tests.compat.oracle import LiteralEdit, literally
from tests.families import Family, attention_modules, build_tiny, generation_arguments, token_ids
from tests.family_configs import NO_ATTENTION

TIME_LIMIT_SECONDS = 60
SOURCE_STRIDE = 3
# No multiple of the stride, so that positions counted from the padding would show.
PADDING = 4
KEEP = 0.25
GAIN = 3.0
EDITED_HEAD = 1
NEW_TOKENS = 5
# Ends no sequence early: every family generates the same number of tokens.
NO_SUCH_TOKEN = 10**6
# An edited run may err against float64 by this factor of what the unedited backend errs, in float32 both.
ERROR_FACTOR = 10.0
# A run of a few layers in float32 (eps 1.2e-7) errs by some 1e-6 of the largest logit, whatever the backend.
ERROR_FLOOR = 1e-5
# An edit must move the logits by more than that many tolerances, or the comparison would show nothing.
SENSITIVITY = 20.0

CheckName = Literal["identity", "regroup", "head_affine", "generate", "unwrap"]
CHECK_NAMES: tuple[CheckName, ...] = ("identity", "regroup", "head_affine", "generate", "unwrap")
Interface = Literal["yes", "no", "no attention", "not built"]


class ThinEveryThirdKey(attn_hooks.Edit):
    """Every third real token keeps a quarter of the weight it gets; the rest of the row shares what is freed."""

    method: ClassVar[str] = "thin_every_third_key"
    source: ClassVar[str] = "the compatibility sweep"
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights"})
    writes: ClassVar[Writes] = "weights"
    scope: ClassVar[Scope] = "per-row"

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        return [Regroup(call.keys_at(call.inputs.key_position % SOURCE_STRIDE == 0), keep=KEEP)]


@dataclass(frozen=True)
class FamilyResult:
    """One row of docs/compatibility.md. ``failures`` holds why, for each check that did not pass."""

    family: str
    model_class: str
    interface: Interface
    backend: str = ""
    attention_layers: int = 0
    failures: dict[CheckName, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.interface == "yes" and not self.failures


class Prompt:
    """Two prompts, the first left-padded, as the family's model takes them."""

    def __init__(self, family: Family, model: PreTrainedModel) -> None:
        self.ids = token_ids(family, model)
        self.mask = torch.ones(2, self.ids.shape[1], dtype=torch.long)
        self.mask[0, :PADDING] = 0

    @property
    def source(self) -> Tensor:
        """The keys that ``ThinEveryThirdKey`` takes weight from, counted from each first real token, ``(B, T)``.

        T counts the tokens of the prompt and those to be generated.
        """
        real = torch.nn.functional.pad(self.mask, (0, NEW_TOKENS), value=1)
        return ((real.cumsum(-1) - 1) % SOURCE_STRIDE == 0) & real.bool()

    def logits(self, model: PreTrainedModel) -> Tensor:
        """Logits of the real tokens only: what a model computes on padding is nobody's business."""
        with torch.no_grad():
            logits = model(input_ids=self.ids, attention_mask=self.mask).logits
        per_row = logits.reshape(2, -1, *logits.shape[1:])
        return torch.cat([per_row[row][..., self.mask[row].bool(), :].flatten() for row in range(2)])


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the block runs longer."""

    def out_of_time(*_: object) -> None:
        raise TimeoutError(f"ran longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def check_family(family: Family, attn_implementation: str | None = None) -> FamilyResult:
    """Builds the family's tiny model and runs every check on it; never raises for what a family cannot do.

    ``attn_implementation`` None runs the backend that the family takes by default.
    """
    with time_limit(TIME_LIMIT_SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", attn_hooks.EditNeverActedWarning)
        try:
            model = build_tiny(family, attn_implementation)
            called = _attention_calls(family, model)
        except TimeoutError:
            raise
        except Exception as problem:
            reason = NOT_BUILT.get(family.name) or _one_line(problem)
            return FamilyResult(family.name, family.model_class_name, "not built", notes=(reason,))
        if called:
            return _check_interface_family(_FamilyRun(family, model, called, attn_implementation))
        _check_refusal(family, model)
        if family.name in NO_ATTENTION:
            note = "mixes tokens without softmax attention"
            return FamilyResult(family.name, family.model_class_name, "no attention", notes=(note,))
        return FamilyResult(family.name, family.model_class_name, "no", notes=(_own_attention(model),))


def _check_interface_family(run: _FamilyRun) -> FamilyResult:
    checks: dict[CheckName, Callable[[], None]] = {
        "identity": run.identity,
        "regroup": run.regroup,
        "head_affine": run.head_affine,
        "generate": run.generate,
        "unwrap": run.unwrap,
    }
    failures: dict[CheckName, str] = {}
    for name, check in checks.items():
        try:
            check()
        except TimeoutError:
            raise
        except Exception as problem:
            failures[name] = _one_line(problem)
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attn_hooks.unwrap(run.model)
    family = run.family
    return FamilyResult(
        family.name, family.model_class_name, "yes", run.backend, len(run.called), failures, tuple(run.notes)
    )


class _FamilyRun:
    """One family's model, what it computes unedited, and the checks on it."""

    def __init__(
        self, family: Family, model: PreTrainedModel, called: list[str], attn_implementation: str | None
    ) -> None:
        self.family, self.model, self.called = family, model, called
        self.attn_implementation = attn_implementation
        self.backend: str = model.get_submodule(called[0]).config._attn_implementation
        self.prompt = Prompt(family, model)
        self.notes: list[str] = []
        self.plain = self.prompt.logits(model)
        self.unedited = self._oracle(LiteralEdit())
        self.size = self.unedited.abs().max().item()
        # Both are float32 models; only the attention of the oracle is float64.
        self.tolerance = max(ERROR_FACTOR * _distance(self.plain, self.unedited), ERROR_FLOOR * self.size)

    def identity(self) -> None:
        attn_hooks.wrap(self.model)
        assert torch.equal(self.prompt.logits(self.model), self.plain), "logits differ with no edit in force"

    def regroup(self) -> None:
        literal = self._oracle(LiteralEdit(source=self.prompt.source, keep=KEEP))
        attn_hooks.wrap(self.model, ThinEveryThirdKey())
        self._compare(self.prompt.logits(self.model), literal, self.plain)

    def head_affine(self) -> None:
        info = attn_hooks.inspect_model(self.model)
        layer = info.layers[-1]
        gain = torch.ones(info.num_layers, layer.num_heads)
        gain[layer.index, EDITED_HEAD] = GAIN
        literal = self._oracle(LiteralEdit(head=EDITED_HEAD, gain=GAIN), module_name=layer.module_name)
        attn_hooks.wrap(self.model, attn_hooks.HeadAffine(gain=gain))
        self._compare(self.prompt.logits(self.model), literal, self.plain)

    def generate(self) -> None:
        twin = build_tiny(self.family, self.attn_implementation)
        with literally(twin, self.backend, LiteralEdit(source=self.prompt.source, keep=KEEP)):
            literal = self._scores(twin, use_cache=True)
        plain = self._scores(self.model, use_cache=True)
        own_cache_error = _distance(plain, self._scores(self.model, use_cache=False))
        attn_hooks.wrap(self.model, ThinEveryThirdKey())
        edited = self._scores(self.model, use_cache=True)
        self._compare(edited, literal, plain)
        if own_cache_error > self.tolerance:
            self.notes.append("its own cache is not exact: unedited, too, generation differs with and without it")
            return
        error = _distance(edited, self._scores(self.model, use_cache=False))
        assert error <= self.tolerance, f"generation differs by {error:.0e} with and without a cache"

    def unwrap(self) -> None:
        before = _traces(self.model)
        attn_hooks.wrap(self.model, ThinEveryThirdKey())
        # Even after a call that was refused, nothing may be left behind.
        with suppress(attn_hooks.UnsupportedArgumentError):
            self.prompt.logits(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attn_hooks.EditNeverActedWarning)
            attn_hooks.unwrap(self.model)
        assert torch.equal(self.prompt.logits(self.model), self.plain), "logits differ after unwrap"
        assert _traces(self.model) == before, "hooks, attributes or configs are left behind"

    def _oracle(self, edit: LiteralEdit, module_name: str | None = None) -> Tensor:
        twin = build_tiny(self.family, self.attn_implementation)
        if module_name is not None:
            edit = LiteralEdit(edit.source, edit.keep, twin.get_submodule(module_name), edit.head, edit.gain)
        with literally(twin, self.backend, edit):
            return self.prompt.logits(twin)

    def _compare(self, edited: Tensor, literal: Tensor, plain: Tensor) -> None:
        moved = _distance(literal, plain)
        assert moved > SENSITIVITY * self.tolerance, f"the edit moves the logits by {moved:.0e} only"
        error = _distance(edited, literal)
        assert error <= self.tolerance, (
            f"differs from the oracle by {error:.0e} (allowed {self.tolerance:.0e}; the edit moves {moved:.0e})"
        )

    def _scores(self, model: PreTrainedModel, use_cache: bool) -> Tensor:
        """The logits of each token that greedy generation adds."""
        generated = model.generate(
            self.prompt.ids,
            attention_mask=self.prompt.mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=NO_SUCH_TOKEN,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            **generation_arguments(self.family),
        )
        assert len(generated.logits) == NEW_TOKENS, f"{len(generated.logits)} tokens in place of {NEW_TOKENS}"
        return torch.stack(generated.logits)


def _attention_calls(family: Family, model: PreTrainedModel) -> list[str]:
    """Names of the modules that reach the interface when the model reads token ids, each once, in order of call."""
    called: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in attention_modules(model)
    ]
    Prompt(family, model).logits(model)
    for hook in hooks:
        hook.remove()
    return list(called)


def _check_refusal(family: Family, model: PreTrainedModel) -> None:
    """wrap() must say by itself that it cannot edit such a model."""
    try:
        attn_hooks.wrap(model)
    except attn_hooks.UnsupportedModelError:
        return
    raise AssertionError(f"wrap() accepted {family.name}, whose attention it never sees")


def _own_attention(model: PreTrainedModel) -> str:
    through_interface = {type(module) for _, module in attention_modules(model)}
    classes = {type(module) for module in model.modules()} - through_interface
    names = sorted(cls.__name__ for cls in classes if "Attention" in cls.__name__)
    return f"computes its own attention ({', '.join(names)})"


def _traces(model: PreTrainedModel) -> dict[str, tuple[object, ...]]:
    """For each module: its attributes, hooks and the identity of its config."""
    return {
        name: (
            tuple(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


def _distance(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def _one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    spoken = isinstance(problem, (AssertionError, attn_hooks.AttnHooksError))
    return text if spoken else f"{type(problem).__name__}: {text}"
