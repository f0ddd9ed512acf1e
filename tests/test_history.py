"""History Reference against explicit rotation matrices, plain loops and closed forms."""

import math

import pytest
import torch

import kernels
from history import ABSENT, HistoryReference, history_embedding, rotate_pairs

WIDTH = 8
variants = pytest.mark.parametrize(
    "gamma, rotate", [(0.0, False), (1.0, False), (0.8, False), (0.8, True)], ids=["rm", "hr", "decay", "full"]
)
# vocabulary, batch, length: few cells take the lookups, many cells with few tokens the indicator product
sizes = pytest.mark.parametrize("size", [(11, 2, 3), (3, 4, 60)], ids=["lookups", "indicators"])


def random_case(turns, size, absent=True):
    """(states with ABSENT in the oldest turns, embedding in float64)."""
    vocabulary, batch, length = size
    generator = torch.Generator().manual_seed(turns)
    states = torch.randint(vocabulary, (turns, batch, length), generator=generator)
    for b in range(batch if absent else 0):
        states[: min(b, turns - 1), b] = ABSENT
    return states, torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64)


def rotation_matrix(width, delta):
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for j in range(width // 2):
        angle = delta * 10000 ** (-2 * j / width)
        matrix[j, j] = matrix[j + width // 2, j + width // 2] = math.cos(angle)
        matrix[j + width // 2, j], matrix[j, j + width // 2] = math.sin(angle), -math.sin(angle)
    return matrix


def sum_by_matrices(states, embedding, gamma, rotate, normalize):
    """Eq. 2 as it is written: one matrix a term, then the norm."""
    t, width = len(states) - 1, embedding.shape[1]
    out = torch.zeros(*states.shape[1:], width, dtype=torch.float64)
    matrices = [rotation_matrix(width, (k - t) if rotate else 0) for k in range(t + 1)]
    for b in range(states.shape[1]):
        for n in range(states.shape[2]):
            for k in range(t + 1):
                token = int(states[k, b, n])
                if token != ABSENT:
                    out[b, n] += gamma ** (t - k) * (matrices[k] @ embedding[token])
            if normalize:
                out[b, n] /= math.sqrt(sum(v * v for v in out[b, n].tolist()) / width + 1e-6)
    return out


def test_rotation_turns_pair_j_with_j_plus_half_by_its_own_frequency():
    x = torch.eye(4, dtype=torch.float64)
    quarter = math.pi / 2
    torch.testing.assert_close(rotate_pairs(x[0], quarter), x[2])  # pair (0, 2): frequency 1
    torch.testing.assert_close(rotate_pairs(x[1], 100 * quarter), x[3])  # pair (1, 3): frequency 1/100
    torch.testing.assert_close(rotate_pairs(x[2], quarter), -x[0])


@pytest.mark.parametrize("a, b", [(1, 2), (-3, 0.5), (40, -41)])
def test_rotation_composes_inverts_and_is_orthogonal(a, b):
    x, y = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate_pairs(rotate_pairs(x, b), a), rotate_pairs(x, a + b))
    torch.testing.assert_close(rotate_pairs(rotate_pairs(x, a), -a), x)
    torch.testing.assert_close((rotate_pairs(x, a) * rotate_pairs(y, a)).sum(-1), (x * y).sum(-1))
    torch.testing.assert_close((rotate_pairs(x, a) * y).sum(-1), (x * rotate_pairs(y, -a)).sum(-1))
    torch.testing.assert_close(rotate_pairs(x, a), x @ rotation_matrix(WIDTH, a).T)


@sizes
@variants
@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_closed_sum_equals_equation_2_with_explicit_matrices(gamma, rotate, turns, normalize, size):
    states, embedding = random_case(turns, size)
    got = history_embedding(states, embedding, gamma, rotate, normalize)
    torch.testing.assert_close(got, sum_by_matrices(states, embedding, gamma, rotate, normalize))


@sizes
@variants
def test_recurrence_equals_closed_sum_over_50_turns(gamma, rotate, size):
    states, embedding = random_case(50, size, absent=False)
    history = HistoryReference(embedding, gamma, rotate)
    for t in range(50):
        closed = history_embedding(states[: t + 1], embedding, gamma, rotate)
        torch.testing.assert_close(history.push(states[t]), closed, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
@sizes
@variants
def test_triton_and_torch_give_the_same(gamma, rotate, size):
    states, embedding = random_case(4, size)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # compiled kernels there, Triton's interpreter here
    states, embedding = states.to(device), embedding.float().to(device)
    results, gradients = [], []
    for impl in ("torch", "triton"):
        leaf = embedding.clone().requires_grad_()
        results.append(history_embedding(states, leaf, gamma, rotate, impl=impl))
        gradients.append(torch.autograd.grad(results[-1].sin().sum(), leaf)[0])
        history = HistoryReference(embedding, gamma, rotate, impl=impl)
        for state in states.clamp(min=0):
            last = history.push(state)
        results.append(last)
    torch.testing.assert_close(results[:2], results[2:])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@variants
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float32, 0, 1e-5), (torch.bfloat16, 2**-8, 1e-5)])
def test_recurrence_does_not_drift_from_float64_in_100_turns(gamma, rotate, dtype, rtol, atol):
    states, embedding = random_case(100, (11, 2, 3), absent=False)
    embedding = embedding.to(dtype)
    history = HistoryReference(embedding, gamma, rotate)
    for state in states:
        last = history.push(state)
    assert last.dtype == dtype
    exact = history_embedding(states, embedding.double(), gamma, rotate)
    torch.testing.assert_close(last.double(), exact, rtol=rtol, atol=atol)


@sizes
def test_gamma_zero_reads_the_current_embedding_alone(size):
    states, embedding = random_case(4, size)
    got = history_embedding(states, embedding, gamma=0, normalize=False)
    assert torch.equal(got, embedding[states[-1]])


@sizes
def test_absent_states_add_nothing(size):
    states, embedding = random_case(4, size, absent=False)
    padded = torch.cat([torch.full_like(states[:2], ABSENT), states])
    torch.testing.assert_close(history_embedding(padded, embedding), history_embedding(states, embedding))
    nothing = history_embedding(torch.full_like(states, ABSENT), embedding)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("size", [(5, 1, 3), (2, 2, 4)], ids=["lookups", "indicators"])
@variants
def test_gradient_reaches_the_embedding(gamma, rotate, size):
    states, embedding = random_case(3, size)
    states[:, 0, 0] = 1  # a token that repeats
    embedding.requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: history_embedding(states, weight, gamma, rotate), embedding)


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])])
def test_keep_drops_the_finished_sequences(rows):
    states, embedding = random_case(3, (5, 4, 6), absent=False)
    history = HistoryReference(embedding)
    history.push(states[0])
    history.push(states[1])
    history.keep(rows)
    got = history.push(states[2][rows])
    torch.testing.assert_close(got, history_embedding(states[:, rows], embedding))


def test_reset_forgets_and_allows_another_shape():
    _, embedding = random_case(1, (5, 1, 1))
    history = HistoryReference(embedding, normalize=False)
    history.push(torch.tensor([[1, 2, 3]]))
    history.reset()
    assert torch.equal(history.push(torch.tensor([[4], [0]])), embedding[torch.tensor([[4], [0]])])


def wrong_push(tokens):
    history = HistoryReference(torch.randn(5, 4))
    history.push(torch.zeros(2, 3, dtype=torch.long))
    history.push(tokens)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rotate_pairs(torch.randn(2, 5), 1),
        lambda: history_embedding(torch.zeros(2, 1, 1, dtype=torch.long), torch.randn(3, 5)),  # odd width
        lambda: history_embedding(torch.zeros(1, 1, 1, dtype=torch.long), torch.randn(3, 4), gamma=1.01),
        lambda: HistoryReference(torch.randn(3, 4), gamma=-0.1),
        lambda: HistoryReference(torch.randn(3, 4), gamma=math.nan),
        lambda: HistoryReference(torch.randn(3)),
        lambda: history_embedding(torch.zeros(2, 3, dtype=torch.long), torch.randn(3, 4)),
        lambda: history_embedding(torch.zeros(0, 2, 3, dtype=torch.long), torch.randn(3, 4)),
        lambda: wrong_push(torch.zeros(1, 3, dtype=torch.long)),
        lambda: wrong_push(torch.zeros(2, 4, dtype=torch.long)),
        lambda: wrong_push(torch.full((2, 3), 5)),
        lambda: history_embedding(torch.full((1, 4, 40), 3), torch.randn(3, 4)),
        lambda: history_embedding(torch.full((1, 1, 1), 3), torch.randn(3, 4)),
    ],
)
def test_bad_input_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()
