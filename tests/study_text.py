"""Several seeds of train_text.py in one record and one figure, for results/README.md's Text page.

    python tests/study_text.py code runs/code/text_code_seed?.json

Writes results/text_<task>.json and .png.  The seeds share base, data and test prompts.  A prompt's
score is its mean over the seeds; intervals are the (paired) bootstrap over prompts, for code over
specifications, too: prompts with the same words ask for the same program.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import reflective_masking as rm
from train_text import TEST_SEED, VARIANTS, generate

KEPT = "steps minutes params haste settings provenance".split()  # of a variant's record


def mean_of(rows: list[dict]) -> dict:
    """One variant at one number of passes.  rows: a seed each."""
    right = [[*map(int, row["right"]["all"])] for row in rows]
    values = [sum(seeds) / len(seeds) for seeds in zip(*right)]  # a prompt each
    mean = {"passes": rows[0]["passes"], "accuracy": sum(values) / len(values)}
    seeds = [row["accuracy"] for row in rows]
    return {**mean, "ci95": rm.bootstrap_interval(values), "seeds": seeds}


def mean_difference(ours: list[dict], theirs: list[dict], groups: list[str]) -> dict:
    """The paired difference of two variants at one number of passes, of all and by subject.

    groups: the specification of each prompt, whose prompts are resampled together; or none.
    """
    found = {"passes": ours[0]["passes"], "subjects": {}}
    for subject in ours[0]["right"]:
        pairs = [zip(a["right"][subject], b["right"][subject]) for a, b in zip(ours, theirs)]
        each = [[int(a) - int(b) for a, b in pair] for pair in pairs]  # [seeds][prompts]
        values = [sum(seeds) / len(seeds) for seeds in zip(*each)]
        found["subjects"][subject] = {
            "difference": sum(values) / len(values),
            "ci95": rm.bootstrap_interval(values),
            "seeds": [sum(seed) / len(seed) for seed in each],
        }
        if groups:
            found["subjects"][subject]["ci95_specifications"] = grouped_interval(values, groups)
    return found | found["subjects"].pop("all")


def grouped_interval(values: list[float], groups: list[str]) -> list[float]:
    """The 95 % interval of the mean of values, whole groups resampled."""
    number = {group: i for i, group in enumerate(sorted(set(groups)))}
    group = torch.tensor([number[name] for name in groups])
    sums = torch.zeros(len(number)).index_add(0, group, torch.tensor(values))
    sizes = torch.bincount(group)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(number), (4000, len(number)), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means.quantile(torch.tensor([0.025, 0.975])).tolist()


def collect(reports: list[dict], groups: list[str]) -> dict:
    """The record of results/: base, each seed's scores, their means, the runs themselves.

    A variant that some seeds lack is compared with the SFT of those that have it.
    """
    sources = [report["records"]["sft"]["settings"] for report in reports]
    same = [{name: found[name] for name in ("data", "test", "start")} for found in sources]
    rm.require(same.count(same[0]) == len(same), f"base, data or test prompts differ: {same}")
    scores = [report["scores"] for report in reports]
    variants = [v for v in VARIANTS if v != "base" and any(v in score for score in scores)]
    by_passes, sft = {}, {}
    for variant in variants:
        having = [score for score in scores if variant in score]
        by_passes[variant] = [*zip(*(score[variant] for score in having))]
        sft[variant] = [*zip(*(score["sft"] for score in having))]
    runs = []
    for report in reports:
        kept = {v: {key: r[key] for key in KEPT} for v, r in report["records"].items()}
        own = {v: rows for v, rows in report["scores"].items() if v != "base"}
        runs.append({"scores": own, "records": kept})
    minus_sft = {}
    for variant in variants[1:]:
        pairs = zip(by_passes[variant], sft[variant])
        minus_sft[variant] = [mean_difference(ours, sft, groups) for ours, sft in pairs]
    return {
        "base": scores[0]["base"],
        "mean": {v: [mean_of(rows) for rows in by_passes[v]] for v in variants},
        "minus_sft": minus_sft,
        "seeds": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task")
    parser.add_argument("reports", type=Path, nargs="+", help="text_<task>_seed<n>.json")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in args.reports]
    groups = []
    if args.task == "code":
        test = generate("code", reports[0]["scores"]["base"][0]["n"], "test", TEST_SEED)
        groups = [problem.prompt.split("|")[0] for problem in test]
    record = collect(reports, groups)
    path = args.out / f"text_{args.task}.json"
    if path.exists():  # what else was measured stays
        record = json.loads(path.read_text()) | record
    rm.write_json(path, record)
    lines = {}  # of one number of passes there is nothing to draw
    for variant, rows in {"base": record["base"], **record["mean"]}.items():
        lines[VARIANTS[variant]] = [(row["passes"], row["accuracy"], row["ci95"]) for row in rows]
    xlabel, ylabel = "forward passes", "right answers, %"
    if len(record["base"]) > 1:
        rm.draw_lines(path.with_suffix(".png"), lines, xlabel, ylabel, log=True)
    for variant, rows in record["minus_sft"].items():
        for row in rows:
            told = "{difference:+.1%} ({ci95[0]:+.1%} to {ci95[1]:+.1%})".format(**row)
            print(f"{VARIANTS[variant]} minus SFT at {row['passes']} passes: {told}")


if __name__ == "__main__":
    main()
