"""Triton kernels for Reflective Masking, each beside the plain PyTorch that defines it.

Four operations, in the order of a revision turn and then of training:

    1. decide_from_logits       Eq. 1 where logits exist: the row is read at masked positions only
    2. decide_from_hidden       Eq. 1 from hidden states: logits [N, V] are never formed
    3. history_step, history_sum   Eq. 2 as the O(1) recurrence, and as the closed sum with its gradient
    4. revision_cross_entropy   the three losses of the oracle action, with gradient, from logits or hidden states

"Multi-Turn Reflective Masking Elicits Reasoning in Mask Diffusion Models" (Zhang et al., 2026, arXiv 2606.16700).
Each section reads: what it computes, what it costs, the PyTorch reference, the kernel, the public function.

Every public function takes impl: "torch", "triton", or None, which is triton for CUDA tensors where triton is
installed (float64 excepted) and torch otherwise; which_path(device) says so in a line.  Without triton the file
imports and every operation is its reference.  TRITON_INTERPRET=1, set before the import, runs the kernels on CPU.
Common rules: inputs are never written; arithmetic and state are float32 at least, whatever the inputs; wrong
shapes, dtypes and devices are a ValueError that names the argument, before any launch.  Ids out of range are one
too on CPU; on a GPU that check would wait for the device, so it is left out, and such an id reads nothing: its
position is kept, adds no history, or has loss NaN.

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
    if impl not in (None, "torch", "triton"):
        raise ValueError(f"impl must be None, 'torch' or 'triton', got {impl!r}")
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


def _tile(width: int, elements: int = 2048) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that walks rows of the given width.

    Wide rows: 4,096 columns over 8 warps, 16 elements a thread, i.e. two 16-byte loads of bf16 in flight.
    Narrow rows (V = 10) share a program, up to 64, since a program for 20 bytes is all overhead.
    """
    columns = max(16, min(triton.next_power_of_2(width), 4096))
    return max(1, min(64, elements // columns)), columns, 8 if columns >= 2048 else 4


def _on_device_of(x: Tensor):
    """Triton launches on the current device, which need not be x's."""
    if x.is_cuda and not torch.compiler.is_compiling():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _by_rows(x: Tensor) -> Tensor:
    """[..., V] as a view [B, N, V] with any strides, so that slices and transposes need no copy up to three axes."""
    return x[(None,) * (3 - x.ndim)] if x.ndim <= 3 else x.flatten(0, -3)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_floating(name: str, x: Tensor, like: Tensor | None = None) -> None:
    _require(x.is_floating_point() and x.dtype.itemsize >= 2, f"{name} must be floating point, got {x.dtype}")
    if like is not None:
        _require(
            x.dtype == like.dtype and x.device == like.device,
            f"{name} must be {like.dtype} on {like.device}, got {x.dtype} on {x.device}",
        )


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


def _scan(x: Tensor, mask_id: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The state (top, best, rest) of x, float [R, C], which are the columns first, first + 1, ... of the logits.

    x is a workspace: it is overwritten.
    """
    if first <= mask_id < first + x.shape[1]:
        x[:, mask_id - first] = -torch.inf
    top, best = x.max(-1)
    shift = top.masked_fill(top == -torch.inf, 0)  # a row of -inf: exp(-inf - 0) = 0 and not exp(-inf + inf)
    rest = x.sub_(shift.unsqueeze(-1)).exp_().scatter_(-1, best.unsqueeze(-1), 0).sum(-1)
    return top, best + first, rest


def _merge_states(left: tuple, right: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The state of two pieces of a row; right has the higher ids, so it must be strictly larger to win."""
    (top1, best1, rest1), (top2, best2, rest2) = left, right
    wins = (top2 > top1) | (top2.isnan() & ~top1.isnan())
    low, high = torch.where(wins, top1, top2), torch.where(wins, top2, top1)
    scale = (low - high).exp().masked_fill(low == -torch.inf, 0)
    rest = torch.where(wins, rest2 + (rest1 + 1) * scale, rest1 + (rest2 + 1) * scale)
    return high, torch.where(wins, best2, best1), rest


def _reveal(state: tuple, mask_id: int) -> tuple[Tensor, Tensor]:
    """(best, confidence) of a finished state."""
    top, best, rest = state
    best = best.masked_fill(best == mask_id, int(mask_id == 0))  # a row of -inf: the lowest id that is not MASK
    return best, -torch.log1p(rest.masked_fill(top == -torch.inf, torch.nan))


def _assemble(tokens: Tensor, mask_id: int, masked: Tensor, remask: Tensor, revealed: tuple) -> Decision:
    best, confidence = tokens.clone(), torch.full_like(tokens, -torch.inf, dtype=revealed[1].dtype)
    best[masked], confidence[masked] = revealed[0].to(tokens.dtype), revealed[1]
    return Decision(best, confidence, remask, best.masked_fill(remask, mask_id))


def _decide_from_logits_torch(logits: Tensor, tokens: Tensor, mask_id: int, free: Tensor) -> Decision:
    masked = free & (tokens == mask_id)
    own = logits.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    remask = free & (logits[..., mask_id] > own)  # Eq. 1, first line; false at M, where both are one logit
    rows = logits[masked]
    state = _scan(rows if rows.dtype == torch.float64 else rows.float(), mask_id)
    return _assemble(tokens, mask_id, masked, remask, _reveal(state, mask_id))  # Eq. 1, third line


@jit
def _merge(top1, best1, rest1, top2, best2, rest2):  # _merge_states, element by element: one exponential
    wins = (top2 > top1) | ((top2 != top2) & (top1 == top1))
    low, high = tl.where(wins, top1, top2), tl.where(wins, top2, top1)
    scale = tl.where(low == -float("inf"), 0.0, tl.exp(low - high))
    rest = tl.where(wins, rest2 + (rest1 + 1.0) * scale, rest1 + (rest2 + 1.0) * scale)
    return high, tl.where(wins, best2, best1), rest


@jit
def _collapse(top, best, rest):  # the states of the columns of a tile [R, C], in any order, into one a row
    nan = tl.min(tl.where(top != top, best, NO_TOKEN), 1)  # the first NaN wins, as in torch; max() may drop NaN
    high = tl.max(tl.where(top == top, top, -float("inf")), 1)
    first = tl.min(tl.where(top == high[:, None], best, NO_TOKEN), 1)  # ties: the lowest id
    scale = tl.where(top == -float("inf"), 0.0, tl.exp(top - high[:, None]))
    total = tl.sum(tl.where(best == first[:, None], rest, (rest + 1.0) * scale), 1)
    is_nan = nan < NO_TOKEN
    return tl.where(is_nan, float("nan"), high), tl.where(is_nan, nan, first), total


@jit
def _confidence(top, rest):  # -log1p(rest)
    # Below 0.03 a series (relative error 1e-9): log(1 + rest) would lose what makes confidences differ.
    series = rest * (1.0 - rest * (0.5 - rest * (1.0 / 3.0 - rest * (0.25 - rest * 0.2))))
    log1p = tl.where(rest < 0.03, series, tl.log(1.0 + rest))
    return tl.where(top > -float("inf"), -log1p, float("nan"))  # NaN for a row of -inf, and for a NaN


@jit
def _scan_tile(line, wanted, vocabulary, first, mask_id, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # The states of ROWS rows at the pointers line [ROWS].  Every lane keeps a state of its own, so the loop has no
    # reduction across threads; rows that are not wanted load nothing.
    top = tl.full([ROWS, COLUMNS], -float("inf"), tl.float32)
    best = tl.full([ROWS, COLUMNS], NO_TOKEN, tl.int32)
    rest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        use = wanted[:, None] & (column < vocabulary) & (first + column != mask_id)
        x = tl.load(line[:, None] + column.to(tl.int64) * stride, mask=use, other=-float("inf")).to(tl.float32)
        top, best, rest = _merge(top, best, rest, x, first + column, 0.0)
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
        top, arg, rest = _scan_tile(line, masked, vocabulary, 0, mask_id, stride_v, ROWS, COLUMNS)
        arg = tl.where(arg == NO_TOKEN, tl.where(mask_id == 0, 1, 0), arg)
        best = tl.where(masked, arg, token)  # Eq. 1, third line
        confidence = tl.where(masked, _confidence(top, rest), confidence)
    tl.store(best_out + row, best, mask=inside)
    tl.store(confidence_out + row, confidence, mask=inside)
    tl.store(remask_out + row, remask, mask=inside)
    tl.store(following_out + row, tl.where(remask, mask_id, best), mask=inside)


def _empty_decision(tokens: Tensor) -> Decision:
    return Decision(
        torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device),
        torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device),
        torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device),
        torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device),
    )


def _decide_from_logits_triton(logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None) -> Decision:
    decision, rows = _empty_decision(tokens), _by_rows(logits)
    if tokens.numel():
        tile, columns, warps = _tile(logits.shape[-1])
        flat, locks = tokens.contiguous(), tokens if editable is None else editable.contiguous()
        with _on_device_of(logits):
            _decide_kernel[(triton.cdiv(tokens.numel(), tile),)](
                rows, flat, locks, *decision, tokens.numel(), rows.shape[1], *rows.stride(), logits.shape[-1], mask_id,
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
    _require(editable.dtype == torch.bool, f"editable must be bool, got {editable.dtype}")
    _require(editable.device == x.device, f"editable must be on {x.device}, got {editable.device}")
    fits = editable.ndim <= tokens.ndim and all(
        size in (1, full) for size, full in zip(editable.shape[::-1], tokens.shape[::-1])
    )
    _require(fits, f"editable {[*editable.shape]} must broadcast to tokens {[*tokens.shape]}")
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
    if use_triton(impl, logits):
        return _decide_from_logits_triton(logits, tokens, mask_id, editable)
    free = torch.ones_like(tokens, dtype=torch.bool) if editable is None else editable
    return _decide_from_logits_torch(logits, tokens, mask_id, free)


# ---------------------------------------------------------------------------------------------------------------
# 2. decide_from_hidden
#
# Computes the same decision from hidden states h [N, D] and the head W [V, D], logit[v] = h . W[v].
#
# Costs: a visible position two dot products, 4 D operations and 3 D values read, (W[M] stays in cache); a masked one
# 2 V D operations.  Floor: max(2 masked V D / matrix rate, (V D + N D + visible D) itemsize / bandwidth).  At
# [8192, 4096] with V = 126464 and 25 % masked: 2.12 TFLOP, 2.7 ms at 790 TFLOP/s, four times less than all logits.
# Under some 263 masked rows reading W is the floor: 345 us.
#
# So: gather the masked rows.  Few of them, or a small V: one fused kernel, whose programs share the vocabulary out
# and leave a state (top, best, rest) each.  Many: the library's matrix product into a small workspace, a chunk of the
# vocabulary at a time, each scanned into a state while it is still in cache.  A last kernel merges the states in
# the order of the chunks.

FUSED_ROWS = 256  # masked rows up to which reading W dominates, so the fused kernel's plain tl.dot loop is enough
FUSED_VOCABULARY = 1024  # with so few columns every position goes through it, and nothing waits for a row count
SPLIT = 512  # columns per program: V = 126464 makes 247 programs, one full wave on 132 multiprocessors of two each
ROW_BLOCK = 8192  # rows at a time, so that the workspace is bounded whatever N is


def _workspace_columns(rows: int, x: Tensor, vocabulary: int) -> int:
    """Columns of logits at a time: 32 MiB, which Hopper's L2 (50 MB) keeps between writing and scanning.

    On CPU the piece of the head may need a float32 copy, [columns, D]: that stays within 32 MiB too.
    """
    budget, rows = (2**25 // x.dtype.itemsize, rows) if x.is_cuda else (2**23, max(rows, x.shape[-1]))
    return min(vocabulary, max(256, budget // max(rows, 1) // 256 * 256))


def _decide_from_hidden_torch(hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int, free: Tensor) -> Decision:
    shape, tokens, free = tokens.shape, tokens.reshape(-1), free.reshape(-1)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden = hidden.reshape(len(tokens), head.shape[1])
    masked, remask = free & (tokens == mask_id), torch.zeros_like(free)
    for rows in (free & (tokens != mask_id)).nonzero().squeeze(1).split(1024):  # visible: two logits each
        x = hidden[rows].to(wide)  # products summed alike for both, so that equal rows of the head tie
        own, at_mask = ((x * w.to(wide)).sum(-1) for w in (head[tokens[rows]], head[mask_id]))
        remask[rows] = at_mask > own  # Eq. 1, first line
    best, confidence = [], []
    for rows in masked.nonzero().squeeze(1).split(ROW_BLOCK):  # masked: the head, a chunk of V at a time
        x, state = hidden[rows], None
        columns = _workspace_columns(len(rows), hidden, len(head))
        for first in range(0, len(head), columns):
            piece = head[first : first + columns]
            # On a GPU in the inputs' dtype (tensor cores), rounded as a model's own logits are; on CPU in float32.
            logits = (x @ piece.T).to(wide) if x.is_cuda else x.to(wide) @ piece.to(wide).T
            part = _scan(logits, mask_id, first)
            state = part if state is None else _merge_states(state, part)
        for out, value in zip((best, confidence), _reveal(state, mask_id)):
            out.append(value)
    revealed = (torch.cat(best), torch.cat(confidence))
    return Decision(*(x.view(shape) for x in _assemble(tokens, mask_id, masked, remask, revealed)))


@jit
def _visible_kernel(
    hidden, head, tokens, editable, best_out, confidence_out, remask_out, following_out,
    count, width, vocabulary, mask_id, hidden_stride, head_stride,
    LOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS positions.  Decides the visible ones; the masked ones are left as they are.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    token = tl.load(tokens + row, mask=inside, other=0)
    visible = inside & (token != mask_id) & (token >= 0) & (token < vocabulary)
    if LOCKS:
        visible = visible & (tl.load(editable + row, mask=inside, other=0) != 0)
    own = tl.zeros([ROWS, COLUMNS], tl.float32)
    at_mask = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        use = visible[:, None] & (column < width)
        h = tl.load(hidden + row[:, None] * hidden_stride + column, mask=use, other=0.0).to(tl.float32)
        w = tl.load(head + token.to(tl.int64)[:, None] * head_stride + column, mask=use, other=0.0).to(tl.float32)
        own += h * w
        m = tl.load(head + tl.cast(mask_id, tl.int64) * head_stride + column, mask=column < width, other=0.0)
        at_mask += h * m.to(tl.float32)
    remask = visible & (tl.sum(at_mask, 1) > tl.sum(own, 1))  # Eq. 1, first line
    tl.store(best_out + row, token, mask=inside)
    tl.store(confidence_out + row, tl.full([ROWS], -float("inf"), tl.float32), mask=inside)
    tl.store(remask_out + row, remask, mask=inside)
    tl.store(following_out + row, tl.where(remask, mask_id, token), mask=inside)


@jit
def _fused_head_kernel(
    hidden, head, rows, top_out, best_out, rest_out, count, width, vocabulary, mask_id, hidden_stride, head_stride,
    split, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Grid: (row tiles, splits of the vocabulary); row tiles vary fastest, so those that share columns of the head
    # run together and read them from the cache.  rows [count] names the rows; -1 is none.
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < count, other=-1).to(tl.int64)
    wanted = row >= 0
    top = tl.full([ROWS], -float("inf"), tl.float32)
    best = tl.full([ROWS], NO_TOKEN, tl.int32)
    rest = tl.zeros([ROWS], tl.float32)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        begin = tl.program_id(1) * split
        for first in range(begin, tl.minimum(begin + split, vocabulary), COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            logits = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, width, INNER):
                inner = start + tl.arange(0, INNER)
                h = tl.load(
                    hidden + row[:, None] * hidden_stride + inner[None, :],
                    mask=wanted[:, None] & (inner[None, :] < width), other=0.0,
                )  # fmt: skip
                w = tl.load(
                    head + column.to(tl.int64)[None, :] * head_stride + inner[:, None],
                    mask=(column[None, :] < vocabulary) & (inner[:, None] < width), other=0.0,
                )  # fmt: skip
                if UPCAST:  # the interpreter multiplies bf16 as bit patterns
                    h, w = h.to(tl.float32), w.to(tl.float32)
                logits = tl.dot(h, w, logits, input_precision="ieee")  # float32 stays float32: decisions hang on it
            ids = column[None, :] + tl.zeros([ROWS, COLUMNS], tl.int32)
            logits = tl.where((ids < vocabulary) & (ids != mask_id), logits, -float("inf"))
            top2, best2, rest2 = _collapse(logits, ids, tl.zeros([ROWS, COLUMNS], tl.float32))
            best2 = tl.where(top2 == -float("inf"), NO_TOKEN, best2)
            top, best, rest = _merge(top, best, rest, top2, best2, rest2)
    at = index * tl.num_programs(1) + tl.program_id(1)
    tl.store(top_out + at, top, mask=index < count)
    tl.store(best_out + at, best, mask=index < count)
    tl.store(rest_out + at, rest, mask=index < count)


@jit
def _scan_kernel(
    logits, top_out, best_out, rest_out, count, columns, first, mask_id, chunk, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS rows of the workspace [count, columns]; fills column chunk of the states.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    top, best, rest = _scan_tile(logits + row * columns, inside, columns, first, mask_id, 1, ROWS, COLUMNS)
    tl.store(top_out + row * chunks + chunk, top, mask=inside)
    tl.store(best_out + row * chunks + chunk, best, mask=inside)
    tl.store(rest_out + row * chunks + chunk, rest, mask=inside)


@jit
def _reveal_kernel(
    rows, top_in, best_in, rest_in, best_out, confidence_out, following_out, count, chunks, mask_id,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS masked rows: merges their states and writes the reveals (Eq. 1, third line).
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < count, other=-1).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)[None, :]
    at, use = index.to(tl.int64)[:, None] * chunks + chunk, (row >= 0)[:, None] & (chunk < chunks)
    top = tl.load(top_in + at, mask=use, other=-float("inf"))
    best = tl.load(best_in + at, mask=use, other=NO_TOKEN)
    rest = tl.load(rest_in + at, mask=use, other=0.0)
    top, best, rest = _collapse(top, best, rest)
    best = tl.where(best == NO_TOKEN, tl.where(mask_id == 0, 1, 0), best)
    tl.store(best_out + row, best, mask=row >= 0)
    tl.store(confidence_out + row, _confidence(top, rest), mask=row >= 0)
    tl.store(following_out + row, best, mask=row >= 0)


def _decide_from_hidden_triton(
    hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None, max_masked: int | None
) -> Decision:
    decision, count, (vocabulary, width) = _empty_decision(tokens), tokens.numel(), head.shape
    if not count:
        return decision
    hidden, head, tokens = hidden.reshape(count, width), _unit_columns(head), tokens.reshape(-1)
    hidden, locks = _unit_columns(hidden), tokens if editable is None else editable.reshape(-1)
    tile, columns, warps = _tile(width)
    with _on_device_of(hidden):
        _visible_kernel[(triton.cdiv(count, tile),)](
            hidden, head, tokens, locks, *decision, count, width, vocabulary, mask_id, hidden.stride(0), head.stride(0),
            LOCKS=editable is not None, ROWS=tile, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
        masked = (tokens == mask_id) if editable is None else (tokens == mask_id) & locks
        if vocabulary <= FUSED_VOCABULARY:
            rows = torch.where(masked, torch.arange(count, device=tokens.device), -1)
        elif max_masked is not None:  # masked rows first, in order, then -1: a size known without asking the device
            rows = (~masked).to(torch.uint8).argsort(stable=True)[:max_masked]
            rows = torch.where(masked[rows], rows, -1)
        else:
            rows = masked.nonzero().squeeze(1)  # waits for the device
        for block in rows.split(ROW_BLOCK if vocabulary > FUSED_VOCABULARY else count):
            if len(block):
                _reveal_rows_triton(hidden, head, block, mask_id, decision)
    return decision


def _reveal_rows_triton(hidden: Tensor, head: Tensor, rows: Tensor, mask_id: int, decision: Decision) -> None:
    (vocabulary, width), count = head.shape, len(rows)
    fused = count <= FUSED_ROWS or vocabulary <= FUSED_VOCABULARY
    columns = min(SPLIT, vocabulary) if fused else _workspace_columns(count, hidden, vocabulary)
    chunks = triton.cdiv(vocabulary, columns)
    top, rest = (torch.empty(count, chunks, dtype=torch.float32, device=hidden.device) for _ in range(2))
    best = torch.empty(count, chunks, dtype=torch.int32, device=hidden.device)
    if fused:
        # 128 x 64 pieces of the head: 16 KB of bf16 a stage, three stages in flight; tl.dot wants 16 rows at least.
        tile = 16 if count <= 16 else 32 if count <= 32 else 64
        across = max(16, min(128, triton.next_power_of_2(vocabulary)))
        _fused_head_kernel[(triton.cdiv(count, tile), chunks)](
            hidden, head, rows, top, best, rest, count, width, vocabulary, mask_id, hidden.stride(0), head.stride(0),
            columns, UPCAST=INTERPRETED, ROWS=tile, COLUMNS=across, INNER=64 if hidden.dtype.itemsize == 2 else 32,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    else:
        x = hidden[rows.clamp(min=0)]
        workspace = torch.empty(count * columns, dtype=hidden.dtype, device=hidden.device)
        for chunk in range(chunks):
            piece = head[chunk * columns : (chunk + 1) * columns]
            logits = workspace[: count * len(piece)].view(count, len(piece))
            torch.mm(x, piece.T, out=logits)
            tile, wide, warps = _tile(len(piece))
            _scan_kernel[(triton.cdiv(count, tile),)](
                logits, top, best, rest, count, len(piece), chunk * columns, mask_id, chunk, chunks,
                ROWS=tile, COLUMNS=wide, num_warps=warps,
            )  # fmt: skip
    merged = triton.next_power_of_2(chunks)
    tile = max(1, 64 // merged)
    _reveal_kernel[(triton.cdiv(count, tile),)](
        rows, top, best, rest, decision.best, decision.confidence, decision.following, count, chunks, mask_id,
        ROWS=tile, CHUNKS=merged, num_warps=1,
    )  # fmt: skip


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.no_grad()
def decide_from_hidden(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    mask_id: int,
    editable: Tensor | None = None,
    impl: str | None = None,
    max_masked: int | None = None,
) -> Decision:
    """Eq. 1 from hidden states; logits = hidden @ head.T are formed at masked positions only, a piece at a time.

    hidden: float [..., D].  head: the output weight [V, D], same dtype and device.  tokens, mask_id, editable and
    the Decision returned: as for decide_from_logits, NaN and ties too.  No gradient.
    Workspace: at most 32 MiB of logits, or 256 columns of 8,192 rows where that is more.
    max_masked: a promise that no more than so many positions are masked and editable; without it the row count is
    asked of the device once (for V > 1,024), which a CUDA graph cannot hold.  Further rows stay masked.
    Raises ValueError for wrong shapes, dtypes or devices, a mask_id outside [0, V), on CPU ids outside [0, V) and
    more masked positions than max_masked.
    """
    _require(head.ndim == 2, f"head must be a weight [V, D], got {[*head.shape]}")
    editable = _check_decide("hidden", hidden, len(head), tokens, mask_id, editable)
    _require(hidden.shape[-1] == head.shape[1], f"hidden must be [..., {head.shape[1]}], got {[*hidden.shape]}")
    _check_floating("head", head, like=hidden)
    free = torch.ones_like(tokens, dtype=torch.bool) if editable is None else editable
    if max_masked is not None and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        masked = int((free & (tokens == mask_id)).sum())
        _require(masked <= max_masked, f"max_masked is {max_masked}, but {masked} editable positions are masked")
    with torch.autocast(hidden.device.type, enabled=False):
        if use_triton(impl, hidden):
            return _decide_from_hidden_triton(hidden, head, tokens, mask_id, editable, max_masked)
        return _decide_from_hidden_torch(hidden, head, tokens, mask_id, free)


# ---------------------------------------------------------------------------------------------------------------
# 3. history_step and history_sum
#
# Computes Eq. 2.  The step:  a(t) = wte(x(t)) + gamma R_(-1) a(t-1), and the RMSNorm of a(t) that the model reads.
# The closed sum:  a(t) = sum_{k=0..t} gamma^(t-k) R_(k-t) wte(x(k)), by the same recurrence kept in registers.
# R_delta turns the pair (j, j + D/2) by delta * 10000^(-2j/D); R_(-1) takes (u, v) to (u c + v s, v c - u s).
#
# Costs: the step reads a(t-1) and one embedding row a position, and writes a(t) and its norm: 4 N D values.  Floor at
# N = 8192, D = 4096: 89 us in bf16, 134 us with a in float32.  The sum reads t + 1 embedding rows and writes one.
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
    a: Tensor | None, tokens: Tensor, embedding: Tensor, gamma: float, rotate: bool, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape, width = tokens.shape, embedding.shape[1]
    new = torch.empty(tokens.numel(), width, dtype=dtype, device=embedding.device)
    read = torch.empty_like(new, dtype=embedding.dtype)
    # On CPU a few rows at a time: what one line leaves in the cache the next one finds there.
    block = max(1, 2**18 // width) if embedding.device.type == "cpu" else max(1, tokens.numel())
    a = None if a is None or not gamma else a.reshape(-1, width)
    for at in range(0, tokens.numel(), block):
        rows = slice(at, at + block)
        total = embedding[tokens.reshape(-1)[rows]].to(wide)
        if a is not None:
            total = total + _turned_back(a[rows].to(wide), gamma, rotate)  # Eq. 2, the recurrence
        new[rows] = total
        read[rows] = rms_norm(total) if normalize else total
    return new.view(*shape, width), read.view(*shape, width)


def _history_sum_torch(
    states: Tensor, embedding: Tensor, gamma: float, rotate: bool, normalize: bool
) -> Tensor:
    table = embedding if embedding.dtype == torch.float64 else embedding.float()
    total = None
    for state in states:
        new = F.embedding(state.clamp(min=0), table) * (state >= 0).unsqueeze(-1)  # -1: no state, adds nothing
        total = new if total is None else new + _turned_back(total, gamma, rotate)  # Eq. 2
    return (rms_norm(total) if normalize else total).to(embedding.dtype)


@jit
def _gather_halves(embedding, token, stride, column, half, width, vocabulary, inside):
    # The pair (j, j + D/2) of an embedding row; zero for a token that is none (-1, or padding).
    use = inside & (token >= 0) & (token < vocabulary)
    line = embedding + token.to(tl.int64)[:, None] * stride + column
    u = tl.load(line, mask=use[:, None] & (column < half), other=0.0)
    v = tl.load(line + half, mask=use[:, None] & (column + half < width), other=0.0)
    return u.to(tl.float32), v.to(tl.float32)


@jit
def _store_halves(out, row, column, half, width, inside, u, v):
    line = out + row[:, None] * width + column
    tl.store(line, u, mask=inside[:, None] & (column < half))
    tl.store(line + half, v, mask=inside[:, None] & (column + half < width))


@jit
def _inverse_rms(u, v, width):
    return tl.rsqrt((tl.sum(u * u, 1) + tl.sum(v * v, 1)) / width + 1e-6)[:, None]


@jit
def _history_step_kernel(
    a, tokens, embedding, cos, sin, new_out, read_out, count, width, half, vocabulary, stride, gamma,
    PAST: tl.constexpr, ROTATE: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS whole rows, because the norm needs the whole row.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    column = tl.arange(0, HALF)[None, :]
    token = tl.load(tokens + row, mask=inside, other=-1)
    u, v = _gather_halves(embedding, token, stride, column, half, width, vocabulary, inside)
    if PAST:
        line = a + row[:, None] * width + column
        p = tl.load(line, mask=inside[:, None] & (column < half), other=0.0).to(tl.float32)
        q = tl.load(line + half, mask=inside[:, None] & (column + half < width), other=0.0).to(tl.float32)
        if ROTATE:
            c = tl.load(cos + column, mask=column < half, other=0.0)
            s = tl.load(sin + column, mask=column < half, other=0.0)
            p, q = p * c + q * s, q * c - p * s  # R_(-1)
        u, v = u + gamma * p, v + gamma * q  # Eq. 2
    _store_halves(new_out, row, column, half, width, inside, u, v)
    if NORMALIZE:
        scale = _inverse_rms(u, v, width)
        u, v = u * scale, v * scale
    _store_halves(read_out, row, column, half, width, inside, u, v)


@jit
def _history_sum_kernel(
    states, embedding, cos, sin, gradient, out, count, turns, width, half, vocabulary, stride, gamma,
    BACKWARD: tl.constexpr, SCATTER: tl.constexpr, ROTATE: tl.constexpr, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS whole rows.  Forward: out = the sum.  Backward: the sum again (it is cheaper to gather
    # than to keep), the gradient da through the norm, then either out = da, or, with SCATTER, out += the terms of
    # the gradient to the embedding.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    column = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + column, mask=column < half, other=0.0)
    s = tl.load(sin + column, mask=column < half, other=0.0)
    u = tl.zeros([ROWS, HALF], tl.float32)
    v = tl.zeros([ROWS, HALF], tl.float32)
    if NORMALIZE or not BACKWARD:
        for turn in range(0, turns):  # oldest first
            token = tl.load(states + turn * count + row, mask=inside, other=-1)
            p, q = _gather_halves(embedding, token, stride, column, half, width, vocabulary, inside)
            if ROTATE:
                u, v = u * c + v * s, v * c - u * s
            u, v = p + gamma * u, q + gamma * v  # Eq. 2
    scale = _inverse_rms(u, v, width)
    if NORMALIZE:
        u, v = u * scale, v * scale
    if BACKWARD:
        line = gradient + row[:, None] * width + column
        p = tl.load(line, mask=inside[:, None] & (column < half), other=0.0).to(tl.float32)
        q = tl.load(line + half, mask=inside[:, None] & (column + half < width), other=0.0).to(tl.float32)
        if NORMALIZE:  # y = a r: da = r (g - y mean(g y))
            mean = ((tl.sum(p * u, 1) + tl.sum(q * v, 1)) / width)[:, None]
            p, q = scale * (p - u * mean), scale * (q - v * mean)
        if SCATTER:
            for age in range(0, turns):
                token = tl.load(states + (turns - 1 - age) * count + row, mask=inside, other=-1)
                use = inside & (token >= 0) & (token < vocabulary)
                line = out + token.to(tl.int64)[:, None] * width + column
                tl.atomic_add(line, p, mask=use[:, None] & (column < half), sem="relaxed")
                tl.atomic_add(line + half, q, mask=use[:, None] & (column + half < width), sem="relaxed")
                if ROTATE:
                    p, q = p * c - q * s, q * c + p * s  # R_1, the transpose of R_(-1)
                p, q = gamma * p, gamma * q
        else:
            _store_halves(out, row, column, half, width, inside, p, q)
    else:
        _store_halves(out, row, column, half, width, inside, u, v)


def _history_tile(width: int) -> tuple[int, int, int]:
    """(rows, columns of a half, warps): a whole row a program at D = 4096, 16 rows at D = 128."""
    half = triton.next_power_of_2(max(1, (width + 1) // 2))
    return max(1, min(32, 1024 // half)), half, 8 if half >= 1024 else 4


def _history_step_triton(
    a: Tensor | None, tokens: Tensor, embedding: Tensor, gamma: float, rotate: bool, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    count, (vocabulary, width) = tokens.numel(), embedding.shape
    new = torch.empty(*tokens.shape, width, dtype=dtype, device=embedding.device)
    read = torch.empty_like(new, dtype=embedding.dtype)
    embedding, (rows, half, warps) = _unit_columns(embedding), _history_tile(width)
    cos, sin = _angles(width, embedding.device, torch.float32)
    past = a is not None and gamma > 0
    if count:
        with _on_device_of(embedding):
            _history_step_kernel[(triton.cdiv(count, rows),)](
                a.contiguous() if past else new, tokens.contiguous(), embedding, cos, sin, new, read,
                count, width, (width + 1) // 2, vocabulary, embedding.stride(0), float(gamma),
                PAST=past, ROTATE=rotate, NORMALIZE=normalize, ROWS=rows, HALF=half, num_warps=warps,
            )  # fmt: skip
    return new, read


class _HistorySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, embedding, gamma, rotate, normalize):
        ctx.save_for_backward(states, embedding)
        ctx.settings = gamma, rotate, normalize
        out = torch.empty(*states.shape[1:], embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
        return _launch_history_sum(states, embedding, out, out, *ctx.settings)

    @staticmethod
    def backward(ctx, gradient):
        states, embedding = ctx.saved_tensors
        gamma, rotate, _ = ctx.settings
        (turns, *_), (vocabulary, width), count = states.shape, embedding.shape, states[0].numel()
        gradient = gradient.contiguous()
        if vocabulary * turns > count:
            # Many tokens: atomic additions into the table; their order, so the last bit, may vary between runs.
            out = torch.zeros(vocabulary, width, dtype=torch.float32, device=embedding.device)
            _launch_history_sum(states, embedding, gradient, out, *ctx.settings, backward=True, scatter=True)
            return None, out.to(embedding.dtype), None, None, None
        # Few tokens (V = 10): every addition would hit the same rows.  Rotation and decay are linear, so add up da by
        # (turn, token) with a product of 0/1 indicators, and age the V sums instead of the N rows.
        da = torch.empty(count, width, dtype=torch.float32, device=embedding.device)
        _launch_history_sum(states, embedding, gradient, da, *ctx.settings, backward=True, scatter=False)
        total = torch.zeros(vocabulary, width, dtype=torch.float32, device=embedding.device)
        token = torch.arange(vocabulary, device=states.device)
        for state in states:  # oldest first: what is added first is turned and decayed most often
            if rotate:
                cos, sin = _angles(width, embedding.device, torch.float32)
                u, v = total.chunk(2, -1)
                total = torch.cat([u * cos - v * sin, v * cos + u * sin], -1)
            total = gamma * total + (state.reshape(-1) == token.unsqueeze(1)).float() @ da
        return None, total.to(embedding.dtype), None, None, None


def _launch_history_sum(
    states: Tensor, embedding: Tensor, gradient: Tensor, out: Tensor, gamma: float, rotate: bool, normalize: bool,
    backward: bool = False, scatter: bool = False,
) -> Tensor:  # fmt: skip
    (turns, *_), (vocabulary, width), count = states.shape, embedding.shape, states[0].numel()
    rows, half, warps = _history_tile(width)
    embedding, (cos, sin) = _unit_columns(embedding), _angles(width, embedding.device, torch.float32)
    if count:
        with _on_device_of(embedding):
            _history_sum_kernel[(triton.cdiv(count, rows),)](
                states.contiguous(), embedding, cos, sin, gradient, out,
                count, turns, width, (width + 1) // 2, vocabulary, embedding.stride(0), float(gamma),
                BACKWARD=backward, SCATTER=scatter, ROTATE=rotate, NORMALIZE=normalize, ROWS=rows, HALF=half,
                num_warps=warps,
            )  # fmt: skip
    return out


def check_history(embedding: Tensor, gamma: float, rotate: bool) -> None:
    _check_floating("embedding", embedding)
    shape = [*embedding.shape]
    _require(embedding.ndim == 2 and embedding.numel() > 0, f"embedding must be a weight [V, D], got {shape}")
    _require(0 <= gamma <= 1, f"gamma must lie in [0, 1], got {gamma}")
    _require(not rotate or shape[1] % 2 == 0, f"embedding must have an even D to rotate, got {shape}")


@torch.no_grad()
def history_step(
    a: Tensor | None,
    tokens: Tensor,
    embedding: Tensor,
    gamma: float = 0.9,
    rotate: bool = True,
    normalize: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 2, one turn of the recurrence: (a(t), what the model reads), where a(t) = wte(x(t)) + gamma R_(-1) a(t-1).

    a: a(t-1), float [..., D], or None at the first turn.  tokens: int32 or int64 [...].  embedding: float [V, D].
    gamma in [0, 1]; rotate: R, for even D; normalize: the RMSNorm (eps 1e-6, no weight) of what is read.
    Returns a(t), in a's dtype (float32 at the first turn, float64 for a float64 embedding), and what is read, in the
    embedding's; both new.  No gradient: history_sum has one.  NaN propagates.
    Raises ValueError for wrong shapes, dtypes or devices, gamma outside [0, 1], odd D with rotate, on CPU bad ids.
    """
    check_history(embedding, gamma, rotate)
    check_ids("tokens", tokens, None, embedding.device, 0, len(embedding))
    dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    if a is not None:
        _check_floating("a", a)
        expected = [*tokens.shape, embedding.shape[1]]
        _require([*a.shape] == expected, f"a must be of shape {expected}, got {[*a.shape]}")
        _require(a.device == embedding.device, f"a must be on {embedding.device}, got {a.device}")
        _require((a.dtype == torch.float64) == (dtype == torch.float64), f"a is {a.dtype}, embedding {embedding.dtype}")
        dtype = a.dtype
    run = _history_step_triton if use_triton(impl, embedding) else _history_step_torch
    return run(a, tokens, embedding, gamma, rotate, normalize, dtype)


def history_sum(
    states: Tensor,
    embedding: Tensor,
    gamma: float = 0.9,
    rotate: bool = True,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Eq. 2 as the closed sum over states x(0), ..., x(t), with its gradient to the embedding.

    states: int32 or int64 [t+1, ...], oldest first; -1 where a sequence has no state yet, which adds nothing.
    embedding, gamma, rotate, normalize: as for history_step.  Returns float [..., D] in the embedding's dtype.
    NaN propagates.  Raises ValueError as history_step does, and for no state at all.
    """
    check_history(embedding, gamma, rotate)
    _require(states.ndim >= 1 and len(states) > 0, f"states must be [T+1, ...] with T >= 0, got {[*states.shape]}")
    check_ids("states", states, None, embedding.device, -1, len(embedding))
    states = states if gamma else states[-1:]
    if use_triton(impl, embedding):
        return _HistorySum.apply(states, embedding, float(gamma), rotate, normalize)
    return _history_sum_torch(states, embedding, gamma, rotate, normalize)


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


def _nll_rows_(logits: Tensor, target: Tensor, scale: Tensor, gradient: bool) -> Tensor:
    """-log p(target) of every row; with gradient, logits [R, V] becomes scale (p - onehot).  scale: [R]."""
    log_p = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    loss = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if gradient:
        slope = log_p.exp_().scatter_add_(-1, target.unsqueeze(-1), -torch.ones_like(loss).unsqueeze(-1))
        logits.copy_(slope * scale.unsqueeze(-1))
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
    rows = logits[counted]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    loss = F.cross_entropy(rows, target[counted].long(), reduction="none")
    return _parts(loss, role[counted], weights)


@jit
def _nll_kernel(
    logits, target, role, loss_out, lse_out, count, length, stride_b, stride_n, stride_v, vocabulary,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS rows.  Every lane keeps a maximum and a sum of its own; rows to ignore load nothing.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    counted = tl.load(role + row, mask=inside, other=-1) >= 0
    line = logits + (row // length) * stride_b + (row % length) * stride_n
    high = tl.full([ROWS, COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        use = counted[:, None] & (column < vocabulary)
        x = tl.load(line[:, None] + column.to(tl.int64) * stride_v, mask=use, other=-float("inf")).to(tl.float32)
        grows = x > high
        low, high = tl.where(grows, high, x), tl.where(grows, x, high)
        scale = tl.where(low == -float("inf"), 0.0, tl.exp(low - high))
        total = tl.where(grows, total * scale + 1.0, total + scale)  # a NaN stays in the sum
    top = tl.max(high, 1)
    scale = tl.where(high == -float("inf"), 0.0, tl.exp(high - top[:, None]))  # +inf - inf: NaN, as in torch
    lse = top + tl.log(tl.sum(tl.where(total == 0.0, 0.0, total * scale), 1))
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


def _launch_nll(logits: Tensor, target: Tensor, role: Tensor) -> tuple[Tensor, Tensor]:
    rows, count, vocabulary = _by_rows(logits), role.numel(), logits.shape[-1]
    loss, lse = (torch.empty(role.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    tile, columns, warps = _tile(vocabulary)
    if count:
        with _on_device_of(logits):
            _nll_kernel[(triton.cdiv(count, tile),)](
                rows, target, role, loss, lse, count, rows.shape[1], *rows.stride(), vocabulary,
                ROWS=tile, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return loss, lse


def _launch_nll_gradient(
    logits: Tensor, target: Tensor, role: Tensor, lse: Tensor, weights: Tensor, out: Tensor
) -> Tensor:
    rows, count, vocabulary = _by_rows(logits), role.numel(), logits.shape[-1]
    tile, columns, warps = _tile(vocabulary)
    if count:
        with _on_device_of(logits):
            _nll_gradient_kernel[(triton.cdiv(count, tile), triton.cdiv(vocabulary, columns))](
                rows, target, role, lse, weights, out, count, rows.shape[1], *rows.stride(), vocabulary,
                ROWS=tile, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return out


class _CrossEntropy(torch.autograd.Function):  # from logits, by the kernels
    @staticmethod
    def forward(ctx, logits, target, role, weights):
        loss, lse = _launch_nll(logits, target, role)
        ctx.save_for_backward(logits, target, role, lse, weights)
        total, parts = _parts(loss, role, weights)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx, upstream, _):
        logits, target, role, lse, weights = ctx.saved_tensors
        scaled = weights * (upstream / (role != IGNORE).sum().clamp(min=1))
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        return _launch_nll_gradient(logits, target, role, lse, scaled, out), None, None, None


class _HeadCrossEntropy(torch.autograd.Function):  # from hidden states [N, D] and the head, in chunks of rows
    @staticmethod
    def forward(ctx, hidden, head, target, role, weights, triton_rows):
        to_hidden, to_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if to_hidden else None
        grad_head = torch.zeros_like(head, memory_format=torch.contiguous_format) if to_head else None
        loss = torch.zeros(role.shape, dtype=weights.dtype, device=hidden.device)
        chunk = max(CHUNK_ROWS, CHUNK_BYTES // (len(head) * hidden.dtype.itemsize))
        for rows in (role != IGNORE).nonzero().squeeze(1).split(chunk):  # waits for the device
            x, goal, kind = hidden[rows], target[rows], role[rows]
            logits = x @ head.T
            if triton_rows:
                loss[rows], lse = _launch_nll(logits, goal, kind)
                if to_hidden or to_head:
                    _launch_nll_gradient(logits, goal, kind, lse, weights, out=logits)
            else:
                loss[rows] = _nll_rows_(logits, goal.long(), weights[kind.long()], gradient=to_hidden or to_head)
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
    inputs: Tensor,
    target: Tensor,
    role: Tensor,
    weights: tuple[float, float, float] = (1, 1, 1),
    head: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        fits = head.ndim == 2 and head.shape[1] == inputs.shape[-1]
        _require(fits, f"head must be [V, {inputs.shape[-1]}], got {[*head.shape]}")
        _check_floating("head", head, like=inputs)
    _require(len(weights) == 3, f"weights must be three numbers, got {weights}")
    vocabulary = inputs.shape[-1] if head is None else len(head)
    check_ids("role", role, inputs.shape[:-1], inputs.device, IGNORE, 3)
    check_ids("target", target, inputs.shape[:-1], inputs.device, 0, vocabulary, where=role != IGNORE)
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    factors = torch.stack([torch.full((), w, dtype=wide, device=inputs.device) for w in weights])
    triton_rows = use_triton(impl, inputs)
    if head is not None:
        with torch.autocast(inputs.device.type, enabled=False):
            total, parts = _HeadCrossEntropy.apply(
                inputs.flatten(0, -2) if inputs.ndim > 1 else inputs.unsqueeze(0), head,
                target.reshape(-1), role.reshape(-1), factors, triton_rows,
            )  # fmt: skip
    elif triton_rows:
        total, parts = _CrossEntropy.apply(inputs, target.contiguous(), role.contiguous(), factors)
    else:
        total, parts = _revision_cross_entropy_torch(inputs, target, role, factors)
    return total, *parts.detach().unbind()


# ---------------------------------------------------------------------------------------------------------------
# 5. The benchmark:  python kernels.py

SHAPES = {  # N, V, D
    "LLaDA-8B, 8 x 1024": (8192, 126464, 4096),
    "Lumina-DiMOO, 4096": (4096, 8193, 4096),
    "Sudoku, 512 boards": (41472, 10, 128),
}
SMALL = {"small": (96, 300, 32)}


class _LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types_, args=(), keywords=None):
        result = function(*args, **(keywords or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


class Benchmark:
    """Times forms of one computation side by side, prints a table each, and keeps every row for the JSON file."""

    def __init__(self, device: str, smoke: bool):
        self.device, self.smoke, self.cuda, self.rows = torch.device(device), smoke, device != "cpu", []
        self.impl = "triton" if self.cuda or INTERPRETED else "torch"
        size = 2**29 if self.cuda else 2**27 if not smoke else 2**20
        side = 8192 if self.cuda else 2048 if not smoke else 256
        source, dtype = torch.ones(size // 4, device=device), torch.bfloat16 if self.cuda else torch.float32
        target, a = torch.empty_like(source), torch.randn(side, side, device=device).to(dtype)
        # The two ceilings of this machine, measured: bytes read and written a second, operations a second.
        self.bandwidth = 2 * size / self.seconds({"": lambda: target.copy_(source)})[""]
        self.rate = 2 * side**3 / self.seconds({"": lambda: a @ a})[""]
        print(f"ceilings here: copy {self.bandwidth / 1e9:,.0f} GB/s, {dtype} product {self.rate / 1e12:,.2f} TFLOP/s")

    def seconds(self, forms: dict[str, Callable], graph: bool = False) -> dict[str, float]:
        """Median seconds of each form; on CPU in turns, so that a disturbance meets all of them."""
        if self.cuda:
            timer = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
            return {name: timer(form, rep=100, return_mode="median") / 1e3 for name, form in forms.items()}
        times: dict[str, list[float]] = {name: [] for name in forms}
        for repeat in range(2 if self.smoke else 8):
            for name, form in forms.items():
                began = time.perf_counter()
                form()
                times[name] += [time.perf_counter() - began] if repeat else []  # the first warms up
        return {name: statistics.median(values) for name, values in times.items()}

    def peak(self, form: Callable) -> float:
        """MiB that a form needs beyond its inputs: the allocator's peak on a GPU, the largest tensor on CPU."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            form()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with _LargestTensor() as largest:
            form()
        return largest.bytes / 2**20

    def table(
        self, kernel: str, shape: str, forms: dict[str, Callable], inputs: list[tuple], moved: float = 0,
        flops: float = 0, differ: Callable | None = None, graphs: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Times forms (each called with one of the input sets in turn).  ratio: the first form's time over this one's.

        share: floor over time, floor = max(moved / bandwidth, flops / rate).  differ(result, first form's result).
        """
        floor = max(moved / self.bandwidth, flops / self.rate)
        memory = "peak MiB" if self.cuda else "largest MiB"
        print(f"\n{kernel}: {shape}; {moved / 1e6:,.1f} MB, {flops / 1e9:,.1f} GFLOP, floor {floor * 1e6:,.1f} us")
        print(f"  {'form':44}{'us':>12}{'ratio':>9}{'share':>8}{memory:>13}{'differs':>10}")
        expected, calls, difference, peak = None, {}, {}, {}
        for name, form in forms.items():
            sets = itertools.cycle(inputs)
            calls[name] = lambda form=form, sets=sets: form(*next(sets))
            try:
                result = form(*inputs[0])
                expected = result if expected is None else expected
                difference[name] = float(differ(result, expected)) if differ else 0.0
                del result
                peak[name] = self.peak(lambda: form(*inputs[0]))
            except torch.OutOfMemoryError:
                print(f"  {name:44}{'out of memory':>12}")
                del calls[name]
        del expected
        times = self.seconds(calls)
        if self.cuda:
            for name in graphs:
                times |= self.seconds({f"{name}, CUDA graph": calls[name]}, graph=True)
        first = next(iter(times.values()))
        for name, value in times.items():
            row = {
                "kernel": kernel, "shape": shape, "form": name, "microseconds": value * 1e6,
                "floor_microseconds": floor * 1e6, "bytes": moved, "flops": flops, "ratio": first / value,
                "share": floor / value, "memory_mib": peak.get(name), "differs": difference.get(name),
            }  # fmt: skip
            self.rows.append(row)
            tail = f"{peak[name]:>13,.1f}{difference[name]:>10.1e}" if name in peak else ""
            print(f"  {name:44}{value * 1e6:>12,.1f}{row['ratio']:>9.2f}{row['share']:>8.1%}{tail}", flush=True)

    def compiled(self, function: Callable) -> Callable:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    def sets(self, make: Callable[[], tuple], size: float) -> list[tuple]:
        """Input sets that together exceed three times a 50 MB L2."""
        return [make() for _ in range(max(1, min(256, int(150e6 / size) + 1)) if self.cuda else 1)]


def _full_decision(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """Eq. 1 as one would write it first: a softmax over every row, then where."""
    p = logits.float().softmax(-1)
    own, at_mask = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), p[..., mask_id]
    best = p.index_fill(-1, torch.tensor([mask_id], device=p.device), -1).argmax(-1)
    return torch.where(tokens == mask_id, best, torch.where(at_mask > own, mask_id, tokens))


def _visible_decision(hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    own = (hidden.float() * head[tokens].float()).sum(-1)
    return torch.where(hidden.float() @ head[mask_id].float() > own, mask_id, tokens)


def _share_unequal(x: Tensor, y: Tensor) -> Tensor:
    return (x != y).float().mean()


def _relative_error(x: tuple, y: tuple) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in zip(x, y))


def _masked_tokens(count: int, vocabulary: int, masked: int, device: torch.device) -> Tensor:
    tokens = torch.randint(vocabulary - 1, (count,), device=device)
    tokens[torch.randperm(count, device=device)[:masked]] = vocabulary - 1
    return tokens


def benchmark_decisions(
    bench: Benchmark, name: str, count: int, vocabulary: int, width: int, dtype: torch.dtype
) -> None:
    mask_id, device, item, impl = vocabulary - 1, bench.device, dtype.itemsize, bench.impl
    graphs = (impl,) if vocabulary <= FUSED_VOCABULARY else ()

    def on_rows(logits, tokens, rows):  # the masked rows alone; two logits of the others
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        following = torch.where(logits[:, mask_id] > own, mask_id, tokens)
        chosen = logits[rows].float().index_fill(-1, torch.tensor([mask_id], device=device), -torch.inf)
        return following.index_copy(0, rows, chosen.log_softmax(-1).max(-1).indices)

    for share in (1, 0.25):
        masked = int(count * share)
        moved = masked * vocabulary * item + (count - masked) * 64

        def logit_inputs():
            tokens = _masked_tokens(count, vocabulary, masked, device)
            logits = torch.randn(count, vocabulary, device=device, dtype=dtype)
            return logits, tokens, (tokens == mask_id).nonzero().squeeze(1)

        forms = {"eager, all rows": lambda x, t, r: _full_decision(x, t, mask_id)}
        if bench.cuda:
            forms["compiled, all rows"] = bench.compiled(forms["eager, all rows"])
            forms["compiled, masked rows"] = bench.compiled(on_rows)
        forms["eager, masked rows"] = on_rows
        forms[impl] = lambda x, t, r: decide_from_logits(x, t, mask_id, impl=impl).following
        inputs = bench.sets(logit_inputs, count * vocabulary * item)
        bench.table("decide_from_logits", f"{name}, {share:.0%} masked", forms, inputs, moved, 4 * masked * vocabulary,
                    _share_unequal, graphs)  # fmt: skip
        del inputs

    for masked in sorted({count, count // 4, count // 20, min(32, count)}, reverse=True):

        def hidden_inputs():
            hidden = torch.randn(count, width, device=device).to(dtype)
            head = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype)
            tokens = _masked_tokens(count, vocabulary, masked, device)
            return hidden, head, tokens, (tokens == mask_id).nonzero().squeeze(1)

        def unfused(hidden, head, tokens, rows):  # the library's product on the masked rows, then kernel 1
            best = decide_from_logits(hidden[rows] @ head.T, tokens[rows], mask_id, impl=impl).best
            return _visible_decision(hidden, head, tokens, mask_id).index_copy(0, rows, best)

        def unfused_torch(hidden, head, tokens, rows):
            best = (hidden[rows] @ head.T)[:, :mask_id].float().log_softmax(-1).max(-1).indices
            return _visible_decision(hidden, head, tokens, mask_id).index_copy(0, rows, best)

        forms = {"eager, all logits": lambda h, w, t, r: _full_decision(h @ w.T, t, mask_id)}
        if bench.cuda:
            forms["compiled, all logits"] = bench.compiled(forms["eager, all logits"])
            forms["compiled, masked rows"] = bench.compiled(unfused_torch)
        forms["product on masked rows, then kernel 1"] = unfused
        forms["torch"] = lambda h, w, t, r: decide_from_hidden(h, w, t, mask_id, impl="torch").following
        if impl == "triton":
            forms["triton"] = lambda h, w, t, r: decide_from_hidden(h, w, t, mask_id, impl="triton").following
        moved = (vocabulary * (masked > 0) + 2 * count - masked) * width * item
        inputs = bench.sets(hidden_inputs, (vocabulary + count) * width * item)
        bench.table("decide_from_hidden", f"{name}, {masked} masked", forms, inputs, moved,
                    2 * masked * vocabulary * width, _share_unequal, graphs)  # fmt: skip
        del inputs


def benchmark_history(
    bench: Benchmark, name: str, count: int, vocabulary: int, width: int, dtype: torch.dtype
) -> None:
    device, item, impl = bench.device, dtype.itemsize, bench.impl
    embedding = torch.randn(vocabulary, width, device=device).to(dtype)

    def inputs(turns):
        return lambda: (
            torch.randint(vocabulary, (turns, count), device=device),
            torch.randn(count, width, device=device),
        )

    def eager(states, a):
        new = F.embedding(states[-1], embedding).float() + _turned_back(a, 0.9, True)
        return new, F.rms_norm(new, (width,), eps=1e-6).to(dtype)

    forms = {"eager": eager}
    if bench.cuda:
        forms["compiled"] = bench.compiled(eager)
    forms[impl] = lambda states, a: history_step(a, states[-1], embedding, impl=impl)
    gathered = min(count, vocabulary) * width * item  # embedding rows: each at most once from memory
    moved = count * width * (8 + item) + gathered
    bench.table("history_step", name, forms, bench.sets(inputs(1), 12 * count * width), moved,
                differ=_relative_error, graphs=(impl,))  # fmt: skip

    upstream = torch.randn(count, width, device=device).to(dtype)
    leaf = embedding.clone().requires_grad_()

    def with_gradient(function):
        def run(states, a):
            out = function(states, leaf)
            return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]

        return run

    reference = functools.partial(_history_sum_torch, gamma=0.9, rotate=True, normalize=True)
    forms = {"eager": with_gradient(reference)}
    if bench.cuda:
        forms["compiled"] = with_gradient(bench.compiled(reference))
    forms[impl] = with_gradient(lambda states, leaf: history_sum(states, leaf, impl=impl))
    moved = 7 * gathered * 2 + count * width * item * 2 + vocabulary * width * (4 + item)
    bench.table("history_sum, 7 states, with gradient", name, forms, bench.sets(inputs(7), 12 * count * width), moved,
                differ=_relative_error)  # fmt: skip


def benchmark_losses(
    bench: Benchmark, name: str, count: int, vocabulary: int, width: int, dtype: torch.dtype
) -> None:
    device, item, impl = bench.device, dtype.itemsize, bench.impl
    target, role = (torch.randint(high, (count,), device=device) for high in (vocabulary, 3))

    def with_gradient(function):
        def run(*leaves):
            total = function(*leaves)
            return total.detach(), *torch.autograd.grad(total, leaves)

        return run

    def from_logits(x):
        return F.cross_entropy(x.float(), target)

    def from_hidden(hidden, head):
        return F.cross_entropy((hidden @ head.T).float(), target)

    logit_forms, hidden_forms = {"eager": with_gradient(from_logits)}, {"eager": with_gradient(from_hidden)}
    if bench.cuda:
        logit_forms["compiled"] = with_gradient(bench.compiled(from_logits))
        hidden_forms["compiled"] = with_gradient(bench.compiled(from_hidden))
        if importlib.util.find_spec("liger_kernel"):  # a peer, where it is installed; it writes into its logits
            from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss

            peer, fused_peer = LigerCrossEntropyLoss(), LigerFusedLinearCrossEntropyLoss()
            logit_forms["Liger (with a copy of the logits)"] = with_gradient(lambda x: peer(x.clone(), target))
            hidden_forms["Liger"] = with_gradient(lambda hidden, head: fused_peer(head, hidden, target))
        hidden_forms["product, then kernel 4"] = with_gradient(
            lambda hidden, head: revision_cross_entropy(hidden @ head.T, target, role, impl=impl)[0]
        )
    logit_forms[impl] = with_gradient(lambda x: revision_cross_entropy(x, target, role, impl=impl)[0])
    hidden_forms[impl] = with_gradient(lambda x, head: revision_cross_entropy(x, target, role, head=head, impl=impl)[0])

    def leaf(rows, columns, scale=1.0):
        return (torch.randn(rows, columns, device=device) * scale).to(dtype).requires_grad_()

    size = count * vocabulary * item
    inputs = bench.sets(lambda: (leaf(count, vocabulary),), size)
    bench.table("revision_cross_entropy, with gradient", name, logit_forms, inputs, 3 * size, differ=_relative_error)
    size = (vocabulary + count) * width * item
    inputs = bench.sets(lambda: (leaf(count, width), leaf(vocabulary, width, width**-0.5)), size)
    bench.table("revision_cross_entropy from hidden states, with gradient", name, hidden_forms, inputs,
                2 * size, 6 * count * vocabulary * width, _relative_error)  # fmt: skip


def benchmark_sparse_on_cpu(bench: Benchmark) -> None:
    """What needs no Triton: the head at masked rows only, float32."""
    count, vocabulary, width = (64, 500, 32) if bench.smoke else (4096, 32000, 512)
    for share in (0.25, 0.05):
        masked = int(count * share)
        hidden, head = torch.randn(count, width), torch.randn(vocabulary, width) * width**-0.5
        inputs = [(hidden, head, _masked_tokens(count, vocabulary, masked, bench.device))]
        mask_id, shape = vocabulary - 1, f"N={count} V={vocabulary} D={width} float32, {share:.0%} masked"
        forms = {
            "full logits, softmax, where": lambda h, w, t: _full_decision(h @ w.T, t, mask_id),
            "decide_from_hidden, torch": lambda h, w, t: decide_from_hidden(h, w, t, mask_id, impl="torch").following,
        }
        moved = (vocabulary + 2 * count - masked) * width * 4
        bench.table("sparse decision without Triton", shape, forms, inputs, moved,
                    2 * masked * vocabulary * width, _share_unequal)  # fmt: skip


def benchmark_recurrence(bench: Benchmark) -> None:
    """A turn of the recurrence early and late, and against summing 16 past states anew; under 4 GB at full size."""
    count, vocabulary, width = (64, 50, 32) if bench.smoke else (8192, 32000, 4096)
    device, dtype = bench.device, torch.bfloat16 if bench.cuda else torch.float32
    embedding = torch.randn(vocabulary, width, device=device).to(dtype)
    states = torch.randint(vocabulary, (16, count), device=device)

    def synchronized() -> float:
        if bench.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    a, times = None, []
    for turn in range(104):
        began = synchronized()
        a, _ = history_step(a, states[turn % 16], embedding)
        times.append(synchronized() - began)
    early, late = statistics.median(times[1:8]), statistics.median(times[96:103])  # turns 2 to 8, 97 to 103
    row = {
        "kernel": "history_step by turn", "shape": f"N={count} D={width}", "turn_2_microseconds": early * 1e6,
        "turn_100_microseconds": late * 1e6, "ratio": late / early,
    }  # fmt: skip
    bench.rows.append(row)
    print(f"\nhistory_step by turn: {early * 1e6:,.1f} us at 2, {late * 1e6:,.1f} us at 100, ratio {late / early:.3f}")

    def anew(a, states):
        total = torch.zeros(count, width, device=device)
        for k, state in enumerate(states):
            angle = (k - 15) * 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
            cos, sin = angle.cos(), angle.sin()
            u, v = F.embedding(state, embedding).float().chunk(2, -1)
            total += torch.cat([u * cos - v * sin, u * sin + v * cos], -1) * 0.9 ** (15 - k)
        return F.rms_norm(total, (width,), eps=1e-6).to(dtype)

    a = None
    for state in states[:15]:
        a, _ = history_step(a, state, embedding)
    forms = {
        "embed, rotate and sum 16 states": anew,
        "history_step": lambda a, states: history_step(a, states[-1], embedding)[1],
    }
    bench.table("history at turn 16", f"N={count} D={width} {dtype}", forms, [(a, states)],
                count * width * (8 + 2 * dtype.itemsize), differ=lambda x, y: _relative_error((x,), (y,)))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time every operation of this file against PyTorch.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="cuda, cuda:1, ... or cpu (default, as found: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds; the times mean nothing")
    where = "default results/kernels_<device>.json; none with --smoke"
    parser.add_argument("--json", type=Path, metavar="FILE", help=where)
    parser.add_argument("--only", choices=("decisions", "history", "losses"), help="on a GPU, time this part alone")
    options = parser.parse_args()
    there = options.device == "cpu" or (options.device.split(":")[0] == "cuda" and torch.cuda.is_available())
    if not there:
        print(f"kernels.py: device {options.device!r} is not there", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    cuda, name = options.device != "cpu", "cpu"
    if cuda:
        torch.cuda.set_device(options.device)
        name = torch.cuda.get_device_name().replace(" ", "-").lower()
    print(which_path(options.device))
    bench = Benchmark(options.device, options.smoke)
    parts = {"decisions": benchmark_decisions, "history": benchmark_history, "losses": benchmark_losses}
    if cuda or options.smoke:
        for shape, (count, vocabulary, width) in (SMALL if options.smoke else SHAPES).items():
            dtype = torch.bfloat16 if cuda else torch.float32
            for part, run in parts.items():
                if options.only in (None, part):
                    run(bench, shape, count, vocabulary, width, dtype)
    if not cuda:
        print("\nno GPU here: the kernels are not timed, only what PyTorch does on CPU")
        benchmark_sparse_on_cpu(bench)
    benchmark_recurrence(bench)
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
