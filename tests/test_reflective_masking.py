"""The algorithm against plain Python loops, closed forms and cases written by hand; its files."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from itertools import groupby, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import reflective_masking as rm
from history import ABSENT, HistoryReference
from reflective_masking import CYCLE, FIXED_POINT, IGNORE, KEEP, OUT_OF_TURNS, REMASK, REVEAL

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels compiled there, interpreted here
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
impls = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
M = 0  # MASK, where a test does not choose another
INF, NAN = math.inf, math.nan


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def assert_counts_fit(counts, probabilities):
    """Pearson's chi-square at about 1 in 100,000 (Wilson and Hilferty); the support exactly."""
    assert set(counts) == set(probabilities)
    total, df = sum(counts.values()), len(probabilities) - 1
    assert math.isclose(sum(probabilities.values()), 1)
    chi2 = sum((counts[key] - total * p) ** 2 / (total * p) for key, p in probabilities.items())
    assert chi2 < df * (1 - 2 / (9 * df) + 4.26 * math.sqrt(2 / (9 * df))) ** 3


# ------------------------------------------------------------------------------------- the network


def shaken_model(positions="both", coordinates=None, tables=1.0):
    """A model of 8 positions with every weight random; tables scales those of places."""
    sizes = dict(width=16, layers=1, heads=2, feed_forward=32)
    config = rm.TransformerConfig(6, 8, **sizes, positions=positions, coordinates=coordinates)
    model = rm.MaskDiffusionTransformer(config).double()
    generator = seeded(0)
    for name, parameter in model.named_parameters():
        if not name.startswith("position"):
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    for table in model.position:  # the same places wherever the coordinates begin
        table.data = torch.randn(9, 16, generator=seeded(2)).double() * tables
    return model


def test_learned_reads_places_both_reads_offsets_too():
    def logits(positions, down=0, right=0, swap=False, tables=1.0):
        grid = [[y + down, x + right] for y in range(2) for x in range(4)]
        grid = [[x, y] for y, x in grid] if swap else grid
        x = torch.randn(2, 8, 16, generator=seeded(1)).double()
        return shaken_model(positions, grid, tables)(x)

    still = logits("both", tables=0)  # on a grid: the first two coordinates turn
    assert torch.allclose(still, logits("both", 3, 5, tables=0), atol=1e-4)
    assert not torch.allclose(still, logits("both", swap=True, tables=0), atol=1e-2)
    assert not torch.allclose(logits("both"), logits("both", 3, 5), atol=1e-2)
    assert not torch.allclose(logits("both"), logits("learned"), atol=1e-2)

    words = torch.randn(1, 5, 16, dtype=torch.float64, generator=seeded(1))
    silence = torch.zeros(1, 3, 16).double()  # zeros: no key, no value
    early, late = torch.cat([words, silence], 1), torch.cat([silence, words], 1)
    for positions, tables, same in (("both", 0, True), ("both", 1, False), ("learned", 1, False)):
        model = shaken_model(positions, None, tables)
        assert torch.allclose(model(early)[:, :5], model(late)[:, 3:]) == same
    model = shaken_model("both", None, tables=0)
    assert not torch.allclose(model(words.flip(1)).flip(1), model(words))  # backwards differs


def test_relation_bias_sees_only_which_coordinates_are_shared():
    grid = [[i // 4, i % 4] for i in range(8)]
    model = shaken_model("learned", grid, tables=0)
    x = torch.randn(1, 8, 16, dtype=torch.float64, generator=seeded(1))
    swap_columns = [1, 0, 2, 3, 5, 4, 6, 7]
    assert torch.allclose(model(x)[:, swap_columns], model(x[:, swap_columns]))
    swap_cells = [1, 0, 2, 3, 4, 5, 6, 7]  # breaks the columns
    assert not torch.allclose(model(x)[:, swap_cells], model(x[:, swap_cells]))


def test_sudoku_network_has_the_paper_size():
    cells = [[i // 9, i % 9, i // 27 * 3 + i % 9 // 3] for i in range(81)]
    config = rm.TransformerConfig(vocabulary=10, length=81, coordinates=cells)
    model = rm.MaskDiffusionTransformer(config)
    assert 780_000 < sum(p.numel() for p in model.parameters()) <= 810_000
    assert model(torch.randn(2, 81, 128)).shape == (2, 81, 10)


# ------------------------------------------------------------------------------------ Eq. 1: decide


def decide_by_loop(
    logits, tokens, mask, editable=None, limit=None, allow_remask=True, allow_reveal=True
):
    """Eq. 1 for one sequence, in lists of Python floats."""
    out, reveals = list(tokens), []
    for i, (row, token) in enumerate(zip(logits, tokens)):
        if editable is not None and not editable[i]:
            continue
        others = [v for v in range(len(row)) if v != mask]
        if token != mask:
            if allow_remask and row[mask] > row[token]:
                out[i] = mask
        elif allow_reveal:
            best = max(others, key=lambda v: (row[v], -v))
            doubt = sum(math.exp(row[v] - row[best]) for v in others if v != best)
            reveals.append((doubt, i, best))
    for _, i, best in sorted(reveals)[:limit]:
        out[i] = best
    return out


@pytest.mark.parametrize("mask", [0, 2, 4])
@pytest.mark.parametrize("locks", ["free", "prompt", "each its own"])
@pytest.mark.parametrize("flags", list(product([True, False], repeat=2)))
def test_decide_equals_a_loop_with_many_ties(mask, locks, flags):
    generator = seeded(mask)
    logits = torch.randint(3, (40, 7, 5), generator=generator).float()
    tokens = torch.randint(5, (40, 7), generator=generator)
    tokens[0], tokens[1] = mask, (mask + 1) % 5  # all masked; nothing masked
    own = torch.rand(40, 7, generator=generator) < 0.5
    editable = {"free": None, "prompt": torch.arange(7) > 2}.get(locks, own)
    before = tokens.clone(), logits.clone()
    got = rm.decide(logits, tokens, mask, editable, allow_remask=flags[0], allow_reveal=flags[1])
    assert torch.equal(tokens, before[0]) and torch.equal(logits, before[1])
    free = torch.ones(40, 7) if editable is None else editable.expand(40, 7)
    cases = zip(*(x.tolist() for x in (logits, tokens, free, got)))
    for row, state, may_change, after in cases:
        assert after == decide_by_loop(row, state, mask, may_change, None, *flags)


@pytest.mark.parametrize("reveal", [0, 1, 3, 99, torch.arange(40) % 5], ids=str)
@pytest.mark.parametrize("mask", [0, 4])
def test_decide_reveals_the_most_confident_up_to_the_limit(mask, reveal):
    generator = seeded(3)
    logits = torch.randn(40, 7, 5, generator=generator)
    tokens = torch.where(torch.rand(40, 7, generator=generator) < 0.6, mask, 1)
    editable = torch.rand(40, 7, generator=generator) < 0.8
    got = rm.decide(logits, tokens, mask, editable, reveal)
    limits = torch.as_tensor(reveal).expand(40).tolist()
    cases = zip(*(x.tolist() for x in (logits, tokens, editable, got)), limits)
    for row, state, may_change, after, limit in cases:
        assert after == decide_by_loop(row, state, mask, may_change, limit)


@pytest.mark.parametrize("mask_logit", [-50.0, 50.0])
def test_reveal_order_survives_gaps_where_probabilities_are_one(mask_logit):
    gaps = torch.tensor([20.0, 100.0, 3.0, 40.0])
    logits = torch.stack([torch.full((4,), mask_logit), gaps, torch.zeros(4)], -1).unsqueeze(0)
    logits[0, 2, 0] = -mask_logit  # MASK's own logit says nothing about which token it is
    tokens = torch.zeros(1, 4, dtype=torch.long)
    in_order = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
    for limit, expected in enumerate(in_order):
        assert rm.decide(logits, tokens, M, reveal=limit).tolist() == [expected]


NANS = [[9.0, 0, 1], [NAN, 0, 1], [9, NAN, 1], [9, 0, NAN]]
CORNERS = {  # rows of logits, MASK first; tokens; next tokens; options
    "equal logits keep": ([[1.0, 1, 0], [1, 0, 1]], [1, 2], [1, 2], {}),
    "higher MASK re-masks": ([[1.1, 1, 0], [1, 9, 0]], [1, 2], [M, M], {}),
    "ties reveal the lowest id": ([[5.0, 2, 2], [5, 1, 2]], [M, M], [1, 2], {}),
    "the limit holds among equals": ([[0.0, 0, 0]] * 4, [M] * 4, None, dict(reveal=3)),
    "float64 logits are told apart": ([[0.0, 1, 1 + 1e-12]], [M], [2], {}),
    "-inf is never revealed": ([[5.0, -INF, -9], [-INF, -INF, 0]], [M, M], [2, 2], {}),
    "nor is MASK where nothing is possible": ([[0.0, -INF, -INF]], [M], [1], {}),
    "NaN never re-masks": (NANS, [1] * 4, [M, 1, 1, M], {}),
    "NaN wins the argmax": (NANS, [M] * 4, [2, 2, 1, 2], {}),
}


@pytest.mark.parametrize("rows, tokens, expected, options", CORNERS.values(), ids=CORNERS)
def test_decide_by_hand(rows, tokens, expected, options):
    logits = torch.tensor([rows], dtype=torch.float64)
    got = rm.decide(logits, torch.tensor([tokens]), M, **options)[0].tolist()
    assert got == expected if expected else got.count(M) == len(got) - options["reveal"]


# --------------------------------------------------------------- the oracle action and the losses


def test_oracle_action_by_hand():
    state, clean = torch.tensor([[M, 2, 3, 1, M, 3]]), torch.tensor([[1, 2, 1, 1, 2, 2]])
    target, role = rm.oracle_action(state, clean, M)
    assert target.tolist() == [[1, 2, M, 1, 2, M]]
    assert role.tolist() == [[REVEAL, KEEP, REMASK, KEEP, REVEAL, REMASK]]
    editable = torch.tensor([True, True, True, False, False, False])
    locked = rm.oracle_action(state, clean, M, editable)[1]
    assert locked.tolist() == [[REVEAL, KEEP, REMASK, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 2, 3)])
@pytest.mark.parametrize("roles", [(REVEAL, REMASK, KEEP, IGNORE), (KEEP, IGNORE), (IGNORE,)])
def test_revision_loss_and_its_gradient_in_closed_form(roles, weights):
    role = torch.tensor(roles)[torch.randint(len(roles), (3, 8), generator=seeded(5))]
    logits = torch.randn(3, 8, 5, generator=seeded(6)).requires_grad_()
    target = torch.randint(5, (3, 8), generator=seeded(7))
    loss = rm.revision_loss(logits, target, role, weights)
    count, gradient, total = max(int((role >= 0).sum()), 1), torch.zeros_like(logits), 0
    parts = (loss.reveal, loss.remask, loss.keep)
    for kind, part, weight in zip((REVEAL, REMASK, KEEP), parts, weights):
        here = role == kind
        p = logits[here].softmax(-1).detach()
        expected = -p.gather(-1, target[here].unsqueeze(-1)).log().sum().item() / count
        assert math.isclose(part.item(), expected, rel_tol=1e-5, abs_tol=1e-9)
        total += weight * expected
        gradient[here] = (p - F.one_hot(target[here], 5)) * weight / count
    assert math.isclose(loss.total.item(), total, rel_tol=1e-5)
    assert [part.requires_grad for part in loss] == [True, False, False, False]
    loss.total.backward()
    torch.testing.assert_close(logits.grad, gradient)


def test_plain_mask_diffusion_weighs_masked_positions():
    logits = torch.randn(3, 4, 6, generator=seeded(0), dtype=torch.float64)
    target = torch.randint(6, (3, 4), generator=seeded(1))
    role = torch.randint(-1, 3, (3, 4), generator=seeded(2))
    weight = torch.rand(3, 4, generator=seeded(3), dtype=torch.float64)
    terms = []
    for place in product(range(3), range(4)):
        if role[place] == REVEAL:
            row = logits[place].tolist()
            loss = math.log(sum(map(math.exp, row))) - row[target[place]]
            terms.append(weight[place].item() * loss)
    total, *parts = (part.item() for part in rm.mask_loss(logits, target, role, weight))
    assert total == pytest.approx(sum(terms) / len(terms)) and parts == [total, 0, 0]


@pytest.mark.parametrize("weights, p_right", [((1, 1, 1), 0.7), ((1, 1, 3), 2.1 / 2.4)])
def test_minimiser_is_calibrated_where_visible_and_the_posterior_where_masked(weights, p_right):
    # 20 cases of two inputs: token 2, right in 7 of 10; MASK, where the truth is 1, 2, 3 or 4
    state = torch.tensor([2] * 10 + [M] * 10)
    clean = torch.tensor([2] * 7 + [1, 3, 4] + [1] * 4 + [2] * 3 + [3] * 2 + [4])
    logits = torch.zeros(2, 5, requires_grad=True)
    search = dict(max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([logits], **search)

    def closure():
        optimizer.zero_grad()
        target, role = rm.oracle_action(state, clean, M)
        loss = rm.revision_loss(logits[(state == M).long()], target, role, weights).total
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.tensor([[1 - p_right, 0, p_right, 0, 0], [0, 0.4, 0.3, 0.2, 0.1]])
    torch.testing.assert_close(logits.detach().softmax(-1), expected, rtol=0, atol=2e-3)


# -------------------------------------------------------------------------- synthetic trajectories


def phases(T=6, shape=(200, 100), p_wrong=0.5):
    """The runs of each position's states, (("w", 2), ("M", 1), ("x", 4)): wrong, MASK, right."""
    clean = torch.randint(1, 5, shape, generator=seeded(7))
    wrong = clean % 4 + 1
    free = torch.ones(shape, dtype=torch.bool)
    states = rm.sample_trajectory(clean, free, wrong, M, T, p_wrong, seeded(8))
    assert states.shape == (T + 1, *shape)
    kinds = torch.full_like(states, -1)
    for kind, token in enumerate((torch.full_like(clean, M), clean, wrong)):
        kinds[states == token] = kind
    columns = kinds.flatten(1).T.tolist()
    runs = [[("Mxw"[kind], len(list(run))) for kind, run in groupby(x)] for x in columns]
    return [tuple(run) for run in runs]


@pytest.mark.parametrize("T", [2, 6])
def test_trajectory_times_have_the_law_of_the_paper(T):
    runs = phases(T)
    wrong_first = [run for run in runs if run[0][0] == "w"]
    mask_first = [run for run in runs if run[0][0] == "M"]
    assert {"".join(kind for kind, _ in run) for run in runs} == {"wMx", "Mx"}
    assert abs(len(wrong_first) / len(runs) - 0.5) < 0.02
    law = {(b, m): 1 / (T - 1) / (T - b) for b in range(1, T) for m in range(b + 1, T + 1)}
    counts = Counter((w, w + m) for (_, w), (_, m), _ in wrong_first)
    if T == 2:
        assert set(counts) == set(law) == {(1, 2)}
    else:
        assert_counts_fit(counts, law)
    assert_counts_fit(Counter(m for (_, m), _ in mask_first), {m: 1 / T for m in range(1, T + 1)})


def test_p_wrong_holds_for_each_sequence():
    runs = phases(shape=(3, 4000), p_wrong=torch.tensor([[0.0], [0.3], [1.0]]))
    starts = [runs[i : i + 4000] for i in (0, 4000, 8000)]
    never, some, always = (sum(run[0][0] == "w" for run in part) / 4000 for part in starts)
    assert never == 0 and always == 1 and abs(some - 0.3) < 0.04


def test_positions_that_are_not_editable_stay_true():
    clean = torch.randint(1, 5, (30, 20), generator=seeded(1))
    editable = torch.rand(30, 20, generator=seeded(2)) < 0.5
    wrong = clean % 4 + 1
    states = rm.sample_trajectory(clean, editable, wrong, 9, generator=seeded(4))
    assert (states == clean)[:, ~editable].all() and (states[0] != clean)[editable].all()
    assert set(states.unique().tolist()) == {1, 2, 3, 4, 9}


def test_history_until_aligns_the_current_states():
    trajectory = torch.arange(5 * 4 * 2).view(5, 4, 2)
    t = [2, 0, 3, 1]
    got = rm.history_until(trajectory, torch.tensor(t))
    assert got.shape == (4, 4, 2)
    for b, last in enumerate(t):
        states = [trajectory[k, b].tolist() for k in range(last + 1)]
        assert got[:, b].tolist() == [[ABSENT] * 2] * (3 - last) + states


# ----------------------------------------------------------------------------- multi-turn revision


def one_hot_history(vocabulary, gamma):
    """With gamma < 0.5 the largest coordinate of the embedding is the current token."""
    embedding = torch.eye(vocabulary, dtype=torch.float64)
    return HistoryReference(embedding, gamma, rotate=False, normalize=False)


def scripted(script, vocabulary=4):
    """A denoiser that wants script[current state]: MASK over a token, or that token at a MASK."""

    def denoiser(embedded):
        wanted = [script[tuple(row)] for row in embedded.argmax(-1).tolist()]
        wanted = torch.tensor(wanted, dtype=torch.long).view(embedded.shape[:2])
        return F.one_hot(wanted, vocabulary).double()

    return denoiser


CONVERGES = {(3, 1): (M, 1), (M, 1): (2, 1), (2, 1): (2, 1)}
PERIOD_2 = {(1, 2): (M, 2), (M, 2): (1, 2)}
PERIOD_3 = {(1, 1): (M, 1), (M, 1): (1, M), (1, M): (1, 1)}
CASES = [  # without history the first return ends a cycle, with it the third
    (CONVERGES, (3, 1), 0.0, FIXED_POINT, 3, (2, 1)),
    (CONVERGES, (3, 1), 0.4, FIXED_POINT, 3, (2, 1)),
    (PERIOD_2, (1, 2), 0.0, CYCLE, 2, (1, 2)),
    (PERIOD_2, (1, 2), 0.4, CYCLE, 6, (1, 2)),
    (PERIOD_2, (M, 2), 0.0, CYCLE, 2, (1, 2)),  # comes back to a MASK: revealed in the result
    (PERIOD_3, (1, 1), 0.0, CYCLE, 3, (1, 1)),
    (PERIOD_3, (M, 1), 0.4, CYCLE, 9, (1, 1)),
]


@pytest.mark.parametrize("script, start, gamma, status, turns, result", CASES)
def test_scripted_revision_ends_as_documented(script, start, gamma, status, turns, result):
    got = rm.revise(scripted(script), torch.tensor([start]), M, one_hot_history(4, gamma))
    assert (got.status, got.turns, got.tokens.tolist()) == ([status], [turns], [list(result)])


def revise_by_loop(denoiser, start, editable, gamma, max_turns, patience, reveal):
    """One sequence, max_turns turns without an early exit; where it ended is found afterwards."""
    states, logits = [start], []
    for _ in range(max_turns):
        decayed = [gamma**age * F.one_hot(torch.tensor(s), 4) for age, s in enumerate(states[::-1])]
        logits.append(denoiser(sum(decayed).double().unsqueeze(0))[0].tolist())
        states.append(decide_by_loop(logits[-1], states[-1], M, editable, reveal))
    end, status = max_turns, OUT_OF_TURNS
    for turn in range(max_turns, 0, -1):
        if states[turn] == states[turn - 1]:
            end, status = turn, FIXED_POINT
        elif states[:turn].count(states[turn]) >= patience:
            end, status = turn, CYCLE
    last = decide_by_loop(logits[end - 1], states[end - 1], M, editable, None, allow_remask=False)
    return states[:end] + [last], status


@pytest.mark.parametrize(
    "gamma, patience", [(0.0, None), (0.0, 2), (0.4, None), (0.4, 1), (0.9, 2)]
)
@pytest.mark.parametrize("reveal", [None, 1])
@pytest.mark.parametrize("max_turns", [1, 5, 14])
def test_revise_equals_a_loop_without_early_exit(gamma, patience, reveal, max_turns):
    first, second = torch.randn(2, 12, 12, generator=seeded(4), dtype=torch.float64)

    def denoiser(embedded):
        return (torch.tanh(embedded.flatten(1) @ first) @ second).view(-1, 3, 4)

    tokens = torch.tensor(list(product(range(4), repeat=3)))  # every state there is
    before = tokens.clone()
    editable = (torch.rand(64, 3, generator=seeded(5)) < 0.8) | (tokens == M)
    history = one_hot_history(4, gamma)
    for _ in range(2):  # a used history is reset
        got = rm.revise(denoiser, tokens, M, history, max_turns, editable, reveal, True, patience)
    assert not (got.tokens == M).any() and torch.equal(tokens, before)
    assert got.trace.shape == (max(got.turns) + 1, 64, 3)
    returns = patience or (3 if gamma else 1)
    for b, (start, free) in enumerate(zip(tokens.tolist(), editable.tolist())):
        case = (denoiser, start, free, gamma, max_turns, returns, reveal)
        states, status = revise_by_loop(*case)
        assert (got.status[b], got.turns[b]) == (status, len(states) - 1)
        assert got.trace[:, b].tolist() == states + states[-1:] * (len(got.trace) - len(states))
        assert got.tokens[b].tolist() == states[-1]
    if (gamma, max_turns, reveal, patience) == (0.0, 5, None, None):
        assert set(got.status) == {FIXED_POINT, CYCLE, OUT_OF_TURNS}  # every ending was met


def ragged_batch():
    """(tokens [24, 8], lengths, a denoiser that reads each sequence's own positions alone)."""
    mix, out = torch.randn(2, 6, 6, generator=seeded(1), dtype=torch.float64)

    def denoiser(embedded, mask):
        mean = (mask.unsqueeze(-1) * embedded).sum(1, keepdim=True) / mask.sum(1).view(-1, 1, 1)
        return torch.tanh(embedded @ mix + 4 * mean) @ out

    tokens = torch.randint(6, (24, 8), generator=seeded(6))
    return tokens, torch.randint(2, 9, (24,), generator=seeded(7)), denoiser


def test_finished_sequences_leave_with_their_context_and_answers_are_those_of_one_by_one():
    tokens, lengths, denoiser = ragged_batch()
    mask = torch.arange(8) < lengths.unsqueeze(1)
    tokens[~mask] = 1
    sizes = []

    def watched(embedded, mask):
        sizes.append((len(embedded), len(mask)))
        return denoiser(embedded, mask)

    history = one_hot_history(6, 0.4)
    got = rm.revise(watched, tokens, M, history, 10, mask, context={"mask": mask})
    assert len(set(got.turns)) > 2  # sequences left at different turns
    assert sizes == [(sum(n >= turn for n in got.turns),) * 2 for turn in range(1, len(sizes) + 1)]
    for b, (row, length) in enumerate(zip(tokens, lengths)):
        alone = row[:length].unsqueeze(0)  # without any padding
        one = rm.revise(lambda e: denoiser(e, torch.ones(1, length)), alone, M, history, 10)
        assert (one.turns[0], one.status[0]) == (got.turns[b], got.status[b])
        assert torch.equal(one.tokens[0], got.tokens[b, :length])


def test_a_denoiser_whose_batch_is_not_the_running_one_is_an_error():
    tokens, lengths, denoiser = ragged_batch()
    mask = torch.arange(8) < lengths.unsqueeze(1)  # closed over: still of 24 rows
    with pytest.raises(ValueError, match="context"):
        rm.revise(lambda e: denoiser(e[:1], mask), tokens, M, one_hot_history(6, 0.4), 10)


def test_an_empty_batch_is_revised_in_no_turns():
    got = rm.revise(scripted({}), torch.zeros(0, 2).long(), M, one_hot_history(4, 0.4))
    assert got.tokens.shape == (0, 2) and got.turns == got.status == []


@pytest.mark.parametrize("head", [None, torch.eye(4, dtype=torch.float64)], ids=["logits", "head"])
def test_revise_raises_where_the_network_returns_nan(head):
    factor = iter([1.0, torch.tensor([1.0, 1.0, 1.0, NAN])])  # one column: a padded vocabulary's
    with pytest.raises(ValueError, match="NaN in turn 2"):
        network = scripted(PERIOD_2)
        history, tokens = one_hot_history(4, 0.0), torch.tensor([[1, 2], [M, 2]])
        rm.revise(lambda e: network(e) * next(factor), tokens, M, history, patience=9, head=head)


def test_a_rule_that_returns_its_argument_does_not_change_the_caller_s_tokens():
    tokens, network = torch.tensor([[1, M]]), scripted({(1, M): (1, 2)})
    same = lambda logits, tokens, mask_id, **_: tokens
    got = rm.revise(network, tokens, M, one_hot_history(4, 0.0), rule=same)
    assert tokens.tolist() == [[1, M]] and got.tokens.tolist() == [[1, 2]]


def test_a_rule_that_knows_its_turn_may_see_a_state_again():
    """It alternates twice, then stays: without history one return would be a cycle of Eq. 1."""
    network = lambda embedded: torch.zeros(*embedded.shape[:2], 4)
    waver = lambda logits, tokens, mask_id, turn, **_: 3 - tokens if turn <= 4 else tokens
    got = rm.revise(network, torch.tensor([[1, 2]]), M, one_hot_history(4, 0.0), rule=waver)
    assert (got.status, got.turns, got.tokens.tolist()) == ([FIXED_POINT], [5], [[1, 2]])


# --------------------------------------------------------------------- the kernels in their places


@needs_triton
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_revision_of_sudoku_boards_is_the_same_with_torch_triton_and_head():
    model, info = rm.load_checkpoint(ROOT / "checkpoints/sudoku_full.pt", "sudoku", DEVICE)
    cell = torch.arange(81)  # two boards of a hand-made pattern, 20 cells wrong, 2 blank
    shift = torch.arange(2).unsqueeze(1)
    clean = (3 * (cell // 9 % 3) + cell // 27 + cell % 9 + shift) % 9 + 1
    order = torch.rand(2, 81, generator=seeded(1)).argsort(-1)
    wrong = clean % 9 + 1
    start = torch.where(order < 20, wrong, clean).masked_fill(order > 78, M).to(DEVICE)
    head, model.head = model.head.weight, torch.nn.Identity()
    bias = torch.randn(10, generator=seeded(3)).to(DEVICE)
    results = []
    for impl in ("torch", "triton"):
        history = HistoryReference(model.embedding, info["gamma"], info["rotate"], impl=impl)
        options = dict(max_turns=4, reveal=3, trace=True, impl=impl)
        network = lambda embedded: F.linear(model(embedded), head, bias)
        results.append(rm.revise(network, start, M, history, **options))
        results.append(rm.revise(model, start, M, history, head=head, bias=bias, **options))
    assert len(results[0].trace) > 3
    for other in results[1:]:
        assert torch.equal(results[0].trace, other.trace)
        assert (results[0].turns, results[0].status) == (other.turns, other.status)


@impls
@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("with_bias", [False, True])
def test_decide_and_loss_with_a_head_are_those_of_its_logits(impl, with_bias):
    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=seeded(low + high)).to(DEVICE)

    hidden, head = draw(-2, 3, 6, 9, 8).float(), draw(-2, 3, 7, 8).float()
    bias = draw(-9, 9, 7).float() if with_bias else None
    role, tokens, editable = draw(-1, 3, 6, 9), draw(0, 7, 6, 9), draw(0, 5, 6, 9) > 0
    logits = hidden @ head.T if bias is None else hidden @ head.T + bias
    weights = dict(head=head, bias=bias, impl=impl)
    for remask, reveal, limit in product([True, False], [True, False], [None, 2]):
        options = (tokens, M, editable, limit, remask, reveal)
        expected = rm.decide(logits, *options, impl="torch")
        assert torch.equal(rm.decide(hidden, *options, **weights), expected)
        assert torch.equal(rm.decide(logits, *options, impl=impl), expected)

    leaves = [hidden, head] + [bias] * with_bias
    leaves = [leaf.requires_grad_() for leaf in leaves]
    logits = F.linear(*leaves)
    expected = rm.revision_loss(logits, tokens, role, (1, 2, 3), impl="torch")
    gradient = torch.autograd.grad(expected.total, [logits, *leaves], retain_graph=True)
    got = rm.revision_loss(logits, tokens, role, (1, 2, 3), impl=impl)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.total, logits)[0], gradient[0])
    got = rm.revision_loss(hidden, tokens, role, (1, 2, 3), **weights)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.total, leaves), gradient[1:])


def test_with_a_head_the_logits_of_all_positions_are_never_formed():
    class Shapes(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), keywords=None):
            result = function(*args, **(keywords or {}))
            results = result if isinstance(result, tuple) else (result,)
            self.seen.extend(x.numel() for x in results if torch.is_tensor(x))
            return result

    tokens, head = torch.ones(2, 200, dtype=torch.long), torch.randn(3000, 8, generator=seeded(1))
    tokens[0, :5] = M
    with Shapes() as shapes:
        history = HistoryReference(head)
        rm.revise(lambda embedded: embedded, tokens, M, history, 1, head=head, bias=head[:, 0])
    assert max(shapes.seen) < 2 * 200 * 3000 / 10


# ---------------------------------------------------------------------------------------- training

WORDS = ("12345123", "54321543", "22551144", "31415253")
CLEAN = torch.tensor([[int(token) for token in word] for word in WORDS])


def sample(batch_size, generator, ragged=False):
    clean = CLEAN[torch.randint(4, (batch_size,), generator=generator)]
    wrong = (clean + torch.randint(4, clean.shape, generator=generator)) % 5 + 1
    share = torch.rand(batch_size, 1, generator=generator)
    cells = torch.rand(clean.shape, generator=generator) < share
    states = rm.sample_trajectory(clean, cells, wrong, M, 4, 0.5, generator=generator)
    t = torch.randint(4, (batch_size,), generator=generator)
    return rm.history_until(states, t), clean, cells if ragged else None


def new_model(seed=0, layers=2, **sizes):
    torch.manual_seed(seed)
    sizes = dict(width=32, heads=2, feed_forward=64) | sizes
    return rm.MaskDiffusionTransformer(rm.TransformerConfig(6, 8, layers=layers, **sizes))


def train(model, **changes):
    options = dict(sample=sample, steps=12, mask_id=M, batch_size=8, warmup=3) | changes
    return rm.train(model, **options)


def assert_same_weights(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_train_overfits_a_handful_of_sequences_and_revision_repairs_them():
    model = new_model(layers=1)
    options = dict(steps=400, batch_size=32, warmup=20, learning_rate=2e-2, muon_factor=2)
    stats = [stats for _, stats in train(model, **options)]
    losses = [float(s["loss"]) for s in stats]
    assert sum(losses[-20:]) < 0.25 * sum(losses[:20])  # all MASK could be any of the four
    for s in stats:
        assert math.isclose(s["loss"], s["reveal"] + s["remask"] + s["keep"], rel_tol=1e-4)
    clean = CLEAN.repeat(20, 1)
    order = torch.rand(80, 8, generator=seeded(1)).argsort(-1)
    wrong = (clean + torch.randint(4, clean.shape, generator=seeded(2))) % 5 + 1
    start = torch.where(order == 0, wrong, clean).masked_fill(order == 1, M)
    got = rm.revise(model, start, M, HistoryReference(model.embedding))
    assert (got.tokens == clean).all(-1).sum() >= 60  # of 80, none of which was right


def test_rates_warm_up_and_fall_to_nothing(monkeypatch):
    monkeypatch.setattr(rm, "has_bf16", lambda _: True)
    model = new_model()
    optimization = rm.make_optimizers(model, 0.01, 8, warmup=4, steps=40)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rates = []
    for _ in range(40):
        adamw, muon = (part.param_groups[0]["lr"] for part in optimization[:2])
        assert math.isclose(muon, 8 * adamw)
        rates.append(adamw)
        for part in optimization:
            part.step()
    assert rates[:3] == pytest.approx([0.0025, 0.005, 0.0075]) and rates[-1] < 1e-4
    assert rates[20] == pytest.approx(0.005) and rates[3:] == sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_has_the_matrices_where_bf16_is_in_hardware(monkeypatch, bf16):
    monkeypatch.setattr(rm, "has_bf16", lambda _: bf16)
    model = new_model()
    optimizers = rm.make_optimizers(model, 0.01, 8, 4, 40)
    optimizers = optimizers[: len(optimizers) // 2]  # then their schedules
    held = [group["params"] for part in optimizers for group in part.param_groups]
    assert [type(part).__name__ for part in optimizers] == ["AdamW", "Muon"][: 1 + bf16]
    assert sorted(map(id, sum(held, []))) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 for p in held[-1]) == bf16


@pytest.mark.parametrize("end", ["killed", signal.SIGINT, signal.SIGTERM])
def test_a_run_cut_off_resumes_with_the_result_of_an_unbroken_one(tmp_path, end):
    file = tmp_path / "run.pt"
    options = dict(checkpoint_every=4)
    unbroken, cut, resumed, finished = (new_model(seed) for seed in (0, 0, 1, 2))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert len(list(train(unbroken, **options))) == 12
    if end == "killed":  # what it did since the last checkpoint is done again
        for step, _ in train(cut, checkpoint=file, **options):
            if step == 6:
                break
    else:
        with pytest.raises(rm.InputError, match="stopped after step 6.*same command"):
            for step, _ in train(cut, checkpoint=file, **options):
                if step == 6:
                    signal.raise_signal(end)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    first = 5 if end == "killed" else 7
    steps = [step for step, _ in train(resumed, checkpoint=file, **options)]
    assert steps == list(range(first, 13))
    assert list(train(finished, checkpoint=file, **options)) == []
    assert_same_weights(unbroken, resumed)
    assert_same_weights(unbroken, finished)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_training_stops_where_the_loss_or_its_gradient_is_not_finite(tmp_path, where):
    file, model = tmp_path / "run.pt", new_model()

    class Sick(torch.autograd.Function):  # a network whose loss is fine, its gradient not
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, gradient: gradient * NAN)

    with pytest.raises(rm.InputError, match="step 7") as caught:
        for step, _ in train(model, checkpoint=file, checkpoint_every=1):
            if step == 6 and where == "loss":
                model.head.weight.data[1, 1] = NAN  # after which the checkpoint of step 6 is made
            elif step == 6:
                model.norm.register_forward_hook(lambda module, inputs, x: Sick.apply(x))
    assert "\n" not in str(caught.value)
    saved = torch.load(file, weights_only=True)
    assert saved["step"] == 6
    if where == "gradient":  # no step was made
        assert all(weight.isfinite().all() for weight in saved["model"].values())
        assert all(weight.isfinite().all() for weight in model.parameters())


def train_ragged(model):
    rm.mixed_precision = lambda device: nullcontext()  # rounds alike with any number of rows
    ragged = lambda batch_size, generator: sample(batch_size, generator, ragged=True)
    list(train(model, sample=ragged, batch_size=16))


def train_process(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    model = new_model(width=8)
    train_ragged(model)
    if rank == 0:
        torch.save(model.state_dict(), folder / "weights.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(rm, "mixed_precision", rm.mixed_precision)  # put back afterwards
    torch.multiprocessing.spawn(train_process, (tmp_path,), nprocs=2)
    two = torch.load(tmp_path / "weights.pt", weights_only=True)
    start, one = new_model(width=8).state_dict(), new_model(width=8)
    train_ragged(one)  # so narrow that no matrix is Muon's, which would round in bfloat16
    for name, value in one.state_dict().items():
        assert (value - two[name]).norm() < 1e-4 * (value - start[name]).norm(), name


# ------------------------------------------------------------------------------------------ files


def one_line(capsys, call):
    """call as a script's main ends with exit code 2 and this one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        rm.run_script(call)
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, len(lines)) == (2, 1), lines
    return lines[0]


def test_checkpoint_keeps_weights_config_and_info(tmp_path):
    model, file = new_model(), tmp_path / "folder" / "model.pt"
    rm.save_checkpoint(file, model, "sudoku", minutes=1.5)
    loaded, info = rm.load_checkpoint(file, "sudoku", needs=("minutes",))
    assert_same_weights(loaded, model)
    assert loaded.config == model.config and info == {"minutes": 1.5}


WEIGHTS = new_model().state_dict()
NARROW = new_model(width=16).state_dict()
MODEL = dict(task="toy", config=vars(new_model().config), model=WEIGHTS, info={"hops": 3})
STATE = dict(model=WEIGHTS, optimization=[], step=1, seconds=1.0)
STATE["notes"] = {"settings": {"steps": 11}}
TORN = b"PK\x03\x04" + bytes(99)  # the beginning of a file that torch.save wrote
READERS = {
    "checkpoint": lambda file: rm.load_checkpoint(file, "toy", needs=("hops",)),
    "resume": lambda file: rm.Run(file.with_name("run"), {"steps": 12}),
    "train": lambda file: list(train(new_model(), checkpoint=file)),
    "record": lambda file: rm.Run(file.with_name("run"), {"steps": 12}),
}
NAMES = {"resume": "run.resume.pt", "record": "run.json"}
MISFITS = {  # what a file holds in place of what each of these wants
    "checkpoint": [
        MODEL | {"task": "text"}, MODEL | {"model": NARROW}, MODEL | {"info": {}}, {"task": "toy"},
        MODEL | {"config": {"vocabulary": 6, "length": 8, "colour": 1}},
        MODEL | {"model": WEIGHTS | {"embedding": torch.full((6, 32), NAN)}},
        STATE, [1, 2], TORN, b"text", b"",
    ],
    "resume": [STATE, MODEL, STATE | {"notes": None}, [1, 2], TORN, b"text", b""],
    "train": [STATE | {"model": NARROW}, STATE, MODEL, [1, 2], TORN, b"text", b""],
    "record": [b'{"settings": {"steps": 11}}', b'{"settings": 3}', b"[]", b"{", b"\xff\xfe", b""],
}  # fmt: skip
MISFITS = [(reader, n, one) for reader, list_ in MISFITS.items() for n, one in enumerate(list_)]


@pytest.mark.parametrize("reader, n, contents", MISFITS, ids=[f"{r}-{n}" for r, n, _ in MISFITS])
def test_a_file_that_does_not_fit_is_named_in_one_line(tmp_path, capsys, reader, n, contents):
    file = tmp_path / NAMES.get(reader, "file")
    if isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        torch.save(contents, file)
    before = file.read_bytes()
    assert str(file) in one_line(capsys, lambda: READERS[reader](file))
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_run_goes_on_and_counts_as_done_under_its_own_settings(tmp_path, capsys):
    model, path, settings = new_model(), tmp_path / "v1.5", {"steps": 4}
    run = rm.Run(path, settings)
    run.notes["planned"] = 4
    for step, stats in train(model, steps=4, **run.files(every=2)):
        run.show(step, 4, stats, {"exact": step / 4} if step == 2 else None)
        if step == 3:
            break
    again = rm.Run(path, settings)
    assert again.record is None and again.notes["planned"] == 4
    assert [(point["step"], point["exact"]) for point in again.curve] == [(2, 0.5)]
    record = again.finish(model, "toy", variant="rm")
    assert {path.name for path in tmp_path.iterdir()} == {"v1.5.pt", "v1.5.json"}
    assert rm.Run(path, settings).record == json.loads(json.dumps(record))
    assert rm.load_checkpoint(tmp_path / "v1.5.pt", "toy")[1]["variant"] == "rm"
    assert "exact 0.500" in capsys.readouterr().out
    assert str(path) in one_line(capsys, lambda: rm.Run(path, {"steps": 5}))


def test_paired_bootstrap_covers_the_mean_and_knows_equal_answers():
    same = rm.paired_bootstrap("0110" * 50, "0110" * 50)
    assert (same["difference"], same["ci95"], same["n"]) == (0, (0, 0), 200)
    better = rm.paired_bootstrap("1110" * 50, "0110" * 50)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 200)  # of the mean of 200 zeros and ones
    assert better["difference"] == 0.25
    assert better["ci95"] == pytest.approx((0.25 - half, 0.25 + half), abs=0.01)


def test_fingerprint_tells_other_data_and_other_borders_apart():
    tokens = torch.arange(6)
    same = rm.fingerprint(tokens.view(2, 3), "train", "test")
    assert same == rm.fingerprint(tokens.view(2, 3).clone(), "train", "test")
    others = [
        (tokens.view(3, 2), "train", "test"),
        (tokens.flip(0).view(2, 3), "train", "test"),
        (tokens.view(2, 3), "traint", "est"),
        (tokens.view(2, 3), "test", "train"),
        (tokens.view(2, 3), "train"),
    ]
    assert len({same, *(rm.fingerprint(*other) for other in others)}) == 6


def test_json_goes_through_links_and_into_pipes_and_replaces_neither(tmp_path):
    file, link, fifo = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "fifo"
    link.symlink_to(file)
    rm.write_json(link, {"dangling": 1})
    rm.write_json(link, {"there": 2})
    assert link.is_symlink() and json.loads(file.read_text()) == {"there": 2}

    os.mkfifo(fifo)
    got = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()))
    reader.start()
    rm.write_json(fifo, {"a": 1})
    reader.join(10)
    assert json.loads(got[0]) == {"a": 1} and fifo.is_fifo()

    read, write = os.pipe()  # what a shell makes of >(program)
    rm.write_json(Path(f"/dev/fd/{write}"), {"b": 2})
    assert json.loads(os.read(read, 100)) == {"b": 2}
    os.close(read)
    os.close(write)
    assert sorted(tmp_path.iterdir()) == sorted([file, link, fifo])


FULL_DISK = """
import resource, signal, sys
from functools import partial
from pathlib import Path
import torch
import reflective_masking as rm
folder = Path(sys.argv[1])
model = rm.MaskDiffusionTransformer(rm.TransformerConfig(6, 8, width=32))
batch = torch.ones(1, 8, 8, dtype=torch.long), torch.ones(8, 8, dtype=torch.long), None
training = rm.train(model, lambda *_: batch, 2, 0, 8, checkpoint=folder / "run.pt")
figure, axes = rm.new_figure()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for call in (
    partial(rm.save_checkpoint, folder / "model.pt", model, "toy"),
    partial(rm.write_json, folder / "record.json", ["x" * 9999]),
    partial(rm.save_figure, figure, folder / "figure.png"),
    lambda: [signal.raise_signal(signal.SIGTERM) for _ in training],
):
    try:
        rm.run_script(call)
    except SystemExit as end:
        assert end.code == 2
"""


def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / "model.pt").write_text("old")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == 4, done.stderr
    for line, name in zip(lines, ("model.pt", "record.json", "figure.png", "run.pt")):
        assert str(tmp_path / name) in line
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt"]
    assert (tmp_path / "model.pt").read_text() == "old"


def test_lines_are_read_whatever_their_ends(tmp_path, capsys):
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffone\r\n\r\n  \ntwo\u2028half\n".encode())
    assert rm.read_lines(file) == [(1, "one"), (4, "two\u2028half")]
    for contents in (b"", b" \n\n", b"\xff\xfe\x00"):
        file.write_bytes(contents)
        assert str(file) in one_line(capsys, lambda: rm.read_lines(file))
    assert "gone" in one_line(capsys, lambda: rm.read_lines(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["meta", "abacus", "cuda:77"])
def test_a_device_that_is_not_there_is_named_in_one_line(capsys, name):
    assert name in one_line(capsys, lambda: rm.start_device(name))


# -------------------------------------------------------------------------------- the command line


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    options = rm.Options(prog="script.py")
    options.general("results", out_modes=("train",))
    add = options.group("training", "train")
    add("--steps", type=rm.number(int, 1), default=100)
    add("--rate", type=rm.number(float, 0, 10), default=1.0)
    add = options.group("evaluation", "evaluate")
    add("--evaluate", action="store_true")
    add("--turns", type=rm.number(int, 1), default=32)
    return options.parse(lambda args: "evaluate" if args.evaluate else "train", {})


def test_options_have_defaults_and_know_what_was_given(monkeypatch):
    args = parse(monkeypatch, "--steps", 100, "--rate", "0.5")
    assert (args.mode, args.given) == ("train", {"steps", "rate"})
    assert (args.steps, args.rate, args.turns, args.seed, args.json) == (100, 0.5, 32, 0, None)
    assert parse(monkeypatch, "--evaluate", "--seed", 7).mode == "evaluate"


WRONG_OPTIONS = {
    "--steps": ["--evaluate --steps 3", "--evaluate --steps 100", "--steps 0", "--steps 1e3"],
    "--turns": ["--turns 3", "--smoke --turns 3"],
    "--rate": ["--rate nan", "--rate inf", "--rate -inf", "--rate -0.1", "--rate much", "--rate"],
    "--seed": ["--seed -1", "--seed 99999999999", "--seed 1.5"],
    "--out": ["--evaluate --out new"],
    "--colour": ["--colour red"],
}
WRONG_OPTIONS = [(name, line) for name, lines in WRONG_OPTIONS.items() for line in lines]


@pytest.mark.parametrize("name, line", WRONG_OPTIONS)
def test_a_wrong_or_ignored_option_is_named_in_one_line(monkeypatch, capsys, name, line):
    said = one_line(capsys, lambda: parse(monkeypatch, *line.split()))
    assert said.startswith("script.py: error: ") and name in said


UNWRITABLE = ["file/run", "loop", "locked/run"]
UNWRITABLE = [(option, path) for option in ("--json", "--out") for path in UNWRITABLE]
UNWRITABLE += [("--json", "folder"), ("--out", "file")]


@pytest.mark.parametrize("option, path", UNWRITABLE)
def test_an_output_that_cannot_be_written_is_found_first(
    monkeypatch, capsys, tmp_path, option, path
):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "loop").symlink_to("loop")
    if path.startswith("locked") and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    before = sorted(tmp_path.iterdir())
    said = one_line(capsys, lambda: parse(monkeypatch, option, tmp_path / path))
    assert str(tmp_path / path) in said and sorted(tmp_path.iterdir()) == before


def test_an_output_that_can_be_written_is_not_made_by_looking(monkeypatch, tmp_path):
    fifo, folder = tmp_path / "fifo", tmp_path / "v1.5"  # a folder that looks like a file
    os.mkfifo(fifo)
    folder.mkdir()
    new = tmp_path / "new"
    for option, path in (("--json", new / "run.json"), ("--json", fifo)):
        assert parse(monkeypatch, option, path).json == path
    for path in (new / "folder", folder, tmp_path):
        assert parse(monkeypatch, "--out", path).out == path
    assert sorted(tmp_path.iterdir()) == [fifo, folder]


def test_wilson_interval_by_hand():
    assert rm.wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert rm.wilson_interval(0, 10) == pytest.approx((0, 0.277533), abs=1e-5)
    assert rm.wilson_interval(0, 0) == (0, 1)


# --------------------------------------------------------------------------------------- bad input

ONES = torch.ones(2, 3, dtype=torch.long)
FREE = ONES.bool()
ZEROS = torch.zeros(2, 3, 5)


def network(**changes):
    sizes = dict(vocabulary=5, length=3, width=16, heads=2) | changes
    return rm.MaskDiffusionTransformer(rm.TransformerConfig(**sizes))


def revise_one(tokens, **more):
    return rm.revise(scripted(PERIOD_2), torch.tensor([tokens]), M, one_hot_history(4, 0.0), **more)


BAD = {
    "positions": lambda: network(positions="rotary"),
    "tokens, length": lambda: rm.decide(torch.zeros(2, 4, 5), ONES, M),
    "mask_id, 5": lambda: rm.decide(ZEROS, ONES, 5),
    "editable": lambda: rm.decide(ZEROS, ONES, M, editable=torch.ones(2, 4).bool()),
    "reveal": lambda: rm.decide(ZEROS, ONES, M, reveal=torch.tensor([1, 1, 1])),
    "head, width": lambda: rm.decide(ZEROS, ONES, M, head=torch.zeros(7, 4)),
    "bias": lambda: rm.decide(ZEROS, ONES, M, head=torch.zeros(7, 5), bias=torch.zeros(5)),
    "role": lambda: rm.revision_loss(ZEROS, ONES, ONES[0]),
    "target": lambda: rm.revision_loss(ZEROS, ONES + 4, ONES),
    "T must": lambda: rm.sample_trajectory(ONES, FREE, ONES + 1, M, T=1),
    "wrong": lambda: rm.sample_trajectory(ONES, FREE, ONES[:, :2], M),
    "max_turns": lambda: revise_one([1, 2], max_turns=0),
    "editable, MASK": lambda: revise_one([1, M], editable=torch.tensor([True, False])),
    "head": lambda: revise_one([1, 2], rule=lambda *_, **__: None, head=torch.eye(4)),
    "reveal belong": lambda: revise_one([1, 2], rule=lambda *_, **__: None, reveal=1),
    "impl": lambda: revise_one([1, 2], impl="gpu"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_a_value_error_that_names_the_argument(what):
    with pytest.raises(ValueError, match=what.split(",")[0]):
        BAD[what]()
