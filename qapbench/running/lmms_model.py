"""qapbench as a model of lmms-eval: `python -m lmms_eval --model qapbench --model_args pretrained=...,spec=...`."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from qapbench.tasking.lm import AskingLM
from qapbench.tasking.lmms_pictures import Pictures
from qapbench.tasking.lmms_requests import generation, marked

from .live import LiveModel, live_settings, one_spec
from .settings import BATCH


class QapbenchLmms(lmms):
    """A model that is quantized and pruned as a spec says.

    Args:
        pretrained: name of an embedded model, a checkpoint folder, or a hub id; None takes that of the spec.
        spec: a spec file, or the name of a shipped one; None compresses nothing.
        run: name of a run of the spec, needed if there are several.
        batch_size: number of questions answered together. No answer depends on it.
        device: "cpu", "cuda" or another torch device; if None, a GPU if there is one.
        runs: folder in which results of calibration are kept.
        trust_remote_code: let a checkpoint run its own Python code.
        max_batch_size: given by lmms-eval, and not used.

    Raises:
        UserError: the model or the spec are wrong.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        spec: str | None = None,
        run: str | None = None,
        batch_size: int | str = BATCH,
        device: str | None = None,
        runs: str = "runs",
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        settings = live_settings(batch_size, device, runs, trust_remote_code)
        self.live = LiveModel(one_spec(spec, pretrained, run), settings)
        self.device = settings.device
        self._lm = AskingLM(self.live.processor)
        self._pictures: dict[tuple[str, str], Pictures] = {}

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text that is generated for each request."""
        made = []
        for index, request in enumerate(requests):
            text, options, visual, doc, task, split = request.args
            arguments = self._asked(text, visual, doc, task, split)
            made.append(
                _instance("generate_until", text, (arguments[0], generation(options), arguments[1]), index, doc, task)
            )
        return self.live.answer(made)

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """(loss, is most likely) of each continuation, where the loss is the negative log-likelihood.

        lmms-eval's tasks take the continuation with the smallest loss. Its evaluator turns a plain pair into a text,
        which they cannot read, but leaves alone what a `GenerationResult` holds.
        """
        made = []
        for index, request in enumerate(requests):
            text, continuation, *rest = request.args
            visual, doc, task, split = rest or (None, request.doc_id, request.task_name, "")
            if callable(continuation):
                continuation = continuation(self.task_dict[task][split][doc])
            prompt, pictures = self._asked(text, visual, doc, task, split)
            if self._lm.templated:
                continuation = continuation.removeprefix(" ")  # the template ends as it wants the answer to begin
            made.append(_instance("loglikelihood", text, (prompt, continuation, pictures), index, doc, task))
        return [GenerationResult((-likelihood, greedy)) for likelihood, greedy in self.live.answer(made)]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("qapbench answers one question at a time: tasks of several rounds are not supported")

    def _asked(self, text: str, visual: Any, doc: int, task: str, split: str) -> tuple[str, dict[str, Any]]:
        """The prompt of a request, and its pictures as lm-eval hands them over."""
        key = (task, split)
        if visual is not None and key not in self._pictures:
            docs = self.task_dict[task][split]
            self._pictures[key] = Pictures(task, lambda index: visual(docs[index]))
        pictures = self._pictures[key].of(doc) if visual is not None else []
        message = marked(text, len(pictures))
        turn = [{"role": "user", "content": message}]
        prompt = self._lm.apply_chat_template(turn) if self._lm.templated else self._lm.as_prompt(message)
        return prompt, {"visual": pictures}


def _instance(kind: Any, text: str, arguments: tuple[Any, ...], index: int, doc: int, task: str) -> Instance:
    """A request as lm-eval has it, whose text pruners compare the pictures with."""
    return Instance(kind, {"relevance_text": text}, arguments, index, metadata=(task, doc, 1))
