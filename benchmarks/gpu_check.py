"""Everything that needs a GPU, in one command of a few minutes.

    python -m benchmarks.gpu_check [--out gpu-check.json] [--device cuda] [--tiny]

Parts, each with its figures in one JSON file:

- `products`: whether a row of a matrix product of a fixed number of rows has the same bits whatever its neighbours and
  its place, and what that costs against one row at a time and against all rows at once.
- `fake_quantization`: whether the bits are those of the CPU, and its time in copies of the tensor.
- `runs`: a LLaVA of random weights in the shape of LLaVA-1.5-7B, in bfloat16 (`--tiny`: the embedded model): whether
  stored answers are the same at batch size 1 and 8, and questions per second of plain `generate` of transformers and of
  qapbench dense, quantized to W4A4, and pruned to 32 tokens.
- `kernels`: a linear in bfloat16, int8 and fp8, where this hardware and the installed libraries have them.

A part that fails says why, and the others go on. With `--tiny --device cpu` it all runs without a GPU in a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qapbench.errors import first_line
from qapbench.files import replace_synced
from qapbench.methods.affine import fake_quantize
from qapbench.running.environment import environment
from qapbench.running.execute import make_runs
from qapbench.running.session import Session
from qapbench.running.settings import Settings, find_device
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.images import decode
from qapbench.tasking.questions import processor_inputs
from qapbench.tasking.tasks import load_task

from . import int8, random_llava
from .stages import EMBEDDED
from .true_shapes import SHAPES

W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 128}, "activations": {"bits": 4, "group_size": 128}}
ROWS: dict[str, dict[str, Any]] = {
    "dense": {},
    "W4A4": {"quantize": W4A4},
    "cdpruner 32": {"prune": {"method": "cdpruner", "keep": 32}},
    "W4A4, cdpruner 32": {"quantize": W4A4, "prune": {"method": "cdpruner", "keep": 32, "sensitivity": "combined"}},
}
HEIGHTS = (1, 8, 16, 64)  # rows of a product
NEW = 16  # tokens that plain `generate` makes
Part = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """What is checked.

    Attributes:
        device: the device.
        tiny: small shapes and the embedded model.
        folder: folder for checkpoints and records.
    """

    device: torch.device
    tiny: bool
    folder: Path

    def seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Median time of a call, after one that does not count, with the device's work done."""
        taken = []
        for turn in range(rounds + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            taken += [time.perf_counter() - start] * bool(turn)
        return statistics.median(taken)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def products(check: Check) -> Part:
    """Rows of products of a fixed height, beside other rows and elsewhere in the product."""
    found = []
    for inside, outside in [(64, 96), (128, 320)] if check.tiny else [(4096, 4096), (4096, 11008), (11008, 4096)]:
        for dtype in (torch.float32, torch.bfloat16):
            draw = torch.Generator().manual_seed(inside + outside)
            weight = torch.randn(inside, outside, generator=draw).to(check.device, dtype)
            rows = torch.randn(64, inside, generator=draw).to(check.device, dtype)
            others = torch.randn(64, inside, generator=draw).to(check.device, dtype)
            alone = check.seconds(lambda r=rows, w=weight: [row @ w for row in r.split(1)], 3)  # type: ignore[misc]
            whole = check.seconds(lambda r=rows, w=weight: r @ w)  # type: ignore[misc]
            for height in HEIGHTS:
                tiles = _tiled(rows, weight, height)
                beside = torch.cat([rows[:1], others[1:]])
                same = torch.equal(_tiled(beside, weight, height)[0], tiles[0])
                moved = torch.equal(_tiled(rows.flip(0), weight, height).flip(0), tiles)
                taken = check.seconds(lambda r=rows, w=weight, h=height: _tiled(r, w, h), 3)  # type: ignore[misc]
                found.append(
                    {
                        "shape": [inside, outside],
                        "dtype": str(dtype)[6:],
                        "height": height,
                        "invariant": same and moved,
                        "times_faster_than_single_rows": alone / taken,
                        "times_as_long_as_one_product": taken / whole,
                    }
                )
    return {"heights": found, "invariant": all(one["invariant"] for one in found)}


def _tiled(rows: Tensor, weight: Tensor, height: int) -> Tensor:
    return torch.cat([tile @ weight for tile in rows.split(height)])


def fake_quantization(check: Check) -> Part:
    """The bits of the device and of the CPU, and the time in copies."""
    shape, found = ((2, 9, 512) if check.tiny else (1, 640, 4096)), []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        there = x.to(check.device)
        for symmetric in (False, True):
            equal = torch.equal(fake_quantize(there, 4, 128, symmetric).cpu(), fake_quantize(x, 4, 128, symmetric))
            taken = check.seconds(lambda x=there, s=symmetric: fake_quantize(x, 4, 128, s), 10)  # type: ignore[misc]
            copies = taken / check.seconds(there.clone, 10)
            found.append({"dtype": str(dtype)[6:], "symmetric": symmetric, "equal_to_cpu": equal, "copies": copies})
    return {"cases": found, "equal_to_cpu": all(one["equal_to_cpu"] for one in found)}


def runs(check: Check) -> Part:
    """Questions per second, and whether answers depend on the batch size."""
    limit, model = (4, EMBEDDED) if check.tiny else (32, str(check.folder / "seven"))
    if not check.tiny:
        texts = [doc["text"] for doc in load_task(TaskSpec(name="diagramqa")).docs]
        random_llava.save_like(check.folder / "seven", SHAPES["llava-1.5-7b"], texts)
    found: dict[str, Part] = {}
    session = Session(Settings(check.folder / "unused", check.device))
    for name, sections in ROWS.items():
        task = {"name": "diagramqa", "limit": limit, "answers": "letter"}
        spec = RunSpec.parse({"name": name, "model": model, "task": task, **sections})
        stored, rates = {}, {}
        for size in (1, 8):
            folder = check.folder / f"runs-{size}"
            settings = dataclasses.replace(session.settings, runs=folder, batch_size=size)
            session.model(spec)
            start = time.perf_counter()
            (record,) = make_runs([spec], settings, fresh=True, session=session)
            rates[size] = limit / (time.perf_counter() - start)
            stored[size] = (folder / record.run_id / "answers.jsonl").read_bytes()
        found[name] = {"questions_per_second": rates, "same_bytes_at_batch_1_and_8": stored[1] == stored[8]}
    spec = RunSpec.parse({"name": "plain", "model": model, "task": {"name": "diagramqa", "limit": limit}})
    loaded, processor = session.model(spec)
    questions = [one for one in session.questions(spec) if one.images][:limit]

    def plain() -> None:
        for one in questions:
            inputs = processor_inputs(processor, one.prompt, [decode(image).picture for image in one.images])
            with torch.inference_mode():
                loaded.generate(
                    **{key: value.to(check.device) for key, value in inputs.items()},
                    do_sample=False,
                    max_new_tokens=NEW,
                )

    taken = check.seconds(plain, 1)
    found["transformers generate, batch 1"] = {"questions_per_second": {1: len(questions) / taken}}
    return {"rows": found, "same_bytes": all(one.get("same_bytes_at_batch_1_and_8", True) for one in found.values())}


def kernels(check: Check) -> Part:
    """A linear in several formats, as multiples of bfloat16."""
    width, tokens = (64, 8) if check.tiny else (4096, 640)
    found: Part = {}
    if importlib.util.find_spec("torchao") is None:
        found["int8"] = "torchao is not installed"
    else:
        taken = int8.measure(width, tokens, 5, str(check.device), False)
        found["int8"] = {name: ms / taken["bfloat16"] for name, ms in taken.items()}
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(check.device, torch.bfloat16)
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(1)).to(check.device, torch.bfloat16)
    if check.device.type != "cuda" or torch.cuda.get_device_capability(check.device) < (8, 9):
        found["fp8"] = "this device has no fp8 products"
    else:
        one = torch.ones((), device=check.device)
        left, right = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        plain = check.seconds(lambda: x @ weight.T, 20)
        scaled = check.seconds(lambda: torch._scaled_mm(left, right.T, one, one, out_dtype=torch.bfloat16), 20)
        found["fp8"] = {"times_bfloat16": scaled / plain}
    return found


PARTS: dict[str, Callable[[Check], Part]] = {
    "products": products,
    "fake_quantization": fake_quantization,
    "runs": runs,
    "kernels": kernels,
}


def checked(check: Check, parts: list[str]) -> dict[str, Any]:
    """The result of each part with its seconds, or what went wrong in it."""
    found: dict[str, Any] = {"tiny": check.tiny, "environment": environment(check.device)}
    for name in parts:
        start = time.perf_counter()
        try:
            made: Part = {"result": PARTS[name](check)}
        except Exception as error:  # one part that fails must not hide what the others found
            made = {"error": f"{type(error).__name__}: {first_line(error)}"}
        found[name] = {**made, "seconds": round(time.perf_counter() - start, 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes and the embedded model")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = checked(Check(find_device(given.device), given.tiny, Path(folder)), given.parts)
    replace_synced(given.out, json.dumps(found, indent=2) + "\n")
    for name in given.parts:
        print(f"{name}: {found[name].get('error', 'done')} ({found[name]['seconds']} s)")
    print(f"everything: {given.out}")


if __name__ == "__main__":
    main()
