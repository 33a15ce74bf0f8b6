"""A compressed model that answers what another program asks. Nothing is stored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from qapbench.compression import compress
from qapbench.errors import UserError, nearest
from qapbench.models import family_of
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.spec_file import load_spec
from qapbench.tasking.questions import Question, in_order

from .batches import BatchRunner
from .plan import prune_key
from .planner import Planner
from .prompt_encoder import PromptEncoder
from .session import Session
from .settings import Settings, find_device


class LiveModel:
    """A loaded model, compressed as a spec says, which answers requests on the path that runs take.

    Args:
        spec: the model, and how it is compressed. Its task is only read if the method calibrates.
        settings: where and how the model runs.

    Attributes:
        processor: the model's processor.
        receipt: what was quantized, as measured.

    Raises:
        UserError: the model cannot be loaded, or the spec does not fit it.
    """

    def __init__(self, spec: RunSpec, settings: Settings) -> None:
        session = Session(settings)
        model, self.processor = session.model(spec)
        family = family_of(model)
        self._open = contextlib.ExitStack()  # as long as it is held, the model stays compressed
        if spec.quantize and spec.quantize.calibration:
            planned = Planner(settings.runs, settings.device).plan(spec)
            self.receipt = self._open.enter_context(session.quantized(planned))
        else:
            dense = spec.model_copy(update={"prune": None})
            self.receipt = self._open.enter_context(
                compress(model, dense, self.processor, keep_originals=session.keep_originals)
            )
        self._key = prune_key(spec)
        pruning = session.pruning(spec)
        prunings = {self._key: pruning} if self._key is not None and pruning is not None else {}
        self._encoder = PromptEncoder(family, self.processor, prunings)
        self._runner = BatchRunner(family, self.processor, settings.batch_size, spec.seed)
        self._batch_size = settings.batch_size
        self._checked = False

    def answer(self, requests: Sequence[Instance]) -> list[Any]:
        """The text of each request that generates, and [log-likelihood, is most likely] of each continuation.

        Requests of one document are one question. An answer does not depend on the order, nor on what else is asked.

        Args:
            requests: requests with prompts for this model, no two of which are the same object.

        Raises:
            NotQuantizedError: the spec asks for quantization that never reached a matmul.
        """
        from tqdm import tqdm

        found: dict[int, Any] = {}
        questions = in_order(list(requests))
        with tqdm(total=len(questions), desc="qapbench", disable=None) as bar:
            for at in range(0, len(questions), self._batch_size):
                window = questions[at : at + self._batch_size]
                for question, outputs in zip(window, self._answers(window), strict=True):
                    found |= {id(one): output for one, output in zip(question.instances, outputs, strict=True)}
                bar.update(len(window))
        return [found[id(request)] for request in requests]

    def _answers(self, window: Sequence[Question]) -> list[list[Any]]:
        """The outputs of each question's requests."""
        rows, sizes = [], []
        for question in window:
            texts = dict.fromkeys(instance.args[0] for instance in question.instances)
            prompts = {text: self._encoder.encode(question, text, [self._key])[self._key] for text in texts}
            own = self._runner.rows(question, prompts)
            rows += own
            sizes.append(len(own))
        results = iter(self._runner.results(rows, max(row.length for row in rows)))
        answers = [[output for _ in range(size) for output in next(results)[0]] for size in sizes]
        if not self._checked:
            self.receipt.check()
            self._checked = True
        return answers


def live_settings(batch_size: int | str, device: str | None, runs: str, trust_remote_code: bool) -> Settings:
    """Settings from the arguments that another program hands over.

    Where a launcher starts a process for each GPU, each takes its own.

    Raises:
        UserError: the batch size is no number, or there is no such device.
    """
    if not str(batch_size).isdecimal() or not int(batch_size):
        raise UserError(f"batch_size: a whole number above 0, got '{batch_size}'")
    own = os.environ.get("LOCAL_RANK", "")
    if device in (None, "cuda") and own.isdecimal() and torch.cuda.is_available():
        device = f"cuda:{own}"
    return Settings(Path(runs), find_device(device), int(batch_size), trust_remote_code=trust_remote_code)


def one_spec(spec: str | Path | None, pretrained: str | None, run: str | None = None) -> RunSpec:
    """The spec of one run, from the arguments with which another program names a model.

    Args:
        spec: a spec file, or the name of a shipped one; None compresses nothing.
        pretrained: the model; None takes that of the spec.
        run: name of a run of the spec, needed if there are several.

    Raises:
        UserError: neither names a model, the spec has mistakes, or there are several runs and none is named.
    """
    if spec is None:
        if pretrained is None:
            raise UserError("name a model by `pretrained`, a spec file by `spec`, or both")
        return RunSpec.parse({"name": "dense", "model": pretrained, "task": "none"})
    specs = {one.name: one for one in load_spec(spec)}
    if run is not None and run not in specs:
        raise UserError(f"run: {spec} has no run '{run}'; {nearest(run, specs)}")
    if run is None and len(specs) > 1:
        names = ", ".join(f"'{name}'" for name in specs)
        raise UserError(f"spec: {spec} has {len(specs)} runs; add run=NAME with one of {names}")
    found = specs[run] if run is not None else next(iter(specs.values()))
    return found.model_copy(update={"model": pretrained}) if pretrained else found
