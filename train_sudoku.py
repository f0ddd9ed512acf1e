"""Task 1: Sudoku revision.  A solved 9x9 board has 4 to 20 cells replaced by wrong digits; which
ones, nobody says.  The model re-masks what it doubts, reveals again, stops when nothing changes.

    python train_sudoku.py                   train the full variant, evaluate, draw
    python train_sudoku.py --variant all     every model of the tables; resumes where it stopped
    python train_sudoku.py --evaluate        score the shipped checkpoint on 2,000 boards
    python train_sudoku.py --study all       accuracy against turns and wrong cells; calibration
    python train_sudoku.py --revise BOARD    watch it repair a board; --solve PUZZLE locks the clues
    python train_sudoku.py --puzzles FILE    score solving

Reading order: boards and metrics, training data, baselines, evaluation, training, studies and
pictures, files and command line.  Tokens: MASK is 0, a digit is itself.
What differs from the paper: it states neither its training data nor its settings, so sample_batch,
own states and the constants are ours.  As there, any cell may be re-masked, except in --solve.
"""

import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import reflective_masking as rm
from history import HistoryReference
from reflective_masking import InputError

MASK = 0
DIGITS = torch.arange(1, 10)
PAPER = {  # exact %, valid %, replay mistake %, conflict cells: its Sudoku table
    "rm": (82.4, 86.6, 0.57, 0.578),
    "hr": (91.4, 91.8, 0.07, 0.300),
    "decay": (89.4, 89.6, 0.07, 0.362),
    "full": (93.4, 93.6, 0.03, 0.236),
}
VARIANTS = {  # gamma, rotate: four settings of Eq. 2; the paper does not state its gamma
    "rm": (0.0, False),
    "hr": (1.0, False),
    "decay": (0.9, False),
    "full": (0.9, True),
    "plain": (0.0, False),  # plain mask diffusion, trained on masks alone: the baselines' network
    "direct": (0.0, False),  # RM's states, but the target is always the truth: no MASK action
}
TRAINING = {"batch_size": 64, "learning_rate": 2.5e-3}
TASK = (4, 20)  # wrong cells of a board in the paper's task
TEST_SEED = 1_000_000  # training boards use the seeds below
VALIDATION_SEED = 2_000_000

# ------------------------------------------------------------------------------------------------
# Boards and the paper's four metrics; exact is (tokens == clean).all(-1)


def units_of(tokens: Tensor) -> Tensor:
    """The rows, columns and boxes: [..., 81] -> [..., 27, 9]."""
    grid = tokens.unflatten(-1, (9, 9))
    boxes = tokens.unflatten(-1, (3, 3, 3, 3)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return torch.cat([grid, grid.transpose(-1, -2), boxes], dim=-2)


MEMBERS = F.one_hot(units_of(torch.arange(81)), 81).sum(1)  # [27 units, 81 cells]
PEERS = (MEMBERS.T @ MEMBERS > 0) & ~torch.eye(81, dtype=torch.bool)  # [81, 81]: share a unit
PEERS_OF = [set(row.nonzero().flatten().tolist()) for row in PEERS]


def random_board(rng: random.Random) -> list[int]:
    """A random complete board, 81 digits: backtracking, the most constrained cell first; 2 ms."""
    board = [MASK] * 81

    def fill(left: dict[int, set[int]]) -> bool:  # empty cell -> the digits its peers leave
        if not left:
            return True
        cell = min(left, key=lambda cell: len(left[cell]))
        digits = sorted(left[cell])
        rng.shuffle(digits)
        others = {other: options for other, options in left.items() if other != cell}
        for digit in digits:
            board[cell] = digit
            peers = {peer: others[peer] - {digit} for peer in PEERS_OF[cell] if peer in others}
            if fill(others | peers):
                return True
        return False

    cells = list(range(81))
    rng.shuffle(cells)
    fill({cell: set(range(1, 10)) for cell in cells})
    return board


@cache  # 10,000 boards take 20 seconds, and --variant all asks ten times
def random_boards(count: int, seed: int) -> Tensor:
    """count complete boards, int64 [count, 81]; a longer list of the same seed begins alike."""
    rng = random.Random(seed)
    return torch.tensor([random_board(rng) for _ in range(count)])


def shuffle_symmetries(boards: Tensor, generator: torch.Generator) -> Tensor:
    """Each board under a random symmetry of Sudoku: bands, stacks, lines, transpose, digits.

    boards: int64 [B, 81], MASK allowed, on the generator's device.  Returns int64 [B, 81].
    """
    batch = len(boards)
    uniform = partial(torch.rand, generator=generator, device=boards.device)

    def line_order() -> Tensor:  # int64 [B, 9]: nine rows or columns, bands kept together
        band = uniform(batch, 3, 1).argsort(1)  # any order of the three bands
        within = uniform(batch, 3, 3).argsort(-1)  # and of the three lines of each
        return (band * 3 + within).view(batch, 9)

    rows = line_order().unsqueeze(2)
    columns = line_order().unsqueeze(1)
    board = torch.arange(batch, device=boards.device).view(-1, 1, 1)
    grid = boards.view(-1, 9, 9)[board, rows, columns]
    upright = uniform(batch, 1, 1) < 0.5  # half are transposed
    grid = torch.where(upright, grid, grid.transpose(1, 2)).reshape(batch, 81)
    digits = uniform(batch, 9).argsort(-1) + 1  # any order of the nine digits
    return F.pad(digits, (1, 0)).gather(1, grid)  # MASK, 0, stays MASK


def choose_cells(batch: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """bool [batch, 81]: low to high cells of each board, the number and the cells uniform."""
    device = generator.device
    count = torch.randint(low, high + 1, (batch, 1), generator=generator, device=device)
    order = torch.rand(batch, 81, generator=generator, device=device).argsort(-1).argsort(-1)
    return order < count


def corrupt(clean: Tensor, low: int, high: int, seed: int) -> Tensor:
    """The task's input, int64 [B, 81]: low to high cells get one of the eight wrong digits."""
    generator = torch.Generator().manual_seed(seed)
    cells = choose_cells(len(clean), low, high, generator)
    wrong = rm.uniform_wrong(clean, DIGITS, 1, generator)[0]
    return torch.where(cells, wrong, clean)


def is_valid(tokens: Tensor) -> Tensor:
    """Every row, column and box holds 1 to 9: bool [B] of int64 [B, 81]; a MASK is not valid."""
    return (units_of(tokens).sort(-1).values == DIGITS.to(tokens.device)).all(-1).all(-1)


def conflicts(tokens: Tensor) -> Tensor:
    """Cells whose digit occurs again in their row, column or box: bool [..., 81]; no MASK."""
    same = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & PEERS.to(tokens.device)
    return same.any(-1) & (tokens != MASK)


def replay_mistakes(trace: Tensor, clean: Tensor) -> tuple[int, int]:
    """(cells re-masked while wrong, those of them that later got a digit re-masked there again).

    trace: int64 [turns + 1, B, 81].  clean: int64 [B, 81].  A cell counts once.
    """
    tried = torch.zeros(*clean.shape, 10, dtype=torch.bool)  # wrong digits re-masked so far
    replayed = torch.zeros_like(clean, dtype=torch.bool)
    for before, after in zip(trace[:-1], trace[1:]):
        decoded = (before == MASK) & (after != MASK)
        replayed |= decoded & tried.gather(-1, after.unsqueeze(-1)).squeeze(-1)
        remasked = (before != MASK) & (after == MASK) & (before != clean)
        tried |= F.one_hot(before, 10).bool() & remasked.unsqueeze(-1)
    return int(tried.any(-1).sum()), int(replayed.sum())


def paired_test(ours: str, theirs: str) -> dict:
    """Exact on the same boards, ours minus theirs ("right" of evaluate), with its 95 % interval
    (Wald's for paired shares) and McNemar's exact two-sided p of boards that only one gets right.
    """
    n = len(ours)
    only_ours = sum(a > b for a, b in zip(ours, theirs))
    only_theirs = sum(a < b for a, b in zip(ours, theirs))
    either = only_ours + only_theirs
    tail = sum(math.comb(either, i) for i in range(min(only_ours, only_theirs) + 1)) / 2**either
    difference = (only_ours - only_theirs) / n
    half = 1.959964 * math.sqrt(max(either / n - difference**2, 0) / n)
    interval = (difference - half, difference + half)
    return {"difference": difference, "ci95": interval, "p": min(1.0, 2 * tail)}


# ------------------------------------------------------------------------------------------------
# Training data


def sample_batch(
    batch_size: int, generator: torch.Generator, pool: Tensor, plain: bool = False,
    second_guess: float = 0.0,
) -> rm.Batch:  # fmt: skip
    """A Batch for rm.train: symmetric images of the pool's boards, in a turn of a revision.

    4 to 20 cells take part in four boards of five, 0 to 60 in the fifth (for --solve and for
    worse boards).  In half the boards all of them start wrong, as the task does; in the others a
    random share, the rest masked.  pool: int64 [P, 81] on the generator's device.
    plain: masks alone, a uniform share of the cells, and a loss there only (mask diffusion).
    """
    device = generator.device
    uniform = partial(torch.rand, generator=generator, device=device)
    picked = torch.randint(len(pool), (batch_size,), generator=generator, device=device)
    clean = shuffle_symmetries(pool[picked], generator)
    if plain:
        chance = uniform(batch_size, 81)
        masked = chance < uniform(batch_size, 1)  # the share of masks ~ U[0, 1]
        return clean.masked_fill(masked, MASK).unsqueeze(0), clean, masked

    cells = choose_cells(batch_size, *TASK, generator)
    cells[::5] = choose_cells(len(cells[::5]), 0, 60, generator)
    wrong = rm.uniform_wrong(clean, DIGITS.to(device), 2, generator)
    as_the_task = uniform(batch_size, 1) < 0.5
    share = uniform(batch_size, 1)  # of cells that start wrong, in the other boards
    p_wrong = torch.where(as_the_task, 1.0, share)
    trajectory = rm.sample_trajectory(
        clean, cells, wrong, MASK, p_wrong=p_wrong, second_guess=second_guess, generator=generator
    )
    turn = torch.randint(6, (batch_size,), generator=generator, device=device)  # x(0) to x(5)
    return rm.history_until(trajectory, turn), clean, None


# ------------------------------------------------------------------------------------------------
# Baselines: other rules in the place of Eq. 1, for the same loop and number of forward passes


def direct_replacement(logits, tokens, mask_id, editable=None, **_) -> Tensor:
    """Every editable position takes its likeliest token (MASK excluded), masked or not."""
    best, _ = rm.best_token(logits, mask_id)
    return best if editable is None else torch.where(editable, best, tokens)


def remasking(max_turns: int, by: str, seed: int = 0, most: int = 20) -> Callable[..., Tensor]:
    """A rule that re-masks some cells, then reveals them: how mask diffusion usually corrects.

    by: "confidence" re-masks the tokens of least probability; "random" any (as ReMDM does).
    Their number falls linearly from most, the largest number of wrong cells, to 0 at max_turns.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = 0

    def rule(logits, tokens, mask_id, editable=None, **_) -> Tensor:
        nonlocal turn
        turn += 1
        if (tokens == mask_id).any():
            return rm.decide(logits, tokens, mask_id, editable, allow_remask=False)
        if by == "random":
            score = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        else:
            others = logits.index_fill(-1, torch.tensor(mask_id, device=logits.device), -torch.inf)
            score = others.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        if editable is not None:
            score = score.masked_fill(~editable, torch.inf)
        count = round(most * (1 - turn / max_turns))
        lowest = score.argsort(-1).argsort(-1) < count
        return tokens.masked_fill(lowest & (score < torch.inf), mask_id)

    return rule


def truth_everywhere(state, clean, mask_id, editable=None) -> tuple[Tensor, Tensor]:
    """The labels of "direct": the oracle's roles, but the truth as target at wrong cells too."""
    return clean, rm.oracle_action(state, clean, mask_id, editable)[1]


MAKE_RULE = {  # max_turns -> a fresh rule, by variant; the others follow Eq. 1
    "plain": partial(remasking, by="confidence"),
    "direct": lambda max_turns: direct_replacement,
}
BASELINES = {  # by variant: label -> turns (None: as many as the others have), how to make its rule
    "plain": {
        "plain mask diffusion, one-shot": (1, MAKE_RULE["direct"]),
        "plain mask diffusion, direct replacement": (None, MAKE_RULE["direct"]),
        "plain mask diffusion, low-confidence re-masking": (None, MAKE_RULE["plain"]),
        "plain mask diffusion, random re-masking": (None, partial(remasking, by="random")),
    },
    "direct": {
        "trained for direct replacement, one-shot": (1, MAKE_RULE["direct"]),
        "trained for direct replacement": (None, MAKE_RULE["direct"]),
    },
}

# ------------------------------------------------------------------------------------------------
# Evaluation


def revise_boards(
    model: rm.MaskDiffusionTransformer, gamma: float, rotate: bool, start: Tensor,
    max_turns: int = 32, reveal: int | None = None, solve: bool = False, rule=None,
) -> rm.Revision:  # fmt: skip
    """rm.revise of boards, int64 [B, 81], with its trace; solve locks their clues."""
    history = HistoryReference(model.embedding.detach(), gamma, rotate)
    start = start.to(model.embedding.device)
    editable = (start == MASK) | (not solve)
    # With history a state that returns is no dead end, as the memory still grows.
    patience = max_turns if gamma or rule else None
    how = {"trace": True, "patience": patience, "rule": rule}
    return rm.revise(model, start, MASK, history, max_turns, editable, reveal, **how)


def evaluate(
    model: rm.MaskDiffusionTransformer, gamma: float, rotate: bool, clean: Tensor, start: Tensor,
    max_turns: int = 32, make_rule: Callable[[int], Callable] | None = None,
    reveal: int | None = None, solve: bool = False,
) -> dict:  # fmt: skip
    """The four metrics of revising start towards clean, int64 [n, 81] both; shares as fractions.

    make_rule: a baseline's, None for Eq. 1.  reveal: as in rm.decide.  solve: start's clues are
    locked.  right: a character a board, "1" where exact, for paired tests.
    """
    began = time.perf_counter()
    results = []
    mistakes = []
    for rows in torch.arange(len(clean)).split(500):  # boards at a time
        rule = make_rule(max_turns) if make_rule else None
        result = revise_boards(model, gamma, rotate, start[rows], max_turns, reveal, solve, rule)
        results.append(result)
        mistakes.append(replay_mistakes(result.trace.cpu(), clean[rows]))

    n = len(clean)
    tokens = torch.cat([result.tokens for result in results]).cpu()
    exact = (tokens == clean).all(-1)
    valid = is_valid(tokens)
    status = [name for result in results for name in result.status]
    remasked, replayed = map(sum, zip(*mistakes))
    return {
        "exact": exact.float().mean().item(),
        "valid": valid.float().mean().item(),
        "replay_mistake": replayed / max(remasked, 1),
        "conflict_cells": conflicts(tokens).sum(-1).float().mean().item(),
        "n": n,
        "ci95_exact": rm.wilson_interval(int(exact.sum()), n),
        "ci95_valid": rm.wilson_interval(int(valid.sum()), n),
        "remasked_wrong_cells": remasked,
        "replayed_cells": replayed,
        "max_turns": max_turns,
        "reveal": reveal,
        "mean_turns": sum(turn for result in results for turn in result.turns) / n,
        "status": {s: status.count(s) / n for s in (rm.FIXED_POINT, rm.CYCLE, rm.OUT_OF_TURNS)},
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - began,
        "right": "".join("01"[right] for right in exact.tolist()),
    }


# ------------------------------------------------------------------------------------------------
# Training


@dataclass
class Settings:
    """How a variant is trained and scored; saved in its record, and a run goes on with the same."""

    minutes: float | None = 15  # turned into steps by a trial
    steps: int | None = None  # exactly so many instead
    gamma: float | None = None  # None: the variant's own
    rotate: bool | None = None
    own_states: float = 0.5  # share of the batch that goes on from own decisions
    second_guess: float = 0.3  # share of second wrong guesses in trajectories
    compile: bool = False
    n: int = 2000  # test boards, and their wrong cells
    corrupt: tuple[int, int] = TASK
    max_turns: int = 32
    pool: int = 10_000  # training boards before symmetries
    validation: int = 300


def new_model(device: torch.device | str = "cpu", width: int = 128) -> rm.MaskDiffusionTransformer:
    """4 layers, 793,000 parameters at width 128.  Coordinates of a cell: row, column, box."""
    cells = [[cell // 9, cell % 9, cell // 27 * 3 + cell % 9 // 3] for cell in range(81)]
    sizes = {"width": width, "feed_forward": 4 * width}
    config = rm.TransformerConfig(10, 81, coordinates=cells, **sizes)
    return rm.MaskDiffusionTransformer(config).to(device)


def training_options(variant: str, settings: Settings, pool: Tensor) -> dict:
    """What rm.train is told about a variant; pool as in sample_batch."""
    gamma, rotate = VARIANTS[variant]
    plain = variant == "plain"
    guess = settings.second_guess
    options = {
        "sample": partial(sample_batch, pool=pool, plain=plain, second_guess=guess),
        "mask_id": MASK,
        "gamma": gamma if settings.gamma is None else settings.gamma,
        "rotate": rotate if settings.rotate is None else settings.rotate,
        "own_states": 0.0 if plain else settings.own_states,
        "accept": is_valid,  # a row that goes on ends by the rules of Sudoku, not by the truth
        "compile": settings.compile,
        **TRAINING,
    }
    if variant == "direct":
        options |= {"oracle": truth_everywhere, "rule": direct_replacement}
    return options


def train_variant(
    variant: str, settings: Settings, out: Path, device: torch.device, seed: int = 0
) -> dict:
    """Trains a variant, or goes on, and scores it; writes OUT/<variant>_seed<seed>.pt and .json.

    Returns the record (under torchrun the first process's); a finished run's is read back.
    """
    path = out / f"{variant}_seed{seed}"
    resume = path.with_suffix(".resume.pt")
    pool = random_boards(settings.pool, seed)
    validation = random_boards(settings.validation, VALIDATION_SEED)
    start = corrupt(validation, *TASK, VALIDATION_SEED)
    clean = random_boards(settings.n, TEST_SEED)
    test = corrupt(clean, *settings.corrupt, TEST_SEED)
    boards = rm.fingerprint(pool, validation, start, clean, test)
    asked = asdict(settings) | {"corrupt": list(settings.corrupt), "boards": boards}
    record = rm.finished_record(path.with_suffix(".json"), asked)
    if record:
        return record

    torch.manual_seed(seed)
    model = new_model(device)
    options = training_options(variant, settings, pool.to(device)) | {"seed": seed}
    notes = rm.resume_notes(resume, asked)
    if notes is None:
        trial = rm.train(new_model(device), steps=40, warmup=40, **options)
        steps = settings.steps or rm.steps_in(settings.minutes, trial)
        notes = {"steps": steps, "curve": [], "settings": asked}
    steps = notes["steps"]
    curve = notes["curve"]
    every = max(1, min(250, steps // 8))
    score = partial(evaluate, model, options["gamma"], options["rotate"])
    if rm.is_main_process():
        print(f"{variant}, seed {seed}: {steps} steps of {TRAINING['batch_size']} boards, {device}")

    files = {"checkpoint": resume, "checkpoint_every": every, "notes": notes}
    for step, stats in rm.train(model, steps=steps, **options, **files):
        scored = step % every == 0 or step == steps
        if scored and rm.is_main_process():
            now = score(validation, start, settings.max_turns, MAKE_RULE.get(variant))
            losses = {role: stats[role].item() for role in ("reveal", "remask", "keep")}
            shares = {key: now[key] for key in ("exact", "valid", "n")}
            curve.append({"step": step, "minutes": stats["seconds"] / 60, **losses, **shares})
        if scored or step % max(1, every // 10) == 0:
            last = [f"{key} {curve[-1][key]:.1%}" for key in ("exact", "valid") if curve]
            rm.show_progress(step, steps, stats, " ".join(last))
    if not rm.is_main_process():
        return {}

    about = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "minutes": curve[-1]["minutes"],
        "gamma": options["gamma"],
        "rotate": options["rotate"],
        "settings": asked,
        "training": TRAINING,
        "compiled": settings.compile,
        "provenance": rm.provenance(),
    }
    rm.save_checkpoint(path.with_suffix(".pt"), model, "sudoku", **about)
    rows = BASELINES.get(variant, {f"ours, {variant}, seed {seed}": (None, None)})
    tests = {
        label: score(clean, test, turns or settings.max_turns, make_rule)
        for label, (turns, make_rule) in rows.items()
    }
    record = {**about, "curve": curve, "test": tests}
    rm.write_json(path.with_suffix(".json"), record)
    resume.unlink(missing_ok=True)
    return record


def train_table(
    runs: list[tuple[str, int]], settings: Settings, out: Path, device: torch.device
) -> dict:
    """Trains what is not done of the runs, (variant, seed) each, and prints their table.

    Of several also the paired tests of the full variant; of a single one its pictures.
    """
    table = {}
    for variant, seed in runs:
        record = train_variant(variant, settings, out, device, seed)
        if not rm.is_main_process():
            continue
        about = {key: record[key] for key in ("steps", "minutes", "provenance")}
        table |= {label: {**score, **about} for label, score in record["test"].items()}
    if not table:
        return {}

    print_table(table)
    result = {"table": table, "paper": PAPER}
    if len(runs) > 1:
        result["ours_against"] = compare(table, f"ours, full, seed {runs[0][1]}")
        rm.write_json(out / "table.json", result)
        return result
    draw_lines(out / f"{variant}_curve.png", record["curve"], "minutes", "minutes of training")
    if variant not in MAKE_RULE:
        model, _ = rm.load_checkpoint(out / f"{variant}_seed{seed}.pt", "sudoku", device)
        board = corrupt(random_boards(1, TEST_SEED), 20, 20, TEST_SEED)[0]
        how = {"max_turns": settings.max_turns, "gif": out / f"{variant}_revision.gif"}
        show_revision(model, record["gamma"], record["rotate"], board, **how)
    rm.write_json(out / f"{variant}_table.json", result)
    return result


def compare(table: dict[str, dict], ours: str) -> dict:
    """The paired test of each row against ours, printed."""
    right = {label: score["right"] for label, score in table.items()}
    tests = {label: paired_test(right[ours], right[label]) for label in right if label != ours}
    print(f"\nexact of '{ours}' on the same boards, against")
    for label, test in tests.items():
        low, high = test["ci95"]
        interval = f"({low:+.1%} to {high:+.1%})"
        print(f"{label:48}{test['difference']:+8.1%} {interval}, p = {test['p']:.2g}")
    return tests


def print_table(rows: dict[str, dict]) -> None:
    """The paper's Sudoku table beside ours: label -> an evaluation."""
    print(f"\n{'':48} exact %{'':16}valid %  replay %  conflict cells  turns")
    for variant, (exact, valid, replay, cells) in PAPER.items():
        print(f"paper, {variant:41}{exact:8.1f}{'':16}{valid:7.1f}{replay:10.2f}{cells:16.3f}")
    for label, row in rows.items():
        exact, valid, replay = (100 * row[key] for key in ("exact", "valid", "replay_mistake"))
        low, high = (100 * bound for bound in row["ci95_exact"])
        interval = f" ({low:.1f} to {high:.1f})"
        rest = f"{replay:10.2f}{row['conflict_cells']:16.3f}{row['mean_turns']:7.1f}"
        print(f"{label:48}{exact:8.1f}{interval:16}{valid:7.1f}{rest}")
    print(f"ours: n = {row['n']} boards, 95 % intervals; the paper's boards are not published")


# ------------------------------------------------------------------------------------------------
# Studies and pictures


def run_studies(
    which: str, trained: tuple, clean: Tensor, start: Tensor, max_turns: int, out: Path
) -> dict:
    """Of STUDIES one or all, each a JSON and a figure in out.  trained: model, gamma, rotate."""
    studies = {}
    for name in STUDIES if which == "all" else [which]:
        path = out / f"sudoku_{name}.png"
        study = STUDIES[name](trained, clean, start, max_turns, path)
        studies[name] = {**study, "provenance": rm.provenance()}
        rm.write_json(path.with_suffix(".json"), studies[name])
    return studies


def study_turns(trained: tuple, clean: Tensor, start: Tensor, _: int, path: Path) -> dict:
    """Accuracy against the number of turns, beyond the 6 of the training trajectories."""
    turns = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    rows = [{"turns": t, **evaluate(*trained, clean, start, t)} for t in turns]
    draw_lines(path, rows, "turns", "turns at most")
    return {"rows": rows}


def study_severity(trained: tuple, clean: Tensor, _: Tensor, max_turns: int, path: Path) -> dict:
    """Accuracy against the number of wrong cells, 4 to 20 in training; a fourth of the boards."""
    clean = clean[: max(1, len(clean) // 4)]
    rows = []
    for cells in (1, *range(2, 41, 2)):
        start = corrupt(clean, cells, cells, TEST_SEED + cells)
        rows.append({"wrong_cells": cells, **evaluate(*trained, clean, start, max_turns)})
    draw_lines(path, rows, "wrong_cells", "wrong cells")
    return {"rows": rows}


def study_calibration(
    trained: tuple, clean: Tensor, start: Tensor, max_turns: int, path: Path
) -> dict:
    """What p(x) means at visible cells, in all turns, and how well it re-masks.

    p(x) should be the probability that x is right, and p(x) + p(M) be 1.  Precision: the share of
    re-masked cells that were wrong.  Recall: of the wrong visible cells, those re-masked that turn.
    """
    own, other, right, turn = visible_decisions(*trained, clean, start, max_turns).T
    bins = (own * 20).long().clamp(max=19)
    rows = []
    for low in range(20):
        hits = right[bins == low]
        n = len(hits)
        rows.append({
            "low": low / 20,
            "n": n,
            "mean_p": own[bins == low].mean().item() if n else None,
            "right": hits.sum().item() / n if n else None,
            "ci95": rm.wilson_interval(int(hits.sum()), n),
        })  # fmt: skip
    draw_calibration(path, rows, own + other)

    def remasking_in(chosen: Tensor) -> dict:
        remasked = chosen & (other > own)
        wrong = chosen & (right == 0)
        hits = int((remasked & wrong).sum())
        record = {}
        for name, of, count in (
            ("precision", "remasked", int(remasked.sum())),
            ("recall", "wrong", int(wrong.sum())),
        ):
            interval = rm.wilson_interval(hits, count)
            record |= {name: hits / max(count, 1), f"ci95_{name}": interval, of: count}
        return record

    gaps = sum(row["n"] * abs(row["mean_p"] - row["right"]) for row in rows if row["n"])
    return {
        "rows": rows,
        "expected_calibration_error": gaps / len(own),
        "visible_positions": len(own),
        "mean_p_own_plus_mask": (own + other).mean().item(),
        "share_of_sums_below_0.99": (own + other < 0.99).float().mean().item(),
        "remask_all_turns": remasking_in(turn > 0),
        "remask_first_turn": remasking_in(turn == 1),
    }


def visible_decisions(
    model: rm.MaskDiffusionTransformer, gamma: float, rotate: bool, clean: Tensor, start: Tensor,
    max_turns: int,
) -> Tensor:  # fmt: skip
    """What Eq. 1 sees at all visible cells in all turns: p(x), p(M), x is right, turn; [M, 4]."""
    device = model.embedding.device
    seen = []
    for rows in torch.arange(len(clean)).split(500):
        history = HistoryReference(model.embedding.detach(), gamma, rotate)
        tokens = start[rows].to(device)
        truth = clean[rows].to(device)
        for turn in range(1, max_turns + 1):  # revise, but with the truth at hand
            with torch.no_grad():
                logits = model(history.push(tokens))
            p = logits.softmax(-1)
            own = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            facts = [own, p[..., MASK], (tokens == truth).float(), torch.full_like(own, turn)]
            seen.append(torch.stack(facts, -1)[tokens != MASK].cpu())
            following = rm.decide(logits, tokens, MASK)
            going = (following != tokens).any(-1)
            if not going.any():
                break
            history.keep(going)
            tokens = following[going]
            truth = truth[going]
    return torch.cat(seen)


STUDIES = {"turns": study_turns, "severity": study_severity, "calibration": study_calibration}


def draw_lines(path: Path, rows: list[dict], key: str, label: str) -> None:
    """Exact and valid of the rows against key, with 95 % intervals where a row has them."""
    figure, ((axis,),) = rm.new_figure()
    x = [row[key] for row in rows]
    for share in ("exact", "valid"):
        (line,) = axis.plot(x, [row[share] for row in rows], "o-", markersize=3, label=share)
        if f"ci95_{share}" in rows[0]:
            low, high = zip(*[row[f"ci95_{share}"] for row in rows])
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if key == "turns":
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, x)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.set(xlabel=label, ylabel="boards")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    rm.save_figure(figure, path)


def draw_calibration(path: Path, rows: list[dict], sums: Tensor) -> None:
    """Left: the share that is right against p(x).  Right: the distribution of p(x) + p(M)."""
    figure, ((left, right),) = rm.new_figure(1, 2, width=8.0)
    rows = [row for row in rows if row["n"]]
    p = [row["mean_p"] for row in rows]
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    left.plot(p, [row["right"] for row in rows], "o", markersize=3)
    left.vlines(p, *zip(*[row["ci95"] for row in rows]))
    left.set(xlabel="p(x) at visible cells", ylabel="share of them right")
    right.hist(sums.numpy(), bins=[i / 50 for i in range(51)] + [1.02], log=True)
    right.set(xlabel="p(x) + p(MASK) at visible cells", ylabel="cells")
    rm.save_figure(figure, path)


def animate(path: Path, trace: Tensor, clues: Tensor) -> None:
    """A GIF of one revision.  trace: int64 [turns + 1, 81].  clues: bool [81], drawn bold.

    Amber: re-masked in this turn; green: revealed in this turn; red digit: breaks a rule.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, ((axis,),) = rm.new_figure(width=3.6, height=3.9)
    white, amber, green = torch.tensor([[255, 255, 255], [255, 217, 138], [168, 224, 176]])

    def frame(index: int) -> None:
        turn = min(index, len(trace) - 1)  # the last state stays a while
        now = trace[turn].unsqueeze(-1)
        before = trace[max(turn - 1, 0)].unsqueeze(-1)
        color = torch.where(now == MASK, amber, torch.where(now == before, white, green))
        axis.clear()
        axis.imshow(color.view(9, 9, 3).numpy())
        axis.set(title=f"turn {turn}", xticks=[], yticks=[])
        for cell, broken in enumerate(conflicts(trace[turn]).tolist()):
            ink = "#c62828" if broken else "black"
            style = {"ha": "center", "va": "center", "weight": "bold" if clues[cell] else "normal"}
            axis.text(cell % 9, cell // 9, str(int(now[cell]) or ""), color=ink, **style)
        for line in range(1, 9):
            for draw in (axis.axhline, axis.axvline):
                draw(line - 0.5, color="black", linewidth=0.5 if line % 3 else 1.8)

    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, frame, frames=len(trace) + 3).save(path, PillowWriter(fps=1), dpi=100)
    print(f"wrote {path}")


def show_turn(now: Tensor, before: Tensor) -> str:
    """A board as text: _ masked, -_ re-masked, +5 revealed in this turn, 5! breaks a rule."""
    text = ""
    for cell, broken in enumerate(conflicts(now).tolist()):
        digit = int(now[cell])
        change = "+" if digit else "-"
        text += change if now[cell] != before[cell] else " "
        text += f"{digit or '_'}{'!' if broken else ' '}"
        text += "| " if cell % 9 in (2, 5) else ""
        text += "\n" if cell % 9 == 8 else ""
        text += "---------+----------+---------\n" if cell in (26, 53) else ""
    return text


def show_revision(
    model: rm.MaskDiffusionTransformer, gamma: float, rotate: bool, board: Tensor,
    solve: bool = False, max_turns: int = 32, reveal: int | None = None, gif: Path | None = None,
) -> dict:  # fmt: skip
    """Revises one board, int64 [81], and prints every turn; solve locks its clues."""
    start = board.unsqueeze(0)
    result = revise_boards(model, gamma, rotate, start, max_turns, reveal, solve)
    trace = result.trace[:, 0].cpu()
    print("_ masked   -_ re-masked in this turn   +5 revealed in this turn   5! breaks a rule\n")
    print(f"the board\n{show_turn(board, board)}")
    for turn, (before, now) in enumerate(zip(trace[:-1], trace[1:]), 1):
        print(f"turn {turn}: {int((before != now).sum())} cells changed\n{show_turn(now, before)}")
    if gif:
        animate(gif, trace, (board != MASK) & solve)
    valid = bool(is_valid(now))
    text = "".join(map(str, now.tolist()))
    turns = result.turns[0]
    status = result.status[0]
    print(f"{status} after {turns} turns; {'valid' if valid else 'not valid'}")
    return {"board": text, "turns": turns, "status": status, "valid": valid}


# ------------------------------------------------------------------------------------------------
# Files of boards, and the command line

BLANKS = ".0*_Xx?"  # an empty cell, as files write it


def parse_board(text: str, where: str = "the board", puzzle: bool = False) -> Tensor:
    """int64 [81] of 81 digits and BLANKS; puzzle: no rule may be broken.  InputError says where."""
    cells = "".join(text.split())
    for place, cell in enumerate(cells, 1):
        if cell not in "123456789" + BLANKS:
            wanted = f"a digit or a blank ({BLANKS})"
            raise InputError(f"{where}: {cell!r}, character {place}, is not {wanted}")
    if len(cells) != 81:
        raise InputError(f"{where} must be 81 digits, got {len(cells)}")
    board = torch.tensor([MASK if cell in BLANKS else int(cell) for cell in cells])
    for cell in conflicts(board).nonzero().flatten().tolist() if puzzle else ():
        raise InputError(f"{where}: clues clash at row {cell // 9 + 1}, column {cell % 9 + 1}")
    return board


def read_grids(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(where, [a board, or a puzzle and its solution]) of files as people have them.

    A line of 81 characters or of two such, with spaces or commas between (an id or a rating beside
    them is passed over), or nine lines of nine.  # starts a comment; rulers and titles
    (quizzes,solutions; Grid 01) are passed over.
    """
    rows = []  # of a board in nine lines
    for number, line in rm.read_lines(path):
        words = re.sub(r'[\s,;|"]+', " ", line.split("#")[0]).split()
        cells = "".join(words)
        title = cells and words[0].isalpha() and len(words[0]) < 9 and set(words[0]) - set("Xx")
        if title or set(cells) <= set("-+="):
            continue
        boards = [cells] if len(cells) == 81 else [word for word in words if len(word) > 9]
        if len(cells) == 9:
            rows.append(cells)
            boards = ["".join(rows)]
        elif rows or len(boards) not in (1, 2):
            raise InputError(f"{path} line {number} must be 81 digits or one of nine lines of nine")
        if len(rows) in (0, 9):
            yield f"{path} line {number}", boards
            rows = []
    if rows:
        raise InputError(f"{path} ends after {len(rows)} of nine lines of nine")


def read_boards(path: Path, n: int, solved: bool) -> tuple[Tensor, Tensor]:
    """The first n puzzles and their solutions, int64 [n, 81] both; MASK where there is none.

    solved: every line must have a complete valid board.
    """
    pairs = []
    for where, texts in islice(read_grids(path), n):
        puzzle = parse_board(texts[0], where, puzzle=True)
        solution = torch.zeros_like(puzzle)
        if solved or len(texts) == 2:
            solution = parse_board(texts[-1], where)
            if not is_valid(solution):
                raise InputError(f"{where} has no valid solved board")
            if ((puzzle != MASK) & (puzzle != solution)).any():
                raise InputError(f"{where}: the solution does not solve the puzzle")
        pairs.append(torch.stack([puzzle, solution]))
    if not pairs:
        raise InputError(f"{path} has no board")
    puzzles, solutions = torch.stack(pairs, dim=1)
    return puzzles, solutions


def parse_options():
    """The command line, with what depends on the mode filled in."""
    about = "Reflective Masking on Sudoku.  Alone: train the full variant, evaluate it, draw."
    options = rm.Options(description=about)
    count = rm.number(int, 1)
    share = rm.number(float, 0, 1)
    trained = ("evaluate", "revise", "solve", "puzzles", "study")

    add = options.add_argument_group("what to do (default: train)")
    add = add.add_mutually_exclusive_group().add_argument
    add("--evaluate", action="store_true", help="score --checkpoint on the test boards or --boards")
    add("--revise", metavar="BOARD", help=f"repair 81 digits, blank {BLANKS}, and show every turn")
    add("--solve", metavar="PUZZLE", help="the same with the clues locked")
    add("--puzzles", type=Path, metavar="FILE", help="score solving; solutions need not be given")
    add("--study", choices=[*STUDIES, "all"], help="a JSON and a figure")

    add = options.group("training", "train")
    add("--variant", choices=[*VARIANTS, "all"], default="full", help="all: those of the tables")
    add("--minutes", type=rm.number(float, 0.01), default=15, help="made into steps (default 15)")
    add("--steps", type=count, help="exactly so many instead, for equal training")
    add("--gamma", type=share, help="decay of history (default: the variant's)")
    add("--no-rotate", dest="rotate", action="store_false", default=None, help="no HER")
    add("--own-states", type=share, default=0.5, help="share of the batch that goes on from own "
        "decisions (default 0.5; 0 is better for rm and direct)")  # fmt: skip
    add("--second-guess", type=share, default=0.3, help="of the trajectories (default 0.3)")
    add("--compile", action="store_true", help="torch.compile (on a CPU it needs a C++ compiler)")

    add = options.group("evaluation", *trained)
    shipped = Path(__file__).parent / "checkpoints/sudoku_full.pt"
    add("--checkpoint", type=Path, default=shipped, help="default: the shipped one")
    add("--boards", type=Path, metavar="FILE", modes=("evaluate",), help="solved, to be corrupted")
    add("--n", type=count, default=2000, modes=("train", "evaluate", "puzzles", "study"),
        help="boards at most (default 2000)")  # fmt: skip
    add("--corrupt", type=rm.number(int, 0, 81), nargs=2, default=TASK, metavar=("LOW", "HIGH"),
        modes=("train", "evaluate", "study"), help="wrong cells (default 4 20)")  # fmt: skip
    add("--max-turns", type=count, modes=(), help="forward passes (default 32; solving 100)")
    add("--reveal", type=rm.number(int, 0, 81), modes=trained[:4],
        help="most cells revealed a turn, surest first; 0: all (default 0; solving 1)")  # fmt: skip
    add("--gif", type=Path, metavar="FILE.gif", modes=("revise", "solve"), help="the turns, moving")
    options.general("runs/sudoku", "of training; with --evaluate of the test boards",
                    ("train", "study"), ("train", "evaluate"))  # fmt: skip
    args = options.parse(lambda args: next((m for m in trained if m in args.given), "train"))

    ignored = {
        "minutes": args.steps or args.smoke,
        "own_states": args.variant == "plain",
        "second_guess": args.variant == "plain",
        "corrupt": args.study == "severity",
        "max_turns": args.study == "turns",
    }
    for name in args.given & {name for name, true in ignored.items() if true}:
        options.error(f"--{name.replace('_', '-')} has no effect there")
    if args.corrupt[0] > args.corrupt[1]:
        options.error(f"--corrupt: {args.corrupt[0]} is more than {args.corrupt[1]}")
    if args.gif:
        rm.check_writable(args.gif)
        if args.gif.suffix != ".gif":
            options.error("--gif must end in .gif")
    args.out = args.out or Path("runs", "smoke" if args.smoke else "sudoku")
    if args.mode in ("train", "study"):
        rm.check_writable(args.out / "file")
    tiny = {"steps": 4, "n": 8, "max_turns": 4} if args.smoke else {}
    for name in tiny.keys() - args.given:
        setattr(args, name, tiny[name])
    solving = args.mode in ("solve", "puzzles")
    args.max_turns = args.max_turns or (100 if solving else 32)
    args.reveal = int(solving) if args.reveal is None else args.reveal
    return args


def main() -> None:
    args = parse_options()
    device = rm.start_device(args.device)
    if rm.dist.is_initialized() and args.mode != "train":
        raise InputError("torchrun is for training; run this with one process")
    result = run_training(args, device) if args.mode == "train" else use_checkpoint(args, device)
    if args.json and rm.is_main_process():
        rm.write_json(args.json, result)


def run_training(args, device: torch.device) -> dict:
    names = {field.name for field in fields(Settings)} & vars(args).keys()
    settings = Settings(**{name: getattr(args, name) for name in names})
    if args.steps:
        settings.minutes = None
    if args.smoke:
        settings.pool, settings.validation = 20, 8
    runs = [(args.variant, args.seed)]
    if args.variant == "all":  # the full variant, first, and plain RM with two seeds more
        runs = [(variant, args.seed) for variant in VARIANTS]
        runs += [(variant, args.seed + i) for i in (1, 2) for variant in ("full", "rm")]
    return train_table(runs, settings, args.out, device)


def use_checkpoint(args, device: torch.device) -> dict:
    needs = ("gamma", "rotate", "variant")
    model, info = rm.load_checkpoint(args.checkpoint, "sudoku", device, needs)
    if (model.config.vocabulary, model.config.length) != (10, 81):
        raise InputError(f"{args.checkpoint} is of boards that are not 9x9")
    make_rule = MAKE_RULE.get(info["variant"])
    if make_rule and (args.mode != "evaluate" or args.reveal):
        raise InputError(f"{args.checkpoint} has no Eq. 1: --evaluate it, without --reveal")
    trained = (model, info["gamma"], info["rotate"])
    how = {"max_turns": args.max_turns, "reveal": args.reveal or None}
    if args.mode == "revise":
        return show_revision(*trained, parse_board(args.revise), gif=args.gif, **how)
    if args.mode == "solve":
        puzzle = parse_board(args.solve, "the puzzle", puzzle=True)
        return show_revision(*trained, puzzle, solve=True, gif=args.gif, **how)
    if args.mode == "puzzles":
        start, clean = read_boards(args.puzzles, args.n, solved=False)
        score = evaluate(*trained, clean, start, solve=True, **how)
        if (clean == MASK).any():  # what compares with the truth is not known
            truth = "exact ci95_exact replay_mistake remasked_wrong_cells replayed_cells right"
            score |= dict.fromkeys(truth.split())
        score |= {"solved": score["valid"], "ci95_solved": score["ci95_valid"]}
        turns = f"{score['mean_turns']:.1f} turns"
        print(f"solved {score['solved']:.1%} of {score['n']} puzzles in {turns}")
    else:
        if args.boards:
            _, clean = read_boards(args.boards, args.n, solved=True)
        else:
            clean = random_boards(args.n, TEST_SEED + args.seed)
        start = corrupt(clean, *args.corrupt, TEST_SEED + args.seed)
        if args.study:
            return run_studies(args.study, trained, clean, start, args.max_turns, args.out)
        score = evaluate(*trained, clean, start, make_rule=make_rule, **how)
        print_table({f"{'baseline' if make_rule else 'ours'}, {info['variant']}": score})
    return {
        **score,
        "seed": args.seed,
        "checkpoint": args.checkpoint.name,
        "boards": rm.fingerprint(start, clean),
        "provenance": rm.provenance(),
    }


if __name__ == "__main__":
    rm.run_script(main)
