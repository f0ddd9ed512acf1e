"""kernels.py against float64 loops in Python and closed forms.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, see conftest.py) on small
shapes; it shows wrong arithmetic and indexing, but no race, missing barrier or slow code.  With
one, the same tests run the compiled kernels.  test_kernels_compile.py compiles them for real GPUs.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import decide_from_hidden, decide_from_logits, history_step, history_sum
from kernels import revision_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HAS_TRITON = kernels.triton is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
pytestmark = [pytest.mark.filterwarnings("ignore:.*(encountered in|deterministic).*"), needs_triton]
NAN, INF = math.nan, math.inf
REVEAL, REMASK, KEEP, IGNORE = 0, 1, 2, -1
PATTERNS = "masked", "visible", "one", "mixed"

if HAS_TRITON and not GPU and not kernels.INTERPRETED:
    raise RuntimeError("triton was imported before conftest.py set TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def poison():
    """torch.empty is filled with NaN, the largest integer, or True: a skipped output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_poison_works():
    assert torch.empty(8, device=DEVICE).isnan().all()
    assert (torch.empty(8, dtype=torch.int64) > 2**40).all()


def unchanged(function, *args, **keywords):
    """Calls function and checks that no tensor given to it was written."""
    tensors = [x for x in (*args, *keywords.values()) if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in tensors]
    result = function(*args, **keywords)
    for x, old in zip(tensors, before):
        assert torch.equal(x.detach().nan_to_num(12345.0), old.nan_to_num(12345.0))
    return result


def away(*tensors):
    return [x.to(DEVICE) for x in tensors]


def relative(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


# ------------------------------------------------------------------------------------------------
# Eq. 1


def decide_oracle(logits, tokens, mask_id, editable=None):
    """Eq. 1 by a loop over float64: (best, confidence, remask, following) of every position."""
    out = []
    rows = logits.double().cpu().reshape(-1, logits.shape[-1]).tolist()
    editable = torch.tensor(True) if editable is None else editable
    free = editable.expand(tokens.shape).reshape(-1).tolist()
    for row, token, may in zip(rows, tokens.reshape(-1).tolist(), free):
        if may and token == mask_id:
            ids = [v for v in range(len(row)) if v != mask_id]
            best = max(ids, key=lambda v: (row[v], -v))
            others = math.fsum(math.exp(row[v] - row[best]) for v in ids if v != best)
            out.append((best, -math.log1p(others), False, best))
        elif may and row[mask_id] > row[token]:
            out.append((token, -INF, True, mask_id))
        else:
            out.append((token, -INF, False, token))
    return out


def assert_decision(decision, oracle, tokens, rtol=5e-6):
    dtypes = tokens.dtype, torch.float32, torch.bool, tokens.dtype
    for x, dtype in zip(decision, dtypes, strict=True):
        assert x.shape == tokens.shape and x.dtype == dtype and x.device == tokens.device
    best, confidence, remask, following = (x.reshape(-1).tolist() for x in decision)
    assert best == [o[0] for o in oracle]
    assert remask == [o[2] for o in oracle]
    assert following == [o[3] for o in oracle]
    expected = torch.tensor([o[1] for o in oracle], dtype=torch.float64)
    confidence = torch.tensor(confidence, dtype=torch.float64)
    torch.testing.assert_close(confidence, expected, rtol=rtol, atol=1e-30)


def some_tokens(pattern, count, vocabulary, mask_id):
    tokens = (mask_id + 1 + torch.randint(vocabulary - 1, (count,))) % vocabulary  # any but MASK
    masked = {
        "masked": torch.ones(count, dtype=torch.bool),
        "visible": torch.zeros(count, dtype=torch.bool),
        "one": torch.arange(count) == count // 2,
        "mixed": torch.rand(count) < 0.5,
    }[pattern]
    return tokens.masked_fill(masked, mask_id)


# 8,192 and 304: loads of 16 bytes; the others: single elements.  8,192 and more: shared rows.
@pytest.mark.parametrize("vocabulary", [2, 10, 127, 304, 8192, 8193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decide_from_logits(vocabulary, dtype):
    for mask_id in (0, vocabulary // 2, vocabulary - 1):
        for pattern in PATTERNS if vocabulary < 8192 else ("mixed",):
            for count in (1, 7) if vocabulary < 8192 else (3,):
                tokens = some_tokens(pattern, count, vocabulary, mask_id).to(DEVICE)
                logits = (torch.randn(count, vocabulary) * 4).to(dtype).to(DEVICE)
                decision = unchanged(decide_from_logits, logits, tokens, mask_id)
                assert_decision(decision, decide_oracle(logits, tokens, mask_id), tokens)


PATHS = "dense", "fused", "fused promised", "chunked", "chunked promised"


def take_path(monkeypatch, path, count=7):
    """The ways through decide_from_hidden: returns further keywords."""
    monkeypatch.setattr(kernels, "DENSE_VOCABULARY", 10**9 if path == "dense" else 0)
    if path.startswith("chunked"):  # several blocks of rows
        monkeypatch.setattr(kernels, "FUSED_ROWS", 0)
        monkeypatch.setattr(kernels, "BLOCK_ROWS", 4)
        monkeypatch.setattr(kernels, "WORKSPACE", 0)
    return {"max_masked": count} if path.endswith("promised") else {}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocabulary, width", [(2, 128), (10, 80), (127, 123), (2049, 16)])
def test_decide_from_hidden(monkeypatch, path, vocabulary, width):
    if path.endswith("promised") and vocabulary != 10:
        return  # the rows alone are found another way
    keywords = take_path(monkeypatch, path)
    # Small integers: every logit is exact in float32, so decisions are too, and ties everywhere.
    head = torch.randint(-2, 3, (vocabulary, width)).float().to(DEVICE)
    bias = torch.randint(-9, 10, (vocabulary,)).float().to(DEVICE)
    for mask_id in (0, vocabulary // 2, vocabulary - 1):
        for pattern in PATTERNS if vocabulary < 2049 else ("mixed",):
            count = 7 if mask_id else 1
            hidden = torch.randint(-2, 3, (count, width)).float().to(DEVICE)
            tokens = some_tokens(pattern, count, vocabulary, mask_id).to(DEVICE)
            for b in (None, bias):
                given = hidden, head, tokens, mask_id, None, b
                decision = unchanged(decide_from_hidden, *given, **keywords)
                logits = F.linear(hidden, head, b)
                assert_decision(decision, decide_oracle(logits, tokens, mask_id), tokens)


def clear_of_rounding(logits, tokens, mask_id, tolerance):
    """Positions whose decision hangs on a gap of float64 logits beyond tolerance * the largest."""
    two = logits.index_fill(1, torch.tensor(mask_id), -INF).topk(2).values
    own = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    to_mask = (logits[:, mask_id] - own).abs()
    gap = torch.where(tokens == mask_id, two[:, 0] - two[:, 1], to_mask)
    return gap > logits.abs().amax(1) * tolerance


@pytest.mark.parametrize("path", ["logits", *PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decisions_are_those_of_float64_where_the_gap_exceeds_rounding(monkeypatch, path, dtype):
    hidden, head, mask_id = torch.randn(48, 64).to(dtype), torch.randn(300, 64).to(dtype), 7
    exact = hidden.double() @ head.double().T
    tokens = some_tokens("mixed", 48, 300, mask_id)
    if path == "logits":
        following = decide_from_logits(*away(exact.to(dtype), tokens), mask_id)[3]
    else:
        keywords = take_path(monkeypatch, path, 48)
        following = decide_from_hidden(*away(hidden, head, tokens), mask_id, **keywords)[3]
    clear = clear_of_rounding(exact, tokens, mask_id, 2**-7 if dtype == torch.bfloat16 else 1e-5)
    expected = torch.tensor([o[3] for o in decide_oracle(exact, tokens, mask_id)])
    masked = tokens == mask_id
    assert clear.sum() > 24 and (clear & masked).any()
    assert (clear & ~masked & (expected == mask_id)).any()
    assert torch.equal(following.cpu()[clear], expected[clear])


@pytest.mark.parametrize("path", PATHS)
def test_hidden_with_leading_axes_and_strides(monkeypatch, path):
    keywords = take_path(monkeypatch, path)
    mask_id, head = 3, torch.randint(-2, 3, (20, 32)).float().to(DEVICE)[:, ::2]
    hidden = torch.randint(-2, 3, (16, 4, 3)).float().to(DEVICE).permute(2, 1, 0)[:, :3]
    tokens = some_tokens("mixed", 9, 20, mask_id).view(3, 3).T.to(DEVICE)
    tokens[0, 0] = mask_id
    editable = torch.tensor([[True], [False], [True]], device=DEVICE)
    decision = unchanged(decide_from_hidden, hidden, head, tokens, mask_id, editable, **keywords)
    expected = decide_oracle(hidden @ head.T, tokens, mask_id, editable)
    assert_decision(decision, expected, tokens)
    alone = decide_from_hidden(hidden[0, 0], head, tokens[0, 0], mask_id, **keywords)
    expected = decide_oracle(hidden[:1, 0] @ head.T, tokens[:1, 0], mask_id)
    assert_decision(alone, expected, tokens[0, 0])


def test_wide_rows_walk_several_tiles(monkeypatch):
    # D = 4,128 is two tiles of _remask_kernel: only column 4,100 tells M from the token.
    head, hidden = torch.zeros(3, 4128, device=DEVICE), torch.ones(2, 4128, device=DEVICE)
    head[2, 4100] = 1.0
    tokens = torch.tensor([0, 1], device=DEVICE)
    assert decide_from_hidden(hidden, head, tokens, 2)[3].tolist() == [2, 2]
    # V = 2,100 in tiles of 16 is 132 states a row: more than 128 to merge.
    take_path(monkeypatch, "fused")
    monkeypatch.setattr(kernels, "HEAD_COLUMNS", 16)
    head = torch.randint(-2, 3, (2100, 16)).float().to(DEVICE)
    hidden = torch.randint(-2, 3, (3, 16)).float().to(DEVICE)
    head[2090], hidden[0] = 3.0, 2.0  # one row's best is in the last tiles
    tokens = torch.full((3,), 5, device=DEVICE)
    decision = decide_from_hidden(hidden, head, tokens, 5)
    assert decision[0][0] == 2090
    assert_decision(decision, decide_oracle(hidden @ head.T, tokens, 5), tokens)


def test_no_positions():
    tokens = torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    shapes = (0, 3, 5), (0, 3, 4), (5, 4)
    logits, hidden, head = (torch.zeros(*shape, device=DEVICE) for shape in shapes)
    through = decide_from_hidden(hidden, head, tokens, 4)
    for decision in (decide_from_logits(logits, tokens, 4), through):
        assert all(x.shape == (0, 3) for x in decision)
    for x in history_step(None, tokens, head):
        assert x.shape == (0, 3, 4)
    states = torch.zeros(2, 0, 3, dtype=torch.int64, device=DEVICE)
    assert history_sum(states, head).shape == (0, 3, 4)
    for inputs, weight in ((logits, None), (hidden, head)):
        result = revision_cross_entropy(inputs, tokens, tokens, head=weight)
        assert [float(x) for x in result] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_editable_and_token_dtypes(dtype):
    tokens = torch.tensor([[2, 2, 0, 1], [2, 2, 0, 1]], dtype=dtype, device=DEVICE)
    logits = torch.tensor([0.0, 1.0, 5.0], device=DEVICE).expand(2, 4, 3)
    editable = torch.tensor([True, False, False, True], device=DEVICE)  # broadcast over the batch
    best, confidence, remask, following = decide_from_logits(logits, tokens, 2, editable)
    assert following.tolist() == [[1, 2, 0, 2]] * 2 and following.dtype == best.dtype == dtype
    assert best.tolist() == [[1, 2, 0, 1]] * 2
    assert remask.tolist() == [[False, False, False, True]] * 2
    assert confidence[0, 0].item() == pytest.approx(-math.log1p(math.exp(-1)))
    assert (confidence[:, 1:] == -INF).all()


def test_equal_logits_keep():
    larger = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0)).item()
    logits = torch.tensor([[1.5, 3.0, 3.0], [3.0, 1.0, larger]], device=DEVICE)
    tokens = torch.tensor([1, 0], device=DEVICE)
    assert decide_from_logits(logits, tokens, 2)[3].tolist() == [1, 2]
    # From hidden states: equal rows of the head, whatever the rounding of their products.
    head, hidden = away(torch.randn(50, 123), torch.randn(40, 123))
    head[49] = head[7]
    tokens = torch.full((40,), 7, device=DEVICE)
    _, _, remask, following = decide_from_hidden(hidden, head, tokens, 49)
    assert not remask.any() and (following == 7).all()


@pytest.mark.parametrize("vocabulary", [5999, 12288])  # single elements; 16 bytes, shared rows
def test_ties_go_to_the_lowest_id_every_time(vocabulary):
    mask_id = 5
    pairs = (6, 7), (3, 4100), (4095, 4096), (9, 9 + 4096), (8, 15), (17, vocabulary - 1), (0, 1)
    for first, second in pairs:
        logits = torch.randn(3, vocabulary).clamp(max=3).to(DEVICE)
        logits[:, first] = logits[:, second] = 9.0
        logits[:, mask_id] = 100.0
        for batch in (1, 3):
            tokens = torch.full((batch,), mask_id, device=DEVICE)
            for _ in range(20 if GPU else 2):
                best, confidence, _, _ = decide_from_logits(logits[:batch], tokens, mask_id)
                assert best.tolist() == [first] * batch
                assert (confidence < -math.log(2)).all()


@pytest.mark.parametrize("path", PATHS)
def test_ties_from_hidden(monkeypatch, path):
    keywords = take_path(monkeypatch, path)
    head = torch.randint(-1, 2, (700, 16)).float().to(DEVICE)
    hidden = torch.ones(6, 16, device=DEVICE)
    tokens = torch.full((6,), 0, device=DEVICE)
    for first, second in ((100, 101), (100, 300), (3, 600), (511, 512)):
        head[first] = head[second] = 2.0
        runs = [decide_from_hidden(hidden, head, tokens, 0, **keywords)[0] for _ in range(2)]
        assert [run.tolist() for run in runs] == [[first] * 6] * 2
        head[first] = head[second] = 0.0


def test_nan_and_infinity():
    M = 2
    rows = [  # logits, token, then what Eq. 1 and the NaN policy say: following, confidence
        ([0.0, 1.0, NAN, 0.0], 0, 0, -INF),  # NaN at M: no re-mask
        ([NAN, 1.0, 9.0, 0.0], 0, 0, -INF),  # NaN at x: no re-mask
        ([0.0, NAN, 9.0, 0.0], 0, M, -INF),  # NaN elsewhere is not needed
        ([0.0, NAN, 9.0, NAN], M, 1, NAN),  # the first NaN wins the argmax
        ([0.0, 1.0, NAN, -INF], M, 1, -math.log1p(math.exp(-1))),  # M's logit is not needed
        ([0.0, INF, 0.0, 0.0], M, 1, 0.0),
        ([0.0, INF, 0.0, INF], M, 1, NAN),
        ([-INF, -INF, 0.0, -INF], M, 0, NAN),  # a row of -inf
        ([-INF, -INF, 0.0, 4.0], M, 3, 0.0),  # a prefix of -inf
        ([-INF, 2.0, -INF, -INF], M, 1, 0.0),
        ([-INF, 2.0, 0.0, -INF], 0, M, -INF),
        ([INF, 2.0, INF, -INF], 0, 0, -INF),
        ([0.0, 2.0, INF, -INF], 0, M, -INF),
    ]
    tokens = torch.tensor([r[1] for r in rows], device=DEVICE)
    expected = torch.tensor([r[3] for r in rows])
    narrow = torch.tensor([r[0] for r in rows], device=DEVICE)
    for logits in (narrow, F.pad(narrow, (0, 12), value=-INF)):  # 16 columns: 16-byte loads
        _, confidence, _, following = unchanged(decide_from_logits, logits, tokens, M)
        assert following.tolist() == [r[2] for r in rows]
        torch.testing.assert_close(confidence.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("width", [9000, 12288])
@pytest.mark.parametrize("mask_id", [0, 1, 8999])
def test_nan_and_infinity_far_along_a_row(width, mask_id):
    logits = torch.full((6, width), -INF)
    logits[0, 5000] = 1.0  # whole blocks of -inf before and after
    logits[2, 6:] = torch.randn(width - 6)
    logits[2, 100] = logits[2, 102] = logits[2, 7000] = NAN
    logits[3] = torch.randn(width)
    logits[3, 8998] = NAN
    logits[4] = torch.randn(width)
    logits[4, 4500] = INF
    logits[5, 4097] = logits[5, 8500] = INF
    tokens = torch.full((6,), mask_id)
    best, confidence, _, _ = decide_from_logits(*away(logits, tokens), mask_id)
    assert best.tolist() == [5000, 1 if mask_id == 0 else 0, 100, 8998, 4500, 4097]
    assert confidence[[0, 4]].tolist() == [0.0, 0.0] and confidence[[1, 2, 3, 5]].isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_from_hidden(monkeypatch, path):
    keywords = take_path(monkeypatch, path)
    head, hidden = torch.zeros(300, 16), torch.zeros(4, 16)
    head[:, 0] = torch.linspace(-1, 1, 300)
    head[120, 1] = head[250, 1] = NAN
    hidden[:, 0] = torch.tensor([1.0, NAN, 1.0, 1.0])
    hidden[2, 1] = 1.0
    masked, visible = torch.full((4,), 9), torch.tensor([120, 4, 8, 250])
    best, confidence, _, _ = decide_from_hidden(*away(hidden, head, masked), 9, **keywords)
    # NaN * 0 is NaN: rows 120 and 250 of the head are NaN for every hidden state.
    assert best.tolist() == [120, 0, 120, 120] and confidence.isnan().all()
    remask = decide_from_hidden(*away(hidden, head, visible), 9, **keywords)[2]
    assert not remask[[0, 1, 3]].any()  # a comparison with NaN is false
    rows = away(torch.full((2, 16), -INF), torch.ones(300, 16), torch.full((2,), 0))
    best, confidence, _, _ = decide_from_hidden(*rows, 0, **keywords)
    assert best.tolist() == [1, 1] and confidence.isnan().all()  # rows of -inf


@pytest.mark.parametrize("path", ["logits", *PATHS])
def test_wide_gaps_keep_the_reveal_order(monkeypatch, path):
    gaps = torch.tensor([20.0, 100.0, 0.5, 40.0, 17.5, 3.0])
    logits, tokens = torch.full((6, 48), -INF), torch.full((6,), 5)
    logits[:, 11], logits[:, 30] = 50.0, 50.0 - gaps
    if path == "logits":
        confidence = decide_from_logits(*away(logits, tokens), 5)[1]
    else:
        keywords = take_path(monkeypatch, path)
        hidden, head = torch.eye(6, 16), F.pad(logits.T.clamp(min=-1000), (0, 10))
        confidence = decide_from_hidden(*away(hidden, head, tokens), 5, **keywords)[1]
    order = gaps.argsort(descending=True)
    assert torch.equal(confidence.cpu().argsort(descending=True), order)
    expected = -torch.exp(-gaps.double()).log1p()
    seen = gaps < 80  # beyond that, exp is a denormal number
    # The exponent, up to 58 here, is rounded to float32: 58 * 2^-24 of relative error.
    torch.testing.assert_close(confidence.cpu().double()[seen], expected[seen], rtol=4e-6, atol=0)


def strided_views(x):
    """The values of x [B, N, V] behind other strides."""
    batch, length, width = x.shape
    wide = torch.full((batch * 2, length + 3, width + 5), NAN, dtype=x.dtype, device=x.device)
    wide[::2, 1:-2, 2:-3] = x
    return {
        "sliced": wide[::2, 1:-2, 2:-3],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "expanded": x[:1, :1].expand_as(x),
        "four axes": x.unsqueeze(1).expand(-1, 2, -1, -1),
    }


@pytest.mark.parametrize("kind", ["sliced", "transposed", "columns", "expanded", "four axes"])
def test_strided_logits(kind):
    x = strided_views(torch.randn(2, 5, 80, device=DEVICE))[kind].requires_grad_()
    tokens = some_tokens("mixed", x[..., 0].numel(), 80, 9).view(x.shape[:-1]).to(DEVICE)
    decision = unchanged(decide_from_logits, x, tokens, 9)
    assert_decision(decision, decide_oracle(x.detach(), tokens, 9), tokens)
    role = torch.randint(-1, 3, x.shape[:-1], device=DEVICE)
    assert_losses(x, tokens, role, (1, 2, 0.5))


def test_offsets_beyond_two_to_the_31(monkeypatch):
    torch.use_deterministic_algorithms(False)  # else torch.empty would write all 4 GB
    if not GPU:  # the interpreter copies every storage onto itself after a launch
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    try:
        far = torch.empty(2**31 + 2**12, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no 4 GB of address space")
    tokens, role = away(torch.full((3,), 500), torch.zeros(3, dtype=torch.int64))
    for width in (1000, 1008):  # without and with loads of 16 bytes
        rows = far.as_strided((3, width), (2**30, 1))
        rows.copy_(torch.randn(3, width))
        decision = decide_from_logits(rows, tokens, 500)
        assert_decision(decision, decide_oracle(rows, tokens, 500), tokens)
        total = revision_cross_entropy(rows, tokens, role)[0]
        expected = F.cross_entropy(rows.double(), tokens).item()
        assert total.item() == pytest.approx(expected, rel=1e-5)


def test_ids_out_of_range_read_nothing(monkeypatch):
    """As on a GPU, where no check waits for the device.  What lies behind the rows would show."""
    monkeypatch.setattr(kernels, "check_ids", lambda *_, **__: None)
    tokens = torch.tensor([-1, 5, 9, 7, 0], device=DEVICE)
    behind = torch.full((20, 6), -INF, device=DEVICE)  # an id read there would be re-masked
    logits = behind[2:7, :5]
    logits[:] = 0.0
    logits[:, 4] = 1.0  # M is likelier than any token
    _, _, remask, following = decide_from_logits(logits, tokens, 4)
    assert following.tolist() == [*tokens[:4].tolist(), 4]
    assert remask.tolist() == [False] * 4 + [True]

    behind = torch.full((20, 8), -1.0, device=DEVICE)
    head = behind[6:11]
    head[:] = 1.0
    head[4] = 2.0
    for bias in (None, torch.zeros(20, device=DEVICE)[6:11]):
        hidden = torch.ones(5, 8, device=DEVICE)
        following = decide_from_hidden(hidden, head, tokens, 4, None, bias)[3]
        assert following.tolist() == [-1, 5, 9, 7, 4]

    embedding = behind[6:11].requires_grad_()
    read = history_sum(torch.stack([tokens, tokens]), embedding, normalize=False)
    assert (read[:4] == 0).all() and (read[4] != 0).any()
    assert (history_step(None, tokens, embedding)[0][:4] == 0).all()
    read.sum().backward()
    for n, goal in enumerate(tokens.tolist()):
        role = torch.where(torch.arange(5, device=DEVICE) == n, KEEP, IGNORE)
        assert revision_cross_entropy(logits, tokens, role)[0].isnan() == (goal != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_three_times_that_of_pytorch(dtype):
    logits, tokens = away((torch.randn(12, 3008) * 3).to(dtype), torch.full((12,), 3007))
    exact = torch.tensor([o[1] for o in decide_oracle(logits, tokens, 3007)]).double().to(DEVICE)
    eager = logits[:, :-1].float().log_softmax(-1).amax(-1)
    ours = decide_from_logits(logits, tokens, 3007)[1]
    assert relative(ours, exact) <= 3 * relative(eager, exact) + 1e-7

    hidden, head = away(torch.randn(12, 64).to(dtype), torch.randn(3008, 64).to(dtype))
    oracle = decide_oracle(hidden.double() @ head.double().T, tokens, 3007)
    exact = torch.tensor([o[1] for o in oracle]).double().to(DEVICE)
    eager = (hidden @ head.T)[:, :-1].float().log_softmax(-1).amax(-1)
    best, ours, _, _ = decide_from_hidden(hidden, head, tokens, 3007)
    assert relative(ours, exact) <= 3 * relative(eager, exact) + 1e-7
    assert best.tolist() == [o[0] for o in oracle]

    states = torch.randint(3008, (5, 12), device=DEVICE)
    upstream = torch.randn(12, 64, device=DEVICE).to(dtype)

    def gradient(form, weight):
        leaf = weight.clone().requires_grad_()
        out = form(states, leaf)
        out.backward(upstream.to(out.dtype))
        return out.detach(), leaf.grad

    exact = gradient(plain_history, head.double())
    eager = gradient(plain_history, head)
    for x, y, truth in zip(gradient(history_sum, head), eager, exact):
        assert relative(x, truth) <= 3 * relative(y, truth) + 1e-7


def test_bad_arguments_to_decide():
    logits, hidden, head = (torch.zeros(*s, device=DEVICE) for s in ((2, 3, 5), (2, 3, 4), (5, 4)))
    tokens = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    flags = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    bias = torch.zeros(5, device=DEVICE)
    cases = [
        (decide_from_logits, (logits.long(), tokens, 0), "logits"),
        (decide_from_logits, (logits.to(torch.float8_e5m2), tokens, 0), "logits"),
        (decide_from_logits, (logits[0, 0, 0], tokens, 0), "logits"),
        (decide_from_logits, (logits[..., :1], tokens, 0), "logits"),
        (decide_from_logits, (logits, tokens[:1], 0), "tokens"),
        (decide_from_logits, (logits, tokens.float(), 0), "tokens"),
        (decide_from_logits, (logits, tokens, 5), "mask_id"),
        (decide_from_logits, (logits, tokens, -1), "mask_id"),
        (decide_from_logits, (logits, tokens, 0, tokens), "editable"),
        (decide_from_logits, (logits, tokens, 0, flags[:, :2]), "editable"),
        (decide_from_logits, (logits, tokens.to("meta"), 0), "tokens"),
        (decide_from_logits, (logits.double(), tokens, 0), "impl"),
        (decide_from_hidden, (hidden, head[0], tokens, 0), "head"),
        (decide_from_hidden, (hidden, head[:, :3], tokens, 0), "head"),
        (decide_from_hidden, (hidden, head.double(), tokens, 0), "head"),
        (decide_from_hidden, (hidden.long(), head, tokens, 0), "hidden"),
        (decide_from_hidden, (hidden, head, tokens[0], 0), "tokens"),
        (decide_from_hidden, (hidden, head, tokens, 0, None, bias[:4]), "bias"),
        (decide_from_hidden, (hidden, head, tokens, 0, None, bias.double()), "bias"),
    ]
    if not GPU:  # on a GPU the check would wait for the device
        cases += [
            (decide_from_logits, (logits, tokens + 5, 0), "tokens"),
            (decide_from_logits, (logits, tokens - 1, 0), "tokens"),
            (decide_from_hidden, (hidden, head, tokens + 5, 0), "tokens"),
        ]
    for function, arguments, name in cases:
        with pytest.raises(ValueError, match=name):
            function(*arguments)


# ------------------------------------------------------------------------------------------------
# Eq. 2


def history_oracle(states, embedding, gamma, rotate):
    """The closed sum in complex float64: a pair (j, j + D/2) is one number, R_delta a factor."""
    table = embedding.double().cpu()
    width, last = table.shape[1], len(states) - 1
    total = torch.zeros(*states.shape[1:], width, dtype=torch.float64)
    for k, state in enumerate(states.cpu()):
        x = table[state.clamp(min=0)] * (state >= 0).unsqueeze(-1)
        if rotate:
            x = turn(x, k - last)
        total += gamma ** (last - k) * x
    return total


def turn(x, delta):
    half = x.shape[-1] // 2
    angle = delta * 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / (2 * half))
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_history(states, embedding, gamma=0.9):
    """What a PyTorch user would write, in float32 at least; with gradient."""
    table = embedding if embedding.dtype == torch.float64 else embedding.float()
    total = 0
    for age, state in enumerate(states.flip(0)):
        pair = torch.arange(0, table.shape[1], 2, device=table.device) / table.shape[1]
        angle = (age * 10000.0 ** -pair.double()).to(table.dtype)
        u, v = F.embedding(state, table).chunk(2, -1)
        x = torch.cat([u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()], -1)
        total = total + gamma**age * x
    return rms(total).to(embedding.dtype)


SHAPES = [(2, True), (6, True), (128, True), (128, False), (123, False), (1, False), (2050, True)]


@pytest.mark.parametrize("width, rotate", [*SHAPES, (4096, True)])
def test_history_step_and_sum_are_the_closed_sum(width, rotate):
    embedding = torch.randn(11, width).to(DEVICE)
    states = torch.randint(11, (5, 2, 20) if width < 2048 else (3, 2, 2)).to(DEVICE)
    near = {"rtol": 1e-5, "atol": 1e-5}
    for gamma in (0, 0.9, 1):
        a = None
        for t in range(len(states)):
            a, read = unchanged(history_step, a, states[t], embedding, gamma, rotate)
            exact = history_oracle(states[: t + 1], embedding, gamma, rotate)
            torch.testing.assert_close(a.cpu().double(), exact, **near)
            torch.testing.assert_close(read.cpu().double(), rms(exact), **near)
        closed = unchanged(history_sum, states, embedding, gamma, rotate)
        torch.testing.assert_close(closed.cpu().double(), rms(exact), **near)
        plain = history_sum(states.int(), embedding, gamma, rotate, normalize=False)
        torch.testing.assert_close(plain.cpu().double(), exact, **near)
        _, read = history_step(a, states[0].int(), embedding, gamma, rotate, normalize=False)
        exact = history_oracle(torch.cat([states, states[:1]]), embedding, gamma, rotate)
        torch.testing.assert_close(read.cpu().double(), exact, **near)


def test_history_after_100_steps():
    embedding, states = torch.randn(7, 16).to(DEVICE), torch.randint(7, (100, 3)).to(DEVICE)
    for gamma in (0.9, 1.0):
        a = None
        for state in states:
            a, read = history_step(a, state, embedding, gamma)
        exact = history_oracle(states, embedding, gamma, True)
        assert relative(a.cpu(), exact) < 1e-5 and relative(read.cpu(), rms(exact)) < 1e-5


def test_rotation_backwards_is_the_inverse():
    # Embedding 0 is zero, so one step with gamma 1 is R_(-1); the exact R_1 gives the start again.
    embedding, tokens = torch.zeros(1, 10, device=DEVICE), torch.zeros(4, dtype=torch.int64)
    a = torch.randn(4, 10).to(DEVICE)
    back, _ = history_step(a, tokens.to(DEVICE), embedding, 1.0)
    again = turn(back.cpu().double(), 1)
    torch.testing.assert_close(again, a.cpu().double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_history_in_16_bits_keeps_its_sum_in_32(dtype):
    embedding, states = away(torch.randn(9, 24).to(dtype), torch.randint(9, (6, 4)))
    a = None
    for state in states:
        a, read = history_step(a, state, embedding)
    exact = history_oracle(states, embedding, 0.9, True)
    assert a.dtype == torch.float32 and relative(a.cpu(), exact) < 1e-6
    assert read.dtype == dtype and relative(read.cpu(), rms(exact)) < 4e-3


@pytest.mark.parametrize("vocabulary", [3, 50])  # many additions to a row, and few
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width, rotate", [(6, True), (5, False)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_history_gradient(vocabulary, normalize, width, rotate, gamma):
    states = torch.randint(vocabulary, (4, 5, 3))
    states[0, 0], states[:, 1] = -1, 1  # absent states, and one token everywhere
    states[:, 2, 2] = -1
    weight, upstream = torch.randn(vocabulary, width).double(), torch.randn(5, 3, width).double()
    # Oracle: central differences of the complex closed sum, one embedding entry at a time.
    expected = torch.zeros(3, width, dtype=torch.float64)
    for v in range(3):
        for d in range(width):
            ends = []
            for sign in (1, -1):
                moved = weight.clone()
                moved[v, d] += sign * 1e-6
                total = history_oracle(states, moved, gamma, rotate)
                ends.append(((rms(total) if normalize else total) * upstream).sum())
            expected[v, d] = (ends[0] - ends[1]) / 2e-6
    embedding = weight.float().to(DEVICE).requires_grad_()
    out = unchanged(history_sum, states.to(DEVICE), embedding, gamma, rotate, normalize)
    assert (out[2, 2] == 0).all()  # no state at all
    out.backward(upstream.float().to(DEVICE))
    got = embedding.grad[:3].cpu().double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_history_strided_embedding_and_nan():
    embedding = torch.randn(8, 9).to(DEVICE).T[:, ::2]  # [9, 4]
    tokens, past = torch.arange(9, device=DEVICE), torch.zeros(9, 4, device=DEVICE)
    assert torch.equal(history_step(None, tokens, embedding)[0], embedding)
    past[3, 1] = NAN
    new, read = history_step(past, tokens, embedding)
    assert new[3].isnan().any() and read[3].isnan().all()
    assert not read[torch.arange(9) != 3].isnan().any()


def test_bad_arguments_to_history():
    embedding, a = torch.zeros(5, 4, device=DEVICE), torch.zeros(2, 3, 4, device=DEVICE)
    tokens = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    cases = [
        (history_step, (None, tokens, embedding[:, :3]), "embedding"),  # odd D
        (history_step, (None, tokens, embedding[0]), "embedding"),
        (history_step, (None, tokens, embedding.long()), "embedding"),
        (history_step, (None, tokens, embedding.to(torch.float8_e5m2)), "embedding"),
        (history_step, (None, tokens, embedding.double()), "impl"),
        (history_step, (None, tokens.float(), embedding), "tokens"),
        (history_step, (None, tokens, embedding, 1.5), "gamma"),
        (history_step, (a[:1], tokens, embedding), "a must"),
        (history_step, (a.double(), tokens, embedding), "a must"),
        (history_step, (a.half(), tokens, embedding.half()), "a must"),
        (history_sum, (tokens[:0], embedding), "states"),
        (history_sum, (tokens, embedding, -0.1), "gamma"),
    ]
    if not GPU:
        cases += [
            (history_step, (None, tokens + 5, embedding), "tokens"),
            (history_step, (None, tokens - 1, embedding), "tokens"),
            (history_sum, (tokens - 2, embedding), "states"),
        ]
    for function, arguments, name in cases:
        with pytest.raises(ValueError, match=name):
            function(*arguments)


# ------------------------------------------------------------------------------------------------
# The three losses


def plain_losses(inputs, target, role, head=None, bias=None):
    """Masked F.cross_entropy calls, one a role, over the number of positions with any role."""
    logits = inputs if head is None else F.linear(inputs, head, bias)
    number = max(1, int((role != IGNORE).sum()))
    return [
        F.cross_entropy(logits[role == kind], target[role == kind].long(), reduction="sum") / number
        for kind in (REVEAL, REMASK, KEEP)
    ]


def assert_losses(inputs, target, role, weights, head=None, bias=None, upstream=2.5):
    """Values and gradients against those calls in float64."""
    given = [x for x in (inputs, head, bias) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in given]
    parts = plain_losses(exact[0], target, role, *exact[1:])
    weighted = sum(w * part for w, part in zip(weights, parts))
    (weighted * upstream).backward()
    mine = [x.detach().requires_grad_(x.requires_grad) for x in given]
    got = unchanged(revision_cross_entropy, mine[0], target, role, weights, *mine[1:])
    near = {"rtol": 1e-5, "atol": 1e-6}
    for x, y in zip(got, (weighted, *parts), strict=True):
        assert x.ndim == 0
        torch.testing.assert_close(x.detach().double(), y.detach(), **near)
    assert not any(x.requires_grad for x in got[1:])
    if any(x.requires_grad for x in mine):
        (got[0] * upstream).backward()
    for x, y in zip(mine, exact):
        assert (x.grad is not None) == x.requires_grad
        if x.requires_grad:
            assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
            torch.testing.assert_close(x.grad.double(), y.grad, **near)


@pytest.mark.parametrize("vocabulary", [2, 10, 127, 4999, 5008])
def test_losses_from_logits(vocabulary):
    for shape in [(1,), (2, 5)] if vocabulary < 4999 else [(3,)]:
        logits = (torch.randn(*shape, vocabulary) * 3).to(DEVICE).requires_grad_()
        target, role = torch.randint(vocabulary, shape), torch.randint(-1, 3, shape)
        for weights in ((1, 1, 1), (1, 0, 0.25)):
            assert_losses(logits, *away(target, role), weights)


@pytest.mark.parametrize("chunk", [4, 2048])
def test_losses_from_hidden_states(monkeypatch, chunk):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 0)
    target, role = away(torch.randint(37, (3, 5)), torch.randint(-1, 3, (3, 5)))
    bias = torch.randn(37).to(DEVICE)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        hidden = torch.randn(5, 3, 6).to(DEVICE).transpose(0, 1).requires_grad_(needs[0])
        head = torch.randn(6, 37).to(DEVICE).T.requires_grad_(needs[1])
        assert_losses(hidden, target.int(), role.int(), (1, 2, 0.5), head)
        for to_bias in (True, False):
            given = bias.clone().requires_grad_(to_bias)
            assert_losses(hidden, target, role, (1, 2, 0.5), head, given)


def test_losses_of_more_rows_than_a_block_of_the_sum():
    logits, role = torch.randn(5000, 4), torch.randint(-1, 3, (5000,))
    assert_losses(*away(logits, torch.randint(4, (5000,)), role), (1, 2, 0.5))


def test_losses_of_empty_roles():
    logits, hidden, head = away(torch.randn(6, 9), torch.randn(6, 4), torch.randn(9, 4))
    target = torch.randint(9, (6,)).to(DEVICE)
    for kind in (REVEAL, REMASK, KEEP, IGNORE):
        role = torch.full((6,), kind, device=DEVICE)
        assert_losses(logits.clone().requires_grad_(), target, role, (1, 1, 1))
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        assert_losses(leaves[0], target, role, (1, 1, 1), head=leaves[1])
    nothing = torch.full((6,), IGNORE, device=DEVICE)
    result = revision_cross_entropy(logits, target, nothing)
    assert [x.item() for x in result] == [0, 0, 0, 0]
    # An ignored row is not read, and its target may be anything.
    logits[2], role[:] = NAN, KEEP
    role[2], target[2] = IGNORE, -100
    assert not revision_cross_entropy(logits, target, role)[0].isnan()


def test_losses_propagate_nan_and_infinity_as_torch():
    rows = [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [0.0, INF, 1.0], [INF, INF, 0.0]]
    rows += [[-INF, -INF, -INF], [-INF, 0.0, 1.0], [1.0, -INF, 0.0]]
    target, role = away(torch.tensor([1]), torch.tensor([KEEP]))
    for row in rows:
        mine, theirs = (torch.tensor([row], device=DEVICE, requires_grad=True) for _ in range(2))
        total = revision_cross_entropy(mine, target, role)[0]
        exact = F.cross_entropy(theirs, target)
        torch.testing.assert_close(total, exact, equal_nan=True)
        total.backward()
        exact.backward()
        torch.testing.assert_close(mine.grad, theirs.grad, equal_nan=True)
        one, head = away(torch.ones(1, 1), torch.tensor(row)[:, None])
        through = revision_cross_entropy(one, target, role, head=head)[0]
        torch.testing.assert_close(through, exact.detach(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_16_bits(dtype):
    target, role = away(torch.randint(50, (12,)), torch.randint(-1, 3, (12,)))
    logits, hidden = away(torch.randn(12, 50).to(dtype), torch.randn(12, 16).to(dtype))
    head, bias = away(torch.randn(50, 16).to(dtype), torch.randn(50).to(dtype))
    upstream = torch.randn((), device=DEVICE)

    def gradients(tensors, form):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        total = form(*leaves)
        (total * upstream).backward()
        return [total.detach(), *(x.grad for x in leaves)]

    def eager(inputs, *head):
        logits = F.linear(inputs, *head) if head else inputs
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return sum(plain_losses(wide, target, role))

    def ours(inputs, *head):
        return revision_cross_entropy(inputs, target, role, (1, 1, 1), *head)[0]

    for tensors in ((logits,), (hidden, head, bias)):
        exact = gradients([x.double() for x in tensors], eager)
        for x, y, truth in zip(gradients(tensors, ours), gradients(tensors, eager), exact):
            assert relative(x, truth) <= 3 * relative(y, truth) + 2e-7


def test_backward_twice_gives_the_same():
    target, role = away(torch.randint(9, (6,)), torch.randint(0, 3, (6,)))
    hidden, head = (torch.randn(n, 4, device=DEVICE).requires_grad_() for n in (6, 9))
    total = revision_cross_entropy(hidden, target, role, head=head)[0]
    both = [torch.autograd.grad(total, (hidden, head), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*both))


def test_bad_arguments_to_losses():
    logits, hidden, head = (torch.zeros(*s, device=DEVICE) for s in ((2, 3, 5), (2, 3, 4), (5, 4)))
    target, bias = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), logits[0, 0]
    ones = (1, 1, 1)
    cases = [
        ((logits.int(), target, target), "logits"),
        ((logits.double(), target, target), "impl"),
        ((logits, target[0], target), "target"),
        ((logits, target, target[0]), "role"),
        ((logits, target.float(), target), "target"),
        ((logits, target, target.bool()), "role"),
        ((logits, target, target, (1, 1)), "weights"),
        ((hidden, target, target, ones, head[:, :3]), "head"),
        ((hidden, target, target, ones, head.double()), "head"),
        ((hidden, target, target, ones, head, bias[:4]), "bias"),
        ((logits, target, target, ones, None, bias), "bias"),
        ((logits, target.to("meta"), target), "target"),
    ]
    if not GPU:
        cases += [((logits, target + 5, target), "target"), ((logits, target, target + 3), "role")]
    for arguments, name in cases:
        with pytest.raises(ValueError, match=name):
            revision_cross_entropy(*arguments)


# ------------------------------------------------------------------------------------------------
# Where it runs


def test_import_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "assert kernels.triton is None and not kernels.use_triton(None, torch.zeros(1))\n"
        "try: kernels.decide_from_logits(torch.eye(3), torch.tensor([2, 2, 0]), 2)\n"
        "except ValueError as error: assert 'triton' in str(error)\n"
        "else: raise SystemExit('ran without triton')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_which_path_runs(monkeypatch):
    x = torch.zeros(1)
    assert not kernels.use_triton(None, x) and not kernels.use_triton("torch", x)
    assert kernels.use_triton("triton", x)
    for impl, given in (("fast", x), ("triton", x.double())):
        with pytest.raises(ValueError, match="impl"):
            kernels.use_triton(impl, given)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl"):
        kernels.use_triton("triton", x)


def test_benchmark_smoke(tmp_path):
    out = tmp_path / "kernels.json"
    command = [sys.executable, "tests/benchmark_kernels.py", "--smoke", "--json", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert out.exists() and "history_step" in run.stdout
    command = [*command[:2], "--device", "abacus"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "abacus" in run.stderr


def test_a_full_graph_is_traced_without_a_gpu(monkeypatch):
    """Nothing on the way to the launches stops a tracer; the test below also runs them."""
    tokens, role = torch.tensor([0, 9, 9, 3]), torch.tensor([REVEAL, REMASK, KEEP, IGNORE])
    logits = torch.randn(2, 2, 3008).flatten(0, 1).requires_grad_()
    hidden, head = torch.randn(4, 64), torch.randn(500, 64)

    def one_turn():
        total = revision_cross_entropy(logits, tokens, role)[0]
        decision = decide_from_logits(logits, tokens, 9, tokens > 0)
        read = history_step(hidden, tokens, head)[1] + history_sum(tokens[None], head)
        return total, *decision, *decide_from_hidden(hidden, head, tokens, 9), read

    monkeypatch.setattr(kernels, "_launch", lambda *_, **__: None)
    results = torch.compile(one_turn, fullgraph=True, backend="aot_eager")()
    assert len(results) == 10 and results[0].requires_grad
    results[0].backward()


@needs_gpu
def test_full_graph_and_cuda_graph_and_stream():
    mask_id, vocabulary, width = 9, 3000, 64
    tokens = some_tokens("mixed", 512, vocabulary, mask_id).cuda()
    hidden, head = torch.randn(512, width).cuda(), torch.randn(vocabulary, width).cuda()
    logits, role = hidden @ head.T, torch.randint(-1, 3, (512,), device="cuda")

    def one_turn():
        a, read = history_step(hidden, tokens, head)
        decision = decide_from_hidden(hidden, head, tokens, mask_id, max_masked=512)
        losses = revision_cross_entropy(logits, tokens, role)
        read_all = history_sum(tokens[None], head)
        return *decide_from_logits(logits, tokens, mask_id), *decision, a, read, read_all, *losses

    expected = one_turn()
    compiled = torch.compile(one_turn, fullgraph=True)()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = one_turn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_turn()
    graph.replay()
    torch.cuda.synchronize()
    for others in (compiled, aside, captured):
        for x, y in zip(expected, others, strict=True):
            torch.testing.assert_close(x, y)
