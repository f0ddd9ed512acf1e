"""Text: problems, graders, training states and decoding against plain Python; the commands."""

import builtins
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import reflective_masking as rm
import study_text
import train_text as text
from history import ABSENT
from test_reflective_masking import assert_counts_fit, seeded

ROOT = Path(__file__).parent.parent


# --- problems, against an evaluator that reads the prompt alone


def numbers(prompt):
    return [int(n) for n in re.findall(r"\d+", prompt)]


def solve_math(prompt):
    """Every right result of a prompt; for those with several by trying all numbers."""
    n = numbers(prompt)
    positive = lambda found: {",".join(map(str, values)) for values in found if min(values) > 0}
    if prompt.endswith("x, y, z?"):
        tried = [(x, y) for x in range(1, n[2]) for y in range(1, n[2] // (x + n[0]) + 1)]
        return positive((x, y, n[2] - (x + n[0]) * (y + n[1])) for x, y in tried)
    if prompt.startswith("over"):
        return {str(a) for a in range(1, 1000) if a > n[0] and a % n[2] == n[1]}
    if "balls" in prompt:
        reds = ((balls, Fraction(n[0] * balls, n[1])) for balls in range(n[2] + 1, 1000))
        return positive((int(red), balls - int(red)) for balls, red in reds if red.denominator == 1)
    if "perimeter" in prompt:
        half = n[0] // 2
        return positive((a, half - a) for a in range(half) if a > n[1] or half - a > n[1])
    if re.fullmatch(r"\d+\*\d+\+\d+\*\d+", prompt):
        return {str(n[0] * n[1] + n[2] * n[3])}
    if prompt.startswith("solve"):
        return {str(x) for x in range(1000) if n[0] * (x + n[1]) + n[2] == n[3]}
    assert "dot" in prompt
    return {str(n[0] * n[2] + n[1] * n[3])}


def test_math_answers_and_every_step_are_true():
    problems = text.generate("math", 2800, "train", 3)
    assert Counter(p.subject for p in problems) == dict.fromkeys(text.TASKS["math"], 400)
    ways = {}
    for problem in problems:
        steps, result = problem.answer.split("#### ")
        assert result in solve_math(problem.prompt), problem
        for step in steps.split(";"):
            left, right = step.split("=")
            assert eval(left) == int(right), problem  # our own generators' text, not a model's
        ways.setdefault(problem.prompt, set()).add(problem.answer)
    assert max(map(len, ways.values())) >= 4  # one prompt, several right answers


def test_math_grader_takes_every_right_result_and_no_other():
    problems = text.generate("math", 420, "test", 0)
    rng = random.Random(0)
    counts = Counter()
    for problem in problems:
        right = solve_math(problem.prompt)
        length = problem.answer.split("#### ")[1].count(",") + 1
        tried = rng.sample(sorted(right), min(len(right), 20))
        tried += [",".join(str(rng.randint(0, 99)) for _ in range(length)) for _ in range(20)]
        tried += ["", "0", "1,2,3,4", "1," * length, tried[0] + ",1", "0" + tried[0], "-1,5", "x"]
        verdicts = text.grade([problem] * len(tried), [f"1+1=2#### {t}" for t in tried])
        assert verdicts == [t in right for t in tried], problem
        assert not any(text.grade([problem] * 2, [tried[0], "1+1=2;" + tried[0]]))
        counts[len(right) > 1] += 1
    assert min(counts.values()) > 100  # prompts with one right result, and with several


def described(words, xs):
    """What a specification of code means, read from its words."""
    finishes = ("sorted", "reversed", "sum of", "largest of", "number of")
    whole = next((w for w in finishes if words.startswith(w)), "")
    rest = words[len(whole) :].strip()
    condition = re.search(r"(evens|odds|x over \d+|x under \d+|all x)$", rest).group(1)
    mapping, k = rest[: -len(condition)].strip(), (numbers(condition) or [0])[0]
    m = (numbers(mapping) or [0])[0]
    values = []
    for x in xs:
        kept = {"ev": x % 2 == 0, "od": x % 2 != 0, "al": True, "x o": x > k, "x u": x < k}
        if kept[condition[: 3 if k else 2]]:
            kinds = {"": x, "squares of": x * x, "doubles of": x + x, "minus": -x}
            values.append(kinds.get(mapping, x + m if "more" in mapping else x * m))
    if whole == "sorted":
        return sorted(values)
    if whole == "reversed":
        return list(reversed(values))
    single = {"sum of": sum(values), "number of": len(values)}
    return single.get(whole, max(values, default=None) if whole == "largest of" else values)


def test_code_answers_mean_what_the_words_say_and_so_do_the_examples():
    rng = random.Random(0)
    for problem in text.generate("code", 3000, "train", 5):
        words, *examples = problem.prompt.split("|")
        assert len(examples) == 2
        for example in examples:
            xs, shown = example.split(":")
            expected = described(words, [int(x) for x in xs.split()])
            expected = expected if isinstance(expected, list) else [expected]
            assert [int(x) for x in shown.split()] == expected, problem
        xs = [rng.randint(-9, 12) for _ in range(7)] + [-8, 13, 100, 101]
        assert eval(problem.answer, {"xs": xs}) == described(words, xs), problem  # no model's


def test_choice_has_one_right_option():
    for problem in text.generate("choice", 2000, "train", 6):
        question, options = problem.prompt.split("? ")
        found = re.fullmatch(r"A (\d+) B (\d+) C (\d+) D (\d+)", options).groups()
        options = dict(zip("ABCD", map(int, found)))
        n = numbers(question)
        if question == "the largest":
            right = max(options.values())
        elif question.startswith("next"):
            right = 2 * n[2] - n[1]
        else:
            right = n[0] * n[1] if "*" in question else n[0] + n[1]
        assert [x for x, value in options.items() if value == right] == [problem.answer]


def test_parts_are_disjoint_and_reproducible(monkeypatch):
    for task in text.TASKS:
        names = ("train", "validation", "test")
        parts = [text.generate(task, 300, part, seed) for part in names for seed in (0, 1)]
        prompts = [{p.prompt for p in part} for part in parts]
        for i, one in enumerate(prompts):
            assert all(i // 2 == j // 2 or not one & two for j, two in enumerate(prompts))
        assert all(len(part) == 300 for part in prompts[2:])  # test prompts are all different
        assert parts[0] == text.generate(task, 300, "train", 0) != parts[1]
    monkeypatch.setitem(text.TASKS, "code", {"code": lambda author: ("always this", "x")})
    with pytest.raises(text.InputError, match="too few"):
        text.generate("code", 2, "test", 0)


def test_text_survives_its_tokens():
    words = [text.Problem(f"say {a} twice", f"{a} {a}") for a in ("one", "two", "three")]
    generated = [p for task in text.TASKS for p in text.generate(task, 50, "train", 0)]
    for problems in (generated, words):
        tokenizer = text.Tokenizer.of(problems, problems, problems is words)
        rows = tokenizer.rows(problems, answers=True)
        start = tokenizer.prompt_length
        answers = [tokenizer.text(row[start:]) for row in rows.tolist()]
        assert answers == [p.answer for p in problems] and (rows != text.MASK).all()
        empty = tokenizer.rows(problems)
        assert torch.equal(empty[:, :start], rows[:, :start])
        assert (empty[:, start:] == text.MASK).all()
        assert (rows[:, start - 1] != text.PAD).all()  # prompts end where answers begin
    with pytest.raises(text.InputError, match="line 3 has 'fish'"):
        tokenizer.encode("say fish", "line 3")


# --- graders


def test_own_answers_are_right_by_what_follows_the_last_marks_or_else_whole():
    own = text.Problem("over 1, leaves 1 by 2: number?", "a ####12")  # 13 solves it, in math alone
    answers = ["2+10=12#### 12", "####12", "12", "#### 12/1", "", "#### 13"]
    assert text.grade([own] * 6, answers) == [True, True, False, False, False, False]
    whole = [text.Problem("", "a"), text.Problem("", "b"), text.Problem("", "c")]
    assert text.grade(whole, ["a", "b ", "#### c"]) == [True, False, False]


CODE = {
    "[x*x for x in xs if x%2==0][::-1]": True,
    "[x**2 for x in xs[::-1] if not x%2]": True,
    "[x*x for x in reversed(xs) if x%2<1]": True,
    "[x*x for x in xs if x%2==0]": False,
    "[x*x for x in xs": False,
    "": False,
    "xs = 3": False,
    "sum(xs) > 3": False,
    "[x*x for x in xs if x%2==0 if __builtins__][::-1]": False,
    "[(x*x).real for x in xs if x%2==0][::-1]": False,
    "[x*x for x in xs if x%2==0 if open][::-1]": False,
    "[float(x) for x in xs]": False,
}


def programs(reference, answers):
    return text.grade([text.Problem("p", reference, "code", "code")] * len(answers), answers)


def test_code_grader_counts_any_right_program_and_nothing_else(monkeypatch):
    assert programs(next(iter(CODE)), list(CODE)) == list(CODE.values())
    monkeypatch.setattr(text, "PROGRAM_SECONDS", 60)
    assert programs("10**8", ["10**8", "len([0]*10**8)"]) == [True, False]  # right, in 800 MB


BOMBS = [
    "[x for x in xs for a in range(10**9) for b in range(10**9) if a<0]",  # endless
    "9**9**9**9",  # endless inside one instruction, where no exception can interrupt
    "[0]*10**11",  # memory at once
    "[[a]*10**6 for a in range(10**6)]",  # memory little by little
    "__import__('os')._exit(0)",
    "(" * 5000 + "xs" + ")" * 5000,
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_code_grader_survives_bombs_within_its_limits(bomb, monkeypatch):
    monkeypatch.setattr(text, "PROGRAM_SECONDS", 0.5)
    began = time.perf_counter()
    assert programs("xs[::-1]", ["xs[::-1]", bomb, "xs[::-1]"]) == [True, False, True]
    assert programs(bomb, ["xs"]) == programs("nonsense", ["xs"]) == [False]
    assert time.perf_counter() - began < 10


def test_models_programs_never_run_in_this_process(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("evaluated here")

    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, forbidden)
    for task in ("own", "choice", "math", "code"):
        text.grade([text.Problem("p", "xs", task=task)], ["[x for x in xs]"])


# --- training states


@pytest.mark.parametrize("impossible", [0, 3, 6])
@pytest.mark.parametrize("k", [4, 50])
def test_topk_wrong_is_uniform_over_the_likeliest_that_are_possible(k, impossible):
    logits = torch.randn(60, 20, 10, generator=seeded(1))
    clean = torch.randint(9, (60, 20), generator=seeded(2))
    clean[clean >= 3] += 1  # MASK is 3
    clean[0] = logits[0].index_fill(-1, torch.tensor(3), -99).argmax(-1)  # the truth is likeliest
    logits[1, :, 3] = 99  # and MASK is
    logits[..., 10 - impossible :] = -math.inf  # a vocabulary padded to a round number
    counts, law = Counter(), Counter()
    for seed in range(5):
        draw = text.topk_wrong(logits, clean, 3, k, seeded(seed))
        cases = zip(*(x.flatten(0, 1).tolist() for x in (logits, clean, draw)))
        for row, truth, token in cases:
            others = [v for v in range(10) if v not in (truth, 3) and row[v] > -math.inf]
            likeliest = sorted(others, key=lambda v: -row[v])[:k]
            size = len(likeliest)
            counts[size, likeliest.index(token)] += 1
            law.update({(size, rank): 1 / size for rank in range(size)})
    assert_counts_fit(counts, {key: p / 6000 for key, p in law.items()})
    for none in (torch.zeros(2, 3, 2), torch.tensor([0.0, 0, -math.inf]).expand(2, 3, 3)):
        with pytest.raises(ValueError, match="no wrong token"):
            text.topk_wrong(none, torch.ones(2, 3, dtype=torch.int64), 0)


def small_pool():
    problems = text.generate("choice", 40, "train", 0) + text.generate("math", 40, "train", 0)
    tokenizer = text.Tokenizer.of(problems, problems, False)
    return tokenizer, tokenizer.rows(problems, answers=True)


class Base(torch.nn.Module):
    """A base whose logits are a function of the tokens, read back from one-hot embeddings."""

    def __init__(self, vocabulary, logits):
        super().__init__()
        self.embedding = torch.eye(vocabulary)
        self.logits = logits

    def forward(self, embedded):
        self.seen = embedded.argmax(-1)
        return self.logits(self.seen)


def revisions(base_logits, batch=2000, **options):
    tokenizer, pool = small_pool()
    base = Base(len(tokenizer.shown), base_logits)
    generator = torch.Generator().manual_seed(0)
    start = tokenizer.prompt_length
    states, clean, editable = text.sample_revision(batch, generator, pool, start, base, **options)
    present = (states[..., 0] != ABSENT).int()
    first = states[present.argmax(0), torch.arange(batch)]  # the oldest state of each row
    return start, states, clean, editable, first, base.seen


def test_masks_have_lladas_law_and_weights():
    tokenizer, pool = small_pool()
    start, n = tokenizer.prompt_length, tokenizer.answer_length
    generator = torch.Generator().manual_seed(0)
    states, clean, masked, weight = text.sample_masks(4000, generator, pool, start)
    assert torch.equal(torch.where(masked, clean, states[0]), clean)
    assert torch.equal(masked, states[0] == text.MASK) and not masked[:, :start].any()
    counts = Counter(masked.sum(-1).tolist())
    assert set(counts) == set(range(1, n + 1)) and max(counts.values()) < 1.6 * 4000 / n  # uniform
    per_row = (weight * masked).sum(-1)  # 1/m each, m of them: the same for every row
    assert torch.allclose(per_row, per_row[:1].expand(4000))
    assert (weight * masked).sum() / masked.sum() == pytest.approx(1)
    _, clean, masked, _ = text.sample_masks(500, generator, pool, start, prompt_share=1.0)
    assert masked[:, :start].any() and not masked[:, :start][clean[:, :start] == text.PAD].any()


def test_the_papers_law_never_edits_prompts_and_never_proposes_the_truth():
    logits = lambda tokens: torch.randn(*tokens.shape, len(small_pool()[0].shown))
    start, states, clean, editable, first, seen = revisions(logits, law="paper")
    assert torch.equal(editable[0], torch.arange(clean.shape[1]) >= start)
    for state in states:
        prompts = torch.where(state == ABSENT, clean, state)[:, :start]
        assert torch.equal(prompts, clean[:, :start])
    assert torch.equal(seen[:, :start], clean[:, :start])  # the probe reads the whole prompt
    assert (seen[:, start:] == text.MASK).all()
    wrong = (states[-1] != clean) & (states[-1] != text.MASK) & editable
    assert wrong.any() and (seen[wrong] == text.MASK).all()  # wrong ones were masked in the probe
    assert ((states[-1] == text.MASK) | ~editable).all(-1).any()  # the empty answer is a state
    share = ((first != text.MASK) & editable).sum() / editable.sum()
    assert share.item() == pytest.approx(text.LAWS["paper"][1], abs=0.03)
    assert ((first != clean) | ~editable).all()  # at turn 0 nothing is right: no truth proposed


def test_our_law_draws_the_truth_as_often_as_the_base(monkeypatch):
    monkeypatch.setitem(text.LAWS, "ours", (0, 0.3))  # no rows in a reveal
    tokenizer, pool = small_pool()
    p_truth, second = 0.7, len(tokenizer.shown) - 1  # the base knows the truth, and one other token
    picks = torch.randint(len(pool), (4000,), generator=torch.Generator().manual_seed(0))
    drawn_first = pool[picks]  # what sample_revision draws with that seed

    def logits(tokens):
        other = torch.where(drawn_first == second, second - 1, second).unsqueeze(-1)
        logits = torch.full((*tokens.shape, len(tokenizer.shown)), -50.0)
        logits.scatter_(-1, other, math.log(1 - p_truth))
        return logits.scatter_(-1, drawn_first.unsqueeze(-1), math.log(p_truth))

    _, states, clean, editable, first, _ = revisions(logits, batch=4000)
    assert torch.equal(clean, drawn_first)
    drawn = (first != text.MASK) & editable
    assert (drawn.sum() / editable.sum()).item() == pytest.approx(0.3, abs=0.03)
    assert (first == clean)[drawn].float().mean().item() == pytest.approx(p_truth, abs=0.02)
    assert (first[drawn & (first != clean)] >= second - 1).all()


@pytest.mark.parametrize("remember", [1, 8])
def test_rows_in_a_parallel_reveal_mix_with_the_others(remember):
    logits = lambda tokens: torch.zeros(*tokens.shape, len(small_pool()[0].shown))
    start, states, clean, editable, first, _ = revisions(logits, batch=400, remember=remember)
    assert torch.equal(states[-1, :, :start], clean[:, :start])
    assert not (states[-1] == ABSENT).any()
    present = (states[..., 0] != ABSENT).int()
    assert (present.diff(dim=0) >= 0).all() and len({int(n) for n in present.sum(0)}) > 2
    empty = (first[:, start:] == text.MASK).all(-1)  # a reveal begins empty; so do a quarter
    reveals = text.LAWS["ours"][0]
    assert abs(empty.float().mean() - (reveals + 0.25 * (1 - reveals))) < 0.05  # of other rows


def test_a_reveal_that_may_go_wrong():
    """Every state of reveal_trajectory, by loops, with a base whose mistakes are known."""
    generator = torch.Generator().manual_seed(0)
    length, rows = 8, 300
    clean = torch.randint(3, 9, (rows, 3 + length), generator=generator)
    rank = torch.stack([torch.randperm(length, generator=generator) for _ in clean])
    rank = torch.cat([torch.full((rows, 3), 99), rank], 1)
    masks = torch.randint(1, length + 1, (rows, 1), generator=generator)
    best = torch.randint(3, 9, clean.shape, generator=generator)
    sure = torch.rand(clean.shape, generator=generator)
    logits = 2 * F.one_hot(best, 9) * (1 + sure.unsqueeze(-1))
    logits[..., text.MASK] = -torch.inf
    states, now = text.reveal_trajectory(clean, logits, rank, masks, length, generator, 4)
    assert torch.equal(states[:, :, :3], clean[:, :3].expand(len(states), -1, -1))
    assert (states[0, :, 3:] == text.MASK).all()
    assert ((states[:-2] == text.MASK) | (states[:-2] == clean)).all()  # until then all is right
    followed = 0
    for row in range(rows):
        left = (states[:-2, row] == text.MASK).sum(-1).tolist()
        assert left == sorted(left, reverse=True)
        masked = rank[row] < masks[row]
        before, draft, corrected = states[-3:, row]
        assert torch.equal(before, clean[row].masked_fill(masked, text.MASK))
        filled = (draft != text.MASK) & masked
        assert filled.any() and torch.equal(draft[~masked], clean[row][~masked])
        for i in (filled & (draft != clean[row])).nonzero().flatten():
            assert draft[i] == best[row, i]
            surer = masked & (sure[row] > sure[row, i])
            assert filled[surer].all()  # what the base was surer of was revealed, too
        assert torch.equal(corrected, draft.masked_fill(draft != clean[row], text.MASK))
        followed += bool((filled & (draft != best[row])).any())
    assert 0.15 < followed / rows < 0.37  # in half of the rows some others follow, right
    shares = [(now == len(states) - 3 + i).float().mean().item() for i in range(3)]
    assert shares == pytest.approx(text.MOMENTS, abs=0.08)


# --- decoding and scores


class Scripted(torch.nn.Module):
    """Knows the answers; its first reveal is wrong, which it doubts once the answer is complete."""

    def __init__(self, clean, vocabulary, start):
        super().__init__()
        self.clean = clean
        self.start = start
        self.calls = 0
        self.embedding = torch.nn.Parameter(torch.eye(vocabulary, vocabulary + vocabulary % 2))

    def forward(self, x):
        self.calls += 1
        tokens = x.argmax(-1)
        wanted = self.clean[: len(x)].clone()
        right = wanted[:, self.start].clone()
        if self.calls == 1:
            wanted[:, self.start] = text.END  # a wrong reveal
        else:
            doubted = (tokens != text.MASK).all(-1) & (tokens[:, self.start] != right)
            wanted[:, self.start] = torch.where(doubted, text.MASK, right)
        return 9.0 * F.one_hot(wanted, len(self.embedding)).float()


def info_of(tokenizer, variant, **more):
    gamma = 0.9 if variant == "history" else 0.0
    info = {"variant": variant, "trained_on": "math", "gamma": gamma}
    return info | {"tokenizer": asdict(tokenizer), "haste": []} | more


def small_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    length = tokenizer.prompt_length + tokenizer.answer_length
    config = rm.TransformerConfig(len(tokenizer.shown), length, 16, 1, 2, 32, "both")
    model = rm.MaskDiffusionTransformer(config).eval()
    for weight in (model.embedding, model.blocks[0].attention_out.weight, model.head.weight):
        torch.nn.init.normal_(weight)  # logits far enough apart that some tokens are re-masked
    return model


def test_revision_repairs_what_low_confidence_decoding_leaves_wrong():
    problems = [p._replace(task="own", answer=p.answer.replace("#", ""))
                for p in text.generate("math", 4, "test", 0)]  # fmt: skip
    tokenizer = text.Tokenizer.of(problems, problems, False)
    clean = tokenizer.rows(problems, answers=True)
    for variant, right in (("rm", 1), ("sft", 0)):
        model = Scripted(clean, len(tokenizer.shown), tokenizer.prompt_length)
        score = text.evaluate(model, info_of(tokenizer, variant, haste=[(1, 3)]), problems, 9)
        assert score["accuracy"] == right and score["right"].pop("all") == str(right) * 4
        assert score["right"] == {p.subject: str(right) for p in problems}


def test_every_variant_makes_at_most_the_passes_it_may_and_leaves_prompts_alone():
    tokenizer, pool = small_pool()
    n, start = tokenizer.answer_length, tokenizer.prompt_length
    model = small_model(tokenizer)
    rows = pool[:10].clone()
    rows[:, start:] = text.MASK
    for variant in text.VARIANTS:
        for passes in (1, 3, 8, n, 2 * n):
            calls = []
            handle = model.register_forward_hook(lambda *_: calls.append(1))
            (result,) = text.decode(model, info_of(tokenizer, variant), rows, passes)
            handle.remove()
            assert len(calls) <= passes and (result.tokens != text.MASK).all()
            assert (result.trace[:, :, :start] == rows[:, :start]).all()
            if variant == "sft":  # spends its passes evenly and never takes anything back
                reveals = (result.trace == text.MASK).sum(-1).diff(dim=0).neg()
                assert len(calls) == min(passes, n) + (passes > n)
                reveals = reveals[: min(passes, n)]
                assert reveals.max() - reveals.min() <= 1 and (reveals.diff(dim=0) <= 0).all()
                stays = result.trace[:-1] == result.trace[1:]
                assert ((result.trace[:-1] == text.MASK) | stays).all()


def test_haste_is_chosen_by_validation_before_each_number_of_passes(monkeypatch):
    best = {4: 2, 8: 1.5, 16: 1}

    def evaluate(model, info, problems, passes):
        (_, haste), scored = info["haste"][-1], problems == "test"
        assert not scored or haste == best[passes]
        return {"accuracy": -abs(haste - best[passes]), "ci95": (0, 0), "passes": passes}

    monkeypatch.setattr(text, "evaluate", evaluate)
    info = {"variant": "rm", "tokenizer": {"answer_length": 32}, "haste": []}
    scores = text.evaluate_all(None, info, "test", [16, 4, 8], "validation")
    assert info["haste"] == [*best.items()] and [row["passes"] for row in scores] == [4, 8, 16]


def test_haste_is_looked_up_by_passes():
    tokenizer, pool = small_pool()
    n, start = tokenizer.answer_length, tokenizer.prompt_length
    rows = pool[:4].index_fill(1, torch.arange(start, start + n), text.MASK)
    model = small_model(tokenizer)
    for variant in ("rm", "sft"):
        info = info_of(tokenizer, variant, haste=[(n // 4, 2), (n // 2, 1.5), (n, 1)])
        for passes, haste in ((n // 5, 2), (n // 3, 2), (n // 2, 1.5), (n, 1), (2 * n, 1)):
            (result,) = text.decode(model, info, rows, passes)
            masks = (result.trace == text.MASK).sum(-1)
            for turn in range(len(masks) - 1 if variant == "sft" else 1):  # Eq. 1 adds masks later
                share = Fraction(haste) * masks[turn, 0].item() / (passes - turn)
                assert (masks[turn] - masks[turn + 1] == math.ceil(share)).all()


def test_passes_to_score_are_shares_of_the_answers_length(monkeypatch):
    score = lambda model, info, problems, passes: {"accuracy": 0, "ci95": (0, 0), "passes": passes}
    monkeypatch.setattr(text, "evaluate", score)
    for length, wanted in ((32, [2, 4, 8, 16, 32]), (2, [1, 2])):
        info = {"variant": "sft", "tokenizer": {"answer_length": length}}
        assert [row["passes"] for row in text.evaluate_all(None, info, [], None)] == wanted


def test_a_handful_of_problems_is_learned_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LEARNING_RATE", dict.fromkeys(text.VARIANTS, 5e-3))
    monkeypatch.setattr(text, "BATCH_SIZE", 8)
    texts = (("ab", "cdefgh"), ("ba", "hgfe"), ("aa", "dddddd"), ("bb", "c"))
    problems = [text.Problem(*pair, "all") for pair in texts]
    tokenizer = text.Tokenizer.of(problems, problems, False)
    data = text.Data("few", problems, problems, problems, tokenizer)
    how = {"base_steps": 160, "steps": 160, "size": (32, 1), "passes": [7]}
    result = text.train_all(data, tmp_path, torch.device("cpu"), **how)
    for variant in ("sft", "rm"):
        assert result["scores"][variant][0]["accuracy"] == 1, variant


# --- the commands


def run(*given, timeout=300):
    command = [sys.executable, str(ROOT / "train_text.py"), *map(str, given)]
    options = {"capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run(command, stdin=subprocess.DEVNULL, **options)


def in_process(monkeypatch, capsys, *given):
    monkeypatch.setattr(sys, "argv", ["train_text.py", *map(str, given)])
    text.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All tasks and variants, tiny; its checkpoints serve the other tests."""
    out = tmp_path_factory.mktemp("text")
    done = run("--smoke", "--task", "all", "--history", "--out", out, "--json", out / "result.json")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("wrote "):
            assert Path(line.split(" ", 1)[1]).stat().st_size > 0
    runs = [f"{task}_{variant}_seed0" for task in text.TASKS for variant in text.VARIANTS]
    names = {f"{run}.{end}" for run in runs for end in ("pt", "json")}
    assert names <= {path.name for path in out.iterdir()}
    assert not list(out.glob("*.resume.pt")) and not list(out.glob("*.tmp"))
    assert "precalculus" in done.stdout and "minus SFT" in done.stdout
    return out


def test_the_bare_command_reports_what_was_asked(smoke):
    results = json.loads((smoke / "result.json").read_text())
    assert set(results) == set(text.TASKS)
    result = results["math"]
    assert set(result["scores"]) == set(text.VARIANTS)
    assert set(result["minus_sft"]) == {"rm", "history"}
    score = result["scores"]["rm"][0]
    wanted = "accuracy ci95 n passes subjects right"
    assert set(wanted.split()) <= set(score)
    assert set(score["subjects"]) == set(score["right"]) == {"all", *text.TASKS["math"]}
    assert len(score["right"]["all"]) == score["n"] == 14
    record = result["records"]["rm"]
    assert {"steps", "minutes", "params", "provenance", "curve"} <= set(record)


def test_finished_variants_are_kept_and_other_settings_refused(smoke, monkeypatch, capsys):
    common = ("--smoke", "--task", "all", "--history", "--out", smoke)
    assert in_process(monkeypatch, capsys, *common).count(": done") == 12
    with pytest.raises(text.InputError, match="law"):
        in_process(monkeypatch, capsys, *common, "--law", "paper")
    for name, value in (("data", ("--pool", "150")), ("test", ("--n", "7"))):
        with pytest.raises(text.InputError, match=name):  # other problems, the same folder
            in_process(monkeypatch, capsys, *common, *value)


def test_the_study_of_seeds_pairs_each_seed_with_its_own_sft():
    row = lambda ones: {"passes": 4, "accuracy": ones.count("1") / 4, "right": {"all": ones}}
    ours, theirs = [row("1110"), row("1100")], [row("1000"), row("0001")]
    found = study_text.mean_difference(ours, theirs, ["a", "a", "b", "b"])
    assert found["seeds"] == [0.5, 0.25] and found["difference"] == 0.375
    assert found["ci95_specifications"] == [0, 0.75]  # a alone, twice, has 0.75, b alone 0
    assert study_text.mean_of(ours)["accuracy"] == 0.625


def test_the_study_of_one_seed_is_its_report(smoke, monkeypatch, tmp_path):
    report = smoke / "text_math_seed0.json"
    given = ["study_text.py", "math", str(report), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    study_text.main()
    record = json.loads((tmp_path / "text_math.json").read_text())
    wanted = json.loads(report.read_text())
    assert [row["seeds"] for row in record["mean"]["rm"]] == [
        [row["accuracy"]] for row in wanted["scores"]["rm"]
    ]
    found = record["minus_sft"]["rm"][-1]
    paired = wanted["minus_sft"]["rm"][-1]
    assert found["ci95"] == paired["all"]["ci95"]
    assert found["subjects"]["geometry"]["difference"] == paired["geometry"]["difference"]
    assert (tmp_path / "text_math.png").exists()

    other = json.loads(report.read_text())
    other["records"]["sft"]["settings"]["start"] = "another base"
    with pytest.raises(ValueError, match="differ"):
        study_text.collect([wanted, other], [])


@pytest.mark.parametrize("given", [("--law", "paper"), ("--seed", 1)])
def test_another_law_or_seed_shares_the_base(given, smoke, monkeypatch, capsys, tmp_path):
    for path in smoke.glob("code_base_seed0.*"):
        shutil.copy(path, tmp_path)
    common = ("--smoke", *given, "--out", tmp_path)
    assert in_process(monkeypatch, capsys, *common).count(": done") == 1
    (found,) = tmp_path.glob("code_rm_seed?.json")
    files = (found, smoke / "code_rm_seed0.json")
    curves = [json.loads(path.read_text())["curve"] for path in files]
    losses = [[point["reveal"] for point in curve] for curve in curves]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name, stop_at", [("sample_masks", 7), ("evaluate_all", 2)])
def test_a_killed_run_goes_on_where_it_stopped(name, stop_at, tmp_path, monkeypatch, capsys):
    working = getattr(text, name)
    calls = []

    def stop(*given, **options):
        calls.append(1)
        if len(calls) == stop_at:  # in the middle of SFT, at its end
            raise KeyboardInterrupt
        return working(*given, **options)

    common = ("--smoke", "--task", "choice", "--device", "cpu")
    in_process(monkeypatch, capsys, *common, "--out", tmp_path / "unbroken")
    monkeypatch.setattr(text, name, stop)
    with pytest.raises(KeyboardInterrupt):
        in_process(monkeypatch, capsys, *common, "--out", tmp_path / "killed")
    assert list((tmp_path / "killed").glob("*.resume.pt"))
    monkeypatch.setattr(text, name, working)
    in_process(monkeypatch, capsys, *common, "--out", tmp_path / "killed")
    for variant in ("sft", "rm"):
        file = f"choice_{variant}_seed0.pt"
        one, two = (rm.read_torch(tmp_path / run / file)["model"] for run in ("unbroken", "killed"))
        assert all(torch.equal(one[key], two[key]) for key in one)
        record = json.loads((tmp_path / "killed" / file).with_suffix(".json").read_text())
        assert record["minutes"] > 0 and len(record["curve"]) == 4 and record["test"]


def test_ask_shows_marked_turns(smoke, monkeypatch, capsys):
    common = ("--checkpoint", smoke / "math_rm_seed0.pt", "--json", smoke / "ask.json")
    shown = in_process(monkeypatch, capsys, "--ask", "solve 3x+5=20", *common, "--passes", 4)
    assert "turn  4" in shown and "\033" not in shown
    found = json.loads((smoke / "ask.json").read_text())
    assert set(found) == {"prompt", "answer", "turns", "status"}

    trace = torch.tensor([[[3, 0, 3, 4, 0]], [[3, 3, 0, 4, 0]]])
    result = rm.Revision(trace[-1], [1], ["cycle"], trace)
    monkeypatch.setattr(text, "decode", lambda *_: [result])
    info = {"tokenizer": asdict(text.Tokenizer(["a", "b"], False, 1, 4))}
    assert text.ask(None, info, "a", 1)["answer"] == "a_b_"
    assert "turn  1  (a)(_)b_\n" in capsys.readouterr().out


def test_evaluate_scores_a_checkpoint(smoke, monkeypatch, capsys):
    path = smoke / "evaluate.json"
    common = ("--evaluate", "--checkpoint", smoke / "code_sft_seed0.pt", "--passes", 2)
    in_process(monkeypatch, capsys, *common, "--n", 14, "--json", path)
    result = json.loads(path.read_text())
    assert result["scores"][0]["n"] == 14 and result["seed"] == text.TEST_SEED
    assert result["provenance"]["torch"] and result["variant"] == "sft"


# --- own data


def write(path, *lines, start=""):
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(start + "\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_own_data_trains_and_leaves_test_prompts_out(tmp_path, monkeypatch, capsys):
    pairs = [(a, b) for a in range(6) for b in range(5)]
    lines = [{"prompt": f"say {a} {b}", "answer": f"{a} {b}"} for a, b in pairs]
    train = write(tmp_path / "code.jsonl", *lines)  # named like a task, and yet not one
    test = write(tmp_path / "test.jsonl", *lines[20:25], {"prompt": "say 1 1", "answer": "one"})
    common = ("--smoke", "--data", train, "--test", test, "--words", "--out", tmp_path / "out")
    shown = in_process(monkeypatch, capsys, *common)
    assert "6 of 30 training problems" in shown  # five, and the prompt whose answer differs
    assert "1 of 6 test answers" in shown  # the word one
    path = tmp_path / "out/own_code_rm_seed0.pt"
    _, info = rm.load_checkpoint(path, "text")
    assert info["tokenizer"]["words"] and "say" in info["tokenizer"]["symbols"]
    with pytest.raises(text.InputError, match="own_code"):
        in_process(monkeypatch, capsys, "--evaluate", "--checkpoint", path)
    evaluate = ("--evaluate", "--checkpoint", path, "--passes", 1)
    assert "RM, 1 passes" in in_process(monkeypatch, capsys, *evaluate, "--test", test)


def test_the_shipped_checkpoint_scores_own_lines_exactly(tmp_path, monkeypatch, capsys):
    lines = [{"prompt": "sum of all x|4 2:6|3 6:9", "answer": f"sum({x})"} for x in ("xs", "é")]
    test = write(tmp_path / "mine.jsonl", *lines)
    given = ("--evaluate", "--test", test, "--passes", 35, "--json", tmp_path / "result.json")
    assert "1 of 2 test answers" in in_process(monkeypatch, capsys, *given)
    assert json.loads((tmp_path / "result.json").read_text())["scores"][0]["n"] == 2


def test_lines_as_people_have_them(tmp_path):
    gsm = {"question": "2+2?", "answer": "2+2=4\n#### 4"}
    alpaca = {"instruction": "Add.", "input": "2 2", "output": "4"}
    path = write(tmp_path / "a.jsonl", gsm, "", "  ", gsm, start="\ufeff")
    problems = text.read_problems(path, prompt_key="question")
    assert [p.where for p in problems] == [f"{path} line 1", f"{path} line 4"]
    assert text.grade(problems, ["#### 4", "4"]) == [True, False]
    path = write(tmp_path / "b.jsonl", alpaca, alpaca | {"input": ""})
    problems = text.read_problems(path, prompt_key="instruction", answer_key="output")
    assert [p.prompt for p in problems] == ["Add. 2 2", "Add."]


def test_one_long_answer_is_named_and_can_be_left_out(tmp_path, capsys):
    lines = [{"prompt": f"p{i}", "answer": "a" * (500 if i == 3 else 5)} for i in range(9)]
    train = write(tmp_path / "a.jsonl", *lines)
    test = write(tmp_path / "b.jsonl", {"prompt": "q", "answer": "a"})
    with pytest.raises(text.InputError, match="b.jsonl line 1 has 'q'"):
        tokenizer = text.own_data("a", *map(text.read_problems, (train, test))).tokenizer
        text.check_test(tokenizer, text.read_problems(test))
    data = text.own_data("a", text.read_problems(train), text.read_problems(test))
    shown = capsys.readouterr().out
    assert data.tokenizer.answer_length == 501 and "501 tokens" in shown and "line 4" in shown
    found = text.read_problems(train, max_length=20)
    assert len(found) == 8 and "1 of 9" in capsys.readouterr().out
    with pytest.raises(text.InputError, match="no problem of at most 1"):
        text.read_problems(train, max_length=1)


# --- bad input


BAD = {
    "no JSON": (["--data", "{tmp}/bad.jsonl", "--test", "{tmp}/good.jsonl"], "bad.jsonl line 2"),
    "deep": (["--data", "{tmp}/deep.jsonl", "--test", "{tmp}/good.jsonl"], "deep.jsonl line 1"),
    "empty file": (["--data", "{tmp}/empty.jsonl", "--test", "{tmp}/good.jsonl"], "is empty"),
    "no answer": (["--data", "{tmp}/keys.jsonl", "--test", "{tmp}/good.jsonl"], "'answer'"),
    "blank": (["--data", "{tmp}/blank.jsonl", "--test", "{tmp}/good.jsonl"], "neither empty"),
    "numbers": (["--data", "{tmp}/numbers.jsonl", "--test", "{tmp}/good.jsonl"], "line 1 must be"),
    "half a letter": (["--data", "{tmp}/half.jsonl", "--test", "{tmp}/good.jsonl"], "line 1 must"),
    "missing": (["--data", "nowhere.jsonl", "--test", "{tmp}/good.jsonl"], "nowhere.jsonl"),
    "all tested": (["--data", "{tmp}/good.jsonl", "--test", "{tmp}/good.jsonl"], "every training"),
    "unknown": (["--data", "{tmp}/good.jsonl", "--test", "{tmp}/other.jsonl"], "other.jsonl line"),
    "no such device": (["--device", "cuda:9"], "cuda:9"),
    "no checkpoint": (["--ask", "1+1", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
    "another task's": (["--ask", "1+1", "--checkpoint", "{tmp}/sudoku.pt"], "task 'sudoku'"),
    "unknown asked": (["--ask", "solve 3x=É", "--checkpoint", "{smoke}/math_rm_seed0.pt"], "'É'"),
    "nothing asked": (["--ask", "", "--checkpoint", "{smoke}/math_rm_seed0.pt"], "tokens, got 0"),
    "too long": (["--ask", "1" * 99, "--checkpoint", "{smoke}/math_rm_seed0.pt"], "got 99"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_in_one_line(given, message, smoke, tmp_path, monkeypatch, capsys):
    good = {"prompt": "a", "answer": "b"}
    write(tmp_path / "good.jsonl", good)
    write(tmp_path / "bad.jsonl", good, "{oops")
    write(tmp_path / "deep.jsonl", "[" * 100_000)
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "keys.jsonl", {"prompt": "a"})
    write(tmp_path / "blank.jsonl", {"prompt": "a", "answer": ""})
    write(tmp_path / "numbers.jsonl", {"prompt": 1, "answer": 2})
    write(tmp_path / "half.jsonl", {"prompt": "a", "answer": "\ud800"})
    write(tmp_path / "other.jsonl", {"prompt": "é", "answer": "b"})
    config = rm.TransformerConfig(vocabulary=4, length=4, width=16, feed_forward=16, layers=1)
    model = rm.MaskDiffusionTransformer(config)
    rm.save_checkpoint(tmp_path / "sudoku.pt", model, task="sudoku")
    with pytest.raises(text.InputError) as error:
        given = [part.format(tmp=tmp_path, smoke=smoke) for part in given]
        in_process(monkeypatch, capsys, *given)
    assert message in str(error.value) and "\n" not in str(error.value)


CONTRADICTIONS = [
    "--data x.jsonl", "--test x.jsonl", "--task all --test x.jsonl", "--ask 1 --steps 3",
    "--evaluate --history", "--evaluate --ask 1", "--evaluate --out x", "--steps 0", "--passes 0",
    "--checkpoint x.pt", "--task poetry", "--data x --test y --pool 3", "--words",
    "--evaluate --task math", "--evaluate --task code --test x", "--ask 1 --seed 3", "--law mine",
    "--evaluate --max-length 3", "--ask 1 --passes 2 3", "--data x --test y --task code",
]  # fmt: skip


@pytest.mark.parametrize("given", CONTRADICTIONS)
def test_contradictory_options_exit_with_2(given, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        in_process(monkeypatch, capsys, *given.split())
    message = capsys.readouterr().err
    assert error.value.code == 2 and "error" in message and message.count("\n") == 1


def test_bad_input_ends_with_exit_code_2_and_one_line(tmp_path):
    done = run("--data", write(tmp_path / "bad.jsonl", "{"), "--test", tmp_path / "bad.jsonl")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_text.py: error: ")


# --- the shipped checkpoint


def test_the_shipped_model_answers(monkeypatch, capsys):
    path = ROOT / "checkpoints/text_rm.pt"
    assert path.stat().st_size <= 4 * 2**20
    given = ("--ask", "number of evens|4 3:1|5 8:1", "--passes", "9")
    shown = in_process(monkeypatch, capsys, *given)
    *_, answer, ending = shown.splitlines()
    right = text.Problem("p", "len([x for x in xs if x%2==0])", task="code")
    assert text.grade([right], [answer]) == [True]
    assert "(_)" in shown and ending.startswith("fixed point after")  # it took something back
