"""Lines of a run's files: the answer to one question, and its scores."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qapbench.receipt import ImageTokens


def _scorable(outputs: list[Any]) -> list[Any]:
    """The outputs, if lm-eval can score them."""
    for output in outputs:
        pair = isinstance(output, list | tuple) and [type(value) for value in output] == [float, bool]
        if not pair and not isinstance(output, str):
            raise ValueError("an output is a text, or a pair of a log-likelihood and whether it is the most likely one")
    return outputs


class Answer(BaseModel):
    """One line of answers.jsonl. It holds nothing that differs between two executions, such as times.

    Attributes:
        task: lm-eval's name of the task.
        doc: number of the document.
        id: the question's id in the data.
        answer: the generated text, or the most likely continuation.
        outputs: what lm-eval scores: `[text]`, or `[log-likelihood, is most likely]` for each continuation.
        key: hash of everything that the outputs depend on; equal keys have equal outputs.
        images: token counts of each image; None for a question without an image.
        positions: number of positions that the prompt needs, if the model's decoder has fewer; else None.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    schema_version: Annotated[Literal[1], Field(alias="schema", exclude=True)] = 1
    task: str
    doc: Annotated[int, Field(ge=0)]
    id: str
    answer: str
    outputs: Annotated[list[Any], AfterValidator(_scorable)]
    key: str | None = None
    images: list[ImageTokens] | None = None
    positions: Annotated[int, Field(gt=0)] | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Task and number of the document, which identify an answer."""
        return self.task, self.doc

    def to_json(self) -> dict[str, Any]:
        """The answer as plain data, as it is stored."""
        said = {"task": self.task, "doc": self.doc, "id": self.id, "answer": self.answer, "outputs": self.outputs}
        said |= {"key": self.key} if self.key is not None else {}
        said |= {"positions": self.positions} if self.positions is not None else {}
        return said | ({"images": [image.to_json() for image in self.images]} if self.images else {})


class ScoredQuestion(BaseModel):
    """One line of scored.jsonl.

    Attributes:
        id: the question's id in the data.
        doc: number of the document.
        metrics: the question's score in every column that it belongs to, and `unparsed`.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    schema_version: Annotated[Literal[1], Field(alias="schema", exclude=True)] = 1
    id: str
    doc: int | None = None
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The scores as plain data, as they are stored."""
        return {"id": self.id, "doc": self.doc, "metrics": self.metrics}
