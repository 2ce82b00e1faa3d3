"""What edits cost a whole model on a GPU: time to first token and decode speed, as a share of the unwrapped model's.

    python -m bench.end_to_end [--budget-seconds 300] [--shapes llama-3.1-8b] [--only act,"no edit"] [--out FILE]

Random weights of the true shapes, built from configs: this is about time and memory only. In every round each setting has
one turn, the unwrapped model one at both ends, and the order is reversed from round to round; medians of wall time with
the device synchronised at both ends, Python included. ``prefill``: one forward over the prompt and the argmax of the last
logits (LLaVA's includes its vision tower), of the second prompt after wrapping; ``first_ms`` is the first one's, which also
makes what later ones find. ``decode``: 64 greedy tokens after a prompt of 2048, by a plain forward loop
with a DynamicCache, and by ``generate``, whose tokens a second count its prefill. ``replay``: as many steps on a StaticCache,
captured in a CUDA graph once and replayed: what is left is the device's own time (a smoke run steps in eager).
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)

import attn_hooks
from attn_hooks import ACT, PASTA, Ablate, HeadAffine, SinkScale, Streaming
from bench.render import end_to_end_summary
from bench.shapes import (
    MIB,
    Budget,
    Results,
    Row,
    add_common_options,
    device_is_lost,
    environment,
    free_memory,
    go_on_in_a_fresh_process,
    rounded,
    short,
)

NEW_TOKENS = 64
BASELINE, NO_EDIT = "unwrapped", "no edit"
# A setting so much slower at one length is not run at longer ones.
HOPELESS_BELOW = 0.2
# A first run so long is not repeated; it counts as it is, compilation included.
LONGEST_REPEATED_SECONDS = 15.0
ROUNDS_OF_PREFILL = {640: 9, 2048: 7, 8192: 4, 32768: 2}
ROUNDS_OF_DECODE = 3


@dataclass(frozen=True)
class ModelCase:
    """A model from its config, and the prompts it is measured on."""

    build: Callable[[], tuple[type[Any], Any]]
    prefill_lengths: tuple[int, ...]
    decode_length: int = 2048
    image_tokens: int = 0
    image_size: int = 0
    image_token_id: int = -1
    new_tokens: int = NEW_TOKENS


def llama() -> tuple[type[Any], Any]:
    """Llama-3.1-8B."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        bos_token_id=128000,
        eos_token_id=128001,
    )
    return LlamaForCausalLM, config


def llava() -> tuple[type[Any], Any]:
    """LLaVA-1.5-7B: Vicuna 7B and CLIP ViT-L/14 at 336 pixels."""
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaForConditionalGeneration, LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=32000, image_seq_length=576
    )


def small_llama() -> tuple[type[Any], Any]:
    return LlamaForCausalLM, LlamaConfig(**SMALL_TEXT)


def small_llava() -> tuple[type[Any], Any]:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=16,
    )
    return LlavaForConditionalGeneration, LlavaConfig(
        text_config=LlamaConfig(**SMALL_TEXT), vision_config=vision, image_token_index=300, image_seq_length=16
    )


SMALL_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
CASES = {
    "llama-3.1-8b": ModelCase(llama, (2048, 8192, 32768)),
    "llava-1.5-7b": ModelCase(llava, (640, 2048), image_tokens=576, image_size=336, image_token_id=32000),
}
SMOKE_CASES = {
    "llama-3.1-8b": ModelCase(small_llama, (96, 192), decode_length=96, new_tokens=4),
    "llava-1.5-7b": ModelCase(
        small_llava, (64,), decode_length=64, image_tokens=16, image_size=28, image_token_id=300, new_tokens=4
    ),
}


def edits_of(layers: int, heads: int, head_dim: int, length: int, device: torch.device) -> dict[str, list[Any]]:
    """Setting -> edits, for a model's sizes and a prompt's length."""
    number = max(1, round(0.18 * heads))
    calibrated = tuple(place * heads // number for place in range(number))
    act = ACT(heads=tuple((layer, head) for layer in range(2, layers - 1) for head in calibrated))
    start = min(612, length - 32)
    steered = tuple((layer, head) for layer in range(layers) for head in range(0, heads, 4))
    pasta = PASTA(spans=(((start, min(start + 64, length - 4)),),), heads=steered)
    # One head in each layer: 3 % of 32.
    gain = torch.ones(layers, heads, device=device)
    offset = torch.zeros(layers, heads, head_dim, device=device)
    for layer in range(layers):
        gain[layer, 5 * layer % heads] = 1.5
        offset[layer, 5 * layer % heads] = 0.1
    affine = HeadAffine(gain=gain, offset=offset)
    return {
        NO_EDIT: [],
        "pasta": [pasta],
        "act": [act],
        "head_affine": [affine],
        "sink_scale": [SinkScale()],
        "ablate": [Ablate(heads=tuple((layer, 5 * layer % heads) for layer in range(layers)))],
        "pasta + head_affine + act": [pasta, affine, act],
        # On the PyTorch path, whatever the device: only if asked for.
        "streaming": [Streaming(window=1024)],
    }


SETTINGS = [BASELINE, *(name for name in edits_of(4, 8, 8, 128, torch.device("cpu")) if name != "streaming")]


@dataclass
class Setting:
    """One way to run the model, and what was measured so far."""

    name: str
    enter: Callable[[nn.Module], AbstractContextManager[Any]]
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    generate_seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    is_finite: bool | None = None
    errors: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    is_out: bool = False


class Model:
    """The model under test and its prompts."""

    def __init__(self, name: str, case: ModelCase, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.case, self.device, self.dtype = name, case, device, dtype
        torch.manual_seed(0)
        model_class, config = case.build()
        with torch.device(device):
            self.model: Any = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        generation = self.model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.do_sample = None, 0, False
        self.text: Any = config.get_text_config()

    def prompt(self, length: int) -> dict[str, Tensor]:
        """Token ids by hand: BOS, 34 tokens of text, the image's, text."""
        case = self.case
        highest = min(self.text.vocab_size, 31000 if self.text.vocab_size > 31000 else 299)
        ids = torch.randint(3, highest, (1, length), device=self.device)
        ids[:, 0] = self.text.bos_token_id if self.text.bos_token_id is not None else 1
        if not case.image_tokens:
            return {"input_ids": ids}
        start = min(35, length // 8)
        ids[:, start : start + case.image_tokens] = case.image_token_id
        pixels = torch.randn(1, 3, case.image_size, case.image_size, device=self.device, dtype=self.dtype)
        return {"input_ids": ids, "pixel_values": pixels}

    def settings(self, length: int, names: Sequence[str]) -> list[Setting]:
        layers, heads = self.text.num_hidden_layers, self.text.num_attention_heads
        edits = edits_of(layers, heads, self.text.hidden_size // heads, length, self.device)
        listed = [Setting(BASELINE, lambda model: nullcontext())]
        for name in names:
            if name != BASELINE:
                listed.append(Setting(name, functools.partial(_editing, edits[name])))
        return listed

    def first_token(self, prompt: dict[str, Tensor]) -> tuple[float, Tensor, Any, bool]:
        """Seconds, the token ``(1, 1)``, the cache, and whether all logits are finite."""
        cache = DynamicCache(config=self.text)
        begin = self.now()
        logits = self.model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        return self.now() - begin, token, cache, bool(logits.isfinite().all())

    def decode(self, prompt: dict[str, Tensor]) -> float:
        """Seconds for the new tokens after the prompt, the prefill not counted."""
        _, token, cache, _ = self.first_token(prompt)
        begin = self.now()
        for _ in range(self.case.new_tokens):
            logits = self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
        return self.now() - begin

    def replay(self, prompt: dict[str, Tensor], new: int) -> float:
        """Seconds for the new tokens after the prompt, each the replay of one captured step."""
        length = prompt["input_ids"].shape[1]
        cache = StaticCache(config=self.text, max_cache_len=length + new + 2)
        mask = torch.ones(1, length + new + 2, dtype=torch.long, device=self.device)
        positions = torch.arange(length, device=self.device)[None]
        given = {"attention_mask": mask[:, :length], "position_ids": positions}
        logits = self.model(**prompt, **given, past_key_values=cache, logits_to_keep=1).logits
        token, position = logits[:, -1:].argmax(-1), positions[:, -1:] + 1

        def step() -> None:
            logits = self.model(
                input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1
            ).logits
            token.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)

        step()
        if self.device.type != "cuda":
            begin = self.now()
            for _ in range(new):
                step()
            return self.now() - begin
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        begin = self.now()
        for _ in range(new):
            graph.replay()
        return self.now() - begin

    def generate(self, prompt: dict[str, Tensor], new_tokens: int) -> float:
        """Seconds of ``generate``, the prefill counted."""
        begin = self.now()
        tokens = self.model.generate(**prompt, max_new_tokens=new_tokens)
        elapsed = self.now() - begin
        made = tokens.shape[1] - prompt["input_ids"].shape[1]
        if made != new_tokens:
            raise RuntimeError(f"generate made {made} tokens instead of {new_tokens}")
        return elapsed

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Bench:
    """Measures model by model, phase by phase."""

    def __init__(self, options: argparse.Namespace, results: Results, budget: Budget) -> None:
        self.options, self.results, self.budget = options, results, budget
        self.device = torch.device("cpu" if options.smoke else "cuda")
        self.names = options.only or [name for name in SETTINGS if name != BASELINE]
        self.hopeless: dict[str, str] = {}

    def run(self) -> None:
        for name, case in (SMOKE_CASES if self.options.smoke else CASES).items():
            if self.options.shapes is not None and name not in self.options.shapes:
                continue
            groups = [("prefill", length) for length in case.prefill_lengths]
            groups += [("decode", case.decode_length), ("replay", case.decode_length)]
            # The shortest prompt and decode first: what a short budget should have.
            groups.sort(key=lambda group: group[1] > case.decode_length)
            groups = [group for group in groups if self.is_wanted(name, *group)]
            if not groups:
                continue
            if self.budget.left < 30:
                self.results.note("skipped", f"{name}: out of time")
                continue
            model = Model(name, case, self.device, torch.float32 if self.options.smoke else torch.bfloat16)
            self.hopeless = {}
            for phase, length in groups:
                if self.budget.left < 10:
                    self.results.note("skipped", f"{name} {phase} {length}: out of time")
                    continue
                self.run_group(model, phase, length)
                free_memory()
            del model
            gc.collect()
            free_memory()

    def is_wanted(self, name: str, phase: str, length: int) -> bool:
        options = self.options
        done = any((row["model"], row["phase"], row["n_prompt"]) == (name, phase, length) for row in self.results.rows)
        return (
            not (options.resume and done)
            and (options.phases is None or phase in options.phases)
            and (options.lengths is None or length in options.lengths)
        )

    def run_group(self, model: Model, phase: str, length: int) -> None:
        """All settings on one prompt, in turns."""
        lost = self.results.meta.get("lost", [])
        names = [name for name in self.names if f"{model.name} {name}" not in lost]
        settings = model.settings(length, names)
        baseline = settings[0]
        for setting in settings:
            if phase == "prefill" and setting.name in self.hopeless:
                setting.notes["skipped"] = self.hopeless[setting.name]
                setting.is_out = True
        prompt = model.prompt(length)
        rounds = ROUNDS_OF_PREFILL.get(length, 3) if phase == "prefill" else ROUNDS_OF_DECODE
        if self.options.smoke:
            rounds = 1
        for turn in range(rounds + 1):
            running = [setting for setting in settings if not setting.is_out]
            if turn % 2:
                running.reverse()
            # The baseline stands at both ends of a round.
            order = [baseline, *(setting for setting in running if setting is not baseline)]
            order += [baseline] if turn else []
            begin = time.perf_counter()
            for setting in order:
                self.measure(model, setting, phase, prompt, is_warm_up=turn == 0)
            self.results.put(*(self.row(model, phase, length, setting, baseline) for setting in settings))
            if baseline.is_out or self.budget.left < 1.2 * (time.perf_counter() - begin):
                break
        for setting in settings:
            share = self.share(baseline.seconds, setting.seconds)
            if phase == "prefill" and share is not None and share < HOPELESS_BELOW:
                self.hopeless[setting.name] = f"not run: at {length} tokens its speed was {share:.2f} of the baseline's"
        print(end_to_end_summary([self.row(model, phase, length, s, baseline) for s in settings]), flush=True)

    def measure(self, model: Model, setting: Setting, phase: str, prompt: dict[str, Tensor], is_warm_up: bool) -> None:
        """One turn of a setting; a failure takes it out of the group."""
        if setting.is_out:
            return
        try:
            with setting.enter(model.model):
                self._measure(model, setting, phase, prompt, is_warm_up)
        except Exception as problem:
            setting.errors[phase] = short(problem)
            setting.is_out = True
        if not setting.is_out:
            return
        free_memory_if_alive()
        if device_is_lost():
            self.results.note("lost", f"{model.name} {setting.name}")
            print("the device is lost to this process; going on in a fresh one", flush=True)
            if setting.name != BASELINE:
                # Rows of this group stay out of the file, so that it is measured again without the setting.
                self.results.rows = [
                    row
                    for row in self.results.rows
                    if (row["model"], row["phase"], row["n_prompt"])
                    != (model.name, phase, prompt["input_ids"].shape[1])
                ]
                self.results.write()
                go_on_in_a_fresh_process("bench.end_to_end", sys.argv[1:], self.budget)
            raise RuntimeError(f"the unwrapped model failed: {setting.errors}")

    def _measure(self, model: Model, setting: Setting, phase: str, prompt: dict[str, Tensor], is_warm_up: bool) -> None:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if phase == "prefill":
            first = model.first_token(prompt)[0]
            seconds, _, _, is_finite = model.first_token(prompt)
            setting.is_finite = is_finite
            if not is_warm_up:
                setting.first_seconds.append(first)
        elif phase == "replay":
            seconds = model.replay(prompt, model.case.new_tokens)
        else:
            seconds = model.decode(prompt)
            generated = model.generate(prompt, 2 if is_warm_up else model.case.new_tokens)
            if not is_warm_up:
                setting.generate_seconds.append(generated)
        if model.device.type == "cuda":
            setting.peak_mib = torch.cuda.max_memory_allocated() / MIB
        if not is_warm_up:
            setting.seconds.append(seconds)
        elif seconds > LONGEST_REPEATED_SECONDS and setting.name != BASELINE:
            setting.seconds.append(seconds)
            setting.notes["repetitions"] = "a single run, compilation included"
            setting.is_out = True

    def share(self, baseline: Sequence[float], edited: Sequence[float]) -> float | None:
        """Speed as a share of the baseline's."""
        return statistics.median(baseline) / statistics.median(edited) if baseline and edited else None

    def row(self, model: Model, phase: str, length: int, setting: Setting, baseline: Setting) -> Row:
        new = model.case.new_tokens
        median = statistics.median(setting.seconds) if setting.seconds else None
        row: Row = {
            "model": model.name,
            "setting": setting.name,
            "phase": phase,
            "n_prompt": length,
            "ms": rounded(None if median is None else median * 1e3 / (1 if phase == "prefill" else new)),
            "speed_ratio": rounded(self.share(baseline.seconds, setting.seconds)),
            "repetitions": len(setting.seconds),
            "peak_mib": rounded(setting.peak_mib, 6),
            "unwrapped_peak_mib": rounded(baseline.peak_mib, 6),
            "errors": setting.errors,
            "notes": setting.notes,
        }
        if phase == "prefill":
            first = statistics.median(setting.first_seconds) * 1e3 if setting.first_seconds else None
            return row | {"first_ms": rounded(first), "logits_finite": setting.is_finite}
        generated = statistics.median(setting.generate_seconds) if setting.generate_seconds else None
        return row | {
            "new_tokens": new,
            "tokens_per_s": rounded(None if median is None else new / median),
            "generate_tokens_per_s": rounded(None if generated is None else new / generated),
            "generate_speed_ratio": rounded(self.share(baseline.generate_seconds, setting.generate_seconds)),
        }


def _editing(edits: Sequence[Any], model: nn.Module) -> AbstractContextManager[Any]:
    return attn_hooks.editing(model, *edits)


def free_memory_if_alive() -> None:
    if not device_is_lost():
        free_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--out", type=Path, help="default: bench/results/end-to-end-h200.json; none in a smoke run")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke tries the program on the CPU")
    known = {*SETTINGS, "streaming"}
    unknown = set(options.only or ()) - known
    if unknown:
        parser.error(f"no such setting: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    warnings.filterwarnings("ignore", category=attn_hooks.EditNeverActedWarning)
    budget = Budget(options.budget_seconds, options.started)
    out = options.out or (None if options.smoke else Path("bench/results/end-to-end-h200.json"))
    meta = environment("bench.end_to_end", sys.argv[1:], options.commit)
    results = Results(out, meta, ("model", "setting", "phase", "n_prompt"))
    if options.resume:
        results.resume()
    with torch.no_grad():
        Bench(options, results, budget).run()
    results.write()
    print(end_to_end_summary(results.rows))
    for what in ("skipped", "lost"):
        for note in results.meta.get(what, []):
            print(f"{what}: {note}")


if __name__ == "__main__":
    main()
