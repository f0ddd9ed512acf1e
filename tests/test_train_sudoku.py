"""Sudoku: boards, metrics, baselines against plain Python; files as people have them; the command
lines end to end."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reflective_masking as rm
import train_sudoku as sudoku
from history import HistoryReference

ROOT = Path(__file__).parent.parent
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"


def tensor(text):
    return torch.tensor([int(character) for character in text])


def units_by_hand():
    rows = [[9 * r + c for c in range(9)] for r in range(9)]
    columns = [[9 * r + c for r in range(9)] for c in range(9)]
    corners = [27 * i + 3 * j for i in range(3) for j in range(3)]
    boxes = [[corner + 9 * r + c for r in range(3) for c in range(3)] for corner in corners]
    return rows + columns + boxes


def valid_by_hand(board):
    return all({board[cell] for cell in unit} == set(range(1, 10)) for unit in units_by_hand())


# --- boards


def test_random_boards_are_valid_different_and_reproducible():
    boards = sudoku.random_boards(60, seed=3)
    assert all(valid_by_hand(board) for board in boards.tolist())
    assert len({tuple(board) for board in boards.tolist()}) == 60
    assert torch.equal(boards[:9], sudoku.random_boards(9, seed=3))
    # every cell takes every digit, somewhere
    assert all(len(set(boards[:, cell].tolist())) >= 7 for cell in range(81))


def test_symmetries_keep_boards_valid_and_masks_masked():
    generator = torch.Generator().manual_seed(0)
    boards = tensor(SOLVED).repeat(200, 1)
    images = sudoku.shuffle_symmetries(boards, generator)
    assert all(valid_by_hand(board) for board in images.tolist())
    assert len({tuple(board) for board in images.tolist()}) == 200
    masked = sudoku.shuffle_symmetries(torch.where(boards == 5, sudoku.MASK, boards), generator)
    assert ((masked == sudoku.MASK).sum(-1) == 9).all()


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


def test_symmetries_reach_rows_columns_digits_and_transposes_evenly():
    board = torch.zeros(1, 81, dtype=torch.long)
    board[0, 0] = 1  # one mark: where it goes shows the law of rows, columns and digits
    generator = torch.Generator().manual_seed(1)
    images = sudoku.shuffle_symmetries(board.repeat(8100, 1), generator)
    cells = torch.bincount(images.argmax(-1), minlength=81)
    digits = torch.bincount(images.max(-1).values, minlength=10)[1:]
    assert chi_square(cells, 100) < 80 + 5 * 160**0.5
    assert chi_square(digits, 900) < 8 + 5 * 16**0.5


def test_corruption_replaces_4_to_20_cells_by_wrong_digits():
    clean = sudoku.random_boards(1, seed=0).repeat(3000, 1)
    start = sudoku.corrupt(clean, 4, 20, seed=1)
    wrong = (start != clean).sum(-1)
    assert wrong.min() == 4 and wrong.max() == 20 and (start >= 1).all() and (start <= 9).all()
    counts = torch.bincount(wrong, minlength=21)[4:]
    assert chi_square(counts, 3000 / 17) < 45  # 16 degrees of freedom, p < 0.0002
    assert torch.equal(start, sudoku.corrupt(clean, 4, 20, seed=1))


def test_training_batch_has_the_task_among_its_states():
    generator = torch.Generator().manual_seed(0)
    pool = sudoku.random_boards(5, seed=0)
    states, clean, editable = sudoku.sample_batch(200, generator, pool)
    assert editable is None and all(valid_by_hand(board) for board in clean.tolist())
    assert states.shape[1:] == clean.shape == (200, 81) and len(states) <= 6 and states.max() == 9
    wrong = ((states[-1] != clean) & (states[-1] != sudoku.MASK)).sum(-1)
    assert ((states[-1] != sudoku.MASK).all(-1) & (wrong > 3) & (wrong < 21)).sum() > 10
    states, clean, editable = sudoku.sample_batch(200, generator, pool, plain=True)
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
        for unit in units_by_hand():
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


def test_paired_test_of_hand_counted_boards():
    test = sudoku.paired_test("1" * 6 + "0" * 4, "0" * 5 + "1" + "0" * 4)  # 5 boards against none
    half = 1.959964 * (0.25 / 10) ** 0.5
    assert test["difference"] == 0.5 and test["p"] == pytest.approx(2 / 32)
    assert test["ci95"] == pytest.approx((0.5 - half, 0.5 + half))
    assert sudoku.paired_test("10", "01")["p"] == 1
    assert sudoku.paired_test("11", "11")["difference"] == 0


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
    start = sudoku.corrupt(clean, 4, 20, seed=0)
    score = sudoku.evaluate(Oracle(clean), 0.0, False, clean, start)
    metrics = [score[key] for key in ("exact", "valid", "replay_mistake", "conflict_cells")]
    assert metrics == [1, 1, 0, 0] and score["mean_turns"] == 3 and score["right"] == "111111"
    assert score["remasked_wrong_cells"] == (start != clean).sum()
    assert score["status"][rm.FIXED_POINT] == 1 and score["ci95_exact"][0] > 0.5
    idle = lambda turns: lambda logits, tokens, mask_id, **_: tokens
    score = sudoku.evaluate(Oracle(clean), 0.0, False, clean, start, make_rule=idle)
    assert score["exact"] == 0 and score["mean_turns"] == 1
    assert score["conflict_cells"] == pytest.approx(sudoku.conflicts(start).sum().item() / 6)


def test_calibration_of_hand_made_probabilities(tmp_path):
    """A model that says p(x) = 0.7 everywhere and never re-masks: 0.7 less the share right."""
    clean = sudoku.random_boards(4, seed=0)
    start = sudoku.corrupt(clean, 10, 10, seed=0)
    model = Oracle(clean)
    certain = torch.tensor([0.3, 0.7]).log()
    says = lambda x: torch.full_like(x, -50.0).masked_fill(x > 1, certain[1])
    model.forward = lambda x: says(x).index_fill(-1, torch.tensor(0), float(certain[0]))
    how = (clean, start, 5, tmp_path / "calibration.png")
    study = sudoku.study_calibration((model, 0.0, False), *how)
    assert study["visible_positions"] == 4 * 81 and study["rows"][14]["n"] in (0, 4 * 81)
    assert study["expected_calibration_error"] == pytest.approx(abs(0.7 - 71 / 81), abs=1e-4)
    assert study["remask_all_turns"]["recall"] == 0 and study["remask_all_turns"]["wrong"] == 40
    model.forward = Oracle(clean).forward
    study = sudoku.study_calibration((model, 0.0, False), *how)
    first = study["remask_first_turn"]
    assert (first["precision"], first["recall"], first["remasked"]) == (1, 1, 40)


# --- baselines


def test_one_shot_shows_what_the_network_says():
    clean = sudoku.random_boards(3, seed=0)
    start = sudoku.corrupt(clean, 4, 20, seed=0)
    truth = Oracle(clean)
    truth.forward = lambda x: torch.nn.functional.one_hot(clean[: len(x)], 10).float()
    one_shot = sudoku.BASELINES["plain"]["plain mask diffusion, one-shot"]
    for turns, make_rule in (one_shot, (2, sudoku.MAKE_RULE["direct"])):
        assert sudoku.evaluate(truth, 0.0, False, clean, start, turns, make_rule)["exact"] == 1


def test_remasking_baselines_follow_their_schedule_and_respect_locks():
    torch.manual_seed(0)
    tokens = torch.randint(1, 10, (4, 81))
    logits = torch.randn(4, 81, 10)
    editable = torch.ones(4, 81, dtype=torch.bool)
    editable[:, 5:10] = False
    for by in ("confidence", "random"):
        rule = sudoku.remasking(10, by)
        state = tokens
        masked = []
        for _ in range(10):
            state = rule(logits, state, sudoku.MASK, editable=editable)
            masked.append((state == sudoku.MASK).sum(-1).tolist())
            assert torch.equal(state[:, 5:10], tokens[:, 5:10])
        assert masked == [[n] * 4 for n in (18, 0, 14, 0, 10, 0, 6, 0, 2, 0)]
    first = sudoku.remasking(10, "confidence")(logits, tokens, sudoku.MASK)
    p = logits[..., 1:].softmax(-1).gather(-1, tokens.unsqueeze(-1) - 1).squeeze(-1)
    for row in range(4):
        expected = set(sorted(range(81), key=lambda cell: p[row, cell].item())[:18])
        assert set((first[row] == sudoku.MASK).nonzero().flatten().tolist()) == expected


def test_direct_replacement_takes_the_best_digit_everywhere():
    logits = torch.zeros(1, 3, 4)
    logits[0, :, 0] = 9  # MASK
    logits[0, [0, 1, 2], [3, 2, 1]] = 1
    tokens = torch.tensor([[2, 0, 3]])
    assert sudoku.direct_replacement(logits, tokens, 0).tolist() == [[3, 2, 1]]
    locked = torch.tensor([[True, True, False]])
    assert sudoku.direct_replacement(logits, tokens, 0, editable=locked).tolist() == [[3, 2, 3]]


# --- learning


def test_overfits_a_handful_of_boards():
    clean = sudoku.random_boards(4, seed=7)
    start = sudoku.corrupt(clean, 4, 20, seed=5)

    def sample(batch_size, generator):
        pick = torch.randint(4, (batch_size,), generator=generator)
        return start[pick].unsqueeze(0), clean[pick], None

    torch.manual_seed(0)
    model = sudoku.new_model(width=64)
    model.blocks = model.blocks[:2]
    how = {"batch_size": 8, "learning_rate": 5e-3, "warmup": 20, "own_states": 0.5}
    for _ in rm.train(model, sample, 400, 0, **how):
        pass  # own states: what follows the start is learned from the model's own decisions
    assert sudoku.evaluate(model, 0.9, True, clean, start)["exact"] == 1


def test_the_network_stays_within_the_parameter_limit():
    assert sum(p.numel() for p in sudoku.new_model().parameters()) <= 810_000


# --- files as people have them

LINES_OF_NINE = "\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9))
BARS = "\n".join(
    " ".join(PUZZLE[i : i + 3]) + " | " + " ".join(PUZZLE[i + 3 : i + 6]) + " | "
    + " ".join(PUZZLE[i + 6 : i + 9]) + ("\n------+-------+------" if i in (18, 45) else "")
    for i in range(0, 81, 9)
)  # fmt: skip
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


def two_solutions():
    """Two complete boards that differ in the corners of a rectangle, and the puzzle of both."""
    for board in sudoku.random_boards(60, seed=3):
        grid = board.view(9, 9)
        for a, b in ((a, b) for a in range(3) for b in range(3, 9)):  # columns of different boxes
            if grid[0, a] == grid[1, b] and grid[0, b] == grid[1, a]:
                other = grid.clone()
                other[:2, [a, b]] = grid[:2, [b, a]]
                return board, other.flatten(), torch.where(board == other.flatten(), board, 0)
    raise AssertionError


def test_any_valid_solution_of_a_puzzle_counts_as_solved(tmp_path, monkeypatch, capsys):
    first, second, puzzle = two_solutions()
    assert valid_by_hand(first.tolist()) and valid_by_hand(second.tolist())
    text = ["".join(map(str, board.tolist())) for board in (puzzle, first)]
    (tmp_path / "puzzles.txt").write_text(" ".join(text))
    info = {"gamma": 0.0, "rotate": False, "variant": "rm"}
    model = Oracle(second.unsqueeze(0))
    monkeypatch.setattr(rm, "load_checkpoint", lambda *_: (model, info))
    json_file = tmp_path / "result.json"
    run_main(monkeypatch, "--puzzles", tmp_path / "puzzles.txt", "--json", json_file)
    result = json.loads(json_file.read_text())
    assert result["exact"] == 0 and result["solved"] == 1 and result["mean_turns"] == 5
    assert "solved 100.0% of 1 puzzles" in capsys.readouterr().out  # four blanks, one a turn
    run_main(monkeypatch, "--puzzles", tmp_path / "puzzles.txt", "--json", json_file, "--reveal", 0)
    assert json.loads(json_file.read_text())["mean_turns"] == 2
    (tmp_path / "puzzles.txt").write_text(text[0])
    run_main(monkeypatch, "--puzzles", tmp_path / "puzzles.txt", "--json", json_file)
    result = json.loads(json_file.read_text())
    assert result["exact"] is None and result["solved"] == 1


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
    pictures = {"full_curve.png", "full_revision.gif"}
    names = {"full_seed0.pt", "full_seed0.json", "full_table.json"} | pictures
    assert names <= {path.name for path in out.iterdir()} and "paper, full" in stdout
    assert "step 4/4" in stdout and " left" in stdout
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
        assert {*keys.split(), "ci95_exact"} <= set(result)
        assert result["n"] == (2 if "--boards" in extra else 8)
        prints.add(result["boards"])
    assert len(prints) == 3  # other boards, another fingerprint; --reveal has the same


def test_revise_and_solve_show_their_turns(smoke, monkeypatch, capsys):
    path = smoke / "board.json"
    common = ("--checkpoint", smoke / "full_seed0.pt", "--json", path, "--max-turns", "3")
    run_main(monkeypatch, "--revise", SOLVED, "--gif", smoke / "board.gif", *common)
    assert "turn 1" in capsys.readouterr().out and (smoke / "board.gif").stat().st_size > 0
    result = json.loads(path.read_text())
    assert len(result["board"]) == 81 and set(result) == {"board", "turns", "status", "valid"}
    run_main(monkeypatch, "--solve", PUZZLE.replace("0", "_"), *common)
    solved = json.loads(path.read_text())["board"]
    assert all(clue in ("0", digit) for clue, digit in zip(PUZZLE, solved)) and "0" not in solved


def test_solve_reveals_one_cell_a_turn(smoke, monkeypatch, capsys):
    run_main(monkeypatch, "--solve", PUZZLE, "--checkpoint", smoke / "full_seed0.pt")
    turns = capsys.readouterr().out.replace("-+-", "---").split("\nturn ")[1:]
    assert len(turns) > 32 and all(turn.count("+") <= 1 for turn in turns[:-1])


def test_terminal_marks_changes_and_broken_rules():
    before = tensor(SOLVED)
    now = before.clone()
    now[0] = sudoku.MASK
    now[40] = 1
    text = sudoku.show_turn(now, before).splitlines()
    assert text[0].startswith("-_  3 ") and "+1!" in text[5] and len(text) == 11


def test_studies_write_a_json_and_a_figure_each(smoke, monkeypatch):
    checkpoint = ("--checkpoint", smoke / "full_seed0.pt")
    run_main(monkeypatch, "--study", "all", "--smoke", "--n", 2, *checkpoint, "--out", smoke)
    for name in sudoku.STUDIES:
        assert (smoke / f"sudoku_{name}.json").exists() and (smoke / f"sudoku_{name}.png").exists()


def test_every_model_of_the_tables_trains_and_finished_ones_are_kept(smoke, monkeypatch, capsys):
    common = ("--smoke", "--steps", "1", "--n", "3", "--variant", "all", "--out", smoke / "all")
    run_main(monkeypatch, *common)
    first = capsys.readouterr().out
    assert "random re-masking" in first and ": done" not in first
    assert "exact of 'ours, full, seed 0'" in first and "p = " in first
    run_main(monkeypatch, *common)
    assert capsys.readouterr().out.count(": done") == len(sudoku.VARIANTS) + 4
    for other in (("--second-guess", "0.1"), ("--gamma", "0.5"), ("--no-rotate",)):
        with pytest.raises(rm.InputError, match=other[0].strip("-no").replace("-", "_")):
            run_main(monkeypatch, *common, *other)
    monkeypatch.setattr(sudoku, "corrupt", lambda clean, *_: clean)  # other boards, same command
    with pytest.raises(rm.InputError, match="boards"):
        run_main(monkeypatch, *common)
    plain = rm.load_checkpoint(smoke / "all/plain_seed0.pt", "sudoku")[1]
    assert plain["settings"]["own_states"] == 0.5 and plain["gamma"] == 0
    with pytest.raises(rm.InputError, match="Eq. 1"):  # a baseline's network
        run_main(monkeypatch, "--revise", SOLVED, "--checkpoint", smoke / "all/plain_seed0.pt")


def test_gamma_and_rotation_reach_training(smoke, monkeypatch):
    calls = []

    def train(*_, gamma, rotate, **__):
        calls.append((gamma, rotate))
        raise rm.InputError("enough")

    monkeypatch.setattr(rm, "train", train)
    for extra in ((), ("--gamma", "0.4"), ("--gamma", "0"), ("--no-rotate",)):
        with pytest.raises(rm.InputError, match="enough"):
            run_main(monkeypatch, "--smoke", "--out", smoke / "gamma", *extra)
    assert calls == [(0.9, True), (0.4, True), (0.0, True), (0.9, False)]


def test_a_run_stopped_by_signals_goes_on_bit_for_bit(smoke, monkeypatch, capsys):
    """Ctrl-C, the same command again, SIGTERM, and again: the weights of an unbroken run."""
    command = ("--smoke", "--steps", "6", "--n", "2", "--out")
    show_progress = rm.show_progress
    for name in (signal.SIGINT, signal.SIGTERM):
        kill = lambda *_, name=name: os.kill(os.getpid(), name)  # in the middle of a step's report
        monkeypatch.setattr(rm, "show_progress", kill)
        with pytest.raises(SystemExit) as stop:
            rm.run_script(lambda: run_main(monkeypatch, *command, smoke / "stopped"))
        stderr = capsys.readouterr().err
        assert stop.value.code == 2 and stderr.count("\n") == 1, stderr
        assert "the same command goes on from here" in stderr
        assert (smoke / "stopped/full_seed0.resume.pt").exists()
        assert not (smoke / "stopped/full_seed0.json").exists()
    monkeypatch.setattr(rm, "show_progress", show_progress)
    run_main(monkeypatch, *command, smoke / "stopped")
    out = capsys.readouterr().out
    assert "step 2/6" not in out and "step 3/6" in out  # a step each before the two signals
    run_main(monkeypatch, *command, smoke / "unbroken")
    folders = (smoke / "stopped", smoke / "unbroken")
    one, two = (rm.read_torch(folder / "full_seed0.pt")["model"] for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (json.loads((folder / "full_seed0.json").read_text()) for folder in folders)
    for point in one["curve"] + two["curve"]:
        del point["minutes"]
    assert one["curve"] == two["curve"] and len(one["curve"]) == 6


def test_two_processes_under_torchrun(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = start_process("--smoke", "--device", "cpu", "--out", tmp_path, launcher=launcher)
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert stdout.count("step 4/4") == 1 and (tmp_path / "full_seed0.pt").exists()


# --- bad input

BAD = {  # id: arguments, what the line says
    "short board": ("--revise 123", "81 digits, got 3"),
    "letters": (f"--solve {'a' * 81}", "'a', character 1"),
    "a wide digit": (f"--solve {'1' * 80}５", "'５', character 81"),
    "clues clash": ("--solve 55" + "0" * 79, "clash at row 1, column 1"),
    "no such device": ("--evaluate --device cuda:9", "cuda:9"),
    "no such kind of device": ("--evaluate --device banana", "banana"),
    "missing checkpoint": ("--evaluate --smoke --checkpoint nowhere.pt", "nowhere.pt"),
    "another task": ("--evaluate --smoke --checkpoint {tmp}/text.pt", "task 'text'"),
    "not a checkpoint": ("--evaluate --smoke --checkpoint {tmp}/bad.txt", "bad.txt"),
    "another size": ("--evaluate --smoke --checkpoint {tmp}/small.pt", "small.pt"),
    "missing boards": ("--evaluate --boards nowhere.txt", "nowhere.txt"),
    "empty boards": ("--evaluate --boards {tmp}/empty.txt", "empty"),
    "comments alone": ("--evaluate --boards {tmp}/comment.txt", "no board"),
    "an unsolved board": ("--evaluate --boards {tmp}/bad.txt", "bad.txt line 2"),
    "an invalid board": ("--evaluate --boards {tmp}/invalid.txt", "invalid.txt line 1"),
    "another solution": ("--puzzles {tmp}/mismatch.txt", "does not solve"),
    "a letter in a file": ("--puzzles {tmp}/letter.txt", "line 2: 'O', character 3"),
    "eight lines of nine": ("--puzzles {tmp}/eight.txt", "8 of nine"),
    "no steps": ("--smoke --steps 0", "--steps"),
    "no time": ("--minutes nan", "--minutes"),
    "ignored: training": ("--evaluate --variant rm", "--variant has no effect"),
    "ignored: out": ("--evaluate --out x", "--out has no effect"),
    "ignored: steps": ("--study turns --steps 3", "--steps has no effect"),
    "ignored: seed": ("--revise 123 --seed 3", "--seed has no effect"),
    "ignored: turns": ("--study turns --max-turns 3", "--max-turns has no effect"),
    "ignored: minutes": ("--steps 3 --minutes 3", "--minutes has no effect"),
    "ignored: own states": ("--variant plain --own-states 0", "--own-states has no effect"),
    "ignored: boards": ("--boards x", "--boards has no effect"),
    "ignored: gif": ("--evaluate --gif x.gif", "--gif has no effect"),
    "two modes": ("--evaluate --revise 123", "not allowed"),
    "huge seed": ("--seed 99999999999999999999", "--seed"),
    "wrong order": ("--corrupt 9 3", "--corrupt"),
    "not a gif": ("--revise 123 --gif x.png", ".gif"),
    "a folder as json": ("--evaluate --json {tmp}", "folder"),
    "a file as out": ("--smoke --out {tmp}/bad.txt", "bad.txt"),
    "gif nowhere": ("--revise 123 --gif {tmp}/bad.txt/x.gif", "cannot be written"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    files = {
        "empty": "\n",
        "comment": "# nothing\n",
        "bad": f"{SOLVED}\n{PUZZLE}\n",
        "invalid": "1" * 81,
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
    path = ROOT / "checkpoints/sudoku_full.pt"
    assert path.stat().st_size <= 4 * 2**20
    model, info = rm.load_checkpoint(path, "sudoku")
    clean = sudoku.random_boards(60, sudoku.TEST_SEED)
    start = sudoku.corrupt(clean, 4, 20, sudoku.TEST_SEED)
    score = sudoku.evaluate(model, info["gamma"], info["rotate"], clean, start)
    assert score["valid"] >= 0.95 and score["exact"] >= 0.85
    history = HistoryReference(model.embedding.detach(), info["gamma"], info["rotate"])
    right = rm.revise(model, clean, sudoku.MASK, history)
    assert (right.tokens == clean).all(-1).float().mean() >= 0.95
