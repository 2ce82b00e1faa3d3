"""What an intervention costs a caption: LLaVA-1.5-7B's shape, random weights, 256 tokens after a prompt of 640 with one image.

    python -m bench.captions [--budget-seconds 300] [--only pai,vcd] [--phases generate,replay] [--out FILE] [--baseline FILE]

``generate``: the model's own, greedy, a DynamicCache, Python included. ``replay``: prefill, then one step on a StaticCache captured
in a CUDA graph and replayed, for edits of attention alone: what is left is the device's own time. ``reference``: as the
papers' code does it, eager attention whose weights are edited and kept in every step. For second streams a whole second model
call a step, no step skipped; AGLA's without the front end that makes its image. For OPERA, greedy as ours, a call for each of the
candidates. For VHR a call without the image beforehand. The unedited model has a turn before and after every third setting; ratios
are to the mean of the two.
``generate`` goes through the settings several times, every other time backwards, and gives the median of the ratios. Beside it
stands the same of the host's own time (``host``), in which others that use the machine have less of a part.

``--baseline`` prints the ratios of an earlier file beside the new ones. It is refused where that was measured on another GPU or
with other versions, and so is ``--resume``, which would mix both in one file.

Random weights know no next token, so that no step would be certain and every second stream would run. The output layer is
multiplied by ``SHARPNESS``, so that some steps are; the share of skipped steps stands beside the ratio. Random weights have no
sinks either: VAR's tau is lowered until there are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import attn_hooks
from bench.end_to_end import CASES, SMOKE_CASES, Model
from bench.render import markdown_table, number
from bench.shapes import Budget, Results, Row, add_common_options, environment, free_memory, rounded, short

CASE = "llava-1.5-7b"
PROMPT, SMOKE_PROMPT = 640, 64
NEW_TOKENS = 256
SHARPNESS = 8.0
SINK_TAU, SINK_DIMS = 2.2, (1415, 2533)
FIRST_EDITED_LAYER = 1
REFERENCE = "reference"


def settings(smoke: bool) -> dict[str, list[dict[str, Any]]]:
    """Name -> edits. ``pai`` and ``imbalanced`` are their attention alone; with their guidance they have a second stream."""
    var = {"method": "var", "dims": (3, 5) if smoke else SINK_DIMS, "tau": 1.2 if smoke else SINK_TAU}
    return {
        "var": [var],
        "vhr": [{"method": "vhr"}],
        "imbalanced": [{"method": "imbalanced", "gamma": 1.0}],
        "pai": [{"method": "pai", "gamma": 1.0}],
        "spin": [{"method": "spin", "r": 0.8, "eps": 0.1}],
        "eah": [{"method": "eah"}],
        "var + vhr": [var, {"method": "vhr"}],
        "vcd": [{"method": "vcd"}],
        "agla": [{"method": "agla"}],
        "vcd with skip": [{"method": "vcd", "skip": True}],
        "agla with skip": [{"method": "agla", "skip": True}],
        "damro": [{"method": "damro"}],
        "opera": [{"method": "opera"}],
        "pai with guidance": [{"method": "pai"}],
    }


# Edits of attention alone, whose decode steps can be captured; VHR's prompt needs more rows than a static cache has.
CAPTURED = ("var", "imbalanced", "pai", "spin", "eah")
SETTINGS_A_TURN = 3
# How often each setting is measured: where the host is what is waited for, two captions differ by some percent.
ROUNDS = {"generate": 3, "replay": 1, "reference": 1}
GOALS = {
    **dict.fromkeys(("var", "vhr", "imbalanced", "pai", "spin"), 1.08),
    **dict.fromkeys(("agla", "vcd"), 1.2),
}
# How the papers' code edits the eager weights, by setting.
Weights = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """What the papers' code knows beforehand.

    Attributes:
        image: the image's positions (start, stop).
        sinks: some of them, which VAR takes for sinks.
        without_image: VHR's head outputs of the prompt's last row without the image, by layer.
        gains: VHR's gains of the heads, by layer.
        head: the head whose map EAH copies.
    """

    image: tuple[int, int]
    sinks: Tensor
    without_image: dict[int, Tensor] = field(default_factory=dict)
    gains: dict[int, Tensor] = field(default_factory=dict)
    head: list[Tensor] = field(default_factory=list)

    def pai(self, module: nn.Module, logits: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """A copy of the last row's logits on the image, raised by their size; then softmax in float32."""
        start, stop = self.image
        on_image = logits[:, :, -1, start:stop]
        logits[:, :, -1, start:stop] = on_image + 0.2 * on_image.abs()
        return self.plain(module, logits, value, out)

    def spin(self, module: nn.Module, logits: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """Scores of the last row on the image; a one-hot mask over the heads."""
        start, stop = self.image
        scores = logits[:, :, -1, start:stop].sum(-1)
        kept = scores.topk(int(0.8 * scores.shape[1]), dim=1).indices
        mask = torch.full_like(scores, 0.1).scatter(1, kept, 1.0)
        weights = self.plain(module, logits, value, out)
        out.copy_(weights @ value)
        out[:, :, -1] *= mask[..., None]
        return weights

    def var(self, module: nn.Module, logits: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """Budget from the sinks to the other image tokens, where rows and heads look at the image enough."""
        start, stop = self.image
        weights = self.plain(module, logits, value, out)
        is_sink = torch.zeros(weights.shape[-1], dtype=torch.bool, device=weights.device)
        is_sink[self.sinks] = True
        is_other = torch.zeros_like(is_sink)
        is_other[start:stop] = True
        is_other &= ~is_sink
        on_image = weights[..., start:stop].sum(-1)
        on_other = weights[..., is_other].sum(-1)
        chosen = (on_image >= 0.2) & (on_other / on_image >= 0.5)
        if weights.shape[2] > 1:
            chosen[:, :, :stop] = False
        budget = 0.4 * weights[..., is_sink].sum(-1)
        raised = weights * (1 + budget / on_other)[..., None]
        edited = torch.where(is_sink, 0.6 * weights, torch.where(is_other, raised, weights))
        weights = torch.where(chosen[..., None], edited, weights)
        out.copy_(weights @ value)
        return weights

    def vhr_without_image(self, module: nn.Module, logits: Tensor, value: Tensor, out: Tensor) -> Tensor:
        weights = self.plain(module, logits, value, out)
        self.without_image[module.layer_idx] = out[:, :, -1].float()
        return weights

    def vhr(self, module: nn.Module, logits: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """Twice the heads that differ most from themselves without the image, in the last layers."""
        weights, layer = self.plain(module, logits, value, out), module.layer_idx
        if layer >= max(self.without_image) + 1 - VHR_LAYERS:
            if logits.shape[2] > 1:
                distance = (out[:, :, -1].float() - self.without_image[layer]).norm(dim=-1)
                chosen = distance > distance.median(-1, keepdim=True).values
                self.gains[layer] = torch.where(chosen, 2.0, 1.0)[..., None].to(out.dtype)
            out[:, :, -1] *= self.gains[layer]
        return weights

    def eah(self, module: nn.Module, logits: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """All heads take the map of the head with the most columns above the threshold."""
        weights = self.plain(module, logits, value, out)
        if module.layer_idx == EAH_LAYER:
            rows = weights.shape[2]
            if rows > 1:
                start, stop = self.image
                seen = weights.tril(-1).sum(2) / torch.arange(rows, 0, -1, device=weights.device)
                self.head[:] = [(seen[..., start:stop] > EAH_THRESHOLD).sum(-1)[0].argmax()]
            weights = weights[:, self.head[0]][:, None].expand_as(weights).clone()
            out.copy_(weights @ value)
        return weights

    def plain(self, module: nn.Module, logits: Tensor, value: Tensor, out: Tensor) -> Tensor:
        weights = logits.softmax(-1, dtype=torch.float32).to(value.dtype)
        out.copy_(weights @ value)
        return weights


# Whose weights the reference of a setting edits; imbalanced's are changed on the image as PAI's are.
EDITED_WEIGHTS = {
    "var": "var",
    "vhr": "vhr",
    "imbalanced": "pai",
    "pai": "pai",
    "spin": "spin",
    "eah": "eah",
    "pai with guidance": "pai",
}
SECOND_STREAMS = ("vcd", "agla", "damro", "pai with guidance")
OTHER_REFERENCES = (*SECOND_STREAMS[:-1], "opera")
VHR_LAYERS, EAH_LAYER, EAH_THRESHOLD = 14, 1, 0.002
DAMRO_TOKENS, OPERA_CANDIDATES = 10, 5


@contextmanager
def reference_attention(model: Any, edit: Weights | None) -> Iterator[None]:
    """Eager attention with weights that are edited and returned, in all text layers from the second on."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(-1, -2) * scaling
        if attention_mask is not None:
            logits = logits + attention_mask[..., : key.shape[-2]]
        out = torch.empty_like(query)
        if edit is not None and getattr(module, "layer_idx", -1) >= FIRST_EDITED_LAYER:
            weights = edit(module, logits, value, out)
        else:
            weights = logits.softmax(-1, dtype=torch.float32).to(value.dtype)
            out = weights @ value
        return out.transpose(1, 2).contiguous(), weights

    AttentionInterface.register(REFERENCE, attend)
    AttentionMaskInterface.register(REFERENCE, eager_mask)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": REFERENCE})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


class Captions:
    """The settings one after the other, the unedited model between them."""

    def __init__(self, options: argparse.Namespace, results: Results, budget: Budget) -> None:
        self.options, self.results, self.budget = options, results, budget
        device = torch.device("cpu" if options.smoke else "cuda")
        case = (SMOKE_CASES if options.smoke else CASES)[CASE]
        self.new_tokens = 6 if options.smoke else NEW_TOKENS
        self.model = Model(CASE, case, device, torch.float32 if options.smoke else torch.bfloat16)
        self.model.model.lm_head.weight.data *= SHARPNESS
        self.length = SMOKE_PROMPT if options.smoke else PROMPT
        self.prompt = self.model.prompt(self.length)
        start = int((self.prompt["input_ids"][0] == case.image_token_id).nonzero()[0])
        sinks = torch.arange(start, start + case.image_tokens, 20, device=device)
        # Seconds that the host was busy with the last caption.
        self.busy = 0.0
        self.reference = Reference((start, start + case.image_tokens), sinks)

    def run(self) -> None:
        wanted = [
            name for name in settings(self.options.smoke) if self.options.only is None or name in self.options.only
        ]
        for mode, possible in (
            ("generate", wanted),
            ("replay", CAPTURED),
            ("reference", (*EDITED_WEIGHTS, *OTHER_REFERENCES)),
        ):
            names = [name for name in wanted if name in possible]
            if not names or (self.options.phases is not None and mode not in self.options.phases):
                continue
            if self.budget.left < 20:
                self.results.note("skipped", f"{mode}: out of time")
                continue
            self._unedited(mode)  # warm
            rows = [row for number in range(ROUNDS[mode]) for row in self._round(mode, names[:: (-1) ** number])]
            for name in names:
                of_name = [row for row in rows if row["setting"] == name]
                measured = [row for row in of_name if "error" not in row]
                row = _joined(measured) if measured else of_name[0]
                print({key: value for key, value in row.items() if key not in ("model", "new_tokens")}, flush=True)
                self.results.put(row)
            free_memory()

    def _round(self, mode: str, names: Sequence[str]) -> list[Row]:
        found = []
        before, host = self._unedited(mode), self.busy
        for start in range(0, len(names), SETTINGS_A_TURN):
            rows = [self._row(mode, name) for name in names[start : start + SETTINGS_A_TURN]]
            after, host_after = self._unedited(mode), self.busy
            beside = {
                "unedited_seconds": [rounded(before), rounded(after)],
                "unedited_host": rounded((host + host_after) / 2),
            }
            found += [row | beside for row in rows]
            before, host = after, host_after
        return found

    def _row(self, mode: str, name: str) -> Row:
        row: Row = {"model": CASE, "setting": name, "mode": mode, "new_tokens": self.new_tokens}
        row["goal"] = None if mode == "reference" else GOALS.get(name)
        if self.budget.left < 12:
            return {**row, "error": "out of time"}
        try:
            seconds, skipped = self._edited(mode, name, settings(self.options.smoke)[name])
        except Exception as problem:
            return {**row, "error": short(problem)}
        return {**row, "seconds": rounded(seconds), "skipped": rounded(skipped), "host_seconds": rounded(self.busy)}

    def _unedited(self, mode: str) -> float:
        return self._replay() if mode == "replay" else self._generate()

    def _generate(self, new_tokens: int | None = None, **kept: Any) -> float:
        begin, busy = self.model.now(), time.thread_time()
        self.model.model.generate(**self.prompt, max_new_tokens=new_tokens or self.new_tokens, **kept)
        seconds = self.model.now() - begin
        self.busy = time.thread_time() - busy
        return seconds

    def _replay(self) -> float:
        """Prefill and the steps after it; capturing the graph is not counted."""
        self.model.first_token(self.prompt)
        return self.model.first_token(self.prompt)[0] + self.model.replay(self.prompt, self.new_tokens)

    def _edited(self, mode: str, name: str, edits: Sequence[dict[str, Any]]) -> tuple[float, float | None]:
        """Seconds, and the share of steps that needed no second stream."""
        if mode == "reference":
            return self._reference(name), None
        with attn_hooks.editing(self.model.model, *(attn_hooks.build_edit(edit) for edit in edits)):
            if mode == "replay":
                return self._replay(), None
            self._generate(8 if not self.options.smoke else 2)
            seconds = self._generate()
            shares = [edit.second_stream_skipped for edit in attn_hooks.report(self.model.model).edits]
        return seconds, next((share for share in shares if share is not None), None)

    def _reference(self, name: str) -> float:
        edited = EDITED_WEIGHTS.get(name)
        begin = self.model.now()
        if name == "vhr":
            with reference_attention(self.model.model, self.reference.vhr_without_image):
                self.model.model(input_ids=self._with_image_tokens(0), output_attentions=True)
        before = self.model.now() - begin
        with reference_attention(self.model.model, None if edited is None else getattr(self.reference, edited)):
            if name == "opera":
                self._candidates(2)
                return self._candidates(self.new_tokens)
            if name in SECOND_STREAMS:
                self._two_streams(name, 2)
                return self._two_streams(name, self.new_tokens)
            kept: dict[str, Any] = {"output_attentions": True, "return_dict_in_generate": True}
            self._generate(2, **kept)
            return before + self._generate(**kept)

    def _with_image_tokens(self, count: int) -> Tensor:
        """The prompt's tokens with so many in place of the image: a text's, since a model wants all of an image or none."""
        start, stop = self.reference.image
        ids = self.prompt["input_ids"]
        return torch.cat([ids[:, :start], ids[:, :1].expand(len(ids), count), ids[:, stop:]], dim=1)

    def _two_streams(self, name: str, new_tokens: int) -> float:
        """Two prompts, two caches, two calls a step."""
        begin = self.model.now()
        caches = [DynamicCache(config=self.model.text) for _ in range(2)]
        seconds: dict[str, dict[str, Any]] = {
            "damro": {"input_ids": self._with_image_tokens(DAMRO_TOKENS)},
            "pai with guidance": {"input_ids": self._with_image_tokens(0)},
        }
        other_pixels = {**self.prompt, "pixel_values": self.prompt["pixel_values"] + 1}
        given: list[dict[str, Any]] = [self.prompt, seconds.get(name, other_pixels)]
        for _ in range(new_tokens):
            first, second = (
                self._call(inputs, cache).logits[:, -1] for inputs, cache in zip(given, caches, strict=True)
            )
            scores = torch.where(first < first.amax(-1, keepdim=True) - 2.3, -torch.inf, 2 * first - second)
            token = scores.argmax(-1, keepdim=True)
            given = [{"input_ids": token}] * 2
        return self.model.now() - begin

    def _candidates(self, new_tokens: int) -> float:
        """A call for the token, and one for each candidate after it, of whose last weights the largest over heads counts."""
        begin = self.model.now()
        cache = DynamicCache(config=self.model.text)
        given: dict[str, Any] = self.prompt
        for _ in range(new_tokens):
            logits = self._call(given, cache).logits[:, -1]
            likeliest = logits.topk(OPERA_CANDIDATES, dim=-1)
            penalties = []
            for candidate in range(OPERA_CANDIDATES):
                token = likeliest.indices[:, candidate, None]
                weights = self._call({"input_ids": token}, cache).attentions[-1][:, :, -1].amax(1)
                cache.crop(-1)
                response = 50 * weights[:, self.length :] / weights.sum(-1, keepdim=True)
                penalties.append(1e-7 * response.amax(-1))
            chosen = (likeliest.values - torch.stack(penalties, dim=-1)).argmax(-1, keepdim=True)
            given = {"input_ids": likeliest.indices.gather(1, chosen)}
        return self.model.now() - begin

    def _call(self, inputs: dict[str, Any], cache: DynamicCache) -> Any:
        return self.model.model(**inputs, past_key_values=cache, output_attentions=True, logits_to_keep=1)


def _joined(rows: Sequence[Row]) -> Row:
    """The rounds of one setting as one row: the median of their ratios, each to the unedited model beside it."""
    seconds = [row["seconds"] for row in rows]
    unedited = [sum(row["unedited_seconds"]) / 2 for row in rows]
    ratios = [rounded(edited / plain) for edited, plain in zip(seconds, unedited, strict=True)]
    medians: Row = {"seconds": rounded(median(seconds)), "ratio": rounded(median(ratios)), "ratios": ratios}
    if rows[0]["mode"] == "generate":
        medians["host_ratios"] = [rounded(row["host_seconds"] / row["unedited_host"]) for row in rows]
        medians["host_ratio"] = rounded(median(medians["host_ratios"]))
    shown = {name: value for name, value in rows[-1].items() if name not in ("host_seconds", "unedited_host")}
    return shown | medians | {"unedited_seconds": [second for row in rows for second in row["unedited_seconds"]]}


# What ratios of one table must have in common.
MACHINE = ("gpu", "driver", "python", "torch", "transformers", "cuda", "cudnn", "triton")


def rows_of_this_machine(file: Path, meta: dict[str, Any]) -> list[Row]:
    """The rows of an earlier file.

    Raises:
        ValueError: it can't be read, is of another program, or was measured on another GPU or with other versions.
    """
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        rows: list[Row] = earlier["rows"]
        before: dict[str, Any] = earlier["meta"]
        modes = {row["mode"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"{file} is no file of bench.captions: {short(problem)}") from problem
    if not modes <= ROUNDS.keys():
        raise ValueError(f"{file} is no file of bench.captions: it has the modes {', '.join(sorted(modes))}")
    told = [f"{name} {before.get(name)} there, {meta[name]} here" for name in MACHINE if before.get(name) != meta[name]]
    if told:
        raise ValueError(f"{file} was measured elsewhere ({'; '.join(told)}): give another file or measure it anew")
    return rows


def captions_table(rows: Sequence[Row], earlier: Sequence[Row] = ()) -> str:
    """Settings down, modes across: ratio to the unedited model, in bold above its goal; behind it the earlier one."""
    names = list(dict.fromkeys(row["setting"] for row in rows))
    found = {(row["setting"], row["mode"]): row for row in rows}
    before = {(row["setting"], row["mode"], row["new_tokens"]): row["ratio"] for row in earlier if "error" not in row}

    def cell(name: str, mode: str) -> str:
        row = found.get((name, mode))
        if row is None or "error" in row:
            return "-" if row is None else "failed"
        text = number(row["ratio"])
        text = f"**{text}**" if row["goal"] is not None and row["ratio"] > row["goal"] else text
        was = before.get((name, mode, row["new_tokens"]))
        return text if was is None else f"{text} (was {number(was)})"

    body = []
    for name in names:
        skipped = found.get((name, "generate"), {}).get("skipped")
        share = "" if skipped is None else f"{100 * skipped:.0f} %"
        body.append([name, *(cell(name, mode) for mode in ("generate", "replay", "reference")), share])
    return markdown_table(["setting", "`generate`", "CUDA graph", "reference, eager", "steps skipped"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--out", type=Path, help="default: bench/results/captions-h200.json; none in a smoke run")
    parser.add_argument("--baseline", type=Path, help="an earlier file, whose ratios are printed beside the new ones")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke tries the program on the CPU")
    warnings.filterwarnings("ignore", category=attn_hooks.EditNeverActedWarning)
    out = options.out or (None if options.smoke else Path("bench/results/captions-h200.json"))
    results = Results(out, environment("bench.captions", sys.argv[1:], options.commit), ("setting", "mode"))
    try:
        earlier = rows_of_this_machine(options.baseline, results.meta) if options.baseline else []
        if options.resume and out is not None and out.exists():
            rows_of_this_machine(out, results.meta)
    except ValueError as problem:
        parser.error(str(problem))
    if options.resume:
        results.resume()
    with torch.no_grad():
        Captions(options, results, Budget(options.budget_seconds, options.started)).run()
    results.write()
    print(captions_table(results.rows, earlier))
    for note in results.meta.get("skipped", []):
        print(f"skipped: {note}")


if __name__ == "__main__":
    main()
