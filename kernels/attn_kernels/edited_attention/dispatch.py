"""Which path computes an edited call: the vendor's attention and an epilogue, a kernel, or plain PyTorch.

``choose`` decides from what is known on the host and says why; ``run`` does it. Where one list of touched keys serves all
heads, it waits for the device a few times, once for each lowering: how many keys, which rows, which span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attn_kernels.edited_attention import blocked, span_flash
from attn_kernels.edited_attention.backward import backward_refusal, differentiable_edited_attention
from attn_kernels.edited_attention.column_pass import column_pass
from attn_kernels.edited_attention.decode import edited_decode
from attn_kernels.edited_attention.edited_flash import config_of, edited_flash
from attn_kernels.edited_attention.epilogue import MOST_KEYS, epilogue_
from attn_kernels.edited_attention.head_affine import head_affine_
from attn_kernels.edited_attention.launch import padded_size
from attn_kernels.edited_attention.lowering import LoweredEdits, NotLowered, lower
from attn_kernels.edited_attention.several_regroups import several_regroups
from attn_kernels.inputs import AttentionInputs
from attn_kernels.primitives import HeadAffine, Primitive, Regroup, Sparsity, Tap
from attn_kernels.sparse_attention.sparsity import lower_sparsity, sparse_attention, sparse_refusal

PathName = Literal[
    "vendor",
    "vendor + affine",
    "vendor + epilogue",
    "vendor + last rows",
    "vendor + first keys",
    "edited flash",
    "edited flash twice",
    "edited flash with gradients",
    "decode",
    "sparse flash",
    "pytorch",
]

# A call of so few queries goes to the decode kernel.
DECODE_QUERIES = 16
# The last rows of a prompt go there, too, while they are so few: queries times the query heads of a kv head.
LAST_ROWS = 1024
LARGEST_HEAD_DIM = 256
# Of a product of tiles in Triton.
SMALLEST_VALUE_DIM = 16
# So many keys after the last touched one are worth a call of the vendor's attention.
FEWEST_KEYS_FOR_VENDOR = 512
# The last rows of a single sample read a long run of keys in parts, so that there are programs for all multiprocessors.
FEWEST_KEYS_OF_PART, MOST_PARTS = 256, 8


@dataclass(frozen=True)
class Path:
    """The path of a call and the reason, in words for a log line."""

    name: PathName
    why: str


def vendor_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Plain attention by cuDNN, or by FlashAttention where that is not at hand: output and log-sum-exp ``(B, H, N)``."""
    if _has_cudnn_attention(inputs.query.device):
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            inputs.query, inputs.key, inputs.value, None, True, 0.0, inputs.causal, False, scale=inputs.scaling
        )
        return found[0], found[1].view(inputs.query.shape[:3])
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        inputs.query, inputs.key, inputs.value, 0.0, inputs.causal, False, scale=inputs.scaling
    )
    return found[0], found[1]


def _has_cudnn_attention(device: torch.device) -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(device) >= (9, 0)


def vendor_refusal(inputs: AttentionInputs) -> str | None:
    """Why the vendor's attention cannot compute this call without its edits; None if it can."""
    num_queries, num_keys = inputs.num_queries, inputs.num_keys
    reasons = {
        "a mask": inputs.mask is not None or inputs.bias is not None,
        "padding": inputs.padded,
        "a softcap": inputs.softcap is not None,
        "sink logits": inputs.sink_logits is not None,
        "a sliding window": inputs.window is not None and inputs.window < num_keys,
        "more keys than queries": inputs.causal and num_queries != num_keys,
        "float32": inputs.query.dtype not in (torch.float16, torch.bfloat16),
        "head_dim": inputs.query.shape[-1] != inputs.value.shape[-1] or inputs.query.shape[-1] % 8 != 0,
    }
    return next((what for what, holds in reasons.items() if holds), None)


def choose(inputs: AttentionInputs, lowered: LoweredEdits) -> Path:
    """The path of a call on a GPU whose edits could be lowered."""
    if lowered.sparsity is not None:
        refusal = sparse_refusal(inputs)
        if refusal is not None:
            return Path("pytorch", f"a Sparsity under {refusal}")
        return Path("sparse flash", f"visits by {lowered.sparsity.pattern}")
    group = inputs.num_heads // inputs.key.shape[1]
    if inputs.num_queries <= DECODE_QUERIES and inputs.num_queries * group <= LAST_ROWS:
        return Path("decode", "few queries")
    refusal = vendor_refusal(inputs)
    if not lowered.edits_weights:
        if refusal is None:
            return Path("vendor + affine" if lowered.gain is not None else "vendor", "no edit of the weights")
        return Path("edited flash", f"no log-sum-exp from the vendor under {refusal}")
    if refusal is not None:
        return Path("edited flash", f"no log-sum-exp from the vendor under {refusal}")
    if lowered.order_values is not None:
        return Path("edited flash", "an order by value touches every key")
    if lowered.key_codes.shape[1] > 1:
        # Lists by head come from detection and are short; where one is not, its rows are computed again.
        return Path("vendor + epilogue", "few keys by head")
    listed = lowered.summary.at_most
    if listed <= MOST_KEYS:
        return Path("vendor + epilogue", f"{listed} touched keys")
    if (lowered.unscoped is not None or not lowered.acts_on_all_rows) and _few_keys(lowered.unscoped):
        last_rows = inputs.num_queries - lowered.first_scoped_row
        if last_rows * inputs.num_heads // inputs.key.shape[1] <= LAST_ROWS:
            return Path("vendor + last rows", f"{listed} touched keys in the last {last_rows} rows")
    if lowered.heads is None and inputs.causal and inputs.num_keys - lowered.summary.end >= FEWEST_KEYS_FOR_VENDOR:
        if _few_others(lowered, inputs, (lowered.summary.end, inputs.num_keys)):
            return Path("vendor + first keys", f"{listed} touched keys among the first {lowered.summary.end}")
    return Path("edited flash", f"{listed} touched keys of {inputs.num_keys}")


def _few_keys(lowered: LoweredEdits | None) -> bool:
    return lowered is None or not lowered.edits_weights or lowered.summary.at_most <= MOST_KEYS


def run(
    inputs: AttentionInputs,
    edits: Sequence[Primitive],
    *,
    lowered: LoweredEdits | None = None,
    vendor: tuple[Tensor, Tensor] | None = None,
    path: Path | None = None,
) -> tuple[Tensor, Path]:
    """Output ``(B, H, N, Dv)`` in the value's dtype under all edits, and the path that computed it.

    ``lowered`` is ``lower(inputs, edits)`` from an earlier call with the same edits. ``vendor`` is plain attention's output
    and log-sum-exp on these inputs, if the caller has them; both may be overwritten. Taps are read on the PyTorch path.
    """
    if path is None:
        lowered, path = plan(inputs, edits, lowered)
    if path.name == "edited flash twice":
        try:
            return several_regroups(inputs, edits), path
        except NotLowered as reason:
            path = Path("pytorch", str(reason))
    if lowered is None or path.name == "pytorch":
        output = blocked.edited_attention(inputs, [edit for edit in edits if not isinstance(edit, HeadAffine)])
        return blocked.head_affine(output, edits, inputs.query), path
    if path.name == "edited flash with gradients":
        return differentiable_edited_attention(inputs, lowered), path
    if path.name == "decode":
        return edited_decode(inputs, lowered), path
    if path.name == "sparse flash":
        return sparse_attention(inputs, lowered, _dense), path
    heads = lowered.heads
    if path.name == "edited flash" and (heads is None or vendor_refusal(inputs) is not None):
        return edited_flash(inputs, lowered)[0], path
    if path.name == "vendor + first keys":
        return span_flash.edit_first_keys(
            inputs, lowered, vendor_attention(_from_key(inputs, lowered.summary.end))
        ), path
    output, log_sum_exp = vendor_attention(inputs) if vendor is None else vendor
    if path.name == "vendor" or (heads is not None and len(heads) == 0):
        return output, path
    if path.name == "vendor + affine":
        head_affine_(output, lowered, heads)
    elif path.name == "vendor + epilogue":
        _epilogue(inputs, lowered, output, log_sum_exp)
    elif path.name == "vendor + last rows":
        _last_rows(inputs, lowered, output, log_sum_exp)
    else:
        edited_flash(inputs, lowered, heads, output)
    return output, path


def _dense(inputs: AttentionInputs) -> Tensor:
    """The call without edits."""
    return (vendor_attention if vendor_refusal(inputs) is None else plain_attention_of)(inputs)[0]


def _epilogue(
    inputs: AttentionInputs, lowered: LoweredEdits, output: Tensor, log_sum_exp: Tensor, stop_row: int | None = None
) -> None:
    flags = epilogue_(inputs, lowered, output, log_sum_exp, _rows_per_flag(inputs), lowered.heads, stop_row)
    edited_flash(inputs, lowered, lowered.heads, output, flags, stop_row=stop_row)


def _last_rows(inputs: AttentionInputs, lowered: LoweredEdits, output: Tensor, log_sum_exp: Tensor) -> None:
    """The scoped edits on the rows from the first scoped one on, the others on the rows before."""
    first, heads, unscoped = lowered.first_scoped_row, lowered.heads, lowered.unscoped
    if first < inputs.num_queries:
        run = (0, 0) if lowered.span is None else lowered.span.longest_run(first if inputs.causal else inputs.num_keys)
        parts = (run[1] - run[0]) // FEWEST_KEYS_OF_PART
        # A power of two: each number is a kernel of its own.
        parts = min(1 << max(0, parts.bit_length() - 1), MOST_PARTS if len(inputs.query) == 1 else 1) if parts else 0
        run = (run[0], run[1] - (run[1] - run[0]) % parts) if parts else (0, 0)
        # So few rows as in a decode step are that kernel's.
        is_long = inputs.num_queries - first > DECODE_QUERIES
        if is_long and inputs.num_queries == inputs.num_keys and _few_others(lowered, inputs, run):
            of_run = plain_attention_of(_rows_and_parts(inputs, first, run, parts)) if parts else None
            span_flash.edit_last_rows_(inputs, lowered, output, first, run, of_run, heads)
        else:
            last = edited_decode(_from_row(inputs, first), lowered.of_last_rows)
            assert isinstance(last, Tensor)
            if heads is None:
                output[:, :, first:] = last
            else:
                output[:, :, first:].index_copy_(1, heads.long(), last[:, heads.long()])
    if unscoped is not None and first > 0:
        if unscoped.edits_weights:
            _epilogue(inputs, unscoped, output, log_sum_exp, first)
        else:
            head_affine_(output[:, :, :first], unscoped, unscoped.heads)


def _rows_per_flag(inputs: AttentionInputs) -> int:
    widest = max(padded_size(inputs.query.shape[-1]), padded_size(inputs.value.shape[-1]))
    return config_of(inputs.query.dtype, widest)[0]


def _few_others(lowered: LoweredEdits, inputs: AttentionInputs, run: tuple[int, int]) -> bool:
    """Whether the edit is one long span of keys, and few other keys lie outside ``run``, which the vendor computes."""
    span = lowered.span
    return span is not None and span.others_without(*run, inputs.num_keys).shape[1] <= span_flash.MOST_OTHERS


def _from_key(inputs: AttentionInputs, first: int) -> AttentionInputs:
    """Queries and keys from place ``first`` on; for calls that the vendor takes."""
    return replace(
        inputs, query=inputs.query[:, :, first:], key=inputs.key[:, :, first:], value=inputs.value[:, :, first:]
    )


def _rows_and_parts(inputs: AttentionInputs, first: int, run: tuple[int, int], parts: int) -> AttentionInputs:
    """Queries from ``first`` on and the keys of ``run``, all of which they see, as ``parts`` samples of one sample's keys."""

    def split(tensor: Tensor) -> Tensor:
        keys = tensor[:, :, run[0] : run[1]]
        return keys if parts == 1 else keys[0].unflatten(1, (parts, -1)).transpose(0, 1)

    query = inputs.query[:, :, first:]
    key = split(inputs.key)
    num_keys = key.shape[2]
    return replace(
        inputs,
        query=query if parts == 1 else query.expand(parts, -1, -1, -1),
        key=key,
        value=split(inputs.value),
        query_index=inputs.query_index[first:],
        key_index=inputs.key_index[:num_keys],
        key_valid=inputs.key_valid[:, :num_keys],
        causal=False,
        first_query=0,
    )


def plain_attention_of(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """By our own kernel, for which a few queries to many keys are as well as any: output and log-sum-exp."""
    output, log_sum_exp = edited_flash(inputs, lower(inputs, []), with_log_sum_exp=True)
    assert log_sum_exp is not None
    return output, log_sum_exp


def _from_row(inputs: AttentionInputs, first: int) -> AttentionInputs:
    """The same call without the queries before ``first``; for calls that the vendor takes."""
    return replace(
        inputs,
        query=inputs.query[:, :, first:],
        query_index=inputs.query_index[first:],
        query_position=inputs.query_position[:, first:],
        first_query=inputs.query_offset + first,
    )


def columns(
    inputs: AttentionInputs,
    edits: Sequence[Primitive],
    heads: Tensor | None,
    rows: Tensor | None,
    mean: bool,
    vendor: list[tuple[Tensor, Tensor]],
) -> Tensor | None:
    """Column sums or means ``(B, h, M)`` under ``edits`` without a Regroup (see ``column_pass``); None where it cannot.

    If the vendor's attention gives the log-sum-exp, its result is left in ``vendor``, or taken from there.
    """
    if kernel_refusal(inputs) is not None:
        return None
    try:
        lowered = lower(inputs, edits)
        if not lowered.edits_weights and vendor_refusal(inputs) is None:
            if not vendor:
                vendor.append(vendor_attention(inputs))
            log_sum_exp: Tensor | None = vendor[0][1]
        else:
            # Of the other heads it is not written, and not read.
            selected = None if heads is None else heads.to(torch.int32)
            _, log_sum_exp = edited_flash(inputs, lowered, selected, with_log_sum_exp=True)
        assert log_sum_exp is not None
        return column_pass(inputs, log_sum_exp, heads, lowered, rows, mean)
    except NotLowered:
        return None


def row_totals(
    inputs: AttentionInputs,
    edits: Sequence[Primitive],
    heads: Tensor | None,
    keys: Tensor | None,
    vendor: list[tuple[Tensor, Tensor]],
) -> Tensor | None:
    """``(B, h, N)`` float32 under ``edits``: the weight on a group ``keys``, or without one the log-sum-exp.

    None where no kernel can: a group by head, or edits that are not lowered. The weight is attention to values of 1 on the
    group and 0 elsewhere, as exact as an output in the query's dtype.
    """
    if kernel_refusal(inputs) is not None or (keys is not None and keys.shape[1] > 1):
        return None
    edits = [edit for edit in edits if not isinstance(edit, HeadAffine)]
    try:
        lowered = lower(inputs, edits)
    except NotLowered:
        return None
    if keys is None and not lowered.edits_weights and vendor_refusal(inputs) is None:
        if not vendor:
            vendor.append(vendor_attention(inputs))
        totals = vendor[0][1]
    else:
        # Of the other heads it is not written, and not read.
        selected = None if heads is None else heads.to(torch.int32)
        value, output = inputs.value, None
        if keys is not None:
            batch, num_heads, num_queries = inputs.query.shape[:3]
            # Beside weights as exact as the call's own, but with the range of float32.
            dtype = inputs.query.dtype if inputs.query.dtype == torch.float32 else torch.bfloat16
            group = keys.to(dtype)[..., None].expand(batch, 1, inputs.num_keys, SMALLEST_VALUE_DIM)
            value = group.contiguous().expand(-1, inputs.key.shape[1], -1, -1)
            output = value.new_empty(batch, num_heads, num_queries, SMALLEST_VALUE_DIM, dtype=torch.float32)
        found, log_sum_exp = edited_flash(
            replace(inputs, value=value), lowered, selected, output, with_log_sum_exp=keys is None
        )
        totals = found[..., 0] if log_sum_exp is None else log_sum_exp
    return totals if heads is None else totals[:, heads.long()]


def on_gpu(inputs: AttentionInputs) -> bool:
    """Whether the kernels can run where the tensors are."""
    return inputs.query.is_cuda


def kernel_refusal(inputs: AttentionInputs) -> str | None:
    """Why no kernel can compute this call, whatever its edits; None if they can."""
    if not on_gpu(inputs):
        return "no GPU"
    if inputs.query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return str(inputs.query.dtype).removeprefix("torch.")
    if max(inputs.query.shape[-1], inputs.value.shape[-1]) > LARGEST_HEAD_DIM:
        return f"head_dim above {LARGEST_HEAD_DIM}"
    return "dropout" if inputs.dropout > 0 else None


def plan(
    inputs: AttentionInputs, edits: Sequence[Primitive], lowered: LoweredEdits | None = None
) -> tuple[LoweredEdits | None, Path]:
    """The lowered edits and the path of a call; no lowered edits where only the PyTorch path can do it."""
    refusal = kernel_refusal(inputs)
    if refusal is not None:
        return None, Path("pytorch", refusal)
    if any(isinstance(edit, Tap) for edit in edits):
        return None, Path("pytorch", "a Tap reads the weights")
    trains = torch.is_grad_enabled() and _needs_gradients(inputs, edits)
    kinds = [type(edit) for edit in edits]
    is_prompt = inputs.num_queries > DECODE_QUERIES
    if kinds.count(Regroup) > 1 and Sparsity not in kinds and is_prompt and not trains:
        return None, Path("edited flash twice", "several Regroups")
    # What was lowered in an earlier step has that step's graph.
    if lowered is None or trains:
        try:
            is_sparse = any(isinstance(edit, Sparsity) for edit in edits)
            lowered = lower_sparsity(inputs, edits) if is_sparse else lower(inputs, edits)
        except NotLowered as reason:
            return None, Path("pytorch", str(reason))
    if not trains:
        path = choose(inputs, lowered)
        return (None if path.name == "pytorch" else lowered), path
    refusal = backward_refusal(inputs, lowered)
    if refusal is not None:
        return None, Path("pytorch", refusal)
    return lowered, Path("edited flash with gradients", "factors or inputs are trained")


def _needs_gradients(inputs: AttentionInputs, edits: Sequence[Primitive]) -> bool:
    """Whether a tensor of the call or a factor of its edits is to be trained."""
    tensors = [part for thing in (inputs, *edits) for part in vars(thing).values() if isinstance(part, Tensor)]
    return any(tensor.requires_grad for tensor in tensors)
