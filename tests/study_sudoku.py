"""The figures of results/README.md's Sudoku page, from a trained checkpoint.

    python tests/study_sudoku.py turns          exact and valid against the number of turns
    python tests/study_sudoku.py severity       the same against the number of wrong cells
    python tests/study_sudoku.py clues          puzzles solved against their clues
    python tests/study_sudoku.py calibration    what p(x) means at visible cells
    python tests/study_sudoku.py memory --checkpoint FULL... --against RM...    pairs, a seed each
    python tests/study_sudoku.py board --reveal 0      the moving board of the README

Each writes results/sudoku_<name>.json and .png (memory: no .png; board: a .gif alone).
One reveal a turn by default.  --against FILE draws another model beside it.
"""

import argparse
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import reflective_masking as rm
import train_sudoku as sudoku
from history import history_embedding
from train_sudoku import MASK, TEST_SEED, corrupt, evaluate, random_boards

SHARES = {"clues": ("valid",), "calibration": ("right",)}  # drawn; a puzzle has one solution
AXES = {"turns": "turns", "severity": "wrong_cells", "clues": "clues", "calibration": "p"}


def study_turns(trained: tuple, n: int, how: dict) -> list[dict]:
    """A point for each limit of turns.  trained: (model, gamma, rotate).  how: of evaluate."""
    clean = random_boards(n, TEST_SEED)
    start = corrupt(clean, TEST_SEED)
    limits = [t for t in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100) if t <= how["max_turns"]]
    score = partial(evaluate, trained, clean, start)
    return [{"turns": turns, **score(**{**how, "max_turns": turns})} for turns in limits]


def study_severity(trained: tuple, n: int, how: dict) -> list[dict]:
    """A point for each number of wrong cells."""
    clean = random_boards(n, TEST_SEED)
    rows = []
    for cells in range(4, 41, 4):
        start = corrupt(clean, TEST_SEED + cells, cells, cells)
        rows.append({"wrong_cells": cells, **evaluate(trained, clean, start, **how)})
    return rows


def study_clues(trained: tuple, n: int, how: dict) -> list[dict]:
    """A point for each number of clues: n minimal puzzles with no more, and random further ones."""
    minimal, clean = sudoku.random_puzzles(n, TEST_SEED).unbind(1)
    generator = torch.Generator().manual_seed(TEST_SEED)
    rows = []
    for clues in (24, 28, 32, 36):
        few = (minimal != MASK).sum(-1) <= clues
        puzzle = sudoku.add_clues(minimal[few], clean[few], clues, generator)
        if few.any():
            score = evaluate(trained, clean[few], puzzle, solve=True, **how)
            rows.append({"clues": clues, **score})
    return rows


@torch.no_grad()
def study_calibration(trained: tuple, n: int, how: dict) -> list[dict]:
    """p(x) at visible cells in all turns, in 20 bins, against the share of right ones in each.

    p(x) should be the probability that x is right, and p(x) + p(M) be 1.
    """
    model, gamma, rotate = trained
    clean = random_boards(n, TEST_SEED)
    start = corrupt(clean, TEST_SEED)
    seen = []
    for rows in torch.arange(n).split(500):
        result = sudoku.revise_boards(trained, start[rows], **how)
        turns = torch.tensor(result.turns)
        for turn in range(max(result.turns)):  # once more, with the truth at hand
            going = turns > turn
            states = result.trace[: turn + 1, going]
            tokens = states[-1]
            p = model(history_embedding(states, model.embedding, gamma, rotate)).softmax(-1)
            own = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            right = (tokens == clean[rows][going].to(p.device)).float()
            seen.append(torch.stack([own, own + p[..., MASK], right], -1)[tokens != MASK].cpu())

    own, both, right = torch.cat(seen).T
    bins = (own * 20).long().clamp(max=19)
    points = []
    for low in bins.unique():
        here = bins == low
        hits, count = int(right[here].sum()), int(here.sum())
        point = {
            "p": own[here].mean().item(),
            "right": hits / count,
            "ci95_right": rm.wilson_interval(hits, count),
            "mean_p_own_plus_mask": both[here].mean().item(),
            "n": count,
        }
        points.append(point)
    return points


def study_memory(ours: list[tuple], theirs: list[tuple], n: int, how: dict) -> dict:
    """Valid and exact boards and puzzles of models of several seeds, ours minus theirs, paired.

    task -> row; ci95 resamples its boards, the difference on each being the mean of seeds.
    """
    clean = random_boards(n, TEST_SEED)
    tasks = {"4 to 20 wrong": (clean, corrupt(clean, TEST_SEED))}
    for cells in (24, 28, 32):
        tasks[f"{cells} wrong"] = clean, corrupt(clean, TEST_SEED + cells, cells, cells)
    minimal, solved = sudoku.random_puzzles(n, TEST_SEED).unbind(1)
    generator = torch.Generator().manual_seed(TEST_SEED)
    for clues in (28, 32):
        few = (minimal != MASK).sum(-1) <= clues
        puzzle = sudoku.add_clues(minimal[few], solved[few], clues, generator)
        tasks[f"{clues} clues"] = solved[few], puzzle

    rows = {}
    for task, (clean, start) in tasks.items():
        right = {"valid": [], "exact": []}  # float [n] of each model
        for trained in (*ours, *theirs):
            result = sudoku.revise_boards(trained, start, solve=task.endswith("clues"), **how)
            tokens = result.tokens.cpu()
            right["valid"].append(sudoku.is_valid(tokens).float())
            right["exact"].append((tokens == clean).all(-1).float())
        rows[task] = {"n": len(clean)}
        for share, models in right.items():
            first, second = torch.stack(models).unflatten(0, (2, -1))  # [seeds, n] each
            difference = first - second
            rows[task][share] = row = {
                "ours": first.mean(-1).tolist(),
                "theirs": second.mean(-1).tolist(),
                "difference_by_seed": difference.mean(-1).tolist(),
                "difference": difference.mean().item(),
                "ci95": rm.bootstrap_interval(difference.mean(0).tolist()),
            }
            found = "{difference:+.1%} ({ci95[0]:+.1%} to {ci95[1]:+.1%})".format(**row)
            print(f"{task}, {share}: {found}", flush=True)
    return rows


STUDIES = {
    "turns": study_turns,
    "severity": study_severity,
    "clues": study_clues,
    "calibration": study_calibration,
}


def draw(path: Path, models: dict[str, list[dict]], axis: str, shares: tuple[str, ...]) -> None:
    """Shares of the rows of each model, with their intervals, against axis."""
    lines = {}
    for name, rows in models.items():
        for share in shares:
            points = [(row[axis], row[share], row[f"ci95_{share}"]) for row in rows]
            lines[f"{share}, {name}"] = points
    rm.draw_lines(path, lines, axis.replace("_", " "), "%", log=axis == "turns")


def animate(path: Path, trace: Tensor) -> None:
    """A GIF of one revision, int64 [turns + 1, 81].

    Amber: masked; green: revealed in this turn; red digit: breaks a rule.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, ((axis,),) = rm.new_figure(width=3.6, height=3.9)
    white, amber, green = torch.tensor([[255, 255, 255], [255, 217, 138], [168, 224, 176]])

    def frame(turn: int) -> None:
        now = trace[turn].unsqueeze(-1)
        before = trace[max(turn - 1, 0)].unsqueeze(-1)
        color = torch.where(now == MASK, amber, torch.where(now == before, white, green))
        axis.clear()
        axis.imshow(color.view(9, 9, 3).numpy())
        axis.set(title=f"turn {turn}", xticks=[], yticks=[])
        for cell, broken in enumerate(sudoku.conflicts(trace[turn]).tolist()):
            ink = "#c62828" if broken else "black"
            digit = str(int(now[cell]) or "")
            axis.text(cell % 9, cell // 9, digit, color=ink, ha="center", va="center")
        for line in range(1, 9):
            style = {"color": "black", "linewidth": 0.5 if line % 3 else 1.8}
            axis.axhline(line - 0.5, **style)
            axis.axvline(line - 0.5, **style)

    turns = [*range(len(trace)), *[len(trace) - 1] * 3]  # the last state stays a while
    FuncAnimation(figure, frame, turns).save(path, PillowWriter(fps=1), dpi=100)
    print(f"wrote {path}")


def find_retry(trained: tuple, n: int, how: dict) -> Tensor:
    """The trace, int64 [turns + 1, 81], of the first test board on which the model takes back a
    digit of its own and still finds the truth."""
    clean = random_boards(n, TEST_SEED)
    start = corrupt(clean, TEST_SEED, 20, 20)
    result = sudoku.revise_boards(trained, start, **how)
    trace = result.trace.cpu()
    revealed = torch.zeros_like(clean, dtype=torch.bool)
    retried = torch.zeros(n, dtype=torch.bool)
    for before, after in pairwise(trace):
        retried |= (revealed & (before != MASK) & (after == MASK)).any(-1)
        revealed |= (before == MASK) & (after != MASK)
    found = (retried & (trace[-1] == clean).all(-1)).nonzero().flatten().tolist()
    if not found:
        sys.exit(f"the model takes back no digit of its own on {n} boards")
    return trace[: result.turns[found[0]] + 1, found[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures of a trained Sudoku model.")
    parser.add_argument("name", choices=[*STUDIES, "memory", "board"])
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[sudoku.SHIPPED],
        help="default: the shipped one")  # fmt: skip
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="drawn beside it")
    parser.add_argument("--n", type=int, default=2000, help="boards (default 2000)")
    parser.add_argument("--reveal", type=int, default=1, help="reveals a turn; 0: all (default 1)")
    parser.add_argument("--max-turns", type=int, default=100, help="default 100")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="default results/")
    args = parser.parse_args()
    if args.name == "memory" and len(args.against) != len(args.checkpoint):
        parser.error("memory needs --against, a checkpoint for each of --checkpoint")

    trained, names = [], []
    for path in (*args.checkpoint, *args.against):
        model, info = rm.load_checkpoint(path, "sudoku", needs=("gamma", "rotate", "variant"))
        trained.append((model, info["gamma"], info["rotate"]))
        names.append(path.stem)
    how = {"max_turns": args.max_turns, "reveal": args.reveal or None}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"sudoku_{args.name}"
    if args.name == "board":
        animate(path.with_suffix(".gif"), find_retry(trained[0], min(args.n, 100), how))
        return

    result = {**how, "models": names, "provenance": rm.provenance(trained[0][0].embedding.device)}
    if args.name == "memory":
        half = len(args.checkpoint)
        rows = study_memory(trained[:half], trained[half:], args.n, how)
        rm.write_json(path.with_suffix(".json"), {"rows": rows, **result})
        return
    models = {}
    for name, one in zip(names, trained):
        models[name] = STUDIES[args.name](one, args.n, how)
    rm.write_json(path.with_suffix(".json"), {"rows": models, **result})
    shares = SHARES.get(args.name, ("exact", "valid"))
    draw(path.with_suffix(".png"), models, AXES[args.name], shares)


if __name__ == "__main__":
    rm.run_script(main)
