"""The stored answer to one question, and what the language model saw of its images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qapbench.receipt import ImageTokens


class Answer(BaseModel):
    """One line of answers.jsonl. It holds nothing that differs between two executions, such as times.

    Attributes:
        task, doc: lm-eval's name of the task and the number of the document.
        id: the data's own id of the question.
        answer: the text that was generated, or the continuation that is most likely.
        outputs: what lm-eval scores: `[text]`, or `[log-likelihood, is most likely]` for each continuation.
        key: hash of everything that the outputs depend on; equal keys have equal outputs.
        images: one entry per image; None for a question without any.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Annotated[Literal[1], Field(alias="schema", exclude=True)] = 1
    task: str
    doc: int
    id: str
    answer: str
    outputs: list[Any]
    key: str | None = None
    images: list[ImageTokens] | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Task and document: what an answer is found by."""
        return self.task, self.doc

    def to_json(self) -> dict[str, Any]:
        """Plain data as it is stored."""
        said = {"task": self.task, "doc": self.doc, "id": self.id, "answer": self.answer, "outputs": self.outputs}
        said |= {"key": self.key} if self.key is not None else {}
        return said | ({"images": [image.to_json() for image in self.images]} if self.images else {})


class ScoredQuestion(BaseModel):
    """One line of scored.jsonl: the question's score in every column that it belongs to, and `unparsed`."""

    model_config = ConfigDict(frozen=True)

    schema_version: Annotated[Literal[1], Field(alias="schema", exclude=True)] = 1
    id: str
    doc: int | None = None
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data as it is stored."""
        return {"id": self.id, "doc": self.doc, "metrics": self.metrics}
