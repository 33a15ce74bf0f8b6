"""Tokens per second of greedy decoding, rows side by side compared with one row.

    python -m benchmarks.decoding [--model diagram-llava random-100m] [--tokens 24]

One prompt of the task is decoded alone and as a batch of equal rows, through the code that runs use. Prefill is left
out: only forward passes of one token per row count, and what generation does between them. Times are CPU time of this
process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from qapbench.running.batches import BatchRunner
from qapbench.running.prompt_encoder import PromptEncoder

from .stages import EMBEDDED, RANDOM, Bench

GOAL = 3.0  # least ratio of tokens per second
ROWS = 16
TOKENS = 24
out = Console(width=120, highlight=False)


def measure(model: str, folder: Path, rounds: int, tokens: int = TOKENS) -> tuple[float, bool]:
    """Tokens per second of ROWS rows, in those of one, and whether all texts are equal.

    Args:
        model: the model.
        folder: folder for a checkpoint.
        rounds: number of rounds, of which the quickest counts.
        tokens: number of tokens that each row decodes.
    """
    bench = Bench(model, folder, 8, ROWS)
    spec = bench.spec("generate")
    family, processor = bench.family(spec), bench.session.processor(spec)
    question = bench.session.questions(spec)[-1]  # a short one
    prompt = PromptEncoder(family, processor, {}).encode(question, question.prompt, [None])[None]
    family.model.generation_config.eos_token_id = None  # so that no row ends early
    runner = BatchRunner(family, processor, ROWS)
    (row,) = runner.rows(question, {question.prompt: prompt})
    longest = row.length + tokens
    seconds: dict[tuple[int, int], float] = {}
    texts: set[str] = set()
    for _ in range(rounds + 1):
        for count in (1, ROWS):
            for length in (1, 1 + tokens):  # the first token comes from the prefill
                options = json.dumps({"max_gen_toks": length})
                rows = [dataclasses.replace(row, options=options)] * count
                started = time.process_time()
                results = runner.results(rows, longest)
                spent = time.process_time() - started
                seconds[count, length] = min(spent, seconds.get((count, length), spent))
                texts |= {outputs[0] for outputs, _ in results} if length > 1 else set()
    alone, together = (seconds[count, 1 + tokens] - seconds[count, 1] for count in (1, ROWS))
    return ROWS * alone / together, len(texts) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[EMBEDDED, RANDOM])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.model:
        with tempfile.TemporaryDirectory() as folder:
            ratio, equal = measure(model, Path(folder), given.rounds, given.tokens)
        same = "equal texts" if equal else "DIFFERENT TEXTS"
        out.print(f"{model}: batch {ROWS} has {ratio:.2f} times the tokens/s of batch 1, {same}; goal {GOAL:.1f}")


if __name__ == "__main__":
    main()
