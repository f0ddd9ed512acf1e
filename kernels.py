"""Triton kernels for Reflective Masking, each beside the plain PyTorch that defines it.

    1. decide_from_logits          Eq. 1 where logits exist: a row is read at masked positions only
    2. decide_from_hidden          Eq. 1 from hidden states: logits [N, V] are never formed
    3. history_step, history_sum   Eq. 2 as the O(1) recurrence, and as the closed sum with its gradient
    4. revision_cross_entropy      the three losses of the oracle action, with gradient, from logits or hidden states

"Multi-Turn Reflective Masking Elicits Reasoning in Mask Diffusion Models" (Zhang et al., 2026, arXiv 2606.16700).
Each section reads: what it computes, what it costs, the PyTorch reference, the kernel, the public function.

Every public function takes impl: "torch", "triton", or None, which is triton for CUDA tensors where triton is
installed (float64 excepted) and torch otherwise; which_path(device) says so in a line.  Without triton the file
imports and every operation is its reference.  TRITON_INTERPRET=1, set before the import, runs the kernels on CPU.
Inputs are never written; arithmetic is float32 at least.  Wrong shapes, dtypes and devices are a ValueError that
names the argument, before any launch.  Ids out of range are one too on CPU; on a GPU that check would wait for the
device, so there such an id reads nothing: its position is kept, adds no history, or has loss NaN.

Run as a script, the file checks and times every operation: python kernels.py --help
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, slowly
except ImportError:  # the kernels below are then never called
    triton, tl, INTERPRETED = None, types.SimpleNamespace(constexpr=lambda value: value), False

    def jit(kernel: Callable) -> Callable:
        return kernel


REVEAL, REMASK, KEEP, IGNORE = 0, 1, 2, -1  # roles, as the oracle action gives them

NO_TOKEN = tl.constexpr(2**31 - 1)  # "no best token yet"; greater than any id, so that min() prefers ids


def use_triton(impl: str | None, x: Tensor) -> bool:
    """Whether an operation on x runs as a Triton kernel.  Raises ValueError when impl asks for the impossible."""
    _require(impl in (None, "torch", "triton"), f"impl must be None, 'torch' or 'triton', got {impl!r}")
    possible = triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    if impl == "triton" and not possible:
        raise ValueError(
            "impl 'triton' needs triton, CUDA tensors (or TRITON_INTERPRET=1) and float32, bfloat16 or float16; "
            f"got {x.dtype} on {x.device}, triton {'absent' if triton is None else triton.__version__}"
        )
    return possible and (impl == "triton" or (impl is None and x.is_cuda))


def which_path(device: torch.device | str) -> str:
    """One line that says what runs on a device with impl=None."""
    if use_triton(None, torch.empty(0, device=device)):
        return f"kernels: triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
    why = "triton is not installed" if triton is None else "kernels need a CUDA device"
    return f"kernels: PyTorch {torch.__version__} on {device} ({why})"


def _tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that walks rows of the given width.

    Wide rows: 4,096 columns over 8 warps, 16 elements a thread, i.e. two 16-byte loads of bf16 in flight.
    Narrow rows (V = 10) share a program, up to 64, since a program for 20 bytes is all overhead.
    """
    columns = max(16, min(triton.next_power_of_2(width), 4096))
    return max(1, min(64, 2048 // columns)), columns, 8 if columns >= 2048 else 4


def _launch(kernel: Callable, grid: tuple[int, ...], x: Tensor, *rest, **meta) -> None:
    """Runs kernel(x, *rest) on x's device, which need not be the current one; nothing for an empty grid."""
    if 0 not in grid:
        on_device = x.is_cuda and not torch.compiler.is_compiling()
        with torch.cuda.device(x.device) if on_device else contextlib.nullcontext():
            kernel[grid](x, *rest, **meta)


def _rows_of(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """[..., V] as a view [B, N, V], and what kernels need to walk it: N, strides, V.  No copy up to three axes."""
    x = x[(None,) * (3 - x.ndim)] if x.ndim <= 3 else x.flatten(0, -3)
    return x, (x.shape[1], *x.stride(), x.shape[2])


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_floating(name: str, x: Tensor) -> None:
    _require(x.is_floating_point() and x.dtype.itemsize >= 2, f"{name} must be floating point, got {x.dtype}")


def _check_head(head: Tensor, x: Tensor) -> None:
    want, got = f"[V, {x.shape[-1]}], {x.dtype} on {x.device}", f"{[*head.shape]}, {head.dtype} on {head.device}"
    fits = head.ndim == 2 and (head.shape[1], head.dtype, head.device) == (x.shape[-1], x.dtype, x.device)
    _require(fits, f"head must be {want} as hidden is, got {got}")


def check_ids(
    name: str, ids: Tensor, shape: torch.Size | None, device: torch.device, low: int, size: int,
    where: Tensor | None = None,
) -> None:  # fmt: skip
    """int32 or int64, of a shape, on a device; on CPU also low <= ids < size (where says at which positions)."""
    _require(ids.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64, got {ids.dtype}")
    _require(shape is None or ids.shape == shape, f"{name} must be of shape {shape and [*shape]}, got {[*ids.shape]}")
    _require(ids.device == device, f"{name} must be on {device}, got {ids.device}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        ids = ids if where is None else ids[where]
        if ids.numel():
            least, most = (int(x) for x in ids.aminmax())
            _require(low <= least and most < size, f"{name} must hold ids in [{low}, {size}), got {least} to {most}")


# ---------------------------------------------------------------------------------------------------------------
# 1. decide_from_logits
#
# Computes, for every position (Eq. 1):   x != M:  re-mask if logit[M] > logit[x]       (one softmax: p compares alike)
#                                         x  = M:  best = argmax over V without M, and its log-probability there
#
# Costs: a visible position needs two logits, a masked one its row.  Bytes = masked * V * itemsize + two sectors of
# 32 bytes a visible position; some 4 operations and one exponential per element of a masked row, far below the
# arithmetic ceiling.  Floor = bytes / bandwidth: 25 % of [8192, 126464] bf16 masked is 519 MB, 173 us at 3.0 TB/s,
# where a float32 softmax over all rows moves over 12 GB.
#
# The state of a scan is (top, best, rest): the largest logit, its id, and the sum of exp(logit - top) over the OTHER
# tokens.  The log-probability of best is -log1p(rest), exact where a float32 probability would round to 1 (gaps
# beyond 17 nats) and ranks would tie.  Two states merge into one, so rows can be split anywhere.


class Decision(NamedTuple):
    """Eq. 1 at every position, each of tokens' shape.

    best: the revealed token where the position is masked and editable, elsewhere the token itself; tokens' dtype.
    confidence: best's log-probability among the tokens without MASK there, elsewhere -inf, so that it ranks the
    reveals as it is; float32, or float64 for float64 inputs.
    remask: bool, visible and editable positions whose MASK is likelier.  following: the next tokens.
    """

    best: Tensor
    confidence: Tensor
    remask: Tensor
    following: Tensor


def _reveal_(rows: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Best token and confidence of logits [R, V], which are overwritten."""
    rows[:, mask_id] = -torch.inf
    top, best = rows.max(-1)
    rest = rows.sub_(top.unsqueeze(-1)).exp_().scatter_(-1, best.unsqueeze(-1), 0).sum(-1)
    best = best.masked_fill(top == -torch.inf, int(mask_id == 0))  # a row of -inf: the lowest id that is not MASK
    return best, -torch.log1p(rest)


def _decide_from_logits_torch(logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None) -> Decision:
    masked = tokens == mask_id
    own = logits.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    remask = logits[..., mask_id] > own  # Eq. 1, first line; false at M, where both are one logit
    if editable is not None:
        masked, remask = masked & editable, remask & editable
    best, confidence = _reveal_(_wide(logits[masked]), mask_id)  # Eq. 1, third line
    best = tokens.masked_scatter(masked, best.to(tokens.dtype))
    confidence = torch.full_like(own, -torch.inf, dtype=confidence.dtype).masked_scatter_(masked, confidence)
    return Decision(best, confidence, remask, best.masked_fill(remask, mask_id))


@jit
def _collapse(top, best, rest):  # the states of the columns of a tile [R, C], in any order, into one a row
    nan = tl.min(tl.where(top != top, best, NO_TOKEN), 1)  # the first NaN wins; max() may drop NaN
    high = tl.max(tl.where(top == top, top, -float("inf")), 1)
    first = tl.min(tl.where(top == high[:, None], best, NO_TOKEN), 1)  # ties: the lowest id
    scale = tl.where(top == -float("inf"), 0.0, tl.exp(top - high[:, None]))
    total = tl.sum(tl.where(best == first[:, None], rest, (rest + 1.0) * scale), 1)
    is_nan = nan < NO_TOKEN
    return tl.where(is_nan, float("nan"), high), tl.where(is_nan, nan, first), total


@jit
def _log_p(top, rest):  # -log1p(rest), the log-probability of best
    # Below 0.03 a series (relative error 1e-9): log(1 + rest) would lose what makes confidences differ.
    series = rest * (1.0 - rest * (0.5 - rest * (1.0 / 3.0 - rest * (0.25 - rest * 0.2))))
    log1p = tl.where(rest < 0.03, series, tl.log(1.0 + rest))
    return tl.where(top > -float("inf"), -log1p, float("nan"))  # NaN for a row of -inf, and for a NaN


@jit
def _scan(line, wanted, vocabulary, mask_id, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # The states of ROWS rows at the pointers line [ROWS].  Every lane keeps a state of its own, so the loop has no
    # reduction across threads; rows that are not wanted load nothing.
    top = tl.full([ROWS, COLUMNS], -float("inf"), tl.float32)
    best = tl.full([ROWS, COLUMNS], NO_TOKEN, tl.int32)
    rest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        use = wanted[:, None] & (column < vocabulary) & (column != mask_id)
        x = tl.load(line[:, None] + column.to(tl.int64) * stride, mask=use, other=-float("inf")).to(tl.float32)
        wins = (x > top) | ((x != x) & (top == top))  # the first NaN wins, as in torch
        low, high = tl.where(wins, top, x), tl.where(wins, x, top)
        scale = tl.where(low == -float("inf"), 0.0, tl.exp(low - high))  # one exponential an element
        rest = tl.where(wins, (rest + 1.0) * scale, rest + scale)
        top, best = high, tl.where(wins, column, best)
    return _collapse(top, best, rest)


@jit
def _decide_kernel(
    logits, tokens, editable, best_out, confidence_out, remask_out, following_out,
    count, length, stride_b, stride_n, stride_v, vocabulary, mask_id,
    LOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS positions; a program without a masked one reads two logits a position and ends.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    token = tl.load(tokens + row, mask=inside, other=0).to(tl.int32)
    free = inside
    if LOCKS:
        free = inside & (tl.load(editable + row, mask=inside, other=0) != 0)
    masked = free & (token == mask_id)
    visible = free & (token != mask_id) & (token >= 0) & (token < vocabulary)
    line = logits + (row // length) * stride_b + (row % length) * stride_n  # int64: N * V passes 2^31
    own = tl.load(line + token.to(tl.int64) * stride_v, mask=visible, other=0.0).to(tl.float32)
    at_mask = tl.load(line + tl.cast(mask_id, tl.int64) * stride_v, mask=visible, other=0.0).to(tl.float32)
    remask = visible & (at_mask > own)  # Eq. 1, first line
    best, confidence = token, tl.full([ROWS], -float("inf"), tl.float32)
    if tl.max(masked.to(tl.int32), 0) > 0:
        top, first, rest = _scan(line, masked, vocabulary, mask_id, stride_v, ROWS, COLUMNS)
        first = tl.where(top == -float("inf"), tl.where(mask_id == 0, 1, 0), first)
        best = tl.where(masked, first, token)  # Eq. 1, third line
        confidence = tl.where(masked, _log_p(top, rest), confidence)
    tl.store(best_out + row, best, mask=inside)
    tl.store(confidence_out + row, confidence, mask=inside)
    tl.store(remask_out + row, remask, mask=inside)
    tl.store(following_out + row, tl.where(remask, mask_id, best), mask=inside)


def _decide_from_logits_triton(logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None) -> Decision:
    (rows, walk), (tile, columns, warps) = _rows_of(logits), _tile(logits.shape[-1])
    dtypes = (tokens.dtype, torch.float32, torch.bool, tokens.dtype)
    decision = Decision(*(torch.empty(tokens.shape, dtype=dtype, device=tokens.device) for dtype in dtypes))
    _launch(
        _decide_kernel, (triton.cdiv(tokens.numel(), tile),), rows, tokens.contiguous(),
        tokens if editable is None else editable.contiguous(), *decision, tokens.numel(), *walk, mask_id,
        LOCKS=editable is not None, ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return decision


def _check_decide(name: str, x: Tensor, vocabulary: int, tokens: Tensor, mask_id: int, editable: Tensor | None):
    _check_floating(name, x)
    _require(x.ndim >= 1 and vocabulary >= 2, f"{name} needs a vocabulary of a token and MASK, got {[*x.shape]}")
    _require(0 <= mask_id < vocabulary, f"mask_id must lie in [0, {vocabulary}), got {mask_id}")
    check_ids("tokens", tokens, x.shape[:-1], x.device, 0, vocabulary)
    if editable is None:
        return None
    fits = (editable.dtype, editable.device) == (torch.bool, x.device)
    sizes = zip(editable.shape[::-1], tokens.shape[::-1])
    fits &= editable.ndim <= tokens.ndim and all(size in (1, full) for size, full in sizes)
    got = f"{[*editable.shape]}, {editable.dtype} on {editable.device}"
    _require(fits, f"editable must be bool on {x.device} and broadcast to tokens {[*tokens.shape]}, got {got}")
    return editable.expand_as(tokens)


@torch.no_grad()
def decide_from_logits(
    logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None = None, impl: str | None = None
) -> Decision:
    """Eq. 1 at every position, from logits: keep, re-mask, or reveal with a confidence to rank by.

    logits: float [..., V], any strides.  tokens: int32 or int64 [...].  editable: bool, broadcastable to tokens;
    elsewhere the token stays.  Returns a Decision; no gradient.
    Ties go to the lowest id.  logit[M] = logit[x] keeps.  NaN: a NaN at x or M never re-masks (comparisons are
    false); at a masked position the first NaN among the tokens is the best, with confidence NaN, as in torch's
    argmax and softmax.  Two or more +inf, or a row of -inf, have confidence NaN; the latter reveals the lowest
    id.  MASK is never revealed, and its logit is not read at masked positions.
    Raises ValueError for wrong shapes, dtypes or devices, a mask_id outside [0, V), on CPU ids outside [0, V).
    """
    editable = _check_decide("logits", logits, logits.shape[-1] if logits.ndim else 0, tokens, mask_id, editable)
    run = _decide_from_logits_triton if use_triton(impl, logits) else _decide_from_logits_torch
    return run(logits, tokens, mask_id, editable)


# ---------------------------------------------------------------------------------------------------------------
# 2. decide_from_hidden
#
# Computes the same decision from hidden states h [N, D] and the head W [V, D], logit[v] = h . W[v].
#
# Costs: a visible position the dot product h . (W[M] - W[x]), 2 D values read (W[M] stays in cache); a masked one
# 2 V D operations.  Floor: max(2 masked V D / matrix rate, (V D + N D + visible D) itemsize / bandwidth).  At
# [8192, 4096] with V = 126464 and 25 % masked: 2.12 TFLOP, 2.7 ms at 790 TFLOP/s, four times less than all logits.
# Under some 263 masked rows reading W is the floor: 345 us.
#
# So the visible rows get their product, and the masked ones are gathered.  Few of them: one fused kernel, whose
# programs share the vocabulary out and leave a state (top, best, rest) each; a second kernel merges them in order.
# Many: the library's matrix product into a bounded workspace, a block of rows at a time, then operation 1.  From 263
# rows on the product hides reading W again for each block.

FUSED_ROWS = 256  # masked rows up to which reading W dominates, so that a plain tl.dot loop is enough
DENSE_VOCABULARY = 1024  # with so few columns all rows are multiplied, and nothing waits for a row count


def _block_rows(x: Tensor, vocabulary: int) -> int:
    """Rows of logits at a time: 256 MiB on a GPU (1,061 rows of V = 126464 in bf16), 32 MiB on CPU, about its cache."""
    return max(FUSED_ROWS, (2**28 if x.is_cuda else 2**25) // (vocabulary * x.dtype.itemsize))


def _remask_torch(hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int, visible: Tensor) -> Tensor:
    remask = torch.zeros_like(visible)
    for rows in visible.nonzero().squeeze(1).split(1024):
        apart = _wide(head[mask_id]) - _wide(head[tokens[rows]])  # equal rows of the head tie, whatever the rounding
        remask[rows] = (_wide(hidden[rows]) * apart).sum(-1) > 0  # Eq. 1, first line: logit[M] > logit[x]
    return remask


@jit
def _remask_kernel(
    hidden, head, tokens, visible, out, count, width, vocabulary, mask_id, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # Grid: one program per ROWS positions; those that are not visible load nothing.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    token = tl.load(tokens + row, mask=inside, other=0).to(tl.int64)
    use_row = (tl.load(visible + row, mask=inside, other=0) != 0) & (token >= 0) & (token < vocabulary)
    apart = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        use = use_row[:, None] & (column < width)
        h = tl.load(hidden + row[:, None] * width + column, mask=use, other=0.0).to(tl.float32)
        x = tl.load(head + token[:, None] * width + column, mask=use, other=0.0).to(tl.float32)
        m = tl.load(head + tl.cast(mask_id, tl.int64) * width + column, mask=column < width, other=0.0).to(tl.float32)
        apart += h * (m - x)
    tl.store(out + row, use_row & (tl.sum(apart, 1) > 0.0), mask=inside)  # Eq. 1, first line


@jit
def _fused_head_kernel(
    hidden, head, rows, masked, top_out, best_out, rest_out, count, width, vocabulary, mask_id,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Grid: (row tiles, column tiles); row tiles vary fastest, so those that share columns of the head run together
    # and read them from the cache.  A tile without a masked row does nothing.
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < count, other=0).to(tl.int64)
    wanted = tl.load(masked + row, mask=index < count, other=0) != 0
    if tl.max(wanted.to(tl.int32), 0) > 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, INNER):
            inner = start + tl.arange(0, INNER)
            h = tl.load(
                hidden + row[:, None] * width + inner[None, :],
                mask=wanted[:, None] & (inner[None, :] < width), other=0.0,
            )  # fmt: skip
            w = tl.load(
                head + column.to(tl.int64)[None, :] * width + inner[:, None],
                mask=(column[None, :] < vocabulary) & (inner[:, None] < width), other=0.0,
            )  # fmt: skip
            if UPCAST:  # the interpreter multiplies bf16 as bit patterns
                h, w = h.to(tl.float32), w.to(tl.float32)
            logits = tl.dot(h, w, logits, input_precision="ieee")  # float32 stays float32: decisions hang on it
        ids = column[None, :] + tl.zeros([ROWS, COLUMNS], tl.int32)
        logits = tl.where((ids < vocabulary) & (ids != mask_id), logits, -float("inf"))
        top, best, rest = _collapse(logits, ids, tl.zeros([ROWS, COLUMNS], tl.float32))
        at = index * tl.num_programs(1) + tl.program_id(1)
        tl.store(top_out + at, top, mask=wanted)
        tl.store(best_out + at, best, mask=wanted)
        tl.store(rest_out + at, rest, mask=wanted)


@jit
def _reveal_kernel(
    rows, masked, top_in, best_in, rest_in, best_out, confidence_out, count, chunks, mask_id,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS rows: merges the states of a row and writes its reveal (Eq. 1, third line).
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < count, other=0).to(tl.int64)
    wanted = tl.load(masked + row, mask=index < count, other=0) != 0
    chunk = tl.arange(0, CHUNKS)[None, :]
    at, use = index[:, None] * chunks + chunk, wanted[:, None] & (chunk < chunks)
    top = tl.load(top_in + at, mask=use, other=-float("inf"))
    best = tl.load(best_in + at, mask=use, other=NO_TOKEN)
    rest = tl.load(rest_in + at, mask=use, other=0.0)
    top, best, rest = _collapse(top, best, rest)
    best = tl.where(top == -float("inf"), tl.where(mask_id == 0, 1, 0), best)
    tl.store(best_out + row, best, mask=wanted)
    tl.store(confidence_out + row, _log_p(top, rest), mask=wanted)


def _remask_triton(hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int, visible: Tensor) -> Tensor:
    remask, (count, width), (tile, columns, warps) = torch.empty_like(visible), hidden.shape, _tile(hidden.shape[1])
    _launch(
        _remask_kernel, (triton.cdiv(count, tile),), hidden, head, tokens, visible, remask,
        count, width, len(head), mask_id, ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return remask


def _reveal_fused(
    hidden: Tensor, head: Tensor, rows: Tensor, masked: Tensor, mask_id: int, best: Tensor, confidence: Tensor
) -> None:
    """Writes best and confidence at those of the rows that are masked."""
    (vocabulary, width), count = head.shape, len(rows)
    # 64 x 128 pieces of the head: 16 KB of bf16 a stage, three stages in flight; tl.dot wants 16 rows at least.
    tile = 16 if count <= 16 else 32 if count <= 32 else 64
    columns = max(16, min(128, triton.next_power_of_2(vocabulary)))
    chunks = triton.cdiv(vocabulary, columns)  # V = 126464 makes 988 programs a row tile, for 132 multiprocessors
    top, rest = torch.empty(2, count, chunks, dtype=torch.float32, device=head.device)
    ids = torch.empty(count, chunks, dtype=torch.int32, device=head.device)
    _launch(
        _fused_head_kernel, (triton.cdiv(count, tile), chunks), hidden, head, rows, masked, top, ids, rest,
        count, width, vocabulary, mask_id, UPCAST=INTERPRETED, ROWS=tile, COLUMNS=columns,
        INNER=64 if hidden.dtype.itemsize == 2 else 32, num_warps=4, num_stages=3,
    )  # fmt: skip
    merged = triton.next_power_of_2(chunks)
    tile = max(1, 64 // merged)
    _launch(
        _reveal_kernel, (triton.cdiv(count, tile),), rows, masked, top, ids, rest, best, confidence,
        count, chunks, mask_id, ROWS=tile, CHUNKS=merged, num_warps=1 if merged <= 128 else 4,
    )  # fmt: skip


def _decide_from_hidden(
    hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None, max_masked: int | None,
    kernels: bool,
) -> Decision:  # fmt: skip
    (vocabulary, width), shape = head.shape, tokens.shape
    hidden, tokens = hidden.reshape(tokens.numel(), width), tokens.reshape(-1)
    if kernels:
        hidden, head = hidden.contiguous(), head.contiguous()
    masked, visible = tokens == mask_id, tokens != mask_id
    if editable is not None:
        masked, visible = masked & editable.reshape(-1), visible & editable.reshape(-1)
    remask = (_remask_triton if kernels else _remask_torch)(hidden, head, tokens, mask_id, visible)
    best, confidence = tokens.clone(), torch.full_like(tokens, -torch.inf, dtype=_wide(hidden[:0]).dtype)
    size = _block_rows(hidden, vocabulary)
    if kernels and vocabulary <= DENSE_VOCABULARY:
        blocks = [slice(at, at + size) for at in range(0, len(tokens), size)]
    else:
        if kernels and max_masked is not None:  # the masked rows first: a size known without asking the device
            rows = (~masked).to(torch.uint8).argsort(stable=True)[:max_masked]
        else:
            rows = masked.nonzero().squeeze(1)  # waits for the device
        blocks = rows.split(size)
        if kernels and len(rows) <= FUSED_ROWS:
            _reveal_fused(hidden, head, rows, masked, mask_id, best, confidence)
            blocks = []
    for block in blocks:
        logits = hidden[block] @ head.T  # in the inputs' dtype, rounded as a model's own logits are
        if kernels:
            part = _decide_from_logits_triton(logits, tokens[block], mask_id, masked[block])
            best[block], confidence[block] = part.best, part.confidence
        else:  # here every row is masked
            revealed, confidence[block] = _reveal_(_wide(logits), mask_id)
            best[block] = revealed.to(best.dtype)
    return Decision(*(x.view(shape) for x in (best, confidence, remask, best.masked_fill(remask, mask_id))))


@torch.no_grad()
def decide_from_hidden(
    hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None = None,
    impl: str | None = None, max_masked: int | None = None,
) -> Decision:  # fmt: skip
    """Eq. 1 from hidden states; logits = hidden @ head.T are formed at masked positions only, a block at a time.

    hidden: float [..., D].  head: the output weight [V, D], same dtype and device.  tokens, mask_id, editable and
    the Decision returned: as for decide_from_logits, NaN and ties too.  No gradient.
    Workspace: at most 256 MiB of logits on a GPU, 32 MiB on CPU, or 256 rows where that is more.
    max_masked: a promise that no more than so many positions are masked and editable; without it the row count is
    asked of the device once (for V > 1,024), which a CUDA graph cannot hold.  Further rows stay masked.
    Raises ValueError for wrong shapes, dtypes or devices, a mask_id outside [0, V), on CPU ids outside [0, V) and
    more masked positions than max_masked.
    """
    editable = _check_decide("hidden", hidden, len(head), tokens, mask_id, editable)
    _check_head(head, hidden)
    if max_masked is not None and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        masked = int(((tokens == mask_id) & (True if editable is None else editable)).sum())
        _require(masked <= max_masked, f"max_masked is {max_masked}, but {masked} editable positions are masked")
    with torch.autocast(hidden.device.type, enabled=False):
        return _decide_from_hidden(hidden, head, tokens, mask_id, editable, max_masked, use_triton(impl, hidden))


# ---------------------------------------------------------------------------------------------------------------
# 3. history_step and history_sum
#
# Computes Eq. 2.  The step:  a(t) = wte(x(t)) + gamma R_(-1) a(t-1), and the RMSNorm of a(t) that the model reads.
# The closed sum:  a(t) = sum_{k=0..t} gamma^(t-k) R_(k-t) wte(x(k)), by the same recurrence kept in registers.
# R_delta turns the pair (j, j + D/2) by delta * 10000^(-2j/D); R_(-1) takes (u, v) to (u c + v s, v c - u s).
#
# Costs: the step reads a(t-1) and one embedding row a position, and writes a(t) and its norm: 4 N D values.  Floor at
# N = 8192, D = 4096, bf16 with a in float32: 134 us.  The sum reads t + 1 embedding rows and writes one.
# Re-embedding t states every turn moves about t times as much.  Arithmetic is negligible in both.
# Gradient of the sum:  d wte(x(k)) += gamma^(t-k) R_(t-k) da: a scatter of t + 1 rows a position.


@functools.lru_cache(maxsize=16)
def _angles(width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of R_1's angles, [D/2] each; once per width."""
    with torch.inference_mode(False):  # a table made in inference mode could not take part in training later
        frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        return frequency.cos().to(dtype), frequency.sin().to(dtype)


def _turned_back(a: Tensor, gamma: float, rotate: bool) -> Tensor:
    """gamma R_(-1) a."""
    if not rotate:
        return gamma * a
    cos, sin = _angles(a.shape[-1], a.device, a.dtype)
    u, v = a.chunk(2, -1)
    cos, sin = gamma * cos, gamma * sin  # decay and turn in one pass over a
    return torch.cat([torch.addcmul(u * cos, v, sin), torch.addcmul(v * cos, u, sin, value=-1)], -1)


def rms_norm(a: Tensor) -> Tensor:
    """RMSNorm without learned weight over the last axis."""
    return F.rms_norm(a, a.shape[-1:], eps=1e-6)


def _history_step_torch(
    a: Tensor | None, tokens: Tensor, embedding: Tensor, gamma: float, rotate: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    new = _wide(F.embedding(tokens, embedding))
    if a is not None:
        new = new + _turned_back(a, gamma, rotate)  # Eq. 2, the recurrence
    return new, (rms_norm(new) if normalize else new.clone()).to(embedding.dtype)


def _history_sum_torch(states: Tensor, embedding: Tensor, gamma: float, rotate: bool, normalize: bool) -> Tensor:
    total = None
    for state in states:
        new = _wide(F.embedding(state.clamp(min=0), embedding)) * (state >= 0).unsqueeze(-1)  # -1 adds nothing
        total = new if total is None else new + _turned_back(total, gamma, rotate)  # Eq. 2
    return (rms_norm(total) if normalize else total).to(embedding.dtype)


@jit
def _load_halves(line, column, half, width, use):  # the pairs (j, j + D/2) of the rows at line [ROWS, 1]
    u = tl.load(line + column, mask=use[:, None] & (column < half), other=0.0)
    v = tl.load(line + half + column, mask=use[:, None] & (column + half < width), other=0.0)
    return u.to(tl.float32), v.to(tl.float32)


@jit
def _store_halves(line, column, half, width, use, u, v):
    tl.store(line + column, u, mask=use[:, None] & (column < half))
    tl.store(line + half + column, v, mask=use[:, None] & (column + half < width))


@jit
def _history_kernel(
    states, embedding, cos, sin, past, gradient, sum_out, read_out, table_out,
    count, turns, width, half, vocabulary, gamma, PAST: tl.constexpr, KEEP: tl.constexpr, BACKWARD: tl.constexpr,
    ROTATE: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS whole rows, because the norm needs the whole row.  One kernel is the step (the states
    # are one, PAST adds a(t-1)), the sum, and its gradient: the sum again, since gathering is cheaper than keeping,
    # then da through the norm, then its terms added to the gradient of the embedding.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    column, offset = tl.arange(0, HALF)[None, :], row[:, None] * width
    c = tl.load(cos + column, mask=column < half, other=0.0)
    s = tl.load(sin + column, mask=column < half, other=0.0)
    u = tl.zeros([ROWS, HALF], tl.float32)
    v = tl.zeros([ROWS, HALF], tl.float32)
    if PAST:
        u, v = _load_halves(past + offset, column, half, width, inside)
    for turn in range(0, turns):  # oldest first
        token = tl.load(states + turn * count + row, mask=inside, other=-1).to(tl.int64)
        use = (token >= 0) & (token < vocabulary)  # else it adds nothing
        p, q = _load_halves(embedding + token[:, None] * width, column, half, width, use)
        if ROTATE:
            u, v = u * c + v * s, v * c - u * s  # R_(-1)
        u, v = p + gamma * u, q + gamma * v  # Eq. 2
    if KEEP:
        _store_halves(sum_out + offset, column, half, width, inside, u, v)
    scale = tl.rsqrt((tl.sum(u * u, 1) + tl.sum(v * v, 1)) / width + 1e-6)[:, None]
    if NORMALIZE:
        u, v = u * scale, v * scale
    if BACKWARD:
        p, q = _load_halves(gradient + offset, column, half, width, inside)
        if NORMALIZE:  # y = a r: da = r (g - y mean(g y))
            mean = ((tl.sum(p * u, 1) + tl.sum(q * v, 1)) / width)[:, None]
            p, q = scale * (p - u * mean), scale * (q - v * mean)
        for age in range(0, turns):
            token = tl.load(states + (turns - 1 - age) * count + row, mask=inside, other=-1).to(tl.int64)
            use = ((token >= 0) & (token < vocabulary))[:, None]
            line = table_out + token[:, None] * width + column
            tl.atomic_add(line, p, mask=use & (column < half), sem="relaxed")
            tl.atomic_add(line + half, q, mask=use & (column + half < width), sem="relaxed")
            if ROTATE:
                p, q = p * c - q * s, q * c + p * s  # R_1, the transpose of R_(-1)
            p, q = gamma * p, gamma * q
    else:
        _store_halves(read_out + offset, column, half, width, inside, u, v)


def _history_triton(states, embedding, gamma, rotate, normalize, past=None, keep=False, gradient=None):
    """(a(t) in float32 where keep is on, what is read), or, where gradient is that of what is read, the embedding's."""
    count, (vocabulary, width), device = states[0].numel(), embedding.shape, embedding.device
    cos, sin = _angles(width, device, torch.float32)
    total, read, table = None, None, None
    if gradient is not None:  # atomic additions, whose order, so the last bit, may vary between runs
        table = torch.zeros(vocabulary, width, dtype=torch.float32, device=device)
    else:
        total = torch.empty(*states.shape[1:], width, dtype=torch.float32, device=device) if keep else None
        read = torch.empty(*states.shape[1:], width, dtype=embedding.dtype, device=device)
    given = (past, gradient, total, read, table)  # what is not given is never touched: any pointer will do
    half = triton.next_power_of_2(max(1, (width + 1) // 2))  # a whole row a program at D = 4096, 16 rows at D = 128
    rows = max(1, min(32, 1024 // half))
    _launch(
        _history_kernel, (triton.cdiv(count, rows),), states.contiguous(), embedding.contiguous(), cos, sin,
        *(cos if x is None else x.contiguous() for x in given),
        count, len(states), width, (width + 1) // 2, vocabulary, float(gamma),
        PAST=past is not None, KEEP=keep, BACKWARD=gradient is not None, ROTATE=rotate, NORMALIZE=normalize,
        ROWS=rows, HALF=half, num_warps=8 if half >= 1024 else 4,
    )  # fmt: skip
    return (total, read) if gradient is None else table


class _HistorySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, embedding, *settings):
        ctx.save_for_backward(states, embedding)
        ctx.settings = settings  # gamma, rotate, normalize
        return _history_triton(states, embedding, *settings)[1]

    @staticmethod
    def backward(ctx, gradient):
        states, embedding = ctx.saved_tensors
        total = _history_triton(states, embedding, *ctx.settings, gradient=gradient)
        return None, total.to(embedding.dtype), None, None, None


def check_history(embedding: Tensor, gamma: float, rotate: bool) -> None:
    """An embedding weight [V, D], gamma in [0, 1], an even D where rotate is on; else ValueError."""
    _check_floating("embedding", embedding)
    shape = [*embedding.shape]
    _require(embedding.ndim == 2 and embedding.numel() > 0, f"embedding must be a weight [V, D], got {shape}")
    _require(0 <= gamma <= 1, f"gamma must lie in [0, 1], got {gamma}")
    _require(not rotate or shape[1] % 2 == 0, f"embedding must have an even D to rotate, got {shape}")


@torch.no_grad()
def history_step(
    a: Tensor | None, tokens: Tensor, embedding: Tensor, gamma: float = 0.9, rotate: bool = True,
    normalize: bool = True, impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. 2, one turn of the recurrence: (a(t), what the model reads), where a(t) = wte(x(t)) + gamma R_(-1) a(t-1).

    a: a(t-1), [..., D], or None at the first turn; float32, or float64 for a float64 embedding.  tokens: int32 or
    int64 [...].  embedding: float [V, D].  gamma in [0, 1]; rotate: R, for even D; normalize: the RMSNorm (eps 1e-6,
    no weight) of what is read.  Returns a(t), of a's dtype, and what is read, of the embedding's; both new.
    No gradient: history_sum has one.  NaN propagates.
    Raises ValueError for wrong shapes, dtypes or devices, gamma outside [0, 1], odd D with rotate, on CPU bad ids.
    """
    check_history(embedding, gamma, rotate)
    check_ids("tokens", tokens, None, embedding.device, 0, len(embedding))
    if a is not None:
        wide, expected = _wide(embedding[:0]).dtype, [*tokens.shape, embedding.shape[1]]
        fits = [*a.shape] == expected and a.dtype == wide and a.device == embedding.device
        got = f"{[*a.shape]}, {a.dtype} on {a.device}"
        _require(fits, f"a must be {expected}, {wide} on {embedding.device}, got {got}")
    a = a if gamma else None
    if use_triton(impl, embedding):
        return _history_triton(tokens.unsqueeze(0), embedding, gamma, rotate, normalize, past=a, keep=True)
    return _history_step_torch(a, tokens, embedding, gamma, rotate, normalize)


def history_sum(
    states: Tensor, embedding: Tensor, gamma: float = 0.9, rotate: bool = True, normalize: bool = True,
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 2 as the closed sum over states x(0), ..., x(t), with its gradient to the embedding.

    states: int32 or int64 [t+1, ...], oldest first; -1 where a sequence has no state yet, which adds nothing.
    embedding, gamma, rotate, normalize: as for history_step.  Returns float [..., D] in the embedding's dtype.
    NaN propagates.  Raises ValueError as history_step does, and for no state at all.
    """
    check_history(embedding, gamma, rotate)
    _require(states.ndim >= 1 and len(states) > 0, f"states must be [T+1, ...] with T >= 0, got {[*states.shape]}")
    check_ids("states", states, None, embedding.device, -1, len(embedding))
    run = _HistorySum.apply if use_triton(impl, embedding) else _history_sum_torch
    return run(states if gamma else states[-1:], embedding, gamma, rotate, normalize)


# ---------------------------------------------------------------------------------------------------------------
# 4. revision_cross_entropy
#
# Computes the cross-entropy to the oracle action, split by role: part[k] = sum over role k of -log p(target), over the
# number of positions with any role; total = weights . part.  Gradient to the logits: w[role] (p - onehot) / number.
#
# Costs: from logits, one read forward, one read and one write backward.  Floor at [8192, 126464] bf16: 2.07 GB each,
# 2.1 ms (1.4 ms if a row could stay on chip between its two reads, which 253 KB cannot).  From hidden states, three
# matrix products (logits, and the gradients to hidden and head), 6 N V D operations: 32 ms there; memory for
# a chunk of logits instead of [N, V] in several copies.  A chunk is rows, whole: its logits become their own
# gradient in place and feed the other two products, so nothing is computed twice.

CHUNK_ROWS = 2048  # enough for full matrix products; 2,048 rows of V = 126464 in bf16 are 518 MB
CHUNK_BYTES = 2**26  # more rows than that while their logits are under 64 MiB: a small V is one chunk


def _nll_(logits: Tensor, target: Tensor, slope: Tensor) -> Tensor:
    """-log p(target) of every row; logits [R, V] becomes slope (p - onehot).  slope: [R]."""
    log_p, target = F.log_softmax(_wide(logits), -1), target.long().unsqueeze(-1)
    loss = -log_p.gather(-1, target).squeeze(-1)
    p = log_p.exp_()
    logits.copy_(p.scatter_add_(-1, target, p.new_full(target.shape, -1)) * slope.unsqueeze(-1))
    return loss


def _parts(loss: Tensor, role: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(total, parts [3]) from the loss of every position, 0 where the role is IGNORE."""
    count = (role != IGNORE).sum().clamp(min=1)
    parts = torch.stack([torch.where(role == kind, loss, 0).sum() for kind in (REVEAL, REMASK, KEEP)]) / count
    return (weights * parts).sum(), parts


def _revision_cross_entropy_torch(
    logits: Tensor, target: Tensor, role: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    counted = role != IGNORE
    loss = F.cross_entropy(_wide(logits[counted]), target[counted].long(), reduction="none")
    return _parts(loss, role[counted], weights)


@jit
def _nll_kernel(
    logits, target, role, loss_out, lse_out, count, length, stride_b, stride_n, stride_v, vocabulary,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS rows; rows to ignore load nothing.  The scan of Eq. 1, with no MASK to leave out.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    counted = tl.load(role + row, mask=inside, other=-1) >= 0
    line = logits + (row // length) * stride_b + (row % length) * stride_n
    top, best, rest = _scan(line, counted, vocabulary, -1, stride_v, ROWS, COLUMNS)
    lse = tl.where(top == float("inf"), float("nan"), top - _log_p(top, rest))  # +inf - inf: NaN, as in torch
    goal = tl.load(target + row, mask=inside, other=0).to(tl.int64)
    fits = counted & (goal >= 0) & (goal < vocabulary)
    at_goal = tl.load(line + goal * stride_v, mask=fits, other=float("nan")).to(tl.float32)
    tl.store(loss_out + row, tl.where(counted, lse - at_goal, 0.0), mask=inside)
    tl.store(lse_out + row, lse, mask=inside)


@jit
def _nll_gradient_kernel(
    logits, target, role, lse, weights, out, count, length, stride_b, stride_n, stride_v, vocabulary,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: (row tiles, column tiles), element by element, so out may be logits itself.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = row < count
    kind = tl.load(role + row, mask=inside, other=-1)
    counted = kind >= 0
    goal = tl.load(target + row, mask=inside, other=-1)
    shift = tl.load(lse + row, mask=inside, other=0.0)
    weight = tl.load(weights + kind, mask=counted & (kind < 3), other=0.0)
    line = logits + (row // length) * stride_b + (row % length) * stride_n
    use = counted[:, None] & (column < vocabulary)
    x = tl.load(line[:, None] + column.to(tl.int64) * stride_v, mask=use, other=0.0).to(tl.float32)
    slope = tl.exp(x - shift[:, None]) - tl.where(column == goal[:, None], 1.0, 0.0)  # p - onehot
    slope = tl.where(counted[:, None], weight[:, None] * slope, 0.0)
    tl.store(out + row[:, None] * vocabulary + column, slope, mask=inside[:, None] & (column < vocabulary))


def _nll_triton(logits: Tensor, target: Tensor, role: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p(target), log sum exp), 0 and anything where the role is IGNORE."""
    (rows, walk), (tile, columns, warps), count = _rows_of(logits), _tile(logits.shape[-1]), role.numel()
    loss, lse = torch.empty(2, *role.shape, dtype=torch.float32, device=logits.device)
    _launch(_nll_kernel, (triton.cdiv(count, tile),), rows, target, role, loss, lse, count, *walk,
            ROWS=tile, COLUMNS=columns, num_warps=warps)  # fmt: skip
    return loss, lse


def _nll_gradient_triton(logits: Tensor, target: Tensor, role: Tensor, lse: Tensor, weights: Tensor, out: Tensor):
    """Writes weights[role] (p - onehot) to out."""
    (rows, walk), (tile, columns, warps), count = _rows_of(logits), _tile(logits.shape[-1]), role.numel()
    grid = triton.cdiv(count, tile), triton.cdiv(logits.shape[-1], columns)
    _launch(_nll_gradient_kernel, grid, rows, target, role, lse, weights, out, count, *walk,
            ROWS=tile, COLUMNS=columns, num_warps=warps)  # fmt: skip
    return out


class _CrossEntropy(torch.autograd.Function):  # from logits, by the kernels
    @staticmethod
    def forward(ctx, logits, target, role, weights):
        loss, lse = _nll_triton(logits, target, role)
        ctx.save_for_backward(logits, target, role, lse, weights)
        total, parts = _parts(loss, role, weights)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx, upstream, _):
        logits, target, role, lse, weights = ctx.saved_tensors
        scaled = weights * (upstream / (role != IGNORE).sum().clamp(min=1))
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        return _nll_gradient_triton(logits, target, role, lse, scaled, out), None, None, None


class _HeadCrossEntropy(torch.autograd.Function):  # from hidden states [N, D] and the head, in chunks of rows
    @staticmethod
    def forward(ctx, hidden, head, target, role, weights, kernels):
        to_hidden, to_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if to_hidden else None
        grad_head = torch.zeros_like(head, memory_format=torch.contiguous_format) if to_head else None
        loss = torch.zeros(role.shape, dtype=weights.dtype, device=hidden.device)
        chunk = max(CHUNK_ROWS, CHUNK_BYTES // (len(head) * hidden.dtype.itemsize))
        for rows in (role != IGNORE).nonzero().squeeze(1).split(chunk):  # waits for the device
            x, goal, kind = hidden[rows], target[rows], role[rows]
            logits = x @ head.T
            if kernels:
                loss[rows], lse = _nll_triton(logits, goal, kind)
                if to_hidden or to_head:
                    _nll_gradient_triton(logits, goal, kind, lse, weights, out=logits)
            else:
                loss[rows] = _nll_(logits, goal, weights[kind.long()])
            # logits is now w[role] (p - onehot).  The 1/number comes last: fp16 would lose it in small p.
            if to_hidden:
                grad_hidden[rows] = logits @ head
            if to_head:
                grad_head.addmm_(logits.T, x)  # one rounding to the head's dtype a chunk
            del logits  # before the next chunk's
        total, parts = _parts(loss, role, weights)
        ctx.gradients = grad_hidden, grad_head
        ctx.count = (role != IGNORE).sum().clamp(min=1)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx, upstream, _):
        factor = upstream / ctx.count
        gradients = [None if g is None else (g * factor).to(g.dtype) for g in ctx.gradients]
        return *gradients, None, None, None, None


def revision_cross_entropy(
    inputs: Tensor, target: Tensor, role: Tensor, weights: tuple[float, float, float] = (1, 1, 1),
    head: Tensor | None = None, impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Cross-entropy to the oracle action, split by role: (total, reveal, remask, keep), scalars in nats.

    inputs: logits float [..., V]; or, with head, the output weight [V, D], hidden states float [..., D].
    target: int32 or int64 [...].  role: the same, REVEAL, REMASK, KEEP (0, 1, 2), or IGNORE (-1): no loss.
    weights: of the parts, in that order.  A part is the sum over its role's positions divided by the number of
    positions with any role; an empty role is 0, and so is everything when all is ignored.
    The total alone has a gradient, to logits, or to hidden and head; for one part use weights like (0, 0, 1).
    With head, logits exist for max(2,048 rows, 64 MiB) at a time, and gradients are computed on the way forward.
    NaN, +inf and rows of -inf in a counted row propagate as in F.cross_entropy; ignored rows are not read.
    Raises ValueError for wrong shapes, dtypes or devices, on CPU ids or roles out of range.
    """
    name = "logits" if head is None else "hidden"
    _check_floating(name, inputs)
    _require(inputs.ndim >= 1, f"{name} must be [..., V or D], got {[*inputs.shape]}")
    if head is not None:
        _check_head(head, inputs)
    _require(len(weights) == 3, f"weights must be three numbers, got {weights}")
    vocabulary = inputs.shape[-1] if head is None else len(head)
    check_ids("role", role, inputs.shape[:-1], inputs.device, IGNORE, 3)
    check_ids("target", target, inputs.shape[:-1], inputs.device, 0, vocabulary, where=role != IGNORE)
    wide, kernels = _wide(inputs[:0]).dtype, use_triton(impl, inputs)
    factors = torch.stack([torch.full((), w, dtype=wide, device=inputs.device) for w in weights])
    if head is None:
        run = _CrossEntropy.apply if kernels else _revision_cross_entropy_torch
        total, parts = run(inputs, target.contiguous(), role.contiguous(), factors)
    else:
        with torch.autocast(inputs.device.type, enabled=False):
            rows = inputs.reshape(-1, inputs.shape[-1])
            total, parts = _HeadCrossEntropy.apply(rows, head, target.reshape(-1), role.reshape(-1), factors, kernels)
    return total, *parts.detach().unbind()


# ---------------------------------------------------------------------------------------------------------------
# 5. The benchmark:  python kernels.py

SHAPES = {  # N, V, D
    "LLaDA-8B, 8 x 1024": (8192, 126464, 4096),
    "Lumina-DiMOO, 4096": (4096, 8193, 4096),
    "Sudoku, 512 boards": (41472, 10, 128),
}
CPU_SHAPES = {"N=4096 V=32000 D=512": (4096, 32000, 512)}  # float32: what sparsity gains without Triton
SMOKE_SHAPES = {"small": (96, 300, 32)}


class _LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes; views make none."""

    bytes = 0

    def __torch_dispatch__(self, function, types_, args=(), keywords=None):
        result = function(*args, **(keywords or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.nbytes)
        return result


class Benchmark:
    """Times forms of one computation side by side, prints a table each, and keeps every row for the JSON file."""

    def __init__(self, device: str, smoke: bool):
        self.device, self.smoke, self.cuda, self.rows = torch.device(device), smoke, device != "cpu", []
        self.impl = "triton" if self.cuda or INTERPRETED else "torch"
        self.impls = tuple(dict.fromkeys(("torch", self.impl)))
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        size, side = (2**29, 8192) if self.cuda else (2**20, 256) if smoke else (2**27, 2048)
        source, a = torch.ones(size // 4, device=device), torch.randn(side, side, device=device).to(self.dtype)
        target = torch.empty_like(source)
        # The two ceilings of this machine, measured: bytes read and written a second, operations a second.
        self.bandwidth = 2 * size / self.seconds({"": lambda: target.copy_(source)})[""]
        self.rate = 2 * side**3 / self.seconds({"": lambda: a @ a})[""]
        print(f"ceilings: copy {self.bandwidth / 1e9:,.0f} GB/s, {self.dtype} product {self.rate / 1e12:,.2f} TFLOP/s")

    def seconds(self, forms: dict[str, Callable], graph: bool = False) -> dict[str, float]:
        """Median seconds of each form; on CPU in turns, so that a disturbance meets all of them."""
        if self.cuda:
            timer = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
            return {name: timer(form, rep=100, return_mode="median") / 1e3 for name, form in forms.items()}
        times: dict[str, list[float]] = {name: [] for name in forms}
        for repeat in range(2 if self.smoke else 6):
            for name, form in forms.items():
                began = time.perf_counter()
                form()
                times[name] += [time.perf_counter() - began] if repeat else []  # the first warms up
        return {name: statistics.median(values) for name, values in times.items()}

    def peak(self, form: Callable) -> float:
        """MiB that a form needs beyond its inputs: the allocator's peak on a GPU, the largest tensor on CPU."""
        if not self.cuda:
            with _LargestTensor() as largest:
                form()
            return largest.bytes / 2**20
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def table(
        self, kernel: str, shape: str, forms: dict[str, Callable], make: Callable[[], tuple], size: float = 1e9,
        moved: float = 0, flops: float = 0, compiled: tuple[str, ...] = (), graphs: tuple[str, ...] = (),
        wrap: Callable[[Callable], Callable] = lambda form: form,
    ) -> None:  # fmt: skip
        """Times forms, each called with make()'s inputs of `size` bytes; on a GPU in turn with enough sets of them to
        exceed three times a 50 MB L2.  compiled, graphs: forms that a GPU also runs through torch.compile and in a
        CUDA graph.  Prints ratio, the first form's time over this one's; share, the floor
        max(moved / bandwidth, flops / rate) over the time; differs, the relative distance from the first form's result.
        """
        floor = max(moved / self.bandwidth, flops / self.rate)
        print(f"\n{kernel}: {shape}; {moved / 1e6:,.1f} MB, {flops / 1e9:,.1f} GFLOP, floor {floor * 1e6:,.1f} us")
        memory = "peak MiB" if self.cuda else "largest MiB"
        print(f"  {'form':44}{'us':>12}{'ratio':>9}{'share':>8}{memory:>13}{'differs':>10}")
        if self.cuda:
            torch._dynamo.reset()
            forms = forms | {f"{name}, compiled": torch.compile(forms[name], dynamic=False) for name in compiled}
        inputs = [make() for _ in range(max(1, min(256, int(150e6 / size) + 1)) if self.cuda else 1)]
        result, expected, calls, about = None, None, {}, {}
        for name, form in forms.items():
            form, sets = wrap(form), itertools.cycle(inputs)
            try:
                result = form(*inputs[0])
                result = [x.detach().float() for x in (result if isinstance(result, tuple) else (result,))]
                expected = expected or result
                apart = [(x - y).norm() / y.norm().clamp(min=1e-30) for x, y in zip(result, expected)]
                about[name] = {"differs": float(max(apart, default=0))}
                about[name]["memory_mib"] = self.peak(lambda: form(*inputs[0]))
                calls[name] = lambda form=form, sets=sets: form(*next(sets))
            except torch.OutOfMemoryError:
                print(f"  {name:44}{'out of memory':>12}")
        del result, expected
        times = self.seconds(calls)
        for name in graphs if self.cuda else ():
            times |= self.seconds({f"{name}, CUDA graph": calls[name]}, graph=True)
        first = next(iter(times.values()))
        for name, value in times.items():
            row = {"kernel": kernel, "shape": shape, "form": name, "microseconds": value * 1e6, "ratio": first / value}
            row |= {"floor_microseconds": floor * 1e6, "bytes": moved, "flops": flops, "share": floor / value}
            self.rows.append(row | about.get(name, {}))
            tail = f"{about[name]['memory_mib']:>13,.1f}{about[name]['differs']:>10.1e}" if name in about else ""
            print(f"  {name:44}{value * 1e6:>12,.1f}{first / value:>9.2f}{floor / value:>8.1%}{tail}", flush=True)


def _full_decision(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """Eq. 1 as one would write it first: a softmax over every row, then where."""
    p = logits.float().softmax(-1)
    own, at_mask = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), p[..., mask_id]
    best = p.index_fill(-1, torch.tensor([mask_id], device=p.device), -1).argmax(-1)
    return torch.where(tokens == mask_id, best, torch.where(at_mask > own, mask_id, tokens))


def benchmark_decisions(bench: Benchmark, name: str, count: int, vocabulary: int, width: int) -> None:
    """Operation 1, then one decoding turn end to end, from hidden states to next tokens (operation 2)."""
    mask_id, device, dtype, impl = vocabulary - 1, bench.device, bench.dtype, bench.impl
    item, graphs = dtype.itemsize, (impl,) if vocabulary <= DENSE_VOCABULARY else ()

    def state(masked: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(mask_id, (count,), device=device)
        tokens[torch.randperm(count, device=device)[:masked]] = mask_id
        return tokens, (tokens == mask_id).nonzero().squeeze(1)

    def best_token(logits):
        return logits[:, :mask_id].float().log_softmax(-1).max(-1).indices

    def operation_1(logits):
        tokens = torch.full(logits.shape[:1], mask_id, device=device)
        return decide_from_logits(logits, tokens, mask_id, impl=impl).best

    def on_rows(logits, tokens, rows):  # the masked rows alone; two logits of the others
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return torch.where(logits[:, mask_id] > own, mask_id, tokens).index_copy(0, rows, best_token(logits[rows]))

    def unfused(h, w, tokens, rows, best=best_token):  # the same from hidden states, with the library's product
        own, at_mask = (h.float() * w[tokens].float()).sum(-1), h.float() @ w[mask_id].float()
        return torch.where(at_mask > own, mask_id, tokens).index_copy(0, rows, best(h[rows] @ w.T))

    forms = {
        "eager, all rows": lambda logits, tokens, rows: _full_decision(logits, tokens, mask_id),
        "eager, masked rows": on_rows,
        impl: lambda logits, tokens, rows: decide_from_logits(logits, tokens, mask_id, impl=impl).following,
    }
    for masked in (count, count // 4):
        size, moved = count * vocabulary * item, masked * vocabulary * item + (count - masked) * 64
        bench.table("decide_from_logits", f"{name}, {masked} masked", forms,
                    lambda: (torch.randn(count, vocabulary, device=device, dtype=dtype), *state(masked)),
                    size, moved, 4 * masked * vocabulary, tuple(forms)[:2], graphs)  # fmt: skip
    forms = {
        "eager, all logits": lambda h, w, tokens, rows: _full_decision(h @ w.T, tokens, mask_id),
        "eager, masked rows": unfused,
        "product on masked rows, then operation 1": lambda *inputs: unfused(*inputs, operation_1),
    }
    for way in bench.impls:
        forms[way] = lambda h, w, t, rows, way=way: decide_from_hidden(h, w, t, mask_id, impl=way).following
    for masked in (count, count // 4, count // 20, 32) if bench.cuda or bench.smoke else (count // 4, count // 20):
        size, moved = (vocabulary + count) * width * item, (vocabulary + 2 * count - masked) * width * item
        bench.table("one turn: decide_from_hidden", f"{name}, {masked} masked", forms,
                    lambda: (torch.randn(count, width, device=device).to(dtype),
                             (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype), *state(masked)),
                    size, moved, 2 * masked * vocabulary * width, tuple(forms)[:2], graphs)  # fmt: skip


def _with_gradient(form: Callable) -> Callable:
    """form's result and its gradients to those inputs that require one."""

    def run(*inputs):
        out = form(*inputs)
        return out.detach(), *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], torch.ones_like(out))

    return run


def benchmark_history(bench: Benchmark, name: str, count: int, vocabulary: int, width: int) -> None:
    device, item = bench.device, bench.dtype.itemsize
    embedding = torch.randn(vocabulary, width, device=device).to(bench.dtype).requires_grad_()
    gathered = min(count, vocabulary) * width * item  # embedding rows: each at most once from memory

    def inputs(turns):
        states = torch.randint(vocabulary, (turns, 1, count), device=device)
        return torch.randn(1, count, width, device=device), states, embedding

    steps = {way: lambda a, x, w, way=way: history_step(a, x[0], w, impl=way) for way in bench.impls}
    bench.table("history_step", name, steps, lambda: inputs(1), 12 * count * width,
                count * width * (8 + item) + gathered, 0, ("torch",), (bench.impl,))  # fmt: skip
    sums = {way: lambda a, x, w, way=way: history_sum(x, w, impl=way) for way in bench.impls}
    if importlib.util.find_spec("history"):  # what the project uses where the vocabulary is small
        from history import history_embedding

        sums["history_embedding"] = lambda a, x, w: history_embedding(x, w)
    bench.table("history_sum, 7 states, with gradient", name, sums, lambda: inputs(7), 12 * count * width,
                14 * gathered + count * width * item * 2 + vocabulary * width * (4 + item), 0, ("torch",),
                wrap=_with_gradient)  # fmt: skip


def benchmark_losses(bench: Benchmark, name: str, count: int, vocabulary: int, width: int) -> None:
    device, item, impl = bench.device, bench.dtype.itemsize, bench.impl
    target, role = (torch.randint(high, (count,), device=device) for high in (vocabulary, 3))
    from_logits = {
        "eager": lambda x: F.cross_entropy(x.float(), target),
        impl: lambda x: revision_cross_entropy(x, target, role, impl=impl)[0],
    }
    from_hidden = {
        "eager": lambda h, w: F.cross_entropy((h @ w.T).float(), target),
        "product, then from logits": lambda h, w: revision_cross_entropy(h @ w.T, target, role, impl=impl)[0],
        impl: lambda h, w: revision_cross_entropy(h, target, role, head=w, impl=impl)[0],
    }
    if bench.cuda and importlib.util.find_spec("liger_kernel"):  # a peer, where installed; it writes into its logits
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss

        from_logits["Liger, on a copy"] = lambda x, peer=LigerCrossEntropyLoss(): peer(x.clone(), target)
        from_hidden["Liger"] = lambda h, w, peer=LigerFusedLinearCrossEntropyLoss(): peer(w, h, target)

    def leaf(rows, columns, scale=1.0):
        return (torch.randn(rows, columns, device=device) * scale).to(bench.dtype).requires_grad_()

    kernel, size = "revision_cross_entropy from", count * vocabulary * item
    bench.table(f"{kernel} logits, with gradient", name, from_logits, lambda: (leaf(count, vocabulary),),
                size, 3 * size, 0, ("eager",), wrap=_with_gradient)  # fmt: skip
    size = (vocabulary + count) * width * item
    bench.table(f"{kernel} hidden states, with gradient", name, from_hidden,
                lambda: (leaf(count, width), leaf(vocabulary, width, width**-0.5)),
                size, 2 * size, 6 * count * vocabulary * width, ("eager",), wrap=_with_gradient)  # fmt: skip


def benchmark_recurrence(bench: Benchmark) -> None:
    """A turn of the recurrence, early and late, against summing 16 past states anew; under 4 GB at full size."""
    count, vocabulary, width = SMOKE_SHAPES["small"] if bench.smoke else (8192, 32000, 4096)
    embedding = torch.randn(vocabulary, width, device=bench.device).to(bench.dtype)
    states = torch.randint(vocabulary, (16, count), device=bench.device)

    def anew():
        total = torch.zeros(count, width, device=bench.device)
        frequency = 10000.0 ** (-torch.arange(0, width, 2, device=bench.device) / width)
        for age, state in enumerate(states.flip(0)):
            cos, sin = (age * frequency).cos(), (age * frequency).sin()
            u, v = F.embedding(state, embedding).float().chunk(2, -1)
            total += torch.cat([u * cos + v * sin, v * cos - u * sin], -1) * 0.9**age
        return rms_norm(total).to(embedding.dtype)

    forms, a = {"embed, rotate and sum 16 states": anew}, None
    for turn in range(1, 101):
        if turn == 16:
            forms["history_step, turn 16"] = lambda a=a: history_step(a, states[15], embedding)[1]
        elif turn in (2, 100):  # [:0]: another sum, nothing to compare
            forms[f"history_step, turn {turn}"] = lambda a=a: history_step(a, states[15], embedding)[:0]
        a, _ = history_step(a, states[(turn - 1) % 16], embedding)
    bench.table("history by turn", f"N={count} D={width} {bench.dtype}", forms, lambda: (),
                moved=count * width * (8 + 2 * embedding.dtype.itemsize))  # fmt: skip


@torch.no_grad()
def benchmark_revision(bench: Benchmark) -> None:
    """End to end: the shipped Sudoku model revises boards with some 12 wrong cells; with and without a CUDA graph."""
    count, title, device = 2 if bench.smoke else 4096 if bench.cuda else 128, "a whole Sudoku revise", bench.device
    try:
        import reflective_masking as rm  # here alone: the operations need no other file

        model, info = rm.load_checkpoint(Path(__file__).parent / "checkpoints/sudoku_full.pt", "sudoku", device)
    except (ImportError, ValueError) as error:
        return print(f"\n{title}: skipped, {error}")
    cell = torch.arange(81)
    pattern = (3 * (cell // 9 % 3) + cell // 27 + cell % 9) % 9  # a valid board up to the names of the digits
    clean = (torch.rand(count, 9).argsort(-1) + 1)[:, pattern]
    start = torch.where(torch.rand(count, 81) < 12 / 81, torch.randint(1, 10, (count, 81)), clean).to(device)
    variant = model.embedding.detach(), info["gamma"], info["rotate"]
    # For a graph shapes must not change: finished boards stay in the batch and keep their tokens.
    a, tokens = torch.zeros(count, 81, model.embedding.shape[1], device=device), start.clone()
    done = torch.zeros(count, 1, dtype=torch.bool, device=device)

    def turn():
        new, read = history_step(a, tokens, *variant, impl=bench.impl)
        following = decide_from_logits(model(read), tokens, 0, ~done, impl=bench.impl).following
        done.logical_or_((following == tokens).all(-1, keepdim=True))
        a.copy_(new), tokens.copy_(following)

    def whole_batch(step):
        a.zero_(), tokens.copy_(start), done.zero_()
        for _ in range(32):
            step()
            if done.all():
                break
        return tokens.clone()

    forms = {
        f"revise, {way}": lambda way=way: rm.revise(
            model, start, 0, rm.HistoryReference(*variant, impl=way), impl=way
        ).tokens
        for way in bench.impls
    } | {"all boards to the end": lambda: whole_batch(turn)}  # fmt: skip
    if bench.cuda:
        whole_batch(turn)  # compiles before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
        forms["all boards to the end, CUDA graph"] = lambda: whole_batch(graph.replay)
    bench.table(title, f"{count} boards", forms, lambda: ())


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time every operation of this file against PyTorch.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="cuda, cuda:1, ... or cpu (default, as found: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds; the times mean nothing")
    where = "default results/kernels_<device>.json; none with --smoke"
    parser.add_argument("--json", type=Path, metavar="FILE", help=where)
    parts = {"decisions": benchmark_decisions, "history": benchmark_history, "losses": benchmark_losses}
    whole = {"recurrence": benchmark_recurrence, "revision": benchmark_revision}
    parser.add_argument("--only", choices=[*parts, *whole], help="time this part alone")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
    options = parser.parse_args()
    cuda, name = options.device.split(":")[0] == "cuda" and torch.cuda.is_available(), "cpu"
    if not cuda and options.device != "cpu":
        print(f"kernels.py: error: device {options.device!r} is not there", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if cuda:
        torch.cuda.set_device(options.device)
        name = torch.cuda.get_device_name().replace(" ", "-").lower()
    print(which_path(options.device))
    bench = Benchmark(options.device, options.smoke)
    if not (cuda or options.smoke):
        print(f"skipped, for a GPU alone: {', '.join(SHAPES)}, torch.compile, CUDA graphs, 4,096 boards")
        if options.only is None:  # minutes, and no sparsity to gain
            del parts["losses"]
            print("skipped on CPU unless asked for by --only: losses")
    for shape, sizes in (SMOKE_SHAPES if options.smoke else SHAPES if cuda else CPU_SHAPES).items():
        for part, run in parts.items():
            if options.only in (None, part):
                run(bench, shape, *sizes)
    for part, run in whole.items():
        if options.only in (None, part):
            run(bench)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton and triton.__version__}
    results = {
        "device": name, "smoke": options.smoke, "threads": torch.get_num_threads(), "versions": versions,
        "copy_bytes_per_second": bench.bandwidth, "flops_per_second": bench.rate, "rows": bench.rows,
    }  # fmt: skip
    path = options.json or (None if options.smoke else Path("results") / f"kernels_{name}.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
