"""Runs: what is to be done, doing what is missing, and the record of each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from qapbench.calibration import CalibrationSamples
from qapbench.checkpoints import find_checkpoint
from qapbench.compress import compress
from qapbench.errors import Problem, UserError
from qapbench.memory import peak_memory
from qapbench.spec import RunSpec, SweepSpec
from qapbench.specfile import load_spec

from . import calibration
from .environment import environment
from .loading import fingerprints, load_model, precision
from .record import RECORD, SCHEMA, SCORED, Record, chance, labels, notes, read_record, read_records, write_scored
from .store import Answer, Store, set_aside, write_json
from .tasks import LoadedTask, load_task, quiet

TEXT_DEPENDS_ON = ("model", "data", "precision", "ptq", "calibration")  # the kinds of fingerprint
CALIBRATIONS = "calibrations"  # folder beside the runs
Report = Callable[[str, int, int], None]
"""Called with (run name, questions answered, questions in all)."""


@dataclass(frozen=True)
class Planned:
    """One run before it is made.

    Attributes:
        id: hash of how it compresses and asks, and of the content that it reads.
        text_key: hash of what a text-only answer depends on: everything but the pruner.
        total: questions to answer; answered: those that are.
        done: whether its record is written.
    """

    spec: RunSpec
    id: str
    text_key: str
    folder: Path
    total: int
    answered: int
    done: bool
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def state(self) -> Literal["done", "begun", "new"]:
        return "done" if self.done else "begun" if self.answered else "new"


def run(
    spec: str | Path | RunSpec | SweepSpec | Iterable[RunSpec],
    runs: str | Path = "runs",
    *,
    fresh: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> list[Record]:
    """Make the runs that are missing and return the record of each, in order.

    Args:
        spec: a spec file or the name of a shipped one, a spec, or several.
        runs: folder of the results, one sub-folder a run. What lies there is taken up, never made twice.
        fresh: make every run anew; earlier results are set aside, not deleted.
        batch_size: questions per forward pass; 1 on a CPU (where more gains nothing), 8 on a GPU.
        device: "cpu", "cuda", ...; a GPU where there is one.

    Raises:
        UserError: the spec, the model or the data are wrong.
        NotQuantizedError: a run asks for quantization that never reached a matmul.
    """
    engine = Engine(Path(runs), batch_size, device, trust_remote_code, report)
    return [engine.run(one, fresh) for one in as_specs(spec)]


def as_specs(spec: str | Path | RunSpec | SweepSpec | Iterable[RunSpec]) -> list[RunSpec]:
    if isinstance(spec, RunSpec):
        return [spec]
    if isinstance(spec, SweepSpec):
        return [RunSpec.parse(cell) for cell in spec.cells()]
    if isinstance(spec, str | Path):
        return load_spec(spec)
    return list(spec)


class Engine:
    """Makes runs one after another on this machine, keeping the loaded model and what runs have in common."""

    def __init__(
        self, runs: Path, batch_size: int | None = None, device: str | None = None,
        trust_remote_code: bool = False, report: Report | None = None,
    ) -> None:  # fmt: skip
        self.runs = runs
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if self.device.type not in ("cpu", "cuda", "mps", "xpu"):
                raise RuntimeError
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError):  # an AssertionError is what torch without CUDA raises
            raise UserError(f"device: this machine has no '{device}'; try cpu or cuda") from None
        self.batch_size = batch_size or (8 if self.device.type == "cuda" else 1)
        self.trust_remote_code = trust_remote_code
        self.report = report or (lambda name, done, total: None)
        self._loaded: tuple[Hashable, Any, Any] | None = None
        self._tasks: dict[Hashable, LoadedTask] = {}
        self._samples: dict[Hashable, CalibrationSamples] = {}
        self._shared: dict[Hashable, Answer] = {}
        self._recalled: set[str] = set()

    def check(self, spec: RunSpec) -> None:
        """Raise UserError where the task or a local model is not there; a hub is not asked."""
        problems: list[Problem] = []
        for look in (lambda: self.task(spec), lambda: _check_local(spec)):
            try:
                look()
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)

    def plan(self, spec: RunSpec, fetch: bool = True) -> Planned:
        """What a run would take up, without loading the model.

        Args:
            fetch: whether checkpoints may be downloaded for it.
        """
        task = self.task(spec)
        wanted = spec.quantize.calibration if spec.quantize else None
        source = calibration.fingerprint(task, wanted) if wanted else ""
        content = fingerprints(spec, task.fingerprint, self.device, fetch, source)
        run_id = spec.digest(content, task.asked)
        text_key = run_id  # where calibration prunes, the weights themselves depend on the pruner
        if wanted is None or not wanted.pruned:
            about_text = {key: value for key, value in content.items() if key.split()[0] in TEXT_DEPENDS_ON}
            text_key = spec.model_copy(update={"prune": None}).digest(about_text, task.asked)
        folder = self.runs / run_id
        done = (folder / RECORD).exists()
        answered = task.count if done else len(Store(folder).read())
        return Planned(spec, run_id, text_key, folder, task.count, answered, done, content)

    def run(self, spec: RunSpec, fresh: bool = False) -> Record:
        """One run's record, made now or read."""
        planned = self.plan(spec)
        if planned.done and not fresh:
            self.report(spec.name, planned.total, planned.total)
            return {**read_record(planned.folder), "name": spec.name}
        store = Store(planned.folder)
        with store.locked():
            if fresh:
                set_aside(planned.folder)
            planned.folder.mkdir(parents=True, exist_ok=True)
            write_json(planned.folder / "spec.json", spec.model_dump(mode="json"))
            return self._make(planned, store)

    def task(self, spec: RunSpec) -> LoadedTask:
        key = (spec.task.model_dump_json(), spec.seed)
        if key not in self._tasks:
            self._tasks[key] = load_task(spec.task, spec.seed)
        return self._tasks[key]

    def model(self, spec: RunSpec) -> tuple[Any, Any]:
        """The loaded model and processor; the latest one stays loaded."""
        key = (find_checkpoint(spec.model).folder, precision(spec, self.device))
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = (key, *load_model(spec, self.device, self.trust_remote_code))
        return self._loaded[1], self._loaded[2]

    def _calibration(self, planned: Planned, model: Any, processor: Any) -> CalibrationSamples | None:
        """The samples of a run that calibrates; its result is kept beside the runs."""
        spec = planned.spec
        wanted = spec.quantize.calibration if spec.quantize else None
        if wanted is None:
            return None
        key = (spec.task.model_dump_json(), wanted.samples, wanted.seed, wanted.data, self._loaded and self._loaded[0])
        if key not in self._samples:
            self._samples = {key: calibration.samples(self.task(spec), wanted, model, processor)}
        about = planned.fingerprints
        if not wanted.pruned:  # then nothing of the pruner enters, and a sweep calibrates once
            about = {key: value for key, value in about.items() if key in ("model", "precision", "vision tower")}
        return dataclasses.replace(
            self._samples[key], cache=self.runs / CALIBRATIONS, fingerprints=about,
            report=lambda what, done, total: self.report(f"{spec.name}: {what}", done, total),
        )  # fmt: skip

    def _recall(self, planned: Planned) -> None:
        """Take up text-only answers of finished runs that share them."""
        if planned.text_key in self._recalled:
            return
        self._recalled.add(planned.text_key)
        for record in read_records(self.runs):
            if record.get("text_key") == planned.text_key:
                for answer in Store(self.runs / record["run_id"]).read():
                    if "images" not in answer:
                        self._shared[planned.text_key, answer["task"], answer["doc"]] = answer

    def _make(self, planned: Planned, store: Store) -> Record:
        from qapbench.analysis.score import tally

        from .lm import CompressedLM

        spec, task = planned.spec, self.task(planned.spec)
        model, processor = self.model(spec)
        self._recall(planned)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with compress(model, spec, processor, calibration=self._calibration(planned, model, processor)) as receipt:
            started = time.perf_counter()
            lm = CompressedLM(
                model, processor, receipt, store, self.batch_size, spec.seed,
                lambda done, total: self.report(spec.name, done, total), self._shared, planned.text_key,
            )  # fmt: skip
            samples = _evaluate(lm, task, spec.seed)
        seconds = time.perf_counter() - started
        receipt.recount([image for answer in store.read() for image in answer.get("images", [])])
        scores = tally((sample["metrics"] for sample in samples), task.columns, task.unavailable)
        write_scored(planned.folder / SCORED, samples)
        record = {
            "schema": SCHEMA,
            "run_id": planned.id,
            "text_key": planned.text_key,
            "name": spec.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "spec": spec.model_dump(mode="json"),
            "labels": labels(spec),
            "task": {"name": task.name, "questions": task.count, "chance": chance(task)},
            "scores": scores.to_json(),
            "tokens": receipt.tokens,
            "receipt": receipt.to_json(),
            "environment": {
                **environment(self.device), "batch_size": self.batch_size, "dtype": str(model.dtype).split(".")[-1],
                "image_processor": type(processor.image_processor).__name__,
            },
            "fingerprints": planned.fingerprints,
            "timing": {
                "seconds": round(seconds, 3), "questions": lm.answered, "computed": lm.computed,
                "questions_per_second": round(lm.computed / seconds, 2), **peak_memory(self.device),
            },
            "notes": notes(spec, task, receipt),
        }  # fmt: skip
        write_json(planned.folder / RECORD, record)
        return read_record(planned.folder)


def _check_local(spec: RunSpec) -> None:
    """Raise UserError for a model or text tower that is neither here nor written like a hub id."""
    for name, where in ((spec.model, "model"), (spec.text_tower, "text_tower")):
        if name and (name.count("/") != 1 or Path(name).exists()):
            find_checkpoint(name, where)


def _evaluate(lm: Any, task: LoadedTask, seed: int) -> list[dict[str, Any]]:
    """lm-eval's own evaluator; for each question its id and what `process_results` gave."""
    from lm_eval.evaluator import evaluate

    task.task.set_fewshot_seed(seed=seed)
    with quiet():
        # `simple_evaluate` would add its own report of the machine, which takes seconds and is not used.
        results = evaluate(
            lm, {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}}, limit=task.count, bootstrap_iters=0,
            apply_chat_template=bool(getattr(lm.processor, "chat_template", None)),
        )  # fmt: skip
    (samples,) = results["samples"].values()
    names = [*task.columns, "unparsed"]
    first = {sample["doc_id"]: sample for sample in reversed(samples)}  # of a task with several filters, the first
    return [
        {
            "id": task.ids[doc],
            "doc": doc,
            "metrics": {name: sample[name] for name in names if name in sample},
        }
        for doc, sample in sorted(first.items())
    ]
