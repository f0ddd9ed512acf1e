"""Sudoku: boards, metrics and baselines against plain Python; the script's command lines end to end."""

import json
import random
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
    boxes = [[9 * (3 * i + r) + 3 * j + c for r in range(3) for c in range(3)] for i in range(3) for j in range(3)]
    return rows + columns + boxes


def valid_by_hand(board):
    return all(sorted(board[cell] for cell in unit) == list(range(1, 10)) for unit in units_by_hand())


# --- boards


def test_random_boards_are_valid_different_and_reproducible():
    boards = sudoku.random_boards(60, seed=3)
    assert all(valid_by_hand(board) for board in boards.tolist())
    assert len({tuple(board) for board in boards.tolist()}) == 60
    assert torch.equal(boards, sudoku.random_boards(60, seed=3))
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


def test_symmetries_reach_rows_columns_digits_and_transposes_evenly():
    board = torch.zeros(1, 81, dtype=torch.long)
    board[0, 0] = 1  # one mark: where it goes shows the law of rows, columns and digits
    images = sudoku.shuffle_symmetries(board.repeat(8100, 1), torch.Generator().manual_seed(1))
    cells, digits = images.argmax(-1), images.max(-1).values
    for counts, expected in ((torch.bincount(cells, minlength=81), 100), (torch.bincount(digits, minlength=10)[1:], 900)):
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < len(counts) - 1 + 5 * (2 * (len(counts) - 1)) ** 0.5


def test_corruption_replaces_4_to_20_cells_by_wrong_digits():
    clean = sudoku.random_boards(1, seed=0).repeat(3000, 1)
    start = sudoku.corrupt(clean, 4, 20, seed=1)
    wrong = (start != clean).sum(-1)
    assert wrong.min() == 4 and wrong.max() == 20 and (start >= 1).all() and (start <= 9).all()
    counts = torch.bincount(wrong, minlength=21)[4:]
    assert ((counts - 3000 / 17) ** 2 / (3000 / 17)).sum() < 45  # 16 degrees of freedom, p < 0.0002
    assert torch.equal(start, sudoku.corrupt(clean, 4, 20, seed=1))


def test_training_batch_has_the_task_among_its_states():
    generator = torch.Generator().manual_seed(0)
    pool = sudoku.random_boards(5, seed=0)
    states, clean, editable = sudoku.sample_batch(200, generator, pool)
    assert editable is None and clean.shape == (200, 81) and all(valid_by_hand(board) for board in clean.tolist())
    assert states.shape[1:] == (200, 81) and states.shape[0] <= 6 and states.max() == 9
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


def test_metrics_of_a_hand_written_board():
    board = tensor(SOLVED).unsqueeze(0).clone()
    assert sudoku.is_valid(board).item() and sudoku.is_exact(board, board).item()
    board[0, 0] = 3  # clashes with the 3 beside it and the 3 below in its column
    assert not sudoku.is_valid(board).item() and sudoku.conflicts(board).sum() == 3
    board[0, 0] = sudoku.MASK
    assert not sudoku.is_valid(board).item() and sudoku.conflicts(board).sum() == 0


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
    assert trajectory(1, 0, 1) == (0, 0)  # a right cell re-masked without need is no erroneous cell
    assert trajectory(5, 5, 5) == (0, 0)  # never re-masked
    assert trajectory(0, 5, 0, 5) == (1, 1)  # a wrong reveal counts like a wrong start


def test_wilson_interval_of_published_values():
    assert rm.wilson_interval(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert rm.wilson_interval(0, 0) == (0, 1)
    low, high = rm.wilson_interval(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)


def test_paired_test_of_hand_counted_boards():
    test = sudoku.paired_test("1" * 6 + "0" * 4, "0" * 5 + "1" + "0" * 4)  # 5 boards for us, none for them
    assert test["difference"] == 0.5 and test["p"] == pytest.approx(2 / 32)
    assert test["ci95"] == pytest.approx((0.5 - 1.959964 * (0.25 / 10) ** 0.5, 0.5 + 1.959964 * (0.25 / 10) ** 0.5))
    assert sudoku.paired_test("10", "01")["p"] == 1 and sudoku.paired_test("11", "11")["difference"] == 0


class Oracle(torch.nn.Module):
    """Knows the truth: re-masks what is wrong, reveals the truth; reads the tokens back from the embedding."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.embedding = clean, torch.nn.Parameter(torch.eye(10))

    def forward(self, x):
        tokens, clean = x.argmax(-1), self.clean[: len(x)]
        action = torch.where((tokens == clean) | (tokens == sudoku.MASK), clean, sudoku.MASK)
        return torch.nn.functional.one_hot(action, 10).float()


def test_evaluation_of_an_oracle_and_of_doing_nothing():
    clean = sudoku.random_boards(6, seed=0)
    start = sudoku.corrupt(clean, 4, 20, seed=0)
    score = sudoku.evaluate(Oracle(clean), 0.0, False, clean, start)
    assert (score["exact"], score["valid"], score["replay_mistake"], score["conflict_cells"]) == (1, 1, 0, 0)
    assert score["mean_turns"] == 3 and score["remasked_wrong_cells"] == (start != clean).sum()
    assert score["status"][rm.FIXED_POINT] == 1 and score["right"] == "111111" and score["ci95_exact"][0] > 0.5
    idle = lambda turns: lambda logits, tokens, mask_id, **_: tokens
    score = sudoku.evaluate(Oracle(clean), 0.0, False, clean, start, make_rule=idle)
    assert score["exact"] == 0 and score["mean_turns"] == 1
    assert score["conflict_cells"] == pytest.approx(sudoku.conflicts(start).sum().item() / 6)


# --- baselines


def test_one_shot_shows_what_the_network_says():
    clean = sudoku.random_boards(3, seed=0)
    start = sudoku.corrupt(clean, 4, 20, seed=0)
    truth = Oracle(clean)
    truth.forward = lambda x: torch.nn.functional.one_hot(clean[: len(x)], 10).float()
    for turns, make_rule in (sudoku.BASELINES["plain"]["plain mask diffusion, one-shot"], (2, sudoku.MAKE_RULE["direct"])):
        assert sudoku.evaluate(truth, 0.0, False, clean, start, turns, make_rule)["exact"] == 1


def test_remasking_baselines_follow_their_schedule_and_respect_locks():
    torch.manual_seed(0)
    tokens, logits = torch.randint(1, 10, (4, 81)), torch.randn(4, 81, 10)
    editable = torch.ones(4, 81, dtype=torch.bool)
    editable[:, 5:10] = False
    for by in ("confidence", "random"):
        rule = sudoku.remasking(10, by)
        state, masked = tokens, []
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
    logits, tokens = torch.zeros(1, 3, 4), torch.tensor([[2, 0, 3]])
    logits[0, :, 0], logits[0, 0, 3], logits[0, 1, 2], logits[0, 2, 1] = 9, 1, 1, 1
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
    config = sudoku.sudoku_config(width=64)
    config.layers = 2
    model = rm.MaskDiffusionTransformer(config)
    for _ in rm.train(model, sample, 400, 0, batch_size=8, learning_rate=5e-3, warmup=20, own_states=0.5):
        pass  # own states: what follows the start is learned from the model's own decisions
    assert sudoku.evaluate(model, 0.9, True, clean, start)["exact"] == 1


def test_the_network_stays_within_the_parameter_limit():
    assert sum(p.numel() for p in rm.MaskDiffusionTransformer(sudoku.sudoku_config()).parameters()) <= 810_000


# --- the command line


def run(*arguments, launcher=(), timeout=300):
    command = [sys.executable, *launcher, str(ROOT / "train_sudoku.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The bare command, tiny; its checkpoint serves the other tests."""
    out = tmp_path_factory.mktemp("sudoku")
    done = run("--smoke", "--out", out, "--json", out / "result.json")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("wrote "):
            assert Path(line.split(" ", 1)[1]).stat().st_size > 0
    names = {"full_seed0.pt", "full_seed0.json", "full_curve.png", "full_revision.gif", "full_table.json"}
    assert names <= {path.name for path in out.iterdir()} and "paper, full" in done.stdout
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.resume.pt"))
    return out


def in_process(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_sudoku.py", *map(str, arguments)])
    sudoku.main()
    return capsys.readouterr().out


def test_help_reads_well():
    done = run("--help")
    assert done.returncode == 0
    options = "--variant --minutes --evaluate --checkpoint --boards --corrupt --max-turns --revise --solve --puzzles"
    assert all(option in done.stdout for option in (options + " --seed --device --smoke --json --out").split())


def test_evaluate_writes_the_documented_json(smoke, monkeypatch, capsys):
    boards = smoke / "boards.txt"
    boards.write_text(SOLVED + "\n\n" + SOLVED + "\n")
    common = ("--smoke", "--checkpoint", smoke / "full_seed0.pt", "--evaluate", "--json", smoke / "evaluate.json")
    for extra in ((), ("--boards", boards), ("--reveal", 1)):
        in_process(monkeypatch, capsys, *common, *extra)
        result = json.loads((smoke / "evaluate.json").read_text())
        keys = "exact valid replay_mistake conflict_cells n params max_turns mean_turns seconds seed ci95_exact"
        assert set(keys.split()) <= set(result) and result["n"] == (2 if "--boards" in extra else 8)


def test_revise_and_solve_show_their_turns(smoke, monkeypatch, capsys):
    common = ("--checkpoint", smoke / "full_seed0.pt", "--json", smoke / "board.json", "--max-turns", "3")
    text = in_process(monkeypatch, capsys, "--revise", SOLVED, "--gif", smoke / "board.gif", *common)
    assert "turn 1" in text and "\033" not in text and (smoke / "board.gif").stat().st_size > 0
    result = json.loads((smoke / "board.json").read_text())
    assert len(result["board"]) == 81 and set(result) == {"board", "turns", "status", "valid"}
    in_process(monkeypatch, capsys, "--solve", PUZZLE.replace("0", "."), *common)
    solved = json.loads((smoke / "board.json").read_text())["board"]
    assert all(clue in ("0", digit) for clue, digit in zip(PUZZLE, solved)) and "0" not in solved


def test_terminal_marks_changes_and_broken_rules():
    before = tensor(SOLVED)
    now = before.clone()
    now[0], now[40] = sudoku.MASK, 1
    text = sudoku.show_turn(now, before, color=False).splitlines()
    assert text[0].startswith("-_  3 ") and "+1!" in text[5] and len(text) == 11
    assert "\033[33m-_ \033[0m" in sudoku.show_turn(now, before, color=True)


def test_puzzles_are_scored(smoke, monkeypatch, capsys):
    puzzles = smoke / "puzzles.txt"
    puzzles.write_text(f"{PUZZLE} {SOLVED}\n")
    common = ("--smoke", "--checkpoint", smoke / "full_seed0.pt")
    assert "of 1 puzzles" in in_process(monkeypatch, capsys, "--puzzles", puzzles, *common)


def test_studies_write_a_json_and_a_figure_each(smoke, monkeypatch, capsys):
    common = ("--smoke", "--checkpoint", smoke / "full_seed0.pt", "--out", smoke)
    in_process(monkeypatch, capsys, "--study", "all", *common)
    for name in sudoku.STUDIES:
        assert (smoke / f"sudoku_{name}.json").exists()
        assert name == "speed" or (smoke / f"sudoku_{name}.png").exists()


def test_every_model_of_the_tables_trains_and_finished_ones_are_kept(smoke, monkeypatch, capsys):
    common = ("--smoke", "--variant", "all", "--out", smoke / "all")
    first = in_process(monkeypatch, capsys, *common)
    assert "random re-masking" in first and "is done" not in first
    again = in_process(monkeypatch, capsys, *common)
    assert again.count("is done") == len(sudoku.VARIANTS) + 4
    with pytest.raises(sudoku.InputError, match="second_guess"):  # other settings are not passed off as that run
        in_process(monkeypatch, capsys, *common, "--second-guess", "0.1")


def test_a_killed_run_goes_on_where_it_stopped(smoke, monkeypatch, capsys):
    """Stopped by an exception in the middle, then run again: the same weights, bit for bit, as an unbroken run."""
    in_process(monkeypatch, capsys, "--smoke", "--out", smoke / "unbroken")
    evaluate, calls = sudoku.evaluate, []

    def stop_at_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(sudoku, "evaluate", stop_at_third)
    out = smoke / "killed"
    with pytest.raises(KeyboardInterrupt):
        in_process(monkeypatch, capsys, "--smoke", "--out", out)
    assert (out / "full_seed0.resume.pt").exists()
    monkeypatch.setattr(sudoku, "evaluate", evaluate)
    in_process(monkeypatch, capsys, "--smoke", "--out", out)
    one, two = (torch.load(path / "full_seed0.pt", weights_only=True)["model"] for path in (smoke / "unbroken", out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(json.loads((out / "full_seed0.json").read_text())["curve"]) == 4


def test_two_processes_under_torchrun(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run("--smoke", "--device", "cpu", "--out", tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1 and (tmp_path / "full_seed0.pt").exists()


BAD = {
    "short board": (["--revise", "123"], "81 digits"),
    "letters": (["--solve", "x" * 81], "81 digits"),
    "clues clash": (["--solve", "55" + "0" * 79], "clash at row 1, column 1"),
    "no such device": (["--evaluate", "--device", "cuda:9"], "cuda:9"),
    "no such kind of device": (["--evaluate", "--device", "banana"], "banana"),
    "missing checkpoint": (["--evaluate", "--smoke", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
    "checkpoint of another task": (["--evaluate", "--smoke", "--checkpoint", "{tmp}/text.pt"], "task 'text'"),
    "not a checkpoint": (["--evaluate", "--smoke", "--checkpoint", "{tmp}/bad.txt"], "bad.txt"),
    "missing boards": (["--evaluate", "--boards", "nowhere.txt"], "nowhere.txt"),
    "empty boards": (["--evaluate", "--boards", "{tmp}/empty.txt"], "empty"),
    "an unsolved board": (["--evaluate", "--boards", "{tmp}/bad.txt"], "bad.txt line 2"),
    "an invalid board": (["--evaluate", "--boards", "{tmp}/invalid.txt"], "invalid.txt line 1"),
    "a puzzle without solution": (["--puzzles", "{tmp}/bad.txt"], "line 1"),
    "a solution of another puzzle": (["--puzzles", "{tmp}/mismatch.txt"], "does not solve"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.txt").write_text(SOLVED + "\n" + PUZZLE + "\n")
    (tmp_path / "invalid.txt").write_text("1" * 81 + "\n")
    (tmp_path / "mismatch.txt").write_text("1" + "0" * 80 + " " + SOLVED + "\n")
    config = rm.TransformerConfig(vocabulary=4, length=4, width=16, feed_forward=16, layers=1)
    rm.save_checkpoint(tmp_path / "text.pt", rm.MaskDiffusionTransformer(config), task="text")
    with pytest.raises(sudoku.InputError) as error:
        in_process(monkeypatch, capsys, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_input_ends_with_exit_code_2():
    done = run("--revise", "123")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train_sudoku.py: error: ") and done.stderr.count("\n") == 1
    assert run("--corrupt", "9", "3").returncode == 2
    ignored = run("--evaluate", "--variant", "rm")
    assert ignored.returncode == 2 and "--variant has no effect" in ignored.stderr


# --- the shipped checkpoint


def test_the_shipped_model_repairs_boards_and_agrees_with_its_record():
    path = ROOT / "checkpoints/sudoku_full.pt"
    assert path.stat().st_size <= 4 * 2**20
    model, info = rm.load_checkpoint(path, "sudoku")
    clean = sudoku.random_boards(60, sudoku.TEST_SEED)
    start = sudoku.corrupt(sudoku.random_boards(60, sudoku.TEST_SEED), 4, 20, sudoku.TEST_SEED)
    score = sudoku.evaluate(model, info["gamma"], info["rotate"], clean, start)
    assert score["valid"] >= 0.95 and score["exact"] >= 0.85
    history = HistoryReference(model.embedding.detach(), info["gamma"], info["rotate"])
    again = rm.revise(model, clean, sudoku.MASK, history)
    assert (again.tokens == clean).all(-1).float().mean() >= 0.95  # a right board is left alone
