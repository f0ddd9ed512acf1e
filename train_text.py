"""Task 2: text.  A small mask diffusion model writes an answer to a prompt, then revises it.

    python train_text.py                             base, SFT and RM on --task code: half an hour
    python train_text.py --task all --history        math, code and choice in turn; RM + history too
    python train_text.py --evaluate                  score the shipped checkpoint
    python train_text.py --ask "number of evens|4 3:1|5 8:1" --passes 9          watch it revise
    python train_text.py --data TRAIN.jsonl --test TEST.jsonl   lines {"prompt": ..., "answer": ...}

A base learns plain mask diffusion; from it come vanilla SFT and RM, with the same data and steps.
What differs from the paper: a million parameters on generated problems, prompts intact in
post-training, mistakes that the base proposes with part of the answer visible, Muon.
"""

import json
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import reflective_masking as rm
from history import HistoryReference, history_embedding
from reflective_masking import InputError, MaskDiffusionTransformer as Model, TransformerConfig

SHIPPED = Path(__file__).parent / "checkpoints/text_rm.pt"
MASK, PAD, END = 0, 1, 2
SPECIAL = ["_", "·", "¶"]  # how the terminal shows them
VARIANTS = {"base": "base", "sft": "vanilla SFT", "rm": "RM", "history": "RM + history"}  # labels
REVISING = ("rm", "history")
GAMMA = 0.5  # of history; the paper states none, and 0.9 misleads in Sudoku
LAWS = {"ours": (0.75, 0.5), "paper": (0, 0.3)}  # rows in a reveal; of the others' tokens proposed
MOMENTS = (8 / 12, 3 / 12, 1 / 12)  # of rows in a reveal: before it, after it, mistakes re-masked
SIZE = (128, 4)  # width and layers of the network: 0.8 M parameters
BATCH_SIZE = 32
LEARNING_RATE = {"base": 2.5e-3, "sft": 4e-4, "rm": 4e-4, "history": 4e-4}
MUON_FACTOR = 3  # at 8, the default, a base learns far slower
PROMPT_SHARE = 0.2  # of the base's rows mask the prompt too
TOP_K = 4  # a mistake is among the base's likeliest tokens
HASTES = (1, 1.5, 2, 3)  # how many times as fast masks may be revealed as at an even pace
VALIDATION = 300  # problems, to choose among HASTES
TEST_SEED = 1  # of the published test problems


# ------------------------------------------------------------------------------------------------
# Problems, their text and tokens


class Problem(NamedTuple):
    prompt: str
    answer: str
    subject: str = "all"
    task: str = "own"  # decides how an answer is graded
    where: str = "the prompt"  # how an error names it


def split(text: str, words: bool) -> list[str]:
    return text.split(" ") if words else list(text)


@dataclass
class Tokenizer:
    """Characters, or words between single spaces, to ids.  Row: PAD... prompt | answer END PAD...

    Every answer starts at the same place; END and PAD are predicted, so answers vary in length.
    """

    symbols: list[str]
    words: bool
    prompt_length: int
    answer_length: int  # N of the reports: END counted

    @classmethod
    def of(cls, known: list[Problem], problems: list[Problem], words: bool) -> "Tokenizer":
        """The vocabulary of the known problems, and lengths that hold all problems."""
        symbols = {symbol for p in known for text in p[:2] for symbol in split(text, words)}
        prompt_length = max(len(split(p.prompt, words)) for p in problems)
        answer_length = max(len(split(p.answer, words)) for p in problems) + 1
        return cls(sorted(symbols), words, prompt_length, answer_length)

    def __post_init__(self):
        self.shown = [*SPECIAL, *self.symbols]  # by id
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols, len(SPECIAL))}
        self.space = " " if self.words else ""

    def encode(self, text: str, where: str) -> list[int]:
        try:
            return [self.ids[symbol] for symbol in split(text, self.words)]
        except KeyError as error:
            raise InputError(f"{where} has {error}, which the training data lack") from None

    def rows(self, problems: list[Problem], answers: bool = False) -> Tensor:
        """int64 [n, prompt_length + answer_length]; without answers MASK stands in their place."""
        rows = []
        for problem in problems:
            prompt = self.encode(problem.prompt, problem.where)
            if not 0 < len(prompt) <= self.prompt_length:
                wanted = f"must have 1 to {self.prompt_length} tokens"
                raise InputError(f"{problem.where} {wanted}, got {len(prompt)}")
            answer = [MASK] * self.answer_length
            if answers:
                answer = [*self.encode(problem.answer, problem.where), END]
            before = [PAD] * (self.prompt_length - len(prompt))
            after = [PAD] * (self.answer_length - len(answer))
            rows.append(before + prompt + answer + after)
        return torch.tensor(rows)

    def text(self, ids: list[int]) -> str:
        """The answer that ids, prompt excluded, spell up to END or PAD; a MASK shows as _."""
        spelled = takewhile(lambda token: token not in (END, PAD), ids)
        return self.space.join(self.shown[token] for token in spelled)


class Author(random.Random):
    """Each template returns a prompt, in math the steps of a right answer, and the result."""

    def integers(self, *bounds: tuple[int, int]) -> list[int]:
        return [self.randint(*pair) for pair in bounds]

    def plus(self, a: int, b: int) -> str:
        a, b = self.sample((a, b), 2)
        return f"{a}+{b}={a + b}"

    def times(self, a: int, b: int) -> str:
        a, b = self.sample((a, b), 2)
        return f"{a}*{b}={a * b}"

    def sum_of_products(self):
        a, b, c, d = self.integers(*[(2, 9)] * 4)
        steps = self.sample([self.times(a, b), self.times(c, d)], 2)
        return f"{a}*{b}+{c}*{d}", *steps, self.plus(a * b, c * d), a * b + c * d

    def linear_equation(self):
        a, bracket, b = self.integers((2, 9), (2, 10), (1, 9))
        x = self.randint(1, bracket - 1)
        p, c = bracket - x, a * bracket + b
        solving = f"{c}-{b}={c - b}", f"{c - b}/{a}={bracket}", f"{bracket}-{p}={x}"
        checking = self.plus(x, p), self.times(a, bracket), self.plus(a * bracket, b)
        return f"solve {a}(x+{p})+{b}={c}", *self.choice((solving, checking)), x

    def three_unknowns(self):
        a, b, z = self.integers((2, 9), (2, 9), (1, 9))
        x, y = self.integers((1, a - 1), (1, b - 1))
        p, q = a - x, b - y
        steps = self.plus(x, p), self.plus(y, q), self.times(a, b), self.plus(a * b, z)
        return f"(x+{p})(y+{q})+z={a * b + z}: x, y, z?", *steps, f"{x},{y},{z}"

    def number_with_remainder(self):
        b, quotient = self.integers((3, 9), (1, 9))
        rest = self.randint(1, b - 1)
        number = b * quotient + rest
        steps = self.times(b, quotient), self.plus(b * quotient, rest)
        prompt = f"over {self.randint(1, number - 1)}, leaves {rest} by {b}: number?"
        return prompt, *steps, number

    def red_and_blue(self):
        share, whole = sorted(self.sample(range(1, 10), 2))
        k = self.randint(1, 9)
        red, balls = k * share, k * whole
        steps = self.sample([self.times(k, share), self.times(k, whole)], 2)
        prompt = f"{share}/{whole} red, over {self.randint(1, balls - 1)} balls: red, blue?"
        return prompt, *steps, f"{balls}-{red}={balls - red}", f"{red},{balls - red}"

    def rectangle(self):
        a, b = self.integers((1, 36), (2, 36))
        steps = f"{2 * (a + b)}/2={a + b}", f"{a}+{b}={a + b}"
        side = self.randint(1, max(a, b) - 1)
        return f"perimeter {2 * (a + b)}, a side over {side}: sides?", *steps, f"{a},{b}"

    def dot_product(self):
        a, b, c, d = self.integers(*[(1, 9)] * 4)
        steps = self.sample([self.times(a, c), self.times(b, d)], 2)
        return f"({a},{b}) dot ({c},{d})", *steps, self.plus(a * c, b * d), a * c + b * d

    def program(self):
        """A specification in words with two examples; the answer is one of its programs."""
        condition = self.choice(list(CONDITIONS))
        finish = self.choice(list(FINISHES))
        mapping = "" if finish == "number of " else self.choice(list(MAPS))
        k, m = self.integers((1, 8), (2, 9))
        test = self.choice(CONDITIONS[condition])
        expression = self.choice(MAPS[mapping])
        program = self.choice(FINISHES[finish]).format(e=expression, test=test).format(k=k, m=m)

        prompt = f"{finish}{mapping}{condition}".format(k=k, m=m)
        while prompt.count("|") < 2:
            xs = self.integers((0, 9), (0, 9))
            with suppress(ValueError):  # nothing is the largest of no values
                shown = eval(compiled(program), {"xs": xs})  # our own text, never a model's
                shown = shown if isinstance(shown, list) else [shown]
                prompt += f"|{' '.join(map(str, xs))}:{' '.join(map(str, shown))}"
        return prompt, program

    def which_is(self):
        """Four options, one right: a product, a sum, the next of a sequence, the largest."""
        kind = self.randrange(4)
        if kind == 0:
            a, b = self.integers((2, 9), (2, 9))
            question, right = f"{a}*{b}", a * b
        elif kind == 1:
            a, b = self.integers((10, 45), (10, 45))
            question, right = f"{a}+{b}", a + b
        elif kind == 2:
            a, step = self.integers((1, 36), (2, 9))
            question, right = f"next of {a}, {a + step}, {a + 2 * step}", a + 3 * step
        else:
            question, right = "the largest", self.randint(10, 90)
        wrong = range(1, right) if kind == 3 else range(max(1, right - 10), right + 11)
        options = self.sample([value for value in wrong if value != right], 3)
        place = self.randrange(4)
        options.insert(place, right)
        return "{}? A {} B {} C {} D {}".format(question, *options), "ABCD"[place]


CONDITIONS = {  # words: the same in Python, any of these
    "evens": [" if x%2==0", " if x%2<1"],
    "odds": [" if x%2==1", " if x%2>0"],
    "x over {k}": [" if x>{k}", " if {k}<x"],
    "x under {k}": [" if x<{k}", " if {k}>x"],
    "all x": [""],
}
MAPS = {  # words: what becomes of x
    "": ["x"],
    "squares of ": ["x*x", "x**2"],
    "doubles of ": ["2*x", "x*2", "x+x"],
    "{m} more than ": ["x+{m}", "{m}+x"],
    "{m} times ": ["{m}*x", "x*{m}"],
    "minus ": ["-x", "0-x"],
}
FINISHES = {  # words: the program around {e} and {test}
    "": ["[{e} for x in xs{test}]"],
    "sorted ": ["sorted({e} for x in xs{test})"],
    "reversed ": ["[{e} for x in xs{test}][::-1]", "[{e} for x in xs[::-1]{test}]"],
    "sum of ": ["sum({e} for x in xs{test})", "sum([{e} for x in xs{test}])"],
    "largest of ": ["max({e} for x in xs{test})"],
    "number of ": ["len([{e} for x in xs{test}])", "sum(1 for x in xs{test})"],
}
compiled = cache(partial(compile, filename="program", mode="eval"))
SOLVES = {  # questions with several right results: does one solve n, the prompt's numbers
    "x, y, z?": lambda n, x, y, z: (x + n[0]) * (y + n[1]) + z == n[2],
    "number?": lambda n, a: a > n[0] and a % n[2] == n[1],
    "red, blue?": lambda n, a, b: a * n[1] == (a + b) * n[0] and a + b > n[2],
    "sides?": lambda n, a, b: 2 * (a + b) == n[0] and max(a, b) > n[1],
}
TASKS = {  # task -> subject -> its template
    "math": {
        "prealgebra": Author.sum_of_products,
        "algebra": Author.linear_equation,
        "intermediate algebra": Author.three_unknowns,
        "number theory": Author.number_with_remainder,
        "counting & probability": Author.red_and_blue,
        "geometry": Author.rectangle,
        "precalculus": Author.dot_product,
    },
    "code": {"all": Author.program},
    "choice": {"all": Author.which_is},
}


def generate(task: str, count: int, part: str, seed: int) -> list[Problem]:
    """count problems, subjects in equal shares.  No prompt is in two parts, or in a test twice."""
    author = Author(f"{task} {part} {seed}")
    subjects = list(TASKS[task].items())
    problems = []
    seen = set()
    for _ in range(20_000 + 100 * count):
        subject, template = subjects[len(problems) % len(subjects)]
        prompt, *steps, result = template(author)
        answer = ";".join(steps) + f"#### {result}" if steps else result
        here = {0: "test", 1: "validation"}.get(zlib.crc32(prompt.encode()) % 10, "train")
        if here == part and (part == "train" or prompt not in seen):
            seen.add(prompt)
            problems.append(Problem(prompt, answer, subject, task))
        if len(problems) == count:
            return problems
    raise InputError(f"there are too few different {task} problems for {count} of {part}")


class Data(NamedTuple):
    name: str
    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    tokenizer: Tokenizer


def generated_data(task: str, pool: int, n: int) -> Data:
    """pool problems to train on, n to test on; the same for every seed of training."""
    train = generate(task, pool, "train", 0)
    held_out = generate(task, min(n, VALIDATION), "validation", TEST_SEED)
    test = generate(task, n, "test", TEST_SEED)
    everything = train + held_out + test
    return Data(task, train, held_out, test, Tokenizer.of(everything, everything, words=False))


def own_data(name: str, found: list[Problem], tests: list[Problem], words: bool = False) -> Data:
    """Problems of read_problems; prompts of the test are left out of training."""
    tested = {p.prompt for p in tests}
    kept = [p for p in found if p.prompt not in tested]
    rm.say(f"{len(found) - len(kept)} of {len(found)} training problems are in the test: left out")
    if not kept:
        raise InputError("every training problem is in the test")
    longest = max(kept + tests, key=lambda p: len(split(p.answer, words)))
    tokenizer = Tokenizer.of(kept, kept + tests, words)
    rm.say(f"answers take {tokenizer.answer_length} tokens, as long as that of {longest.where}")
    some = random.Random(0).sample(kept, min(len(kept) // 10 + 1, VALIDATION))  # not held out
    return Data(f"own_{name}", kept, some, tests, tokenizer)


def read_problems(
    path: Path, words: bool = False, prompt_key: str = "prompt", answer_key: str = "answer",
    max_length: int = 10**9,
) -> list[Problem]:  # fmt: skip
    """JSON objects, one a line; InputError names the file and the line."""
    problems = []
    lines = rm.read_lines(path)
    for number, line in lines:
        where = f"{path} line {number}"
        wanted = f'{{"{prompt_key}": text, "{answer_key}": text}}, neither empty'
        with rm.naming(where, f"must be {wanted}"):
            found = json.loads(line)
            prompt, answer = found[prompt_key], found[answer_key]
            if prompt_key == "instruction" and found.get("input"):  # alpaca: part of the prompt
                prompt = f"{prompt} {found['input']}"
            rm.require(prompt.encode() and answer.encode(), "a text is empty")
        if all(len(split(text, words)) <= max_length for text in (prompt, answer)):
            problems.append(Problem(prompt, answer, where=where))
    if len(problems) < len(lines):
        left_out = f"{len(lines) - len(problems)} of {len(lines)}"
        rm.say(f"{left_out} in {path} are over {max_length} tokens: left out")
    if not problems:
        raise InputError(f"{path} has no problem of at most {max_length} tokens")
    return problems


def check_test(tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """InputError for a prompt that cannot be read; says which answers cannot be written."""
    tokenizer.rows(problems)
    answers = [split(p.answer, tokenizer.words) for p in problems]
    fits = [len(a) < tokenizer.answer_length and tokenizer.ids.keys() >= {*a} for a in answers]
    if not all(fits):
        rm.say(f"{fits.count(False)} of {len(fits)} test answers cannot be written: never right")


# ------------------------------------------------------------------------------------------------
# Graders


def grade(problems: list[Problem], answers: list[str]) -> list[bool]:
    """Which answers are right; programs by what they compute, any other by has_right_result."""
    if problems[0].task == "code":  # then all are: of a task, or own
        return run_programs(problems, answers)
    return list(map(has_right_result, problems, answers))


def has_right_result(problem: Problem, answer: str) -> bool:
    """Whether it is the reference; where that has #### (gsm8k), what follows the last decides."""
    if "####" not in problem.answer or "####" not in answer:
        return answer == problem.answer
    result, reference = (x.rpartition("####")[2].strip() for x in (answer, problem.answer))
    solves = SOLVES.get(problem.prompt.rpartition(": ")[2])  # math: any integers that solve it
    if problem.task != "math" or solves is None:
        return result == reference
    values, given = ([int(n) for n in re.findall(r"\d+", x)] for x in (result, problem.prompt))
    as_many = len(values) == reference.count(",") + 1
    well_formed = result == ",".join(map(str, values)) and 0 not in values
    return as_many and well_formed and solves(given, *values)


PROGRAM_SECONDS = 1.0
RUNNER = r"""
import ast, json, os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (512 << 20,) * 2)  # bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
ALLOWED = {f.__name__: f for f in (len, max, min, range, reversed, sorted, sum, abs, list)}

def outputs(program, cases):
    tree = ast.parse(program, mode="eval")
    for node in ast.walk(tree):  # no attributes: they lead from any object to everything
        if isinstance(node, (ast.Attribute, ast.Lambda)) or getattr(node, "id", "")[:1] == "_":
            raise ValueError
    code = compile(tree, "program", "eval")
    found = [eval(code, {"__builtins__": ALLOWED, "xs": list(xs)}) for xs in cases]
    items = [x for value in found for x in (value if type(value) is list else [value])]
    if not all(type(x) is int and abs(x) < 10**9 for x in items):
        raise ValueError
    return found

for line in sys.stdin:
    child = os.fork()
    if child == 0:  # a process a program, which may die of its limits
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))  # not caught: the process dies
            reference, program, cases = json.loads(line)
            status = int(outputs(reference, cases) != outputs(program, cases))
        finally:
            os._exit(status)
    print("ny"[os.waitpid(child, 0)[1] == 0], end="", flush=True)
"""


def run_programs(problems: list[Problem], programs: list[str]) -> list[bool]:
    """Whether each program gives what the reference gives on 20 hidden lists.

    None runs here: an isolated Python forks a process for each, short of time, memory and builtins.
    """
    lines = []
    for problem, program in zip(problems, programs):
        rng = random.Random(f"hidden {problem.prompt}")
        lists = [[rng.randint(-9, 12) for _ in range(rng.randint(4, 8))] for _ in range(20)]
        cases = [xs + [-8, 13, 100, 101] for xs in lists]  # these make no selection empty
        lines.append(json.dumps([problem.answer, program, cases]))
    command = [sys.executable, "-I", "-W", "ignore", "-c", RUNNER, str(PROGRAM_SECONDS)]
    runner = subprocess.run(
        command, input="\n".join(lines), text=True, stdout=subprocess.PIPE, check=True,
        timeout=60 + len(lines) * PROGRAM_SECONDS,
    )  # fmt: skip
    return [verdict == "y" for verdict in runner.stdout]


# ------------------------------------------------------------------------------------------------
# Training states: samplers for rm.train.  pool: int64 [P, prompt + answer]; start: of the answer


def sample_masks(
    batch_size: int, generator: torch.Generator, pool: Tensor, start: int, prompt_share: float = 0.0
) -> rm.Batch:
    """Plain mask diffusion: m of the answer's N positions are masked, m uniform in 1..N.

    In a share prompt_share of the rows the prompt's too.  LLaDA's weight 1/t, here 1/m, of mean 1.
    """
    uniform = partial(torch.rand, generator=generator, device=pool.device)
    clean = pool[torch.randint(len(pool), (batch_size,), generator=generator, device=pool.device)]
    with_prompt = uniform(batch_size, 1) < prompt_share
    in_answer = torch.arange(clean.shape[1], device=pool.device) >= start
    editable = in_answer | with_prompt & (clean != PAD)
    count = editable.sum(-1, keepdim=True)  # N
    masks = (uniform(batch_size, 1) * count).long() + 1  # uniform in 1..N
    rank = uniform(clean.shape).masked_fill(~editable, 2).argsort(-1).argsort(-1)  # random
    masked = rank < masks
    weight = (masked.sum() / (batch_size * masks)).expand(clean.shape)
    return clean.masked_fill(masked, MASK).unsqueeze(0), clean, masked, weight


def topk_wrong(
    logits: Tensor, clean: Tensor, mask_id: int, k: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Plausible mistakes: uniform over the k likeliest tokens of a frozen model.

    logits: float [B, N, V], the model's at masked positions (one forward pass); the truth, MASK and
    tokens at -inf are never drawn.  Returns int64 [B, N].  ValueError: a position has none left.
    """
    allowed = logits.scatter(-1, clean.unsqueeze(-1), -torch.inf)
    allowed[..., mask_id] = -torch.inf
    ranked = allowed.topk(max(1, min(k, logits.shape[-1] - 2)), dim=-1)
    possible = (ranked.values > -torch.inf).sum(-1)
    rm.require(bool((possible > 0).all()), "logits leave no wrong token to draw at some position")
    uniform = torch.rand(clean.shape, generator=generator, device=clean.device)
    pick = (uniform * possible).long()  # ~ U{0..possible-1}
    return ranked.indices.gather(-1, pick.unsqueeze(-1)).squeeze(-1)


def sample_revision(
    batch_size: int, generator: torch.Generator, pool: Tensor, start: int,
    base: Model, law: str = "ours", remember: int = 1,
) -> rm.Batch:  # fmt: skip
    """Synthetic revisions of the answer; what is wrong was proposed by the frozen base.

    Law "ours", of all rows: half show masks and the truth, as SFT's do; 3/16 masks of which the
    base has just filled several at once; 1/16 what was wrong there re-masked (reveal_trajectory).
    A quarter are drafts: about half of the tokens were drawn from the base's TOP_K by its
    probabilities, truth included.  It read the answer without them and without a random share of
    the rest, so that a mistake fits what stands around it.
    Law "paper": proposals in all rows, drawn from TOP_K evenly, never the truth, by a base that
    reads the prompt alone.  In both, a quarter of the drafts starts empty.  remember: of
    reveal_trajectory.
    """
    uniform = partial(torch.rand, generator=generator, device=pool.device)
    reveals, proposed = LAWS[law]
    clean = pool[torch.randint(len(pool), (batch_size,), generator=generator, device=pool.device)]
    editable = (torch.arange(clean.shape[1], device=pool.device) >= start).expand_as(clean)
    length = clean.shape[1] - start  # N

    in_reveal = uniform(batch_size, 1) < reveals
    masks = (uniform(batch_size, 1) * length).long() + 1  # uniform in 1..N, as SFT's
    rank = uniform(clean.shape).masked_fill(~editable, 2).argsort(-1).argsort(-1)  # random
    not_empty = uniform(batch_size, 1) > 0.25
    share = uniform(batch_size, 1) * not_empty * 2 * proposed / 0.75  # mean `proposed`, unless > 1
    is_proposed = editable & (uniform(clean.shape) < share)
    unread = uniform(batch_size, 1) if law == "ours" else 1
    unread = editable & (is_proposed | (uniform(clean.shape) < unread))
    probe = clean.masked_fill(torch.where(in_reveal, rank < masks, unread), MASK)
    with torch.no_grad(), rm.mixed_precision(pool.device):
        logits = base(history_embedding(probe.unsqueeze(0), base.embedding, 0.0, False)).float()

    if law == "paper":
        proposal = topk_wrong(logits, clean, MASK, TOP_K, generator)
    else:
        logits[..., MASK] = -torch.inf
        likely, tokens = logits.topk(min(TOP_K, logits.shape[-1] - 1), dim=-1)
        pick = torch.multinomial(likely.softmax(-1).flatten(0, 1), 1, generator=generator)
        proposal = tokens.gather(-1, pick.view(*clean.shape, 1)).squeeze(-1)
    moving = editable & ~(is_proposed & (proposal == clean))  # a draw of the truth stands
    trajectory = rm.sample_trajectory(clean, moving, proposal, MASK, 6, is_proposed, generator)
    turn = torch.randint(6, (batch_size,), generator=generator, device=pool.device)

    if reveals:
        how = (rank, masks, length, generator, remember)
        revealed, moment = reveal_trajectory(clean, logits, *how)
        trajectory, revealed = pad_sequence([trajectory, revealed]).unbind(1)  # equally long
        trajectory = torch.where(in_reveal, revealed, trajectory)
        turn = torch.where(in_reveal.squeeze(1), moment, turn)
    return rm.history_until(trajectory, turn), clean, editable


def reveal_trajectory(
    clean: Tensor, logits: Tensor, rank: Tensor, masks: Tensor, length: int,
    generator: torch.Generator, remember: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ours: a decoding up to a parallel reveal, int64 [K, B, L]; for each row a turn, int64 [B].

    In 1 to `remember` turns, as many in all rows, of which a history reads, the truth is revealed
    until `masks` positions are left.  Then the base reveals at once the k it is surest of, some of
    them wrong; in half of the rows the truth follows at some others.  Then what is wrong is
    re-masked.  The turn is that before the reveal, after it or after this, in shares MOMENTS.

    L is prompt + answer.  rank: int64 [B, L], below `length` in the answer.  masks: int64 [B, 1].
    logits: float [B, L, V], the base's where the `masks` positions of lowest rank are masked.
    """
    uniform = partial(torch.rand, generator=generator, device=clean.device)
    batch = len(clean)
    turns = int(torch.randint(1, remember + 1, (), generator=generator, device=clean.device))
    passed = torch.arange(turns + 1, device=clean.device).view(-1, 1, 1) / turns  # 0, ..., 1
    revealing = clean.masked_fill(rank < length - (length - masks) * passed, MASK)

    k = ((masks + 1) ** uniform(batch, 1)).long()  # log-uniform in 1..masks
    draft = rm.decide(logits, revealing[-1], MASK, reveal=k, allow_remask=False)
    half = uniform(batch, 1) < 0.5
    share = uniform(batch, 1)
    follows = (draft == MASK) & half & (uniform(clean.shape) < share)
    draft = torch.where(follows, clean, draft)
    corrected = draft.masked_fill(draft != clean, MASK)

    shares = torch.tensor(MOMENTS, device=clean.device)
    moment = torch.multinomial(shares, batch, replacement=True, generator=generator)
    trajectory = torch.cat([revealing, draft.unsqueeze(0), corrected.unsqueeze(0)])
    return trajectory, turns + moment


# ------------------------------------------------------------------------------------------------
# Decoding and scores


def reveal_at_pace(
    logits, tokens, mask_id, editable, turn: int, max_turns: int, haste: float, allow_remask: bool
) -> Tensor:
    """A rule of rm.revise: of the masks, haste times their even share of the turns that are left.

    The most confident go first.  Haste 1 without re-masking is LLaDA's low-confidence decoding; a
    higher one reveals more at first, where tokens are sure, and leaves passes for revision.
    """
    masks = (tokens == mask_id).sum(-1)
    count = (haste * masks / (max_turns + 1 - turn)).ceil().long()
    return rm.decide(logits, tokens, mask_id, editable, count, allow_remask=allow_remask)


def decode(model: Model, info: dict, rows: Tensor, passes: int) -> Iterator[rm.Revision]:
    """Answers Tokenizer.rows in at most `passes` forward passes; a Revision for every 256 rows.

    All variants reveal by reveal_at_pace; rm and history re-mask by Eq. 1.  The haste is the one
    chosen for the scored number of passes that is nearest to `passes` in ratio, else 1.
    """
    length = info["tokenizer"]["answer_length"]
    device = model.embedding.device
    editable = torch.arange(rows.shape[1], device=device) >= rows.shape[1] - length
    ratio = lambda scored: max(scored[0] / passes, passes / scored[0])
    _, haste = min(info["haste"], key=ratio, default=(passes, 1))
    rule = partial(reveal_at_pace, haste=haste, allow_remask=info["variant"] in REVISING)

    denoiser = rm.mixed_precision(device)(model)
    for part in rows.to(device).split(256):
        history = HistoryReference(model.embedding.detach(), info["gamma"])
        yield rm.revise(denoiser, part, MASK, history, passes, editable, trace=True, rule=rule)


def evaluate(model: Model, info: dict, problems: list[Problem], passes: int) -> dict:
    """Shares of right answers, of all and by subject; right: one character per prompt."""
    tokenizer = Tokenizer(**info["tokenizer"])
    answers = []
    for result in decode(model, info, tokenizer.rows(problems), passes):
        answers += map(tokenizer.text, result.tokens[:, tokenizer.prompt_length :].tolist())
    verdicts = grade(problems, answers)
    right = {"all": ""}
    for problem, verdict in zip(problems, verdicts):
        for name in {"all", problem.subject}:
            right[name] = right.get(name, "") + "01"[verdict]
    return {
        "accuracy": sum(verdicts) / len(problems),
        "ci95": rm.bootstrap_interval(verdicts, 2000),
        "n": len(problems),
        "passes": passes,
        "subjects": {name: ones.count("1") / len(ones) for name, ones in right.items()},
        "right": right,
    }


def evaluate_all(
    model: Model, info: dict, test: list[Problem], passes: list[int] | None,
    validation: list[Problem] | None = None,
) -> list[dict]:  # fmt: skip
    """A score for each number of forward passes: those given, or N/16 to N for answers of N."""
    length = info["tokenizer"]["answer_length"]
    usual = {max(1, round(length * 2**power)) for power in range(-4, 1)}
    scores = []
    for count in sorted(passes or usual):
        if validation:  # first the one of HASTES that gets most of these right goes into info
            tried = [info | {"haste": [(count, haste)]} for haste in HASTES]
            best = max(tried, key=lambda how: evaluate(model, how, validation, count)["accuracy"])
            info["haste"] += best["haste"]
        scores.append(evaluate(model, info, test, count))
        found = "{accuracy:.1%} ({ci95[0]:.1%} to {ci95[1]:.1%})".format(**scores[-1])
        rm.say(f"{VARIANTS[info['variant']]}, {count} passes: {found}")
    return scores


def ask(model: Model, info: dict, prompt: str, passes: int | None) -> dict:
    """Answers one prompt and shows every turn."""
    tokenizer = Tokenizer(**info["tokenizer"])
    rows = tokenizer.rows([Problem(prompt, "")])
    (result,) = decode(model, info, rows, passes or tokenizer.answer_length)
    trace = result.trace[:, 0, tokenizer.prompt_length :].tolist()
    print("_ masked   (_) re-masked, (x) revealed in this turn   ¶ end   · pad\n")
    for turn, (before, now) in enumerate(pairwise(trace[:1] + trace)):
        marks = ["{}" if token == old else "({})" for token, old in zip(now, before)]
        parts = [mark.format(tokenizer.shown[token]) for mark, token in zip(marks, now)]
        print(f"turn {turn:2}  {tokenizer.space.join(parts)}")
    answer = tokenizer.text(now)
    turns, status = result.turns[0], result.status[0]
    print(f"\n{prompt}\n{answer}\n{status} after {turns} forward passes")
    return {"prompt": prompt, "answer": answer, "turns": turns, "status": status}


# ------------------------------------------------------------------------------------------------
# Training and the command line


def train_variant(
    variant: str, config: TransformerConfig, data: Data, pool: Tensor, steps: int, out: Path,
    passes: list[int] | None = None, law: str = "ours", compile: bool = False, seed: int = 0,
) -> dict:  # fmt: skip
    """Trains a variant, going on if interrupted, and scores it; or returns its finished record."""
    torch.manual_seed(seed)
    model = Model(config).to(pool.device)
    base = None
    if variant != "base":  # which was trained before: all others start from it
        base, _ = rm.load_checkpoint(out / f"{data.name}_base_seed0.pt", "text", pool.device)
        model.load_state_dict(base.state_dict())
    settings = {
        "data": rm.fingerprint(pool, *data.tokenizer.symbols),
        "test": rm.fingerprint(*(text for p in data.test for text in p[:4])),
        "start": rm.fingerprint(*model.state_dict().values()),
        "steps": steps,
        "passes": passes,
        "law": [*LAWS[law], *MOMENTS] if variant in REVISING else None,
    }
    run = rm.Run(out / f"{data.name}_{variant}_seed{seed}", settings)
    if run.record:
        return run.record

    sample = {
        "base": partial(sample_masks, prompt_share=PROMPT_SHARE),
        "sft": sample_masks,
        "rm": partial(sample_revision, base=base, law=law),
        "history": partial(sample_revision, base=base, law=law, remember=16),
    }[variant]
    info = {
        "variant": variant,
        "trained_on": data.name,
        "gamma": GAMMA if variant == "history" else 0.0,
        "tokenizer": asdict(data.tokenizer),
        "haste": [],
    }
    every = max(1, steps // 20)
    for step, stats in rm.train(
        model, partial(sample, pool=pool, start=data.tokenizer.prompt_length), steps, MASK,
        BATCH_SIZE, info["gamma"], learning_rate=LEARNING_RATE[variant], muon_factor=MUON_FACTOR,
        warmup=min(100, steps // 5 + 1), compile=compile, **run.files(every),
        seed=seed + 1000 * list(VARIANTS).index(variant),
    ):  # fmt: skip
        if step % every == 0 or step == steps:
            run.show(step, steps, stats, scores={})

    if rm.is_main_process():
        info["test"] = evaluate_all(model, info, data.test, passes, data.validation)
    return run.finish(model, "text", **info, seed=seed, steps=steps, compiled=compile)


def train_all(
    data: Data, out: Path, device: torch.device, base_steps: int, steps: int,
    history: bool = False, size: tuple[int, int] = SIZE, seed: int = 0, **options,
) -> dict:  # fmt: skip
    """Every variant, then table and figure.  size: width, layers.  options: of train_variant."""
    check_test(data.tokenizer, data.test)
    pool = data.tokenizer.rows(data.train, answers=True).to(device)
    shape = (len(data.tokenizer.shown), pool.shape[1], *size)
    config = TransformerConfig(*shape, feed_forward=4 * size[0], positions="both")
    plan = {"base": base_steps} | dict.fromkeys(["sft", "rm"] + ["history"] * history, steps)
    records = {}
    for variant, count in plan.items():
        options["seed"] = 0 if variant == "base" else seed  # seeds share the base of a folder
        records[variant] = train_variant(variant, config, data, pool, count, out, **options)
    if not rm.is_main_process():
        return {}

    result = report(data.name, records)
    lines = {}
    for variant, rows in result["scores"].items():
        lines[VARIANTS[variant]] = [(row["passes"], row["accuracy"], row["ci95"]) for row in rows]
    path = out / f"text_{data.name}_seed{seed}.png"
    rm.draw_lines(path, lines, "forward passes", "right answers, %", log=True)
    rm.write_json(path.with_suffix(".json"), result)
    return result


def report(name: str, records: dict[str, dict]) -> dict:
    """Scores of the variants and paired differences to SFT at equal passes; prints both."""
    scores = {variant: record.pop("test") for variant, record in records.items()}
    passes = "".join(f"{row['passes']:8}" for row in scores["sft"])
    print(f"\n{f'{name}, right % at passes':38}{passes}")
    for subject in scores["sft"][0]["subjects"]:
        for variant, rows in scores.items():
            cells = "".join(f"{100 * row['subjects'][subject]:8.1f}" for row in rows)
            print(f"{subject:24}{VARIANTS[variant]:14}{cells}")

    minus_sft = {variant: [] for variant in REVISING if variant in scores}
    for variant, differences in minus_sft.items():
        for row, sft in zip(scores[variant], scores["sft"]):
            ours, theirs = row["right"], sft["right"]
            paired = {name: rm.paired_bootstrap(ours[name], theirs[name]) for name in ours}
            differences.append({"passes": row["passes"], **paired})
            found = "{difference:+.1%} ({ci95[0]:+.1%} to {ci95[1]:+.1%})".format(**paired["all"])
            print(f"{VARIANTS[variant]} minus SFT at {row['passes']} passes: {found}")
    return {"scores": scores, "minus_sft": minus_sft, "records": records}


def parse_arguments():
    options = rm.Options(description="Trains base, SFT and RM, prints their scores and draws them.")
    positive = rm.number(int, 1)
    train = ("--task", "--data")  # modes: training on a task, on own data, ...
    evaluate = ("--evaluate", "--evaluate --test")
    add = options.group("in place of training")
    add("--evaluate", action="store_true", modes=evaluate, help="score --checkpoint")
    add("--ask", metavar="PROMPT", help="answer one prompt and show every turn")
    add = options.group("generated problems", "--task")
    add("--task", choices=[*TASKS, "all"], default="code", help="default code")
    add("--pool", type=positive, default=100_000, help="to train on (default 100000)")
    add = options.group("own problems", "--data", "--evaluate --test")
    add("--data", type=Path, metavar="TRAIN.jsonl", modes=("--data",), help="train; needs --test")
    add("--test", type=Path, metavar="TEST.jsonl", help="score on these")
    add("--prompt-key", default="prompt", metavar="KEY", help="question, instruction, ...")
    add("--answer-key", default="answer", metavar="KEY", help="output, ...")
    add("--max-length", type=positive, default=10**9, metavar="TOKENS", help="drop longer texts")
    add("--words", action="store_true", modes=("--data",), help="tokens are words, not characters")
    add = options.group("training", *train)
    add("--law", choices=LAWS, default="ours", help="of RM's training states (default ours)")
    add("--history", action="store_true", help="also train RM + history (Eq. 2)")
    add("--base-steps", type=positive, default=3000, help="of the base (default 3000)")
    add("--steps", type=positive, default=1500, help="of each other variant (default 1500)")
    add("--compile", action="store_true", help="torch.compile (on CPU needs a C++ compiler)")
    add = options.group("decoding")
    modes = (*evaluate, "--ask")
    add("--checkpoint", type=Path, default=SHIPPED, modes=modes, help="default: the shipped one")
    add("--n", type=positive, default=1050, modes=train + evaluate, help="test problems (1050)")
    add("--passes", type=positive, nargs="+", help="at most (default N/16 to N; with --ask N)")
    seed = "with --evaluate of the test problems (1), else of training after the base"
    options.general("runs/text", seed, train, (*train, "--evaluate"))

    def mode_of(args) -> str:
        mode = next((mode for mode in ("ask", "evaluate", "data") if mode in args.given), "task")
        return f"--{mode} --test" if mode == "evaluate" and args.test else f"--{mode}"

    small = {"base_steps": 4, "steps": 4, "pool": 200, "n": 14, "passes": [1, 3]}
    args = options.parse(mode_of, small)
    if args.mode == "--data" and not args.test:
        options.error("--data needs --test")
    if args.mode == "--ask" and "passes" in args.given and len(args.passes) > 1:
        options.error("--passes takes one number with --ask")
    return args


def main() -> None:
    args = parse_arguments()
    device = rm.start_device(args.device)
    keys = {"prompt_key": args.prompt_key, "answer_key": args.answer_key}
    read = partial(read_problems, **keys, max_length=args.max_length)
    names = ("out", "base_steps", "steps", "history", "seed", "passes", "law", "compile")
    plan = {name: getattr(args, name) for name in names}
    train = partial(train_all, device=device, size=(32, 1) if args.smoke else SIZE, **plan)
    if args.mode == "--data":
        found = read(args.data, args.words), read(args.test, args.words)[: args.n]
        result = train(own_data(args.data.stem, *found, args.words))
    elif args.mode == "--task":
        tasks = TASKS if args.task == "all" else [args.task]
        result = {task: train(generated_data(task, args.pool, args.n)) for task in tasks}
    else:
        result = use_checkpoint(args, read, device)
    rm.write_json(args.json, result)


def use_checkpoint(args, read: Callable, device: torch.device) -> dict:
    """Answers a prompt, or scores on own problems or on those of the task it was trained on."""
    needs = ("variant", "tokenizer", "trained_on", "gamma", "haste")
    model, info = rm.load_checkpoint(args.checkpoint, "text", device, needs)
    if args.mode == "--ask":
        return ask(model, info, args.ask, args.passes and args.passes[0])
    seed = args.seed if "seed" in args.given else TEST_SEED
    if args.test:
        test = read(args.test, info["tokenizer"]["words"])[: args.n]
    elif info["trained_on"] in TASKS:
        test = generate(info["trained_on"], args.n, "test", seed)
    else:
        raise InputError(f"the model was trained on {info['trained_on']}: it needs --test")
    check_test(Tokenizer(**info["tokenizer"]), test)
    about = {"variant": info["variant"], "seed": seed, "provenance": rm.provenance(device)}
    return about | {"scores": evaluate_all(model, info, test, args.passes)}


if __name__ == "__main__":
    rm.run_script(main)
