"""Compiles every kernel of kernels.py for real GPUs on a machine without one.

    python tests/aot.py [--targets sm_80,sm_90,sm_100,gfx942] [--shapes llada,...] [--brief]

The public functions run on meta tensors under a stand-in driver that names the target; _launch
compiles and runs nothing.  So signatures, divisibility, constexprs and warps are those of the real
launches, from Triton's own binder.  ptxas and cuobjdump come in Triton's wheel.  Prints a line and
writes a row (--json) a compilation: registers, spilled bytes, shared memory, matrix instruction,
and, without --brief, the instructions of the hot loop and its loads from global memory.

Exit code 1 if a kernel does not compile, needs more shared memory than the chip has, multiplies 16
bits off the tensor cores or float32 in tf32, spills, or, at shape llada, reads
contiguous rows by less than 16 bytes.  What a compiler cannot tell: how long anything takes.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
CACHE = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = CACHE.name  # a kernel from a cache would not tell its registers
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import kernels  # noqa: E402

triton.knobs.nvidia.dump_ptxas_log = True
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = {  # N, V, D, MASK, dtypes
    "llada": (8192, 126464, 4096, 126336, (BF16, F32)),
    "dimoo": (4096, 8193, 4096, 8192, (BF16,)),
    "sudoku": (41472, 10, 128, 0, (F32,)),
    "one": (1, 2, 1, 1, (F32,)),  # what Triton makes of arguments that are 1
    "odd": (7, 3000, 123, 1, (BF16,)),
}
BRIEF = "llada,sudoku,one,odd"
SHARED = {"sm_80": 166_912, "gfx942": 65_536}  # bytes a program may have; else 232,448


def meta(*shape, dtype=torch.int64, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def call_everything(count, vocabulary, width, mask_id, dtype, brief):
    """Every public function, so every launch: strides, int32 ids and each switch (brief: fewer)."""
    tokens, locks = meta(count), meta(count, dtype=torch.bool)
    ids = meta(2, 3 * count, dtype=torch.int32)
    batch, may = meta(2, 3 * count, vocabulary, dtype=dtype), meta(3 * count, dtype=torch.bool)
    hidden, head = meta(count, width, dtype=dtype), meta(vocabulary, width, dtype=dtype)
    bias = meta(vocabulary, dtype=dtype)
    kernels.decide_from_logits(meta(count, vocabulary, dtype=dtype), tokens, mask_id)
    few = tokens[:64]
    kernels.decide_from_logits(meta(len(few), vocabulary, dtype=dtype), few, mask_id)
    kernels.decide_from_logits(batch, ids, mask_id, may)
    size = min(3, count), vocabulary
    far = torch.empty_strided(size, (2**31 + 64, 1), dtype=dtype, device="meta")
    kernels.decide_from_logits(far, tokens[:3], mask_id)
    for most in (16, 32, 64, 1000) if vocabulary > kernels.DENSE_VOCABULARY else (None,):
        kernels.decide_from_hidden(hidden, head, tokens, mask_id, locks, bias, most)

    past, rotate = meta(count, width, dtype=F32), width % 2 == 0
    kernels.history_step(past, tokens, head, 0.9, rotate)
    sums = [(7, rotate, True)]
    if not brief:
        kernels.decide_from_hidden(hidden, head, tokens, mask_id)
        kernels.history_step(None, tokens, head, 0.9, rotate)
        sums += [(1, rotate, True), (7, False, False)]
    for turns, turned, normalize in sums:
        weight = meta(vocabulary, width, dtype=dtype, grad=True)
        states = meta(turns, count)
        kernels.history_sum(states, weight, 0.9, turned, normalize).sum().backward()

    for columns, weight, b in ((vocabulary, None, None), (width, head, bias)):
        inputs = meta(count, columns, dtype=dtype, grad=True)
        kernels.revision_cross_entropy(inputs, tokens, tokens, (1, 1, 1), weight, b)[0].backward()


def matrix_instruction(ptx):
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name + (" tf32" if "tf32" in ptx else "")
    return ""


def facts(compiled, log, brief):
    """What the compiler says of one kernel."""
    asm = compiled.asm
    row = {"shared": compiled.metadata.shared}
    if "amdgcn" in asm:
        code = asm["amdgcn"]
        numbers = {k: int(re.search(rf"\.{k}: +(\d+)", code)[1]) for k in
                   ("vgpr_count", "vgpr_spill_count")}  # fmt: skip
        row |= {"registers": numbers["vgpr_count"], "spilled": 4 * numbers["vgpr_spill_count"]}
        # Its warps have 64 threads: 8 warps share half a row of 4,096 in pieces of 8 bytes.
        wide = re.search("(global|buffer)_load_dwordx[24]", code)
        return row | {"matrix": "mfma" if "v_mfma" in code else "", "wide_loads": bool(wide)}
    ptx = asm["ptx"]
    row["registers"] = int(re.search(r"Used (\d+) registers", log)[1])
    row["spilled"] = sum(int(x) for x in re.findall(r"(\d+) bytes spill", log))
    row["matrix"] = matrix_instruction(ptx)
    wide = r"ld\.global\S*\.v4\.\w?32|cp\.async\S* \[.*\], \[.*\], 0x10"
    row["wide_loads"] = bool(re.search(wide, ptx))
    return row if brief else row | hot_loop(asm["cubin"])


def hot_loop(cubin):
    """Instructions of the longest loop, or of all where there is none, and its global loads."""
    path = Path(CACHE.name, "cubin")
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +([^;]+);", text)
    code = {int(at, 16): line.strip() for at, line in found}
    loops = []
    for at, line in code.items():
        back = re.search(r"BRA.* 0x(\w+)$", line)
        if back and int(back[1], 16) < at:
            loops.append((at - int(back[1], 16), at))
    size, end = max(loops, default=(max(code), max(code)))
    body = [line for at, line in code.items() if end - size <= at <= end]
    loads = [re.search(r"LDG\S+", line)[0] for line in body if "LDG" in line]
    bits = [int((re.search(r"\.[US]?(8|16|64|128)\b", op) or (0, 32))[1]) for op in loads]
    summary = " ".join(f"{bits.count(b)}x{b}" for b in sorted({*bits}))
    return {"instructions": len(body), "load_bits": summary, "looped": bool(loops)}


def faults(row, chip, x):
    """The reasons to fail, as words."""
    reads_rows = row["kernel"] not in ("_merge_kernel", "_parts_kernel") and x.stride(-1) == 1
    reads_rows &= x.is_floating_point() or "history" in row["kernel"]
    words = {
        "too much shared memory": row["shared"] > SHARED.get(chip, 232_448),
        "float32 in tf32": "tf32" in row["matrix"],
        "no tensor core": "head" in row["kernel"] and x.dtype != F32 and not row["matrix"],
        "spills": row["spilled"] > 0,
        "narrow loads": row["shape"] == "llada" and reads_rows and not row["wide_loads"],
    }
    return [word for word, is_true in words.items() if is_true]


def target_of(chip):
    if chip.startswith("gfx"):
        return GPUTarget("hip", chip, 64)
    return GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)


class Compiler:
    """Takes kernels._launch's place: compiles for every target, runs nothing, keeps the facts."""

    def __init__(self, chips, only, brief):
        self.chips = chips
        self.only = only
        self.brief = brief
        self.rows = []
        self.seen = []
        self.case = {}

    def __call__(self, kernel, grid, *args, **constexprs):
        for chip in self.chips if self.only in kernel.__name__ else ():
            target = target_of(chip)
            answers = {
                "get_current_device": chip,
                "get_current_stream": 0,
                "get_current_target": target,
            }
            driver = {name: lambda *_, value=value: value for name, value in answers.items()}
            triton.runtime.driver.set_active(SimpleNamespace(**driver))
            row = {"target": chip, "kernel": kernel.__name__, **self.case}
            row["constexprs"] = {name: int(value) for name, value in constexprs.items()}
            log = io.StringIO()
            try:
                with contextlib.redirect_stdout(log):
                    compiled = kernel.run(*args, grid=grid, warmup=True, **constexprs)
                if compiled in self.seen:  # Triton's own cache: this specialisation was here
                    continue
                self.seen.append(compiled)
                brief = self.brief and not (chip == "sm_90" and constexprs.get("GROUP") == 8)
                row |= facts(compiled, log.getvalue(), brief)
                row["faults"] = faults(row, chip, args[0])
            except Exception as error:  # the table goes on
                text = " ".join(str(error).split())
                row["faults"] = [f"{type(error).__name__}: {text[:600]}"]
            self.rows.append(row)
            self.show(row)

    def show(self, row):
        tile = " ".join(f"{k[:4]}={v}" for k, v in row["constexprs"].items())
        names = "registers", "spilled", "shared", "matrix", "instructions", "load_bits"
        values = [str(row.get(name, "-")) for name in names]
        shown = "{:>4}{:>5}{:>7} {:16}{:>5} {:16}".format(*values)
        where = f"{row['target']:7}{row['kernel']:21}{row['shape']:7}{row['dtype']:9}"
        print(f"{where}{tile:88}{shown}{', '.join(row['faults'])}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that are absent.")
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100,gfx942")
    parser.add_argument("--shapes", help=f"default all: {', '.join(SHAPES)}; --brief: {BRIEF}")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--brief", action="store_true", help="fewer shapes and switches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and versions")
    options = parser.parse_args()
    began = time.time()
    compiler = Compiler(options.targets.split(","), options.only, options.brief)
    kernels._launch = compiler
    kernels.use_triton = lambda impl, x: True
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # meta has none
    torch.Tensor.nonzero = lambda x: meta(max(1, x.numel() // 4), 1)  # nor this
    names = options.shapes or (BRIEF if options.brief else ",".join(SHAPES))
    for name in names.split(","):
        *sizes, dtypes = SHAPES[name]
        for dtype in dtypes:
            compiler.case = {"shape": name, "dtype": str(dtype).removeprefix("torch.")}
            call_everything(*sizes, dtype, options.brief)
    bad = [row for row in compiler.rows if row["faults"]]
    count, seconds = len(compiler.rows), time.time() - began
    print(f"{count} compiled, {len(bad)} bad, {seconds:.0f} s; no kernel ran, so no time is known")
    if options.json:
        record = {
            "what": "what compilers say of kernels.py; nothing ran, so this is no timing",
            "versions": versions(),
            "shapes: N, V, D, MASK": {name: SHAPES[name][:4] for name in names.split(",")},
        }
        rows = ",\n".join(json.dumps(row) for row in compiler.rows)  # a line each
        options.json.write_text(f'{json.dumps(record)[:-1]}, "rows": [\n{rows}\n]}}\n')
    return 1 if bad or not count else 0


def versions():
    command = [triton.knobs.nvidia.ptxas.path, "--version"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "ptxas": re.search(r"release (\S+),", text)[1],
    }


if __name__ == "__main__":
    sys.exit(main())
