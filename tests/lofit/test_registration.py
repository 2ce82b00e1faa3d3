"""How PEFT comes to know LoFiT: in fresh processes, since registering happens once in each."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from attn_hooks import AttnHooksError
from attn_hooks.lofit import LofitConfig, LofitModel
from tests.hooks.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "imports",
    [
        "import attn_hooks, peft",
        "import peft, attn_hooks",
        "import attn_hooks.lofit, peft",
        "import attn_hooks; import peft.tuners.lora; import peft",
    ],
)
def test_in_whatever_order_both_are_imported(imports: str) -> None:
    finished = run(f"{imports}; print(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING['LOFIT'].__module__)")
    assert finished.stdout.strip() == "attn_hooks.lofit.model", finished.stderr[-2000:]


def test_importing_attn_hooks_does_not_import_peft() -> None:
    assert run("import sys, attn_hooks; print('peft' in sys.modules)").stdout.strip() == "False"


def test_without_peft_the_rest_works() -> None:
    block = "import sys; sys.modules['peft'] = None\n"
    finished = run(block + "import attn_hooks; print(len(attn_hooks.methods()) > 10)")
    assert finished.stdout.strip() == "True", finished.stderr[-2000:]


@pytest.mark.parametrize(("imported", "error"), [("", "KeyError: 'LOFIT'"), ("import attn_hooks; ", "")])
def test_a_fresh_process_needs_our_import_to_load(tmp_path: Path, imported: str, error: str) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    get_peft_model(tiny_llama(), LofitConfig()).save_pretrained(tmp_path / "adapter")
    finished = run(
        f"{imported}from peft import PeftModel; from transformers import AutoModelForCausalLM as A; "
        f"model = A.from_pretrained({str(tmp_path / 'base')!r}); "
        f"print(PeftModel.from_pretrained(model, {str(tmp_path / 'adapter')!r}).peft_type)"
    )
    if error:
        assert error in finished.stderr
    else:
        assert finished.stdout.strip().endswith("LOFIT"), finished.stderr[-2000:]


def test_the_member_is_like_peft_s_own() -> None:
    member = PeftType("LOFIT")
    assert member is PeftType.LOFIT is PeftType["LOFIT"]
    assert isinstance(member, PeftType)
    assert (member.name, member.value, member == "LOFIT") == ("LOFIT", "LOFIT", True)
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is LofitModel
    assert type(member) is type(PeftType.LORA)


def test_peft_s_status_names_it() -> None:
    status = get_peft_model(tiny_llama(), LofitConfig()).get_model_status()
    assert status.peft_types == {"default": "LOFIT"}
    assert status.adapter_model_type == "LofitModel"


def test_somebody_else_s_method_of_that_name_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LOFIT, peft.LoraConfig)
    with pytest.raises(AttnHooksError) as refused:
        LofitConfig()
    assert refused.value.code == "foreign-lofit"
    assert "LoraConfig" in str(refused.value)
