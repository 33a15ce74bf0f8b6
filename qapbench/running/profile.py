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
from torch.utils._python_dispatch import TorchDispatchMode

from qapbench.costing.cost import cost
from qapbench.costing.devices import HERE, Device, find_device_peaks, reported_device
from qapbench.costing.prompt import Prompt
from qapbench.errors import UserError
from qapbench.memory import Phases
from qapbench.models import family_of
from qapbench.models.loading import precision
from qapbench.prune.prompt import PrunedPrompt
from qapbench.records.profile import Profile, Spread
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.images import decode
from qapbench.tasking.questions import Question

from .environment import environment
from .plan import Planned
from .planner import Planner
from .prompt_encoder import PromptEncoder
from .session import Session
from .threads import threads_of, using_threads

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_int_mm", "_scaled_mm")
"""Names of torch's matrix products, besides those that hold weights in few bits ("int4pack")."""


class Kernels(TorchDispatchMode):
    """Notes which of torch's attention kernels and matrix products run.

    Attributes:
        attention: names of the kernels of attention. Attention that is written as products and a softmax has none.
        products: names of the matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention: set[str] = set()
        self.products: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if "scaled_dot_product" in name:
            self.attention.add(name.removeprefix("_scaled_dot_product_"))
        elif name in PRODUCTS or "pack_mm" in name:
            self.products.add(name.removeprefix("_"))
        return func(*args, **(kwargs or {}))


@dataclass
class Row:
    """A row that is measured.

    Attributes:
        planned: the plan of the run.
        seconds: stage -> what it took in each repetition.
        tokens: tokens of each prompt as it was prefilled.
        text: text tokens among them.
        inside: whether tokens are chosen inside the decoder.
        kernels: what ran in the warm-up.
        phases: peak memory of the row.
    """

    planned: Planned
    phases: Phases
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    text: int = 0
    inside: bool = False
    kernels: Kernels = field(default_factory=Kernels)

    @property
    def peak(self) -> int:
        """Peak memory in MB: of the GPU, or of the process on a CPU."""
        return (self.phases.gpu or self.phases.resident)["row"]


def profile(
    specs: Sequence[RunSpec], session: Session, planner: Planner, repeats: int = 20, new_tokens: int = 8, batch: int = 1
) -> list[Profile]:
    """Measure one prompt under each run: the first question of the task with an image that the processor accepts.

    In a batch the same prompt stands several times, side by side from the tower to the last token. Products are then
    those of the whole batch, as a server would compute them; runs multiply row by row instead.

    Every repetition measures each row once, each time beginning with another one, so that what drifts on the machine
    reaches all of them alike. A first repetition warms up and does not count. Work on a GPU is waited for at the end of
    each stage.

    Args:
        specs: the runs, all of one model and task.
        session: holds the model.
        planner: plans the runs.
        repeats: repetitions that count.
        new_tokens: tokens to generate, at least two.
        batch: how often the prompt stands in the batch.

    Raises:
        UserError: the runs have several models or tasks, or no question has an image.
    """
    rows = [Row(planner.plan(part), Phases(session.settings.device)) for spec in specs for part in planner.parts(spec)]
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
                with session.quantized(row.planned), contextlib.nullcontext() if repeat else row.kernels:
                    row.phases.begin("row")
                    found = _measured(row, session, question, new_tokens, batch)
                    row.phases.end()
                for stage, seconds in found.items() if repeat else ():
                    row.seconds[stage].append(seconds)
        return [_profile(row, session, question, repeats, new_tokens, batch) for row in rows]


@torch.no_grad()
def _measured(row: Row, session: Session, question: Question, new_tokens: int, batch: int) -> dict[str, float]:
    """Seconds of each stage of a batch of one prompt."""
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

    encoder = PromptEncoder(family, processor, {} if pruning is None else {"row": pruning}, stage, copies=batch)
    key = None if pruning is None else "row"
    pruned = encoder.encode(question, question.prompt, [key])[key]
    row.tokens, row.inside = pruned.inputs["input_ids"].shape[1], pruned.inside is not None
    row.text = row.tokens - sum(len(features) for features in pruned.features) // batch
    marks: list[float] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: marks.append(now()))
    started = now()
    try:
        _generate(model, family, pruned, new_tokens)
    finally:
        handle.remove()
    gaps = [after - before for before, after in itertools.pairwise(marks)]
    found = {"vision": seconds["vision"], "selection": seconds["choose"], "prefill": marks[0] - started}
    first = sum(found.values())
    return {**found, "prompt": first, "token": statistics.median(gaps), "answer": first + marks[-1] - marks[0]}


def _generate(model: Any, family: Any, pruned: PrunedPrompt, new_tokens: int) -> None:
    inputs = {**pruned.inputs, **(family.encoded(pruned.features) if pruned.features else {})}
    options = {"do_sample": False, "num_beams": 1, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    with contextlib.nullcontext() if pruned.inside is None else pruned.inside():
        model.generate(**inputs, **options)


def _profile(row: Row, session: Session, question: Question, repeats: int, new_tokens: int, batch: int) -> Profile:
    """The profile of a row."""
    spec, device = row.planned.spec, session.settings.device
    model, _ = session.model(spec)
    spreads = {stage: _spread(seconds) for stage, seconds in row.seconds.items()}
    if row.inside or spec.prune is None:
        spreads.pop("selection")
    dtype = precision(spec, device)
    said = environment(device)
    quantize = spec.quantize
    sizes = tuple((picture.height, picture.width) for picture in (decode(image).picture for image in question.images))
    prompt = Prompt(before=0, after=row.text, images=sizes, batch=batch)
    peaks = find_device_peaks(HERE) if device.type == "cpu" else reported_device(str(said["device"]))
    return Profile(
        run_id=row.planned.id,
        name=spec.name,
        device=str(said["device"]),
        dtype=dtype,
        threads=torch.get_num_threads(),
        attention=_with(str(model.config._attn_implementation), row.kernels.attention),
        matmul=_with(_library(device, quantize.backend if quantize else None), row.kernels.products),
        simulated=quantize is not None and quantize.backend == "simulate",
        repeats=repeats,
        tokens=row.tokens,
        new_tokens=new_tokens,
        batch=batch,
        peak_memory_mb=row.peak,
        bound=_bound(spec, dtype, prompt, peaks) if peaks else None,
        prompts_per_second=batch / spreads["answer"].median,
        tokens_per_second=batch / spreads["token"].median,
        **spreads,
    )


def _spread(seconds: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return Spread(median=median, low=low, high=high)


def _library(device: torch.device, backend: str | None) -> str:
    """The library that multiplies: that of low-bit kernels, or torch's."""
    if backend not in (None, "simulate"):
        return str(backend)
    if device.type == "cuda":
        return f"cuBLAS of CUDA {torch.version.cuda}"
    return "MKL" if torch.backends.mkl.is_available() else "torch"


def _with(name: str, kernels: set[str]) -> str:
    """A name, with the kernels that ran under it."""
    return f"{name} ({', '.join(sorted(kernels))})" if kernels else name


def _bound(spec: RunSpec, dtype: str, prompt: Prompt, peaks: Device) -> float | None:
    """The cost model's least seconds for the prompts on a device; None if the model's kind has no cost model."""
    try:
        counted = cost(spec.model, spec.model_copy(update={"dtype": dtype}), prompt)
    except UserError:
        return None
    return sum(bound.seconds for stage, bound in counted.bounds(peaks).items() if stage != "decode")
