"""kernels.py against float64 loops in Python, torch path and Triton kernels alike.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1) on small shapes; it shows wrong arithmetic
and indexing, but no race, missing barrier or slow code.  With one, the same tests run the compiled kernels.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
from kernels import decide_from_hidden, decide_from_logits, history_step, history_sum  # noqa: E402
from kernels import revision_cross_entropy  # noqa: E402

if kernels.triton is not None and not GPU and not kernels.INTERPRETED:
    raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: set it in tests/conftest.py")

DEVICE = "cuda" if GPU else "cpu"
HAS_TRITON = kernels.triton is not None
IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"))]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
pytestmark = pytest.mark.filterwarnings("ignore:.*(encountered in|deterministic).*")
NAN, INF = math.nan, math.inf
REVEAL, REMASK, KEEP, IGNORE = 0, 1, 2, -1


@pytest.fixture(autouse=True)
def poison():
    """torch.empty is filled with NaN, the largest integer, or True: an output that a kernel skips shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits for the first
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_the_poison_works():
    assert torch.empty(8, device=DEVICE).isnan().all() and (torch.empty(8, dtype=torch.int64) > 2**40).all()


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


# ---------------------------------------------------------------------------------------------------------------
# Eq. 1


def decide_oracle(logits, tokens, mask_id, editable=None):
    """Eq. 1 by a loop over float64: lists of (best, confidence, remask, following), one a position."""
    out = []
    rows = logits.double().cpu().reshape(-1, logits.shape[-1]).tolist()
    free = [True] * len(rows) if editable is None else editable.expand(tokens.shape).reshape(-1).tolist()
    for row, token, may in zip(rows, tokens.reshape(-1).tolist(), free):
        if may and token == mask_id:
            best = max((v for v in range(len(row)) if v != mask_id), key=lambda v: (row[v], -v))
            others = math.fsum(math.exp(row[v] - row[best]) for v in range(len(row)) if v not in (best, mask_id))
            out.append((best, -math.log1p(others), False, best))
        elif may and row[mask_id] > row[token]:
            out.append((token, -INF, True, mask_id))
        else:
            out.append((token, -INF, False, token))
    return out


def assert_decision(decision, oracle, tokens, rtol=2e-6):
    for x, dtype in zip(decision, (tokens.dtype, torch.float32, torch.bool, tokens.dtype)):
        assert x.shape == tokens.shape and x.dtype == dtype and x.device == tokens.device
    best, confidence, remask, following = (x.reshape(-1).tolist() for x in decision)
    assert best == [o[0] for o in oracle]
    assert remask == [o[2] for o in oracle]
    assert following == [o[3] for o in oracle]
    expected = torch.tensor([o[1] for o in oracle], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(confidence, dtype=torch.float64), expected, rtol=rtol, atol=1e-30)


def some_tokens(pattern, count, vocabulary, mask_id):
    tokens = (mask_id + 1 + torch.randint(vocabulary - 1, (count,))) % vocabulary  # any but MASK
    masked = {
        "masked": torch.ones(count, dtype=torch.bool),
        "visible": torch.zeros(count, dtype=torch.bool),
        "one": torch.arange(count) == count // 2,
        "mixed": torch.rand(count) < 0.5,
    }[pattern]
    return tokens.masked_fill(masked, mask_id)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [2, 10, 127, 8193])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_decide_from_logits(impl, vocabulary, place):
    mask_id = {"first": 0, "middle": vocabulary // 2, "last": vocabulary - 1}[place]
    for pattern in ("masked", "visible", "one", "mixed"):
        for count in (1, 7) if vocabulary < 8193 else (3,):
            tokens = some_tokens(pattern, count, vocabulary, mask_id).to(DEVICE)
            logits = (torch.randn(count, vocabulary) * 4).to(DEVICE)
            decision = unchanged(decide_from_logits, logits, tokens, mask_id, impl=impl)
            assert_decision(decision, decide_oracle(logits, tokens, mask_id), tokens)


def hidden_paths(monkeypatch, path):
    """The ways through decide_from_hidden: returns impl and further keywords."""
    monkeypatch.setattr(kernels, "DENSE_VOCABULARY", 10**9 if path == "triton dense" else 0)
    if not path.startswith("triton fused"):  # several blocks of rows; the fused kernel has none
        monkeypatch.setattr(kernels, "FUSED_ROWS", 0)
        monkeypatch.setattr(kernels, "_block_rows", lambda x, vocabulary: 4)
    return {"impl": path.split()[0], **({"max_masked": 7} if path.endswith("promised") else {})}


PATHS = ["torch"] + [
    pytest.param(path, marks=needs_triton)
    for path in ("triton dense", "triton fused", "triton fused promised", "triton chunked", "triton chunked promised")
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocabulary, width", [(2, 128), (10, 128), (127, 123), (8193, 16)])
def test_decide_from_hidden(monkeypatch, path, vocabulary, width):
    keywords = hidden_paths(monkeypatch, path)
    # Small integers: every logit is exact in float32, so decisions are too, and ties are everywhere.
    head = torch.randint(-2, 3, (vocabulary, width)).float().to(DEVICE)
    for mask_id in (0, vocabulary // 2, vocabulary - 1):
        for pattern in ("masked", "visible", "one", "mixed") if vocabulary < 8193 else ("mixed",):
            count = 7 if mask_id else 1
            hidden = torch.randint(-2, 3, (count, width)).float().to(DEVICE)
            tokens = some_tokens(pattern, count, vocabulary, mask_id).to(DEVICE)
            decision = unchanged(decide_from_hidden, hidden, head, tokens, mask_id, **keywords)
            assert_decision(decision, decide_oracle(hidden @ head.T, tokens, mask_id), tokens)


@pytest.mark.parametrize("path", ["logits torch", pytest.param("logits triton", marks=needs_triton), *PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decisions_are_those_of_float64_wherever_the_gap_exceeds_rounding(monkeypatch, path, dtype):
    hidden, head, mask_id = torch.randn(48, 64).to(dtype), torch.randn(300, 64).to(dtype), 7
    exact = hidden.double() @ head.double().T
    tokens = some_tokens("mixed", 48, 300, mask_id)
    masked = tokens == mask_id
    if path.startswith("logits"):
        got = decide_from_logits(*away(exact.to(dtype), tokens), mask_id, impl=path.split()[1])
    else:
        keywords = hidden_paths(monkeypatch, path)
        keywords |= {"max_masked": 48} if "max_masked" in keywords else {}
        got = decide_from_hidden(*away(hidden, head, tokens), mask_id, **keywords)
    others = exact.index_fill(1, torch.tensor(mask_id), -INF).topk(2).values
    own = exact.gather(1, tokens.unsqueeze(1)).squeeze(1)
    gap = torch.where(masked, others[:, 0] - others[:, 1], (exact[:, mask_id] - own).abs())
    clear = gap > exact.abs().amax(1) * (2**-7 if dtype == torch.bfloat16 else 1e-5)
    expected = torch.tensor([o[3] for o in decide_oracle(exact, tokens, mask_id)])
    assert clear.sum() > 24 and (clear & masked).any() and (clear & ~masked & (expected == mask_id)).any()
    assert torch.equal(got.following.cpu()[clear], expected[clear])


@pytest.mark.parametrize("path", PATHS)
def test_hidden_with_leading_axes_and_strides(monkeypatch, path):
    keywords = hidden_paths(monkeypatch, path)
    mask_id, head = 3, torch.randint(-2, 3, (20, 32)).float().to(DEVICE)[:, ::2]
    hidden = torch.randint(-2, 3, (16, 4, 3)).float().to(DEVICE).permute(2, 1, 0)[:, :3]  # [3, 3, 16], no unit stride
    tokens = some_tokens("mixed", 9, 20, mask_id).view(3, 3).T.to(DEVICE)
    tokens[0, 0] = mask_id
    editable = torch.tensor([[True], [False], [True]], device=DEVICE)
    decision = unchanged(decide_from_hidden, hidden, head, tokens, mask_id, editable, **keywords)
    assert_decision(decision, decide_oracle(hidden @ head.T, tokens, mask_id, editable), tokens)
    alone = decide_from_hidden(hidden[0, 0], head, tokens[0, 0], mask_id, **keywords)
    assert_decision(alone, decide_oracle(hidden[:1, 0] @ head.T, tokens[:1, 0], mask_id), tokens[0, 0])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_positions(impl):
    tokens = torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    logits, hidden, head = (torch.zeros(*shape, device=DEVICE) for shape in ((0, 3, 5), (0, 3, 4), (5, 4)))
    through = decide_from_hidden(hidden, head, tokens, 4, impl=impl)
    for decision in (decide_from_logits(logits, tokens, 4, impl=impl), through):
        assert all(x.shape == (0, 3) for x in decision)
    for x in history_step(None, tokens, head, impl=impl):
        assert x.shape == (0, 3, 4)
    states = torch.zeros(2, 0, 3, dtype=torch.int64, device=DEVICE)
    assert history_sum(states, head, impl=impl).shape == (0, 3, 4)
    for result in (
        revision_cross_entropy(logits, tokens, tokens, impl=impl),
        revision_cross_entropy(hidden, tokens, tokens, head=head, impl=impl),
    ):
        assert [float(x) for x in result] == [0, 0, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_editable_and_token_dtypes(impl, dtype):
    tokens = torch.tensor([[2, 2, 0, 1], [2, 2, 0, 1]], dtype=dtype, device=DEVICE)
    logits = torch.tensor([0.0, 1.0, 5.0], device=DEVICE).expand(2, 4, 3)
    editable = torch.tensor([True, False, False, True], device=DEVICE)  # broadcast over the batch
    best, confidence, remask, following = decide_from_logits(logits, tokens, 2, editable, impl=impl)
    assert following.tolist() == [[1, 2, 0, 2]] * 2 and following.dtype == best.dtype == dtype
    assert best.tolist() == [[1, 2, 0, 1]] * 2 and remask.tolist() == [[False, False, False, True]] * 2
    assert confidence[0, 0].item() == pytest.approx(-math.log1p(math.exp(-1))) and (confidence[:, 1:] == -INF).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_logits_keep(impl):
    logits = torch.tensor([[1.5, 3.0, 3.0], [3.0, 1.0, math.nextafter(3.0, 4.0)]], device=DEVICE)
    tokens = torch.tensor([1, 0], device=DEVICE)
    assert decide_from_logits(logits[:1], tokens[:1], 2, impl=impl).following.tolist() == [1]
    larger = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0)).item()
    logits[1, 2] = larger
    assert decide_from_logits(logits, tokens, 2, impl=impl).following.tolist() == [1, 2]
    # From hidden states: equal rows of the head, whatever the rounding of their products.
    head, hidden = torch.randn(50, 123).to(DEVICE), torch.randn(40, 123).to(DEVICE)
    head[49] = head[7]
    decision = decide_from_hidden(hidden, head, torch.full((40,), 7, device=DEVICE), 49, impl=impl)
    assert not decision.remask.any() and (decision.following == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_id_every_time(impl):
    vocabulary, mask_id = 6000, 5
    for first, second in ((6, 7), (3, 4100), (4095, 4096), (9, 9 + 4096), (17, 5999), (0, 1)):
        logits = torch.randn(3, vocabulary).clamp(max=3).to(DEVICE)
        logits[:, first] = logits[:, second] = 9.0
        logits[:, mask_id] = 100.0
        for batch in (1, 2, 3):
            tokens = torch.full((batch,), mask_id, device=DEVICE)
            for _ in range(20 if impl == "torch" or GPU else 2):
                assert decide_from_logits(logits[:batch], tokens, mask_id, impl=impl).best.tolist() == [first] * batch


@pytest.mark.parametrize("path", PATHS)
def test_ties_from_hidden(monkeypatch, path):
    keywords = hidden_paths(monkeypatch, path)
    head = torch.randint(-1, 2, (700, 16)).float().to(DEVICE)
    hidden = torch.ones(6, 16, device=DEVICE)
    for first, second in ((100, 101), (100, 300), (3, 600), (511, 512)):
        head.clamp_(max=1)
        head[first] = head[second] = 2.0
        tokens = torch.full((6,), 0, device=DEVICE)
        runs = [decide_from_hidden(hidden, head, tokens, 0, **keywords).best.tolist() for _ in range(3)]
        assert runs == [[first] * 6] * 3
        head[first] = head[second] = 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_infinity(impl):
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
    logits = torch.tensor([r[0] for r in rows], device=DEVICE)
    tokens = torch.tensor([r[1] for r in rows], device=DEVICE)
    decision = unchanged(decide_from_logits, logits, tokens, M, impl=impl)
    assert decision.following.tolist() == [r[2] for r in rows]
    expected = torch.tensor([r[3] for r in rows])
    torch.testing.assert_close(decision.confidence.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask_id", [0, 1, 8999])
def test_nan_and_infinity_far_along_a_row(impl, mask_id):
    logits = torch.full((6, 9000), -INF)
    logits[0, 5000] = 1.0  # whole blocks of -inf before and after
    logits[2, 6:] = torch.randn(8994)
    logits[2, 100] = logits[2, 7000] = NAN
    logits[3] = torch.randn(9000)
    logits[3, 8998] = NAN
    logits[4] = torch.randn(9000)
    logits[4, 4500] = INF
    logits[5, 4097] = logits[5, 8500] = INF
    tokens = torch.full((6,), mask_id)
    decision = decide_from_logits(*away(logits, tokens), mask_id, impl=impl)
    assert decision.best.tolist() == [5000, 1 if mask_id == 0 else 0, 100, 8998, 4500, 4097]
    confidence = decision.confidence.cpu()
    assert confidence[[0, 4]].tolist() == [0.0, 0.0] and confidence[[1, 2, 3, 5]].isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_from_hidden(monkeypatch, path):
    keywords = hidden_paths(monkeypatch, path)
    head = torch.zeros(300, 16)
    head[:, 0] = torch.linspace(-1, 1, 300)
    hidden = torch.zeros(4, 16)
    hidden[:, 0] = torch.tensor([1.0, NAN, 1.0, 1.0])
    hidden[2, 1] = 1.0
    head[120, 1] = head[250, 1] = NAN
    decision = decide_from_hidden(*away(hidden, head, torch.full((4,), 9)), 9, **keywords)
    # NaN * 0 is NaN: rows 120 and 250 of the head are NaN for every hidden state.
    assert decision.best.tolist() == [120, 0, 120, 120] and decision.confidence.isnan().all()
    visible = decide_from_hidden(*away(hidden, head, torch.tensor([120, 4, 8, 250])), 9, **keywords)
    assert not visible.remask[[0, 1, 3]].any()  # a comparison with NaN is false
    rows = away(torch.full((2, 16), -INF), torch.ones(300, 16), torch.full((2,), 0))
    silent = decide_from_hidden(*rows, 0, **keywords)
    assert silent.best.tolist() == [1, 1] and silent.confidence.isnan().all()  # rows of -inf


@pytest.mark.parametrize("path", ["logits torch", pytest.param("logits triton", marks=needs_triton), *PATHS])
def test_wide_gaps_keep_the_reveal_order(monkeypatch, path):
    gaps = torch.tensor([20.0, 100.0, 0.5, 40.0, 17.5, 3.0])
    logits = torch.full((6, 40), -INF)
    logits[:, 11], logits[:, 30] = 50.0, 50.0 - gaps
    if path.startswith("logits"):
        confidence = decide_from_logits(*away(logits, torch.full((6,), 5)), 5, impl=path.split()[1]).confidence
    else:
        keywords = hidden_paths(monkeypatch, path)
        hidden, head = torch.eye(6, 16), F.pad(logits.T.clamp(min=-1000), (0, 10))
        confidence = decide_from_hidden(*away(hidden, head, torch.full((6,), 5)), 5, **keywords).confidence
    assert confidence.cpu().argsort(descending=True).tolist() == gaps.argsort(descending=True).tolist()
    expected = -torch.exp(-gaps.double()).log1p()
    seen = gaps < 80  # beyond that, exp is a denormal number
    torch.testing.assert_close(confidence.cpu().double()[seen], expected[seen], rtol=1e-6, atol=0)


def strided_views(x):
    """The values of x [B, N, V] behind other strides."""
    wide = torch.full((x.shape[0] * 2, x.shape[1] + 3, x.shape[2] + 5), NAN, dtype=x.dtype, device=x.device)
    wide[::2, 1:-2, 2:-3] = x
    return {
        "sliced": wide[::2, 1:-2, 2:-3],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "expanded": x[:1, :1].expand_as(x),
        "four axes": x.unsqueeze(1).expand(-1, 2, -1, -1),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["sliced", "transposed", "columns", "expanded", "four axes"])
def test_strided_logits(impl, kind):
    x = strided_views(torch.randn(2, 5, 70, device=DEVICE))[kind].requires_grad_()
    tokens = some_tokens("mixed", x[..., 0].numel(), 70, 9).view(x.shape[:-1]).to(DEVICE)
    decision = unchanged(decide_from_logits, x, tokens, 9, impl=impl)
    assert_decision(decision, decide_oracle(x.detach(), tokens, 9), tokens)
    role = torch.randint(-1, 3, x.shape[:-1], device=DEVICE)
    assert_losses(x, tokens, role, (1, 2, 0.5), impl)


@needs_triton
def test_offsets_beyond_two_to_the_31(monkeypatch):
    torch.use_deterministic_algorithms(False)  # else torch.empty would write all 4 GB
    if not GPU:  # the interpreter copies every storage onto itself after a launch
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    try:
        far = torch.empty(2**31 + 2**12, dtype=torch.float16, device=DEVICE).as_strided((3, 1000), (2**30, 1))
    except RuntimeError:
        pytest.skip("no 4 GB of address space")
    far.copy_(torch.randn(3, 1000))
    tokens = torch.full((3,), 500, device=DEVICE)
    decision = decide_from_logits(far, tokens, 500, impl="triton")
    assert_decision(decision, decide_oracle(far, tokens, 500), tokens)
    role = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    total = revision_cross_entropy(far, tokens, role, impl="triton")[0]
    assert total.item() == pytest.approx(F.cross_entropy(far.double(), tokens).item(), rel=1e-5)


def relative(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_three_times_that_of_pytorch(dtype):
    logits = (torch.randn(12, 3000) * 3).to(dtype).to(DEVICE)
    tokens = torch.full((12,), 2999, device=DEVICE)
    exact = torch.tensor([o[1] for o in decide_oracle(logits, tokens, 2999)], dtype=torch.float64, device=DEVICE)
    eager = logits[:, :-1].float().log_softmax(-1).amax(-1)
    ours = decide_from_logits(logits, tokens, 2999, impl="triton").confidence
    assert relative(ours, exact) <= 3 * relative(eager, exact) + 1e-7

    hidden, head = torch.randn(12, 64).to(dtype).to(DEVICE), torch.randn(3000, 64).to(dtype).to(DEVICE)
    products = hidden.double() @ head.double().T
    oracle = decide_oracle(products, tokens, 2999)
    exact = torch.tensor([o[1] for o in oracle], dtype=torch.float64, device=DEVICE)
    eager = (hidden @ head.T)[:, :-1].float().log_softmax(-1).amax(-1)
    ours = decide_from_hidden(hidden, head, tokens, 2999, impl="triton")
    assert relative(ours.confidence, exact) <= 3 * relative(eager, exact) + 1e-7
    assert ours.best.tolist() == [o[0] for o in oracle]

    states = torch.randint(3000, (5, 12), device=DEVICE)
    upstream = torch.randn(12, 64, device=DEVICE).to(dtype)
    leaves = [head.clone().requires_grad_() for _ in range(2)]
    for leaf, impl in zip(leaves, ("torch", "triton")):
        history_sum(states, leaf, impl=impl).backward(upstream)
    exact_leaf = head.double().requires_grad_()
    exact_sum = history_sum(states, exact_leaf, impl="torch")
    exact_sum.backward(upstream.double())
    ours, eager = (history_sum(states, head, impl=impl) for impl in ("triton", "torch"))
    assert relative(ours, exact_sum.detach()) <= 3 * relative(eager, exact_sum.detach()) + 1e-7
    assert relative(leaves[1].grad, exact_leaf.grad) <= 3 * relative(leaves[0].grad, exact_leaf.grad) + 1e-7


def test_bad_arguments_to_decide():
    logits, tokens = torch.zeros(2, 3, 5, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    hidden, head = torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    flags = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    cases = [
        (decide_from_logits, (logits.long(), tokens, 0), "logits"),
        (decide_from_logits, (logits[..., :1], tokens, 0), "logits"),
        (decide_from_logits, (logits, tokens[:1], 0), "tokens"),
        (decide_from_logits, (logits, tokens.float(), 0), "tokens"),
        (decide_from_logits, (logits, tokens, 5), "mask_id"),
        (decide_from_logits, (logits, tokens, -1), "mask_id"),
        (decide_from_logits, (logits, tokens, 0, tokens), "editable"),
        (decide_from_logits, (logits, tokens, 0, flags[:, :2]), "editable"),
        (decide_from_logits, (logits, tokens.to("meta"), 0), "tokens"),
        (decide_from_logits, (logits, tokens, 0, None, "cuda"), "impl"),
        (decide_from_hidden, (hidden, head[0], tokens, 0), "head"),
        (decide_from_hidden, (hidden, head[:, :3], tokens, 0), "hidden"),
        (decide_from_hidden, (hidden, head.double(), tokens, 0), "head"),
        (decide_from_hidden, (hidden.long(), head, tokens, 0), "hidden"),
        (decide_from_hidden, (hidden, head, tokens[0], 0), "tokens"),
        (decide_from_logits, (logits.double(), tokens, 0, None, "triton"), "impl"),
    ]
    if not GPU:  # on a GPU the check would wait for the device
        cases += [
            (decide_from_logits, (logits, tokens + 5, 0), "tokens"),
            (decide_from_logits, (logits, tokens - 1, 0), "tokens"),
            (decide_from_hidden, (hidden, head, tokens + 5, 0), "tokens"),
            (decide_from_hidden, (hidden, head, tokens, 0, None, None, 5), "max_masked"),
        ]
    for function, arguments, name in cases:
        with pytest.raises(ValueError, match=name):
            function(*arguments)


# ---------------------------------------------------------------------------------------------------------------
# Eq. 2


def history_oracle(states, embedding, gamma, rotate):
    """The closed sum in complex float64: the pair (j, j + D/2) is one complex number, R_delta a factor e^(i ...)."""
    table = embedding.double().cpu()
    width, last = table.shape[1], len(states) - 1
    total = torch.zeros(*states.shape[1:], width, dtype=torch.float64)
    for k, state in enumerate(states.cpu()):
        x = table[state.clamp(min=0)] * (state >= 0).unsqueeze(-1)
        if rotate:
            angle = (k - last) * 10000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
            turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
            x = torch.cat([turned.real, turned.imag], -1)
        total += gamma ** (last - k) * x
    return total


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width, rotate", [(2, True), (6, True), (128, True), (128, False), (123, False), (1, False)])
def test_history_step_and_sum_are_the_closed_sum(impl, width, rotate):
    embedding = torch.randn(11, width).to(DEVICE)
    states = torch.randint(11, (5, 2, 20)).to(DEVICE)
    for gamma in (0, 0.9, 1):
        a = None
        for t in range(len(states)):
            a, read = unchanged(history_step, a, states[t], embedding, gamma, rotate, impl=impl)
            exact = history_oracle(states[: t + 1], embedding, gamma, rotate)
            torch.testing.assert_close(a.cpu().double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(read.cpu().double(), rms(exact), rtol=1e-5, atol=1e-5)
        closed = unchanged(history_sum, states, embedding, gamma, rotate, impl=impl)
        torch.testing.assert_close(closed.cpu().double(), rms(exact), rtol=1e-5, atol=1e-5)
        plain = history_sum(states.int(), embedding, gamma, rotate, normalize=False, impl=impl)
        torch.testing.assert_close(plain.cpu().double(), exact, rtol=1e-5, atol=1e-5)
        _, read = history_step(a, states[0].int(), embedding, gamma, rotate, normalize=False, impl=impl)
        exact = history_oracle(torch.cat([states, states[:1]]), embedding, gamma, rotate)
        torch.testing.assert_close(read.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_history_after_100_steps(impl):
    embedding, states = torch.randn(7, 16).to(DEVICE), torch.randint(7, (100, 3)).to(DEVICE)
    for gamma in (0.9, 1.0):
        a = None
        for state in states:
            a, read = history_step(a, state, embedding, gamma, impl=impl)
        exact = history_oracle(states, embedding, gamma, True)
        assert relative(a.cpu(), exact) < 1e-5 and relative(read.cpu(), rms(exact)) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_rotation_backwards_is_the_inverse(impl):
    # Embedding 0 is zero, so one step with gamma 1 is R_(-1); turning the exact sum forwards gives the start again.
    embedding = torch.zeros(1, 10, device=DEVICE)
    a = torch.randn(4, 10).to(DEVICE)
    back, _ = history_step(a, torch.zeros(4, dtype=torch.int64, device=DEVICE), embedding, 1.0, impl=impl)
    angle = torch.tensor([10000 ** (-2 * j / 10) for j in range(5)], dtype=torch.float64)
    turned = torch.complex(*back.cpu().double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(torch.cat([turned.real, turned.imag], -1), a.cpu().double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_history_in_16_bits_keeps_its_sum_in_32(impl, dtype):
    embedding, states = torch.randn(9, 24).to(dtype).to(DEVICE), torch.randint(9, (6, 4)).to(DEVICE)
    a = None
    for state in states:
        a, read = history_step(a, state, embedding, impl=impl)
    exact = history_oracle(states, embedding, 0.9, True)
    assert a.dtype == torch.float32 and relative(a.cpu(), exact) < 1e-6
    assert read.dtype == dtype and relative(read.cpu(), rms(exact)) < 4e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_absent_states_add_nothing(impl):
    embedding, states = torch.randn(9, 8).to(DEVICE), torch.randint(9, (4, 6)).to(DEVICE)
    states[:2, :3] = -1
    states[:, 5] = -1
    out = history_sum(states, embedding, impl=impl)
    torch.testing.assert_close(out[:3], history_sum(states[2:, :3], embedding, impl=impl))
    assert (out[5] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [3, 50])  # indicator product, and scattered additions
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width, rotate, gamma", [(6, True, 0.9), (6, True, 1.0), (5, False, 0.5), (6, True, 0.0)])
def test_history_gradient(impl, vocabulary, normalize, width, rotate, gamma):
    states = torch.randint(vocabulary, (4, 5, 3))
    states[0, 0], states[:, 1] = -1, 1  # absent states, and one token everywhere
    weight, upstream = torch.randn(vocabulary, width).double(), torch.randn(5, 3, width).double()
    # Oracle: central differences of the complex closed sum, one embedding entry at a time.
    expected = torch.zeros_like(weight)
    for v in range(min(vocabulary, 3)):
        for d in range(width):
            ends = []
            for sign in (1, -1):
                moved = weight.clone()
                moved[v, d] += sign * 1e-6
                total = history_oracle(states, moved, gamma, rotate)
                ends.append(((rms(total) if normalize else total) * upstream).sum())
            expected[v, d] = (ends[0] - ends[1]) / 2e-6
    embedding = weight.float().to(DEVICE).requires_grad_()
    out = unchanged(history_sum, states.to(DEVICE), embedding, gamma, rotate, normalize, impl=impl)
    out.backward(upstream.float().to(DEVICE))
    torch.testing.assert_close(embedding.grad[:3].cpu().double(), expected[:3], rtol=1e-4, atol=1e-4)


def test_history_gradcheck():
    embedding = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    states = torch.randint(-1, 4, (3, 5))
    assert torch.autograd.gradcheck(lambda e: history_sum(states, e, impl="torch"), embedding)


@pytest.mark.parametrize("impl", IMPLS)
def test_history_strided_embedding_and_nan(impl):
    embedding = torch.randn(8, 9).to(DEVICE).T[:, ::2]  # [9, 4]
    tokens = torch.arange(9, device=DEVICE)
    new, _ = history_step(None, tokens, embedding, impl=impl)
    assert torch.equal(new, embedding)
    past = torch.zeros(9, 4, device=DEVICE)
    past[3, 1] = NAN
    new, read = history_step(past, tokens, embedding, impl=impl)
    assert new[3].isnan().any() and read[3].isnan().all() and not read[torch.arange(9) != 3].isnan().any()


def test_bad_arguments_to_history():
    embedding, tokens = torch.zeros(5, 4, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    a = torch.zeros(2, 3, 4, device=DEVICE)
    cases = [
        (history_step, (None, tokens, embedding[:, :3]), "embedding"),  # odd D
        (history_step, (None, tokens, embedding[0]), "embedding"),
        (history_step, (None, tokens, embedding.long()), "embedding"),
        (history_step, (None, tokens.float(), embedding), "tokens"),
        (history_step, (None, tokens, embedding, 1.5), "gamma"),
        (history_step, (a[:1], tokens, embedding), "a must"),
        (history_step, (a.double(), tokens, embedding), "a must"),
        (history_step, (a.half(), tokens, embedding.half()), "a must"),
        (history_step, (a, tokens, embedding, 0.9, True, True, "gpu"), "impl"),
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


# ---------------------------------------------------------------------------------------------------------------
# The three losses


def assert_losses(inputs, target, role, weights, impl, head=None, upstream=2.5, rtol=1e-5):
    """Values and gradients against masked F.cross_entropy calls in float64, one a role."""
    leaves = [x.detach().double().requires_grad_() for x in ([inputs] if head is None else [inputs, head])]
    logits = leaves[0] if head is None else leaves[0] @ leaves[1].T
    number = max(1, int((role != IGNORE).sum()))
    exact = [
        F.cross_entropy(logits[role == kind], target[role == kind].long(), reduction="sum") / number
        for kind in (REVEAL, REMASK, KEEP)
    ]
    (sum(w * part for w, part in zip(weights, exact)) * upstream).backward()
    mine = [x.detach().requires_grad_(x.requires_grad) for x in ([inputs] if head is None else [inputs, head])]
    total, *parts = unchanged(
        revision_cross_entropy, mine[0], target, role, weights, **({} if head is None else {"head": mine[1]}), impl=impl
    )
    tolerance = {"rtol": rtol, "atol": rtol / 10}
    for x, y in zip(parts, exact):
        assert x.ndim == 0 and not x.requires_grad
        torch.testing.assert_close(x.double(), y.detach(), **tolerance)
    weighted = sum(w * y.detach() for w, y in zip(weights, exact))
    torch.testing.assert_close(total.detach().double(), weighted, **tolerance)
    if any(x.requires_grad for x in mine):
        (total * upstream).backward()
    for x, y in zip(mine, leaves):
        assert (x.grad is not None) == x.requires_grad
        if x.requires_grad:
            assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
            torch.testing.assert_close(x.grad.double(), y.grad, **tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [2, 10, 127, 5000])
def test_losses_from_logits(impl, vocabulary):
    for shape in [(1,), (2, 5)] if vocabulary < 5000 else [(3,)]:
        logits = (torch.randn(*shape, vocabulary) * 3).to(DEVICE).requires_grad_()
        target, role = torch.randint(vocabulary, shape), torch.randint(-1, 3, shape)
        for weights in ((1, 1, 1), (1, 0, 0.25)):
            assert_losses(logits, *away(target, role), weights, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunk", [4, 2048])
def test_losses_from_hidden_states(monkeypatch, impl, chunk):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 0)
    target, role = away(torch.randint(37, (3, 5)), torch.randint(-1, 3, (3, 5)))
    for to_hidden, to_head in ((True, True), (True, False), (False, True), (False, False)):
        hidden = torch.randn(5, 3, 6).to(DEVICE).transpose(0, 1).requires_grad_(to_hidden)
        head = torch.randn(6, 37).to(DEVICE).T.requires_grad_(to_head)
        assert_losses(hidden, target.int(), role.int(), (1, 2, 0.5), impl, head=head)


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_of_empty_roles(impl):
    logits, hidden, head = torch.randn(6, 9).to(DEVICE), torch.randn(6, 4).to(DEVICE), torch.randn(9, 4).to(DEVICE)
    target = torch.randint(9, (6,)).to(DEVICE)
    for kind in (REVEAL, REMASK, KEEP, IGNORE):
        role = torch.full((6,), kind, device=DEVICE)
        assert_losses(logits.clone().requires_grad_(), target, role, (1, 1, 1), impl)
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        assert_losses(leaves[0], target, role, (1, 1, 1), impl, head=leaves[1])
    nothing = torch.full((6,), IGNORE, device=DEVICE)
    assert [x.item() for x in revision_cross_entropy(logits, target, nothing, impl=impl)] == [0, 0, 0, 0]
    # An ignored row is not read, and its target may be anything.
    logits[2], role[:] = NAN, KEEP
    role[2], target[2] = IGNORE, -100
    assert not revision_cross_entropy(logits, target, role, impl=impl)[0].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_propagate_nan_and_infinity_as_torch(impl):
    rows = [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [0.0, INF, 1.0], [INF, INF, 0.0]]
    rows += [[-INF, -INF, -INF], [-INF, 0.0, 1.0], [1.0, -INF, 0.0]]
    target, role = away(torch.tensor([1]), torch.tensor([KEEP]))
    for row in rows:
        mine, theirs = (torch.tensor([row], device=DEVICE, requires_grad=True) for _ in range(2))
        total, exact = revision_cross_entropy(mine, target, role, impl=impl)[0], F.cross_entropy(theirs, target)
        torch.testing.assert_close(total, exact, equal_nan=True)
        total.backward()
        exact.backward()
        torch.testing.assert_close(mine.grad, theirs.grad, equal_nan=True)
        one, head = torch.ones(1, 1, device=DEVICE), torch.tensor(row, device=DEVICE)[:, None]
        through = revision_cross_entropy(one, target, role, head=head, impl=impl)
        torch.testing.assert_close(through[0], exact.detach(), equal_nan=True)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_16_bits(dtype):
    target, role = away(torch.randint(50, (12,)), torch.randint(-1, 3, (12,)))
    logits = torch.randn(12, 50).to(dtype).to(DEVICE)
    hidden, head = torch.randn(12, 16).to(dtype).to(DEVICE), torch.randn(50, 16).to(dtype).to(DEVICE)

    def gradients(tensors, impl):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        if impl == "eager":
            x = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T
            wide = x if x.dtype == torch.float64 else x.float()
            total = F.cross_entropy(wide[role >= 0], target[role >= 0])
        else:
            head = leaves[1] if leaves[1:] else None
            total = revision_cross_entropy(leaves[0], target, role, head=head, impl=impl)[0]
        total.backward()
        return [total.detach(), *(x.grad for x in leaves)]

    for tensors in ((logits,), (hidden, head)):
        exact = gradients([x.double() for x in tensors], "eager")
        eager = gradients(tensors, "eager")
        for impl in ("torch", "triton"):
            for ours, theirs, truth in zip(gradients(tensors, impl), eager, exact):
                assert relative(ours, truth) <= 3 * relative(theirs, truth) + 2e-7


def test_losses_gradcheck():
    target, role = torch.randint(5, (4,)), torch.tensor([REVEAL, KEEP, IGNORE, REMASK])
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = (1, 0.5, 2)
    assert torch.autograd.gradcheck(lambda x: revision_cross_entropy(x, target, role, weights)[0], logits)
    assert torch.autograd.gradcheck(lambda h, w: revision_cross_entropy(h, target, role, weights, w)[0], (hidden, head))


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_gives_the_same(impl):
    target, role = away(torch.randint(9, (6,)), torch.randint(0, 3, (6,)))
    hidden, head = (torch.randn(n, 4, device=DEVICE).requires_grad_() for n in (6, 9))
    total = revision_cross_entropy(hidden, target, role, head=head, impl=impl)[0]
    first, again = (torch.autograd.grad(total, (hidden, head), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again))


def test_bad_arguments_to_losses():
    logits, target = torch.zeros(2, 3, 5, device=DEVICE), torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    hidden, head = torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    cases = [
        ((logits.int(), target, target), "logits"),
        ((logits, target[0], target), "target"),
        ((logits, target, target[0]), "role"),
        ((logits, target.float(), target), "target"),
        ((logits, target, target.bool()), "role"),
        ((logits, target, target, (1, 1)), "weights"),
        ((hidden, target, target, (1, 1, 1), head[:, :3]), "head"),
        ((hidden, target, target, (1, 1, 1), head.double()), "head"),
        ((logits, target.to("meta"), target), "target"),
        ((logits, target, target, (1, 1, 1), None, "fast"), "impl"),
    ]
    if not GPU:
        cases += [((logits, target + 5, target), "target"), ((logits, target, target + 3), "role")]
    for arguments, name in cases:
        with pytest.raises(ValueError, match=name):
            revision_cross_entropy(*arguments)


# ---------------------------------------------------------------------------------------------------------------
# Where it runs


def test_import_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "assert kernels.triton is None and 'PyTorch' in kernels.which_path('cpu')\n"
        "logits, tokens = torch.eye(3), torch.tensor([2, 2, 0])\n"
        "assert kernels.decide_from_logits(logits, tokens, 2).following.tolist() == [0, 1, 2]\n"
        "try: kernels.decide_from_logits(logits, tokens, 2, impl='triton')\n"
        "except ValueError as error: assert 'triton' in str(error)\n"
        "else: raise SystemExit('impl=triton was accepted')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@needs_triton
def test_impl_none_is_torch_on_cpu(monkeypatch):
    assert not kernels.use_triton(None, torch.zeros(1)) and "PyTorch" in kernels.which_path("cpu")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl"):
        decide_from_logits(torch.zeros(1, 3), torch.tensor([0]), 2, impl="triton")


def test_benchmark_smoke(tmp_path):
    out = tmp_path / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "kernels.py", "--smoke", "--json", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert out.exists() and "history_step" in run.stdout


@needs_gpu
def test_compile_full_graph_and_cuda_graph_and_stream():
    mask_id, vocabulary, width = 9, 3000, 64
    tokens = some_tokens("mixed", 512, vocabulary, mask_id).cuda()
    hidden, head = torch.randn(512, width, device="cuda"), torch.randn(vocabulary, width, device="cuda")
    logits, role = hidden @ head.T, torch.randint(-1, 3, (512,), device="cuda")

    def turn():
        a, read = history_step(hidden, tokens, head)
        return (
            *decide_from_logits(logits, tokens, mask_id),
            *decide_from_hidden(hidden, head, tokens, mask_id, max_masked=512),
            a, read, history_sum(tokens[None], head), *revision_cross_entropy(logits, tokens, role),
        )  # fmt: skip

    expected = turn()
    for got in (torch.compile(turn, fullgraph=True)(),):
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = turn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = turn()
    graph.replay()
    torch.cuda.synchronize()
    for x, y, z in zip(expected, aside, captured):
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(x, z)
