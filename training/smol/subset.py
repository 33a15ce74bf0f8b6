"""A stratified random subset of text-only questions, for measurements on a slow machine.

    python -m training.smol.subset --data scienceqa-test.parquet --count 120 --out runs/smol-text.parquet
    python -m training.smol.subset --data runs/smol-text.parquet --runs runs

The first command draws the subset from a parquet file of multiple-choice questions. The second reads the results of all
runs on the subset (scored.jsonl) and prints their accuracy by number of options, with the 95 % Wilson interval and the
accuracy of guessing at random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from training.evaluate import wilson


def subset(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Draw `count` rows without an image, in random order.

    Each combination of number of options and subject gets its share of the rows, rounded by the largest remainders.
    """
    text = frame[frame.image.isna()].copy()
    strata = text.groupby([text.choices.map(len), text.subject.fillna("")], sort=True)
    groups = dict(iter(strata))
    exact = {key: len(group) / len(text) * count for key, group in groups.items()}
    taken = {key: int(share) for key, share in exact.items()}
    for key in sorted(exact, key=lambda key: taken[key] - exact[key])[: count - sum(taken.values())]:
        taken[key] += 1
    parts = [group.sample(taken[key], random_state=seed) for key, group in groups.items() if taken[key]]
    return pd.concat(parts).sample(frac=1, random_state=seed)


def report(frame: pd.DataFrame, runs: Path) -> None:
    """Print a table for each run that answered exactly these questions.

    Args:
        frame: the questions.
        runs: folder of the runs.
    """
    options = dict(zip(frame.pid.astype(str), frame.choices.map(len), strict=True))
    for file in sorted(runs.glob("*/record.json")):
        record = json.loads(file.read_text())
        lines = (file.parent / "scored.jsonl").read_text().splitlines()
        right = {str(one["id"]): one["metrics"]["Avg"] for one in map(json.loads, lines)}
        if set(right) != set(options):
            continue
        print(f"\n{record['name']}\n\n| options | n | right | 95 % | chance |")
        print("|---|--:|--:|---|--:|")
        for kind in (*sorted(set(options.values())), "all"):
            ids = [pid for pid, n in options.items() if kind in (n, "all")]
            hits = int(sum(right[pid] for pid in ids))
            low, high = wilson(hits, len(ids))
            chance = sum(1 / options[pid] for pid in ids) / len(ids)
            print(f"| {kind} | {len(ids)} | {hits / len(ids):.3f} | {low:.3f}-{high:.3f} | {chance:.3f} |")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the subset here")
    parser.add_argument("--runs", type=Path, help="print the results of runs on --data instead")
    args = parser.parse_args()
    frame = pd.read_parquet(args.data)
    if args.runs:
        report(frame, args.runs)
    elif args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        subset(frame, args.count, args.seed).to_parquet(args.out, index=False)
    else:
        parser.error("give --out or --runs")


if __name__ == "__main__":
    main()
