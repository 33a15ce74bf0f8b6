"""The model that lm-eval is given. It writes prompts with a chat template, and returns answers that were stored."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from qapbench.errors import UserError
from qapbench.records.answer import Answer

from .text import quoted, special_tokens

MARK = "<image>"  # lm-eval's mark of an image in a text, independent of the model's placeholder


class AskingLM(LM):
    """lm-eval's model interface, without a model behind it.

    lm-eval is used twice: it writes the requests once for all runs that ask the same, and it scores the stored answers
    of each run, which it reads through this class.

    Args:
        processor: the model's processor.
        name: name of the model, for lm-eval's cache of requests.
        answers: stored answers of one run.
        docs: numbers of the documents that are asked, ascending, if these are not all. lm-eval numbers them from 0.
        images: whether the task has images. Otherwise `<image>` is text like any other.
    """

    MULTIMODAL = True

    def __init__(
        self,
        processor: Any,
        name: str = "",
        answers: Iterable[Answer] = (),
        docs: list[int] | None = None,
        images: bool = True,
    ) -> None:
        super().__init__()
        self.processor = processor
        self.name = name
        self.outputs = {answer.place: answer.outputs for answer in answers}
        self.docs = docs
        self.images = images

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer as lm-eval wants it, without slashes."""
        return self.name.replace("/", "__")

    @property
    def templated(self) -> bool:
        """Whether the processor has a chat template."""
        return bool(getattr(self.processor, "chat_template", None))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as a prompt, by the processor's template. Images become its image items."""
        messages = [
            {"role": turn["role"], "content": content_items(turn["content"], self.special, self.images)}
            for turn in chat_history
        ]
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def special(self) -> frozenset[str]:
        """The spellings that must not come of a text."""
        return special_tokens(self.processor)

    def as_prompt(self, context: str) -> str:
        """A context of lm-eval's as a prompt. Without a chat template it is text, whose marks become placeholders."""
        if self.templated:
            return context
        parts = context.split(MARK) if self.images else [context]
        return str(self.processor.image_token).join(quoted(parts, self.special))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The stored (log-likelihood, is greedy) of each continuation."""
        return [tuple(output) for output in self._stored(requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The stored texts, which end at the task's stop strings."""
        return self._stored(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not supported."""
        raise NotImplementedError  # `refuse` raises before any question is asked

    def _stored(self, requests: list[Instance]) -> list[Any]:
        """The stored output of each request. Requests of one document take its outputs in order."""
        taken: dict[tuple[str, int], int] = {}
        found = []
        for request in requests:
            doc = request.doc_id if self.docs is None else self.docs[request.doc_id]
            place = (request.task_name, doc)
            found.append(self.outputs[place][taken.get(place, 0)])
            taken[place] = taken.get(place, 0) + 1
        return found


def refuse(requests: Iterable[Instance]) -> None:
    """Check that all requests are of a kind that can be answered.

    Raises:
        UserError: some are not.
    """
    if any(request.request_type == "loglikelihood_rolling" for request in requests):
        raise UserError("task: tasks that roll over a whole text (loglikelihood_rolling) are not supported")


def content_items(text: str, special: Iterable[str] = (), images: bool = True) -> list[dict[str, str]]:
    """The items of a message: its texts, and an image item at each place that lm-eval marks by `<image>`.

    Args:
        text: the message.
        special: spellings of special tokens, which are marked as text where the texts spell them.
        images: whether `<image>` is a mark. Otherwise the message is a single text.
    """
    items: list[dict[str, str]] = []
    first, *rest = text.split(MARK) if images else [text]
    for index, part in enumerate(quoted([first, *(part.removeprefix("\n") for part in rest)], special)):
        items += [{"type": "image"}] if index else []
        items += [{"type": "text", "text": part}] if part else []
    return items
