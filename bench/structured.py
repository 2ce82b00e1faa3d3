"""Synthetic queries and keys whose attention has a known structure, to rank sparse attention by what it keeps.

Random normal queries and keys give a flat softmax, in which recall is density. Here a head's logits are a sum of parts,

    s[i, j] = sink_i [j is a sink] + vertical_i [j is a vertical] + needle_i [j is the needle of row i]
              + local_i L(i - j) + slash_i S(i - j - offset) + salience_j + noise

in orthogonal subspaces of head_dim that a random rotation mixes. L and S are means of cosines, as RoPE's phases give them. The
factors of row i are set so that the softmax has the shares of ``HeadMix``, whatever the length: by the row's number for sinks,
verticals and needles, by Newton's method on some rows for L and S. Keys are shared by the query heads of a group, factors are not.

Shares hold for the mean over rows from eight local bands on. A row that lies before its offset, or that has no vertical behind it,
gives their share to the other parts. Memory and time grow with length times head_dim.

    made = structured_query_key(131072, heads=32, kv_heads=8, device="cuda", dtype=torch.bfloat16)
    made.inputs                         # an AttentionInputs
    made.parts(head=1, rows=[131071])   # which part of the structure each key is to these rows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from attn_kernels import AttentionInputs

# Rows on which the factors of L and S are solved for lie this far apart; in between they are interpolated.
ROW_RATIO = 1.5
NEWTON_STEPS, LARGEST_FACTOR = 16, 40.0
NO_ROOM = (
    "these shares cannot be had: cosines of so few dimensions add up by chance at other distances, too. Give a larger head_dim, "
    "or leave more to the rest"
)
SINK_VALUE = 0.05


class Part(IntEnum):
    """What a key is to a row."""

    REST = 0
    SINK = 1
    LOCAL = 2
    VERTICAL = 3
    SLASH = 4
    NEEDLE = 5
    FUTURE = 6


@dataclass(frozen=True)
class HeadMix:
    """Shares of a head's attention; the keys of no part get the rest.

    Attributes:
        sink, local, vertical, slash: shares of a row's mass.
        salience: standard deviation of a key's own logit, the same for all rows: half of its variance is the key's, half its
            neighbourhood's.
        needles: whether the needles of the key head are asked for.
    """

    sink: float
    local: float
    vertical: float = 0.0
    slash: float = 0.0
    salience: float = 0.0
    needles: bool = False

    @property
    def rest(self) -> float:
        return 1.0 - self.sink - self.local - self.vertical - self.slash


STREAMING = HeadMix(sink=0.50, local=0.45)
VERTICAL_SLASH = HeadMix(sink=0.35, local=0.20, vertical=0.22, slash=0.17)
RETRIEVAL = HeadMix(sink=0.55, local=0.35, needles=True)
DIFFUSE = HeadMix(sink=0.10, local=0.10, salience=2.0)


@dataclass(frozen=True)
class Structure:
    """What is planted.

    Attributes:
        heads: the mixes, given to the query heads in turn. By default eight heads have 40 % on sinks, 30 % on the local band and
            30 % elsewhere on average.
        sinks: first keys.
        local: most recent keys, the row's own included; None: a sixteenth of the length, at most 128.
        verticals: keys of each key head that all rows look at.
        slash_reach: keys on either side of a query head's offset that belong to its slash.
        needles: keys of each key head that one to three rows of a query head look for; the first one's is the last row.
        needle_share: share that such a row gives its needle; the other parts share what is left.
        noise: standard deviation of the noise in the logits.
    """

    heads: tuple[HeadMix, ...] = (
        STREAMING, VERTICAL_SLASH, RETRIEVAL, STREAMING, VERTICAL_SLASH, DIFFUSE, STREAMING, VERTICAL_SLASH,
    )  # fmt: skip
    sinks: int = 4
    local: int | None = None
    verticals: int = 32
    slash_reach: int = 8
    needles: int = 3
    needle_share: float = 0.6
    noise: float = 1.0


@dataclass(frozen=True)
class Needle:
    """A key that some rows of a query head look for."""

    sample: int
    head: int
    key: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Structured:
    """Queries and keys with what was planted in them.

    Attributes:
        inputs: one causal call without padding: query ``(B, H, N, D)``, key and value ``(B, K, N, D)``.
        structure: with ``local`` as a number.
        verticals: ``(B, K, verticals)`` long, ascending.
        offsets: ``(B, H)`` long: how far back a query head's slash lies; without a share it means nothing.
        needles: those that some row looks for.
    """

    inputs: AttentionInputs
    structure: Structure
    verticals: Tensor
    offsets: Tensor
    needles: tuple[Needle, ...]

    def mix(self, head: int) -> HeadMix:
        return self.structure.heads[head % len(self.structure.heads)]

    def parts(self, head: int, rows: Sequence[int] | Tensor, sample: int = 0) -> Tensor:
        """``(n, N)`` uint8 of ``Part`` for some rows of a query head. Of two parts a needle, a sink or a vertical goes first."""
        local, mix, device = self.structure.local, self.mix(head), self.inputs.query.device
        assert local is not None
        row = torch.as_tensor(rows, device=device)[:, None]
        distance = row - torch.arange(self.inputs.num_keys, device=device)
        part = torch.zeros_like(distance, dtype=torch.uint8)
        if mix.slash:
            part[(distance - self.offsets[sample, head]).abs() <= self.structure.slash_reach] = Part.SLASH
        part[distance < local] = Part.LOCAL
        if mix.vertical:
            group = self.inputs.num_heads // self.inputs.key.shape[1]
            part[:, self.verticals[sample, head // group]] = Part.VERTICAL
        part[:, : self.structure.sinks] = Part.SINK
        for needle in self.needles:
            if (needle.sample, needle.head) == (sample, head):
                asked = torch.isin(row[:, 0], torch.tensor(needle.rows, device=device))
                part[asked, needle.key] = Part.NEEDLE
        part[distance < 0] = Part.FUTURE
        return part


def structured_query_key(
    length: int,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    *,
    batch: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    structure: Structure | None = None,
) -> Structured:
    """Queries, keys and values of one causal call with the structure planted.

    Where things lie is the same on every device for a seed; noise and values are the device's own. Values are normal, those of
    sinks small.

    Raises:
        ValueError: ``heads`` is no multiple of ``kv_heads``, shares leave no rest, or ``length`` or ``head_dim`` has no room.
    """
    wanted = structure or Structure()
    local = min(128, length // 16) if wanted.local is None else wanted.local
    wanted = replace(wanted, local=local)
    _check(wanted, length, heads, kv_heads, head_dim)
    device = torch.device(device)
    query = torch.empty(batch, heads, length, head_dim, device=device, dtype=dtype)
    key, value = (torch.empty(batch, kv_heads, length, head_dim, device=device, dtype=dtype) for _ in range(2))
    verticals, offsets, needles = [], [], []
    for sample in range(batch):
        drawn = _Sample(wanted, length, heads, kv_heads, head_dim, sample, torch.Generator().manual_seed(seed + sample))
        drawn.fill(query[sample], key[sample], value[sample])
        verticals.append(drawn.verticals)
        offsets.append(drawn.offsets)
        needles += drawn.needles
    index = torch.arange(length, device=device)
    inputs = AttentionInputs(
        query, key, value, head_dim**-0.5, index, index, index[None], index[None],
        torch.ones(1, length, dtype=torch.bool, device=device), first_query=0, padded=False,
    )  # fmt: skip
    return Structured(
        inputs, wanted, torch.stack(verticals).to(device), torch.stack(offsets).to(device), tuple(needles)
    )


def _check(structure: Structure, length: int, heads: int, kv_heads: int, head_dim: int) -> None:
    local = structure.local or 0
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key heads")
    for mix in structure.heads:
        if min(mix.sink, mix.local, mix.vertical, mix.slash) < 0 or mix.rest <= 0:
            raise ValueError(f"{mix}: shares are at least 0, and something is left for the other keys")
    needed = max(8 * local, 4 * (structure.sinks + structure.verticals + structure.needles), 128)
    if length < needed or local < 1:
        raise ValueError(f"{length} tokens have no room for this structure: it needs {needed}")
    if _Dimensions.of(structure, head_dim).local_cosines < 1:
        raise ValueError(f"head_dim {head_dim} has no room for this structure")


@dataclass(frozen=True)
class _Dimensions:
    """How many of head_dim's places each part has before the rotation; a cosine has two, sinks, verticals and salience one each."""

    local_cosines: int
    slash_cosines: int
    needles: int
    noise: int

    @classmethod
    def of(cls, structure: Structure, head_dim: int) -> _Dimensions:
        cosines = (head_dim - 3 - structure.needles - max(4, head_dim // 6)) // 2
        local = round(0.45 * cosines)
        return cls(local, cosines - local, structure.needles, head_dim - 3 - structure.needles - 2 * cosines)


class _Sample:
    """One sample: draws where things lie, solves for the factors, writes the tensors head by head."""

    def __init__(
        self,
        structure: Structure,
        length: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        sample: int,
        generator: torch.Generator,
    ) -> None:
        self.structure, self.length, self.heads, self.kv_heads = structure, length, heads, kv_heads
        self.head_dim, self.generator = head_dim, generator
        self.dimensions = _Dimensions.of(structure, head_dim)
        self.mixes = [structure.heads[head % len(structure.heads)] for head in range(heads)]
        self.local = structure.local or 1
        special = [self._special_keys() for _ in range(kv_heads)]
        self.verticals = torch.stack([verticals for verticals, _ in special])
        self.needle_keys = torch.stack([needles for _, needles in special])
        # Log-uniform from two local bands to half of the length.
        low, high = math.log(2 * self.local + structure.slash_reach), math.log(length / 2)
        self.offsets = (low + (high - low) * self._uniform(heads)).exp().long()
        self.needles = [needle for head in range(heads) for needle in self._needles_of(sample, head)]
        # A cosine's share of the normal distribution of frequencies is drawn in its own stratum.
        self.frequencies = [
            math.sqrt(2) * torch.erfinv((torch.arange(count) + self._uniform(count)) / count) / width
            for count, width in (
                (self.dimensions.local_cosines, self.local / 2),
                (self.dimensions.slash_cosines, structure.slash_reach / 2),
            )
        ]
        self.rotations = [
            torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator)).Q for _ in range(kv_heads)
        ]

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def _special_keys(self) -> tuple[Tensor, Tensor]:
        """Verticals anywhere behind the sinks, needles from an eighth to three quarters of the length."""
        sinks, count, needles = self.structure.sinks, self.structure.verticals, self.structure.needles
        first, stop = max(sinks, self.length // 8), self.length * 3 // 4
        needle_keys = first + torch.randperm(stop - first, generator=self.generator)[:needles]
        others = sinks + torch.randperm(self.length - sinks, generator=self.generator)[: count + needles]
        return others[~torch.isin(others, needle_keys)][:count].sort().values, needle_keys

    def _needles_of(self, sample: int, head: int) -> list[Needle]:
        found = []
        for number, key in enumerate(self._keys_of(head) if self.mixes[head].needles else []):
            first = key + 2 * self.local
            count = 1 if number == 0 else 1 + int(3 * self._uniform(1))
            rows = (
                [self.length - 1]
                if number == 0
                else (first + (self._uniform(count) * (self.length - 1 - first)).long()).unique().tolist()
            )
            found.append(Needle(sample, head, key, tuple(rows)))
        return found

    def _keys_of(self, head: int) -> list[int]:
        keys: list[int] = self.needle_keys[head * self.kv_heads // self.heads].tolist()
        return keys

    def fill(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes ``(H, N, D)`` and ``(K, N, D)``."""
        device = query.device
        noise = torch.Generator(device).manual_seed(int(self._uniform(1) * 2**31))
        phases = [self._phases(frequencies, device) for frequencies in self.frequencies]
        saliences = [self._salience(noise, device) for _ in range(self.kv_heads)]
        factors = _Factors(self, saliences, device)
        group = self.heads // self.kv_heads
        for kv_head, salience in enumerate(saliences):
            rotation = self.rotations[kv_head].to(device)
            key[kv_head] = self._key(kv_head, phases, salience, noise) @ rotation
            value[kv_head] = torch.randn(self.length, self.head_dim, device=device, generator=noise)
            value[kv_head, : self.structure.sinks] *= SINK_VALUE
            for head in range(kv_head * group, (kv_head + 1) * group):
                query[head] = self._query(head, phases, factors, noise) @ rotation

    def _phases(self, frequencies: Tensor, device: torch.device) -> Tensor:
        """``(N, F)`` float64: at 128K tokens float32 would be off by whole hundredths."""
        return torch.arange(self.length, device=device, dtype=torch.float64)[:, None] * frequencies.to(device).double()

    def _salience(self, noise: torch.Generator, device: torch.device) -> Tensor:
        """``(N,)`` of variance 1; neighbourhoods are as long as the local band."""
        own = torch.randn(self.length, device=device, generator=noise)
        around = torch.randn(-(-self.length // self.local), device=device, generator=noise)
        return (own + around.repeat_interleave(self.local)[: self.length]) / math.sqrt(2)

    def _key(self, kv_head: int, phases: list[Tensor], salience: Tensor, noise: torch.Generator) -> Tensor:
        device = salience.device
        turns = [turn for phase in phases for turn in (phase.cos(), phase.sin())]
        special = torch.zeros(self.length, 2 + self.dimensions.needles, device=device)
        special[: self.structure.sinks, 0] = 1
        special[self.verticals[kv_head].to(device), 1] = 1
        needles = self.needle_keys[kv_head].to(device)
        special[needles, 2 + torch.arange(len(needles), device=device)] = 1
        noise_of_key = torch.randn(self.length, self.dimensions.noise, device=device, generator=noise)
        ordinary = torch.cat([*turns, salience[:, None], noise_of_key], 1).float() * (special.sum(1) == 0)[:, None]
        return torch.cat([ordinary, special], 1)

    def _query(self, head: int, phases: list[Tensor], factors: _Factors, noise: torch.Generator) -> Tensor:
        device, mix = phases[0].device, self.mixes[head]
        rows = torch.arange(self.length, device=device)
        of_local, of_slash, log_rest = factors.at(head, rows)
        turns = [
            part * of_local[:, None] / self.dimensions.local_cosines for part in (phases[0].cos(), phases[0].sin())
        ]
        back = phases[1] - int(self.offsets[head]) * self.frequencies[1].to(device).double()
        turns += [part * of_slash[:, None] / self.dimensions.slash_cosines for part in (back.cos(), back.sin())]
        seen = {
            "sink": (rows + 1).clamp(max=self.structure.sinks),
            "vertical": torch.searchsorted(self.verticals[head * self.kv_heads // self.heads].to(device), rows, right=True),
        }  # fmt: skip
        special = torch.zeros(self.length, 2 + self.dimensions.needles, device=device)
        for place, (name, count) in enumerate(seen.items()):
            share = getattr(mix, name)
            if share:
                special[:, place] = log_rest + math.log(share / mix.rest) - count.clamp(min=1).log()
        keys = self._keys_of(head)
        # The parts above sum to the rest over its share; the needle's odds are against all of them.
        odds = math.log(self.structure.needle_share / (1 - self.structure.needle_share))
        for needle in self.needles:
            if needle.head == head:
                asked = list(needle.rows)
                special[asked, 2 + keys.index(needle.key)] = log_rest[asked] - math.log(mix.rest) + odds
        direction = torch.randn(self.length, self.dimensions.noise, device=device, generator=noise)
        direction = self.structure.noise * direction / direction.norm(dim=1, keepdim=True)
        salience = torch.full((self.length, 1), mix.salience, device=device)
        return torch.cat([*turns, salience, direction, special], 1).float() * math.sqrt(self.head_dim)


class _Factors:
    """For each head and row the factors of L and S, and the log of the rest's mass in units of a key whose logit is 0."""

    def __init__(self, sample: _Sample, saliences: list[Tensor], device: torch.device) -> None:
        length, group = sample.length, sample.heads // sample.kv_heads
        first = min(4 * sample.local, length - 1)
        steps = math.ceil(math.log((length - 1) / first) / math.log(ROW_RATIO)) + 1
        self.rows = torch.logspace(math.log10(first), math.log10(length - 1), steps, dtype=torch.float64).round().long()
        distance = torch.arange(length, device=device, dtype=torch.float64)
        kernels = [
            (distance[:, None] * frequencies.to(device).double()).cos().mean(1).float()
            for frequencies in sample.frequencies
        ]
        mixes = sample.mixes
        shares = torch.tensor([[mix.local, mix.slash, mix.rest] for mix in mixes], device=device)
        offsets = sample.offsets.to(device)
        spread = torch.tensor([mix.salience for mix in mixes], device=device)
        found = []
        for row in self.rows.tolist():
            salience = torch.stack([saliences[head // group][: row + 1] for head in range(sample.heads)])
            # Of the ordinary keys' own logits.
            log_mean = (salience * spread[:, None]).logsumexp(1) - math.log(row + 1) + sample.structure.noise**2 / 2
            found.append(_solved(row, kernels, shares, offsets, sample.local, sample.structure.slash_reach, log_mean))
        self.solved = torch.stack(found, -1)  # (3, H, rows)
        self.rows = self.rows.to(device)

    def at(self, head: int, rows: Tensor) -> Tensor:
        """``(3, n)``, interpolated over the logarithm of the row, and constant before the first."""
        known, solved = self.rows.double().log(), self.solved[:, head]
        if len(known) == 1:
            return solved.expand(3, len(rows))
        place = rows.clamp(min=int(self.rows[0])).double().log()
        after = torch.searchsorted(known, place).clamp(1, len(known) - 1)
        part = ((place - known[after - 1]) / (known[after] - known[after - 1])).clamp(0, 1).float()
        return solved[:, after - 1] + part * (solved[:, after] - solved[:, after - 1])


def _solved(
    row: int, kernels: list[Tensor], shares: Tensor, offsets: Tensor, local: int, reach: int, log_mean: Tensor
) -> Tensor:
    """``(3, H)`` for one row: the factors with which local band and slashes have their shares over the rest's, and its log mass."""
    distance = torch.arange(row + 1, device=offsets.device)
    from_slash = (distance - offsets[:, None]).abs()  # (H, row + 1)
    wanted = shares > 0
    of_part = torch.stack([kernels[0][: row + 1].expand(len(shares), -1), kernels[1][from_slash]])
    in_local = (distance < local).expand(len(shares), -1)
    rest = ~(in_local | (from_slash <= reach) & wanted[:, 1:2])
    # All of the slash, also for rows that lie before it.
    around = torch.arange(-reach, reach + 1, device=distance.device)
    of_slash = torch.stack([kernels[0][offsets[:, None] + around], kernels[1][around.abs()].expand(len(shares), -1)])
    target = torch.where(wanted, shares / shares[:, 2:], 1.0).log()[:, :2]
    factors = torch.zeros(len(shares), 2, device=offsets.device)
    for _ in range(NEWTON_STEPS):
        logits = (factors.T[..., None] * of_part).sum(0)
        log_rest, pull_rest = _log_mass(logits, of_part, rest)
        log_local, pull_local = _log_mass(logits, of_part, in_local)
        log_slash, pull_slash = _log_mass((factors.T[..., None] * of_slash).sum(0), of_slash, None)
        missing = target - torch.stack([log_local - log_rest, log_slash - log_rest], 1)
        slope = torch.stack([pull_local - pull_rest, pull_slash - pull_rest], 1)
        both = wanted[:, :2, None] & wanted[:, None, :2]
        slope = torch.where(both, slope, torch.eye(2, device=slope.device))
        missing = torch.where(wanted[:, :2], missing, 0.0)
        factors = (factors + torch.linalg.solve(slope, missing)).clamp(min=0.0, max=LARGEST_FACTOR)
    if bool((missing > 0.01).any()):
        raise ValueError(NO_ROOM)
    return torch.stack([*factors.T, log_rest + log_mean])


def _log_mass(logits: Tensor, of_part: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(H,)`` of some keys, and its derivatives ``(H, 2)`` by the two factors."""
    logits = logits if keys is None else logits.masked_fill(~keys, -torch.inf)
    return logits.logsumexp(1), (logits.softmax(1) * of_part).sum(2).T
