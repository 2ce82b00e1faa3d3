"""What ``report`` counts and what ``explain`` foresees, against numbers worked out by hand."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch

import attn_hooks
from attn_hooks import ACT, Ablate, Edit, HeadAffine, PowerAttention, SinkScale, Streaming, reporting
from attn_hooks.reporting import EditReport
from attn_kernels import Primitive, Sparsity
from tests.hooks import vlms
from tests.hooks.tiny import ACTING_EDITS, NUM_HEADS, NUM_LAYERS, gain_at, logits, prompt, tiny_llama
from tests.methods.test_image_families import CASES as IMAGE_METHODS


def with_uniform_attention(**sizes: Any) -> Any:
    """Queries are zero, so each row spreads its weight evenly over the keys that it sees."""
    model = tiny_llama(**sizes)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    return model


def only_report(model: Any) -> EditReport:
    (row,) = attn_hooks.report(model).edits
    return row


def run(model: Any, *lengths: int, batch: int = 2) -> None:
    """A prompt of the first length, then so many tokens at once for each further one."""
    tokens, cache, start = prompt(batch, sum(lengths)), None, 0
    for length in lengths:
        cache = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True).past_key_values
        start += length


def test_counts_of_calls_layers_heads_and_rows() -> None:
    edits = (Ablate(heads={1: [3, 6], 2: [0]}), Streaming(layers=(0, 3)), HeadAffine(gain=gain_at(2, 5, 3.0)))
    model = attn_hooks.wrap(tiny_llama(), *edits)
    run(model, 5, 1, 1, 3)
    ablate, streaming, head_affine = attn_hooks.report(model).edits
    # Two layers each for the first two, one for the third; 5 + 1 + 1 + 3 rows of 2 samples in each.
    assert ablate.calls == {"prefill": 2, "decode": 4, "chunk": 2}
    assert streaming.calls == {"prefill": 2, "decode": 4, "chunk": 2}
    assert head_affine.calls == {"prefill": 1, "decode": 2, "chunk": 1}
    assert (ablate.layers, streaming.layers, head_affine.layers) == ((1, 2), (0, 3), (2,))
    assert (ablate.heads, streaming.heads, head_affine.heads) == (3, 2 * NUM_HEADS, 1)
    assert (ablate.rows, streaming.rows, head_affine.rows) == (40, 40, 20)
    assert (ablate.method, streaming.method, head_affine.method) == ("ablate", "streaming", "head_affine")
    assert streaming.parameters["layers"] == [0, 3]


def test_counts_start_again_with_each_wrap() -> None:
    model = attn_hooks.wrap(tiny_llama(), "streaming")
    run(model, 5)
    assert only_report(model).calls == {"prefill": NUM_LAYERS}
    attn_hooks.wrap(model, "streaming")
    assert only_report(model).calls == {}
    with pytest.warns(attn_hooks.EditNeverActedWarning):
        attn_hooks.unwrap(model)


def test_counts_of_an_edit_go_on_inside_a_block() -> None:
    model = attn_hooks.wrap(tiny_llama(), Ablate(heads={1: [3]}))
    run(model, 5)
    with attn_hooks.editing(model, SinkScale(layers=(0,))):
        run(model, 5)
        inner = attn_hooks.report(model).edits
        assert [row.method for row in inner] == ["ablate", "sink_scale"]
        assert inner[1].calls == {"prefill": 1}
    run(model, 5)
    assert only_report(model).calls == {"prefill": 3}


def uniform_mass_moved(num_rows: int, scale: float) -> float:
    """Row i has i + 1 keys of weight 1 / (i + 1); scaling the first key's weight leaves it scale / (scale + i)."""
    moved = [abs(1 / (i + 1) - scale / (scale + i)) for i in range(num_rows)]
    return sum(moved) / num_rows


@pytest.mark.parametrize("scale", [0.25, 3.0, 1.0])
def test_mass_moved_by_a_scaled_sink(scale: float) -> None:
    model = attn_hooks.wrap(with_uniform_attention(), SinkScale(scale=scale, heads={1: [2, 5]}))
    run(model, 6)
    assert only_report(model).mass_moved == pytest.approx(uniform_mass_moved(6, scale), abs=1e-6)


def test_mass_moved_by_a_hidden_sink() -> None:
    """With its first key hidden, row 0 sees nothing: what it loses goes nowhere, and half of it counts."""
    model = attn_hooks.wrap(with_uniform_attention(), SinkScale(scale=0.0, layers=(0,)))
    run(model, 3)
    assert only_report(model).mass_moved == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3, abs=1e-6)


def test_mass_moved_by_a_window() -> None:
    model = attn_hooks.wrap(with_uniform_attention(), Streaming(sinks=0, window=2))
    run(model, 5)
    # Row i keeps 2 of its i + 1 equal weights, so (i - 1) / (i + 1) moves from i = 1 on.
    assert only_report(model).mass_moved == pytest.approx((0 + 0 + 1 / 3 + 2 / 4 + 3 / 5) / 5, abs=1e-6)


def test_mass_moved_is_each_edits_own_share() -> None:
    model = attn_hooks.wrap(with_uniform_attention(), Streaming(sinks=0, window=2), SinkScale(scale=3.0, sinks=1))
    run(model, 4)
    streaming, sink_scale = attn_hooks.report(model).edits
    # Logits come first: the scaled sink moves weight on rows 0 to 3; the window then drops what is left behind it.
    assert sink_scale.mass_moved == pytest.approx(uniform_mass_moved(4, 3.0), abs=1e-6)
    assert streaming.mass_moved == pytest.approx((0 + 0 + 3 / 5 + 4 / 6) / 4, abs=1e-6)


def test_padding_counts_neither_for_mass_nor_rows() -> None:
    model = attn_hooks.wrap(with_uniform_attention(), SinkScale(scale=3.0, layers=(0,)))
    tokens = prompt(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    model(tokens, attention_mask=mask)
    row = only_report(model)
    by_row = [uniform_mass_moved(length, 3.0) * length for length in (3, 6)]
    assert row.mass_moved == pytest.approx(sum(by_row) / 9, abs=1e-6)
    assert row.rows == 9


@pytest.mark.parametrize("edit", [Ablate(heads={1: [3]}), HeadAffine(gain=gain_at(2, 5, 3.0))], ids=str)
def test_edits_of_outputs_move_no_weight(edit: Edit) -> None:
    model = attn_hooks.wrap(tiny_llama(), edit)
    run(model, 5)
    assert only_report(model).mass_moved is None


def test_act_without_a_sink_moves_nothing() -> None:
    model = attn_hooks.wrap(tiny_llama(), ACT(alpha=1e6, layers=(2,)))
    run(model, 8, 1)
    assert only_report(model).mass_moved == 0
    assert only_report(model).calls == {"prefill": 1, "decode": 1}


def test_a_report_reads_well_and_turns_into_json() -> None:
    model = attn_hooks.wrap(tiny_llama(), "streaming", HeadAffine(gain=torch.ones(NUM_LAYERS, NUM_HEADS)))
    run(model, 5, 1)
    report = attn_hooks.report(model)
    text = str(report)
    for shown in ("LlamaForCausalLM", "streaming", "prefill 4, decode 4", "0, 1, 2, 3", "32", "never acted"):
        assert shown in text
    content = json.loads(json.dumps(report.to_dict()))
    assert content["edits"][0]["rows"] == 2 * 6 * NUM_LAYERS
    assert content["edits"][1]["calls"] == {}


def test_explain_has_one_row_a_layer() -> None:
    edits = (
        Streaming(layers=(0, 1), heads=None),
        SinkScale(heads={1: [2], 2: [0, 7]}),
        Ablate(heads={2: [3], 3: [4]}),
    )
    explanation = attn_hooks.explain(tiny_llama(num_hidden_layers=5), *edits)
    assert explanation.model == "LlamaForCausalLM"
    assert [row.layer for row in explanation.layers] == [0, 1, 2, 3, 4]
    assert [row.edits for row in explanation.layers] == [
        ("streaming",),
        ("sink_scale", "streaming"),
        ("sink_scale", "ablate"),
        ("ablate",),
        (),
    ]
    every, mixed, some, outputs, untouched = (row.path for row in explanation.layers)
    assert every == mixed == "PyTorch, blocks of rows"
    assert some == "PyTorch, blocks of rows for heads 0, 7; sdpa for the others"
    assert outputs.startswith("sdpa, then")
    assert untouched == "sdpa"
    assert "sink_scale writes logits" in explanation.layers[2].why
    text = str(explanation)
    assert all(shown in text for shown in ("LlamaForCausalLM", "streaming", "sdpa"))
    assert json.loads(json.dumps(explanation.to_dict()))["layers"][2]["edits"] == ["sink_scale", "ablate"]


@pytest.mark.parametrize("name", ACTING_EDITS)
def test_explain_foresees_the_layers_in_which_an_edit_acts(name: str) -> None:
    model = tiny_llama()
    foreseen = [row.layer for row in attn_hooks.explain(model, ACTING_EDITS[name]).layers if row.edits == (name,)]
    attn_hooks.wrap(model, ACTING_EDITS[name])
    logits(model)
    assert list(only_report(model).layers) == foreseen
    in_force = [row.layer for row in attn_hooks.explain(model).layers if row.edits]
    assert in_force == foreseen


def test_explain_names_the_models_backend() -> None:
    rows = attn_hooks.explain(attn_hooks.wrap(tiny_llama(attn_implementation="eager"))).layers
    assert {row.path for row in rows} == {"eager"}


@pytest.mark.parametrize("length", [1, 2])
def test_power_attention_over_one_block_moves_nothing(length: int) -> None:
    model = attn_hooks.wrap(with_uniform_attention(), PowerAttention(block=2))
    run(model, length)
    assert only_report(model).mass_moved == 0


def test_report_and_log_say_which_path_ran_and_why(caplog: pytest.LogCaptureFixture) -> None:
    model = attn_hooks.wrap(tiny_llama(), SinkScale(scale=3.0))
    with caplog.at_level(logging.INFO, logger="attn_hooks"), torch.no_grad():
        for _ in range(2):
            model(torch.tensor([[5, 6, 7]]))
    assert [record.getMessage() for record in caplog.records] == ["prefill: pytorch (no GPU), first in layer 0"]
    found = attn_hooks.report(model)
    num_layers = model.config.num_hidden_layers
    assert list(found.to_dict()["paths"]) == [
        {"phase": "prefill", "path": "pytorch", "why": "no GPU", "layers": tuple(range(num_layers))}
    ]
    assert str(found).endswith(f"\nprefill: pytorch in layers 0-{num_layers - 1} (no GPU)")


def test_paths_are_told_apart_by_phase_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    edits = (SinkScale(layers=(2,)), HeadAffine(gain=gain_at(1, 5, 3.0)))
    model = attn_hooks.wrap(tiny_llama(attn_implementation="eager"), *edits)
    with caplog.at_level(logging.INFO, logger="attn_hooks"):
        run(model, 5, 1, 1)
        model(prompt(), output_attentions=True)
    assert str(attn_hooks.report(model)).splitlines()[-6:] == [
        f"{phase}: {path} in layer {layer} ({why})"
        for phase, why in (("prefill", "no GPU"), ("decode", "no GPU"), ("prefill", "weights asked for"))
        for path, layer in (("backend + affine", 1), ("pytorch", 2))
    ]
    assert len(caplog.records) == 6
    with attn_hooks.editing(model, Streaming(layers=(0,))):
        assert attn_hooks.report(model).paths == ()
    assert len(attn_hooks.report(model).paths) == 6


def test_nothing_is_logged_above_info(caplog: pytest.LogCaptureFixture) -> None:
    run(attn_hooks.wrap(tiny_llama(), "sink_scale"), 5, 1)
    assert [record for record in caplog.records if record.name == "attn_hooks"] == []


ON_A_GPU = {
    "by call: vendor + epilogue, edited flash or decode": (SinkScale(), ACT(layers=(0,))),
    "by call: sdpa, then gain and offset, or decode": (Ablate(heads={0: [3]}),),
    "PyTorch, blocks of rows": (Streaming(), SinkScale()),
    "PyTorch, blocks of rows for heads 1, 2; sdpa for the others": (
        PowerAttention(heads={0: [1, 2]}),
        SinkScale(heads={0: [1]}),
    ),
    "by call: sparse flash": (PowerAttention(heads={0: [1, 2]}), Ablate(heads={0: [3]})),
}


@pytest.mark.parametrize(("path", "edits"), ON_A_GPU.items(), ids=list(ON_A_GPU))
def test_explain_for_a_model_on_a_gpu(path: str, edits: tuple[Edit, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "_on_gpu", lambda layer: True)
    first = attn_hooks.explain(tiny_llama(), *edits).layers[0]
    assert first.path == path
    with_sink_scale = {"streaming", "power"} & set(first.edits) and "sink_scale" in first.edits
    assert ("; no kernel for the Sparsity of " in first.why) == bool(with_sink_scale)


@pytest.mark.parametrize(
    ("edits", "dtype", "triton", "reason"),
    [
        ((ACT(layers=(0,)), ACT(layers=(0,), beta=0.1)), torch.float32, True, "more than one Regroup"),
        ((SinkScale(),), torch.float64, True, "float64"),
        ((SinkScale(),), torch.float32, False, "any edit without Triton"),
    ],
)
def test_explain_says_why_no_kernel_serves(
    edits: tuple[Edit, ...], dtype: torch.dtype, triton: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "_on_gpu", lambda layer: True)
    monkeypatch.setattr(reporting, "has_triton", lambda: triton)
    first = attn_hooks.explain(tiny_llama().to(dtype), *edits).layers[0]
    assert first.path == "PyTorch, blocks of rows"
    assert first.why.endswith(f"; no kernel for {reason}")


@pytest.mark.parametrize("method", attn_hooks.methods().values(), ids=attn_hooks.methods())
def test_methods_declare_their_patterns(method: type[Edit], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Primitive] = []
    primitives = method.primitives

    def listen(edit: Edit, call: attn_hooks.AttentionCall) -> list[Primitive]:
        answered = primitives(edit, call)
        given.extend(answered)
        return answered

    monkeypatch.setattr(method, "primitives", listen)
    if method.method in ACTING_EDITS:
        run(attn_hooks.wrap(tiny_llama(), ACTING_EDITS[method.method]), 8)
    else:
        model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
        attn_hooks.wrap(model, IMAGE_METHODS[method.method].active(model, inputs))(**inputs)
    assert method.by_pattern == any(isinstance(primitive, Sparsity) for primitive in given)


def test_the_paths_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reporting.paths_of_machine() == (["backend + affine", "pytorch"], "no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    paths, why = reporting.paths_of_machine()
    assert {"decode", "vendor + epilogue", "edited flash", "pytorch"} <= set(paths)
    assert why == "a GPU"
    monkeypatch.setattr(reporting, "has_triton", lambda: False)
    assert reporting.paths_of_machine() == (["backend + affine", "pytorch"], "a GPU, no Triton")
