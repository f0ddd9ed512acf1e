"""Task 1: Sudoku revision.  A solved 9x9 board has 4 to 20 cells replaced by wrong digits, and the
model is not told which.  It re-masks what it doubts, reveals again, stops when nothing changes.

    python train_sudoku.py                   train RM with history, evaluate, draw the curve
    python train_sudoku.py --variant all     every model of the table; resumes where it stopped
    python train_sudoku.py --evaluate        score the shipped checkpoint on 2,000 boards
    python train_sudoku.py --revise BOARD    watch it repair a board; --solve PUZZLE locks the clues
    python train_sudoku.py --puzzles FILE    score solving

Tokens: MASK is 0, a digit is itself.
What differs from the paper: it states neither its training data nor its settings, so sample_starts
and the constants are ours.  Besides plain Eq. 1 we decode with one reveal a turn, so that each
reveal reads the one before.  As in the paper any cell may be re-masked, but for a puzzle's clues.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import reflective_masking as rm
from history import HistoryReference
from reflective_masking import InputError

SHIPPED = Path(__file__).parent / "checkpoints/sudoku_full.pt"
MASK = 0
ANY = set(range(1, 10))
CELLS = torch.arange(81)
COORDINATES = torch.stack([CELLS // 9, CELLS % 9, CELLS // 27 * 3 + CELLS % 9 // 3], -1)
PEERS = (COORDINATES.unsqueeze(1) == COORDINATES).any(-1)  # [81, 81]: a row, column or box shared
PEERS &= ~torch.eye(81, dtype=torch.bool)
PEERS_OF = [set(row.nonzero().flatten().tolist()) for row in PEERS]
PAPER = {  # exact %, valid %, replay mistake %, conflict cells: its Sudoku table
    "rm": (82.4, 86.6, 0.57, 0.578),
    "hr": (91.4, 91.8, 0.07, 0.300),
    "decay": (89.4, 89.6, 0.07, 0.362),
    "full": (93.4, 93.6, 0.03, 0.236),
}
GAMMA = 0.5  # the paper states none; 30 turns at 0.9 mislead, as training shows 6 at most
VARIANTS = {  # gamma, rotate of Eq. 2; the last two are baselines
    "rm": (0.0, False),
    "hr": (1.0, False),
    "decay": (GAMMA, False),
    "full": (GAMMA, True),
    "plain": (0.0, False),  # plain mask diffusion, trained on masks alone: the baselines' network
    "direct": (0.0, False),  # RM's states, but the target is always the truth: no MASK action
}
TRAINING = {"batch_size": 64, "learning_rate": 2.5e-3}
TEST_SEED = 1_000_000  # training uses smaller seeds
VALIDATION_SEED = 2_000_000

# ------------------------------------------------------------------------------------------------
# Boards


def complete(options: dict[int, set], rng: random.Random | None = None) -> dict[int, int] | None:
    """A digit for every empty cell by backtracking, the most constrained cell first; None: none.

    options: empty cell -> the digits its peers leave.  rng: tries these in random order.
    """
    if not options:
        return {}
    cell = min(options, key=lambda cell: len(options[cell]))
    digits = sorted(options[cell])
    if rng:
        rng.shuffle(digits)
    for digit in digits:
        left = options.copy()
        del left[cell]
        for peer in PEERS_OF[cell] & left.keys():
            left[peer] = left[peer] - {digit}
        found = complete(left, rng)
        if found is not None:
            return found | {cell: digit}
    return None


def random_board(rng: random.Random) -> list[int]:
    """A random complete board, 81 digits; 2 ms."""
    cells = list(range(81))
    rng.shuffle(cells)
    board = complete({cell: ANY for cell in cells}, rng)
    return [board[cell] for cell in range(81)]


def minimal_puzzle(board: list[int], rng: random.Random) -> list[int]:
    """The board with holes, dug in random order while it is the only solution: 0.1 s, 24 clues."""
    puzzle = list(board)
    cells = list(range(81))
    rng.shuffle(cells)
    for cell in cells:
        puzzle[cell] = MASK
        holes = [hole for hole in cells if puzzle[hole] == MASK]
        options = {hole: ANY - {puzzle[peer] for peer in PEERS_OF[hole]} for hole in holes}
        options[cell].remove(board[cell])
        if complete(options) is not None:  # a solution with another digit there: no hole
            puzzle[cell] = board[cell]
    return puzzle


@cache  # --variant all asks six times
def random_boards(count: int, seed: int) -> Tensor:
    """count complete boards, int64 [count, 81]; a longer list of the same seed begins alike."""
    rng = random.Random(seed)
    return torch.tensor([random_board(rng) for _ in range(count)])


@cache
def random_puzzles(count: int, seed: int) -> Tensor:
    """count minimal puzzles, MASK where blank, and their solutions: int64 [count, 2, 81]."""
    rng = random.Random(seed)
    boards = [random_board(rng) for _ in range(count)]
    return torch.tensor([[minimal_puzzle(board, rng), board] for board in boards])


def add_clues(puzzle: Tensor, solution: Tensor, count: Tensor | int, generator) -> Tensor:
    """The puzzles with random clues added, up to count (int or [B, 1]) in all: int64 [B, 81]."""
    first = torch.rand(puzzle.shape, generator=generator, device=puzzle.device)
    order = (first - (puzzle != MASK).float()).argsort(-1).argsort(-1)  # its own clues, then others
    return torch.where((order < count) | (puzzle != MASK), solution, MASK)


def shuffle_symmetries(boards: Tensor, generator: torch.Generator) -> Tensor:
    """Each board under a random symmetry of Sudoku: bands, stacks, lines, transpose, digits.

    boards: int64 [B, K, 81], K under the same one; MASK stays.  Returns its shape.
    """
    batch = len(boards)
    uniform = partial(torch.rand, generator=generator, device=boards.device)

    def line_order() -> Tensor:  # int64 [B, 9]: nine rows or columns, bands kept together
        band = uniform(batch, 3, 1).argsort(1)  # any order of the three bands
        within = uniform(batch, 3, 3).argsort(-1)  # and of the three lines of each
        return (band * 3 + within).view(batch, 9)

    cell = 9 * line_order().unsqueeze(2) + line_order().unsqueeze(1)  # [B, 9, 9]: where from
    upright = uniform(batch, 1, 1) < 0.5  # half are transposed
    cell = torch.where(upright, cell, cell.transpose(1, 2)).view(batch, 1, 81)
    digits = uniform(batch, 9).argsort(-1) + 1  # any order of the nine digits
    digits = F.pad(digits, (1, 0)).unsqueeze(1)  # MASK, 0, stays MASK
    moved = boards.gather(-1, cell.expand_as(boards))
    return digits.expand(-1, boards.shape[1], -1).gather(-1, moved)


def wrong_digits(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform over the eight digits that are wrong: int64, clean's shape."""
    drawn = torch.randint(8, clean.shape, generator=generator, device=clean.device) + 1
    return torch.where(drawn == clean, 9, drawn)  # one of 1 to 8; the truth becomes 9


def corrupt(clean: Tensor, seed: int, low: int = 4, high: int = 20) -> Tensor:
    """The paper's task, int64 [B, 81]: low to high cells get one of the eight wrong digits."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(low, high + 1, (len(clean), 1), generator=generator)
    order = torch.rand(clean.shape, generator=generator).argsort(-1).argsort(-1)
    return torch.where(order < count, wrong_digits(clean, generator), clean)


# ------------------------------------------------------------------------------------------------
# The paper's four metrics; exact is (tokens == clean).all(-1)


def conflicts(tokens: Tensor) -> Tensor:
    """Cells whose digit occurs again in their row, column or box: bool [..., 81]; no MASK."""
    same = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & PEERS.to(tokens.device)
    return same.any(-1) & (tokens != MASK)


def is_valid(tokens: Tensor) -> Tensor:
    """Every row, column and box holds 1 to 9: bool [...] of int64 [..., 81]."""
    return ((tokens != MASK) & ~conflicts(tokens)).all(-1)


def replay_mistakes(trace: Tensor, clean: Tensor) -> tuple[int, int]:
    """(cells re-masked while wrong, those that later got back a wrong digit taken from them).

    trace: int64 [turns + 1, B, 81].  clean: int64 [B, 81].  A cell counts once.
    """
    tried = torch.zeros(*clean.shape, 10, dtype=torch.bool)  # wrong digits re-masked so far
    replayed = torch.zeros_like(clean, dtype=torch.bool)
    for before, after in pairwise(trace):
        decoded = (before == MASK) & (after != MASK)
        replayed |= decoded & tried.gather(-1, after.unsqueeze(-1)).squeeze(-1)
        remasked = (before != MASK) & (after == MASK) & (before != clean)
        tried |= F.one_hot(before, 10).bool() & remasked.unsqueeze(-1)
    return int(tried.any(-1).sum()), int(replayed.sum())


# ------------------------------------------------------------------------------------------------
# Training data


def sample_starts(
    batch_size: int, generator: torch.Generator, puzzles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What training revises: start, clean, int64 [B, 81], editable, bool [B, 81].

    Half are boards, all editable, half puzzles with at most 60 locked clues; half of these start
    empty, else a share of the rest is filled.  Filled editable cells are wrong with a probability
    ~ U(0, 0.5) of the row.  puzzles: of random_puzzles, on the generator's device, shown permuted.
    """
    device = generator.device
    uniform = partial(torch.rand, generator=generator, device=device)
    picked = torch.randint(len(puzzles), (batch_size,), generator=generator, device=device)
    puzzle, clean = shuffle_symmetries(puzzles[picked], generator).unbind(1)
    is_puzzle = torch.arange(batch_size, device=device).unsqueeze(1) < batch_size // 2
    least = (puzzle != MASK).sum(-1, keepdim=True)
    clues = least + (uniform(batch_size, 1) * (61 - least)).long()  # ~ U{least..60}
    editable = (add_clues(puzzle, clean, clues, generator) == MASK) | ~is_puzzle

    not_empty = uniform(batch_size, 1) < 0.5  # the other half of the puzzles starts empty
    share_filled = uniform(batch_size, 1) * not_empty
    filled = uniform(batch_size, 81) < torch.where(is_puzzle, share_filled, 1)  # a board is full
    share_wrong = 0.5 * uniform(batch_size, 1)  # ~ U(0, 0.5)
    is_wrong = uniform(batch_size, 81) < share_wrong
    wrong = wrong_digits(clean, generator)
    start = torch.where(editable & filled & is_wrong, wrong, clean)
    return start.masked_fill(editable & ~filled, MASK), clean, editable


def sample_batch(
    batch_size: int, generator: torch.Generator, puzzles: Tensor, plain: bool = False
) -> rm.Batch:
    """A Batch for rm.train: a state x(t), t ~ U{0..5}, of a trajectory from sample_starts.

    In half of the rows all wrong cells start wrong, as the task does; in the others a random share,
    the rest masked.  plain: mask diffusion, a uniform share of masks, which alone have a loss.
    """
    uniform = partial(torch.rand, generator=generator, device=generator.device)
    start, clean, editable = sample_starts(batch_size, generator, puzzles)
    share = uniform(batch_size, 1)  # ~ U(0, 1)
    if plain:
        masked = uniform(batch_size, 81) < share
        return clean.masked_fill(masked, MASK).unsqueeze(0), clean, masked

    as_the_task = uniform(batch_size, 1) < 0.5
    p_wrong = torch.where(as_the_task, 1.0, share) * (start != MASK)  # a blank starts masked
    trajectory = rm.sample_trajectory(clean, start != clean, start, MASK, 6, p_wrong, generator)
    t = torch.randint(6, (batch_size,), generator=generator, device=generator.device)
    return rm.history_until(trajectory, t), clean, editable


# ------------------------------------------------------------------------------------------------
# Baselines: other rules in the place of Eq. 1, for the same loop and number of forward passes


def direct_replacement(logits, tokens, mask_id, editable, **_) -> Tensor:
    """Every editable position takes its likeliest token (MASK excluded), masked or not."""
    best, _ = rm.best_token(logits, mask_id)
    return torch.where(editable, best, tokens)


def remask_least_confident(logits, tokens, mask_id, editable, turn: int, max_turns: int) -> Tensor:
    """The tokens of least probability are re-masked, in the next turn revealed, and so on."""
    if (tokens == mask_id).any():
        return rm.decide(logits, tokens, mask_id, editable, allow_remask=False)
    score = logits[..., 1:].log_softmax(-1).gather(-1, tokens.unsqueeze(-1) - 1).squeeze(-1)
    count = round(20 * (1 - turn / max_turns))  # linearly from 20, the most wrong cells, to 0
    lowest = score.argsort(-1).argsort(-1) < count
    return tokens.masked_fill(lowest & editable, mask_id)


def truth_everywhere(state, clean, mask_id, editable=None) -> tuple[Tensor, Tensor]:
    """The labels of "direct": the oracle's roles, but the truth as target at wrong cells too."""
    return clean, rm.oracle_action(state, clean, mask_id, editable)[1]


REPLACEMENT = {
    "one-shot": {"rule": direct_replacement, "max_turns": 1},
    "direct replacement": {"rule": direct_replacement},
}
EQ1 = {"one reveal a turn": {"reveal": 1, "max_turns": 100}, "Eq. 1": {}}
DECODINGS = {  # of each variant: what a row of the table is called -> options of evaluate
    **{variant: EQ1 for variant in VARIANTS},
    "plain": {**REPLACEMENT, "low-confidence re-masking": {"rule": remask_least_confident}},
    "direct": REPLACEMENT,
}
RULES = {"plain": remask_least_confident, "direct": direct_replacement}  # the others follow Eq. 1

# ------------------------------------------------------------------------------------------------
# Evaluation


def revise_boards(
    trained: tuple, start: Tensor, max_turns: int = 32, reveal: int | None = None,
    solve: bool = False, rule: Callable | None = None,
) -> rm.Revision:  # fmt: skip
    """rm.revise of boards, int64 [B, 81].  trained: (model, gamma, rotate).  solve locks clues."""
    model, gamma, rotate = trained
    history = HistoryReference(model.embedding.detach(), gamma, rotate)
    start = start.to(model.embedding.device)
    editable = (start == MASK) | (not solve)
    # With history, or a rule that knows its turn, a state that returns is no dead end (LOG.md).
    patience = max_turns if gamma or rule else None
    how = {"trace": True, "patience": patience, "rule": rule}
    return rm.revise(model, start, MASK, history, max_turns, editable, reveal, **how)


def evaluate(trained: tuple, clean: Tensor, start: Tensor, max_turns: int = 32, **how) -> dict:
    """The four metrics of revising start towards clean, int64 [n, 81] both; shares as fractions."""
    began = time.perf_counter()
    results = [revise_boards(trained, part, max_turns, **how) for part in start.split(500)]
    mistakes = [replay_mistakes(r.trace.cpu(), part) for r, part in zip(results, clean.split(500))]

    n = len(clean)
    tokens = torch.cat([result.tokens for result in results]).cpu()
    exact = (tokens == clean).all(-1)
    valid = is_valid(tokens)
    remasked, replayed = map(sum, zip(*mistakes))
    return {
        "exact": exact.float().mean().item(),
        "valid": valid.float().mean().item(),
        "replay_mistake": replayed / max(remasked, 1),
        "conflict_cells": conflicts(tokens).sum(-1).float().mean().item(),
        "n": n,
        "ci95_exact": rm.wilson_interval(int(exact.sum()), n),
        "ci95_valid": rm.wilson_interval(int(valid.sum()), n),
        "max_turns": max_turns,
        "reveal": how.get("reveal"),
        "mean_turns": sum(turn for result in results for turn in result.turns) / n,
        "params": sum(p.numel() for p in trained[0].parameters()),
        "seconds": time.perf_counter() - began,
        "right": "".join("01"[right] for right in exact.tolist()),  # a board each, for paired tests
    }


# ------------------------------------------------------------------------------------------------
# Training, and watching a revision


def new_model(device: torch.device | str = "cpu") -> rm.MaskDiffusionTransformer:
    """4 layers of width 128, 793,000 parameters."""
    config = rm.TransformerConfig(vocabulary=10, length=81, coordinates=COORDINATES.tolist())
    return rm.MaskDiffusionTransformer(config).to(device)


def train_variant(
    variant: str, out: Path, device: torch.device, seed: int, minutes: float, steps: int | None,
    gamma: float | None, rotate: bool | None, compile: bool, n: int, max_turns: int,
    puzzles: int = 500, validation: int = 300,
) -> dict:  # fmt: skip
    """Trains a variant, or goes on, and scores it; writes OUT/<variant>_seed<seed>.pt and .json.

    minutes are made into steps by a trial, or steps is exact.  gamma, rotate: None, the variant's
    own.  n: test boards.  puzzles, validation: how many are drawn.  Returns the record.
    """
    rm.say(f"{variant}, seed {seed}: drawing {puzzles} puzzles")
    dug = random_puzzles(puzzles, seed).to(device)
    held_out = random_boards(validation, VALIDATION_SEED)
    start = corrupt(held_out, VALIDATION_SEED)
    clean = random_boards(n, TEST_SEED)
    test = corrupt(clean, TEST_SEED)
    gamma = VARIANTS[variant][0] if gamma is None else gamma
    rotate = VARIANTS[variant][1] if rotate is None else rotate
    options = {"gamma": gamma, "rotate": rotate, "compile": compile}
    data = rm.fingerprint(dug, held_out, start, clean, test)
    length = {"steps": steps} if steps else {"minutes": minutes}
    settings = {**options, **length, "max_turns": max_turns, "data": data}
    run = rm.Run(out / f"{variant}_seed{seed}", settings)
    if run.record:
        return run.record

    torch.manual_seed(seed)
    model = new_model(device)
    sample = partial(sample_batch, puzzles=dug, plain=variant == "plain")
    options |= {"seed": seed, **TRAINING}
    if variant == "direct":
        options["oracle"] = truth_everywhere
    if not steps and "planned" not in run.notes:
        trial = rm.train(new_model(device), sample, 40, MASK, warmup=40, **options)
        seconds = [stats["seconds"] for _, stats in trial]
        each = [(seconds[-1] - seconds[9]) / 30]  # the first ten are slow
        if rm.dist.is_initialized():
            rm.dist.broadcast_object_list(each)
        run.notes["planned"] = max(1, int(minutes * 60 / each[0]))
    steps = steps or run.notes["planned"]
    every = max(1, min(250, steps // 8))
    how = {"max_turns": max_turns, "rule": RULES.get(variant)}
    for step, stats in rm.train(model, sample, steps, MASK, **options, **run.files(every)):
        if step % every == 0 or step == steps:
            score = evaluate((model, gamma, rotate), held_out, start, **how)
            run.show(step, steps, stats, {"exact": score["exact"], "valid": score["valid"]})
        elif step % max(1, every // 10) == 0:
            run.show(step, steps, stats)

    scores = {}
    for name, decoding in DECODINGS[variant].items():
        decoding = {"max_turns": max_turns, **decoding}
        scores[name] = evaluate((model, gamma, rotate), clean, test, **decoding)
    about = {"variant": variant, "seed": seed, "gamma": gamma, "rotate": rotate, "steps": steps}
    return run.finish(model, "sudoku", **about, training=TRAINING, test=scores)


def train_table(variant: str, out: Path, device: torch.device, seed: int, **plan) -> dict:
    """Trains a variant, or "all"; prints the table; draws the curve of full, or of the one."""
    variants = [*VARIANTS] if variant == "all" else [variant]
    records = [train_variant(name, out, device, seed, **plan) for name in variants]
    if not rm.is_main_process():
        return {}
    table = {}
    for record in records:
        for name, score in record["test"].items():
            table[f"{record['variant']}, {name}"] = {**score, "minutes": record["minutes"]}
    print_table(table)
    ours = next((record for record in records if record["variant"] == "full"), records[0])
    first = f"{ours['variant']}, {next(iter(ours['test']))}"
    against = {}
    print(f"\nexact of '{first}' on the same boards, minus that of")
    for label, row in table.items():
        against[label] = rm.paired_bootstrap(table[first]["right"], row["right"])
        low, high = against[label]["ci95"]
        print(f"{label:44}{against[label]['difference']:+8.1%} ({low:+.1%} to {high:+.1%})")
    lines = {}
    for share in ("exact", "valid"):
        lines[share] = [(point["minutes"], point[share], None) for point in ours["curve"]]
    rm.draw_lines(out / f"{ours['variant']}_curve.png", lines, "minutes", "%")
    result = {"table": table, "ours_against": against, "provenance": rm.provenance(device)}
    rm.write_json(out / f"{variant}_table.json", result)
    return result


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


def show_revision(trained: tuple, board: Tensor, **how) -> dict:
    """Revises one board, int64 [81], and prints every turn.  how: of revise_boards."""
    result = revise_boards(trained, board.unsqueeze(0), **how)
    trace = result.trace[:, 0].cpu()
    print("_ masked   -_ re-masked in this turn   +5 revealed in this turn   5! breaks a rule\n")
    for turn, (before, now) in enumerate(pairwise(torch.cat([trace[:1], trace]))):
        print(f"turn {turn}: {int((before != now).sum())} cells changed\n{show_turn(now, before)}")
    verdict = {
        "board": "".join(map(str, now.tolist())),
        "turns": result.turns[0],
        "status": result.status[0],
        "valid": bool(is_valid(now)),
    }
    print("{status} after {turns} turns; valid: {valid}".format(**verdict))
    return verdict


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

    A line of 81 characters or of two such, with spaces or commas between, or nine lines of nine.
    # starts a comment; ids, ratings, rulers and titles (quizzes,solutions) are passed over.
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
    """The first n puzzles and solutions, int64 [n, 81], MASK where none.  solved: all have one."""
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
    return torch.stack(pairs, dim=1).unbind()


def parse_options():
    """The command line, with what depends on the mode filled in."""
    options = rm.Options(description="Reflective Masking on Sudoku.  Alone: train, evaluate, draw.")
    count = rm.number(int, 1)
    cells = rm.number(int, 0, 81)
    used = ("evaluate", "revise", "solve", "puzzles")
    add = options.add_argument_group("what to do (default: train)")
    add = add.add_mutually_exclusive_group().add_argument
    add("--evaluate", action="store_true", help="score --checkpoint on the test boards or --boards")
    add("--revise", metavar="BOARD", help=f"repair 81 digits, blank {BLANKS}, and show every turn")
    add("--solve", metavar="PUZZLE", help="the same with the clues locked")
    add("--puzzles", type=Path, metavar="FILE", help="score solving; solutions need not be given")

    add = options.group("training", "train")
    add("--variant", choices=[*VARIANTS, "all"], default="full", help="all: those of the table")
    add("--minutes", type=rm.number(float, 0.01), default=15, help="made into steps (default 15)")
    add("--steps", type=count, help="exactly so many instead, for equal training")
    add("--gamma", type=rm.number(float, 0, 1), help="decay of history (default: the variant's)")
    add("--no-rotate", dest="rotate", action="store_false", default=None, help="no HER")
    add("--compile", action="store_true", help="torch.compile (on a CPU it needs a C++ compiler)")

    add = options.group("evaluation", *used)
    add("--checkpoint", type=Path, default=SHIPPED, help="default: the shipped one")
    add("--boards", type=Path, metavar="FILE", modes=("evaluate",), help="solved, to be corrupted")
    add("--n", type=count, default=2000, modes=("train", "evaluate", "puzzles"),
        help="boards at most (default 2000)")  # fmt: skip
    add("--corrupt", type=cells, nargs=2, default=(4, 20), metavar=("LOW", "HIGH"),
        modes=("evaluate",), help="wrong cells (default 4 20)")  # fmt: skip
    add("--max-turns", type=count, help="forward passes (default 32; --reveal, solving: 100)")
    add("--reveal", type=cells, help="reveals a turn, surest first; 0: all (default; solving 1)")
    options.general("runs/sudoku", "of training; with --evaluate of the test boards",
                    ("train",), ("train", "evaluate"))  # fmt: skip
    mode_of = lambda args: next((mode for mode in used if mode in args.given), "train")
    args = options.parse(mode_of, {"steps": 4, "n": 8, "max_turns": 4})

    if (args.steps or args.smoke) and "minutes" in args.given:
        options.error("--minutes has no effect with --steps or --smoke")
    if args.corrupt[0] > args.corrupt[1]:
        options.error(f"--corrupt: {args.corrupt[0]} is more than {args.corrupt[1]}")
    solving = args.mode in ("solve", "puzzles")
    args.reveal = int(solving) if args.reveal is None else args.reveal
    args.max_turns = args.max_turns or (100 if args.reveal else 32)
    return args


def main() -> None:
    args = parse_options()
    device = rm.start_device(args.device)
    if args.mode == "train":
        names = ("minutes", "steps", "gamma", "rotate", "compile", "n", "max_turns")
        plan = {name: getattr(args, name) for name in names}
        plan |= {"puzzles": 2, "validation": 8} if args.smoke else {}
        result = train_table(args.variant, args.out, device, args.seed, **plan)
    elif rm.dist.is_initialized():
        raise InputError("torchrun is for training; run this with one process")
    else:
        result = use_checkpoint(args, device)
    rm.write_json(args.json, result)


def use_checkpoint(args, device: torch.device) -> dict:
    needs = ("gamma", "rotate", "variant")
    model, info = rm.load_checkpoint(args.checkpoint, "sudoku", device, needs)
    if (model.config.vocabulary, model.config.length) != (10, 81):
        raise InputError(f"{args.checkpoint} is of boards that are not 9x9")
    rule = RULES.get(info["variant"])
    if rule and (args.mode != "evaluate" or args.reveal):
        raise InputError(f"{args.checkpoint} has no Eq. 1: --evaluate it without --reveal")
    trained = (model, info["gamma"], info["rotate"])
    solve = args.mode in ("solve", "puzzles")
    how = {"max_turns": args.max_turns, "reveal": args.reveal or None}
    if args.mode in ("revise", "solve"):
        board = parse_board(args.solve or args.revise, puzzle=solve)
        return show_revision(trained, board, solve=solve, **how)

    seed = TEST_SEED + args.seed
    if solve or args.boards:
        start, clean = read_boards(args.puzzles or args.boards, args.n, solved=not solve)
    else:
        clean = random_boards(args.n, seed)
    if not solve:
        start = corrupt(clean, seed, *args.corrupt)
    score = evaluate(trained, clean, start, rule=rule, solve=solve, **how)
    if solve:
        if (clean == MASK).any():  # what compares with the truth is not known
            score |= dict.fromkeys(("exact", "ci95_exact", "replay_mistake", "right"))
        score |= {"solved": score["valid"], "ci95_solved": score["ci95_valid"]}
        print("solved {solved:.1%} of {n} puzzles in {mean_turns:.1f} turns".format(**score))
    else:
        print_table({f"{'baseline' if rule else 'ours'}, {info['variant']}": score})
    about = {"checkpoint": args.checkpoint.name, "provenance": rm.provenance(device)}
    return {**score, "seed": args.seed, "boards": rm.fingerprint(start, clean), **about}


if __name__ == "__main__":
    rm.run_script(main)
