"""The questions of a task: all requests that lm-eval makes of one document, in the order of the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance

from qapbench.errors import UserError

from .images import decoded, digest_image
from .lm import AskingLM, refuse
from .tasks import LoadedTask, quiet

TAIL = 32  # characters of a prompt that decide how the next token is spelled
STRATA = ("subject", "grade")


@dataclass
class Question:
    """All requests that lm-eval makes of one document."""

    instances: list[Instance] = field(default_factory=list)

    @property
    def first(self) -> Instance:
        return self.instances[0]

    @property
    def place(self) -> tuple[str, int]:
        """Task and document: what a stored answer is found by."""
        return self.first.task_name, self.first.doc_id

    @property
    def id(self) -> str:
        return str(self.first.doc.get("pid", self.first.doc_id))

    @property
    def prompt(self) -> str:
        return self.first.args[0]

    @property
    def images(self) -> list[Any]:
        return self.first.args[2]["visual"] if len(self.first.args) > 2 else []

    @property
    def generates(self) -> bool:
        return self.first.request_type == "generate_until"

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """A content hash of each image."""
        return tuple(map(digest_image, self.images))

    @property
    def relevance_text(self) -> str:
        """What the pruner compares an image with: the task's own wording of the question, else the whole prompt."""
        return self.first.doc.get("relevance_text") or self.prompt

    @property
    def stratum(self) -> tuple[str, ...]:
        """What a subset has to represent: whether there is an image, and what the data say of subject and grade."""
        return (str(bool(self.images)), *(str(self.first.doc.get(name, "")) for name in STRATA))

    def answer(self, outputs: list[Any]) -> str:
        """The text that was generated, or the continuation that is most likely."""
        if self.generates:
            return outputs[0]
        best = max(range(len(outputs)), key=lambda index: outputs[index][0])
        return self.instances[best].args[1].strip()


def ask(task: LoadedTask, lm: AskingLM, seed: int) -> list[Question]:
    """Every question of a task, in the order in which they are answered.

    Images first, and those with the longest prompt first, so that memory peaks at the start; questions on the same
    image follow each other, so that it is seen once and then forgotten.
    """
    task.task.set_fewshot_seed(seed=seed)
    with quiet():
        task.task.build_all_requests(
            limit=task.count,
            apply_chat_template=lm.templated,
            chat_template=lm.apply_chat_template,
            tokenizer_name=lm.tokenizer_name if lm.templated else "",
        )
    return in_order([request for request in task.task.instances for _ in range(request.repeats)])


def in_order(requests: list[Instance]) -> list[Question]:
    """lm-eval's requests by question, ordered as `ask` says."""
    refuse(requests)
    grouped: dict[tuple[str, int], Question] = {}
    for request in requests:
        grouped.setdefault((request.task_name, request.doc_id), Question()).instances.append(request)
    questions = list(grouped.values())
    longest: dict[tuple[str, ...], int] = {}
    for question in questions:
        longest[question.pictures] = max(longest.get(question.pictures, 0), len(question.prompt))
    return sorted(
        questions,
        key=lambda q: (-len(q.images), -longest[q.pictures], q.pictures, -len(q.prompt), q.place),
    )


class ContinuationTokenizer:
    """How a tokenizer spells continuations behind a prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._spelled: dict[tuple[str, str], list[int]] = {}

    def spell(self, prompt: str, continuation: str) -> list[int]:
        """Token ids of a continuation behind a prompt; a space joins them where neither side has one."""
        glue = "" if prompt[-1:].isspace() or continuation[:1].isspace() else " "
        tail = prompt[-TAIL:]
        key = (tail, glue + continuation)
        if key not in self._spelled:
            before = self.tokenizer(tail, add_special_tokens=False).input_ids
            after = self.tokenizer(tail + glue + continuation, add_special_tokens=False).input_ids
            if after[: len(before)] != before or len(after) == len(before):
                raise UserError(
                    f"task: the tokenizer merges {continuation!r} with the end of the prompt, so letters cannot be "
                    "scored; use `answers: generate`"
                )
            self._spelled[key] = after[len(before) :]
        return self._spelled[key]


def processor_inputs(processor: Any, prompt: str, images: Sequence[Any]) -> dict[str, Any]:
    """A model's keyword arguments for one prompt and its images, as every question is put to it.

    Without an image to stand for, the placeholder's spelling is the question's own text.
    """
    if not images:
        mark = processor.image_token
        prompt = prompt.replace(mark, f"< {mark[1:]}")
    pictures = [decoded(image) for image in images]
    # As the images of one prompt: OneVision cuts tiles of an image that is alone, and of no others.
    return dict(processor(text=[prompt], images=[pictures] if pictures else None, return_tensors="pt"))
