"""How much memory runs need, measured in processes of their own: peak resident memory over the size of the weights.

    python -m benchmarks.memory [--like llava-1.3b] [--model DIR] [--dtype bfloat16] [--mode full w4a4 ...] [--limit 1]
        [--results FILE]

Without `--model` a checkpoint of random weights is made first, and deleted afterwards. `over` is the peak above what
the process held before it loaded the model (Python, torch and transformers, some 400 MB), divided by the size of the
weights in the dtype that they are computed with; `whole` divides all of the peak. Modes:

    full      a run in full precision
    w4a4      a run with 4-bit weights and activations, simulated; original weights are read again from the checkpoint
    spilled   the same by `compress(keep_originals="file")`, then restored
    kept      the same by `compress(keep_originals="memory")`, then restored, as a comparison
    packed    the same as w4a4 with `storage: packed`: weights are packed as they come from the files
    gptq      a run with packed weights of GPTQ, calibrated on two samples; takes long

A mode's line is printed as soon as it is known. With `--results` it is kept in a file too, and a call that was stopped
goes on where it was.

The goal of `packed` is 0.45 for a LLaVA-1.5-7B in bfloat16, whose weights take 0.33 when they are packed. In other
shapes it is as much above what the packed weights take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qapbench.files import replace_synced

PRUNED = {"method": "random", "keep": 32}  # short prompts: what is measured is the weights, not the tokens
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 128}, "activations": {"bits": 4, "group_size": 128}}
GPTQ = {"method": "gptq", "weights": {"bits": 4, "group_size": 128}, "calibration": {"samples": 2}}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "w4a4": {"quantize": W4A4},
    "packed": {"quantize": {**W4A4, "storage": "packed"}},
    "gptq": {"quantize": {**GPTQ, "storage": "packed"}},
}
KEPT: dict[str, Any] = {"spilled": "file", "kept": "memory"}  # mode -> keep_originals
GOALS = {"full": 1.05, "w4a4": 1.15, "spilled": 1.15}  # largest `over`
ABOVE_PACKED = 0.45 - 0.33  # what `packed` may have beside the weights themselves
DEFAULT = ["full", "w4a4", "spilled", "packed"]


def measure(mode: str, model: str, dtype: str, limit: int) -> dict[str, float]:
    """Measure one mode in a new process.

    Args:
        mode: the mode.
        model: folder of the checkpoint.
        dtype: dtype of the weights.
        limit: number of questions.

    Returns:
        Bytes held before loading (`before`), at the peak (`peak`), of the weights (`weights`) and of what is held of
        them (`held`); `seconds` in all.
    """
    call = [sys.executable, "-m", "benchmarks.memory", "--child", mode, "--model", model, "--dtype", dtype]
    ended = subprocess.run([*call, "--limit", str(limit)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def child(mode: str, model: str, dtype: str, limit: int) -> dict[str, float]:
    """What `measure` returns, of this process."""
    import torch

    from qapbench import compress
    from qapbench.memory import peak_resident_bytes
    from qapbench.models.loading import load_model
    from qapbench.running.estimate import estimate
    from qapbench.running.execute import make_runs
    from qapbench.running.session import Session
    from qapbench.running.settings import Settings
    from qapbench.spec.run_spec import RunSpec

    began = time.perf_counter()
    cpu = torch.device("cpu")
    sections = {"prune": PRUNED, **RUNS.get(mode, {"quantize": W4A4})}
    task = {"name": "diagramqa", "limit": limit, "answers": "letter"}
    spec = RunSpec.parse({"name": mode, "model": model, "dtype": dtype, "task": task, **sections})
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder), cpu)
        session = Session(settings)
        session.task(spec)
        _import_all(spec)
        before = peak_resident_bytes()
        if mode in KEPT:
            loaded, _ = load_model(spec, cpu)
            with compress(loaded, {"quantize": W4A4}, keep_originals=KEPT[mode]):
                pass
        else:
            make_runs([spec], settings, session=session)
            loaded = session.model(spec)[0]
    weights = sum(weight.nbytes for weight in loaded.parameters())
    seconds, held = time.perf_counter() - began, estimate(spec, settings).parts["weights"]
    return {"before": before, "peak": peak_resident_bytes(), "weights": weights, "held": held, "seconds": seconds}


def _import_all(spec: Any) -> None:
    """Import what loading imports, so that it counts as what the process holds anyway."""
    from qapbench.checkpoints.find import find_checkpoint
    from qapbench.models.family import family_class
    from qapbench.models.loading import read_config

    family = family_class(str(read_config(spec)["model_type"]))
    family.tiny()
    family.load_processor(find_checkpoint(spec.model).folder)


def line(mode: str, one: dict[str, float]) -> tuple[str, bool]:
    """What a mode needed as a line of text, and whether its goal is met.

    Args:
        mode: the mode.
        one: what `measure` found.
    """
    over = (one["peak"] - one["before"]) / one["weights"]
    goal = one["held"] / one["weights"] + ABOVE_PACKED if mode == "packed" else GOALS.get(mode)
    met = goal is None or over <= goal
    sizes = ", ".join(f"{name} {one[name] / 1e9:.2f} GB" for name in ("weights", "before", "peak"))
    wanted = "" if goal is None else f" (goal ≤ {goal:.2f}: {'ok' if met else 'MISSED'})"
    whole = one["peak"] / one["weights"]
    return f"{mode:8} {sizes}; whole {whole:.2f}, over {over:.3f}{wanted}; {one['seconds']:.0f} s", met


class Results:
    """What was measured so far, in a file that a later call goes on with.

    Args:
        path: the file; None keeps nothing.
        what: the checkpoint, its dtype and the number of questions, in words: results of others are not taken.

    Raises:
        SystemExit: the file is there and holds no such results.
    """

    def __init__(self, path: Path | None, what: str) -> None:
        self.path, self.what = path, what
        self._all: dict[str, dict[str, dict[str, float]]] = {}
        if path is not None and path.exists():
            try:
                self._all = json.loads(path.read_text(encoding="utf-8"))
                for found in self._all.values():
                    for mode, one in found.items():
                        line(mode, one)
            except (OSError, ValueError, TypeError, AttributeError, KeyError):
                sys.exit(f"--results: {path} holds no results of this command")
        self.found: dict[str, dict[str, float]] = dict(self._all.get(what, {}))

    def add(self, mode: str, one: dict[str, float]) -> None:
        """Add what a mode needed, and write the file."""
        self.found[mode] = one
        if self.path is not None:
            replace_synced(self.path, json.dumps({**self._all, self.what: self.found}, indent=1) + "\n")


def measure_all(modes: list[str], results: Results, one_of: Callable[[str], dict[str, float]]) -> bool:
    """Measure modes, print the line of each when it is known, and say whether every goal is met.

    Args:
        modes: the modes.
        results: those that it holds already are not measured again.
        one_of: measures a mode.
    """
    fits = []
    for mode in modes:
        if mode not in results.found:
            results.add(mode, one_of(mode))
        text, met = line(mode, results.found[mode])
        print(text, flush=True)
        fits.append(met)
    return all(fits)


def main() -> None:
    """Measure the modes that the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure the memory of runs.")
    parser.add_argument("--like", default="llava-1.3b", help="shape of the checkpoint that is made")
    parser.add_argument("--model", help="a checkpoint to use in its place")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", nargs="+", choices=[*RUNS, *KEPT], default=DEFAULT)
    parser.add_argument("--limit", type=int, default=1, help="number of questions")
    parser.add_argument("--results", type=Path, help="file of what was measured, which a later call goes on with")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child, asked.model, asked.dtype, asked.limit)))
        return
    results = Results(asked.results, f"{asked.model or asked.like} in {asked.dtype}, {asked.limit} questions")
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model
        if model is None and any(mode not in results.found for mode in asked.mode):
            model = str(Path(folder) / asked.like)
            make = [sys.executable, "-m", "benchmarks.random_llava", "--like", asked.like, "--out", model]
            subprocess.run([*make, "--dtype", asked.dtype, "--no-text-tower"], check=True)
        met = measure_all(asked.mode, results, lambda mode: measure(mode, model, asked.dtype, asked.limit))
        sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
