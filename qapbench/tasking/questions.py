"""Questions of a task, each with the requests that lm-eval makes of its document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance

from qapbench.errors import UserError

from .images import BlankImage, decoded, digest_image, listed_images
from .lm import AskingLM, refuse
from .tasks import LoadedTask, quiet
from .text import literally, quote_last, quoted, special_tokens, unquoted

TAIL = 32  # characters at the end of a prompt that can affect the tokens of its continuation
STRATA = ("subject", "grade")  # fields of a document that define its stratum


@dataclass
class Question:
    """All requests that lm-eval makes of one document.

    Attributes:
        instances: the requests, one per continuation or a single one that generates.
    """

    instances: list[Instance] = field(default_factory=list)

    @property
    def first(self) -> Instance:
        """The first request."""
        return self.instances[0]

    @property
    def place(self) -> tuple[str, int]:
        """Task and number of the document, which identify a stored answer."""
        return self.first.task_name, self.first.doc_id

    @property
    def id(self) -> str:
        """The id in the data, or the document's number if it has none."""
        return str(self.first.doc.get("pid", self.first.doc_id))

    @property
    def prompt(self) -> str:
        """The prompt of the first request."""
        return self.first.args[0]

    @property
    def images(self) -> list[Any]:
        """The images, not decoded."""
        return self.first.args[2]["visual"] if len(self.first.args) > 2 else []

    @property
    def generates(self) -> bool:
        """Whether the answer is generated text. Otherwise continuations are scored."""
        return self.first.request_type == "generate_until"

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """A content hash for each image."""
        return tuple(map(digest_image, self.images))

    @property
    def relevance_text(self) -> str:
        """The text that a pruner compares an image with.

        It is the question in the task's own words, or else the whole prompt.
        """
        return self.first.doc.get("relevance_text") or unquoted(self.prompt)

    @property
    def own_words(self) -> str | None:
        """The question in the task's own words; None if the task gives none."""
        return self.first.doc.get("relevance_text") or None

    @property
    def stratum(self) -> tuple[str, ...]:
        """The stratum of a question for subsets: whether it has an image, its subject and its grade."""
        return (str(bool(self.images)), *(str(self.first.doc.get(name, "")) for name in STRATA))

    def answer(self, outputs: list[Any]) -> str:
        """The generated text, or the most likely continuation.

        Args:
            outputs: outputs of the requests.
        """
        if self.generates:
            return outputs[0]
        best = max(range(len(outputs)), key=lambda index: outputs[index][0])
        return self.instances[best].args[1].strip()


def ask(task: LoadedTask, lm: AskingLM, seed: int) -> list[Question]:
    """All questions of a task, in the order in which they are answered.

    Questions with images come first, and of these the ones with the longest prompts, so that memory peaks at the start.
    Questions on the same image follow each other, so that it is encoded once and then forgotten.

    Args:
        task: the task.
        lm: writes the prompts.
        seed: of few-shot examples.
    """
    task.task.set_fewshot_seed(seed=seed)
    with quiet():
        task.task.build_all_requests(
            limit=task.count,
            apply_chat_template=lm.templated,
            chat_template=lm.apply_chat_template,
            tokenizer_name=lm.tokenizer_name if lm.templated else "",
        )
    for request in task.task.instances:
        rest = [_with_images(part, task.blank) for part in request.args[1:]]
        request.arguments = (lm.as_prompt(request.args[0]), *rest)
    return in_order([request for request in task.task.instances for _ in range(request.repeats)])


def _with_images(part: Any, blank: bool) -> Any:
    """A part of a request's arguments, with its images as a list; a task may give a single one, or None.

    Args:
        part: the part; only one that has images is changed.
        blank: whether to put grey images in their place.
    """
    if not isinstance(part, dict) or "visual" not in part:
        return part
    images = listed_images(part["visual"])
    return {**part, "visual": [BlankImage(image) for image in images] if blank else images}


def in_order(requests: list[Instance]) -> list[Question]:
    """Group lm-eval's requests into questions, in the order that `ask` describes."""
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
    """Tokenizes continuations of prompts. No special token comes of a continuation.

    Args:
        processor: the model's processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.special = special_tokens(processor)
        self._spelled: dict[tuple[str, str], list[int]] = {}

    def spell(self, prompt: str, continuation: str) -> list[int]:
        """Token ids of a continuation of a prompt.

        A space joins the two if neither the prompt's end nor the continuation's start is a space.

        Raises:
            UserError: the tokenizer merges the continuation with the end of the prompt.
        """
        glue = "" if prompt[-1:].isspace() or continuation[:1].isspace() else " "
        tail = prompt[-TAIL:]
        key = (tail, glue + continuation)
        if key not in self._spelled:
            whole = "".join(quoted([tail, glue + continuation], self.special, fixed=len(tail)))
            before, after = (self._ids(text) for text in (tail, whole))
            if after[: len(before)] != before or len(after) == len(before):
                raise UserError(
                    f"task: the tokenizer merges {continuation!r} with the end of the prompt, so letters cannot be "
                    "scored; use `answers: generate`"
                )
            self._spelled[key] = after[len(before) :]
        return self._spelled[key]

    def _ids(self, text: str) -> list[int]:
        processor, spelled = literally(self.processor, text)
        return processor.tokenizer(spelled, add_special_tokens=False).input_ids


def processor_inputs(processor: Any, prompt: str, images: Sequence[Any]) -> dict[str, Any]:
    """The model's keyword arguments for one prompt and its images.

    The token ids are those of `apply_chat_template(tokenize=True)`: if the template writes the token that begins a
    sequence, the tokenizer adds none. Placeholders beyond the number of images are text of the question.

    Args:
        processor: the model's processor.
        prompt: text with a placeholder for each image, as `AskingLM` writes it.
        images: the images.
    """
    if prompt.count(processor.image_token) > len(images):
        prompt = quote_last(prompt, processor.image_token, len(images))
    bos = processor.tokenizer.bos_token
    options = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
    processor, prompt = literally(processor, prompt)
    pictures = [decoded(image) for image in images]
    # A nested list marks the images of one prompt: OneVision cuts an image into tiles only if its prompt has no other.
    return dict(processor(text=[prompt], images=[pictures] if pictures else None, return_tensors="pt", **options))
