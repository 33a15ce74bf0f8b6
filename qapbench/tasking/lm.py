"""Our model as lm-eval sees it: its chat template, and answers that were made before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from qapbench.errors import UserError
from qapbench.records.answer import Answer

MARK = "<image>"  # lm-eval's own, whatever the model's placeholder is


class AskingLM(LM):
    """What lm-eval needs of a model to write its prompts, and to score answers that are there.

    lm-eval's evaluator is driven twice: its requests are gathered once for all runs that ask the same, and for each
    run its scoring reads the stored answers through this class.

    Args:
        answers: of one run.
        docs: where only some documents are asked, their numbers, ascending; lm-eval counts these anew.
    """

    MULTIMODAL = True

    def __init__(
        self, processor: Any, name: str = "", answers: Iterable[Answer] = (), docs: list[int] | None = None
    ) -> None:
        super().__init__()
        self.processor = processor
        self.name = name
        self.outputs = {answer.place: answer.outputs for answer in answers}
        self.docs = docs

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    @property
    def templated(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The processor's own template; images go in as its image items."""
        messages = [{"role": turn["role"], "content": content_items(turn["content"])} for turn in chat_history]
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """[log-likelihood, is greedy] of each continuation."""
        return [tuple(output) for output in self._stored(requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Decoded continuations, cut at the task's stop strings."""
        return self._stored(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError  # `refuse` told the user before anything was asked

    def _stored(self, requests: list[Instance]) -> list[Any]:
        taken: dict[tuple[str, int], int] = {}
        found = []
        for request in requests:
            doc = request.doc_id if self.docs is None else self.docs[request.doc_id]
            place = (request.task_name, doc)
            found.append(self.outputs[place][taken.get(place, 0)])
            taken[place] = taken.get(place, 0) + 1
        return found


def refuse(requests: Iterable[Instance]) -> None:
    """Raise UserError for a kind of request that is not answered here."""
    if any(request.request_type == "loglikelihood_rolling" for request in requests):
        raise UserError("task: perplexity tasks (loglikelihood_rolling) are not supported")


def content_items(text: str) -> list[dict[str, str]]:
    """A message's items; lm-eval marks each image by `<image>` where it stands in the text."""
    items: list[dict[str, str]] = []
    for index, part in enumerate(text.split(MARK)):
        items += [{"type": "image"}] if index else []
        part = part.removeprefix("\n") if index else part
        items += [{"type": "text", "text": part}] if part else []
    return items
