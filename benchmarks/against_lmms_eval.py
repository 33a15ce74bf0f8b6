"""Time against lmms-eval, on the same checkpoint and the same questions, in one call.

    python -m benchmarks.against_lmms_eval [--limit 40] [--rounds 1] [--python PYTHON]

A LLaVA of about 100 million random weights is made on the spot, and questions with a picture each are written in the
schema of ScienceQA. lmms-eval answers them with its model `llava_hf` under the prompt and the scoring of its task
`scienceqa_img`; qapbench runs its task `scienceqa`, whose prompt is the same. Both generate up to 16 tokens in
float32 on the CPU. `llava_hf` refuses batches of more than one question, so one is its best batch size. Commands
alternate.

Wall time is that of a whole command. Answering time is what a command takes longer than the same command with one
question, so neither imports nor loading count. The twelve rows of Table 2 are one command here and twelve there, of
which one is measured and counted twelve times: lmms-eval prunes nothing, and a row costs it what its dense row costs.

lmms-eval may be in an environment of its own (`make test-lmms` makes one): `--python` is its interpreter. `llava_hf`
imports decord, which it uses only for videos; where that is missing, an empty module takes its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from qapbench.spec.spec_file import load_spec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.tasks import load_task

from . import random_llava

TASK = "scienceqa_shaped"
GOALS = {"generate": 2.0, "letters": 2.5, "cdpruner 32, letters": 4.0, "Table 2, twelve rows": 15.0}
ROWS = 12  # rows of Table 2
PRUNE = {"method": "cdpruner", "keep": 32}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
out = Console(width=120, highlight=False)


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a command took: seconds on the wall, and CPU seconds of all its processes."""

    wall: float
    cpu: float


def write_questions(path: Path, limit: int) -> int:
    """Write questions of the embedded data that have a picture, in the schema of ScienceQA. Returns their number."""
    rows: list[dict[str, Any]] = []
    for doc in load_task(TaskSpec(name="diagramqa")).docs:
        if doc.get("image") is not None and len(rows) < limit:
            buffer = io.BytesIO()
            doc["image"].load().convert("RGB").save(buffer, "PNG")
            shown = {"bytes": buffer.getvalue(), "path": None}
            text = {name: doc[name] for name in ("question", "choices", "answer", "hint", "subject", "grade")}
            rows.append({"image": shown, **text})
    table = pa.Table.from_pylist(rows)
    features = {"info": {"features": {"image": {"_type": "Image"}, **_features()}}}
    table = table.set_column(0, pa.field("image", IMAGE), pa.array(table["image"].to_pylist(), IMAGE))
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    return len(rows)


def _features() -> dict[str, Any]:
    text = {"dtype": "string", "_type": "Value"}
    return {
        **dict.fromkeys(("question", "hint", "subject", "grade"), text),
        "choices": {"feature": text, "_type": "List"},
        "answer": {"dtype": "int64", "_type": "Value"},
    }


def write_task(folder: Path, data: Path) -> None:
    """Write lmms-eval's task: scienceqa_img's prompt and scoring, on a parquet file."""
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text("from lmms_eval.tasks.scienceqa.utils import *\n")
    functions = {
        "doc_to_visual": "sqa_doc_to_visual",
        "doc_to_text": "sqa_doc_to_text",
        "doc_to_target": "sqa_doc_to_target",
        "process_results": "sqa_process_results",
    }
    plain = {
        "task": TASK,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": 16, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "lmms_eval_specific_kwargs": {
            "default": {
                "format": "default",
                "pre_prompt": "",
                "post_prompt": "\nAnswer with the option's letter from the given choices directly.",
            }
        },
    }
    lines = [f"{name}: !function utils.{function}" for name, function in functions.items()]
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(plain) + "\n".join([*lines, ""]))


def timed(command: list[str], env: dict[str, str], folder: Path) -> Spent:
    """Run a command.

    Raises:
        RuntimeError: it fails. The message ends with what it wrote.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    out.print(f"[dim]{' '.join(command[:4])} ...[/dim]")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    spent = Spent(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    out.print(f"    {spent.wall:.1f} s on the wall, {spent.cpu:.1f} s of CPU")
    return spent


class Commands:
    """The commands that are compared.

    Args:
        folder: has the model, the data and the task; results are written there.
        python: the interpreter that has lmms-eval.
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python, self.made = folder, python, 0
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
        probe = [python, "-c", "import importlib.util as u; raise SystemExit(not u.find_spec('decord'))"]
        if subprocess.run(probe, check=False).returncode:
            (folder / "path").mkdir(exist_ok=True)
            (folder / "path" / "decord.py").write_text("VideoReader = cpu = None\n")
            self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "path"), os.environ.get("PYTHONPATH")]))

    def lmms_eval(self, limit: int) -> Spent:
        """lmms-eval's `llava_hf` answers questions."""
        arguments = f"pretrained={self.folder / 'model'},dtype=float32,device_map=cpu"
        command = [self.python, "-m", "lmms_eval", "--model", "llava_hf", "--model_args", arguments]
        command += [
            "--tasks",
            TASK,
            "--include_path",
            str(self.folder / "task"),
            "--batch_size",
            "1",
            "--device",
            "cpu",
        ]
        made = self._new()
        command += ["--limit", str(limit), "--output_path", str(made), "--log_samples"]
        spent = timed(command, self.env, self.folder)
        # It ends with status 0 after an error too, and goes on where generating failed.
        lines = [json.loads(line) for path in made.rglob("*.jsonl") for line in path.read_text().splitlines()]
        answers = sum(bool(line["token_counts"][0]["output_tokens"]) for line in lines)
        if answers != limit:
            raise RuntimeError(f"{' '.join(command)}: {answers} of {limit} questions were answered")
        return spent

    def qapbench(self, kind: str, limit: int) -> Spent:
        """qapbench answers the same questions, as a key of GOALS says."""
        answers = "generate" if kind == "generate" else "letter"
        task = {"name": "scienceqa", "data": str(self.folder / "test.parquet"), "limit": limit, "answers": answers}
        spec: dict[str, Any] = {"name": "measured", "model": str(self.folder / "model"), "task": task}
        runs = self._new()
        path = runs.with_suffix(".yaml")
        if kind.startswith("Table 2"):
            changes = [f"model={spec['model']}", f"task={json.dumps(task)}"]
            assert len(load_spec("table2_w4a4", changes)) == ROWS
            named = ["table2_w4a4", *(part for change in changes for part in ("--set", change))]
        else:
            path.write_text(yaml.safe_dump(spec | ({"prune": PRUNE} if "cdpruner" in kind else {})))
            named = [str(path)]
        command = [sys.executable, "-m", "qapbench.cli", "run", *named, "--runs", str(runs), "--device", "cpu"]
        return timed(command, dict(os.environ), self.folder)

    def _new(self) -> Path:
        self.made += 1
        return self.folder / f"made-{self.made}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(GOALS), default=list(GOALS))
    here = Path(".venv-lmms/bin/python").absolute()
    default = str(here) if here.exists() and importlib.util.find_spec("lmms_eval") is None else sys.executable
    parser.add_argument("--python", type=os.path.abspath, default=default, help="the interpreter that has lmms-eval")
    given = parser.parse_args()
    if given.limit < 2:
        parser.error("--limit: at least 2 questions are needed")
    if subprocess.run([given.python, "-c", "import lmms_eval"], check=False, capture_output=True).returncode:
        parser.error(f"{given.python} has no lmms-eval: pip install 'qapbench[lmms-eval]', or `make test-lmms`")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_llava.save(folder / "model", (doc["text"] for doc in load_task(TaskSpec(name="diagramqa")).docs))
        limit = write_questions(folder / "test.parquet", given.limit)
        write_task(folder / "task", folder / "test.parquet")
        commands = Commands(folder, given.python)
        taken: dict[str, list[tuple[Spent, Spent]]] = {}  # (one question, all questions)
        for _ in range(given.rounds):
            taken.setdefault("lmms-eval", []).append((commands.lmms_eval(1), commands.lmms_eval(limit)))
            for kind in given.only:
                taken.setdefault(kind, []).append((commands.qapbench(kind, 1), commands.qapbench(kind, limit)))
    show(taken, limit)


def show(taken: dict[str, list[tuple[Spent, Spent]]], limit: int) -> None:
    """Print the ratios.

    Args:
        taken: what is measured -> for each round, what one question and what all questions took.
        limit: number of questions.
    """
    table = Table("what", "wall, s", "CPU, s", "wall", "CPU", "answering, wall", "answering, CPU", "goal (wall)")
    theirs = least(taken["lmms-eval"])
    for name in taken:
        mine, times = least(taken[name]), ROWS if name.startswith("Table 2") else 1
        ratios = [f"{times * other / own:.1f}x" if own > 0 else "" for own, other in zip(mine, theirs, strict=True)]
        table.add_row(name, f"{mine[0]:.1f}", f"{mine[1]:.1f}", *ratios, f"{GOALS[name]:.1f}x" if name in GOALS else "")
    out.print(table)
    out.print(f"{limit} questions; ratios: how many times as long lmms-eval takes for the same")


def least(rounds: list[tuple[Spent, Spent]]) -> tuple[float, float, float, float]:
    """The least of several rounds: wall and CPU seconds of the command, and of answering."""
    wall, cpu = min(full.wall for _, full in rounds), min(full.cpu for _, full in rounds)
    first_wall, first_cpu = min(one.wall for one, _ in rounds), min(one.cpu for one, _ in rounds)
    return wall, cpu, wall - first_wall, cpu - first_cpu


if __name__ == "__main__":
    main()
