"""Measures what the stages of a prompt take, row against row in one process."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qapbench.costing.cost import cost
from qapbench.costing.devices import HERE
from qapbench.costing.prompt import Prompt
from qapbench.errors import UserError
from qapbench.memory import peak_memory
from qapbench.models import family_of
from qapbench.models.loading import precision
from qapbench.prune.prompt import PrunedPrompt
from qapbench.records.profile import Profile, Spread
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.questions import Question

from .environment import environment
from .plan import Planned
from .planner import Planner
from .prompt_encoder import PromptEncoder
from .session import Session
from .threads import threads_of, using_threads


@dataclass
class Row:
    """A row that is measured.

    Attributes:
        planned: the plan of the run.
        seconds: stage -> what it took in each repetition.
        tokens: tokens of the prompt as it was prefilled.
        text: text tokens among them.
        inside: whether tokens are chosen inside the decoder.
        peak: peak memory in MB.
    """

    planned: Planned
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    text: int = 0
    inside: bool = False
    peak: int = 0


def profile(
    specs: Sequence[RunSpec], session: Session, planner: Planner, repeats: int = 20, new_tokens: int = 8
) -> list[Profile]:
    """Measure one prompt under each run: the first question of the task with an image that the processor accepts.

    Every repetition measures each row once, each time beginning with another one, so that what drifts on the machine
    reaches all of them alike. A first repetition warms up and does not count. Work on a GPU is waited for at the end of
    each stage.

    Args:
        specs: the runs, all of one model and task.
        session: holds the model.
        planner: plans the runs.
        repeats: repetitions that count.
        new_tokens: tokens to generate, at least two.

    Raises:
        UserError: the runs have several models or tasks, or no question has an image.
    """
    rows = [Row(planner.plan(part)) for spec in specs for part in planner.parts(spec)]
    if len({planner.together(row.planned.spec) for row in rows}) > 1:
        raise UserError("profile: the runs of the spec have several models or tasks; profile them one by one")
    first = rows[0].planned.spec
    question = next((one for one in session.questions(first) if one.images and one.refused is None), None)
    if question is None:
        raise UserError("profile: no question of the task has an image")
    with using_threads(threads_of(first, session.settings)):
        for repeat in range(repeats + 1):
            turn = repeat % len(rows)
            for row in (*rows[turn:], *rows[:turn]):
                with session.quantized(row.planned):
                    found = _measured(row, session, question, new_tokens)
                for stage, seconds in found.items() if repeat else ():
                    row.seconds[stage].append(seconds)
        return [_profile(row, session, repeats, new_tokens) for row in rows]


@torch.no_grad()
def _measured(row: Row, session: Session, question: Question, new_tokens: int) -> dict[str, float]:
    """Seconds of each stage of one prompt."""
    spec = row.planned.spec
    model, processor = session.model(spec)
    family, device = family_of(model), session.settings.device
    seconds: dict[str, float] = defaultdict(float)
    pruning = session.pruning(spec)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        started = now()
        yield
        seconds[name] += now() - started

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    encoder = PromptEncoder(family, processor, {} if pruning is None else {"row": pruning}, stage)
    key = None if pruning is None else "row"
    pruned = encoder.encode(question, question.prompt, [key])[key]
    row.tokens, row.inside = pruned.inputs["input_ids"].shape[1], pruned.inside is not None
    row.text = row.tokens - sum(len(features) for features in pruned.features)
    marks: list[float] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: marks.append(now()))
    started = now()
    try:
        _generate(model, family, pruned, new_tokens)
    finally:
        handle.remove()
    row.peak = _peak_mb(device)
    gaps = [after - before for before, after in itertools.pairwise(marks)]
    found = {"vision": seconds["vision"], "selection": seconds["choose"], "prefill": marks[0] - started}
    return {**found, "prompt": sum(found.values()), "token": statistics.median(gaps)}


def _generate(model: Any, family: Any, pruned: PrunedPrompt, new_tokens: int) -> None:
    inputs = {**pruned.inputs, **(family.encoded(pruned.features) if pruned.features else {})}
    options = {"do_sample": False, "num_beams": 1, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    with contextlib.nullcontext() if pruned.inside is None else pruned.inside():
        model.generate(**inputs, **options)


def _peak_mb(device: torch.device) -> int:
    """Peak memory of the GPU since its last reset, or of the process so far."""
    found = peak_memory(device)
    return found.get("peak_gpu_memory_mb", found["peak_memory_mb"])


def _profile(row: Row, session: Session, repeats: int, new_tokens: int) -> Profile:
    """The profile of a row."""
    spec, device = row.planned.spec, session.settings.device
    model, _ = session.model(spec)
    spreads = {stage: _spread(seconds) for stage, seconds in row.seconds.items()}
    if row.inside or spec.prune is None:
        spreads.pop("selection")
    dtype = precision(spec, device)
    said = environment(device)
    quantize = spec.quantize
    return Profile(
        run_id=row.planned.id,
        name=spec.name,
        device=str(said["device"]),
        dtype=dtype,
        threads=torch.get_num_threads(),
        attention=str(model.config._attn_implementation),
        matmul=_matmul(device, quantize.backend if quantize else None),
        simulated=quantize is not None and quantize.backend == "simulate",
        repeats=repeats,
        tokens=row.tokens,
        new_tokens=new_tokens,
        peak_memory_mb=row.peak,
        bound=_bound(spec, dtype, row.text) if device.type == "cpu" else None,
        **spreads,
    )


def _spread(seconds: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return Spread(median=median, low=low, high=high)


def _matmul(device: torch.device, backend: str | None) -> str:
    """What multiplies: a library of kernels, or torch's."""
    if backend not in (None, "simulate"):
        return str(backend)
    if device.type == "cuda":
        return f"cuBLAS of CUDA {torch.version.cuda}"
    return "MKL" if torch.backends.mkl.is_available() else "torch"


def _bound(spec: RunSpec, dtype: str, text: int) -> float | None:
    """The cost model's least seconds for the prompt on this machine; None if the model's kind has no cost model."""
    try:
        counted = cost(spec.model, spec.model_copy(update={"dtype": dtype}), Prompt(before=0, after=text))
    except UserError:
        return None
    return sum(bound.seconds for stage, bound in counted.bounds(HERE).items() if stage != "decode")
