"""bench.structured: the planted parts hold the shares that they are said to, by the literal softmax of sampled rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.structured import DIFFUSE, VERTICAL_SLASH, HeadMix, Part, Structure, Structured, structured_query_key


def weights(made: Structured, head: int, rows: Tensor, sample: int = 0) -> Tensor:
    """``(n, N)``."""
    inputs = made.inputs
    group = inputs.num_heads // inputs.key.shape[1]
    logits = inputs.query[sample, head, rows].double() @ inputs.key[sample, head // group].double().T * inputs.scaling
    return logits.masked_fill(torch.arange(inputs.num_keys) > rows[:, None], -torch.inf).softmax(-1)


def masses(made: Structured, head: int, rows: Tensor, sample: int = 0) -> dict[Part, Tensor]:
    weight, part = weights(made, head, rows, sample), made.parts(head, rows, sample)
    return {one: (weight * (part == one)).sum(1) for one in Part}


def later_rows(made: Structured, count: int = 96) -> Tensor:
    first = 8 * (made.structure.local or 0)
    return torch.linspace(first, made.inputs.num_keys - 2, count).long()


@pytest.mark.parametrize(
    ("length", "head_dim", "seed"), [(512, 64, 0), (2048, 128, 1), (8192, 64, 2)], ids=["512-D64", "2K-D128", "8K-D64"]
)
def test_parts_hold_their_shares(length: int, head_dim: int, seed: int) -> None:
    made = structured_query_key(length, heads=8, kv_heads=2, head_dim=head_dim, seed=seed)
    rows = later_rows(made)
    mean: dict[Part, list[float]] = {part: [] for part in Part}
    for head in range(8):
        mix, found = made.mix(head), masses(made, head, rows)
        for part, mass in found.items():
            mean[part].append(float(mass.mean()))
        # A lognormal factor on keys and their neighbourhoods leaves a row's own share to chance.
        tolerance = 0.12 if mix.salience else 0.06
        behind_slash = rows > int(made.offsets[0, head])
        for part, share in (
            (Part.SINK, mix.sink),
            (Part.LOCAL, mix.local),
            (Part.VERTICAL, mix.vertical),
            (Part.REST, mix.rest),
        ):
            held = found[part][behind_slash] if mix.slash else found[part]
            assert float(held.mean()) == pytest.approx(share, abs=tolerance), (head, part)
        if mix.slash:
            assert float(found[Part.SLASH][behind_slash].mean()) == pytest.approx(mix.slash, abs=0.06), head
    averages = {part: sum(shares) / 8 for part, shares in mean.items()}
    assert averages[Part.SINK] == pytest.approx(0.40, abs=0.05)
    assert averages[Part.LOCAL] == pytest.approx(0.30, abs=0.05)
    assert averages[Part.FUTURE] == 0


def test_each_part_stands_out_key_by_key() -> None:
    """What is planted is heavier than chance, not only in sum: every vertical, every slash's middle, every sink."""
    made = structured_query_key(4096, heads=1, kv_heads=1, structure=Structure(heads=(VERTICAL_SLASH,)), seed=3)
    rows = torch.arange(3000, 4000, 25)
    weight, part = weights(made, 0, rows), made.parts(0, rows)
    typical = torch.stack([row[one == Part.REST].median() for row, one in zip(weight, part, strict=True)])[:, None]
    seen = made.verticals[0, 0][made.verticals[0, 0] < 3000 - 128]
    assert (weight[:, seen] > 20 * typical).all()
    assert (weight[:, :4] > 100 * typical).all()
    middle = weight.gather(1, rows[:, None] - made.offsets[0, 0])
    assert (middle > 20 * typical).double().mean() > 0.9


def test_needles_are_found_by_their_rows_alone() -> None:
    made = structured_query_key(4096, heads=8, kv_heads=4, structure=Structure(needle_share=0.7), seed=4)
    assert {needle.head for needle in made.needles} == {2}
    assert len(made.needles) == 3
    assert made.needles[0].rows == (4095,)
    for needle in made.needles:
        assert 1 <= len(needle.rows) <= 3
        rows = torch.tensor(needle.rows)
        held = weights(made, 2, rows)[:, needle.key]
        assert ((held - 0.7).abs() < 0.08).all()
        others = torch.tensor([row for row in range(needle.key + 1, 4096, 50) if row not in needle.rows])
        assert float(weights(made, 2, others)[:, needle.key].max()) < 0.02
        assert (made.parts(2, rows)[:, needle.key] == Part.NEEDLE).all()
        # Another head of the group shares the key and has no row that looks for it.
        assert float(weights(made, 3, rows)[:, needle.key].max()) < 0.02


def test_a_diffuse_heads_rest_lies_on_salient_keys() -> None:
    """Not flat: the heaviest fifth of the keys of a row holds most, and neighbouring rows agree on them."""
    made = structured_query_key(4096, heads=1, kv_heads=1, structure=Structure(heads=(DIFFUSE,)), seed=5)
    before, after = weights(made, 0, torch.tensor([3000, 4000]))[:, 10:2800]
    heaviest = before.topk(len(before) // 5).indices
    assert float(before[heaviest].sum() / before.sum()) > 0.75
    assert float(after[heaviest].sum() / after.sum()) > 0.65


def test_samples_heads_and_seeds_differ_and_a_seed_repeats() -> None:
    asked = {"heads": 4, "kv_heads": 2, "head_dim": 64, "batch": 2}
    made, again = (structured_query_key(1024, **asked, seed=7) for _ in range(2))  # type: ignore[arg-type]
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(made.inputs, name), getattr(again.inputs, name))
    assert made.needles == again.needles
    assert made.inputs.query.shape == (2, 4, 1024, 64)
    assert made.inputs.key.shape == made.inputs.value.shape == (2, 2, 1024, 64)
    assert not torch.equal(made.verticals[0], made.verticals[1])
    assert not torch.equal(made.verticals[0, 0], made.verticals[0, 1])
    other = structured_query_key(1024, **asked, seed=8)  # type: ignore[arg-type]
    assert not torch.equal(made.verticals, other.verticals)
    rows = later_rows(made)
    assert float(masses(made, 0, rows, sample=1)[Part.SINK].mean()) == pytest.approx(0.5, abs=0.06)


def test_bfloat16_keeps_the_shares() -> None:
    made = structured_query_key(2048, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, seed=1)
    exact = structured_query_key(2048, heads=8, kv_heads=2, head_dim=64, seed=1)
    assert made.inputs.query.dtype == torch.bfloat16
    rows = later_rows(made)
    for head in range(8):
        rounded, wanted = masses(made, head, rows), masses(exact, head, rows)
        assert max(abs(float(rounded[part].mean() - wanted[part].mean())) for part in Part) < 0.02


def test_what_has_no_room_is_said() -> None:
    with pytest.raises(ValueError, match="no multiple of 3 key heads"):
        structured_query_key(1024, heads=8, kv_heads=3)
    with pytest.raises(ValueError, match="64 tokens have no room"):
        structured_query_key(64)
    with pytest.raises(ValueError, match="head_dim 8 has no room"):
        structured_query_key(1024, head_dim=8)
    with pytest.raises(ValueError, match="Give a larger head_dim"):
        structured_query_key(8192, head_dim=16)
    with pytest.raises(ValueError, match="something is left for the other keys"):
        structured_query_key(1024, structure=replace(Structure(), heads=(HeadMix(sink=0.6, local=0.4),)))
