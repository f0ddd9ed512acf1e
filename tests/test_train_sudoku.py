"""Sudoku: boards, metrics, baselines against plain Python; files as people have them; the command
lines end to end."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

import reflective_masking as rm
import study_sudoku
import train_sudoku as sudoku
from history import ABSENT, HistoryReference

ROOT = Path(__file__).parent.parent
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"


def tensor(text):
    return torch.tensor([int(character) for character in text])


UNITS = [[9 * r + c for c in range(9)] for r in range(9)]
UNITS += [[9 * r + c for r in range(9)] for c in range(9)]
BOX = (0, 1, 2, 9, 10, 11, 18, 19, 20)
UNITS += [[corner + cell for cell in BOX] for corner in (0, 3, 6, 27, 30, 33, 54, 57, 60)]


def valid_by_hand(board):
    return all({board[cell] for cell in unit} == set(range(1, 10)) for unit in UNITS)


# --- boards


def test_random_boards_are_valid_different_and_reproducible():
    boards = sudoku.random_boards(60, seed=3)
    assert all(map(valid_by_hand, boards.tolist())) and len(boards.unique(dim=0)) == 60
    assert torch.equal(boards[:9], sudoku.random_boards(9, seed=3))
    assert all(len(set(boards[:, cell].tolist())) >= 7 for cell in range(81))


def solutions_by_hand(puzzle):
    """One after another: every digit that the rules leave, where fewest are left."""
    left = {}
    for cell in [cell for cell in range(81) if puzzle[cell] == 0]:
        peers = (other for unit in UNITS if cell in unit for other in unit)
        left[cell] = {*range(1, 10)} - {puzzle[peer] for peer in peers}
    if not left:
        yield puzzle
        return
    cell = min(left, key=lambda cell: len(left[cell]))
    for digit in left[cell]:
        yield from solutions_by_hand(puzzle[:cell] + [digit] + puzzle[cell + 1 :])


def test_minimal_puzzles_have_one_solution_and_no_clue_too_many():
    drawn = sudoku.random_puzzles(4, seed=0)
    for puzzle, board in drawn.tolist():
        assert list(islice(solutions_by_hand(puzzle), 2)) == [board]
    for cell in drawn[0, 0].nonzero().flatten().tolist():
        fewer = drawn[0, 0].index_fill(0, torch.tensor(cell), sudoku.MASK).tolist()
        assert any(solution != drawn[0, 1].tolist() for solution in solutions_by_hand(fewer))


def test_further_clues_come_from_the_solution_and_reach_their_number():
    minimal, board = sudoku.random_puzzles(4, seed=0).unbind(1)
    least = (minimal != sudoku.MASK).sum(-1)
    for count in (0, int(least.max()), 36, 60):
        puzzle = sudoku.add_clues(minimal, board, count, torch.Generator())
        given = puzzle != sudoku.MASK
        assert torch.equal(given.sum(-1), least.clamp(min=count))
        assert torch.equal(puzzle[given], board[given]) and given[minimal != sudoku.MASK].all()


def test_symmetries_keep_boards_valid_and_act_on_puzzle_and_board_alike():
    generator = torch.Generator().manual_seed(0)
    boards = tensor(SOLVED).repeat(200, 1)
    both = torch.stack([torch.where(boards == 5, sudoku.MASK, boards), boards], dim=1)
    masked, images = sudoku.shuffle_symmetries(both, generator).unbind(1)
    assert all(map(valid_by_hand, images.tolist()))
    assert len(images.unique(dim=0)) == 200
    assert ((masked == sudoku.MASK).sum(-1) == 9).all()
    assert torch.equal(torch.where(masked == sudoku.MASK, masked, images), masked)


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


def test_symmetries_reach_rows_columns_digits_and_transposes_evenly():
    board = torch.zeros(1, 81, dtype=torch.long)
    board[0, 0] = 1  # one mark: where it goes shows the law of rows, columns and digits
    generator = torch.Generator().manual_seed(1)
    images = sudoku.shuffle_symmetries(board.repeat(8100, 1, 1), generator).squeeze(1)
    cells = torch.bincount(images.argmax(-1), minlength=81)
    digits = torch.bincount(images.max(-1).values, minlength=10)[1:]
    assert chi_square(cells, 100) < 80 + 5 * 160**0.5
    assert chi_square(digits, 900) < 8 + 5 * 16**0.5


def test_corruption_replaces_4_to_20_cells_by_wrong_digits():
    clean = sudoku.random_boards(1, seed=0).repeat(3000, 1)
    start = sudoku.corrupt(clean, seed=1)
    wrong = (start != clean).sum(-1)
    assert wrong.min() == 4 and wrong.max() == 20 and (start >= 1).all() and (start <= 9).all()
    counts = torch.bincount(wrong, minlength=21)[4:]
    assert chi_square(counts, 3000 / 17) < 45  # 16 degrees of freedom, p < 0.0002
    assert torch.equal(start, sudoku.corrupt(clean, seed=1))
    for truth in (1, 9):
        found = torch.bincount(start[:, clean[0] == truth].flatten(), minlength=10)[1:]
        others = torch.cat([found[: truth - 1], found[truth:]])
        assert chi_square(others, others.sum() / 8) < 35  # 7 degrees of freedom, p < 0.0001


def test_training_starts_are_lawful_and_clues_are_locked():
    generator = torch.Generator().manual_seed(0)
    puzzles = sudoku.random_puzzles(4, seed=0)
    start, clean, editable = sudoku.sample_starts(4000, generator, puzzles)
    assert all(map(valid_by_hand, clean[::50].tolist()))
    masked = start == sudoku.MASK
    wrong = (start != clean) & ~masked
    assert torch.equal(start[~editable], clean[~editable])  # a clue is the truth

    blanks = editable[:2000].sum(-1)  # puzzles
    least = (puzzles[:, 0] != sudoku.MASK).sum(-1)
    assert 81 - blanks.max() == least.min() and blanks.min() == 81 - 60
    filled = (editable & ~masked)[:2000].sum(-1)
    assert ((filled == 0).float().mean() - 0.5).abs() < 0.06
    assert (wrong[:2000].sum() / filled.sum() - 0.25).abs() < 0.02
    assert (filled.sum() / blanks.sum() - 0.25).abs() < 0.02

    assert editable[2000:].all() and not masked[2000:].any()  # boards
    counts = wrong[2000:].sum(-1)  # about 0 to 40, each equally often
    shares = torch.stack([counts < 4, counts < 20, counts > 36]).float().mean(-1)
    assert ((shares - torch.tensor([0.1, 0.49, 0.1])).abs() < 0.04).all()


def test_training_states_pass_from_the_start_to_the_truth():
    generator = torch.Generator().manual_seed(0)
    puzzles = sudoku.random_puzzles(4, seed=0)
    states, clean, editable = sudoku.sample_batch(400, generator, puzzles)
    assert states.shape == (6, 400, 81) and clean.shape == editable.shape == (400, 81)
    now = states[-1]
    assert torch.equal(now[~editable], clean[~editable])
    seen = states != ABSENT
    right = (states == clean) & seen
    wrong = seen & ~right & (states != sudoku.MASK)
    assert not (right[:-1] & ~right[1:]).any() and not (wrong[1:] & right[:-1]).any()
    task = (now[200:] != sudoku.MASK).all(-1) & (now != clean)[200:].any(-1)
    assert task.sum() > 10  # whole boards with wrong cells, as the task shows them
    states, clean, editable = sudoku.sample_batch(200, generator, puzzles, plain=True)
    assert len(states) == 1 and torch.equal(editable, states[0] == sudoku.MASK)
    assert torch.equal(torch.where(editable, clean, states[0]), clean)


# --- metrics


def test_validity_and_conflicts_agree_with_a_loop():
    rng = random.Random(0)
    for _ in range(50):
        board = [int(character) for character in SOLVED]
        for _ in range(rng.choice([0, 1, 2, 10])):
            board[rng.randrange(81)] = rng.randrange(10)
        expected = [False] * 81
        for unit in UNITS:
            for cell in unit:
                same = [other for other in unit if board[other] == board[cell] and board[cell]]
                expected[cell] |= len(same) > 1
        assert sudoku.conflicts(torch.tensor([board]))[0].tolist() == expected
        assert sudoku.is_valid(torch.tensor([board])).item() == valid_by_hand(board)


def test_replay_mistakes_of_hand_written_trajectories():
    clean = torch.full((1, 81), 1)

    def trajectory(*states):  # the history of cell 0; the others stay right
        trace = clean.repeat(len(states), 1, 1)
        trace[:, 0, 0] = torch.tensor(states)
        return sudoku.replay_mistakes(trace, clean)

    assert trajectory(1, 1, 1) == (0, 0)
    assert trajectory(5, 0, 1) == (1, 0)  # repaired
    assert trajectory(5, 0, 5) == (1, 1)  # replayed at once
    assert trajectory(5, 0, 6, 0, 5) == (1, 1)  # replayed after another guess
    assert trajectory(5, 0, 6, 0, 7) == (1, 0)  # always new guesses
    assert trajectory(5, 0, 5, 0, 5) == (1, 1)  # a cell counts once
    assert trajectory(1, 0, 1) == (0, 0)  # a right cell re-masked without need is no mistake
    assert trajectory(5, 5, 5) == (0, 0)  # never re-masked
    assert trajectory(0, 5, 0, 5) == (1, 1)  # a wrong reveal counts like a wrong start


class Oracle(torch.nn.Module):
    """Re-masks what is wrong, reveals the truth; reads the tokens back from the embedding."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean
        self.config = rm.TransformerConfig(vocabulary=10, length=81)
        self.embedding = torch.nn.Parameter(torch.eye(10))

    def forward(self, x):
        tokens = x.argmax(-1)
        clean = self.clean[: len(x)]
        good = (tokens == clean) | (tokens == sudoku.MASK)
        return torch.nn.functional.one_hot(torch.where(good, clean, sudoku.MASK), 10).float()


def test_evaluation_of_an_oracle_and_of_doing_nothing():
    clean = sudoku.random_boards(6, seed=0)
    start = sudoku.corrupt(clean, seed=0)
    score = sudoku.evaluate((Oracle(clean), 0.0, False), clean, start)
    metrics = [score[key] for key in ("exact", "valid", "replay_mistake", "conflict_cells")]
    assert metrics == [1, 1, 0, 0] and score["mean_turns"] == 3 and score["right"] == "111111"
    assert score["ci95_exact"][0] > 0.5
    truth = Oracle(clean)
    truth.forward = lambda x: torch.nn.functional.one_hot(clean[: len(x)], 10).float()
    for decoding in sudoku.DECODINGS["direct"].values():
        assert sudoku.evaluate((truth, 0.0, False), clean, start, **decoding)["exact"] == 1
    idle = lambda logits, tokens, mask_id, **_: tokens
    score = sudoku.evaluate((Oracle(clean), 0.0, False), clean, start, rule=idle)
    assert score["exact"] == 0 and score["mean_turns"] == 1
    assert score["conflict_cells"] == pytest.approx(sudoku.conflicts(start).sum().item() / 6)


def test_calibration_of_hand_made_probabilities():
    """A model that says p(x) = 0.7 everywhere and never re-masks: 0.7 less the share right."""
    clean = sudoku.random_boards(4, sudoku.TEST_SEED)
    wrong = (sudoku.corrupt(clean, sudoku.TEST_SEED) != clean).sum().item()
    model = Oracle(clean)
    certain = torch.tensor([0.3, 0.7]).log()
    says = lambda x: torch.full_like(x, -50.0).masked_fill(x > 1, certain[1])
    model.forward = lambda x: says(x).index_fill(-1, torch.tensor(0), float(certain[0]))
    how = {"max_turns": 5, "reveal": None}
    (row,) = study_sudoku.study_calibration((model, 0.0, False), 4, how)
    right = 1 - wrong / 324
    assert row["p"] == pytest.approx(0.7) and row["right"] == pytest.approx(right)
    assert row["n"] == 324 and row["ci95_right"] == rm.wilson_interval(324 - wrong, 324)
    assert row["mean_p_own_plus_mask"] == pytest.approx(1)
    model.forward = Oracle(clean).forward  # wrong: seen once; right: in all three turns
    rows = study_sudoku.study_calibration((model, 0.0, False), 4, how)
    assert sum(row["n"] for row in rows) == 3 * 324 - wrong


# --- baselines


def test_remask_least_confident_follows_its_schedule_and_respects_locks():
    torch.manual_seed(0)
    tokens = torch.randint(1, 10, (4, 81))
    logits = torch.randn(4, 81, 10)
    free = torch.ones(4, 81, dtype=torch.bool)
    states = [tokens]
    for turn in range(1, 11):
        now = sudoku.remask_least_confident(logits, states[-1], sudoku.MASK, free, turn, 10)
        states.append(now)
    masked = [(state == sudoku.MASK).sum(-1).tolist() for state in states[1:]]
    assert masked == [[n] * 4 for n in (18, 0, 14, 0, 10, 0, 6, 0, 2, 0)]
    p = logits[..., 1:].softmax(-1).gather(-1, tokens.unsqueeze(-1) - 1).squeeze(-1)
    assert torch.equal(states[1] == sudoku.MASK, p <= p.sort(-1).values[:, 17:18])
    free[:, 5:50] = False
    locked = sudoku.remask_least_confident(logits, tokens, sudoku.MASK, free, 1, 10)
    assert torch.equal(locked[~free], tokens[~free]) and (locked == sudoku.MASK).any()


def test_direct_replacement_takes_the_best_digit_where_it_may():
    logits = torch.zeros(1, 3, 4)
    logits[0, :, 0] = 9  # MASK
    logits[0, [0, 1, 2], [3, 2, 1]] = 1
    tokens = torch.tensor([[2, 0, 3]])
    locked = torch.tensor([[True, True, False]])
    assert sudoku.direct_replacement(logits, tokens, 0, editable=locked).tolist() == [[3, 2, 3]]


# --- files as people have them

LINES = [PUZZLE[i : i + 9] for i in range(0, 81, 9)]
LINES_OF_NINE = "\n".join(LINES)
ROWS = [" | ".join(" ".join(line[i : i + 3]) for i in (0, 3, 6)) for line in LINES]
BARS = "\n------+-------+------\n".join("\n".join(ROWS[i : i + 3]) for i in (0, 3, 6))
FILES = {  # text -> puzzles, and how many have a solution
    "Kaggle": (f"quizzes,solutions\n{PUZZLE},{SOLVED}\n{PUZZLE},{SOLVED}\n", 2, 2),
    "Kaggle, other": (f'id,puzzle,solution,clues,difficulty\n7,"{PUZZLE}",{SOLVED},30,2.2\n', 1, 1),
    "Royle": (f"{PUZZLE}\n{PUZZLE}\n", 2, 0),
    "windows": (f"\ufeff# a comment\r\n\r\n{PUZZLE} {SOLVED}  # easy\r\n", 1, 1),
    "nine lines": (f"Grid 01\n{LINES_OF_NINE}\nGrid 02\n{LINES_OF_NINE}\n", 2, 0),
    "bars": (BARS, 1, 0),
    **{f"blank {b}": (PUZZLE.replace("0", b) + "\n", 1, 0) for b in ".0*_X?"},
    "nine lines, X": (LINES_OF_NINE.replace("0", "X"), 1, 0),
    "spaces": (" ".join(PUZZLE), 1, 0),
}


@pytest.mark.parametrize("text, count, solved", FILES.values(), ids=FILES.keys())
def test_files_of_puzzles(text, count, solved, tmp_path):
    path = tmp_path / "puzzles.csv"
    path.write_bytes(text.encode())
    puzzles, solutions = sudoku.read_boards(path, 100, solved=False)
    assert torch.equal(puzzles, tensor(PUZZLE).repeat(count, 1))
    expected = tensor(SOLVED if solved else "0" * 81)
    assert torch.equal(solutions, expected.repeat(count, 1))
    assert len(sudoku.read_boards(path, 1, solved=False)[0]) == 1


def test_any_valid_solution_of_a_puzzle_counts_as_solved(tmp_path, monkeypatch, capsys):
    first = tensor(SOLVED)
    second = tensor(SOLVED.translate(str.maketrans("12", "21")))
    puzzle = torch.where(first == second, first, sudoku.MASK)  # 18 blanks
    text = ["".join(map(str, board.tolist())) for board in (puzzle, first)]
    info = {"gamma": 0.0, "rotate": False, "variant": "rm"}
    monkeypatch.setattr(rm, "load_checkpoint", lambda *_: (Oracle(second.unsqueeze(0)), info))
    file = tmp_path / "puzzles.txt"
    command = ("--puzzles", file, "--json", tmp_path / "result.json")
    for line, reveal, exact, turns in ((" ".join(text), 1, 0, 19), (text[0], 0, None, 2)):
        file.write_text(line)
        run_main(monkeypatch, *command, "--reveal", reveal)
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["exact"], result["solved"], result["mean_turns"]) == (exact, 1, turns)
        assert "solved 100.0% of 1 puzzles" in capsys.readouterr().out


# --- the command line


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_sudoku.py", *map(str, arguments)])
    sudoku.main()


def start_process(*arguments, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "train_sudoku.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The bare command, tiny; its checkpoint serves the other tests."""
    out = tmp_path_factory.mktemp("sudoku")
    run = start_process("--smoke", "--out", out, "--json", out / "result.json")
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    for line in stdout.splitlines():
        if line.startswith("wrote "):
            assert Path(line.split(" ", 1)[1]).stat().st_size > 0
    names = {"full_seed0.pt", "full_seed0.json", "full_table.json", "full_curve.png"}
    assert names <= {path.name for path in out.iterdir()} and "paper, full" in stdout
    assert "full_seed0 4/4" in stdout and " left" in stdout and "drawing 2 puzzles" in stdout
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.resume.pt"))
    return out


def test_evaluate_writes_the_documented_json(smoke, monkeypatch):
    boards = smoke / "boards.csv"
    boards.write_text(f"quizzes,solutions\n{PUZZLE},{SOLVED}\n\n{PUZZLE},{SOLVED}\n")
    path = smoke / "evaluate.json"
    common = ("--smoke", "--checkpoint", smoke / "full_seed0.pt", "--evaluate", "--json", path)
    keys = "exact valid replay_mistake conflict_cells n params max_turns mean_turns seconds seed"
    prints = set()
    for extra in ((), ("--boards", boards), ("--reveal", 1), ("--seed", 1)):
        run_main(monkeypatch, *common, *extra)
        result = json.loads(path.read_text())
        assert {*keys.split(), "ci95_exact"} <= result.keys()
        assert result["n"] == (2 if "--boards" in extra else 8)
        prints.add(result["boards"])
    assert len(prints) == 3  # other boards, another fingerprint; --reveal has the same


def test_revise_and_solve_show_their_turns(smoke, monkeypatch, capsys):
    path = smoke / "board.json"
    common = ("--checkpoint", smoke / "full_seed0.pt", "--json", path)
    run_main(monkeypatch, "--revise", SOLVED, "--max-turns", 3, *common)
    assert "turn 1" in capsys.readouterr().out
    assert json.loads(path.read_text()).keys() == {"board", "turns", "status", "valid"}
    run_main(monkeypatch, "--solve", PUZZLE.replace("0", "_"), *common)
    solved = json.loads(path.read_text())["board"]
    assert all(clue in ("0", digit) for clue, digit in zip(PUZZLE, solved)) and "0" not in solved
    turns = capsys.readouterr().out.replace("-+-", "---").split("\nturn ")[1:]
    assert len(turns) > 32 and all(turn.count("+") <= 1 for turn in turns[:-1])  # one a turn


def test_terminal_marks_changes_and_broken_rules():
    before = tensor(SOLVED)
    now = before.index_put((torch.tensor([0, 40]),), torch.tensor([sudoku.MASK, 1]))
    text = sudoku.show_turn(now, before).splitlines()
    assert text[0].startswith("-_  3 ") and "+1!" in text[5] and len(text) == 11


@pytest.mark.parametrize("name", [*study_sudoku.STUDIES, "board"])
def test_studies_write_their_files(name, smoke, monkeypatch):
    options = ("--checkpoint", smoke / "full_seed0.pt", "--n", 3, "--max-turns", 4, "--out", smoke)
    monkeypatch.setattr(sys, "argv", ["study_sudoku.py", name, *map(str, options)])
    found = torch.stack([tensor(PUZZLE), tensor(SOLVED)])
    monkeypatch.setattr(study_sudoku, "find_retry", lambda *_: found)
    study_sudoku.main()
    if name == "board":
        assert (smoke / "sudoku_board.gif").stat().st_size > 0
        return
    study = json.loads((smoke / f"sudoku_{name}.json").read_text())
    assert (smoke / f"sudoku_{name}.png").exists() and study["max_turns"] == 4
    assert study_sudoku.AXES[name] in study["rows"]["full_seed0"][0]


def test_memory_is_compared_on_the_same_boards(monkeypatch):
    """Ours repair all, of theirs one seed repairs nothing and the other the first board alone."""

    def revise_boards(trained, start, **how):
        done = sudoku.random_boards(len(start), 0)
        repaired = {"ours": len(start), "none": 0, "first": 1}[trained]
        tokens = torch.where(torch.arange(len(start)).unsqueeze(1) < repaired, done, start)
        return rm.Revision(tokens, [], [], None)

    monkeypatch.setattr(sudoku, "revise_boards", revise_boards)
    rows = study_sudoku.study_memory(["ours", "ours"], ["none", "first"], 4, {})
    assert len(rows) == 6
    for task in rows.values():
        n, row = task["n"], task["valid"]
        assert row["difference_by_seed"] == pytest.approx([1, 1 - 1 / n])
        assert row["difference"] == pytest.approx(1 - 0.5 / n)
        assert row["theirs"] == pytest.approx([0, 1 / n])
        assert task["exact"]["ours"] == [0, 0]  # valid, but other boards than the truth
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]


def test_the_board_shown_takes_back_a_digit_of_its_own(monkeypatch):
    clean = sudoku.random_boards(2, sudoku.TEST_SEED)
    other = sudoku.random_boards(2, 0)
    masks = torch.zeros_like(clean)
    first = torch.stack([masks[0], clean[0], clean[0], clean[0]])
    second = torch.stack([masks[0], other[1], masks[0], clean[1]])
    result = rm.Revision(clean, [2, 3], [], torch.stack([first, second], dim=1))
    monkeypatch.setattr(sudoku, "revise_boards", lambda *_, **__: result)
    assert torch.equal(study_sudoku.find_retry((), 2, {}), second)


def test_clues_are_scored_with_so_many_and_no_more(monkeypatch):
    calls = []
    score = lambda *call, **how: calls.append((call, how)) or {}
    monkeypatch.setattr(study_sudoku, "evaluate", score)
    rows = study_sudoku.study_clues((0, 0, 0), 3, {"reveal": 1, "max_turns": 100})
    assert [row["clues"] for row in rows] in ([24, 28, 32, 36], [28, 32, 36])
    for row, ((*_, clean, puzzle), how) in zip(rows, calls, strict=True):
        assert ((puzzle != sudoku.MASK).sum(-1) == row["clues"]).all() and len(puzzle)
        assert torch.equal(torch.where(puzzle == sudoku.MASK, puzzle, clean), puzzle)
        assert how == {"solve": True, "reveal": 1, "max_turns": 100}


def test_every_model_of_the_tables_trains_and_finished_ones_are_kept(smoke, monkeypatch, capsys):
    common = ("--smoke", "--steps", "1", "--n", "3", "--variant", "all", "--out", smoke / "all")
    run_main(monkeypatch, *common)
    first = capsys.readouterr().out
    assert "plain, low-confidence re-masking" in first and ": done" not in first
    assert "exact of 'full, one reveal a turn'" in first
    table = json.loads((smoke / "all/all_table.json").read_text())
    assert table["table"].keys() == table["ours_against"].keys() and len(table["table"]) == 13
    run_main(monkeypatch, *common)
    assert capsys.readouterr().out.count(": done") == len(sudoku.VARIANTS)
    for other in (("--gamma", "0.5"), ("--no-rotate",)):
        named = other[0].strip("-no").replace("-", "_")
        with pytest.raises(rm.InputError, match=named):
            run_main(monkeypatch, *common, *other)
    monkeypatch.setattr(sudoku, "corrupt", lambda clean, *_: clean)  # other boards, same command
    with pytest.raises(rm.InputError, match="data"):
        run_main(monkeypatch, *common)
    baseline = ("--checkpoint", smoke / "all/plain_seed0.pt")
    for mode in (("--revise", SOLVED), ("--evaluate", "--reveal", 1)):
        with pytest.raises(rm.InputError, match="Eq. 1"):
            run_main(monkeypatch, *mode, *baseline)


def test_gamma_and_rotation_reach_training(smoke, monkeypatch):
    def train(*_, gamma, rotate, **__):
        raise rm.InputError(f"trains with {gamma} {rotate}")

    monkeypatch.setattr(rm, "train", train)
    command = ("--smoke", "--variant", "full", "--out", smoke / "gamma")
    cases = {(): "0.5 True", ("--gamma", 0): "0.0 True", ("--no-rotate",): "0.5 False"}
    for extra, reached in cases.items():
        with pytest.raises(rm.InputError, match=reached):
            run_main(monkeypatch, *command, *extra)


def test_a_run_stopped_by_ctrl_c_goes_on_bit_for_bit(smoke, monkeypatch, capsys):
    command = ("--smoke", "--steps", "4", "--n", "2", "--out")
    show = rm.Run.show

    def kill(*report):  # in the middle of the first step's report
        show(*report)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(rm.Run, "show", kill)
    with pytest.raises(rm.InputError, match="stopped after step 1: the same command goes on"):
        run_main(monkeypatch, *command, smoke / "stopped")
    assert [path.name for path in (smoke / "stopped").iterdir()] == ["full_seed0.resume.pt"]
    monkeypatch.setattr(rm.Run, "show", show)
    folders = (smoke / "stopped", smoke / "unbroken")
    for folder in folders:
        run_main(monkeypatch, *command, folder)
    assert capsys.readouterr().out.count(" 1/4 ") == 2  # the stopped one and the unbroken one
    one, two = (rm.read_torch(folder / "full_seed0.pt") for folder in folders)
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    for point in one["info"]["curve"] + two["info"]["curve"]:
        del point["minutes"]
    assert one["info"]["curve"] == two["info"]["curve"]


def test_two_processes_under_torchrun(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = start_process("--smoke", "--device", "cpu", "--out", tmp_path, launcher=launcher)
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert stdout.count("full_seed0 4/4") == 1 and (tmp_path / "full_seed0.pt").exists()


# --- bad input

BAD = {  # id: arguments, what the line says
    "short board": ("--revise 123", "81 digits, got 3"),
    "letters": (f"--solve {'a' * 81}", "'a', character 1"),
    "clues clash": ("--solve 55" + "0" * 79, "clash at row 1, column 1"),
    "another task": ("--evaluate --smoke --checkpoint {tmp}/text.pt", "task 'text'"),
    "another size": ("--evaluate --smoke --checkpoint {tmp}/small.pt", "small.pt"),
    "missing boards": ("--evaluate --boards nowhere.txt", "nowhere.txt"),
    "comments alone": ("--evaluate --boards {tmp}/comment.txt", "no board"),
    "an unsolved board": ("--evaluate --boards {tmp}/bad.txt", "bad.txt line 2"),
    "another solution": ("--puzzles {tmp}/mismatch.txt", "does not solve"),
    "a letter in a file": ("--puzzles {tmp}/letter.txt", "line 2: 'O', character 3"),
    "eight lines of nine": ("--puzzles {tmp}/eight.txt", "8 of nine"),
    "no steps": ("--smoke --steps 0", "--steps"),
    "ignored: training": ("--evaluate --variant rm", "--variant has no effect"),
    "ignored: out": ("--evaluate --out x", "--out has no effect"),
    "ignored: steps": ("--evaluate --steps 3", "--steps has no effect"),
    "ignored: minutes": ("--steps 3 --minutes 3", "--minutes has no effect"),
    "two modes": ("--evaluate --revise 123", "not allowed"),
    "wrong order": ("--corrupt 9 3", "--corrupt"),
    "a file as out": ("--smoke --out {tmp}/bad.txt", "bad.txt"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    files = {
        "comment": "# nothing\n",
        "bad": f"{SOLVED}\n{PUZZLE}\n",
        "mismatch": "1" + "0" * 80 + " " + SOLVED,
        "letter": f"{PUZZLE}\n53O{PUZZLE[3:]}\n",
        "eight": LINES_OF_NINE.rsplit("\n", 1)[0],
    }
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
    config = rm.TransformerConfig(vocabulary=4, length=4, width=16, feed_forward=16, layers=1)
    model = rm.MaskDiffusionTransformer(config)
    rm.save_checkpoint(tmp_path / "text.pt", model, task="text")
    rm.save_checkpoint(tmp_path / "small.pt", model, "sudoku", gamma=0.9, rotate=True, variant="rm")
    arguments = arguments.replace("{tmp}", str(tmp_path)).split()
    monkeypatch.setattr(sys, "argv", ["train_sudoku.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        rm.run_script(sudoku.main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not list(tmp_path.glob("*.tmp"))


# --- the shipped checkpoint


def test_the_shipped_model_repairs_boards_and_leaves_right_ones_alone():
    path = sudoku.SHIPPED
    assert path.stat().st_size <= 4 * 2**20
    model, info = rm.load_checkpoint(path, "sudoku")
    clean = sudoku.random_boards(60, sudoku.TEST_SEED)
    start = sudoku.corrupt(clean, sudoku.TEST_SEED)
    score = sudoku.evaluate((model, info["gamma"], info["rotate"]), clean, start)
    assert score["valid"] >= 0.95 and score["exact"] >= 0.85
    history = HistoryReference(model.embedding.detach(), info["gamma"], info["rotate"])
    right = rm.revise(model, clean, sudoku.MASK, history)
    assert (right.tokens == clean).all(-1).float().mean() >= 0.95


def test_the_shipped_model_repairs_hard_boards_one_reveal_a_turn():
    model, info = rm.load_checkpoint(sudoku.SHIPPED, "sudoku")
    trained = (model, info["gamma"], info["rotate"])
    clean = sudoku.random_boards(20, sudoku.VALIDATION_SEED)
    start = sudoku.corrupt(clean, 0, 32, 32)
    score = sudoku.evaluate(trained, clean, start, **sudoku.DECODINGS["full"]["one reveal a turn"])
    assert score["valid"] >= 0.9
