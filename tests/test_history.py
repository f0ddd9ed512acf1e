"""History Reference against explicit rotation matrices, plain loops and closed forms."""

import math

import pytest
import torch

import kernels
from history import ABSENT, HistoryReference, history_embedding, rotate_pairs

WIDTH = 8
VARIANTS = {"rm": (0.0, False), "hr": (1.0, False), "decay": (0.8, False), "full": (0.8, True)}
variants = pytest.mark.parametrize("gamma, rotate", VARIANTS.values(), ids=VARIANTS)
# vocabulary, batch, length: few cells take the lookups, many cells with few tokens the indicators
SIZES = {"lookups": (11, 2, 3), "indicators": (3, 4, 60)}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


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
        k = j + width // 2
        angle = delta * 10000 ** (-2 * j / width)
        matrix[j, j] = matrix[k, k] = math.cos(angle)
        matrix[k, j], matrix[j, k] = math.sin(angle), -math.sin(angle)
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
    torch.testing.assert_close(rotate_pairs(x[1], 100 * quarter), x[3])  # (1, 3): 1/100
    torch.testing.assert_close(rotate_pairs(x[2], quarter), -x[0])
    ages = torch.tensor([[-41.0], [0.5], [1000.0]], dtype=torch.float64)
    matrices = [rotation_matrix(4, age) @ x[1] for age in ages.flatten()]
    torch.testing.assert_close(rotate_pairs(x[1].expand(3, 4), ages), torch.stack(matrices))


@sizes
@variants
@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_closed_sum_equals_equation_2_with_explicit_matrices(gamma, rotate, turns, normalize, size):
    states, embedding = random_case(turns, size)
    got = history_embedding(states, embedding, gamma, rotate, normalize)
    expected = sum_by_matrices(states, embedding, gamma, rotate, normalize)
    torch.testing.assert_close(got, expected)


@sizes
@variants
def test_recurrence_equals_closed_sum_over_50_turns(gamma, rotate, size):
    states, embedding = random_case(50, size, absent=False)
    history = HistoryReference(embedding, gamma, rotate)
    for t in range(50):
        closed = history_embedding(states[: t + 1], embedding, gamma, rotate)
        torch.testing.assert_close(history.push(states[t]), closed, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
@variants
def test_triton_and_torch_give_the_same(gamma, rotate):
    states, embedding = random_case(4, SIZES["lookups"])
    device = "cuda" if torch.cuda.is_available() else "cpu"  # compiled there, interpreted here
    states, embedding = states.to(device), embedding.float().to(device)
    results, gradients = [], []
    for impl in ("torch", "triton"):
        leaf = embedding.clone().requires_grad_()
        results.append(history_embedding(states, leaf, gamma, rotate, impl=impl))
        gradients.append(torch.autograd.grad(results[-1].sin().sum(), leaf)[0])
        history = HistoryReference(embedding, gamma, rotate, impl=impl)
        results.append([history.push(state) for state in states.clamp(min=0)])
    torch.testing.assert_close(results[:2], results[2:])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@variants
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 0), (torch.bfloat16, 2**-8)])
def test_recurrence_does_not_drift_from_float64_in_100_turns(gamma, rotate, dtype, rtol):
    states, embedding = random_case(100, (11, 2, 3), absent=False)
    embedding = embedding.to(dtype)
    history = HistoryReference(embedding, gamma, rotate)
    for state in states:
        last = history.push(state)
    assert last.dtype == dtype
    exact = history_embedding(states, embedding.double(), gamma, rotate)
    torch.testing.assert_close(last.double(), exact, rtol=rtol, atol=1e-5)


@sizes
def test_gamma_zero_reads_the_current_embedding_alone_and_absent_states_add_nothing(size):
    states, embedding = random_case(4, size, absent=False)
    current = history_embedding(states, embedding, gamma=0, normalize=False)
    assert torch.equal(current, embedding[states[-1]])
    padded = torch.cat([torch.full_like(states[:2], ABSENT), states])
    expected = history_embedding(states, embedding)
    torch.testing.assert_close(history_embedding(padded, embedding), expected)
    assert not history_embedding(torch.full_like(states, ABSENT), embedding).any()


@pytest.mark.parametrize("size", [(5, 1, 3), (2, 2, 4)], ids=SIZES)
@variants
def test_gradient_reaches_the_embedding(gamma, rotate, size):
    states, embedding = random_case(3, size)
    states[:, 0, 0] = 1  # a token that repeats
    embedding.requires_grad_()
    read = lambda weight: history_embedding(states, weight, gamma, rotate)
    assert torch.autograd.gradcheck(read, embedding)


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])])
def test_keep_drops_the_finished_sequences_and_reset_forgets(rows):
    states, embedding = random_case(3, (5, 4, 6), absent=False)
    history = HistoryReference(embedding)
    history.push(states[0])
    history.push(states[1])
    history.keep(rows)
    got = history.push(states[2][rows])
    torch.testing.assert_close(got, history_embedding(states[:, rows], embedding))
    history.reset()
    other = torch.tensor([[4], [0]])  # of another shape
    torch.testing.assert_close(history.push(other), history_embedding(other[None], embedding))


IDS = torch.zeros(2, 2, 3, dtype=torch.long)  # two states


def push_after(tokens):
    history = HistoryReference(torch.randn(5, 4))
    history.push(IDS[0])
    history.push(tokens)


BAD = {
    "x of odd width": lambda: rotate_pairs(torch.randn(2, 5), 1),
    "embedding of odd width": lambda: history_embedding(IDS, torch.randn(3, 5)),
    "gamma above 1": lambda: history_embedding(IDS, torch.randn(3, 4), gamma=1.01),
    "gamma below 0": lambda: HistoryReference(torch.randn(3, 4), gamma=-0.1),
    "gamma NaN": lambda: HistoryReference(torch.randn(3, 4), gamma=math.nan),
    "embedding of one axis": lambda: HistoryReference(torch.randn(3)),
    "states of two axes": lambda: history_embedding(IDS[0], torch.randn(3, 4)),
    "states, none": lambda: history_embedding(IDS[:0], torch.randn(3, 4)),
    "states of no token, lookups": lambda: history_embedding(IDS + 3, torch.randn(3, 4)),
    "states of no token, indicators": lambda: history_embedding(IDS + 1, torch.randn(1, 4)),
    "tokens of another batch": lambda: push_after(IDS[0, :1]),
    "tokens of another length": lambda: push_after(IDS[0, :, :2]),
    "tokens out of range": lambda: push_after(IDS[0] + 5),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_a_value_error_that_names_the_argument(what):
    with pytest.raises(ValueError, match=what.split()[0].strip(",")):
        BAD[what]()
