"""Checks and times every kernel against PyTorch; or, with --compile, asks the compiler about them.

    python tests/benchmark_kernels.py              tables, and results/kernels_<device>.json
    python tests/benchmark_kernels.py --compile    no GPU needed; results/kernels_compiled.json

Each table has a shape and these forms: the definition in plain PyTorch (eager), torch.compile of
it, the best unfused form, and ours, on a GPU with and without a CUDA graph where launches
dominate.  On CPU, where no kernel runs, it shows what sparsity and the recurrence gain alone.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
import reflective_masking as rm  # noqa: E402
from history import HistoryReference, history_embedding, rms_norm, rotate_pairs  # noqa: E402

SHAPES = {  # N, V, D
    "LLaDA-8B, 8 x 1024": (8192, 126464, 4096),
    "Lumina-DiMOO, 4096": (4096, 8193, 4096),
    "Sudoku, 512 boards": (41472, 10, 128),
}
CPU_SHAPES = {"N=4096 V=32000 D=512": (4096, 32000, 512)}  # float32
SMOKE_SHAPES = {"small": (96, 300, 32)}


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes; views make none."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        result = function(*args, **(keywords or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.nbytes)
        return result


class Benchmark:
    """Times forms of one computation side by side; keeps every row for the JSON file."""

    def __init__(self, device: str, smoke: bool):
        self.device = torch.device(device)
        self.smoke = smoke
        self.cuda = self.device.type == "cuda"
        self.rows = []
        self.impls = ("torch", "triton") if self.cuda or kernels.INTERPRETED else ("torch",)
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        # The two ceilings of this machine, measured: bytes and operations a second.
        size, side = (2**20, 256) if smoke else (2**27, 2048)
        if self.cuda:
            size, side = 2**29, 8192
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        a = torch.randn(side, side, device=device).to(self.dtype)
        self.bandwidth = 2 * size / self.seconds({"": lambda: target.copy_(source)})[""]
        self.rate = 2 * side**3 / self.seconds({"": lambda: a @ a})[""]
        copy, product = self.bandwidth / 1e9, self.rate / 1e12
        print(f"ceilings: copy {copy:,.0f} GB/s, {self.dtype} product {product:,.2f} TFLOP/s")

    def seconds(self, forms: dict[str, Callable], graph: bool = False) -> dict[str, float]:
        """Median seconds of each form; on CPU in turns, so a disturbance meets all of them."""
        if self.cuda:
            testing = kernels.triton.testing
            timer = testing.do_bench_cudagraph if graph else testing.do_bench
            return {k: timer(f, rep=100, return_mode="median") / 1e3 for k, f in forms.items()}
        times = {name: [] for name in forms}
        for _ in range(2 if self.smoke else 6):
            for name, form in forms.items():
                began = time.perf_counter()
                form()
                times[name].append(time.perf_counter() - began)
        return {name: statistics.median(values[1:]) for name, values in times.items()}

    def peak(self, form: Callable) -> float:
        """MiB beyond the inputs: the allocator's peak on a GPU, the largest tensor on CPU."""
        if not self.cuda:
            with LargestTensor() as largest:
                form()
            return largest.bytes / 2**20
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def table(
        self, kernel: str, shape: str, forms: dict[str, Callable], make: Callable[[], tuple],
        moved: float = 0, flops: float = 0, compiled: tuple[str, ...] = (),
        graphs: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Times forms, each called with make()'s inputs; on a GPU in turn with enough sets of them
        to exceed three times a 50 MB L2.  compiled, graphs: forms that a GPU also runs through
        torch.compile and in a CUDA graph.  moved, flops: bytes and operations nothing can avoid.
        Prints ratio, the first form's time over this one's; share, the floor over the time;
        differs, the relative distance from the first form's result.
        """
        floor = max(moved / self.bandwidth, flops / self.rate)
        work = f"{moved / 1e6:,.1f} MB, {flops / 1e9:,.1f} GFLOP, floor {floor * 1e6:,.1f} us"
        print(f"\n{kernel}: {shape}; {work}")
        memory = "peak MiB" if self.cuda else "largest MiB"
        print(f"  {'form':44}{'us':>12}{'ratio':>9}{'share':>8}{memory:>13}{'differs':>10}")
        inputs = [make()]
        if self.cuda:
            torch._dynamo.reset()
            for name in compiled:
                forms = forms | {f"{name}, compiled": torch.compile(forms[name], dynamic=False)}
            size = sum(x.nbytes for x in inputs[0] if isinstance(x, Tensor))
            inputs += [make() for _ in range(min(255, int(150e6 / max(1, size))))]
        expected, calls, about = None, {}, {}
        for name, form in forms.items():
            sets = itertools.cycle(inputs)
            try:
                result = form(*inputs[0])
                result = result if isinstance(result, tuple) else (result,)
                result = [x.detach().float() for x in result]
                expected = expected or result
                pairs = zip(result, expected)
                apart = [(x - y).norm() / y.norm().clamp(min=1e-30) for x, y in pairs]
                about[name] = {"differs": float(max(apart, default=0))}
                about[name]["memory_mib"] = self.peak(lambda: form(*inputs[0]))
                calls[name] = lambda form=form, sets=sets: form(*next(sets))
            except torch.OutOfMemoryError:
                print(f"  {name:44}{'out of memory':>12}")
        times = self.seconds(calls)
        for name in graphs if self.cuda else ():
            times |= self.seconds({f"{name}, CUDA graph": calls[name]}, graph=True)
        first = next(iter(times.values()))
        for name, value in times.items():
            row = {
                "kernel": kernel, "shape": shape, "form": name,
                "microseconds": value * 1e6, "ratio": first / value, "share": floor / value,
                "floor_microseconds": floor * 1e6, "bytes": moved, "flops": flops,
            }  # fmt: skip
            self.rows.append(row | about.get(name, {}))
            line = f"  {name:44}{value * 1e6:>12,.1f}{first / value:>9.2f}{floor / value:>8.1%}"
            if name in about:
                line += f"{about[name]['memory_mib']:>13,.1f}{about[name]['differs']:>10.1e}"
            print(line, flush=True)


def first_written(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """Eq. 1 as one would write it first: a softmax over every row, then where."""
    p = logits.float().softmax(-1)
    own, at_mask = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), p[..., mask_id]
    best = p.index_fill(-1, torch.tensor([mask_id], device=p.device), -1).argmax(-1)
    return torch.where(tokens == mask_id, best, torch.where(at_mask > own, mask_id, tokens))


def benchmark_decisions(bench: Benchmark, name: str, count: int, vocabulary: int, width: int):
    """Operation 1, then one decoding turn end to end, from hidden states to next tokens."""
    mask_id, device, dtype = vocabulary - 1, bench.device, bench.dtype
    graphs = bench.impls[-1:] if vocabulary <= 1024 else ()

    def state(masked):
        tokens = torch.randint(mask_id, (count,), device=device)
        tokens[torch.randperm(count, device=device)[:masked]] = mask_id
        return tokens, (tokens == mask_id).nonzero().squeeze(1)

    def scaled(rows, columns, scale=1.0):
        return (torch.randn(rows, columns, device=device) * scale).to(dtype)

    def on_rows(logits, tokens, rows):  # the masked rows alone; two logits of the others
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        best = logits[rows, :mask_id].float().log_softmax(-1).max(-1).indices
        return torch.where(logits[:, mask_id] > own, mask_id, tokens).index_copy(0, rows, best)

    def unfused(h, w, tokens, rows):  # the library's product on masked rows, then operation 1
        own, at_mask = (h.float() * w[tokens].float()).sum(-1), h.float() @ w[mask_id].float()
        masked = torch.full_like(rows, mask_id)
        best = rm.decide(h[rows] @ w.T, masked, mask_id, impl=bench.impls[-1])
        return torch.where(at_mask > own, mask_id, tokens).index_copy(0, rows, best)

    forms = {
        "eager, all rows": lambda x, t, rows: first_written(x, t, mask_id),
        "eager, masked rows": on_rows,
    }
    for impl in bench.impls:
        forms[impl] = lambda x, t, rows, impl=impl: rm.decide(x, t, mask_id, impl=impl)
    for masked in (count, count // 4):
        moved = masked * vocabulary * dtype.itemsize + (count - masked) * 64
        bench.table(
            "decide_from_logits", f"{name}, {masked} masked", forms,
            lambda: (scaled(count, vocabulary), *state(masked)),
            moved, 4 * masked * vocabulary, tuple(forms)[:2], graphs,
        )  # fmt: skip

    forms = {
        "eager, all logits": lambda h, w, t, rows: first_written(h @ w.T, t, mask_id),
        "product on masked rows, then operation 1": unfused,
    }
    for impl in bench.impls:
        forms[impl] = lambda h, w, t, rows, impl=impl: rm.decide(h, t, mask_id, head=w, impl=impl)
    shares = (count // 4, count // 20)
    if bench.cuda or bench.smoke:
        shares = (count, *shares, 64, 32)
    for masked in shares:
        moved = (vocabulary + 2 * count - masked) * width * dtype.itemsize
        bench.table(
            "one turn: decide_from_hidden", f"{name}, {masked} masked", forms,
            lambda: (scaled(count, width), scaled(vocabulary, width, width**-0.5), *state(masked)),
            moved, 2 * masked * vocabulary * width, tuple(forms)[:1],
        )  # fmt: skip


def with_gradient(form: Callable) -> Callable:
    """form's result and its gradients to those inputs that require one."""

    def run(*inputs):
        out = form(*inputs)
        leaves = [x for x in inputs if x.requires_grad]
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def benchmark_history(bench: Benchmark, name: str, count: int, vocabulary: int, width: int):
    """Operation 3: one step, and the closed sum over 7 states with its gradient."""
    device, item = bench.device, bench.dtype.itemsize
    embedding = torch.randn(vocabulary, width, device=device).to(bench.dtype)
    gathered = min(count, vocabulary) * width * item  # rows: each at most once from memory

    def step(impl):
        memory = HistoryReference(embedding, impl=impl)

        def run(a, states):
            memory.sum = a
            return memory.push(states[0])

        return run

    def inputs(turns):
        states = torch.randint(vocabulary, (turns, 1, count), device=device)
        return torch.randn(1, count, width, device=device), states

    forms = {impl: step(impl) for impl in bench.impls}
    moved = count * width * (8 + item) + gathered
    bench.table(
        "history_step", name, forms, lambda: inputs(1), moved, 0, ("torch",), bench.impls[-1:]
    )
    weight = embedding.clone().requires_grad_()
    forms = {
        impl: with_gradient(lambda w, x, impl=impl: history_embedding(x, w, impl=impl))
        for impl in bench.impls
    }
    moved = 14 * gathered + count * width * item * 2 + vocabulary * width * (4 + item)
    bench.table(
        "history_sum, 7 states, with gradient", name, forms,
        lambda: (weight, inputs(7)[1]), moved, 0, ("torch",),
    )  # fmt: skip


def benchmark_losses(bench: Benchmark, name: str, count: int, vocabulary: int, width: int):
    """Operation 4, with gradient, from logits and from hidden states."""
    device, item = bench.device, bench.dtype.itemsize
    target, role = (torch.randint(high, (count,), device=device) for high in (vocabulary, 3))

    def ours(impl, inputs, head=None):
        return rm.revision_loss(inputs, target, role, head=head, impl=impl).total

    from_logits = {"eager": lambda x: F.cross_entropy(x.float(), target)}
    from_hidden = {
        "eager": lambda h, w: F.cross_entropy((h @ w.T).float(), target),
        "product, then from logits": lambda h, w: ours(bench.impls[-1], h @ w.T),
    }
    for impl in bench.impls:
        from_logits[impl] = lambda x, impl=impl: ours(impl, x)
        from_hidden[impl] = lambda h, w, impl=impl: ours(impl, h, w)

    def leaf(rows, columns, scale=1.0):
        x = torch.randn(rows, columns, device=device) * scale
        return x.to(bench.dtype).requires_grad_()

    kernel = "revision_cross_entropy from"
    bench.table(
        f"{kernel} logits, with gradient", name,
        {key: with_gradient(form) for key, form in from_logits.items()},
        lambda: (leaf(count, vocabulary),), 3 * count * vocabulary * item, 0, ("eager",),
    )  # fmt: skip
    bench.table(
        f"{kernel} hidden states, with gradient", name,
        {key: with_gradient(form) for key, form in from_hidden.items()},
        lambda: (leaf(count, width), leaf(vocabulary, width, width**-0.5)),
        2 * (vocabulary + count) * width * item, 6 * count * vocabulary * width, ("eager",),
    )  # fmt: skip


def benchmark_recurrence(bench: Benchmark):
    """A turn of the recurrence, early and late, against summing 16 past states anew."""
    count, vocabulary, width = SMOKE_SHAPES["small"] if bench.smoke else (8192, 32000, 4096)
    embedding = torch.randn(vocabulary, width, device=bench.device).to(bench.dtype)
    states = torch.randint(vocabulary, (16, 1, count), device=bench.device)

    def anew():
        total = torch.zeros(1, count, width, device=bench.device)
        for age, state in enumerate(states.flip(0)):
            total += 0.9**age * rotate_pairs(F.embedding(state, embedding).float(), -age)
        return rms_norm(total).to(embedding.dtype)

    def push(a):
        memory.sum = a
        return memory.push(states[15])

    memory = HistoryReference(embedding)
    forms = {"embed, rotate and sum 16 states": anew}
    for turn in range(1, 101):
        if turn == 16:
            forms["HistoryReference, turn 16"] = lambda a=memory.sum: push(a)
        elif turn in (2, 100):  # [:0]: another sum, nothing to compare
            forms[f"HistoryReference, turn {turn}"] = lambda a=memory.sum: push(a)[:0]
        memory.push(states[(turn - 1) % 16])
    moved = count * width * (8 + 2 * embedding.dtype.itemsize)
    shape = f"N={count} D={width} {bench.dtype}"
    bench.table("history by turn", shape, forms, lambda: (), moved)


@torch.no_grad()
def benchmark_revision(bench: Benchmark):
    """End to end: the shipped Sudoku model revises boards with some 12 wrong cells."""
    count = 2 if bench.smoke else 4096 if bench.cuda else 128
    title = "a whole Sudoku revise"
    try:
        path = ROOT / "checkpoints/sudoku_full.pt"
        model, info = rm.load_checkpoint(path, "sudoku", bench.device)
    except ValueError as error:
        print(f"\n{title}: skipped, {error}")
        return
    cell = torch.arange(81)
    pattern = (3 * (cell // 9 % 3) + cell // 27 + cell % 9) % 9  # valid up to the digits' names
    clean = (torch.rand(count, 9).argsort(-1) + 1)[:, pattern]
    wrong = torch.rand(count, 81) < 12 / 81
    start = torch.where(wrong, torch.randint(1, 10, (count, 81)), clean).to(bench.device)

    def revise(impl):
        embedding = model.embedding.detach()
        history = HistoryReference(embedding, info["gamma"], info["rotate"], impl=impl)
        return rm.revise(model, start, 0, history, impl=impl).tokens

    forms = {f"revise, {impl}": lambda impl=impl: revise(impl) for impl in bench.impls}
    bench.table(title, f"{count} boards", forms, lambda: ())


PARTS = {
    "decisions": benchmark_decisions,
    "history": benchmark_history,
    "losses": benchmark_losses,
}
WHOLE = {"recurrence": benchmark_recurrence, "revision": benchmark_revision}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time every kernel against PyTorch.")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found, help="cuda, cuda:1, cpu (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="seconds; the times mean nothing")
    parser.add_argument("--only", choices=[*PARTS, *WHOLE], help="time this part alone")
    parser.add_argument("--compile", action="store_true", help="compile for absent GPUs instead")
    where = "default results/kernels_<device>.json, none with --smoke"
    parser.add_argument("--json", type=Path, metavar="FILE", help=where)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    options = parser.parse_args()
    if options.json and options.json.is_dir():
        parser.error(f"--json {options.json} is a folder")
    if options.compile:
        path = (options.json or ROOT / "results/kernels_compiled.json").resolve()
        command = [sys.executable, str(ROOT / "tests/aot.py"), "--json", str(path)]
        return subprocess.run(command).returncode
    cuda = options.device.split(":")[0] == "cuda" and torch.cuda.is_available()
    if not cuda and options.device != "cpu":
        parser.error(f"device {options.device!r} is not there")

    torch.manual_seed(0)
    name = "cpu"
    if cuda:
        torch.cuda.set_device(options.device)
        name = torch.cuda.get_device_name().replace(" ", "-").lower()
    runs = kernels.use_triton(None, torch.empty(0, device=options.device))
    print(f"{name}: impl=None runs {'the kernels' if runs else f'PyTorch {torch.__version__}'}")
    bench = Benchmark(options.device, options.smoke)
    shapes = SHAPES if cuda else CPU_SHAPES
    if options.smoke:
        shapes = SMOKE_SHAPES
    skipped = set()
    if not (cuda or options.smoke or options.only):
        skipped = {"losses"}  # minutes, and no sparsity to gain
        print(f"skipped on CPU: {', '.join(SHAPES)}, torch.compile, CUDA graphs; losses, unless")
        print("asked for by --only losses")
    for shape, sizes in shapes.items():
        for part, run in PARTS.items():
            if options.only in (None, part) and part not in skipped:
                run(bench, shape, *sizes)
    for part, run in WHOLE.items():
        if options.only in (None, part):
            run(bench)

    path = options.json
    if path is None and not options.smoke:
        path = ROOT / f"results/kernels_{name}.json"
    if path:
        triton = kernels.triton and kernels.triton.__version__
        record = {
            "device": name,
            "smoke": options.smoke,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "triton": triton},
            "copy_bytes_per_second": bench.bandwidth,
            "flops_per_second": bench.rate,
            "rows": bench.rows,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
