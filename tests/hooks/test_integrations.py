"""A wrapped model in the hands of others: pipelines, accelerate, PEFT, pickle, save_pretrained."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import attn_hooks
from attn_hooks import Edit
from tests.hooks import snapshot
from tests.hooks.tiny import (
    ACTING_EDITS,
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    PAD,
    VOCAB_SIZE,
    generated,
    logits,
    padded_batch,
    prompt,
    tiny_llama,
)

ROOT = Path(__file__).resolve().parents[2]
STREAMING, ACT, ABLATE = ACTING_EDITS["streaming"], ACTING_EDITS["act"], ACTING_EDITS["ablate"]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Logits of the unedited model and under each edit."""
    found = {"plain": logits(tiny_llama())}
    for name, edit in ACTING_EDITS.items():
        found[name] = logits(attn_hooks.wrap(tiny_llama(), edit))
    return found


# transformers


def test_text_generation_pipeline() -> None:
    vocabulary = {f"w{token}": token for token in range(VOCAB_SIZE)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", padding_side="left")
    model = tiny_llama()
    texts = ["w1 w9 w17 w30 w41", "w1 w22 w8"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_full_text": False}

    def run() -> list[str]:
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        return [sample[0]["generated_text"] for sample in generate(texts, batch_size=2, **options)]

    plain = run()
    attn_hooks.wrap(model, STREAMING)
    edited = run()
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    tokens = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=PAD,
    )
    assert edited != plain
    assert edited == tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :])
    attn_hooks.unwrap(model)
    assert run() == plain


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_save_pretrained_of_a_wrapped_model_is_a_plain_model(backend: str, tmp_path: Path) -> None:
    model = tiny_llama(attn_implementation=backend)
    plain = logits(model)
    model.save_pretrained(tmp_path / "plain")
    attn_hooks.wrap(model, STREAMING)
    logits(model)
    model.save_pretrained(tmp_path / "wrapped")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not any("attn_hooks" in path.read_text() for path in (tmp_path / "wrapped").glob("*.json"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wrapped", attn_implementation=backend).eval()
    assert torch.equal(logits(loaded), plain)


def test_a_model_made_from_the_config_of_a_wrapped_one_is_unedited(expected: dict[str, Tensor]) -> None:
    model = attn_hooks.wrap(tiny_llama(), STREAMING)
    logits(model)
    other = tiny_llama(copy.deepcopy(model.config))
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(logits(other), expected["plain"])


def test_state_dict_round_trip_between_wrapped_and_plain(expected: dict[str, Tensor]) -> None:
    wrapped = attn_hooks.wrap(tiny_llama(seed=9), STREAMING)
    assert list(wrapped.load_state_dict(tiny_llama().state_dict())) == [[], []]
    assert torch.equal(logits(wrapped), expected["streaming"])


# pickle


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_wrapped_model_keeps_its_edits(how: str, expected: dict[str, Tensor]) -> None:
    model = attn_hooks.wrap(tiny_llama(), ACT)
    logits(model)
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(copied), expected["act"])
    assert attn_hooks.edits_in_force(copied) == (ACT,)
    assert torch.equal(logits(attn_hooks.unwrap(copied)), expected["plain"])
    assert attn_hooks.edits_in_force(model) == (ACT,)


FRESH_PROCESS = """
import os, sys
import torch
import transformers.modeling_utils as modeling
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

sdpa, names = torch.nn.functional.scaled_dot_product_attention, list(modeling.ALL_ATTENTION_FUNCTIONS)
masks, environment = list(ALL_MASK_ATTENTION_FUNCTIONS), dict(os.environ)
import attn_hooks
assert torch.nn.functional.scaled_dot_product_attention is sdpa
assert list(modeling.ALL_ATTENTION_FUNCTIONS) == names, "import registered an attention function"
assert list(ALL_MASK_ATTENTION_FUNCTIONS) == masks, "import registered a mask function"
assert dict(os.environ) == environment, "import set an environment variable"

model, tokens, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(tokens).logits, expected)
"""


def test_in_a_fresh_process_import_changes_nothing_and_a_pickled_model_runs(tmp_path: Path) -> None:
    model = attn_hooks.wrap(tiny_llama(), STREAMING)
    torch.save((model, prompt(), logits(model)), tmp_path / "model.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1)\n" + FRESH_PROCESS,
        str(tmp_path / "model.pt"),
    ]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]


# accelerate


def _dispatched_to_disk(model: Any, folder: Path) -> Any:
    device_map: dict[str, str] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(NUM_LAYERS)}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def _on_cpu(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def _on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu offload": _on_cpu,
    "disk offload": _on_disk,
    "dispatch to cpu and disk": _dispatched_to_disk,
}


@pytest.mark.parametrize("first", ["offload", "wrap"])
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_by_accelerate(how: str, first: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    model = tiny_llama()
    if first == "wrap":
        attn_hooks.wrap(model, ACT, STREAMING)
    OFFLOADS[how](model, tmp_path)
    if first == "offload":
        attn_hooks.wrap(model, ACT, STREAMING)
    in_memory = attn_hooks.wrap(tiny_llama(), ACT, STREAMING)
    assert torch.equal(logits(model), logits(in_memory))
    assert torch.equal(generated(model), generated(in_memory))
    attn_hooks.unwrap(model)
    assert torch.equal(logits(model), expected["plain"])


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.filterwarnings("ignore::attn_hooks.EditNeverActedWarning")
def test_unwrap_leaves_accelerates_hooks_as_they_were(how: str, tmp_path: Path) -> None:
    """Without a forward between: accelerate itself puts new parameters in place at each one."""
    model = OFFLOADS[how](tiny_llama(), tmp_path)
    before = snapshot.take(model)
    attn_hooks.unwrap(attn_hooks.wrap(model, ACT, STREAMING))
    assert snapshot.changes(before, model) == []


def test_loaded_with_a_device_map(expected: dict[str, Tensor], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer == 2 else "cpu" for layer in range(NUM_LAYERS)}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "disk")
    ).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    attn_hooks.wrap(model, ACT)
    assert torch.equal(logits(model), expected["act"])
    assert torch.equal(logits(attn_hooks.unwrap(model)), expected["plain"])


def test_accelerates_hooks_may_come_off_while_wrapped(expected: dict[str, Tensor]) -> None:
    model = attn_hooks.wrap(cpu_offload(tiny_llama(), torch.device("cpu")), STREAMING)
    logits(model)
    remove_hook_from_submodules(model)
    model.load_state_dict(tiny_llama().state_dict(), assign=True)
    assert torch.equal(logits(model), expected["streaming"])


# PEFT


def with_lora(model: Any) -> PeftModel:
    torch.manual_seed(4)
    options = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(model, LoraConfig(**options, init_lora_weights=False)).eval()


@pytest.mark.parametrize("name", ACTING_EDITS)
def test_wrapping_a_peft_model(name: str) -> None:
    model = with_lora(tiny_llama())
    before, plain = snapshot.take(model), logits(model)
    assert attn_hooks.wrap(model, ACTING_EDITS[name]) is model
    edited = logits(model)
    merged = with_lora(tiny_llama()).merge_and_unload()
    torch.testing.assert_close(edited, logits(attn_hooks.wrap(merged, ACTING_EDITS[name])), rtol=1e-4, atol=1e-4)
    assert (edited - plain).abs().max() > 1e-3
    assert generated(model).shape == (2, 18)
    attn_hooks.unwrap(model)
    assert snapshot.changes(before, model) == []
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("through", ["peft model", "base model"])
def test_a_peft_model_made_of_a_wrapped_model(through: str) -> None:
    base = attn_hooks.wrap(tiny_llama(), STREAMING)
    model = with_lora(base)
    plain = logits(with_lora(tiny_llama()))
    edited = logits(attn_hooks.wrap(with_lora(tiny_llama()), STREAMING))
    assert torch.equal(logits(model), edited)
    attn_hooks.unwrap(model if through == "peft model" else base)
    assert torch.equal(logits(model), plain)
    assert attn_hooks.edits_in_force(model) == attn_hooks.edits_in_force(base) == ()


@pytest.mark.parametrize("how", ["wrap", "editing"])
def test_new_edits_through_a_peft_model_made_of_a_wrapped_model(how: str) -> None:
    base = attn_hooks.wrap(tiny_llama(), ABLATE)
    model = with_lora(base)
    logits(model)
    if how == "wrap":
        attn_hooks.wrap(model, STREAMING)
        assert torch.equal(logits(model), logits(attn_hooks.wrap(with_lora(tiny_llama()), STREAMING)))
    else:
        with attn_hooks.editing(model, STREAMING):
            both = logits(attn_hooks.wrap(with_lora(tiny_llama()), ABLATE, STREAMING))
            assert torch.equal(logits(model), both)
        assert torch.equal(logits(model), logits(attn_hooks.wrap(with_lora(tiny_llama()), ABLATE)))
    attn_hooks.unwrap(model)
    assert torch.equal(logits(model), logits(with_lora(tiny_llama())))


def test_adapters_may_be_switched_under_an_edit() -> None:
    model = attn_hooks.wrap(with_lora(tiny_llama()), STREAMING)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(attn_hooks.wrap(tiny_llama(), STREAMING)))
    assert torch.equal(logits(model), logits(attn_hooks.wrap(with_lora(tiny_llama()), STREAMING)))


@pytest.mark.parametrize("name", ["act", "sink_scale", "streaming"])
def test_lora_trains_under_an_edit(name: str) -> None:
    model = attn_hooks.wrap(with_lora(tiny_llama()).train(), ACTING_EDITS[name])
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    batch = padded_batch("left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(6):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_an_adapter_saved_under_an_edit_holds_lora_only(tmp_path: Path) -> None:
    model = attn_hooks.wrap(with_lora(tiny_llama()), STREAMING)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(with_lora(tiny_llama())))


# Edits written outside the package


class _HalvedHead(Edit):
    """A method of another package: halves one head's output."""

    method = "halved_head"
    source = "none"
    reads = frozenset({"output"})
    writes = "output"
    scope = "per-token"
    head: int = 0

    def primitives(self, call: Any) -> list[Any]:
        from attn_kernels import HeadAffine

        gain = torch.ones(len(call.heads))
        gain[self.head - call.heads.start] = 0.5
        return [HeadAffine(gain=gain)]


def test_an_edit_of_another_package(expected: dict[str, Tensor]) -> None:
    gain = torch.ones(NUM_LAYERS, NUM_HEADS)
    gain[:, 3] = 0.5
    same = logits(attn_hooks.wrap(tiny_llama(), attn_hooks.HeadAffine(gain=gain)))
    model = attn_hooks.wrap(tiny_llama(), _HalvedHead(head=3))
    assert torch.equal(logits(model), same)
    assert str(_HalvedHead(head=3)) == "halved_head(head=3)"
    assert torch.equal(logits(attn_hooks.unwrap(model)), expected["plain"])


def test_an_edit_without_primitives_says_so() -> None:
    class Unfinished(_HalvedHead):
        primitives = Edit.primitives

    model = attn_hooks.wrap(tiny_llama(), Unfinished())
    with pytest.raises(NotImplementedError, match="Unfinished"):
        logits(model)


def test_heads_are_edited_before_o_proj(expected: dict[str, Tensor]) -> None:
    """An ablated head is a head whose columns of o_proj are zero."""
    model = tiny_llama()
    with torch.no_grad():
        for head in (3, 6):
            model.model.layers[1].self_attn.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
    torch.testing.assert_close(logits(model), expected["ablate"])
