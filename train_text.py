"""Task 2: text.  A small mask diffusion model writes an answer to a prompt, then revises it.

    python train_text.py                             base, SFT and RM on --task code, 25 minutes of training, table
    python train_text.py --task all --history        math, code and choice mixed, RM with history too
    python train_text.py --evaluate                  score the shipped checkpoint
    python train_text.py --ask "number of x over 3|7 4:2|8 6:2" --passes 9    watch it write and revise
    python train_text.py --data TRAIN.jsonl --test TEST.jsonl --grader exact    {"prompt": ..., "answer": ...} a line

Reading order: text and tokens, tasks, graders, training data, decoding, evaluation, training, reports, command line.
A base model learns plain mask diffusion; from it, with the same data and number of steps, come vanilla SFT and RM.
Differences from the paper: models of a million parameters on generated problems, a prompt that is always intact
in post-training, mistakes proposed by the frozen base where a random share of the rest of the answer is masked too
(sample_revision), Muon, and whatever --help calls ours.
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import reflective_masking as rm
from history import ABSENT, HistoryReference, history_embedding
from reflective_masking import InputError, MaskDiffusionTransformer, TransformerConfig

HERE = Path(__file__).parent
MASK, PAD, END = 0, 1, 2
SPECIAL = ["_", "·", "¶"]  # how the terminal shows them
GAMMA = 0.9  # of RM + history; the paper does not state it
VARIANTS = {  # label, gamma, rotate
    "base": ("base", 0.0, False),
    "sft": ("vanilla SFT", 0.0, False),
    "rm": ("RM", 0.0, False),
    "history": ("RM + history", GAMMA, True),
}
PAPER = {  # LLaDA-8B, base / vanilla SFT / RM, %: tables of arXiv 2606.16700
    "math": ("MATH500", (19.4, 22.4, 24.8)),
    "code": ("MBPP", (28.0, 30.6, 39.4)),
    "choice": ("ARC-Challenge", (73.7, 81.3, 86.1)),
}
PAPER_SUBJECTS = {  # Minerva MATH, SFT / RM, %
    "algebra": (28.90, 29.49),
    "counting & probability": (17.72, 18.35),
    "geometry": (20.67, 20.67),
    "intermediate algebra": (13.07, 14.40),
    "number theory": (17.41, 21.67),
    "prealgebra": (36.28, 38.00),
    "precalculus": (14.10, 16.67),
}


# ---------------------------------------------------------------------------------------------------------------
# Text and tokens


class Problem(NamedTuple):
    prompt: str
    answer: str
    subject: str


@dataclass
class Tokenizer:
    """Characters, or words between single spaces, to ids and back.  Row: PAD... prompt | answer END PAD...

    The prompt is right-aligned, so that the answer starts at the same place in every row; END and PAD belong to the
    answer and are predicted, so answers vary in length.  Saved with the checkpoint by asdict.
    """

    symbols: list[str]
    words: bool
    prompt_length: int
    answer_length: int  # N of the reports: END counted

    @classmethod
    def of(cls, problems: list[Problem], words: bool) -> "Tokenizer":
        """The vocabulary and lengths that hold these problems."""
        split = (lambda text: text.split(" ")) if words else list
        prompts, answers = [split(p.prompt) for p in problems], [split(p.answer) for p in problems]
        symbols = sorted({symbol for text in prompts + answers for symbol in text})
        return cls(symbols, words, max(map(len, prompts)), max(map(len, answers)) + 1)

    def __post_init__(self):
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols, len(SPECIAL))}
        self.vocabulary = len(SPECIAL) + len(self.symbols)
        self.length = self.prompt_length + self.answer_length

    def encode(self, text: str, where: str = "the prompt") -> list[int]:
        """Ids of a text; InputError says where the text stands and which symbol is unknown."""
        try:
            return [self.ids[symbol] for symbol in (text.split(" ") if self.words else text)]
        except KeyError as error:
            kind = "word" if self.words else "character"
            raise InputError(f"{where} has the {kind} {error.args[0]!r}, which the training data lack") from None

    def rows(self, prompts: list[str], answers: list[str] | None = None, where: Callable | None = None) -> Tensor:
        """Prompts, and answers or MASK in their place, as int64 [n, prompt_length + answer_length].

        where: int -> str, how errors name a prompt.
        """
        where = where or (lambda i: "the prompt")
        rows = torch.full((len(prompts), self.length), PAD)
        for i, prompt in enumerate(prompts):
            ids = self.encode(prompt, where(i))
            if not 0 < len(ids) <= self.prompt_length:
                raise InputError(f"{where(i)} has {len(ids)} tokens, the model takes 1 to {self.prompt_length}")
            rows[i, self.prompt_length - len(ids) : self.prompt_length] = torch.tensor(ids)
            if answers is not None:
                ids = self.encode(answers[i], where(i)) + [END]
                rows[i, self.prompt_length : self.prompt_length + len(ids)] = torch.tensor(ids)
        if answers is None:
            rows[:, self.prompt_length :] = MASK
        return rows

    def text(self, ids: list[int]) -> str:
        """The answer that ids, prompt excluded, spell: up to the first END or PAD; a MASK shows as _."""
        ids = ids[: next((i for i, token in enumerate(ids) if token in (END, PAD)), len(ids))]
        return (" " if self.words else "").join(self.show(token) for token in ids)

    def show(self, token: int) -> str:
        return SPECIAL[token] if token < len(SPECIAL) else self.symbols[token - len(SPECIAL)]


# ---------------------------------------------------------------------------------------------------------------
# Tasks.  A template draws from rng one problem with numbers up to about `largest` and returns (prompt, answer).
# Answers to one prompt differ, as those of people do: which product comes first, x*x or x**2.  Any right one counts.


def worked(*steps: str, result) -> str:
    return ";".join(steps) + f"#### {result}"


def plus(rng: random.Random, a: int, b: int) -> str:
    a, b = rng.sample((a, b), 2)
    return f"{a}+{b}={a + b}"


def times(rng: random.Random, a: int, b: int) -> str:
    a, b = rng.sample((a, b), 2)
    return f"{a}*{b}={a * b}"


def sum_of_products(rng, largest):
    a, b, c, d = (rng.randint(2, largest) for _ in range(4))
    steps = rng.sample([times(rng, a, b), times(rng, c, d)], 2)
    return f"{a}*{b}+{c}*{d}", worked(*steps, plus(rng, a * b, c * d), result=a * b + c * d)


def two_heaps(rng, largest):
    a, b, c = rng.randint(2, largest), rng.randint(2, largest), rng.randint(1, 2 * largest)
    first = rng.randint(1, a * b + c - 1)
    second = a * b + c - first
    steps = times(rng, a, b), plus(rng, a * b, c), f"{first}+{second}={a * b + c}"
    return f"{a} boxes of {b} pens and {c}: two heaps?", worked(*steps, result=f"{first},{second}")


def linear_equation(rng, largest):
    a, bracket, b = rng.randint(2, largest), rng.randint(2, largest + 1), rng.randint(1, largest)
    x = rng.randint(1, bracket - 1)
    p, c = bracket - x, a * bracket + b
    solving = f"{c}-{b}={c - b};{c - b}/{a}={bracket};{bracket}-{p}={x}"
    checking = f"{plus(rng, x, p)};{times(rng, a, bracket)};{plus(rng, a * bracket, b)}"
    return f"solve {a}(x+{p})+{b}={c}", worked(rng.choice((solving, checking)), result=x)


def two_unknowns(rng, largest):
    a, x, y = rng.randint(2, largest), rng.randint(1, 2 * largest), rng.randint(1, largest)
    return f"x+{a}y={x + a * y}: x, y?", worked(times(rng, a, y), plus(rng, x, a * y), result=f"{x},{y}")


def other_root(rng, largest):
    p, q = rng.randint(1, 2 * largest), rng.randint(1, 2 * largest)
    steps = rng.sample([f"{p + q}-{p}={q}", f"{p * q}/{p}={q}"], 2)
    return f"x^2-{p + q}x+{p * q}, one root {p}: other?", worked(*steps[: rng.randint(1, 2)], result=q)


def three_unknowns(rng, largest):
    brackets, z = [rng.randint(2, largest) for _ in "xy"], rng.randint(1, largest)
    x, y = (rng.randint(1, bracket - 1) for bracket in brackets)
    p, q, product = brackets[0] - x, brackets[1] - y, math.prod(brackets)
    steps = plus(rng, x, p), plus(rng, y, q), times(rng, *brackets), plus(rng, product, z)
    return f"(x+{p})(y+{q})+z={product + z}: x, y, z?", worked(*steps, result=f"{x},{y},{z}")


def greatest_common_divisor(rng, largest):
    while True:
        g, m, n = (rng.randint(2, largest) for _ in range(3))
        if math.gcd(m, n) == 1:
            return f"gcd of {g * m} and {g * n}", worked(*rng.sample([times(rng, g, m), times(rng, g, n)], 2), result=g)


def number_with_remainder(rng, largest):
    b, quotient = rng.randint(3, largest), rng.randint(1, largest)
    rest = rng.randint(1, b - 1)
    number = b * quotient + rest
    steps = times(rng, b, quotient), plus(rng, b * quotient, rest)
    return f"over {rng.randint(1, number - 1)}, leaves {rest} by {b}: number?", worked(*steps, result=number)


def outfits(rng, largest):
    while True:
        a, b, c = (rng.randint(2, largest) for _ in range(3))
        if a + b <= largest + 1:
            break
    hats_first = f"{plus(rng, a, b)};{times(rng, a + b, c)}"
    coats_first = ";".join(rng.sample([times(rng, a, c), times(rng, b, c)], 2)) + f";{plus(rng, a * c, b * c)}"
    way = rng.choice((hats_first, coats_first))
    return f"{a} red, {b} blue hats, {c} coats: outfits?", worked(way, result=(a + b) * c)


def red_and_blue(rng, largest):
    share, whole = sorted(rng.sample(range(1, largest + 1), 2))
    k = rng.randint(1, largest)
    red, balls = k * share, k * whole
    steps = *rng.sample([times(rng, k, share), times(rng, k, whole)], 2), f"{balls}-{red}={balls - red}"
    prompt = f"{share}/{whole} red, over {rng.randint(1, balls - 1)} balls: red, blue?"
    return prompt, worked(*steps, result=f"{red},{balls - red}")


def frame_area(rng, largest):
    a, b, c, d = rng.randint(3, largest), rng.randint(3, largest), rng.randint(1, 3), rng.randint(1, 3)
    steps = rng.sample([times(rng, a, b), times(rng, c, d)], 2)
    left = a * b - c * d
    return f"{a} by {b}, hole {c} by {d}: area?", worked(*steps, f"{a * b}-{c * d}={left}", result=left)


def rectangle(rng, largest):
    a, b = rng.randint(1, 4 * largest), rng.randint(2, 4 * largest)
    steps = f"{2 * (a + b)}/2={a + b}", f"{a}+{b}={a + b}"
    prompt = f"perimeter {2 * (a + b)}, a side over {rng.randint(1, max(a, b) - 1)}: sides?"
    return prompt, worked(*steps, result=f"{a},{b}")


def dot_product(rng, largest):
    a, b, c, d = (rng.randint(1, largest) for _ in range(4))
    steps = rng.sample([times(rng, a, c), times(rng, b, d)], 2)
    return f"({a},{b}) dot ({c},{d})", worked(*steps, plus(rng, a * c, b * d), result=a * c + b * d)


def arithmetic_sequence(rng, largest):
    first, step, n = rng.randint(1, 2 * largest), rng.randint(1, largest), rng.randint(3, largest + 1)
    grown = step * (n - 1)
    steps = f"{n}-1={n - 1}", times(rng, step, n - 1), plus(rng, first, grown)
    return f"term {n} is {first + grown}: first, step?", worked(*steps, result=f"{first},{step}")


# Math prompts with several right results: whether a result of positive numbers solves the prompt's numbers n.
SOLVES = {
    r"\d+ boxes of \d+ pens and \d+: two heaps\?": lambda n, a, b: a + b == n[0] * n[1] + n[2],
    r"x\+\d+y=\d+: x, y\?": lambda n, x, y: x + n[0] * y == n[1],
    r"\(x\+\d+\)\(y\+\d+\)\+z=\d+: x, y, z\?": lambda n, x, y, z: (x + n[0]) * (y + n[1]) + z == n[2],
    r"over \d+, leaves \d+ by \d+: number\?": lambda n, a: a > n[0] and n[2] > n[1] and a % n[2] == n[1],
    r"\d+/\d+ red, over \d+ balls: red, blue\?":
        lambda n, red, blue: red * n[1] == (red + blue) * n[0] and red + blue > n[2],
    r"perimeter \d+, a side over \d+: sides\?": lambda n, a, b: 2 * (a + b) == n[0] and max(a, b) > n[1],
    r"term \d+ is \d+: first, step\?": lambda n, first, step: first + step * (n[0] - 1) == n[1],
}

CONDITIONS = {  # in words: (as Python tests, any of them)
    "evens": ["x%2==0", "x%2<1"],
    "odds": ["x%2==1", "x%2>0"],
    "x over {k}": ["x>{k}", "{k}<x"],
    "x under {k}": ["x<{k}", "{k}>x"],
    "all x": [""],
}
MAPS = {
    "": ["x"],
    "squares of ": ["x*x", "x**2"],
    "doubles of ": ["2*x", "x*2", "x+x"],
    "{m} more than ": ["x+{m}", "{m}+x"],
    "{m} times ": ["{m}*x", "x*{m}"],
    "minus ": ["-x", "0-x"],
}
FINISHES = {  # with {e} for "... for x in {xs} ...": (over what, the expression)
    "": [("xs", "[{e}]")],
    "sorted ": [("xs", "sorted({e})")],
    "reversed ": [("xs", "[{e}][::-1]"), ("xs[::-1]", "[{e}]")],
    "sum of ": [("xs", "sum({e})"), ("xs", "sum([{e}])")],
    "largest of ": [("xs", "max({e})")],
    "number of ": [("xs", "len([{e}])"), ("xs", "sum(1 for x in xs{test})")],
}


def describe_and_program(rng, largest):
    """A specification in words with two examples; the answer is one of its programs."""
    condition, finish = rng.choice(list(CONDITIONS)), rng.choice(list(FINISHES))
    mapping = "" if finish == "number of " else rng.choice(list(MAPS))
    k, m = rng.randint(1, largest - 1), rng.randint(2, largest)
    test, value = rng.choice(CONDITIONS[condition]), rng.choice(MAPS[mapping])
    over, whole = rng.choice(FINISHES[finish])
    test = f" if {test}" if test else ""
    program = whole.format(e=f"{value} for x in {over}{test}", test=test).format(k=k, m=m)
    words = f"{finish}{mapping}{condition}".format(k=k, m=m)
    examples = []
    while len(examples) < 2:
        xs = [rng.randint(0, largest) for _ in range(2)]
        shown = run_described(finish, mapping, condition, k, m, xs)
        if shown is not None:
            xs, shown = " ".join(map(str, xs)), " ".join(map(str, shown if isinstance(shown, list) else [shown]))
            examples.append(f"|{xs}:{shown}")
    return words + "".join(examples), program


def run_described(finish: str, mapping: str, condition: str, k: int, m: int, xs: list[int]) -> list[int] | int | None:
    """What the words mean, without any program text; None where there is no largest."""
    keep = {
        "evens": lambda x: x % 2 == 0,
        "odds": lambda x: x % 2 == 1,
        "x over {k}": lambda x: x > k,
        "x under {k}": lambda x: x < k,
        "all x": lambda x: True,
    }[condition]
    value = {
        "": lambda x: x,
        "squares of ": lambda x: x**2,
        "doubles of ": lambda x: 2 * x,
        "{m} more than ": lambda x: x + m,
        "{m} times ": lambda x: m * x,
        "minus ": lambda x: -x,
    }[mapping]
    values = [value(x) for x in xs if keep(x)]
    return {
        "": lambda: values,
        "sorted ": lambda: sorted(values),
        "reversed ": lambda: values[::-1],
        "sum of ": lambda: sum(values),
        "largest of ": lambda: max(values, default=None),
        "number of ": lambda: len(values),
    }[finish]()


def which_is(rng, largest):
    """Four options, one right: a product, a sum, the next of a sequence, the largest."""
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(2, largest), rng.randint(2, largest)
        question, right = f"{a}*{b}", a * b
    elif kind == 1:
        a, b = rng.randint(10, 5 * largest), rng.randint(10, 5 * largest)
        question, right = f"{a}+{b}", a + b
    elif kind == 2:
        first, step = rng.randint(1, 4 * largest), rng.randint(2, largest)
        question, right = f"next of {first}, {first + step}, {first + 2 * step}", first + 3 * step
    else:
        question, right = "the largest", rng.randint(10, 10 * largest)
    low, high = (1, right - 1) if kind == 3 else (max(1, right - 10), right + 10)
    options = rng.sample([value for value in range(low, high + 1) if value != right], 3)
    options.insert(place := rng.randrange(4), right)
    return f"{question}? " + " ".join(f"{letter} {value}" for letter, value in zip("ABCD", options)), "ABCD"[place]


def long_multiplication(rng, largest):
    """Four digits by four, least significant digit first, with partial sums; for --task multiply and words."""
    a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)

    def backwards(value: int, width: int) -> str:
        return " ".join(str(value).zfill(width)[::-1])

    parts, total = [], 0
    for place, digit in enumerate(str(b)[::-1]):
        total += a * int(digit) * 10**place
        part = backwards(a * int(digit) * 10**place, 5 + place)
        parts.append(part + (f" ( {backwards(total, 5 + place)} )" if place in (1, 2) else ""))
    return f"{backwards(a, 4)} * {backwards(b, 4)}", " + ".join(parts) + f" #### {backwards(total, 8)}"


TASKS = {  # task -> subject -> templates
    "math": {
        "prealgebra": [sum_of_products, two_heaps],
        "algebra": [linear_equation, two_unknowns],
        "intermediate algebra": [other_root, three_unknowns],
        "number theory": [greatest_common_divisor, number_with_remainder],
        "counting & probability": [outfits, red_and_blue],
        "geometry": [frame_area, rectangle],
        "precalculus": [dot_product, arithmetic_sequence],
    },
    "code": {"code": [describe_and_program]},
    "choice": {"choice": [which_is]},
    "multiply": {"multiply": [long_multiplication]},
}
MIXTURE = {"math": 0.5, "code": 0.4, "choice": 0.1}  # of --task all


def split_of(prompt: str) -> str:
    """train, validation or test, by a hash of the prompt: a tenth of all prompts each for the last two."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(prompt.encode()) % 10, "train")


def generate(task: str, count: int, split: str, seed: int, largest: int) -> list[Problem]:
    """count problems of a task, its subjects in equal shares; in validation and test every prompt once."""
    rng = random.Random(f"{task} {split} {seed}")
    subjects, problems, seen, misses = list(TASKS[task].items()), [], set(), 0
    while len(problems) < count:
        subject, templates = subjects[len(problems) % len(subjects)]
        prompt, answer = rng.choice(templates)(rng, largest)
        if split_of(prompt) == split and (split == "train" or prompt not in seen):
            seen.add(prompt)
            problems.append(Problem(prompt, answer, subject))
            misses = 0
        elif (misses := misses + 1) > 20_000:
            raise InputError(f"--largest {largest} gives too few different {task} problems for {count} of {split}")
    return problems


def read_problems(path: Path) -> list[Problem]:
    """{"prompt": ..., "answer": ...} a line.  InputError names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.removesuffix("\n").split("\n") if text else []  # not splitlines: JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"{path} line {number} is empty")
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} is no JSON: {error.msg}") from None
        texts = [found.get(key) if isinstance(found, dict) else None for key in ("prompt", "answer")]
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError(f'{path} line {number} must be {{"prompt": text, "answer": text}}, neither empty')
        problems.append(Problem(*texts, "all"))
    if not problems:
        raise InputError(f"{path} is empty")
    return problems


# ---------------------------------------------------------------------------------------------------------------
# Graders: (prompts, reference answers, the model's answers) -> right or not, each


def arithmetic(text: str) -> Fraction | None:
    """The value of integers joined by + - * /, None where the text is anything else; nothing is executed."""
    if not re.fullmatch(r"\d{1,6}([-+*/]\d{1,6})*", text):
        return None
    total = Fraction(0)
    for sign, term in re.findall(r"([-+]?)([^-+]+)", text):
        numbers, value = re.split(r"([*/])", term), Fraction(1)
        for operation, number in zip(["*", *numbers[1::2]], map(int, numbers[::2])):
            if operation == "/" and number == 0:
                return None
            value = value * number if operation == "*" else value / number
        total += -value if sign == "-" else value
    return total


def false_steps(answer: str) -> int:
    """How many of the steps before #### are not true equations."""
    sides = (step.split("=") for step in answer.split("####")[0].split(";"))
    return sum(len(s) != 2 or arithmetic(s[0]) is None or arithmetic(s[0]) != arithmetic(s[1]) for s in sides)


def grade_result(prompts, references, answers) -> list[bool]:
    """What follows the last #### decides; an answer without it is wrong.

    It must be the reference's, or, for a prompt of --task math with several right results (SOLVES), any positive
    integers that solve it, joined by commas.
    """
    def right(prompt: str, reference: str, answer: str) -> bool:
        _, mark, result = answer.rpartition("####")
        result = result.strip()
        solves = next((check for pattern, check in SOLVES.items() if re.fullmatch(pattern, prompt)), None)
        if solves is None or not mark:
            return bool(mark) and result == reference.rpartition("####")[2].strip()
        values = [int(n) for n in re.findall(r"\d+", result)]
        if result != ",".join(map(str, values)) or 0 in values or len(values) != solves.__code__.co_argcount - 1:
            return False
        return solves([int(n) for n in re.findall(r"\d+", prompt)], *values)

    return [right(*texts) for texts in zip(prompts, references, answers)]


def grade_exact(prompts, references, answers) -> list[bool]:
    return [ours == theirs for ours, theirs in zip(answers, references)]


def grade_last_number(prompts, references, answers) -> list[bool]:
    """The last numbers agree in value; spaces between digits are dropped first."""
    def last(text: str) -> Fraction | None:
        found = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d) (?=\d)", "", text))
        return Fraction(found[-1]) if found else None

    return [last(ours) is not None and last(ours) == last(theirs) for ours, theirs in zip(answers, references)]


CODE_RUNNER = r"""
import ast, json, resource, signal, sys
seconds, megabytes = json.loads(sys.stdin.readline())
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20,) * 2)
for name in ("RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_CORE"):
    if hasattr(resource, name):
        resource.setrlimit(getattr(resource, name), (0, 0))
ALLOWED = dict(len=len, max=max, min=min, range=range, reversed=reversed, sorted=sorted, sum=sum, abs=abs, list=list)

def outputs(program, cases):
    tree = ast.parse(program, mode="eval")
    for node in ast.walk(tree):  # no attributes: they lead from any object to everything
        if isinstance(node, (ast.Attribute, ast.Lambda)) or isinstance(node, ast.Name) and node.id.startswith("_"):
            raise ValueError
    code, found = compile(tree, "program", "eval"), []
    for xs in cases:
        value = eval(code, {"__builtins__": ALLOWED, "xs": list(xs)})
        flat = value if type(value) is list else [value]
        if not all(type(item) is int and abs(item) < 10**9 for item in flat):
            raise ValueError
        found.append(value)
    return found

for line in sys.stdin:
    reference, program, cases = json.loads(line)
    expected = outputs(reference, cases)
    signal.setitimer(signal.ITIMER_REAL, seconds)  # not caught: at the limit the process dies, whatever runs
    try:
        right = outputs(program, cases) == expected
    except BaseException:
        right = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("ny"[right], end="", flush=True)
"""
PROGRAM_SECONDS, PROGRAM_MEGABYTES = 1.0, 512


def grade_code(prompts, references, answers) -> list[bool]:
    """A program is right if it gives what the reference gives on 20 hidden lists.

    Programs run in another process, an isolated Python with a limit of time and memory, no files, no processes and a
    few builtins; one that kills its process counts as wrong, and a new process goes on behind it.  Never here.
    """
    jobs = []
    for prompt, reference, answer in zip(prompts, references, answers):
        rng = random.Random(f"hidden {prompt}")
        cases = [[rng.randint(-9, 12) for _ in range(rng.randint(4, 8))] + [-8, 13, 100, 101] for _ in range(20)]
        jobs.append(json.dumps([reference, answer, cases]))  # the four more make every selection non-empty
    verdicts = ""
    limits = json.dumps([PROGRAM_SECONDS, PROGRAM_MEGABYTES])
    while len(verdicts) < len(jobs):
        left = jobs[len(verdicts) :]
        runner = subprocess.run(
            [sys.executable, "-I", "-c", CODE_RUNNER], input="\n".join([limits, *left]), text=True,
            capture_output=True, timeout=60 + len(left) * PROGRAM_SECONDS,
        )
        verdicts += runner.stdout
        if runner.returncode > 0:
            raise RuntimeError(f"the program runner failed: {runner.stderr.strip().splitlines()[-1:]}")
        if runner.returncode < 0:  # killed by a signal: that program is wrong
            verdicts += "n"
    return [verdict == "y" for verdict in verdicts]


GRADERS = {"result": grade_result, "exact": grade_exact, "last_number": grade_last_number, "code": grade_code}
TASK_GRADER = {"math": "result", "code": "code", "choice": "exact", "multiply": "result"}

# ---------------------------------------------------------------------------------------------------------------
# Training data: samplers for rm.train.  pool: int64 [P, prompt + answer], on the generator's device


def sample_masks(
    batch_size: int, generator: torch.Generator, pool: Tensor, prompt_length: int, prompt_share: float = 0.0
) -> rm.Batch:
    """Plain mask diffusion: a uniform number m of the N positions is masked, each with LLaDA's weight N/m (its 1/t).

    The answer's positions; in a share prompt_share of the rows (the base model alone) the prompt's too.  The loss is at
    the masked positions; weights are scaled to mean 1.
    """
    rand = partial(torch.rand, generator=generator, device=pool.device)
    clean = pool[torch.randint(len(pool), (batch_size,), generator=generator, device=pool.device)]
    free = torch.arange(clean.shape[1], device=pool.device) >= prompt_length
    free = free | (rand(batch_size, 1) < prompt_share) & (clean != PAD)
    count = free.sum(-1, keepdim=True)
    masks = (rand(batch_size, 1) * count).long() + 1  # uniform in 1..N
    order = rand(clean.shape).masked_fill(~free, 2).argsort(-1).argsort(-1)
    masked = order < masks
    weight = (masked.sum() / (batch_size * masks)).expand(clean.shape)
    return clean.masked_fill(masked, MASK).unsqueeze(0), clean, masked, weight


def sample_revision(
    batch_size: int,
    generator: torch.Generator,
    pool: Tensor,
    prompt_length: int,
    base: Callable[[Tensor], Tensor],
    corruption: float = 0.3,
    top_k: int = 8,
    second_guess: float = 0.0,
    drafts: bool = False,
    reveals: float = 0.0,
    plain: float = 0.0,
    remember: int = 1,
) -> rm.Batch:
    """States of synthetic revisions of the answer; wrong tokens are the frozen base's second choices.

    drafts (ours): the chosen positions start with a draw from the base's top-k by its own probabilities, truth
    included, so that mistakes are as frequent and as likely as those of a parallel reveal.  Otherwise (the paper) with
    a token drawn evenly from the top-k without the truth; a model trained on those alone trusts its own best guess.
    corruption: the mean share of positions that start wrong (with drafts: that are drafted); a row's own share is 0 in
    a quarter of the rows, so that the empty answer, where decoding starts, is among the states, else uniform.
    reveals (ours): the share of rows that stand in a parallel reveal instead, and remember: see reveal_trajectory.
    plain (ours): the share of rows that lack some tokens and have none wrong, masked as in SFT, but with the keep loss
    where they show; reveals + plain at most 1.
    base: int64 [B, N] -> logits [B, N, V].  It is probed once, with the positions that start wrong masked together with
    a random share of the others, so that a mistake fits what stands around it (ours; the paper masks all).
    """
    rand = partial(torch.rand, generator=generator, device=pool.device)
    clean = pool[torch.randint(len(pool), (batch_size,), generator=generator, device=pool.device)]
    editable = (torch.arange(clean.shape[1], device=pool.device) >= prompt_length).expand_as(clean)
    share = 2 * corruption * rand(batch_size, 1) * (rand(batch_size, 1) > 0.25) * 4 / 3
    starts_wrong = editable & (rand(clean.shape) < share)
    probed = editable & (starts_wrong | (rand(clean.shape) < rand(batch_size, 1)))
    draw, answer = rand(batch_size, 1), clean.shape[1] - prompt_length
    revealing, only_masks = draw < reveals + plain, draw < plain
    order = rand(clean.shape).masked_fill(~editable, 2).argsort(-1).argsort(-1)  # answer: 0..N-1, prompt: above
    masks = ((answer + 1) ** rand(batch_size, 1)).long()  # log-uniform in 1..N: as often as SFT's 1/m weighs a number
    probed = torch.where(revealing, order < masks, probed)
    logits, moving = base(clean.masked_fill(probed, MASK)), editable
    wrong = rm.topk_wrong(logits, clean, MASK, top_k, 2, generator)
    if drafts:
        logits[..., MASK] = -torch.inf
        likely, tokens = logits.topk(min(top_k, logits.shape[-1] - 1), dim=-1)
        pick = torch.multinomial(likely.softmax(-1).flatten(0, 1), 1, generator=generator)
        draft = tokens.gather(-1, pick.view(*clean.shape, 1)).squeeze(-1)
        moving = editable & ~(starts_wrong & (draft == clean))  # a draw that hits the truth stands, right, throughout
        wrong = torch.stack([torch.where(draft == clean, wrong[0], draft), wrong[1]])
    states = rm.sample_trajectory(
        clean, moving, wrong, MASK, T=6, p_wrong=starts_wrong.float(), second_guess=second_guess, generator=generator
    )
    turn = torch.randint(6, (batch_size,), generator=generator, device=pool.device)
    states = rm.history_until(states, turn)
    if reveals or plain:
        revealed = reveal_trajectory(clean, logits, order, masks, answer, generator, remember, only_masks[:, 0])
        both = [states, revealed]
        missing = [max(map(len, both)) - len(part) for part in both]
        both = [torch.cat([part.new_full((more, *clean.shape), ABSENT), part]) for more, part in zip(missing, both)]
        states = torch.where(revealing, both[1], both[0])
    return states, clean, editable


def reveal_trajectory(
    clean: Tensor, logits: Tensor, order: Tensor, masks: Tensor, answer: int, generator: torch.Generator, remember: int,
    before: Tensor,
) -> Tensor:
    """Ours: a decoding up to one reveal that may go wrong, int64 [K, B, N], the state to train on last.

    In 1 to `remember` turns the answer is revealed, rightly, until `masks` of its positions are left.  Then the base
    reveals the k it is surest of, its own best token each, all at once, k log-uniform in 1..masks; in half of the rows
    some of the others follow, right.  Then what is wrong is re-masked.  The state to train on is the one before the
    base's reveal (a third, and all rows of before, bool [B]), after it (half) or after the re-masking.
    clean, order: int64 [B, N], order a random rank, below `answer` for a position of the answer.  masks: int64 [B, 1].
    logits: float [B, N, V], the base's with the masks lowest ranks masked.  Without history remember = 1 says it all.
    """
    rand, batch = partial(torch.rand, generator=generator, device=clean.device), len(clean)
    turns = int(torch.randint(1, remember + 1, (), generator=generator, device=clean.device))
    share = torch.arange(turns + 1, device=clean.device).view(-1, 1, 1) / turns
    revealing = clean.masked_fill(order < answer - (answer - masks) * share, MASK)  # [turns + 1, B, N]
    masked = order < masks
    logits = logits.index_fill(-1, torch.tensor([MASK], device=clean.device), -torch.inf)
    confidence, best = logits.softmax(-1).max(-1)
    rank = confidence.masked_fill(~masked, -1).argsort(-1, descending=True).argsort(-1)
    at_once = masked & (rank < ((masks + 1) ** rand(batch, 1)).long())
    follows = masked & (rand(clean.shape) < rand(batch, 1) * (rand(batch, 1) < 0.5))
    draft = torch.where(at_once, best, torch.where(follows, clean, revealing[-1]))
    trajectory = torch.cat([revealing, draft.unsqueeze(0), draft.masked_fill(draft != clean, MASK).unsqueeze(0)])
    draw = rand(batch)
    after = (draw > 1 / 3).long() + (draw > 5 / 6).long()
    return rm.history_until(trajectory, turns + after.masked_fill(before, 0))


def frozen(model: MaskDiffusionTransformer, precision: str, compile: bool) -> Callable[[Tensor], Tensor]:
    """The base as a function of tokens, int64 [B, N] -> float [B, N, V], without gradient."""
    network, embedding = torch.compile(model) if compile else model, model.embedding.detach()

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return network(history_embedding(tokens.unsqueeze(0), embedding, 0.0)).float()

    return logits


# ---------------------------------------------------------------------------------------------------------------
# Decoding


def pace(length: int, passes: int, haste: float) -> int:
    """Reveals a pass: `haste` times what fills `length` positions in `passes`; what is saved is left for revision."""
    return max(1, min(length, math.ceil(haste * length / passes)))


def even_reveal(passes: int) -> Callable[..., Tensor]:
    """LLaDA's rule for rm.revise: the most confident masks, spread evenly over what is left of `passes` turns."""
    left = iter(range(passes, 0, -1))

    def rule(logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor, reveal: None) -> Tensor:
        turns = next(left)
        count = ((tokens == mask_id).sum(-1) + turns - 1) // turns
        return rm.decide(logits, tokens, mask_id, editable, reveal=count, allow_remask=False)

    return rule


def chosen_at(chosen: list[tuple[int, float]], passes: int) -> float:
    """The haste or doubt chosen for that many passes, or for the nearest number below (else the first)."""
    return max((pair for pair in chosen if pair[0] <= passes), default=chosen[0])[1]


@torch.no_grad()
def decode(model, info: dict, rows: Tensor, passes: int, args, chunk: int = 256) -> list[rm.Revision]:
    """Answers in at most `passes` forward passes; rows int64 [n, prompt + answer], MASK where the answer goes.

    base and sft: LLaDA's low-confidence decoding, as many of the most confident reveals a pass as needed, nothing is
    re-masked.  rm and history: the same with re-masking in parallel (Eq. 1) at info["haste"] times that pace, and
    with the passes left over as free turns of revision.  info["doubt"] d > 0 (ours) re-masks sooner than Eq. 1, where
    p(M) > exp(-d) p(x); what is revealed stays the same.  One Revision a chunk of rows, with its trace.
    """
    low_confidence = info["variant"] in ("base", "sft")
    length, device = info["tokenizer"]["answer_length"], model.embedding.device
    reveal = None if low_confidence else pace(length, passes, chosen_at(info["haste"], passes))
    doubt = 0.0 if low_confidence else chosen_at(info.get("doubt", [(1, 0.0)]), passes)

    def denoiser(embedded: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(embedded).float()
        logits[..., MASK] += doubt
        return logits

    results = []
    for part in rows.to(device).split(chunk):
        history = HistoryReference(model.embedding.detach(), info["gamma"], info["rotate"])
        results.append(rm.revise(
            denoiser, part, MASK, history, passes, trace=True, reveal=reveal,
            editable=torch.arange(part.shape[1], device=device) >= part.shape[1] - length,
            rule=even_reveal(passes) if low_confidence else None,
            remask_limit=None if low_confidence else args.remask_limit,
        ))
    return results


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def bootstrap_interval(values: list[int], draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of values, a value a prompt, by resampling the prompts.

    The same draws for the same number of prompts, so a difference of two models' values, paired by prompt, is a paired
    bootstrap.
    """
    values, generator, means = torch.tensor(values, dtype=torch.float), torch.Generator().manual_seed(0), []
    for _ in range(0, draws, 500):
        means.append(values[torch.randint(len(values), (500, len(values)), generator=generator)].mean(-1))
    return tuple(torch.cat(means).quantile(torch.tensor([0.025, 0.975])).tolist())


def paired_bootstrap(ours: str, theirs: str) -> dict:
    """Share right, ours minus theirs ("0" and "1" a prompt, the same prompts): difference and its 95 % interval."""
    values = [int(a) - int(b) for a, b in zip(ours, theirs)]
    return {"difference": sum(values) / len(values), "ci95": bootstrap_interval(values), "n": len(values)}


def evaluate(model, info: dict, problems: list[Problem], grader: str, passes: int, args) -> dict:
    """Accuracy of the answers, with what the revision did.  Shares are fractions.

    right: a character a prompt, "1" where right.  repaired, broken: share of the prompts whose first complete draft was
    wrong and whose answer is right, and the reverse.  remasks: re-masked positions an answer.  replayed: share of them
    whose next reveal is the token that was taken away.  false_steps: share of the answers with a false step (math).
    """
    began, tokenizer = time.perf_counter(), Tokenizer(**info["tokenizer"])
    rows = tokenizer.rows([p.prompt for p in problems])
    prompts, references = [p.prompt for p in problems], [p.answer for p in problems]
    answers, drafts, turns, remasks, replays = [], [], [], 0, 0
    for result in decode(model, info, rows, passes, args):
        turns += result.turns
        trace = result.trace[:, :, tokenizer.prompt_length :].cpu()
        answers += [tokenizer.text(row) for row in trace[-1].tolist()]
        complete = (trace != MASK).all(-1)  # [turns + 1, B]; the last state always is
        first = complete.int().argmax(0)
        drafts += [tokenizer.text(row) for row in trace[first, torch.arange(len(first))].tolist()]
        taken = torch.full_like(trace[0], -1)  # what was re-masked last at each position
        for before, after in zip(trace[:-1], trace[1:]):
            replays += int(((before == MASK) & (after == taken)).sum())
            remask = (before != MASK) & (after == MASK)
            remasks += int(remask.sum())
            taken = torch.where(remask, before, taken.masked_fill(after != MASK, -1))
    seconds = time.perf_counter() - began
    grade = GRADERS[grader]
    right, n = grade(prompts, references, answers), len(problems)
    changed = [i for i in range(n) if drafts[i] != answers[i]]
    draft_right = list(right)
    for i, verdict in zip(changed, grade(*([x[i] for i in changed] for x in (prompts, references, drafts)))):
        draft_right[i] = verdict
    subjects = {}
    for problem, verdict in zip(problems, right):
        subjects.setdefault(problem.subject, []).append(verdict)
    score = {
        "accuracy": sum(right) / n,
        "ci95": bootstrap_interval(right, 2000),
        "n": n,
        "passes": passes,
        "mean_passes": sum(turns) / n,
        "subjects": {
            name: {"accuracy": sum(v) / len(v), "n": len(v), "right": "".join("01"[verdict] for verdict in v)}
            for name, v in subjects.items()
        },
        "repaired": sum(r and not d for r, d in zip(right, draft_right)) / n,
        "broken": sum(d and not r for r, d in zip(right, draft_right)) / n,
        "remasks": remasks / n,
        "replayed": replays / max(remasks, 1),
        "seconds": seconds,
        "right": "".join("01"[verdict] for verdict in right),
    }
    if grader == "result" and all(problem.subject in PAPER_SUBJECTS for problem in problems):  # not multiply's sums
        score["false_steps"] = sum(false_steps(answer) > 0 for answer in answers) / n
    return score


def budgets(length: int) -> list[int]:
    """The forward passes of the curve: N/16 to 2N of the answer length, at least 1."""
    return sorted({max(1, round(length * share)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)})


# ---------------------------------------------------------------------------------------------------------------
# Training


def make_problems(args) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]], list[Problem], dict[str, str]]:
    """(test, validation) by family, the training problems, the grader by family."""
    given = read_problems(args.test) if args.test else None
    if args.data:
        train = read_problems(args.data)
        name, tasks = args.data.stem, {}
    else:
        tasks = MIXTURE if args.task == "all" else {args.task: 1.0}
        train = [p for task, share in tasks.items()
                 for p in generate(task, max(1, round(share * args.pool)), "train", args.seed, args.largest)]
        name = args.task
    if given:
        tested = {p.prompt for p in given}
        before = len(train)
        train = [p for p in train if p.prompt not in tested]
        if len(train) < before and rm.is_main_process():
            print(f"{before - len(train)} of {before} training problems are in {args.test} and were left out")
        if not train:
            raise InputError(f"every training problem is in {args.test}")
        test = {name: given[: args.n]}
        chosen = random.Random(0).sample(train, min(len(train) // 10 + 1, args.validation))  # not held out: a curve
        validation = {name: chosen}
        graders = {name: args.grader or TASK_GRADER.get(args.task if tasks else "", "exact")}
    else:
        test = {task: generate(task, args.n, "test", args.test_seed, args.largest) for task in tasks}
        each = max(1, args.validation // len(tasks))
        validation = {task: generate(task, each, "validation", args.test_seed, args.largest) for task in tasks}
        graders = {task: args.grader or TASK_GRADER[task] for task in tasks}
    return test, validation, train, graders


def stage(variant: str, model, base, pool: Tensor, tokenizer: Tokenizer, args, steps: int, **changes):
    """rm.train with the settings of a variant; base and sft on masks, rm and history on revisions."""
    _, gamma, rotate = VARIANTS[variant]
    settings = dict(
        batch_size=args.batch_size, gamma=gamma, rotate=rotate, compile=args.compile, precision=args.precision,
        learning_rate=args.learning_rate if variant == "base" else args.tuning_rate, warmup=min(100, steps // 5 + 1),
        muon_factor=3,  # at 8, the default that suits Sudoku, the base learns SCAN far slower
        seed=args.seed + 1000 * list(VARIANTS).index(variant),
    )
    share = args.prompt_share if variant == "base" else 0.0
    sample = partial(sample_masks, pool=pool, prompt_length=tokenizer.prompt_length, prompt_share=share)
    if variant in ("rm", "history"):
        sample = partial(
            sample_revision, pool=pool, prompt_length=tokenizer.prompt_length, corruption=args.corruption,
            base=frozen(base, args.precision, args.compile), top_k=args.top_k, second_guess=args.second_guess,
            drafts=args.drafts, reveals=args.reveals, plain=args.plain, remember=16 if gamma else 1,
        )
        settings |= dict(own_states=args.own_states, rule=partial(rm.decide, reveal=args.own_reveal))
        settings |= dict(weights=(1, 1, args.keep_weight))
    return rm.train(model, sample, steps, MASK, **(settings | changes))


def new_model(tokenizer: Tokenizer, args) -> MaskDiffusionTransformer:
    torch.manual_seed(args.seed)
    config = TransformerConfig(
        vocabulary=tokenizer.vocabulary, length=tokenizer.length, width=args.width, layers=args.layers,
        feed_forward=4 * args.width, positions="both",
    )
    return MaskDiffusionTransformer(config).to(args.device)


def measured_steps(pool: Tensor, tokenizer: Tokenizer, variants: list[str], args) -> tuple[int, int]:
    """(base steps, steps of each post-training) that fill --minutes here: 12 steps of each are timed after 4."""
    seconds = {}
    for variant in variants:
        model = new_model(tokenizer, args)
        times = [stats["seconds"] for _, stats in stage(variant, model, model, pool, tokenizer, args, 16)]
        seconds[variant] = (times[-1] - times[3]) / 12
    # As much time for the base as its share of the steps says: BASE_SHARE steps of it for each step of the others.
    each = args.minutes * 60 / (BASE_SHARE * seconds["base"] + sum(seconds[v] for v in variants if v != "base"))
    steps = torch.tensor([int(BASE_SHARE * each) + 1, int(each) + 1], device=args.device)
    if rm.dist.is_initialized():  # every process has to make the same number
        rm.dist.broadcast(steps, 0)
    return tuple(steps.tolist())


BASE_SHARE = 1.5  # base steps for each step of post-training


def train_variant(variant: str, steps: int | None, problems, tokenizer: Tokenizer, pool, base, name: str, args) -> dict:
    """Trains (or resumes) one variant and scores it at every budget; writes OUT/<task>_<variant>_seed<seed>.pt, .json.

    A finished run, one whose .json exists, is read back instead, and scored again if --n, --passes, --grader or
    --test-seed changed.  The base does not depend on what comes after it, so OUT may begin as a copy of another's
    base and try other settings of RM.  Returns the record.
    """
    test, validation, _, graders = problems
    path, main = args.out / f"{name}_{variant}_seed{args.seed}", rm.is_main_process()
    keys = SETTINGS + TUNING_SETTINGS * (variant != "base") + REVISION_SETTINGS * (variant in ("rm", "history"))
    settings = {key: getattr(args, key) for key in keys}
    files = {"data": args.data, "test": args.test}
    settings |= {key: file and [file.name, zlib.crc32(file.read_bytes())] for key, file in files.items()}
    evaluation = {key: getattr(args, key) for key in EVALUATION_SETTINGS}
    if path.with_suffix(".json").exists():
        record = json.loads(path.with_suffix(".json").read_text())
        rm.require_same(settings, record["settings"], path.with_suffix(".json"))
        if main:
            print(f"{path}.json is there, {variant} is done")
        if main and record.get("evaluation") != evaluation:
            model, info = rm.load_checkpoint(path.with_suffix(".pt"), "text", args.device)
            info["graders"] = graders
            record |= {"test": evaluate_all(model, info, test, args), "evaluation": evaluation}
            rm.write_json(path.with_suffix(".json"), record)
        return record
    label, gamma, rotate = VARIANTS[variant]
    info = {"variant": variant, "trained_on": name, "gamma": gamma, "rotate": rotate, "tokenizer": dict(
        symbols=tokenizer.symbols, words=tokenizer.words, prompt_length=tokenizer.prompt_length,
        answer_length=tokenizer.answer_length), "graders": graders, "haste": [(1, args.haste[-1])],
        "doubt": [(1, args.doubt[0])], "largest": args.largest}
    model, resume, curve, seconds = new_model(tokenizer, args), path.with_suffix(".resume.pt"), [], 0.0
    if base is not None:
        model.load_state_dict(base.state_dict())
    if resume.exists():
        saved = torch.load(resume, map_location="cpu", weights_only=True)
        notes, seconds = saved["notes"], saved["seconds"]  # of training; there may be none left, only the scoring
        rm.require_same(settings, notes["settings"], resume)
        steps, curve = notes["steps"], notes["curve"]
    every = max(1, steps // 4)
    notes = {"steps": steps, "curve": curve, "settings": settings}
    if main:
        print(f"{label}, seed {args.seed}: {steps} steps of {args.batch_size} on {args.device}")
    saving = dict(checkpoint=resume, checkpoint_every=max(1, steps // 20), notes=notes)
    run = stage(variant, model, base, pool, tokenizer, args, steps, **saving)
    for step, stats in run:
        seconds = stats["seconds"]
        if not main or step % max(1, every // 10) and step % every and step < steps:
            continue
        if step % every == 0 or step == steps:
            losses = {key: stats[key].item() for key in ("reveal", "remask", "keep")}
            passes = max(1, tokenizer.answer_length // 4)
            scores = {f: evaluate(model, info, validation[f], graders[f], passes, args)["accuracy"] for f in validation}
            curve.append({"step": step, "minutes": seconds / 60, "passes": passes, **losses, **scores})
        left = seconds / step * (steps - step)
        line = f"step {step}/{steps} loss: "
        line += " ".join(f"{key} {stats[key]:.3f}" for key in ("reveal", "remask", "keep"))
        if curve:
            shown = " ".join(f"{family} {100 * curve[-1][family]:.1f} %" for family in validation)
            line += f" at {curve[-1]['passes']} passes: {shown}"
        line += f" {left // 60:.0f}:{left % 60:02.0f} left"
        terminal = sys.stdout.isatty()
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal and step < steps else "\n", flush=True)
    if main and variant in ("rm", "history"):
        info |= choose_decoding(model, info, validation, args)
    record = info | {"seed": args.seed, "steps": steps, "minutes": seconds / 60, "settings": settings}
    record |= {"params": sum(p.numel() for p in model.parameters()), "compiled": args.compile,
               "precision": args.precision, "provenance": rm.provenance()}
    if main:
        rm.save_checkpoint(path.with_suffix(".pt"), model, task="text", **record)
        print(f"wrote {path.with_suffix('.pt')}")
        record |= {"curve": curve, "evaluation": evaluation}
        record["test"] = evaluate_all(model, info, test, args)
        rm.write_json(path.with_suffix(".json"), record)
        resume.unlink(missing_ok=True)
    if rm.dist.is_initialized():
        rm.dist.barrier()
    return record


def choose_decoding(model, info: dict, validation: dict[str, list[Problem]], args) -> dict[str, list]:
    """For every number of forward passes the pair of --haste and --doubt that is best on the validation problems.

    choice, an answer of one pass, has no say beside other families.
    """
    chosen, families = [], [f for f in validation if validation[f][0].subject != "choice"] or list(validation)
    pairs = [(haste, doubt) for doubt in args.doubt for haste in args.haste]
    for passes in args.passes or budgets(info["tokenizer"]["answer_length"]):
        right = {}
        for haste, doubt in pairs if len(pairs) > 1 else []:
            trial = info | {"haste": [(1, haste)], "doubt": [(1, doubt)]}
            scores = [evaluate(model, trial, validation[f], info["graders"][f], passes, args) for f in families]
            right[haste, doubt] = sum(score["accuracy"] for score in scores)
        chosen.append((passes, *max(right, key=right.get, default=pairs[0])))
        print("at {} passes haste {:g}, doubt {:g}".format(*chosen[-1]), flush=True)
    return {"haste": [(passes, haste) for passes, haste, _ in chosen],
            "doubt": [(passes, doubt) for passes, _, doubt in chosen]}


def evaluate_all(model, info: dict, test: dict[str, list[Problem]], args) -> dict[str, list[dict]]:
    """family -> a score for each number of forward passes; choice in one pass alone."""
    scores = {}
    for family, problems in test.items():
        length = info["tokenizer"]["answer_length"]
        counts = args.passes or ([1] if problems[0].subject == "choice" else budgets(length))
        if info["variant"] in ("base", "sft"):  # one reveal a pass is done after N passes; more change nothing
            counts = sorted({min(count, length) for count in counts})
        scores[family] = []
        for passes in counts:
            score = evaluate(model, info, problems, info["graders"][family], passes, args)
            scores[family].append(score)
            low, high = (100 * bound for bound in score["ci95"])
            print(f"{VARIANTS[info['variant']][0]}, {family}, {passes} passes: {100 * score['accuracy']:.1f} % "
                  f"({low:.1f} to {high:.1f}), {score['seconds']:.0f} s", flush=True)
    return scores


def train_all(args) -> dict:
    """The bare command: every variant that is not done yet, then the tables and the figure."""
    problems = make_problems(args)
    test, validation, train, graders = problems
    everything = train + [p for family in (*test.values(), *validation.values()) for p in family]
    tokenizer = Tokenizer.of(everything, args.words)
    if args.data:  # the vocabulary is the training data's; the lengths hold the test prompts too
        tokenizer = Tokenizer(
            Tokenizer.of(train, args.words).symbols, args.words, tokenizer.prompt_length, tokenizer.answer_length
        )
        tokenizer.rows([p.prompt for p in test[args.data.stem]], where=lambda i: f"{args.test} line {i + 1}")
    pool = tokenizer.rows([p.prompt for p in train], [p.answer for p in train], lambda i: f"training problem {i + 1}")
    pool = pool.to(args.device)
    variants = ["base", "sft", "rm"] + ["history"] * args.history
    steps = (args.base_steps, args.steps)
    name = args.data.stem if args.data else args.task
    done = all((args.out / f"{name}_{v}_seed{args.seed}.json").exists() for v in variants)
    if None in steps and not done:
        started = args.out / f"{name}_seed{args.seed}.steps.json"  # a resumed run keeps its first measurement
        if started.exists():
            steps = [given or found for given, found in zip(steps, json.loads(started.read_text()))]
        else:
            measured = measured_steps(pool, tokenizer, variants, args)
            steps = [given or found for given, found in zip(steps, measured)]
            if rm.is_main_process():
                rm.write_json(started, steps)
    records, base = {}, None
    for variant in variants:
        number = steps[0] if variant == "base" else steps[1]
        records[variant] = train_variant(variant, number, problems, tokenizer, pool, base, name, args)
        if variant == "base":
            base, _ = rm.load_checkpoint(args.out / f"{name}_base_seed{args.seed}.pt", "text", args.device)
    if not rm.is_main_process():
        return {}
    result = report(records, tokenizer.answer_length)
    print_report(result)
    draw_curves(args.out / f"text_{name}.png", result)
    kept = ("steps", "minutes", "params", "settings", "haste", "doubt", "provenance", "curve")
    result["records"] = {v: {k: r[k] for k in kept if k in r} for v, r in records.items()}
    rm.write_json(args.out / f"text_{name}.json", result)
    return result


# ---------------------------------------------------------------------------------------------------------------
# Reports


def report(records: dict[str, dict], length: int) -> dict:
    """Scores by variant and family, and the paired differences to SFT at equal numbers of forward passes."""
    scores = {variant: record["test"] for variant, record in records.items()}
    against = {}
    for variant in scores:
        if variant in ("base", "sft") or "sft" not in scores:
            continue
        against[variant] = {}
        for family, rows in scores[variant].items():
            theirs = {row["passes"]: row for row in scores["sft"][family]}
            last = theirs[max(theirs)]  # beyond N passes SFT stays as it is
            against[variant][family] = []
            for row in rows:
                other = theirs.get(row["passes"], last)
                difference = {"passes": row["passes"]} | paired_bootstrap(row["right"], other["right"])
                if len(row["subjects"]) > 1:
                    difference["subjects"] = {name: paired_bootstrap(part["right"], other["subjects"][name]["right"])
                                              for name, part in row["subjects"].items()}
                against[variant][family].append(difference)
    return {"answer_length": length, "scores": scores, "minus_sft": against}


def at(rows: list[dict], passes: int) -> dict:
    """The row with that many passes, or the nearest below."""
    return max((row for row in rows if row["passes"] <= passes), key=lambda row: row["passes"], default=rows[0])


def print_report(result: dict) -> None:
    """The paper's two tables beside ours, the differences to SFT, and what revision did."""
    scores, length = result["scores"], result["answer_length"]
    shares = {"N/4": max(1, round(length / 4)), "N/2": round(length / 2), "N": length}
    families = list(next(iter(scores.values())))
    for family in families:
        if family in PAPER:
            benchmark, values = PAPER[family]
            print(f"\n{family}: accuracy, % (the paper's {benchmark}: base, SFT, RM = {', '.join(map(str, values))})")
        else:
            print(f"\n{family}: accuracy, %")
        counts = sorted({row["passes"] for rows in scores.values() for row in rows[family]})
        print(f"{'forward passes':24}" + "".join(f"{count:>8}" for count in counts))
        for variant, rows in scores.items():
            shares_right = [100 * at(rows[family], count)["accuracy"] for count in counts]
            print(f"{VARIANTS[variant][0]:24}" + "".join(f"{share:>8.1f}" for share in shares_right))
        for variant, differences in result["minus_sft"].items():
            for row in differences[family]:
                low, high = (100 * bound for bound in row["ci95"])
                print(f"  {VARIANTS[variant][0]} minus SFT at {row['passes']} passes: "
                      f"{100 * row['difference']:+.1f} points ({low:+.1f} to {high:+.1f}), n = {row['n']}")
        for variant in result["minus_sft"]:
            row = at(scores[variant][family], shares["N/4"])
            print(f"  {VARIANTS[variant][0]} at {row['passes']} passes: {row['remasks']:.2f} re-masks an answer, "
                  f"{100 * row['repaired']:.1f} % repaired, {100 * row['broken']:.1f} % broken, "
                  f"{100 * row['replayed']:.1f} % of re-masks replayed"
                  + (f", {100 * row['false_steps']:.1f} % with a false step" if "false_steps" in row else ""))
    if "math" in families and set(PAPER_SUBJECTS) <= set(scores["base"]["math"][0]["subjects"]):
        for label, passes in shares.items():
            print(f"\nmath by subject at {label} = {passes} passes, % (in brackets the paper's SFT and RM)")
            for subject in PAPER_SUBJECTS:
                ours = [at(rows["math"], passes)["subjects"][subject]["accuracy"] for rows in scores.values()]
                ours = "".join(f"{100 * share:>8.1f}" for share in ours)
                sft, revised = PAPER_SUBJECTS[subject]
                print(f"{subject:24}{ours}   ({sft:.2f}, {revised:.2f})")


def draw_curves(path: Path, result: dict) -> None:
    """Accuracy against forward passes, a panel a family, with 95 % bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = [f for f, rows in result["scores"]["base"].items() if len(rows) > 1] or list(result["scores"]["base"])
    size = (4.6 * len(families), 3.4)
    fig, panels = plt.subplots(1, len(families), figsize=size, layout="constrained", squeeze=False)
    for axes, family in zip(panels[0], families):
        for variant, scores in result["scores"].items():
            rows = scores[family]
            x, y = [row["passes"] for row in rows], [100 * row["accuracy"] for row in rows]
            (line,) = axes.plot(x, y, marker="o", markersize=3, label=VARIANTS[variant][0])
            low, high = zip(*([100 * bound for bound in row["ci95"]] for row in rows))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["passes"] for scores in result["scores"].values() for row in scores[family]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="forward passes", ylabel="right answers, %", title=family)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------
# The terminal


def show_state(now: list[int], before: list[int], tokenizer: Tokenizer, color: bool) -> str:
    """An answer as text: _ masked; [_] re-masked and (x) revealed in this turn, in colour amber and green instead."""
    parts = []
    for token, old in zip(now, before):
        text = tokenizer.show(token)
        if token != old and color:
            text = f"\033[{'33;7' if token == MASK else '32;1'}m{text}\033[0m"
        elif token != old:
            text = "[_]" if token == MASK else f"({text})"
        parts.append(text)
    return (" " if tokenizer.words else "").join(parts)


def ask(args) -> dict:
    """--ask: decodes one prompt and shows every turn."""
    model, info = args.model
    tokenizer = Tokenizer(**info["tokenizer"])
    rows = tokenizer.rows([args.ask])
    passes = (args.passes or [tokenizer.answer_length])[0]
    (result,) = decode(model, info, rows, passes, args)
    trace = result.trace[:, 0, tokenizer.prompt_length :].tolist()
    color = sys.stdout.isatty()
    marks = "amber: re-masked, green: revealed in this turn" if color else "[_] re-masked, (x) revealed in this turn"
    print(f"_ masked   {marks}   ¶ end   · pad\n")
    for turn, (before, now) in enumerate(zip(trace[:1] + trace, trace)):
        print(f"turn {turn:2}  {show_state(now, before, tokenizer, color)}")
    answer = tokenizer.text(trace[-1])
    print(f"\n{args.ask}\n{answer}\n{result.status[0]} after {result.turns[0]} forward passes")
    return {"prompt": args.ask, "answer": answer, "turns": result.turns[0], "status": result.status[0]}


def evaluate_checkpoint(args) -> dict:
    """--evaluate: the checkpoint on generated test problems of its tasks (or --task), or on --test."""
    model, info = args.model
    tokenizer = Tokenizer(**info["tokenizer"])
    if args.test:
        test = {args.test.stem: read_problems(args.test)[: args.n]}
        info["graders"] = {args.test.stem: args.grader or next(iter(info["graders"].values()))}
    else:
        known = [family for family in info["graders"] if family in TASKS]
        wanted = [args.task] if args.task_given and args.task != "all" else known
        if not known or not set(wanted) <= set(known):
            families = ", ".join(info["graders"])
            raise InputError(f"{args.checkpoint} was trained on {families}: name one with --task, or data with --test")
        test = {task: generate(task, args.n, "test", args.test_seed, info["largest"]) for task in wanted}
        if args.grader:
            info["graders"] = dict.fromkeys(wanted, args.grader)
    for family, problems in test.items():
        tokenizer.rows([p.prompt for p in problems], where=lambda i: f"{args.test or family} line {i + 1}")
    scores = evaluate_all(model, info, test, args)
    return {"variant": info["variant"], "scores": scores, "seed": args.test_seed, "haste": info["haste"],
            "doubt": info.get("doubt", [(1, 0.0)]),
            "params": sum(p.numel() for p in model.parameters()), "checkpoint": args.checkpoint.name,
            "precision": args.precision, "provenance": rm.provenance()}


# ---------------------------------------------------------------------------------------------------------------
# The command line

SETTINGS = (  # what a resumed run must share with the run it goes on from
    "task minutes base_steps batch_size width layers learning_rate prompt_share pool largest words precision"
).split()
TUNING_SETTINGS = "steps tuning_rate".split()
EVALUATION_SETTINGS = "n passes grader test_seed".split()
REVISION_SETTINGS = (
    "corruption top_k drafts reveals plain keep_weight second_guess own_states own_reveal haste doubt remask_limit"
).split()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reflective Masking on text: train base, SFT and RM, evaluate them, ask one. "
        "Without arguments: base, SFT and RM on --task code for --minutes, then the table and the figure.",
    )
    group = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    add = group.add_argument
    add("--evaluate", action="store_true", help="score --checkpoint on test problems, or on --test")
    add("--ask", metavar="PROMPT", help="answer one prompt and show every turn")
    add = parser.add_argument_group("problems").add_argument
    add("--task", choices=[*TASKS, "all"], help="a family, or 'all': math, code and choice mixed (default code)")
    add("--data", type=Path, metavar="TRAIN.jsonl", help='own training data: {"prompt": text, "answer": text} a line')
    add("--test", type=Path, metavar="TEST.jsonl", help="own test data; its prompts are left out of training")
    add("--grader", choices=GRADERS,
        help="how answers are judged (default: the task's or checkpoint's own, exact for own data)")
    add("--words", action="store_true", help="tokens are words between single spaces, not characters")
    add("--largest", type=int, default=9, help="difficulty: the largest number in most problems (default 9)")
    add("--pool", type=int, default=100_000, help="generated training problems (default 100000)")
    add("--n", type=int, default=1050, help="test problems a family at most (default 1050)")
    add("--validation", type=int, default=300, help="validation problems: curve, --haste, --doubt (default 300)")
    add = parser.add_argument_group("training").add_argument
    add("--history", action="store_true", help="also train RM + history (Eq. 2, gamma 0.9 with rotation)")
    add("--minutes", type=float, default=25,
        help="training time of all models, turned into those steps that are not given (default 25)")
    add("--base-steps", type=int, help="train the base exactly this many steps instead")
    add("--steps", type=int, help="train every other model exactly this many steps instead")
    add("--batch-size", type=int, default=64, help="sequences a step (default 64)")
    add("--width", type=int, default=128, help="of the network; 4 layers of 128 are 0.8 M parameters (default 128)")
    add("--layers", type=int, default=4, help="of the network (default 4)")
    add("--learning-rate", type=float, default=2.5e-3, help="of the base (default 2.5e-3)")
    add("--tuning-rate", type=float, default=4e-4, help="of SFT and RM (default 4e-4)")
    add("--prompt-share", type=float, default=0.2, help="rows of the base that mask the prompt too (default 0.2)")
    add("--corruption", type=float, default=0.3,
        help="share of positions that start wrong, or with --drafts drafted (default 0.3)")
    add("--top-k", type=int, default=4, help="wrong tokens come from the base's k likeliest (default 4)")
    add("--drafts", action="store_true", help="ours: wrong tokens as the base itself makes them, see sample_revision")
    add("--reveals", type=float, default=0.0, help="ours: share of rows around a reveal of several (default 0)")
    add("--plain", type=float, default=0.0, help="ours: share of rows with nothing wrong, masks alone (default 0)")
    add("--keep-weight", type=float, default=1.0, help="of the keep loss (default 1)")
    add("--second-guess", type=float, default=0.0, help="ours: share of second wrong guesses (default 0)")
    add("--own-states", type=float, default=0.0, help="ours: share that goes on from own decisions (default 0)")
    add("--own-reveal", type=int, default=4, help="reveals a turn in own states (default 4)")
    add("--precision", choices=["bf16", "float32"], help="default bf16 where the processor has it")
    add("--compile", action="store_true", help="torch.compile the network (needs a C++ compiler on CPU)")
    add = parser.add_argument_group("decoding and evaluation").add_argument
    add("--checkpoint", type=Path, default=HERE / "checkpoints/text_rm.pt", help="default: the shipped one")
    add("--passes", type=int, nargs="+",
        help="forward passes at most (default: N/16 to 2N, for choice 1; with --ask N)")
    add("--haste", type=float, nargs="+", metavar="H",
        help="RM reveals H times as fast as it must, and the passes saved are for revision; training chooses "
        "among several on validation problems (default 1 2), a checkpoint knows its choice")
    add("--doubt", type=float, nargs="+", metavar="D",
        help="ours: re-mask where p(MASK) > exp(-D) p(token); Eq. 1 is 0, the default; several: as for --haste")
    add("--remask-limit", type=int, help="re-masks of a position at most (default: no limit)")
    add("--test-seed", type=int, default=1, help="of the generated test problems (default 1)")
    add = parser.add_argument_group("general").add_argument
    add("--seed", type=int, default=0, help="of training (default 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--out", type=Path, help="where files go (default runs/text, with --smoke runs/smoke)")
    add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    add("--smoke", action="store_true", help="everything tiny, in seconds, to see that it runs")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with one line and exit code 2 where options contradict each other or lie outside their range."""
    training = "data words pool history minutes base_steps steps batch_size width layers learning_rate tuning_rate "
    training += "prompt_share corruption top_k drafts reveals plain keep_weight second_guess own_states own_reveal "
    training += "compile largest validation seed"
    using = args.evaluate or args.ask is not None
    unused = training.split() if using else ["checkpoint"]
    unused += "task test grader n test_seed".split() * (args.ask is not None)
    unused += "task".split() * (args.evaluate and args.test is not None) + ["test_seed"] * (args.test is not None)
    unused += "pool largest".split() * (args.data is not None) + ["own_reveal"] * (not args.own_states)
    unused += ["largest"] * (args.task == "multiply")
    for name in unused:  # an option that would be ignored is an error
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect here")
    args.task_given = args.task is not None
    if args.data and not args.test:
        parser.error("--data needs --test")
    if args.task_given and args.data:
        parser.error("--task and --data exclude each other")
    if args.test and args.task == "all":
        parser.error("--test goes with one task, --data or --evaluate")
    if args.test and not (args.data or args.task_given or args.evaluate):
        parser.error("--test goes with --data, --task or --evaluate")
    if args.grader == "code" and not (args.test is None and args.task in (None, "code")):
        parser.error("--grader code runs Python expressions over xs; it goes with --task code")
    args.task = args.task or ("code" if not args.data else None)
    args.words = args.words or args.task == "multiply"
    if args.smoke:
        args.base_steps, args.steps, args.pool, args.n, args.validation = 4, 4, 200, 14, 7
        args.passes = args.passes or [1, 3]
        args.width, args.layers, args.batch_size = 32, 1, 8
    args.out = args.out or HERE / ("runs/smoke" if args.smoke else "runs/text")
    positive = "n validation pool batch_size width layers top_k own_reveal minutes learning_rate tuning_rate "
    for name in (positive + "steps base_steps").split():
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if args.haste and not all(0 < haste < 1e9 for haste in args.haste):
        parser.error("--haste must be positive")
    if args.doubt and not all(-100 < doubt < 100 for doubt in args.doubt):
        parser.error("--doubt must lie between -100 and 100")
    if using and max(len(args.haste or []), len(args.doubt or [])) > 1:
        parser.error("--haste and --doubt take several values in training alone")
    if not using:
        args.haste, args.doubt = args.haste or [1.0, 2.0], args.doubt or [0.0]
    if args.width % 8:
        parser.error("--width must be a multiple of 8")
    if args.largest < 5 or args.largest > 99:
        parser.error("--largest must lie in 5..99")
    if args.passes and min(args.passes) < 1 or args.remask_limit is not None and args.remask_limit < 0:
        parser.error("--passes must be at least 1 and --remask-limit at least 0")
    for name in ("corruption", "second_guess", "reveals", "plain", "own_states", "prompt_share"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must lie in [0, 1]")
    if args.reveals + args.plain > 1:
        parser.error("--reveals and --plain must not sum to more than 1")
    if args.keep_weight < 0 or args.seed < 0:
        parser.error("--keep-weight and --seed must not be negative")
    if args.ask is not None and args.passes and len(args.passes) > 1:
        parser.error("--ask takes one number of --passes")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json} is a folder")


def load(args) -> None:
    args.model = rm.load_checkpoint(args.checkpoint, "text", args.device, ("variant", "tokenizer", "graders", "haste"))
    if args.haste:
        args.model[1]["haste"] = [(1, args.haste[0])]
    if args.doubt:
        args.model[1]["doubt"] = [(1, args.doubt[0])]
    given = args.haste or args.doubt or args.remask_limit is not None
    if given and args.model[1]["variant"] in ("base", "sft"):
        raise InputError(f"{args.checkpoint} never revises: --haste, --doubt and --remask-limit have no effect on it")


def main() -> None:
    args = parse_arguments()
    args.device = rm.start_device(args.device)
    args.precision = args.precision or rm.best_precision(args.device)
    if rm.dist.is_initialized() and (args.evaluate or args.ask is not None):
        raise InputError("torchrun is for training; run this with one process")
    if args.ask is not None or args.evaluate:
        load(args)
        result = ask(args) if args.ask is not None else evaluate_checkpoint(args)
    else:
        result = train_all(args)
    if args.json and rm.is_main_process():
        rm.write_json(args.json, result)


if __name__ == "__main__":
    rm.run_script(main)
