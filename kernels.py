"""Triton kernels for Reflective Masking: what a GPU runs in place of the PyTorch definitions.

    1. decide_from_logits          Eq. 1 where logits exist; a row is read at masked positions only
    2. decide_from_hidden          Eq. 1 from hidden states; logits [N, V] are never formed
    3. history_step, history_sum   Eq. 2 as the O(1) recurrence, and as the closed sum with gradient
    4. revision_cross_entropy      the three losses with gradient, from logits or hidden states

This file imports nothing of the project, and is imported without triton, too.  TRITON_INTERPRET=1,
set before the import, runs the kernels on CPU tensors.  Inputs are float32, bfloat16 or float16 and
never written; arithmetic is float32.  Wrong shapes, dtypes and devices are a ValueError that names
the argument, before any launch.  Ids out of range are one too on CPU; on a GPU that check would
wait for the device, so there such an id reads nothing: its position is kept, adds no history, or
has loss NaN.
"""

import contextlib
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on CPU tensors, slowly
except ImportError:
    triton, tl, INTERPRETED = None, types.SimpleNamespace(constexpr=lambda value: value), False
    jit = lambda kernel=None, **_: kernel or jit

STATE = torch.float32, torch.int32, torch.float32  # of a scan: see section 1
NO_TOKEN = tl.constexpr(2**31 - 1)  # "none yet"; greater than any id, so that min() prefers ids
IGNORE = -1  # roles, as the oracle action gives them: 0 reveal, 1 re-mask, 2 keep, -1 no loss


# ------------------------------------------------------------------------------------------------
# 0. Which path runs, and what is checked (the PyTorch definitions use these too)


def use_triton(impl: str | None, x: Tensor) -> bool:
    """Whether an operation on x runs here; with impl None: if x is on CUDA and not float64."""
    require(impl in (None, "torch", "triton"), f"impl must be 'torch' or 'triton', got {impl!r}")
    possible = triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    needs = "triton, CUDA tensors (or TRITON_INTERPRET=1) and float32, bfloat16 or float16"
    fits = possible or impl != "triton"
    require(fits, f"impl 'triton' needs {needs}, got {x.dtype} on {x.device}")
    return possible and (impl == "triton" or (impl is None and x.is_cuda))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_floating(name: str, x: Tensor) -> None:
    fits = x.is_floating_point() and x.dtype.itemsize >= 2 and x.ndim >= 1
    require(fits, f"{name} must be floating point of an axis or more, got {x.dtype} {[*x.shape]}")


def check_tensor(name: str, x: Tensor, shape: tuple, dtype: torch.dtype, device: torch.device):
    fits = [*x.shape] == [*shape] and (x.dtype, x.device) == (dtype, device)
    got = f"{[*x.shape]}, {x.dtype} on {x.device}"
    require(fits, f"{name} must be {[*shape]}, {dtype} on {device}, got {got}")


def check_ids(
    name: str, ids: Tensor, shape: torch.Size | None, device: torch.device, low: int, size: int,
    where: Tensor | None = None,
) -> None:  # fmt: skip
    """int32 or int64, of a shape, on a device; on CPU also low <= ids < size (only at where)."""
    is_integer = ids.dtype in (torch.int32, torch.int64)
    require(is_integer, f"{name} must be int32 or int64, got {ids.dtype}")
    check_tensor(name, ids, ids.shape if shape is None else shape, ids.dtype, device)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        ids = ids if where is None else ids[where]
        if ids.numel():
            least, most = (int(x) for x in ids.aminmax())
            inside = low <= least and most < size
            require(inside, f"{name} must hold ids in [{low}, {size}), got {least} to {most}")


def check_logits(x: Tensor, head: Tensor | None, bias: Tensor | None) -> int:
    """V.  x: logits [..., V]; or, with the output weight head [V, D], hidden states [..., D]."""
    check_floating("logits" if head is None else "hidden", x)
    require(head is not None or bias is None, "bias needs head")
    if head is None:
        return x.shape[-1]
    check_tensor("head", head, head.shape[:1] + x.shape[-1:], x.dtype, x.device)
    if bias is not None:
        check_tensor("bias", bias, head.shape[:1], x.dtype, x.device)
    return len(head)


def check_loss(
    x: Tensor, target: Tensor, role: Tensor, weights: tuple, head: Tensor | None,
    bias: Tensor | None,
) -> None:  # fmt: skip
    """The arguments of the losses."""
    vocabulary = check_logits(x, head, bias)
    require(len(weights) == 3, f"weights must be three numbers, got {weights}")
    check_ids("role", role, x.shape[:-1], x.device, IGNORE, 3)
    check_ids("target", target, role.shape, x.device, 0, vocabulary, where=role != IGNORE)


def check_decision(
    x: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None,
    head: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """The arguments of Eq. 1.  Returns editable in tokens' shape."""
    vocabulary = check_logits(x, head, bias)
    require(vocabulary >= 2, f"logits need a vocabulary of a token and MASK, got {vocabulary}")
    require(0 <= mask_id < vocabulary, f"mask_id must lie in [0, {vocabulary}), got {mask_id}")
    check_ids("tokens", tokens, x.shape[:-1], x.device, 0, vocabulary)
    if editable is None:
        return None
    sizes = zip(editable.shape[::-1], tokens.shape[::-1])
    if editable.ndim <= tokens.ndim and all(size in (1, full) for size, full in sizes):
        editable = editable.expand_as(tokens)
    check_tensor("editable", editable, tokens.shape, torch.bool, x.device)
    return editable.contiguous()


def check_history(embedding: Tensor, gamma: float, rotate: bool) -> None:
    """An embedding weight [V, D], gamma in [0, 1], an even D where rotate is on."""
    check_floating("embedding", embedding)
    shape = [*embedding.shape]
    require(len(shape) == 2 and min(shape) > 0, f"embedding must be a weight [V, D], got {shape}")
    require(0 <= gamma <= 1, f"gamma must lie in [0, 1], got {gamma}")
    require(not rotate or shape[1] % 2 == 0, f"embedding must have an even D, got {shape}")


def _launch(kernel: Callable, grid: tuple[int, ...], x: Tensor, *rest, **meta) -> None:
    """Runs kernel(x, *rest) on x's device; what an argument None makes needless is not compiled."""
    if 0 not in grid:
        on_device = x.is_cuda and not torch.compiler.is_compiling()
        with torch.cuda.device(x.device) if on_device else contextlib.nullcontext():
            kernel[grid](x, *rest, **meta)


def _empty(shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> list[Tensor]:
    # One allocation each: a part of one may start off 16 bytes, and each case would compile anew.
    return [torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes]


def _tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that walks rows of a width; narrow rows share a program."""
    # Wide rows: 4,096 columns over 8 warps are two 16-byte loads of bf16 a thread.
    columns = max(16, min(triton.next_power_of_2(width), 4096))
    return max(1, min(64, 2048 // columns)), columns, 8 if columns >= 2048 else 4


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """[..., V] as rows [count, V], the stride from row to row, and GROUP.

    GROUP: the columns of a 16-byte load where Triton makes such loads, else 1.  Copies only where
    no view has one stride from row to row and columns side by side.
    """
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    stride = x.stride(0) if len(x) > 1 else x.shape[1]  # of a single row it may be anything
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()  # cannot be traced
    aligned = all(n % 16 == 0 for n in (stride, x.shape[1], offset))
    return x, stride, 16 // x.dtype.itemsize if aligned else 1


# ------------------------------------------------------------------------------------------------
# 1. decide_from_logits
#
# Computes, for every position (Eq. 1):
#     x != M:  re-mask if logit[M] > logit[x]       (one softmax: p compares alike)
#     x  = M:  best = argmax over V without M, and its log-probability there
#
# Costs: a visible position two logits, in two sectors of 32 bytes, a masked one its row.  Floor =
# bytes / bandwidth: 25 % of [8192, 126464] in bf16 is 519 MB, 173 us at 3.0 TB/s.
#
# The state of a scan is (top, best, rest): the largest logit, its id, and the sum of exp(logit -
# top) over the OTHER tokens; two states merge into one.  -log1p(rest) is the log-probability of
# best, exact where a float32 probability would be 1 (gaps beyond 17 nats) and ranks would tie.


@jit
def _halves(x):  # [..., 2] -> the larger (NaN if either is) and the smaller of each pair
    a, b = tl.split(x)
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), tl.minimum(a, b)


@jit
def _exp(x):  # tl.exp has three guard instructions more
    return tl.exp2(x * 1.4426950408889634)  # log2(e)


@jit
def _scan(
    line, wanted, start, end, vocabulary, mask_id,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The states of columns [start, end) of the rows at the pointers line [ROWS]; rows that are not
    # wanted load nothing.  Each group of GROUP columns, which one thread loads at once, has a state
    # of its own, with the place of the group for an id: no reduction across threads in the loop.
    # Within a group a tournament finds the largest, and each loser of a pair is exponentiated once.
    # A load is 16 bytes only if its mask is constant over them: MASK is replaced after it.
    ROWS: tl.constexpr = line.shape[0]
    GROUPS: tl.constexpr = COLUMNS // GROUP
    top = tl.full([ROWS, GROUPS], -float("inf"), tl.float32)
    place = tl.full([ROWS, GROUPS], NO_TOKEN, tl.int32)
    rest = tl.zeros([ROWS, GROUPS], tl.float32)
    first = (tl.arange(0, GROUPS) * GROUP)[None, :]
    for begin in range(start, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        use = wanted[:, None] & (column < vocabulary)
        if mask_id is not None and GROUP == 1:
            use &= column != mask_id
        x = tl.load(line[:, None] + column, mask=use, other=-float("inf")).to(tl.float32)
        if mask_id is not None and GROUP > 1 and (begin <= mask_id) & (mask_id < begin + COLUMNS):
            x = tl.where(column == mask_id, -float("inf"), x)

        largest = x
        if GROUP == 8:
            largest, lost_1 = _halves(largest.reshape([ROWS, GROUPS, 4, 2]))
        if GROUP >= 4:
            largest, lost_2 = _halves(largest.reshape([ROWS, GROUPS, 2, 2]))
            largest, lost_3 = _halves(largest)

        wins = (largest > top) | ((largest != largest) & (top == top))  # the first NaN wins
        lost = tl.where(wins, top, largest)
        top = tl.where(wins, largest, top)
        place = tl.where(wins, begin + first, place)
        anchor = tl.where(top == -float("inf"), 0.0, top)  # exp(-inf - 0) is 0, not NaN
        scale = _exp(lost - anchor)
        rest = tl.where(wins, rest * scale, rest) + scale
        if GROUP >= 4:
            rest += _exp(lost_3 - anchor)
            rest += tl.sum(_exp(lost_2 - anchor[:, :, None]), 2)
        if GROUP == 8:
            rest += tl.sum(_exp(lost_1 - anchor[:, :, None]), 2)
    return _collapse(top, place, rest)


@jit
def _collapse(top, best, rest):  # states [R, C] with different bests, in any order, into one a row
    nan = tl.min(tl.where(top != top, best, NO_TOKEN), 1)  # the first NaN wins
    high = tl.max(tl.where(top == top, top, -float("inf")), 1)
    first = tl.min(tl.where(top == high[:, None], best, NO_TOKEN), 1)  # ties: the lowest id
    scale = tl.where(top == -float("inf"), 0.0, tl.exp(top - high[:, None]))
    total = tl.sum(tl.where(best == first[:, None], rest, (rest + 1.0) * scale), 1)
    is_nan = nan < NO_TOKEN
    return tl.where(is_nan, float("nan"), high), tl.where(is_nan, nan, first), total


@jit
def _first_in_group(line, wanted, top, place, vocabulary, mask_id, GROUP: tl.constexpr):
    # The id of the first column of the group at place that holds top, a NaN if top is one.
    column = place[:, None] + tl.arange(0, GROUP)[None, :]
    use = (wanted & (place < NO_TOKEN))[:, None] & (column < vocabulary) & (column != mask_id)
    x = tl.load(line[:, None] + column, mask=use, other=-float("inf")).to(tl.float32)
    holds = (x == top[:, None]) | ((x != x) & (top != top)[:, None])
    return tl.min(tl.where(use & holds, column, NO_TOKEN), 1)


@jit
def _log_p(top, rest):  # -log1p(rest), the log-probability of best
    # Below 0.03 a series (relative error 1e-9): log(1 + rest) would lose what tells ranks apart.
    series = rest * (1.0 - rest * (0.5 - rest * (1.0 / 3.0 - rest * (0.25 - rest * 0.2))))
    log1p = tl.where(rest < 0.03, series, tl.log(1.0 + rest))
    return tl.where(top > -float("inf"), -log1p, float("nan"))  # NaN: a row of -inf, or a NaN


@jit
def _locate(rows, tokens, editable, count, mask_id, ROWS: tl.constexpr):
    # Index in the list of rows, does it exist, position, token; may it change: masked, or visible.
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = index < count
    row = index
    if rows is not None:
        row = tl.load(rows + index, mask=inside, other=0).to(tl.int64)
    token = tl.load(tokens + row, mask=inside, other=0).to(tl.int32)
    masked = inside & (token == mask_id)
    visible = inside & (token != mask_id)
    if editable is not None:
        may_change = tl.load(editable + row, mask=inside, other=0) != 0
        masked &= may_change
        visible &= may_change
    return index, inside, row, token, masked, visible


@jit
def _store_reveal(row, masked, top, best, rest, mask_id, best_out, confidence_out):
    best = tl.where(top == -float("inf"), tl.where(mask_id == 0, 1, 0), best)
    tl.store(best_out + row, best, mask=masked)  # Eq. 1, third line
    tl.store(confidence_out + row, _log_p(top, rest), mask=masked)


@jit(do_not_specialize=["count"])
def _decide_kernel(
    logits, rows, tokens, editable,
    best_out, confidence_out, remask_out, top_out, id_out, rest_out,
    count, stride, vocabulary, share, mask_id,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: (ROWS positions, parts of a row).  With rows, logits are of the positions in rows alone;
    # without remask_out only masked ones are written; with top_out parts leave states to be merged.
    located = _locate(rows, tokens, editable, count, mask_id, ROWS)
    index, inside, row, token, masked, visible = located
    line = logits + index * stride
    part = tl.program_id(1)
    if remask_out is not None and part == 0:
        visible &= (token >= 0) & (token < vocabulary)
        own = tl.load(line + token, mask=visible, other=0.0)
        at_mask = tl.load(line + mask_id, mask=visible, other=0.0)
        remask = visible & (at_mask.to(tl.float32) > own.to(tl.float32))  # Eq. 1, first line
        tl.store(remask_out + row, remask, mask=inside)
        tl.store(best_out + row, token, mask=inside & ~masked)
        tl.store(confidence_out + row, -float("inf"), mask=inside & ~masked)
    if tl.max(masked.to(tl.int32), 0) > 0:
        start = part * share
        end = tl.minimum(vocabulary, start + share)
        top, best, rest = _scan(line, masked, start, end, vocabulary, mask_id, GROUP, COLUMNS)
        if GROUP > 1:
            best = _first_in_group(line, masked, top, best, vocabulary, mask_id, GROUP)
        if top_out is not None:
            slot = index * tl.num_programs(1) + part
            tl.store(top_out + slot, top, mask=masked)
            tl.store(id_out + slot, best, mask=masked)
            tl.store(rest_out + slot, rest, mask=masked)
        else:
            _store_reveal(row, masked, top, best, rest, mask_id, best_out, confidence_out)


@jit(do_not_specialize=["count", "parts"])
def _merge_kernel(
    top_in, best_in, rest_in, rows, tokens, editable,
    best_out, confidence_out,
    count, parts, mask_id, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS rows: merges the states of a row, always in the same order.
    index, _, row, _, masked, _ = _locate(rows, tokens, editable, count, mask_id, ROWS)
    part = tl.arange(0, PARTS)[None, :]
    slot = index[:, None] * parts + part
    use = masked[:, None] & (part < parts)
    top = tl.load(top_in + slot, mask=use, other=-float("inf"))
    best = tl.load(best_in + slot, mask=use, other=NO_TOKEN)
    rest = tl.load(rest_in + slot, mask=use, other=0.0)
    top, best, rest = _collapse(top, best, rest)
    _store_reveal(row, masked, top, best, rest, mask_id, best_out, confidence_out)


def _merge(states, rows, tokens, editable, mask_id, decision) -> None:
    """Writes the reveals of masked positions from states of [count, parts]."""
    count, parts = states[0].shape
    merged = max(16, triton.next_power_of_2(parts))  # one kernel for up to 16 parts of a row
    tile = max(1, 64 // merged)
    _launch(
        _merge_kernel, (triton.cdiv(count, tile),),
        *states, rows, tokens, editable, *decision[:2], count, parts, mask_id,
        ROWS=tile, PARTS=merged, num_warps=1 if merged <= 128 else 4,
    )  # fmt: skip


def _decide_rows(logits, rows, tokens, editable, mask_id, decision) -> None:
    """Eq. 1 into decision, where logits [..., V] are those of all positions or of rows alone."""
    x, stride, group = _rows(logits)
    count, vocabulary = x.shape
    tile, columns, warps = _tile(vocabulary)
    programs = triton.cdiv(count, tile)

    # One program streams about 7 GB/s: a row of V = 126464 takes it 36 us.  Where there are too
    # few rows to fill a GPU, several programs share a row, two tiles or more each.
    parts = max(1, min(4096 // max(1, programs), vocabulary // (2 * columns)))
    share = triton.cdiv(triton.cdiv(vocabulary, parts), columns) * columns
    parts = triton.cdiv(vocabulary, share)
    states = _empty((count, parts), x.device, *STATE) if parts > 1 else (None, None, None)

    _launch(
        _decide_kernel, (programs, parts),
        x, rows, tokens, editable, *decision, *states, count, stride, vocabulary, share, mask_id,
        GROUP=group, ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        _merge(states, rows, tokens, editable, mask_id, decision)


@torch.no_grad()
def decide_from_logits(
    logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 1 at every position, from logits: (best, confidence, remask, following).

    logits: float [..., V], copied if rows are not one stride apart.  tokens: int32 or int64 [...].
    editable: bool, broadcastable; elsewhere the token stays.  Returns, of tokens' shape,
      best        the token; where masked and editable the likeliest but MASK, the lowest id of ties
      confidence  float32: there its log-probability among the tokens but MASK, elsewhere -inf
      remask      bool: visible and editable, and logit[M] > logit[x]
      following   the next tokens
    NaN at x or M never re-masks; where masked the first NaN is the best, as in torch's argmax.  It,
    two or more +inf and a row of -inf, which reveals the lowest id, have confidence NaN.
    """
    editable = check_decision(logits, tokens, mask_id, editable)
    use_triton("triton", logits)
    decision = _empty(tokens.shape, tokens.device, tokens.dtype, torch.float32, torch.bool)
    _decide_rows(logits, None, tokens.contiguous(), editable, mask_id, decision)
    best, confidence, remask = decision
    return best, confidence, remask, best.masked_fill(remask, mask_id)


# ------------------------------------------------------------------------------------------------
# 2. decide_from_hidden
#
# Computes the same decision from hidden states h [N, D], the head W [V, D] and its bias b [V]:
# logit[v] = h . W[v] + b[v].
#
# Costs: a visible position the product h . (W[M] - W[x]), a masked one 2 V D operations.  Floor:
# max(2 masked V D / matrix rate, (V D + N D + visible D) itemsize / bandwidth).  At [8192, 4096]
# with V = 126464 and 25 % masked: 2.12 TFLOP, 2.7 ms at 790 TFLOP/s.  Under some 263 masked rows
# reading W is the floor: 345 us.
#
# Few masked rows: one fused kernel, whose programs share the vocabulary out and leave a state each,
# merged in order.  Many: the library's product, a block of rows at a time, then operation 1; it is
# faster from the second row tile of the fused kernel on, which L2 bounds there.

FUSED_ROWS = 64  # one row tile
DENSE_VOCABULARY = 1024  # so few columns: multiply all rows, and do not wait for a row count
HEAD_COLUMNS = 128  # of a tile of the fused kernel
BLOCK_ROWS = 256  # a block of the product has a multiple of these, its own tile,
WORKSPACE = 2**28  # and at most so many bytes of logits, or BLOCK_ROWS where those are more


@jit(do_not_specialize=["count"])
def _remask_kernel(
    hidden, head, bias, tokens, editable,
    best_out, confidence_out, remask_out,
    count, width, vocabulary, mask_id, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS positions; those that are not visible load nothing.  The
    # difference of two rows of the head: equal rows tie, whatever the rounding.
    _, inside, row, token, _, visible = _locate(None, tokens, editable, count, mask_id, ROWS)
    # Masked positions too: their reveals come later.
    tl.store(best_out + row, token, mask=inside)
    tl.store(confidence_out + row, -float("inf"), mask=inside)
    token = token.to(tl.int64)
    use_row = visible & (token >= 0) & (token < vocabulary)
    mask_row = tl.cast(mask_id, tl.int64)
    apart = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        use = use_row[:, None] & (column < width)
        h = tl.load(hidden + row[:, None] * width + column, mask=use, other=0.0)
        x = tl.load(head + token[:, None] * width + column, mask=use, other=0.0)
        m = tl.load(head + mask_row * width + column, mask=column < width, other=0.0)
        apart += h.to(tl.float32) * (m.to(tl.float32) - x.to(tl.float32))
    gap = tl.sum(apart, 1)
    if bias is not None:
        own = tl.load(bias + token, mask=use_row, other=0.0).to(tl.float32)
        gap += tl.load(bias + mask_row).to(tl.float32) - own
    tl.store(remask_out + row, use_row & (gap > 0.0), mask=inside)  # Eq. 1, first line


@jit(do_not_specialize=["count"])
def _fused_head_kernel(
    hidden, head, bias, rows, tokens, editable,
    top_out, best_out, rest_out,
    count, width, vocabulary, mask_id,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Grid: (row tiles, column tiles); row tiles vary fastest, so those that share columns of the
    # head run together and read them from the cache.  A tile without a masked row does nothing.
    index, _, row, _, wanted, _ = _locate(rows, tokens, editable, count, mask_id, ROWS)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, INNER):
            inner = start + tl.arange(0, INNER)
            use = wanted[:, None] & (inner[None, :] < width)
            h = tl.load(hidden + row[:, None] * width + inner[None, :], mask=use, other=0.0)
            use = (column[None, :] < vocabulary) & (inner[:, None] < width)
            pointer = head + column.to(tl.int64)[None, :] * width + inner[:, None]
            w = tl.load(pointer, mask=use, other=0.0)
            if UPCAST:  # the interpreter multiplies bf16 as bit patterns
                h, w = h.to(tl.float32), w.to(tl.float32)
            logits = tl.dot(h, w, logits, input_precision="ieee")  # decisions hang on float32
        if bias is not None:
            b = tl.load(bias + column, mask=column < vocabulary, other=0.0)
            logits += b.to(tl.float32)[None, :]
        ids = column[None, :] + tl.zeros([ROWS, COLUMNS], tl.int32)
        logits = tl.where((ids < vocabulary) & (ids != mask_id), logits, -float("inf"))
        top, best, rest = _collapse(logits, ids, tl.zeros([ROWS, COLUMNS], tl.float32))
        slot = index * tl.num_programs(1) + tl.program_id(1)
        tl.store(top_out + slot, top, mask=wanted)
        tl.store(best_out + slot, best, mask=wanted)
        tl.store(rest_out + slot, rest, mask=wanted)


def _reveal_fused(hidden, head, bias, rows, tokens, editable, mask_id, decision) -> None:
    """Writes the reveals of those of the rows that are masked."""
    (vocabulary, width), count = head.shape, len(rows)
    # tl.dot wants 16 rows at least; more than 32 of float32 spill on sm_90, are tf32 on sm_100.
    short = hidden.dtype.itemsize == 2
    tile = min(max(16, triton.next_power_of_2(count)), 64 if short else 32)
    columns = max(16, min(HEAD_COLUMNS, triton.next_power_of_2(vocabulary)))
    parts = triton.cdiv(vocabulary, columns)  # V = 126464: 988 programs for 132 multiprocessors
    states = _empty((count, parts), head.device, *STATE)
    _launch(
        _fused_head_kernel, (triton.cdiv(count, tile), parts),
        hidden, head, bias, rows, tokens, editable, *states, count, width, vocabulary, mask_id,
        UPCAST=INTERPRETED, ROWS=tile, COLUMNS=columns, INNER=64 if short else 32,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge(states, rows, tokens, editable, mask_id, decision)


@torch.no_grad()
def decide_from_hidden(
    hidden: Tensor, head: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None = None,
    bias: Tensor | None = None, max_masked: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Eq. 1 from hidden states; logits = hidden @ head.T + bias exist at masked positions only.

    hidden: float [..., D].  head: the output weight [V, D], bias: [V]; same dtype and device.
    The rest, NaN and ties too: as in decide_from_logits.  Workspace: max(256 MiB, 256 rows).
    max_masked: a promise that no more than so many positions are masked and editable; further ones
    stay masked.  Without it and for V > 1,024 the row count is asked of the device once: a CUDA
    graph and torch.compile(fullgraph=True) then refuse.
    """
    editable = check_decision(hidden, tokens, mask_id, editable, head, bias)
    use_triton("triton", hidden)
    count, (vocabulary, width) = tokens.numel(), head.shape
    hidden = hidden.reshape(count, width).contiguous()
    head, tokens = head.contiguous(), tokens.contiguous()
    bias = None if bias is None else bias.contiguous()

    decision = _empty(tokens.shape, tokens.device, tokens.dtype, torch.float32, torch.bool)
    best, confidence, remask = decision
    tile, columns, warps = _tile(width)
    _launch(
        _remask_kernel, (triton.cdiv(count, tile),),
        hidden, head, bias, tokens, editable, *decision, count, width, vocabulary, mask_id,
        ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip

    reveals = best, confidence, None  # what the visible positions do is written
    size = WORKSPACE // (vocabulary * hidden.dtype.itemsize)
    size = max(BLOCK_ROWS, size // BLOCK_ROWS * BLOCK_ROWS)
    with torch.autocast(hidden.device.type, enabled=False):
        if vocabulary <= DENSE_VOCABULARY and count <= size:
            _decide_rows(F.linear(hidden, head, bias), None, tokens, editable, mask_id, reveals)
        else:
            masked = tokens == mask_id if editable is None else editable & (tokens == mask_id)
            if max_masked is None:
                rows = masked.flatten().nonzero().squeeze(1)  # waits for the device
            else:  # the masked rows first: a size known without asking the device
                rows = (~masked).flatten().to(torch.uint8).argsort(stable=True)[:max_masked]
            few = len(rows) <= FUSED_ROWS and width % 16 == 0  # odd widths: narrow loads, spills
            if few:
                _reveal_fused(hidden, head, bias, rows, tokens, editable, mask_id, reveals)
            for block in () if few else rows.split(size):
                logits = F.linear(hidden[block], head, bias)  # rounded as a model's own logits
                _decide_rows(logits, block, tokens, editable, mask_id, reveals)
    return best, confidence, remask, best.masked_fill(remask, mask_id)


# ------------------------------------------------------------------------------------------------
# 3. history_step and history_sum
#
# Computes Eq. 2.  The step:  a(t) = wte(x(t)) + gamma R_(-1) a(t-1), and the RMSNorm of a(t) that
# the model reads.  The closed sum:  a(t) = sum_{k=0..t} gamma^(t-k) R_(k-t) wte(x(k)), by the same
# recurrence kept in registers.  Its gradient:  d wte(x(k)) += gamma^(t-k) R_(t-k) da.
# R_delta turns the pair (j, j + D/2) by delta * 10000^(-2j/D).
#
# Costs: the step reads a(t-1) and one embedding row a position, and writes a(t) and its norm: 4 N D
# values.  Floor at N = 8192, D = 4096, bf16 with a in float32: 134 us.  The sum reads t + 1
# embedding rows and writes one; its gradient scatters t + 1.  Arithmetic is negligible.


@jit
def _load_halves(line, column, half, width, use):  # the pairs (j, j + D/2) of the rows at line
    u = tl.load(line + column, mask=use[:, None] & (column < half), other=0.0)
    v = tl.load(line + half + column, mask=use[:, None] & (column + half < width), other=0.0)
    return u.to(tl.float32), v.to(tl.float32)


@jit
def _store_halves(line, column, half, width, use, u, v):
    tl.store(line + column, u, mask=use[:, None] & (column < half))
    tl.store(line + half + column, v, mask=use[:, None] & (column + half < width))


@jit(do_not_specialize=["count"])
def _history_kernel(
    states, embedding,
    past, gradient, sum_out, out,
    count, turns, width, half, vocabulary, gamma,
    ROTATE: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS whole rows, for the norm.  One kernel is the step (one state, and
    # past is a(t-1)), the sum, and its gradient: the sum again, since gathering is cheaper than
    # keeping, then da through the norm, then its terms added to the gradient of the embedding.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    column = tl.arange(0, HALF)[None, :]
    offset = row[:, None] * width
    if ROTATE:
        angle = tl.exp2(column * (-26.575424759098897 / width))  # 10000^(-2j/D), so at most 1:
        x = angle * angle  # Taylor's series to 1e-9, where tl.cos, made for any angle, spills
        c = 1 - x * (1 / 2 - x * (1 / 24 - x * (1 / 720 - x * (1 / 40320 - x * (1 / 3628800)))))
        s = 1 - x * (1 / 6 - x * (1 / 120 - x * (1 / 5040 - x * (1 / 362880 - x * (1 / 39916800)))))
        s = angle * s
    u = tl.zeros([ROWS, HALF], tl.float32)
    v = tl.zeros([ROWS, HALF], tl.float32)
    if past is not None:
        u, v = _load_halves(past + offset, column, half, width, inside)
    state = states + row
    for _ in range(0, turns):  # oldest first
        token = tl.load(state, mask=inside, other=-1).to(tl.int64)
        state += count
        use = (token >= 0) & (token < vocabulary)  # else it adds nothing
        p, q = _load_halves(embedding + token[:, None] * width, column, half, width, use)
        if ROTATE:
            u, v = u * c + v * s, v * c - u * s  # R_(-1)
        u, v = p + gamma * u, q + gamma * v  # Eq. 2
    if sum_out is not None:
        _store_halves(sum_out + offset, column, half, width, inside, u, v)
    scale = tl.rsqrt((tl.sum(u * u, 1) + tl.sum(v * v, 1)) / width + 1e-6)[:, None]
    if NORMALIZE:
        u, v = u * scale, v * scale
    if gradient is None:
        _store_halves(out + offset, column, half, width, inside, u, v)
    else:
        p, q = _load_halves(gradient + offset, column, half, width, inside)
        if NORMALIZE:  # y = a r: da = r (g - y mean(g y))
            mean = ((tl.sum(p * u, 1) + tl.sum(q * v, 1)) / width)[:, None]
            p, q = scale * (p - u * mean), scale * (q - v * mean)
        for _ in range(0, turns):  # latest first
            state -= count
            token = tl.load(state, mask=inside, other=-1).to(tl.int64)
            use = ((token >= 0) & (token < vocabulary))[:, None]
            line = out + token[:, None] * width + column
            tl.atomic_add(line, p, mask=use & (column < half), sem="relaxed")
            tl.atomic_add(line + half, q, mask=use & (column + half < width), sem="relaxed")
            if ROTATE:
                p, q = p * c - q * s, q * c + p * s  # R_1, the transpose of R_(-1)
            p, q = gamma * p, gamma * q


def _run_history(states, embedding, gamma, rotate, normalize, past=None, total=None, gradient=None):
    """What is read of a(t), which goes to total; or, given its gradient, the embedding's."""
    count, (vocabulary, width) = states[0].numel(), embedding.shape
    if gradient is None:
        out = embedding.new_empty(*states.shape[1:], width)
    else:  # atomic additions, whose order, so the last bit, may vary
        out = embedding.new_zeros(vocabulary, width, dtype=torch.float32)
    half = triton.next_power_of_2(max(1, (width + 1) // 2))
    rows = max(1, min(32, 1024 // half))  # a whole row a program at D = 4096, 16 rows at D = 128
    _launch(
        _history_kernel, (triton.cdiv(count, rows),),
        states.contiguous(), embedding.contiguous(), past, gradient, total, out,
        count, len(states), width, (width + 1) // 2, vocabulary, float(gamma),
        ROTATE=rotate, NORMALIZE=normalize, ROWS=rows, HALF=half,
        num_warps=8 if half >= 1024 else 4,
    )  # fmt: skip
    return out


class _HistorySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, embedding, *settings):
        ctx.save_for_backward(states, embedding)
        ctx.settings = settings  # gamma, rotate, normalize
        return _run_history(states, embedding, *settings)

    @staticmethod
    def backward(ctx, gradient):
        states, embedding = ctx.saved_tensors
        table = _run_history(states, embedding, *ctx.settings, gradient=gradient.contiguous())
        return None, table.to(embedding.dtype), None, None, None


@torch.no_grad()
def history_step(
    a: Tensor | None, tokens: Tensor, embedding: Tensor, gamma: float = 0.9, rotate: bool = True,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. 2, one turn: (a(t), what the model reads), a(t) = wte(x(t)) + gamma R_(-1) a(t-1).

    a: a(t-1), float32 [..., D], or None at first.  tokens: int32 or int64 [...].  embedding: float
    [V, D].  gamma in [0, 1]; rotate: R, for even D; normalize: the RMSNorm (eps 1e-6) of what is
    read.  Returns a(t) in float32, the other in the embedding's dtype, new, without gradient.
    """
    check_history(embedding, gamma, rotate)
    check_ids("tokens", tokens, None, embedding.device, 0, len(embedding))
    use_triton("triton", embedding)
    new = embedding.new_empty(*tokens.shape, embedding.shape[1], dtype=torch.float32)
    if a is not None:
        check_tensor("a", a, new.shape, torch.float32, embedding.device)
        a = a.contiguous() if gamma else None
    return new, _run_history(tokens.unsqueeze(0), embedding, gamma, rotate, normalize, a, new)


def history_sum(
    states: Tensor, embedding: Tensor, gamma: float = 0.9, rotate: bool = True,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Eq. 2 as the closed sum over states x(0), ..., x(t), with its gradient to the embedding.

    states: int32 or int64 [t+1, ...], oldest first; -1, no state yet, adds nothing.  The rest: as
    in history_step.  Returns [..., D] in the embedding's dtype.  NaN propagates.
    """
    check_history(embedding, gamma, rotate)
    require(states.ndim and len(states), f"states must be [t+1, ...], got {[*states.shape]}")
    check_ids("states", states, None, embedding.device, -1, len(embedding))
    use_triton("triton", embedding)
    return _HistorySum.apply(states if gamma else states[-1:], embedding, gamma, rotate, normalize)


# ------------------------------------------------------------------------------------------------
# 4. revision_cross_entropy
#
# Computes the cross-entropy to the oracle action, split by role: part[k] = sum over role k of
# -log p(target), over the number of positions with any role; total = weights . part.  Gradient to
# the logits: w[role] (p - onehot) / number.
#
# Costs: from logits, one read forward, one read and one write backward.  Floor at [8192, 126464]
# bf16: 2.07 GB each, 2.1 ms.  From hidden states three matrix products, 6 N V D operations: 32 ms
# there.  The logits of a chunk of rows become their own gradient in place and feed the other two.

CHUNK_ROWS = 2048  # enough for full matrix products; 2,048 rows of V = 126464 in bf16: 518 MB
CHUNK_BYTES = 2**26  # more rows while their logits are under 64 MiB: a small V is one chunk


@jit(do_not_specialize=["count"])
def _nll_kernel(
    logits, target, role, loss_out, lse_out,
    count, stride, vocabulary,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Grid: one program per ROWS rows; rows to ignore load nothing.  The scan of Eq. 1, no MASK.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    counted = tl.load(role + row, mask=inside, other=-1) >= 0
    line = logits + row * stride
    top, _, rest = _scan(line, counted, 0, vocabulary, vocabulary, None, GROUP, COLUMNS)
    lse = tl.where(top == float("inf"), float("nan"), top - _log_p(top, rest))  # inf - inf: NaN
    goal = tl.load(target + row, mask=inside, other=0).to(tl.int64)
    fits = counted & (goal >= 0) & (goal < vocabulary)
    at_goal = tl.load(line + goal, mask=fits, other=float("nan")).to(tl.float32)
    tl.store(loss_out + row, tl.where(counted, lse - at_goal, 0.0), mask=inside)
    tl.store(lse_out + row, lse, mask=inside)


@jit
def _of_role(kind, reveal, remask, keep):
    return tl.where(kind == 0, reveal, tl.where(kind == 1, remask, keep))


@jit(do_not_specialize=["count"])
def _parts_kernel(loss, role, total_out, parts_out, count, reveal, remask, keep):
    # One program, so the order of additions is always the same; 12 bytes a position.
    BLOCK: tl.constexpr = 2048
    kinds = tl.arange(0, 4)
    sums = tl.zeros([4, BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        position = start + tl.arange(0, BLOCK)
        kind = tl.load(role + position, mask=position < count, other=-1)
        x = tl.load(loss + position, mask=(position < count) & (kind >= 0), other=0.0)
        sums += tl.where(kind[None, :] == kinds[:, None], x[None, :], 0.0)
        number += (kind >= 0).to(tl.int32)
    counted = tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
    parts = tl.sum(sums, 1) / counted
    weighted = tl.where(kinds < 3, parts * _of_role(kinds, reveal, remask, keep), 0.0)
    tl.store(total_out, tl.sum(weighted, 0))
    tl.store(parts_out + kinds, tl.where(kinds < 3, parts, counted))


@jit(do_not_specialize=["count"])
def _nll_gradient_kernel(
    logits, target, role, lse, upstream, parts, out,
    count, stride, vocabulary, reveal, remask, keep,
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
    weight = _of_role(kind, reveal, remask, keep)
    if upstream is not None:
        weight *= tl.load(upstream).to(tl.float32) / tl.load(parts + 3)
    use = counted[:, None] & (column < vocabulary)
    x = tl.load(logits + row[:, None] * stride + column, mask=use, other=0.0).to(tl.float32)
    slope = _exp(x - shift[:, None]) - tl.where(column == goal[:, None], 1.0, 0.0)  # p - onehot
    slope = tl.where(counted[:, None], weight[:, None] * slope, 0.0)
    pointer = out + row[:, None] * vocabulary + column
    tl.store(pointer, slope, mask=inside[:, None] & (column < vocabulary))


def _nll(logits, target, role) -> tuple[Tensor, Tensor]:
    """(-log p(target), 0 where the role is IGNORE; log sum exp of every row)."""
    x, stride, group = _rows(logits)
    tile, columns, warps = _tile(x.shape[1])
    loss, lse = _empty(role.shape, x.device, torch.float32, torch.float32)
    _launch(
        _nll_kernel, (triton.cdiv(len(x), tile),),
        x, target, role, loss, lse, len(x), stride, x.shape[1],
        GROUP=group, ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return loss, lse


def _nll_gradient(logits, target, role, lse, weights, out, upstream=None, parts=None) -> None:
    """Writes weights[role] (p - onehot) to out, times upstream / number where those are given."""
    x, stride, _ = _rows(logits)
    count, vocabulary = x.shape
    tile, columns, warps = _tile(vocabulary)
    _launch(
        _nll_gradient_kernel, (triton.cdiv(count, tile), triton.cdiv(vocabulary, columns)),
        x, target, role, lse, upstream, parts, out, count, stride, vocabulary, *weights,
        ROWS=tile, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip


def _through_head(hidden, head, bias, target, role, weights, needs) -> tuple[Tensor, list]:
    """-log p(target) of every row of hidden [N, D], and the gradients, not yet over the number."""
    pairs = zip((hidden, head, bias), needs)
    grads = [x.new_zeros(x.shape) if need else None for x, need in pairs]
    loss = hidden.new_zeros(role.shape, dtype=torch.float32)
    chunk = max(CHUNK_ROWS, CHUNK_BYTES // (len(head) * hidden.dtype.itemsize))
    for rows in (role != IGNORE).nonzero().squeeze(1).split(chunk):  # waits for the device
        x = hidden[rows]
        logits = F.linear(x, head, bias)
        goal, kind = target[rows], role[rows]
        loss[rows], lse = _nll(logits, goal, kind)
        if any(needs):
            # logits becomes w[role] (p - onehot).  1/number comes last: fp16 would lose it.
            _nll_gradient(logits, goal, kind, lse, weights, out=logits)
        if needs[0]:
            grads[0][rows] = logits @ head
        if needs[1]:
            grads[1].addmm_(logits.T, x)  # one rounding to the head's dtype a chunk
        if needs[2]:
            grads[2] += logits.sum(0, dtype=torch.float32)
        del logits  # before the next chunk's
    return loss, grads


class _CrossEntropy(torch.autograd.Function):  # from logits, or from hidden states with a head
    @staticmethod
    def forward(ctx, inputs, head, bias, target, role, *weights):
        if head is None:
            loss, lse = _nll(inputs, target, role)
            kept = inputs, target, role, lse
        else:
            needs = ctx.needs_input_grad[:3]
            with torch.autocast(inputs.device.type, enabled=False):
                loss, kept = _through_head(inputs, head, bias, target, role, weights, needs)
        total, parts = loss.new_empty(()), loss.new_empty(4)
        _launch(_parts_kernel, (1,), loss, role, total, parts, role.numel(), *weights, num_warps=8)
        ctx.save_for_backward(*kept, parts)
        ctx.weights, ctx.has_head = weights, head is not None
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx, upstream, _):
        *kept, parts = ctx.saved_tensors
        if ctx.has_head:
            factor = upstream / parts[3]
            gradients = [None if x is None else x * factor for x in kept]
        else:
            gradients = kept[0].new_empty(kept[0].shape), None, None
            _nll_gradient(*kept, ctx.weights, gradients[0], upstream, parts)
        return *gradients, None, None, None, None, None


def revision_cross_entropy(
    inputs: Tensor, target: Tensor, role: Tensor, weights: tuple[float, float, float] = (1, 1, 1),
    head: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Cross-entropy to the oracle action by role: (total, reveal, remask, keep), scalars in nats.

    inputs: logits float [..., V], copied if rows are not one stride apart; or, with head, the
    output weight [V, D], and bias [V] or None, hidden states float [..., D].  target, role: int32
    or int64 [...]; role 0 reveal, 1 re-mask, 2 keep, -1 no loss.  A part is the sum over its role's
    positions divided by the number of positions with any role, 0 where there are none; total, their
    sum by the weights, alone has a gradient.  NaN, +inf and rows of -inf in a counted row propagate
    as in F.cross_entropy; ignored rows are not read.  With head, logits exist for max(2,048 rows,
    64 MiB) at a time, gradients are computed on the way forward, and the number of counted rows is
    asked of the device once: a CUDA graph and torch.compile(fullgraph=True) then refuse.
    """
    check_loss(inputs, target, role, weights, head, bias)
    use_triton("triton", inputs)
    target, role = (x.reshape(-1).contiguous() for x in (target, role))
    rows = inputs if head is None else inputs.reshape(-1, inputs.shape[-1])
    total, parts = _CrossEntropy.apply(rows, head, bias, target, role, *map(float, weights))
    return total, *parts[:3].unbind()
