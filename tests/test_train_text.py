"""Text: generators, graders, samplers and decoding against plain Python; the script's command lines end to end."""

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
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reflective_masking as rm
import train_text as text

ROOT = Path(__file__).parent.parent


# --- generators, against an evaluator that reads the prompt alone


def numbers(prompt):
    return [int(n) for n in re.findall(r"\d+", prompt)]


def solve_math(prompt):
    """Every right result of a prompt, by plain Python arithmetic; for those with several by trying all numbers."""
    n = numbers(prompt)
    positive = lambda found: {",".join(map(str, values)) for values in found if min(values) > 0}
    if "heaps" in prompt:
        total = n[0] * n[1] + n[2]
        return positive((a, total - a) for a in range(total))
    if prompt.endswith("x, y?"):
        return positive((n[1] - n[0] * y, y) for y in range(n[1]))
    if prompt.endswith("x, y, z?"):
        tried = [(x, y) for x in range(1, n[2]) for y in range(1, n[2] // (x + n[0]) + 1)]
        return positive((x, y, n[2] - (x + n[0]) * (y + n[1])) for x, y in tried)
    if prompt.startswith("over"):
        return {str(a) for a in range(1, 1000) if a > n[0] and a % n[2] == n[1]}
    if "balls" in prompt:
        reds = ((balls, Fraction(n[0] * balls, n[1])) for balls in range(n[2] + 1, 1000))
        return positive((int(red), balls - int(red)) for balls, red in reds if red.denominator == 1)
    if "perimeter" in prompt:
        return positive((a, n[0] // 2 - a) for a in range(n[0] // 2) if a > n[1] or n[0] // 2 - a > n[1])
    if prompt.startswith("term"):
        return positive((a, b) for b in range(1, n[1]) for a in range(1, n[1]) if range(a, n[1] + 1, b)[-1] == n[1]
                        and len(range(a, n[1] + 1, b)) == n[0])
    if re.fullmatch(r"\d+\*\d+\+\d+\*\d+", prompt):
        return {str(n[0] * n[1] + n[2] * n[3])}
    if prompt.startswith("solve"):
        return {str(x) for x in range(1000) if n[0] * (x + n[1]) + n[2] == n[3]}
    if "root" in prompt:  # of x^2 - bx + c
        b, c, known = n[1], n[2], n[3]
        assert known**2 - b * known + c == 0
        return {str(x) for x in range(b + 1) if x + known == b and x * known == c}
    if prompt.startswith("gcd"):
        return {str(math.gcd(*n))}
    if "outfits" in prompt:
        return {str((n[0] + n[1]) * n[2])}
    if "hole" in prompt:
        return {str(n[0] * n[1] - n[2] * n[3])}
    if "dot" in prompt:
        return {str(n[0] * n[2] + n[1] * n[3])}
    raise AssertionError(prompt)


def test_math_answers_and_every_step_are_true():
    problems = text.generate("math", 2800, "train", 3, 9) + text.generate("math", 700, "train", 4, 20)
    assert Counter(p.subject for p in problems) == dict.fromkeys(text.PAPER_SUBJECTS, 500)
    for prompt, answer, _ in problems:
        steps, result = answer.split("#### ")
        assert result in solve_math(prompt), (prompt, answer)
        for step in steps.split(";"):
            left, right = step.split("=")
            assert eval(left) == int(right), (prompt, answer)  # our own generators' text, not a model's
        assert text.false_steps(answer) == 0
    ways = {}
    for prompt, answer, _ in problems:
        ways.setdefault(prompt, set()).add(answer)
    assert max(map(len, ways.values())) >= 4  # one prompt, several right answers


def test_math_grader_takes_every_right_result_and_no_other():
    problems = text.generate("math", 420, "test", 0, 9)
    rng, counts = random.Random(0), Counter()
    for prompt, answer, _ in problems:
        right = solve_math(prompt)
        length = answer.split("#### ")[1].count(",") + 1
        tried = rng.sample(sorted(right), min(len(right), 20))
        tried += [",".join(str(rng.randint(0, 99)) for _ in range(length)) for _ in range(20)]
        tried += ["", "0", "1,2,3,4", "1," * length, tried[0] + ",1", "0" + tried[0], "-1,5", "x"]
        verdicts = text.grade_result([prompt] * len(tried), [answer] * len(tried), [f"1+1=2#### {t}" for t in tried])
        assert verdicts == [t in right for t in tried], prompt
        assert not any(text.grade_result([prompt] * 2, [answer] * 2, [tried[0], "1+1=2;" + tried[0]]))
        counts[len(right) > 1] += 1
    assert min(counts.values()) > 100  # prompts with one right result, and with several
    assert text.grade_result(["over 5, leaves 0 by 0: number?"], ["#### 7"], ["#### 7"]) == [False]  # no division by 0


def described(words, xs):
    """What a specification of code means, read from its words."""
    whole = next((w for w in ("sorted", "reversed", "sum of", "largest of", "number of") if words.startswith(w)), "")
    rest = words[len(whole) :].strip()
    condition = re.search(r"(evens|odds|x over \d+|x under \d+|all x)$", rest).group(1)
    mapping, k = rest[: -len(condition)].strip(), (numbers(condition) or [0])[0]
    m = (numbers(mapping) or [0])[0]
    values = []
    for x in xs:
        kept = {"ev": x % 2 == 0, "od": x % 2 != 0, "al": True, "x o": x > k, "x u": x < k}[condition[: 3 if k else 2]]
        if kept:
            kinds = {"": x, "squares of": x * x, "doubles of": x + x, "minus": -x}
            values.append(kinds.get(mapping, x + m if "more" in mapping else x * m))
    if whole == "sorted":
        return sorted(values)
    if whole == "reversed":
        return list(reversed(values))
    return {"sum of": sum(values), "largest of": max(values, default=None), "number of": len(values)}.get(whole, values)


def test_code_answers_mean_what_the_words_say_and_so_do_the_examples():
    rng = random.Random(0)
    for prompt, answer, _ in text.generate("code", 4000, "train", 5, 9):
        words, *examples = prompt.split("|")
        assert len(examples) == 2
        for example in examples:
            xs, shown = example.split(":")
            expected = described(words, [int(x) for x in xs.split()])
            expected = expected if isinstance(expected, list) else [expected]
            assert [int(x) for x in shown.split()] == expected, prompt
        for _ in range(3):
            xs = [rng.randint(-9, 12) for _ in range(7)] + [-8, 13, 100, 101]
            assert eval(answer, {"xs": xs}) == described(words, xs), (prompt, answer)  # generated by us, no model's


def test_choice_has_one_right_option():
    for prompt, answer, _ in text.generate("choice", 3000, "train", 6, 9):
        question, options = prompt.split("? ")
        options = dict(zip("ABCD", map(int, re.fullmatch(r"A (\d+) B (\d+) C (\d+) D (\d+)", options).groups())))
        n = numbers(question)
        if question == "the largest":
            right = max(options.values())
        elif question.startswith("next"):
            right = 2 * n[2] - n[1]
        else:
            right = n[0] * n[1] if "*" in question else n[0] + n[1]
        assert [letter for letter, value in options.items() if value == right] == [answer]


def test_long_multiplication_adds_up():
    for prompt, answer, _ in text.generate("multiply", 500, "train", 7, 9):
        value = lambda digits: int(digits.replace(" ", "")[::-1])
        a, b = map(value, prompt.split(" * "))
        work, result = answer.split(" #### ")
        assert value(result) == a * b
        assert sum(value(part.split(" (")[0]) for part in work.split(" + ")) == a * b
    known = "5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 ) + 0 0 0 0 6 4 9 0"
    known += " #### 5 5 6 0 8 2 0 1"

    class Fixed:
        draws = [2365, 4347]
        randint = lambda self, low, high: self.draws.pop(0)

    assert text.long_multiplication(Fixed(), 9) == ("5 6 3 2 * 7 4 3 4", known)


def test_splits_are_disjoint_and_reproducible():
    for task in text.TASKS:
        names = ("train", "validation", "test")
        splits = [text.generate(task, 300, split, seed, 9) for split in names for seed in (0, 1)]
        prompts = [{p.prompt for p in part} for part in splits]
        for i, one in enumerate(prompts):
            for j, two in enumerate(prompts):
                assert i // 2 == j // 2 or not one & two
        assert all(len(part) == 300 for part in prompts[2:])  # test prompts are all different
        assert splits[0] == text.generate(task, 300, "train", 0, 9) != splits[1]
    with pytest.raises(text.InputError, match="too few"):
        text.generate("math", 100_000, "test", 0, 5)


# --- tokens


def test_text_survives_its_tokens():
    problems = text.generate("math", 50, "train", 0, 9) + text.generate("choice", 50, "train", 0, 9)
    for words, some in ((False, problems), (True, text.generate("multiply", 50, "train", 0, 9))):
        tokenizer = text.Tokenizer.of(some, words)
        rows = tokenizer.rows([p.prompt for p in some], [p.answer for p in some])
        assert [tokenizer.text(row[tokenizer.prompt_length :]) for row in rows.tolist()] == [p.answer for p in some]
        empty = tokenizer.rows([p.prompt for p in some])
        assert torch.equal(empty[:, : tokenizer.prompt_length], rows[:, : tokenizer.prompt_length])
        assert (empty[:, tokenizer.prompt_length :] == text.MASK).all() and (rows != text.MASK).all()
        assert (rows[:, tokenizer.prompt_length - 1] != text.PAD).all()  # prompts end where answers begin
    with pytest.raises(text.InputError, match="the word 'fish'"):
        tokenizer.encode("5 fish")


# --- graders


def test_result_grader_and_false_steps():
    grade = lambda answer: text.grade_result([""], ["3*4=12#### 12"], [answer])[0]
    assert grade("2+10=12#### 12") and grade("####12") and not grade("12") and not grade("#### 12/1") and not grade("")
    assert text.false_steps("3*4=12;12+1=13#### 13") == 0 and text.false_steps("3*4=13;12+1=13#### 13") == 1
    assert text.false_steps("x*4=12;1=1=1;#### 1") == 3 and text.false_steps("8/0=1#### 1") == 1
    rng = random.Random(0)
    for _ in range(2000):
        more = [f"{rng.choice('+-*/')}{rng.randint(1, 99)}" for _ in range(rng.randint(0, 4))]
        expression = str(rng.randint(0, 99)) + "".join(more)
        assert float(text.arithmetic(expression)) == pytest.approx(eval(expression))
    assert text.arithmetic("9**9") is text.arithmetic("__import__") is text.arithmetic("9" * 10) is None


def test_exact_and_last_number_graders():
    assert text.grade_exact(["", ""], ["a", "b"], ["a", "b "]) == [True, False]
    cases = [("x 12", "12", True), ("= 1 2", "12", True), ("-3", "3", False), ("1.50", "1.5", True)]
    cases.append(("none", "1", False))
    for answer, reference, right in cases:
        assert text.grade_last_number([""], [reference], [answer]) == [right]


CODE = {
    "[x*x for x in xs if x%2==0][::-1]": True,
    "[x**2 for x in xs[::-1] if not x%2]": True,
    "[x*x for x in reversed(xs) if x%2<1]": True,
    "[x*x for x in xs if x%2==0]": False,
    "[x*x for x in xs": False,
    "": False,
    "xs = 3": False,
    "sum(xs) > 3": False,
    "__import__('os').system('true')": False,
    "[open('/etc/passwd')]": False,
    "().__class__.__base__.__subclasses__()": False,
    "[float(x) for x in xs]": False,
}


def test_code_grader_counts_any_right_program_and_nothing_else():
    reference = next(iter(CODE))
    n = len(CODE)
    assert text.grade_code(["p"] * n, [reference] * n, list(CODE)) == list(CODE.values())


@pytest.mark.parametrize("bomb", [
    "[x for x in xs for a in range(10**9) for b in range(10**9) if a<0]",  # endless
    "9**9**9**9",  # endless inside one instruction, where no exception can interrupt
    "[0]*10**11",  # memory at once
    "[[a]*10**6 for a in range(10**6)]",  # memory little by little
    "__import__('os')._exit(0)",
    "(" * 5000 + "xs" + ")" * 5000,
])
def test_code_grader_survives_bombs_within_its_limits(bomb, monkeypatch):
    monkeypatch.setattr(text, "PROGRAM_SECONDS", 0.5)
    began = time.perf_counter()
    assert text.grade_code(["p"] * 3, ["xs[::-1]"] * 3, ["xs[::-1]", bomb, "xs[::-1]"]) == [True, False, True]
    assert time.perf_counter() - began < 10


def test_models_programs_never_run_in_this_process(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("evaluated here")

    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, forbidden)
    for grader in text.GRADERS.values():
        grader(["p"], ["xs"], ["[x for x in xs]"])


# --- training data


def small_pool():
    problems = text.generate("choice", 40, "train", 0, 9) + text.generate("math", 40, "train", 0, 9)
    tokenizer = text.Tokenizer.of(problems, False)
    return tokenizer, tokenizer.rows([p.prompt for p in problems], [p.answer for p in problems])


def test_masks_have_lladas_law_and_weights():
    tokenizer, pool = small_pool()
    start, n = tokenizer.prompt_length, tokenizer.answer_length
    states, clean, masked, weight = text.sample_masks(4000, torch.Generator().manual_seed(0), pool, start)
    assert torch.equal(torch.where(masked, clean, states[0]), clean) and torch.equal(masked, states[0] == text.MASK)
    assert not masked[:, :start].any()
    counts = Counter(masked.sum(-1).tolist())
    assert set(counts) == set(range(1, n + 1)) and max(counts.values()) < 1.6 * 4000 / n  # uniform
    per_row = (weight * masked).sum(-1)  # 1/m each, m of them: the same for every row
    assert torch.allclose(per_row, per_row[:1].expand(4000))
    assert (weight * masked).sum() / masked.sum() == pytest.approx(1)
    _, clean, masked, _ = text.sample_masks(500, torch.Generator().manual_seed(0), pool, start, prompt_share=1.0)
    assert masked[:, :start].any() and not masked[:, :start][clean[:, :start] == text.PAD].any()


def test_revisions_never_edit_prompts_and_never_propose_the_truth():
    tokenizer, pool = small_pool()
    start, seen = tokenizer.prompt_length, []

    def base(tokens):  # likes whatever: the truth is among its favourites often enough
        seen.append(tokens)
        return torch.randn(*tokens.shape, tokenizer.vocabulary, generator=torch.Generator().manual_seed(1))

    states, clean, editable = text.sample_revision(2000, torch.Generator().manual_seed(0), pool, start, base, 0.3, 8)
    assert torch.equal(editable[0], torch.arange(clean.shape[1]) >= start)
    for state in states:
        absent = state == -1
        assert torch.equal(torch.where(absent, clean, state)[:, :start], clean[:, :start])
    assert torch.equal(seen[0][:, :start], clean[:, :start])  # the probe reads the whole prompt
    first = states[-1][(states[0] == -1).all(-1) | (len(states) == 1)]  # rows at turn 0 have no history
    wrong = (states[-1] != clean) & (states[-1] != text.MASK) & editable
    assert wrong.any() and (seen[0][wrong] == text.MASK).all()  # what starts wrong was masked in the probe
    assert ((states[-1] == text.MASK) | ~editable).all(-1).any() and len(first)  # the empty answer is among the states
    oldest = torch.stack([states[(states[:, i, 0] != -1).nonzero()[0, 0], i] for i in range(2000)])
    share = ((oldest != text.MASK) & editable).sum() / editable.sum()
    assert share.item() == pytest.approx(0.3, abs=0.03)
    assert ((oldest != clean) | ~editable).all()  # at turn 0 nothing is right yet: a proposal is never the truth


def test_drafts_are_right_as_often_as_the_base_draws_the_truth():
    tokenizer, pool = small_pool()
    start = tokenizer.prompt_length
    p_truth, second = 0.7, tokenizer.vocabulary - 1  # the base gives the truth 0.7 and one other token 0.3

    def base(tokens):
        clean = clean_of[0]
        logits = torch.full((*tokens.shape, tokenizer.vocabulary), -50.0)
        other = torch.where(clean == second, second - 1, second)
        logits.scatter_(-1, other.unsqueeze(-1), math.log(1 - p_truth))
        return logits.scatter_(-1, clean.unsqueeze(-1), math.log(p_truth))

    picks = torch.randint(len(pool), (4000,), generator=torch.Generator().manual_seed(0))
    clean_of = [pool[picks]]  # what sample_revision draws first with that seed
    states, clean, editable = text.sample_revision(
        4000, torch.Generator().manual_seed(0), pool, start, base, corruption=0.3, top_k=4, drafts=True
    )
    assert torch.equal(clean, clean_of[0])
    oldest = torch.stack([states[(states[:, i, 0] != -1).nonzero()[0, 0], i] for i in range(4000)])
    drafted = (oldest != text.MASK) & editable
    assert (drafted.sum() / editable.sum()).item() == pytest.approx(0.3, abs=0.03)
    assert (oldest == clean)[drafted].float().mean().item() == pytest.approx(p_truth, abs=0.02)
    assert (oldest[drafted & (oldest != clean)] >= second - 1).all()


# --- decoding and reports


def arguments(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["train_text.py", *map(str, given)])
    args = text.parse_arguments()
    args.device, args.precision = torch.device("cpu"), args.precision or "float32"
    return args


def fields(tokenizer):
    return {key: getattr(tokenizer, key) for key in ("symbols", "words", "prompt_length", "answer_length")}


class Scripted(torch.nn.Module):
    """Knows the answers; its first reveal is wrong, and when the answer is complete it doubts that."""

    def __init__(self, clean, vocabulary, start):
        super().__init__()
        self.clean, self.start, self.calls = clean, start, 0
        self.embedding = torch.nn.Parameter(torch.eye(vocabulary))

    def forward(self, x):
        self.calls += 1
        tokens, wanted = x.argmax(-1), self.clean[: len(x)].clone()
        first = tokens[:, self.start]
        if self.calls == 1:
            wanted[:, self.start] = text.END  # a wrong reveal
        else:  # once the answer is complete, it doubts a wrong first token
            doubted = (tokens != text.MASK).all(-1) & (first != wanted[:, self.start])
            wanted[:, self.start] = torch.where(doubted, text.MASK, wanted[:, self.start])
        return 9.0 * torch.nn.functional.one_hot(wanted, len(self.embedding)).float()


def test_revision_repairs_what_low_confidence_decoding_leaves_wrong(monkeypatch):
    args = arguments(monkeypatch, "--passes", 6)
    problems = text.generate("math", 4, "test", 0, 9)
    tokenizer = text.Tokenizer.of(problems, False)
    clean = tokenizer.rows([p.prompt for p in problems], [p.answer for p in problems])
    info = dict(gamma=0.0, rotate=False, tokenizer=fields(tokenizer), haste=[(1, 2.0)])
    for variant, right in (("rm", 1), ("sft", 0)):
        model = Scripted(clean, tokenizer.vocabulary, tokenizer.prompt_length)
        score = text.evaluate(model, info | {"variant": variant}, problems, "result", 6, args)
        assert score["accuracy"] == right == score["repaired"] and score["broken"] == score["replayed"] == 0
        assert score["remasks"] == right and score["mean_passes"] <= 6 and score["right"] == str(right) * 4
        assert score["false_steps"] == 1 - right
    args.remask_limit = 0
    model = Scripted(clean, tokenizer.vocabulary, tokenizer.prompt_length)
    assert text.evaluate(model, info | {"variant": "rm"}, problems, "result", 6, args)["accuracy"] == 0


def test_every_method_makes_at_most_the_passes_it_may_and_leaves_prompts_alone(monkeypatch):
    args = arguments(monkeypatch)
    tokenizer, pool = small_pool()
    torch.manual_seed(0)
    config = rm.TransformerConfig(tokenizer.vocabulary, tokenizer.length, 16, 1, 2, 32, "rotary")
    model = rm.MaskDiffusionTransformer(config)
    torch.nn.init.normal_(model.blocks[0].attention_out.weight)
    rows = pool[:10].clone()
    rows[:, tokenizer.prompt_length :] = text.MASK
    for variant, (_, gamma, rotate) in text.VARIANTS.items():
        for passes in (1, 3, 8, tokenizer.answer_length, 2 * tokenizer.answer_length):
            calls = []
            handle = model.register_forward_hook(lambda *_: calls.append(1))
            info = dict(variant=variant, gamma=gamma, rotate=rotate, tokenizer=fields(tokenizer), haste=[(1, 2.0)])
            (result,) = text.decode(model, info, rows, passes, args)
            handle.remove()
            assert len(calls) <= passes and (result.tokens != text.MASK).all()
            for state in result.trace:
                assert torch.equal(state[:, : tokenizer.prompt_length], rows[:, : tokenizer.prompt_length])
            if variant == "sft":  # spends its passes evenly and never takes anything back
                reveals = (result.trace == text.MASK).sum(-1).diff(dim=0).neg()
                assert len(calls) == min(passes, tokenizer.answer_length) + (passes > tokenizer.answer_length)
                reveals = reveals[: min(passes, tokenizer.answer_length)]
                assert reveals.max() - reveals.min() <= 1 and (reveals.diff(dim=0) <= 0).all()
                assert ((result.trace[:-1] == text.MASK) | (result.trace[:-1] == result.trace[1:])).all()


def test_paired_bootstrap_agrees_with_the_normal_interval():
    rng = random.Random(0)
    theirs = "".join("01"[rng.random() < 0.6] for _ in range(2000))
    ours = "".join(t if rng.random() < 0.8 else "01"[rng.random() < 0.8] for t in theirs)
    d = [int(a) - int(b) for a, b in zip(ours, theirs)]
    mean = sum(d) / 2000
    half = 1.96 * (sum((x - mean) ** 2 for x in d) / 2000) ** 0.5 / 2000**0.5
    found = text.paired_bootstrap(ours, theirs)
    assert found["difference"] == pytest.approx(mean) and found["n"] == 2000
    assert found["ci95"] == pytest.approx((mean - half, mean + half), abs=2e-3)
    assert text.paired_bootstrap("1111", "1111")["ci95"] == (0, 0)


def test_haste_and_doubt_are_chosen_by_validation_and_looked_up_by_passes(monkeypatch):
    assert [text.chosen_at([(2, 1.0), (4, 2.0), (8, 3.0)], p) for p in (1, 2, 5, 8, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    best = {4: (2.0, 0.0), 8: (1.0, 3.0)}
    monkeypatch.setattr(text, "evaluate", lambda model, info, problems, grader, passes, args: {
        "accuracy": -abs(info["haste"][0][1] - best[passes][0]) - abs(info["doubt"][0][1] - best[passes][1])})
    info = {"haste": [(1, 2.0)], "graders": {"math": "result"}, "tokenizer": {"answer_length": 8}}
    args = SimpleNamespace(passes=[4, 8], haste=[1.0, 2.0, 3.0], doubt=[0.0, 3.0])
    math = {"math": [text.Problem("", "", "algebra")]}
    found = text.choose_decoding(None, info, math, args)
    assert found == {"haste": [(4, 2.0), (8, 1.0)], "doubt": [(4, 0.0), (8, 3.0)]}
    asked = []  # choice has no say where others have
    monkeypatch.setattr(
        text, "evaluate", lambda model, info, problems, *rest: asked.append(problems) or {"accuracy": 0}
    )
    problems = {name: [text.Problem("", "", name)] for name in ("math", "choice")}
    text.choose_decoding(None, info | {"graders": dict.fromkeys(problems)}, problems, args)
    assert asked and all(given == problems["math"] for given in asked)
    args.haste, args.doubt = [1.5], [0.5]  # nothing to choose
    found = text.choose_decoding(None, info, math, args)
    assert found == {"haste": [(4, 1.5), (8, 1.5)], "doubt": [(4, 0.5), (8, 0.5)]}


def test_doubt_moves_the_threshold_of_remasking_alone():
    """Re-masked where p(M) > exp(-doubt) p(x), by loops over the probabilities; the reveals are Eq. 1's."""
    tokenizer, pool = small_pool()
    torch.manual_seed(3)
    config = rm.TransformerConfig(tokenizer.vocabulary, tokenizer.length, 16, 1, 2, 32, "both")
    model = rm.MaskDiffusionTransformer(config).eval()
    for weight in (model.embedding, model.blocks[0].attention_out.weight, model.head.weight):
        torch.nn.init.normal_(weight)  # logits far enough apart that some tokens are re-masked
    rows = pool[:20].clone()
    rows[:, -1] = text.MASK
    probability = model(text.history_embedding(rows.unsqueeze(0), model.embedding, 0.0)).softmax(-1)
    remasked = {}
    for doubt in (-1.5, 0.0, 1.5):
        info = dict(variant="rm", gamma=0.0, rotate=False, tokenizer=fields(tokenizer), haste=[(1, 1.0)])
        info |= {"doubt": [(1, doubt)]} if doubt else {}
        args = SimpleNamespace(precision="float32", remask_limit=None)
        after = text.decode(model, info, rows, 2, args)[0].trace[1]
        remasked[doubt] = 0
        for i, j in [(i, j) for i in range(20) for j in range(tokenizer.prompt_length, tokenizer.length - 1)]:
            p = probability[i, j]
            expected = text.MASK if p[text.MASK] > math.exp(-doubt) * p[rows[i, j]] else rows[i, j]
            assert after[i, j] == expected
            remasked[doubt] += int(expected == text.MASK)
        assert (after[:, -1] == probability[:, -1, 1:].argmax(-1) + 1).all()
    assert 0 < remasked[-1.5] < remasked[0.0] < remasked[1.5]


def test_a_reveal_that_may_go_wrong():
    """Every state of reveal_trajectory, by loops over its rows, with a base whose mistakes are known."""
    generator, answer = torch.Generator().manual_seed(0), 8
    clean = torch.randint(3, 9, (400, 3 + answer), generator=generator)
    rank = torch.stack([torch.randperm(answer, generator=generator) for _ in clean])
    order = torch.cat([torch.full((400, 3), 99), rank], 1)
    masks = torch.randint(1, answer + 1, (400, 1), generator=generator)
    best = torch.randint(3, 9, clean.shape, generator=generator)
    sure = torch.rand(clean.shape, generator=generator)
    logits = 5 * torch.nn.functional.one_hot(best, 9) * (1 + sure.unsqueeze(-1))
    logits[..., text.MASK] = 99.0  # never revealed
    only_before = torch.arange(400) >= 300
    states = text.reveal_trajectory(clean, logits, order, masks, answer, generator, 4, only_before)
    kinds = []
    for row in range(400):
        seen = [state for state in states[:, row] if state[0] != text.ABSENT]
        assert all(torch.equal(state[:3], clean[row, :3]) for state in seen)
        assert (seen[0][3:] == text.MASK).all()
        left = [int((state == text.MASK).sum()) for state in seen]
        m, now = int(masks[row]), seen[-1]
        masked = order[row] < m
        wrong = [(i, state) for state in seen for i in range(3, 11) if state[i] not in (text.MASK, clean[row, i])]
        if not wrong and left[-1] == m and torch.equal(now == text.MASK, masked):  # before the base's reveal
            assert torch.equal(now, clean[row].masked_fill(masked, text.MASK)) and left == sorted(left, reverse=True)
            kinds.append("before")
            continue
        draft = wrong[0][1] if wrong else now
        filled = (draft != text.MASK) & masked
        chosen = [i for i in range(11) if filled[i] and draft[i] != clean[row, i]]
        assert all(draft[i] == best[row, i] for i in chosen)
        for i in chosen:  # whatever the base was surer of was revealed, too
            assert all(filled[j] for j in range(11) if masked[j] and sure[row, j] > sure[row, i])
        if wrong and now is not draft:
            assert torch.equal(now, draft.masked_fill(draft != clean[row], text.MASK))
        kinds.append("remasked" if wrong and not torch.equal(now, draft) else "after")
    assert set(kinds[300:]) == {"before"}
    kinds = kinds[:300]
    assert 0.2 < kinds.count("before") / 300 < 0.5 and kinds.count("after") > 90 and kinds.count("remasked") > 15


def test_rows_in_a_parallel_reveal_mix_with_the_others():
    tokenizer, pool = small_pool()
    for remember in (1, 8):
        states, clean, editable = text.sample_revision(
            64, torch.Generator().manual_seed(0), pool, tokenizer.prompt_length,
            lambda tokens: torch.zeros(*tokens.shape, tokenizer.vocabulary), reveals=0.5, remember=remember,
        )
        start = tokenizer.prompt_length
        assert torch.equal(states[-1, :, :start], clean[:, :start]) and not (states[-1] == text.ABSENT).any()
        assert editable[:, start:].all() and not editable[:, :start].any()
        present = (states[..., 0] != text.ABSENT).int()
        assert (present.diff(dim=0) >= 0).all() and len({int(n) for n in present.sum(0)}) > 2


def test_plain_rows_lack_tokens_and_have_none_wrong():
    tokenizer, pool = small_pool()
    start, seen = tokenizer.prompt_length, {}
    for plain, remember in ((0.0, 1), (0.5, 1), (1.0, 1), (1.0, 8)):
        states, clean, _ = text.sample_revision(
            400, torch.Generator().manual_seed(0), pool, start, corruption=0.5, plain=plain, remember=remember,
            base=lambda tokens: torch.zeros(*tokens.shape, tokenizer.vocabulary),
        )
        now = states[-1]
        wrong = ((now != clean) & (now != text.MASK)).any(-1)
        masks = (now == text.MASK)[:, start:].sum(-1)
        seen[plain, remember] = wrong.float().mean().item()
        if plain == 1:  # nothing was ever wrong, and the number of masks is log-uniform in 1..N
            assert ((states == clean) | (states == text.MASK) | (states == text.ABSENT)).all()
            length = clean.shape[1] - start
            assert masks.min() == 1 and masks.max() == length
            expected = math.log(4 / 2) / math.log(length + 1)  # two or three are masked
            assert abs(((masks == 2) | (masks == 3)).float().mean() - expected) < 0.07
        prompt_stays = (states[..., :start] == clean[:, :start]) | (states[..., :start] == text.ABSENT)
        assert prompt_stays.all() and not (now == text.ABSENT).any()
    assert abs(seen[0.5, 1] - seen[0.0, 1] / 2) < 0.08 and seen[0.0, 1] > 0.3
    shares = []
    for plain in (0.0, 0.5):  # the setting of the run of record, drafts from a base that knows nothing
        states, clean, _ = text.sample_revision(
            600, torch.Generator().manual_seed(1), pool, start, corruption=0.5, drafts=True, reveals=0.25, plain=plain,
            base=lambda tokens: torch.zeros(*tokens.shape, tokenizer.vocabulary),
        )
        shares.append(((states[-1] != clean) & (states[-1] != text.MASK)).any(-1).float().mean().item())
    assert shares[1] < 0.7 * shares[0] and shares[1] > 0.1


def test_budgets_and_pace():
    assert text.budgets(32) == [2, 4, 8, 16, 32, 64] and text.budgets(1) == [1, 2]
    assert [text.pace(*case) for case in ((32, 8, 1.0), (32, 8, 2.0), (32, 64, 2.0), (10, 1, 2.0))] == [4, 8, 1, 10]


def test_a_handful_of_problems_is_learned_to_the_last(monkeypatch):
    args = arguments(monkeypatch, "--width", 64, "--layers", 2, "--batch-size", 8, "--tuning-rate", 5e-3)
    problems = text.generate("math", 4, "train", 1, 9)
    tokenizer = text.Tokenizer.of(problems, False)
    pool = tokenizer.rows([p.prompt for p in problems], [p.answer for p in problems])
    info = dict(tokenizer=fields(tokenizer), haste=[(1, 2.0)])
    for variant in ("sft", "rm"):
        base = model = text.new_model(tokenizer, args)
        for _ in text.stage(variant, model, base, pool, tokenizer, args, 250):
            pass
        info |= dict(variant=variant, gamma=0.0, rotate=False)
        score = text.evaluate(model.eval(), info, problems, "exact", tokenizer.answer_length, args)
        assert score["accuracy"] == 1, variant


# --- the command line


def run(*given, timeout=300):
    command = [sys.executable, str(ROOT / "train_text.py"), *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


def in_process(monkeypatch, capsys, *given):
    monkeypatch.setattr(sys, "argv", ["train_text.py", *map(str, given)])
    text.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All families and variants, tiny; its checkpoints serve the other tests."""
    out = tmp_path_factory.mktemp("text")
    done = run("--smoke", "--task", "all", "--history", "--out", out, "--json", out / "result.json")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("wrote "):
            assert Path(line.split(" ", 1)[1]).stat().st_size > 0
    names = {f"all_{variant}_seed0.{end}" for variant in text.VARIANTS for end in ("pt", "json")}
    assert names <= {path.name for path in out.iterdir()}
    assert not list(out.glob("*.resume.pt")) and not list(out.glob("*.tmp"))
    assert "MBPP" in done.stdout and "precalculus" in done.stdout and "minus SFT" in done.stdout
    return out


def test_the_bare_command_reports_what_was_asked(smoke):
    result = json.loads((smoke / "result.json").read_text())
    assert set(result["scores"]) == set(text.VARIANTS) and set(result["minus_sft"]) == {"rm", "history"}
    score = result["scores"]["rm"]["math"][0]
    assert set("accuracy ci95 n passes repaired broken replayed subjects false_steps".split()) <= set(score)
    assert set(score["subjects"]) == set(text.PAPER_SUBJECTS) and len(score["right"]) == score["n"] == 14
    record = result["records"]["rm"]
    assert {"steps", "minutes", "params", "provenance", "curve"} <= set(record)


def test_finished_stages_are_kept_and_other_settings_refused(smoke, monkeypatch, capsys):
    common = ("--smoke", "--task", "all", "--history", "--out", smoke)
    assert in_process(monkeypatch, capsys, *common).count("is done") == 4
    with pytest.raises(text.InputError, match="corruption"):
        in_process(monkeypatch, capsys, *common, "--corruption", "0.2")


def test_another_evaluation_scores_again_and_another_tuning_shares_the_base(smoke, monkeypatch, capsys, tmp_path):
    for path in smoke.glob("all_base_seed0.*"):
        shutil.copy(path, tmp_path)
    common = ("--smoke", "--task", "all", "--tuning-rate", "0.001", "--out", tmp_path)
    trained = in_process(monkeypatch, capsys, *common)
    assert trained.count("is done") == 1 and "base_seed0.json is there" in trained
    before = (tmp_path / "all_rm_seed0.pt").read_bytes()
    scored = in_process(monkeypatch, capsys, *common, "--passes", 2)
    assert scored.count("is done") == 3 and "math, 2 passes" in scored and "math, 3 passes" not in scored
    assert before == (tmp_path / "all_rm_seed0.pt").read_bytes()
    scores = json.loads((tmp_path / "all_rm_seed0.json").read_text())["test"]["math"]
    assert [score["passes"] for score in scores] == [2]


def test_a_killed_run_goes_on_where_it_stopped(smoke, monkeypatch, capsys):
    evaluate, calls = text.evaluate, []

    def stop(*given, **options):
        calls.append(1)
        if len(calls) == 8:  # in the middle of SFT: a stage is scored four times while it trains, once at its end
            raise KeyboardInterrupt
        return evaluate(*given, **options)

    common = ("--smoke", "--task", "choice", "--device", "cpu")
    in_process(monkeypatch, capsys, *common, "--out", smoke / "unbroken")
    monkeypatch.setattr(text, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        in_process(monkeypatch, capsys, *common, "--out", smoke / "killed")
    assert list((smoke / "killed").glob("*.resume.pt"))
    monkeypatch.setattr(text, "evaluate", evaluate)
    in_process(monkeypatch, capsys, *common, "--out", smoke / "killed")
    for name in ("choice_sft_seed0.pt", "choice_rm_seed0.pt"):
        one, two = (torch.load(smoke / run / name, weights_only=True)["model"] for run in ("unbroken", "killed"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_killed_while_it_is_scored_is_scored_again(smoke, monkeypatch, capsys):
    common = ("--smoke", "--task", "choice", "--device", "cpu", "--out", smoke / "scoring")
    scoring = text.evaluate_all
    monkeypatch.setattr(text, "evaluate_all", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        in_process(monkeypatch, capsys, *common)
    monkeypatch.setattr(text, "evaluate_all", scoring)
    in_process(monkeypatch, capsys, *common)
    record = json.loads((smoke / "scoring" / "choice_base_seed0.json").read_text())
    assert record["minutes"] > 0 and record["steps"] == 4 and record["test"]


def test_ask_shows_marked_turns(smoke, monkeypatch, capsys):
    common = ("--checkpoint", smoke / "all_rm_seed0.pt", "--json", smoke / "ask.json", "--passes", 4)
    shown = in_process(monkeypatch, capsys, "--ask", "solve 3x+5=20", *common)
    assert "turn  1" in shown and "(" in shown and "\033" not in shown
    assert set(json.loads((smoke / "ask.json").read_text())) == {"prompt", "answer", "turns", "status"}
    tokenizer = text.Tokenizer(["a", "b"], False, 1, 3)
    assert text.show_state([3, 0, 4, 0], [0, 3, 4, 0], tokenizer, color=False) == "(a)[_]b_"
    assert text.show_state([3, 0, 4], [0, 3, 4], tokenizer, color=True) == "\033[32;1ma\033[0m\033[33;7m_\033[0mb"


def test_evaluate_scores_a_checkpoint(smoke, monkeypatch, capsys):
    path = smoke / "evaluate.json"
    common = ("--evaluate", "--checkpoint", smoke / "all_sft_seed0.pt", "--n", 14, "--passes", 2, "--json", path)
    in_process(monkeypatch, capsys, *common, "--task", "code")
    result = json.loads(path.read_text())
    assert list(result["scores"]) == ["code"] and result["scores"]["code"][0]["n"] == 14 and result["params"] > 0
    (smoke / "mine.jsonl").write_text('{"prompt": "3*4+5*6", "answer": "42"}\n')
    in_process(monkeypatch, capsys, *common, "--test", smoke / "mine.jsonl", "--grader", "last_number")
    assert list(json.loads(path.read_text())["scores"]) == ["mine"]


@pytest.mark.parametrize("option", ["--haste", "--doubt", "--remask-limit"])
def test_a_model_that_never_revises_refuses_options_of_revision(smoke, monkeypatch, capsys, option):
    with pytest.raises(rm.InputError, match="never revises"):
        in_process(monkeypatch, capsys, "--evaluate", "--checkpoint", smoke / "all_sft_seed0.pt", option, "1")


def test_own_data_trains_and_leaves_test_prompts_out(tmp_path, monkeypatch, capsys):
    pairs = [(a, b) for a in range(6) for b in range(5)]
    lines = [json.dumps({"prompt": f"say {a} {b}", "answer": f"{a} {b}"}) for a, b in pairs]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.jsonl").write_text("\n".join(lines[20:25]) + "\n")
    common = ("--smoke", "--data", tmp_path / "train.jsonl", "--test", tmp_path / "test.jsonl")
    shown = in_process(monkeypatch, capsys, *common, "--words", "--out", tmp_path / "out")
    assert "5 of 30 training problems" in shown and (tmp_path / "out/train_rm_seed0.pt").exists()
    _, info = rm.load_checkpoint(tmp_path / "out/train_rm_seed0.pt", "text")
    assert info["tokenizer"]["words"] and "say" in info["tokenizer"]["symbols"]
    assert info["graders"] == {"train": "exact"}


def test_multiplication_leaves_the_given_test_out(tmp_path, monkeypatch, capsys):
    test = text.generate("multiply", 3, "train", 0, 9)  # the very problems that training would start with
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in test))
    shown = in_process(monkeypatch, capsys, "--smoke", "--task", "multiply", "--test", path, "--out", tmp_path)
    assert "3 of 200 training problems" in shown


BAD = {
    "malformed line": (["--data", "{tmp}/bad.jsonl", "--test", "{tmp}/good.jsonl"], "bad.jsonl line 2 is no JSON"),
    "empty line": (["--data", "{tmp}/good.jsonl", "--test", "{tmp}/gap.jsonl"], "gap.jsonl line 2 is empty"),
    "empty file": (["--data", "{tmp}/empty.jsonl", "--test", "{tmp}/good.jsonl"], "empty.jsonl is empty"),
    "no answer": (["--data", "{tmp}/keys.jsonl", "--test", "{tmp}/good.jsonl"], "keys.jsonl line 1"),
    "an empty answer": (["--data", "{tmp}/blank.jsonl", "--test", "{tmp}/good.jsonl"], "blank.jsonl line 1"),
    "missing data": (["--data", "nowhere.jsonl", "--test", "{tmp}/good.jsonl"], "nowhere.jsonl"),
    "all of it tested": (["--data", "{tmp}/good.jsonl", "--test", "{tmp}/good.jsonl"], "every training problem"),
    "unknown character": (["--data", "{tmp}/good.jsonl", "--test", "{tmp}/other.jsonl"], "other.jsonl line 1"),
    "no such device": (["--device", "cuda:9"], "cuda:9"),
    "missing checkpoint": (["--ask", "1+1", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
    "checkpoint of another task": (["--ask", "1+1", "--checkpoint", "{tmp}/sudoku.pt"], "task 'sudoku'"),
    "unknown character asked": (["--ask", "solve 3x+5=2É", "--checkpoint", "{smoke}/all_rm_seed0.pt"], "'É'"),
    "nothing asked": (["--ask", "", "--checkpoint", "{smoke}/all_rm_seed0.pt"], "0 tokens"),
    "too long a prompt": (["--ask", "1" * 99, "--checkpoint", "{smoke}/all_rm_seed0.pt"], "99 tokens"),
    "another task": (["--evaluate", "--task", "multiply", "--checkpoint", "{smoke}/all_rm_seed0.pt"], "was trained on"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_in_one_line(given, message, smoke, tmp_path, monkeypatch, capsys):
    good = '{"prompt": "a", "answer": "b"}\n'
    files = {"good": good, "bad": good + "{oops\n", "gap": good + "\n" + good, "empty": "", "keys": '{"prompt": "a"}\n',
             "blank": '{"prompt": "a", "answer": ""}\n', "other": '{"prompt": "é", "answer": "b"}\n'}
    for name, contents in files.items():
        (tmp_path / f"{name}.jsonl").write_text(contents)
    config = rm.TransformerConfig(vocabulary=4, length=4, width=16, feed_forward=16, layers=1)
    rm.save_checkpoint(tmp_path / "sudoku.pt", rm.MaskDiffusionTransformer(config), task="sudoku")
    with pytest.raises(text.InputError) as error:
        in_process(monkeypatch, capsys, *(part.format(tmp=tmp_path, smoke=smoke) for part in given))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given", [
    ["--data", "x.jsonl"], ["--task", "all", "--test", "x.jsonl"], ["--ask", "1", "--steps", "3"],
    ["--corruption", "2"],
    ["--reveals", "0.7", "--plain", "0.5"], ["--task", "multiply", "--test", "x.jsonl", "--largest", "20"],
    ["--evaluate", "--history"], ["--minutes", "0"], ["--passes", "0"], ["--checkpoint", "x.pt"], ["--task", "poetry"],
], ids=" ".join)
def test_contradictory_options_exit_with_2(given, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        in_process(monkeypatch, capsys, *given)
    assert error.value.code == 2 and "error" in capsys.readouterr().err


def test_bad_input_ends_with_exit_code_2_and_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    done = run("--data", tmp_path / "bad.jsonl", "--test", tmp_path / "bad.jsonl")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_text.py: error: ")
    done = run("--help")
    options = "--task --data --test --evaluate --ask --seed --device --smoke --json --out"
    assert all(option in done.stdout for option in options.split())


# --- the shipped checkpoint


def test_the_shipped_model_answers(monkeypatch, capsys):
    path = ROOT / "checkpoints/text_rm.pt"
    assert path.stat().st_size <= 4 * 2**20
    shown = in_process(monkeypatch, capsys, "--ask", "sum of all x|4 2:6|3 6:9", "--passes", "35")
    assert "sum(" in shown and "after" in shown
