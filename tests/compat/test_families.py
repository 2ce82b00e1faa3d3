"""Every causal-LM family of the installed transformers: identity, Regroup, HeadAffine, generate, unwrap.

A fast subset runs with every test run; all others carry the marker ``compat``.
"""

from __future__ import annotations

import pytest
import transformers

from tests.compat.checks import check_family
from tests.compat.known_gaps import KNOWN_GAPS, KNOWN_GAPS_ON_EAGER
from tests.compat.write_table import TABLE_PATH, measure, pass_rate, said, write
from tests.families import Family, causal_lm_families

REQUIRED_PASS_RATE = 0.9

# Diverse on purpose: what each one adds to plain rotary attention.
FAST_SUBSET = {
    "bart",  # a decoder with cross attention to leave alone
    "bert",  # absolute positions, an output projection in another module
    "bitnet",  # a norm between the heads and their projection
    "bloom",  # no interface: must be refused
    "cohere2",  # parallel blocks, sliding and full layers
    "ctrl",  # attention called with value, key, query
    "dbrx",  # clipped, fused projections
    "deepseek_v3",  # latent attention: value heads narrower than query heads
    "deepseek_v32",  # a learned top-k selection of keys
    "diffllama",  # two attention calls a layer
    "doge",  # a mask for each head
    "falcon_h1",  # attention and state space side by side
    "gemma",  # one wide head_dim
    "gemma2",  # softcap
    "gemma3_text",  # norms on queries and keys, a window in most layers
    "gemma4_text",  # head_dim differs between layers
    "glm4",
    "gpt2",  # fused projections, a branch on the backend's name
    "gpt_bigcode",  # one key head for all
    "gpt_neox",
    "gpt_oss",  # learned sinks
    "granite",
    "jetmoe",  # experts inside the attention
    "laguna",  # head counts differ between layers
    "llama",
    "llama4_text",  # chunked attention
    "mamba",  # no attention: must be refused
    "mistral",  # a window in every layer
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",  # linear attention and gated full attention
    "smollm3",  # layers without positions
    "stablelm",
    "starcoder2",
    "zamba",  # one attention block shared by several layers
}

FAMILIES = [
    pytest.param(family, id=family.name, marks=[] if family.name in FAST_SUBSET else [pytest.mark.compat])
    for family in causal_lm_families()
]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: Family) -> None:
    result = check_family(family)
    if result.interface != "yes":
        assert result.notes, "a family that cannot be edited must say why"
    elif family.name in KNOWN_GAPS:
        assert result.failures, f"{family.name} passes now: take it out of KNOWN_GAPS"
    else:
        assert not result.failures, said(result)


@pytest.mark.compat
@pytest.mark.parametrize("family", causal_lm_families(), ids=lambda family: family.name)
def test_family_on_eager(family: Family) -> None:
    row = measure(family)
    if row.default.passed and family.name in KNOWN_GAPS_ON_EAGER:
        assert row.eager.failures, f"{family.name} passes on eager now: take it out of KNOWN_GAPS_ON_EAGER"
    elif row.default.passed:
        assert not row.eager.failures, said(row.eager)


@pytest.mark.compat
def test_table() -> None:
    """Writes docs/compatibility.md from the whole sweep; at least nine families in ten pass, the others state why."""
    rows = [measure(family) for family in causal_lm_families()]
    write(rows)
    assert pass_rate(rows) >= REQUIRED_PASS_RATE
    silent = [row.default.family for row in rows if not row.default.passed and not row.note]
    assert not silent


def test_table_lists_every_family() -> None:
    """The committed page has a row for each family of the transformers that it was measured on."""
    page = TABLE_PATH.read_text()
    if f"transformers\n{transformers.__version__}," not in page:
        pytest.skip("docs/compatibility.md was measured on another transformers; make compat renews it")
    missing = [family.name for family in causal_lm_families() if f"| {family.name} |" not in page]
    assert not missing


def test_fast_subset_names_measured_families() -> None:
    page = TABLE_PATH.read_text()
    assert not [name for name in FAST_SUBSET if f"| {name} |" not in page]
