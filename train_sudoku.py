"""Task 1: Sudoku revision.  A solved 9x9 board has 4 to 20 cells replaced by wrong digits; which ones, nobody says.
The model re-masks what it doubts, reveals again, and stops when nothing changes.

    python train_sudoku.py                           train the full variant, evaluate, draw
    python train_sudoku.py --variant all             every model of the README's tables; resumes where it stopped
    python train_sudoku.py --evaluate                score the shipped checkpoint on 2,000 boards
    python train_sudoku.py --study all               the figures of the README
    python train_sudoku.py --revise BOARD            watch it repair a board; --solve PUZZLE locks the clues

Reading order: boards, metrics, training data, baselines, evaluation, training, studies, figures, command line.
Tokens: MASK is 0, a digit is itself.  Differences from the paper: the training data (see sample_batch) and the
settings in TRAINING are ours, the paper states none; any cell may be re-masked, as in the paper, unless --solve.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import reflective_masking as rm
from history import HistoryReference
from reflective_masking import InputError, MaskDiffusionTransformer, TransformerConfig

HERE = Path(__file__).parent
MASK = 0
DIGITS = torch.arange(1, 10)
PAPER = {  # exact %, valid %, replay mistake %, conflict cells: Table of arXiv 2606.16700
    "rm": (82.4, 86.6, 0.57, 0.578),
    "hr": (91.4, 91.8, 0.07, 0.300),
    "decay": (89.4, 89.6, 0.07, 0.362),
    "full": (93.4, 93.6, 0.03, 0.236),
}
GAMMA = 0.9  # the paper does not state it; --study gamma sweeps it
VARIANTS = {  # gamma, rotate: four settings of Eq. 2
    "rm": (0.0, False),
    "hr": (1.0, False),
    "decay": (GAMMA, False),
    "full": (GAMMA, True),
    "plain": (0.0, False),  # plain mask diffusion, trained on masks alone: the baselines' network
    "direct": (0.0, False),  # RM's states, but every cell's target is the truth: no MASK action, no re-masking
}
TRAINING = dict(batch_size=64, learning_rate=2.5e-3)
TEST_SEED, VALIDATION_SEED = 1_000_000, 2_000_000  # training boards use the seeds below a million

# ---------------------------------------------------------------------------------------------------------------
# Boards


def random_board(rng: random.Random) -> list[int]:
    """A random complete board, 81 digits: backtracking that fills the most constrained cell first, about 1 ms."""
    board, rows, columns, boxes = [0] * 81, [0] * 9, [0] * 9, [0] * 9  # digits in use, as bits
    place = [(cell // 9, cell % 9, cell // 27 * 3 + cell % 9 // 3) for cell in range(81)]

    def fill(empty: list[int]) -> bool:
        if not empty:
            return True
        fewest = 10
        for cell in empty:
            row, column, box = place[cell]
            free = 0x1FF & ~(rows[row] | columns[column] | boxes[box])
            if free.bit_count() < fewest:
                fewest, chosen, options = free.bit_count(), cell, free
                if fewest < 2:
                    break
        row, column, box = place[chosen]
        digits = [digit for digit in range(9) if options >> digit & 1]
        rng.shuffle(digits)
        rest = [cell for cell in empty if cell != chosen]
        for digit in digits:
            for used, index in ((rows, row), (columns, column), (boxes, box)):
                used[index] ^= 1 << digit
            board[chosen] = digit + 1
            if fill(rest):
                return True
            for used, index in ((rows, row), (columns, column), (boxes, box)):
                used[index] ^= 1 << digit
        return False

    cells = list(range(81))
    rng.shuffle(cells)
    fill(cells)
    return board


def random_boards(count: int, seed: int) -> Tensor:
    """count complete boards of the randomised solver, int64 [count, 81]; the same for the same seed."""
    rng = random.Random(seed)
    return torch.tensor([random_board(rng) for _ in range(count)])


def shuffle_symmetries(boards: Tensor, generator: torch.Generator) -> Tensor:
    """Each board under a random symmetry of Sudoku: digits, bands, stacks, rows, columns, transpose.

    boards: int64 [B, 81], MASK allowed.  Returns int64 [B, 81].
    """
    batch, device = len(boards), boards.device
    rand = partial(torch.rand, generator=generator, device=device)

    def lines() -> Tensor:  # an order of the nine rows that keeps the bands together
        band, within = rand(batch, 3, 1).argsort(1), rand(batch, 3, 3).argsort(-1)
        return (band * 3 + within).view(batch, 9)

    each = torch.arange(batch, device=device).view(-1, 1, 1)
    grid = boards.view(-1, 9, 9)[each, lines().unsqueeze(2), lines().unsqueeze(1)]
    grid = torch.where(rand(batch, 1, 1) < 0.5, grid, grid.transpose(1, 2)).reshape(batch, 81)
    digits = torch.cat([grid.new_zeros(batch, 1), rand(batch, 9).argsort(-1) + 1], dim=1)
    return digits.gather(1, grid)


def choose_cells(batch: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """bool [batch, 81]: low to high cells of each board, the number and the cells uniform."""
    device = generator.device
    count = torch.randint(low, high + 1, (batch, 1), generator=generator, device=device)
    order = torch.rand(batch, 81, generator=generator, device=device).argsort(-1).argsort(-1)
    return order < count


def corrupt(clean: Tensor, low: int, high: int, seed: int) -> Tensor:
    """The task's input: low to high cells of each board replaced by wrong digits, uniform over the eight others.

    clean: int64 [B, 81].  Returns int64 [B, 81]; the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = choose_cells(len(clean), low, high, generator)
    return torch.where(cells, rm.uniform_wrong(clean, DIGITS, 1, generator)[0], clean)


# ---------------------------------------------------------------------------------------------------------------
# The paper's four metrics


def _units(tokens: Tensor) -> Tensor:
    """[..., 81] -> [..., 27, 9]: the rows, columns and boxes."""
    grid = tokens.unflatten(-1, (9, 9))
    boxes = grid.unflatten(-1, (3, 3)).unflatten(-3, (3, 3)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return torch.cat([grid, grid.transpose(-1, -2), boxes], dim=-2)


CELL_UNITS = _units(torch.arange(81))  # [27, 9] cell numbers
PEERS = torch.zeros(81, 81, dtype=torch.bool)  # same row, column or box, not the cell itself
for unit in CELL_UNITS:
    PEERS[unit.unsqueeze(1), unit.unsqueeze(0)] = True
PEERS.fill_diagonal_(False)


def is_exact(tokens: Tensor, clean: Tensor) -> Tensor:
    """Every cell equals the ground truth: bool [B] of int64 [B, 81] each."""
    return (tokens == clean).all(-1)


def is_valid(tokens: Tensor) -> Tensor:
    """Every row, column and box holds 1 to 9 once: bool [B] of int64 [B, 81]; a MASK makes a board invalid."""
    return (_units(tokens).sort(-1).values == DIGITS.to(tokens.device)).all(-1).all(-1)


def conflicts(tokens: Tensor) -> Tensor:
    """Cells whose digit occurs again in their row, column or box: bool [B, 81]; a MASK breaks no rule."""
    same = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & PEERS.to(tokens.device)
    return same.any(-1) & (tokens != MASK)


def replay_mistakes(trace: Tensor, clean: Tensor) -> tuple[int, int]:
    """(cells that were re-masked while wrong, those of them later decoded back to a wrong digit re-masked there).

    trace: int64 [turns + 1, B, 81].  clean: int64 [B, 81].  A cell counts once, however often it happens.
    """
    tried = torch.zeros(*clean.shape, 10, dtype=torch.bool, device=clean.device)  # wrong digits re-masked so far
    replayed = torch.zeros_like(clean, dtype=torch.bool)
    for before, after in zip(trace[:-1], trace[1:]):
        decoded = (before == MASK) & (after != MASK)
        replayed |= decoded & tried.gather(-1, after.unsqueeze(-1)).squeeze(-1)
        remasked = (before != MASK) & (after == MASK) & (before != clean)
        tried |= torch.nn.functional.one_hot(before, 10).bool() & remasked.unsqueeze(-1)
    return int(tried.any(-1).sum()), int(replayed.sum())


def paired_test(ours: str, theirs: str) -> dict:
    """Exact on the same boards, ours against theirs (evaluate's "right"): difference, its 95 % interval, p.

    The interval is Wald's for paired shares; p is McNemar's exact two-sided binomial test of the boards that only
    one of the two gets right.
    """
    n, only_ours = len(ours), sum(a > b for a, b in zip(ours, theirs))
    only_theirs = sum(a < b for a, b in zip(ours, theirs))
    either, fewer = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = sum(math.comb(either, i) for i in range(fewer + 1)) / 2**either
    difference = (only_ours - only_theirs) / n
    half = 1.959964 * math.sqrt(max(either / n - difference**2, 0) / n)
    return {"difference": difference, "ci95": (difference - half, difference + half), "p": min(1.0, 2 * tail)}


# ---------------------------------------------------------------------------------------------------------------
# Training data


def sample_batch(
    batch_size: int, generator: torch.Generator, pool: Tensor, plain: bool = False, second_guess: float = 0.0
) -> rm.Batch:
    """A Batch for rm.train: symmetric images of the pool's boards at a random turn of a synthetic revision.

    4 to 20 cells take part in four boards of five, 0 to 60 in the fifth (for --solve and for worse boards).  In half
    the boards all of them start wrong, as the task does; in the others a random share starts masked.
    plain: masks alone, a uniform share of the cells, and a loss at the masked cells only (plain mask diffusion).
    pool: int64 [P, 81] on the generator's device.
    """
    device = generator.device
    picks = torch.randint(len(pool), (batch_size,), generator=generator, device=device)
    clean = shuffle_symmetries(pool[picks], generator)
    rand = partial(torch.rand, generator=generator, device=device)
    if plain:
        masked = rand(batch_size, 81) < rand(batch_size, 1)
        return clean.masked_fill(masked, MASK).unsqueeze(0), clean, masked
    cells = choose_cells(batch_size, 4, 20, generator)
    cells[::5] = choose_cells(len(cells[::5]), 0, 60, generator)
    wrong = rm.uniform_wrong(clean, DIGITS.to(device), 2, generator)
    p_wrong = torch.where(rand(batch_size, 1) < 0.5, 1.0, rand(batch_size, 1))
    states = rm.sample_trajectory(
        clean, cells, wrong, MASK, T=6, p_wrong=p_wrong, second_guess=second_guess, generator=generator
    )
    turn = torch.randint(6, (batch_size,), generator=generator, device=device)
    return rm.history_until(states, turn), clean, None


# ---------------------------------------------------------------------------------------------------------------
# Baselines: other rules in the place of Eq. 1, for the same loop (revise) and the same number of forward passes


def direct_replacement(logits, tokens, mask_id, editable=None, **_) -> Tensor:
    """Every editable position takes its likeliest token (MASK excluded), masked or not."""
    best, _ = rm.reveal_confidence(logits, mask_id)
    return best if editable is None else torch.where(editable, best, tokens)


def remasking(max_turns: int, by: str, seed: int = 0, cells: int = 20) -> Callable[..., Tensor]:
    """A rule that in turn re-masks some cells and reveals them: the usual ways to let mask diffusion correct itself.

    by: "confidence" re-masks the tokens of least probability; "random" any (as ReMDM does).  The number of cells
    falls linearly from `cells`, the largest number of wrong ones, to 0 over max_turns.
    """
    generator, turn = torch.Generator().manual_seed(seed), 0

    def rule(logits, tokens, mask_id, editable=None, **_):
        nonlocal turn
        turn += 1
        if (tokens == mask_id).any():
            return rm.decide(logits, tokens, mask_id, editable, allow_remask=False)
        if by == "random":
            score = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        else:
            others = logits.index_fill(-1, torch.tensor(mask_id, device=logits.device), -torch.inf)
            score = others.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        score = score if editable is None else score.masked_fill(~editable, torch.inf)
        count = round(cells * (1 - turn / max_turns))
        lowest = score.argsort(-1).argsort(-1) < count
        return tokens.masked_fill(lowest & (score < torch.inf), mask_id)

    return rule


def truth_everywhere(state: Tensor, clean: Tensor, mask_id: int, editable: Tensor | None) -> tuple[Tensor, Tensor]:
    """The labels of the variant "direct": the oracle's roles, but the truth as target at wrong cells too."""
    return clean, rm.oracle_action(state, clean, mask_id, editable)[1]


MAKE_RULE = {  # a fresh rule for each chunk of boards, made from the number of turns; every other variant has Eq. 1
    "plain": lambda turns: remasking(turns, "confidence"),
    "direct": lambda turns: direct_replacement,
}
BASELINES = {  # by variant: label -> (turns, None for --max-turns; how the rule is made)
    "plain": {
        "plain mask diffusion, one-shot": (1, MAKE_RULE["direct"]),
        "plain mask diffusion, direct replacement": (None, MAKE_RULE["direct"]),
        "plain mask diffusion, low-confidence re-masking": (None, MAKE_RULE["plain"]),
        "plain mask diffusion, random re-masking": (None, lambda turns: remasking(turns, "random")),
    },
    "direct": {
        "trained for direct replacement, one-shot": (1, MAKE_RULE["direct"]),
        "trained for direct replacement": (None, MAKE_RULE["direct"]),
    },
}


def make_eq1(max_turns: int) -> Callable[..., Tensor]:
    """Reflective Masking's own rule, in the form of MAKE_RULE."""
    return rm.decide


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    model: MaskDiffusionTransformer,
    gamma: float,
    rotate: bool,
    clean: Tensor,
    start: Tensor,
    max_turns: int = 32,
    make_rule: Callable[[int], Callable] = make_eq1,
    editable: Tensor | None = None,
    reveal: int | None = None,
    chunk: int = 500,
) -> dict:
    """The four metrics of revising start towards clean, int64 [n, 81] both, on the model's device.

    Shares are fractions.  right: a character a board, "1" where exact, for paired tests.
    """
    began, device, results, mistakes = time.perf_counter(), model.embedding.device, [], [0, 0]
    for rows in torch.arange(len(clean)).split(chunk):
        history = HistoryReference(model.embedding.detach(), gamma, rotate)
        rule = make_rule(max_turns)
        result = rm.revise(
            model, start[rows].to(device), MASK, history, max_turns, reveal=reveal, trace=True, rule=rule,
            editable=None if editable is None else editable[rows].to(device),
            # With history a state that returns is no dead end, since the memory still grows; nor for a random rule.
            patience=None if rule is rm.decide and not gamma else max_turns,
        )
        results.append(result)
        for i, count in enumerate(replay_mistakes(result.trace.cpu(), clean[rows])):
            mistakes[i] += count
    tokens = torch.cat([result.tokens for result in results]).cpu()
    right, n = is_exact(tokens, clean), len(clean)
    turns = [turn for result in results for turn in result.turns]
    status = [name for result in results for name in result.status]
    return {
        "exact": right.float().mean().item(),
        "valid": is_valid(tokens).float().mean().item(),
        "replay_mistake": mistakes[1] / max(mistakes[0], 1),
        "conflict_cells": conflicts(tokens).sum(-1).float().mean().item(),
        "n": n,
        "ci95_exact": rm.wilson_interval(int(right.sum()), n),
        "ci95_valid": rm.wilson_interval(int(is_valid(tokens).sum()), n),
        "remasked_wrong_cells": mistakes[0],
        "replayed_cells": mistakes[1],
        "max_turns": max_turns,
        "mean_turns": sum(turns) / n,
        "status": {name: status.count(name) / n for name in (rm.FIXED_POINT, rm.CYCLE, rm.OUT_OF_TURNS)},
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - began,
        "right": "".join("01"[int(r)] for r in right),
    }


# ---------------------------------------------------------------------------------------------------------------
# Training


def sudoku_config(width: int = 128) -> TransformerConfig:
    """4 layers; width 128 gives 793,000 parameters.  A cell's coordinates are its row, column and box."""
    coordinates = [[cell // 9, cell % 9, cell // 27 * 3 + cell % 9 // 3] for cell in range(81)]
    return TransformerConfig(vocabulary=10, length=81, width=width, feed_forward=4 * width, coordinates=coordinates)


def training_run(model, variant: str, pool: Tensor, args, steps: int, **changes):
    """rm.train with the settings of a variant; changes replace any of train's arguments (for the studies)."""
    gamma, rotate = VARIANTS[variant]
    plain = variant == "plain"
    settings = TRAINING | dict(gamma=gamma, rotate=rotate, compile=args.compile, precision=args.precision)
    settings |= dict(seed=args.seed, own_states=0.0 if plain else args.own_states, accept=is_valid)
    if variant == "direct":
        settings |= dict(oracle=truth_everywhere, rule=direct_replacement)
    second_guess = changes.pop("second_guess", args.second_guess)
    sample = partial(sample_batch, pool=pool, plain=plain, second_guess=second_guess)
    return rm.train(model, sample, steps, MASK, **(settings | changes))


def measured_steps(minutes: float, variant: str, pool: Tensor, args) -> int:
    """How many steps fit the time here: 30 steps of a throw-away model are timed after 10 to warm up."""
    model = MaskDiffusionTransformer(sudoku_config()).to(pool.device)
    seconds = [stats["seconds"] for _, stats in training_run(model, variant, pool, args, 40, warmup=40)]
    steps = torch.tensor(max(1, int(minutes * 60 * 30 / (seconds[-1] - seconds[9]))), device=pool.device)
    if rm.dist.is_initialized():  # every process has to make the same number
        rm.dist.broadcast(steps, 0)
    return int(steps)


def train_variant(variant: str, args) -> dict:
    """Trains (or resumes) one variant and evaluates it; writes OUT/<variant>_seed<seed>.pt and .json.

    A finished run, one whose .json exists, is read back instead.  Returns its record.
    """
    name, main = args.out / f"{variant}_seed{args.seed}", rm.is_main_process()
    keys = ("steps", "minutes", "pool", "second_guess", "own_states", "precision", "n", "corrupt", "max_turns")
    settings = {key: getattr(args, key) for key in keys} | {"corrupt": list(args.corrupt)}
    settings["minutes"] = None if args.steps else args.minutes
    if name.with_suffix(".json").exists():
        record = json.loads(name.with_suffix(".json").read_text())
        rm.require_same(settings, record["settings"], name.with_suffix(".json"))
        if main:
            print(f"{name}.json is there, {variant} seed {args.seed} is done")
        return record if main else {}
    device = args.device
    pool = random_boards(args.pool, args.seed).to(device)
    validation = random_boards(args.validation, VALIDATION_SEED)
    start = corrupt(validation, 4, 20, VALIDATION_SEED)
    torch.manual_seed(args.seed)
    model = MaskDiffusionTransformer(sudoku_config()).to(device)
    resume = name.with_suffix(".resume.pt")
    steps, curve = args.steps, []
    if resume.exists():
        notes = torch.load(resume, map_location="cpu", weights_only=True)["notes"]
        rm.require_same(settings, notes["settings"], resume)
        steps, curve = notes["steps"], notes["curve"]
    steps = steps or measured_steps(args.minutes, variant, pool, args)
    every = max(1, min(250, steps // 8))
    notes = {"steps": steps, "curve": curve, "settings": settings}
    gamma, rotate = VARIANTS[variant]
    make_rule = MAKE_RULE.get(variant, make_eq1)
    if main:
        print(f"{variant}, seed {args.seed}: {steps} steps of {TRAINING['batch_size']} boards on {device}")
    run = training_run(model, variant, pool, args, steps, checkpoint=resume, checkpoint_every=every, notes=notes)
    for step, stats in run:
        if not main or step % max(1, every // 10) and step % every and step < steps:
            continue
        if step % every == 0 or step == steps:
            score = evaluate(model, gamma, rotate, validation, start, args.max_turns, make_rule)
            losses = {key: stats[key].item() for key in ("reveal", "remask", "keep")}
            curve.append({"step": step, "minutes": stats["seconds"] / 60, **losses}
                         | {key: score[key] for key in ("exact", "valid", "n")})
        left = stats["seconds"] / step * (steps - step)
        line = (
            f"step {step}/{steps} loss: reveal {stats['reveal']:.3f} re-mask {stats['remask']:.3f} "
            f"keep {stats['keep']:.3f}"
        )
        if curve:
            line += f" exact {100 * curve[-1]['exact']:.1f} % valid {100 * curve[-1]['valid']:.1f} %"
        line += f" {left // 60:.0f}:{left % 60:02.0f} left"
        terminal = sys.stdout.isatty()
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal and step < steps else "\n", flush=True)
    if not main:
        return {}
    clean = random_boards(args.n, TEST_SEED)
    test = corrupt(clean, *args.corrupt, TEST_SEED)
    record = {"variant": variant, "seed": args.seed, "steps": steps, "minutes": curve[-1]["minutes"]}
    record |= {"gamma": gamma, "rotate": rotate, "settings": settings, "training": TRAINING}
    record |= {"compiled": args.compile, "provenance": rm.provenance()}
    rm.save_checkpoint(name.with_suffix(".pt"), model, task="sudoku", **record)
    record["curve"] = curve
    print(f"wrote {name.with_suffix('.pt')}")
    rows = BASELINES.get(variant, {f"ours, {variant}, seed {args.seed}": (None, make_eq1)})
    record["test"] = {
        label: evaluate(model, gamma, rotate, clean, test, turns or args.max_turns, make)
        for label, (turns, make) in rows.items()
    }
    rm.write_json(name.with_suffix(".json"), record)
    resume.unlink(missing_ok=True)
    return record


# ---------------------------------------------------------------------------------------------------------------
# Studies: each a JSON and a figure in OUT


def study_turns(model, info, args) -> dict:
    """Accuracy against the number of turns: test-time scaling, beyond the 6 of the training trajectories."""
    clean = random_boards(args.n, TEST_SEED)
    start = corrupt(clean, *args.corrupt, TEST_SEED)
    turns = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    scores = [evaluate(model, info["gamma"], info["rotate"], clean, start, count) for count in turns]
    rows = [{"turns": count} | {k: v for k, v in s.items() if k != "right"} for count, s in zip(turns, scores)]
    draw_lines(args.out / "sudoku_turns.png", "turns at most", turns, percent(rows, "exact", "valid"), log=True)
    return {"rows": rows}


def study_severity(model, info, args) -> dict:
    """Accuracy against the number of wrong cells, from 1 to 40; training revises 4 to 20, rarely up to 60."""
    cells = [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40]
    clean, rows = random_boards(max(1, args.n // 4), TEST_SEED), []
    for count in cells:
        start = corrupt(clean, count, count, TEST_SEED + count)
        score = evaluate(model, info["gamma"], info["rotate"], clean, start, args.max_turns)
        rows.append({"wrong_cells": count} | {k: v for k, v in score.items() if k != "right"})
    draw_lines(args.out / "sudoku_severity.png", "wrong cells", cells, percent(rows, "exact", "valid"))
    return {"rows": rows}


def study_calibration(model, info, args) -> dict:
    """What p(x_i) means, and how well it re-masks, over every turn of the test revisions.

    At a visible position p(x_i) should be the probability that x_i is right, and p(x_i) + p(M) should be 1.
    Re-mask precision: share of the re-masked cells that were wrong.  Recall: share of the wrong visible cells that
    are re-masked in that turn.
    """
    clean = random_boards(args.n, TEST_SEED)
    start = corrupt(clean, *args.corrupt, TEST_SEED)
    device, seen = model.embedding.device, []
    for rows in torch.arange(len(clean)).split(500):
        history = HistoryReference(model.embedding.detach(), info["gamma"], info["rotate"])
        tokens, truth = start[rows].to(device), clean[rows].to(device)
        for turn in range(1, args.max_turns + 1):  # revise, but with the truth at hand
            with torch.no_grad():
                logits = model(history.push(tokens))
            p, visible = logits.softmax(-1), tokens != MASK
            own = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            facts = torch.stack([own, p[..., MASK], (tokens == truth).float(), torch.full_like(own, turn)], -1)
            seen.append(facts[visible].cpu())
            following = rm.decide(logits, tokens, MASK)
            going = (following != tokens).any(-1)
            history.keep(going)
            tokens, truth = following[going], truth[going]
            if not len(tokens):
                break
    own, other, right, turn_of = torch.cat(seen).T
    right = right.bool()
    bins = (own * 20).long().clamp(max=19)
    rows = []
    for b in range(20):
        inside = bins == b
        n, hits = int(inside.sum()), int(right[inside].sum())
        mean_p, share = (own[inside].mean().item(), hits / n) if n else (None, None)
        rows.append({"low": b / 20, "n": n, "mean_p": mean_p, "right": share, "ci95": rm.wilson_interval(hits, n)})
    remask = other > own
    ece = sum(row["n"] * abs(row["mean_p"] - row["right"]) for row in rows if row["n"]) / len(own)

    def precision_recall(chosen: Tensor) -> dict:
        picked, wrong = int((chosen & remask).sum()), int((chosen & ~right).sum())
        hits = int((chosen & remask & ~right).sum())
        return {
            "precision": hits / max(picked, 1), "ci95_precision": rm.wilson_interval(hits, picked), "remasked": picked,
            "recall": hits / max(wrong, 1), "ci95_recall": rm.wilson_interval(hits, wrong), "wrong": wrong,
        }

    draw_calibration(args.out / "sudoku_calibration.png", rows, own + other)
    return {
        "rows": rows,
        "expected_calibration_error": ece,
        "visible_positions": len(own),
        "mean_p_own_plus_mask": (own + other).mean().item(),
        "share_of_sums_below_0.99": (own + other < 0.99).float().mean().item(),
        "remask_all_turns": precision_recall(turn_of > 0),
        "remask_first_turn": precision_recall(turn_of == 1),
    }


def study_speed(model, info, args) -> dict:
    """Boards a second of a whole revision, at batch 1 and 512, on this device and number of threads."""
    rows, clean = [], random_boards(512, TEST_SEED)
    start = corrupt(clean, *args.corrupt, TEST_SEED)
    for batch, count in ((1, 50), (512, 512)):
        evaluate(model, info["gamma"], info["rotate"], clean[:batch], start[:batch], args.max_turns)  # warm-up
        seconds = []
        for _ in range(3):
            score = evaluate(
                model, info["gamma"], info["rotate"], clean[:count], start[:count], args.max_turns, chunk=batch
            )
            seconds.append(score["seconds"])
        rows.append({"batch": batch, "boards": count, "boards_per_second": count / sorted(seconds)[1]})
        print(f"batch {batch}: {rows[-1]['boards_per_second']:.1f} boards a second (median of 3)")
    return {"rows": rows}


def study_training(name: str, choices: dict[str, tuple[str, dict]], args) -> dict:
    """Trains one model a choice for --study-steps steps, everything else equal, and scores each on the test boards.

    choices: label -> (variant, changes of rm.train's arguments).  Finished choices are read back from OUT.
    """
    pool = random_boards(args.pool, args.seed).to(args.device)
    clean = random_boards(args.n, TEST_SEED)
    start = corrupt(clean, *args.corrupt, TEST_SEED)
    path = args.out / f"sudoku_{name}.json"
    settings = {key: getattr(args, key) for key in ("study_steps", "pool", "n", "max_turns", "precision")}
    settings |= {"second_guess": args.second_guess, "own_states": args.own_states, "corrupt": list(args.corrupt)}
    study = {"rows": [], "settings": settings, "provenance": rm.provenance()}
    if path.exists():
        study = json.loads(path.read_text())
        rm.require_same(settings, study["settings"], path)
    rows = study["rows"]
    for label, (variant, changes) in choices.items():
        if any(row["label"] == label for row in rows):
            continue
        torch.manual_seed(args.seed)
        model = MaskDiffusionTransformer(sudoku_config()).to(args.device)
        for step, stats in training_run(model, variant, pool, args, args.study_steps, **changes):
            if step % max(1, args.study_steps // 4) == 0:
                print(f"{name}, {label}: step {step}/{args.study_steps}, {stats['seconds'] / 60:.1f} min", flush=True)
        gamma, rotate = VARIANTS[variant]
        score = evaluate(
            model, changes.get("gamma", gamma), changes.get("rotate", rotate), clean, start, args.max_turns
        )
        rows.append({"label": label, "changes": changes, "minutes": stats["seconds"] / 60} | score)
        rm.write_json(path, study)
    draw_bars(args.out / f"sudoku_{name}.png", rows)
    return study


GAMMAS = (0.0, 0.4, 0.7, 0.9, 1.0)
STUDIES = {
    "turns": lambda args: study_turns(*args.model, args),
    "severity": lambda args: study_severity(*args.model, args),
    "calibration": lambda args: study_calibration(*args.model, args),
    "speed": lambda args: study_speed(*args.model, args),
    "gamma": lambda args: study_training(
        "gamma",
        {
            f"gamma {gamma}{', rotation' if rotate else ''}": ("full", {"gamma": gamma, "rotate": rotate})
            for gamma in GAMMAS
            for rotate in ((False, True) if gamma else (False,))
        },
        args,
    ),
    "data": lambda args: study_training(
        "data",
        {
            "no own states, no second guesses": ("full", {"own_states": 0.0, "second_guess": 0.0}),
            "second guesses": ("full", {"own_states": 0.0, "second_guess": 0.3}),
            "own states": ("full", {"own_states": 0.5, "second_guess": 0.0}),
            "own states, second guesses": ("full", {"own_states": 0.5, "second_guess": 0.3}),
            "the same, valid boards not accepted": ("full", {"own_states": 0.5, "second_guess": 0.3, "accept": None}),
        },
        args,
    ),
}


# ---------------------------------------------------------------------------------------------------------------
# Figures


def percent(rows: list[dict], *keys: str) -> dict[str, tuple[list, list]]:
    """key -> (values in %, their 95 % intervals in % where a row has them)."""
    return {
        key: ([100 * row[key] for row in rows], [[100 * v for v in row[f"ci95_{key}"]] for row in rows])
        if f"ci95_{key}" in rows[0]
        else ([100 * row[key] for row in rows], None)
        for key in keys
    }


def figure(width: float = 6.0, height: float = 3.6):
    """An empty figure and its axes, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save_figure(fig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw_lines(path: Path, xlabel: str, x: list, series: dict, log: bool = False) -> None:
    """One line a series (values, intervals as a band) against x, in %."""
    fig, axes = figure()
    for label, (values, intervals) in series.items():
        (line,) = axes.plot(x, values, marker="o", markersize=3, label=label)
        if intervals:
            axes.fill_between(x, *zip(*intervals), color=line.get_color(), alpha=0.2, linewidth=0)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
    axes.set(xlabel=xlabel, ylabel="boards, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(fig, path)


def draw_bars(path: Path, rows: list[dict]) -> None:
    """Exact and valid of each row, with 95 % intervals."""
    fig, axes = figure(7.0, 0.6 + 0.36 * len(rows))
    for offset, key in ((-0.18, "exact"), (0.18, "valid")):
        values, intervals = percent(rows, key)[key]
        error = [[v - low for v, (low, _) in zip(values, intervals)], [h - v for v, (_, h) in zip(values, intervals)]]
        places = [i + offset for i in range(len(rows))]
        axes.errorbar(values, places, xerr=error, fmt="o", markersize=4, capsize=2, label=key)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="boards, %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False)
    save_figure(fig, path)


def draw_calibration(path: Path, rows: list[dict], sums: Tensor) -> None:
    """Left: share right against p(x_i), with 95 % intervals.  Right: the distribution of p(x_i) + p(M)."""
    fig, axes = figure(8.0, 3.6)
    axes.remove()
    left, middle = fig.subplots(1, 2)
    filled = [row for row in rows if row["n"]]
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    error = list(zip(*[(row["right"] - row["ci95"][0], row["ci95"][1] - row["right"]) for row in filled]))
    p, share = [row["mean_p"] for row in filled], [row["right"] for row in filled]
    left.errorbar(p, share, yerr=error, fmt="o", markersize=3, capsize=2)
    left.set(xlabel="p(x) at visible cells", ylabel="share of them right")
    middle.hist(sums.numpy(), bins=[i / 50 for i in range(51)] + [1.02], log=True)
    middle.set(xlabel="p(x) + p(MASK) at visible cells", ylabel="cells")
    for axis in (left, middle):
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(fig, path)


def animate(path: Path, trace: Tensor, given: Tensor) -> None:
    """A GIF of one revision, a frame a turn.  trace: int64 [turns + 1, 81].  given: bool [81], drawn bold.

    Amber: re-masked in this turn; green: revealed in this turn; red digit: breaks a rule.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.patches import Rectangle

    fig, axes = figure(3.6, 3.9)

    def frame(index: int) -> None:
        index = min(index, len(trace) - 1)  # the last state stays a while
        now, before = trace[index], trace[max(index - 1, 0)]
        broken = conflicts(now)
        axes.clear()
        axes.set(xlim=(0, 9), ylim=(9, 0), aspect="equal", title=f"turn {index}")
        axes.axis("off")
        for cell in range(81):
            x, y, digit = cell % 9, cell // 9, int(now[cell])
            if now[cell] != before[cell] or digit == MASK:
                axes.add_patch(Rectangle((x, y), 1, 1, color="#ffd98a" if digit == MASK else "#a8e0b0", linewidth=0))
            color = "#c62828" if broken[cell] else "black"
            weight = "bold" if given[cell] else "normal"
            axes.text(x + 0.5, y + 0.55, str(digit or ""), ha="center", va="center", color=color, weight=weight)
        for line in range(10):
            width = 1.8 if line % 3 == 0 else 0.5
            axes.plot([line, line], [0, 9], color="black", linewidth=width)
            axes.plot([0, 9], [line, line], color="black", linewidth=width)

    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(fig, frame, frames=len(trace) + 3).save(path, PillowWriter(fps=1), dpi=100)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------
# The terminal


def show_turn(now: Tensor, before: Tensor, color: bool) -> str:
    """A board as text.  _ is a mask; before a cell: - re-masked, + revealed in this turn; after it: ! breaks a rule."""
    broken, lines = conflicts(now), []
    for cell in range(81):
        digit, mark = int(now[cell]), " "
        if now[cell] != before[cell]:
            mark = "-" if digit == MASK else "+"
        text = f"{mark}{digit or '_'}{'!' if broken[cell] else ' '}"
        if color:
            code = "31" if broken[cell] else {"-": "33", "+": "32"}.get(mark)
            text = f"\033[{code}m{text}\033[0m" if code else text
        lines.append(text + ("| " if cell % 9 in (2, 5) else ""))
    rows = ["".join(lines[row * 9 : row * 9 + 9]) for row in range(9)]
    rule = "---------+----------+---------"
    return "\n".join(rows[:3] + [rule] + rows[3:6] + [rule] + rows[6:])


def revise_board(args, board: Tensor, solve: bool) -> dict:
    """--revise and --solve: shows every turn, writes the animation when asked, returns the JSON record."""
    model, info = args.model
    editable = (board == MASK) if solve else torch.ones_like(board, dtype=torch.bool)
    history = HistoryReference(model.embedding.detach(), info["gamma"], info["rotate"])
    result = rm.revise(
        model, board.unsqueeze(0).to(args.device), MASK, history, args.max_turns, trace=True,
        editable=editable.unsqueeze(0).to(args.device), reveal=args.reveal,
        patience=args.max_turns if info["gamma"] else None,
    )
    trace, color = result.trace[:, 0].cpu(), sys.stdout.isatty()
    print("_ masked   -_ re-masked in this turn   +5 revealed in this turn   5! breaks a rule\n")
    for turn, (before, now) in enumerate(zip(torch.cat([trace[:1], trace]), trace)):
        changed = int((before != now).sum())
        print(f"turn {turn}: {changed} cells changed" if turn else "the board")
        print(show_turn(now, before, color) + "\n")
    tokens = result.tokens[0].cpu()
    valid = bool(is_valid(tokens))
    print(f"{result.status[0]} after {result.turns[0]} turns; {'valid' if valid else 'not valid'}")
    if args.gif:
        animate(args.gif, trace, ~editable if solve else torch.zeros(81, dtype=torch.bool))
    text = "".join(str(int(digit)) for digit in tokens)
    return {"board": text, "turns": result.turns[0], "status": result.status[0], "valid": valid}


def print_table(rows: dict[str, dict]) -> None:
    """The paper's Sudoku table beside ours: label -> an evaluation."""
    print(f"\n{'':48}{'exact %':>22}{'valid %':>9}{'replay %':>10}{'conflict cells':>16}{'turns':>7}")
    for variant, (exact, valid, replay, cells) in PAPER.items():
        print(f"{'paper, ' + variant:48}{exact:>8.1f}{'':14}{valid:>9.1f}{replay:>10.2f}{cells:>16.3f}")
    for label, score in rows.items():
        low, high = (100 * bound for bound in score["ci95_exact"])
        print(
            f"{label:48}{100 * score['exact']:>8.1f}{f' ({low:.1f} to {high:.1f})':<14}{100 * score['valid']:>9.1f}"
            f"{100 * score['replay_mistake']:>10.2f}{score['conflict_cells']:>16.3f}{score['mean_turns']:>7.1f}"
        )
    print(f"ours: n = {next(iter(rows.values()))['n']} boards, 95 % intervals; the paper's boards are not published")


# ---------------------------------------------------------------------------------------------------------------
# The command line


def parse_board(text: str, blanks: bool, where: str = "the board") -> Tensor:
    """int64 [81] from 81 digits, 0 or . for a blank.  Raises InputError that says where and what is wrong."""
    text = "".join(text.split())
    if len(text) != 81 or not set(text) <= set("0123456789."):
        raise InputError(f"{where} must be 81 digits (0 or . for a blank), got {len(text)} characters: {text[:90]!r}")
    board = torch.tensor([int(character) for character in text.replace(".", "0")])
    if not blanks and (board == MASK).any():
        raise InputError(f"{where} must have no blank cells")
    return board


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers in the file."""
    try:
        lines = [(number, line.strip()) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not lines:
        raise InputError(f"{path} is empty")
    return lines


def read_boards(path: Path) -> Tensor:
    """Complete valid boards, 81 digits a line: int64 [n, 81]."""
    lines = read_lines(path)
    boards = torch.stack([parse_board(line, blanks=False, where=f"{path} line {number}") for number, line in lines])
    for (number, _), valid in zip(lines, is_valid(boards)):
        if not valid:
            raise InputError(f"{path} line {number} is no valid solved board")
    return boards


def read_puzzles(path: Path) -> tuple[Tensor, Tensor]:
    """Puzzle and solution a line, 81 characters each: two int64 [n, 81]."""
    pairs = []
    for number, line in read_lines(path):
        parts = line.split()
        if len(parts) != 2:
            raise InputError(f"{path} line {number} must be a puzzle and its solution, got {len(parts)} words")
        puzzle = parse_board(parts[0], blanks=True, where=f"{path} line {number}, the puzzle,")
        solution = parse_board(parts[1], blanks=False, where=f"{path} line {number}, the solution,")
        if not is_valid(solution) or ((puzzle != MASK) & (puzzle != solution)).any():
            raise InputError(f"{path} line {number}: the solution does not solve the puzzle")
        pairs.append((puzzle, solution))
    puzzles, solutions = zip(*pairs)
    return torch.stack(puzzles), torch.stack(solutions)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reflective Masking on Sudoku: train, evaluate, revise boards, solve puzzles. "
        "Without arguments: train the full variant for --minutes, evaluate it and draw its figures.",
    )
    group = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    add = group.add_argument
    add("--evaluate", action="store_true", help="score --checkpoint on the test boards, or on --boards")
    add("--revise", metavar="BOARD", help="repair a board of 81 digits and show every turn (0 or . is masked)")
    add("--solve", metavar="PUZZLE", help="solve a puzzle: clues locked, 0 or . for blanks")
    add("--puzzles", type=Path, metavar="FILE", help="score solving: a puzzle and its solution a line")
    add("--study", choices=[*STUDIES, "all"], help="one of the README's studies: a JSON and a figure")
    add = parser.add_argument_group("training").add_argument
    add("--variant", choices=[*VARIANTS, "all"], default="full", help="'all': every model of the README's tables")
    add("--minutes", type=float, default=15, help="training time; turned into a number of steps (default 15)")
    add("--steps", type=int, help="train exactly this many steps instead, for equal training")
    add("--second-guess", type=float, default=0.3, help="share of second wrong guesses in trajectories (default 0.3)")
    add("--own-states", type=float, default=0.5,
        help="share of the batch that goes on from own decisions (default 0.5; 0 is better for rm and direct)")
    add("--pool", type=int, default=10_000, help="training boards before symmetries (default 10000)")
    add("--validation", type=int, default=300, help="validation boards (default 300)")
    add("--study-steps", type=int, default=800, help="training steps a model in --study gamma and data")
    add("--precision", choices=["bf16", "float32"], help="default bf16 where the processor has it")
    add("--compile", action="store_true", help="torch.compile the network (needs a C++ compiler on CPU)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--checkpoint", type=Path, default=HERE / "checkpoints/sudoku_full.pt", help="default: the shipped one")
    add("--boards", type=Path, metavar="FILE", help="solved boards, 81 digits a line, instead of random ones")
    add("--n", type=int, default=2000, help="test boards at most (default 2000)")
    add("--corrupt", type=int, nargs=2, default=(4, 20), metavar=("LOW", "HIGH"), help="wrong cells (default 4 20)")
    add("--max-turns", type=int, default=32, help="forward passes at most (default 32)")
    add("--reveal", type=int, help="reveal at most this many cells a turn, most confident first (default: all)")
    add = parser.add_argument_group("general").add_argument
    add("--seed", type=int, default=0, help="of training; with --evaluate, of the test boards (default 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--out", type=Path, help="where files go (default runs/sudoku, with --smoke runs/smoke)")
    add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    add("--gif", type=Path, metavar="FILE", help="with --revise or --solve: write the revision as an animation")
    add("--smoke", action="store_true", help="everything tiny, in seconds, to see that it runs")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
    args = parser.parse_args()
    single = args.revise is not None or args.solve is not None
    if args.evaluate or args.puzzles or single:  # an option that would be ignored is an error
        unused = ["variant", "minutes", "steps", "second_guess", "own_states", "pool", "validation", "study_steps"]
        unused += ["precision", "compile"] + ["corrupt"] * (not args.evaluate) + ["n", "seed"] * single
        for name in unused:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no effect there: it belongs to training or the test boards")
    if args.smoke:
        args.steps, args.study_steps, args.pool, args.validation, args.n, args.max_turns = 4, 1, 20, 8, 8, 4
    args.out = args.out or HERE / ("runs/smoke" if args.smoke else "runs/sudoku")
    if not 0 <= args.seed < TEST_SEED:
        parser.error(f"--seed must lie in 0..{TEST_SEED - 1}: the seeds above make the test and validation boards")
    if args.boards and not args.evaluate:
        parser.error("--boards goes with --evaluate")
    if args.gif and (args.revise is None and args.solve is None or args.gif.suffix != ".gif"):
        parser.error("--gif goes with --revise or --solve and must end in .gif")
    if args.reveal is not None and (args.reveal < 1 or not (args.evaluate or args.puzzles or args.revise or args.solve)):
        parser.error("--reveal must be at least 1, and goes with --evaluate, --puzzles, --revise or --solve")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json} is a folder")
    low, high = args.corrupt
    if not 0 <= low <= high <= 81:
        parser.error(f"--corrupt must be 0 <= LOW <= HIGH <= 81, got {low} {high}")
    for name in ("n", "max_turns", "pool", "validation", "study_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < args.minutes < 1e5 or (args.steps is not None and args.steps < 1):
        parser.error("--minutes and --steps must be positive")
    if not (0 <= args.second_guess <= 1 and 0 <= args.own_states <= 1):
        parser.error("--second-guess and --own-states must lie in [0, 1]")
    return args


def load(args) -> None:
    args.model = rm.load_checkpoint(args.checkpoint, "sudoku", args.device, ("gamma", "rotate", "variant"))


def main() -> None:
    args = parse_arguments()
    args.device = rm.start_device(args.device)
    args.precision = args.precision or rm.best_precision(args.device)
    if rm.dist.is_initialized() and (args.evaluate or args.puzzles or args.study or args.revise or args.solve):
        raise InputError("torchrun is for training; run this with one process")
    if args.revise is not None or args.solve is not None:
        board = parse_board(args.solve if args.revise is None else args.revise, blanks=True)
        if args.solve and conflicts(board).any():
            cell = int(conflicts(board).nonzero()[0])
            raise InputError(f"the puzzle's clues clash at row {cell // 9 + 1}, column {cell % 9 + 1}")
        load(args)
        result = revise_board(args, board, solve=bool(args.solve))
    elif args.puzzles:
        puzzles, solutions = (boards[: args.n] for boards in read_puzzles(args.puzzles))
        load(args)
        model, info = args.model
        result = evaluate(model, info["gamma"], info["rotate"], solutions, puzzles, args.max_turns,
                          editable=puzzles == MASK, reveal=args.reveal)
        result |= {"seed": args.seed, "checkpoint": args.checkpoint.name, "provenance": rm.provenance()}
        print(f"solved {100 * result['exact']:.1f} % of {result['n']} puzzles in {result['mean_turns']:.1f} turns")
    elif args.evaluate:
        clean = read_boards(args.boards)[: args.n] if args.boards else random_boards(args.n, TEST_SEED + args.seed)
        start = corrupt(clean, *args.corrupt, TEST_SEED + args.seed)
        load(args)
        model, info = args.model
        make_rule = MAKE_RULE.get(info["variant"], make_eq1)
        result = evaluate(
            model, info["gamma"], info["rotate"], clean, start, args.max_turns, make_rule, reveal=args.reveal
        )
        result |= {"seed": args.seed, "checkpoint": args.checkpoint.name, "provenance": rm.provenance()}
        baseline = info["variant"] in MAKE_RULE
        print_table({f"{'baseline' if baseline else 'ours'}, {info['variant']}": result})
    elif args.study:
        if args.study not in ("gamma", "data"):
            load(args)
        names = STUDIES if args.study == "all" else [args.study]
        result = {}
        for name in names:
            print(f"study: {name}")
            result[name] = STUDIES[name](args)
            result[name].setdefault("provenance", rm.provenance())
            rm.write_json(args.out / f"sudoku_{name}.json", result[name])
    else:
        result = train_all(args)
    if args.json and rm.is_main_process():
        rm.write_json(args.json, result)


def train_all(args) -> dict:
    """The bare command and --variant all: trains what is not done yet, prints the table, draws the curves."""
    runs = [(args.variant, args.seed)]
    if args.variant == "all":  # the full variant and plain RM with two seeds more
        runs = [(variant, args.seed) for variant in VARIANTS]
        runs += [(variant, args.seed + more) for more in (1, 2) for variant in ("full", "rm")]
    table, seed = {}, args.seed
    for variant, args.seed in runs:
        record = train_variant(variant, args)
        if not record:  # not the main process
            continue
        about = {key: record[key] for key in ("steps", "minutes", "provenance")}
        table |= {label: score | about for label, score in record["test"].items()}
    args.seed = seed
    if not table:
        return {}
    print_table(table)
    if args.variant != "all":
        curve = record["curve"]
        minutes = [point["minutes"] for point in curve]
        draw_lines(args.out / f"{args.variant}_curve.png", "minutes of training", minutes, percent(curve, "exact", "valid"))
        if args.variant not in MAKE_RULE:
            checkpoint = args.out / f"{args.variant}_seed{args.seed}.pt"
            args.model = rm.load_checkpoint(checkpoint, "sudoku", args.device)
            args.gif = args.out / f"{args.variant}_revision.gif"
            revise_board(args, corrupt(random_boards(1, TEST_SEED), 20, 20, TEST_SEED)[0], solve=False)
    result = {"table": table, "paper": PAPER}
    if args.variant == "all":
        ours = f"ours, full, seed {seed}"
        result["ours_against"] = {
            label: paired_test(table[ours]["right"], row["right"]) for label, row in table.items() if label != ours
        }
        print(f"\nexact of '{ours}' on the same boards, against")
        for label, test in result["ours_against"].items():
            low, high = (100 * bound for bound in test["ci95"])
            print(f"{label:44}{100 * test['difference']:>+7.1f} points ({low:+.1f} to {high:+.1f}), p = {test['p']:.2g}")
    rm.write_json(args.out / ("table.json" if args.variant == "all" else f"{args.variant}_table.json"), result)
    return result


if __name__ == "__main__":
    rm.run_script(main)
