"""The spec of a task. It loads no torch: whoever reads results needs it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qapbench.errors import Problem, UserError

from .strict import Strict
from .text import Data, NameOrPath

WHITE = "#ffffff"


def _colour(value: str) -> str:
    """A colour as `#rrggbb`, so that equal colours give equal runs."""
    if not re.fullmatch(r"white|#[0-9A-Fa-f]{6}", value):
        raise ValueError(f"a colour is 'white' or '#rrggbb', got {value!r}")
    return WHITE if value == "white" else value.lower()


class TaskSpec(Strict):
    """The task that is asked.

    Attributes:
        name: a task of this project, any task of lm-eval's, or the path of an lm-eval YAML file (.yaml or .yml).
        origin: `from` in a spec. "lmms-eval" looks the name up among the tasks of lmms-eval.
        include_path: folder of the user's own lm-eval YAML files, in which the name is looked up; None looks it up
            among the tasks of this project and lm-eval's.
        data: a parquet file, or a hub id; None takes the task's own data. Of a task of lmms-eval's: a folder, or a
            mapping from hub ids to folders or parquet files, where everything that the task loads is found.
        limit: number of questions, taken from the front; None asks all.
        prompt: name of a prompt that the task knows; None takes its default.
        parser: name of a parser that the task knows; None takes its default.
        answers: "letter" takes the most likely option letter from one prefill; "generate" generates text and parses it.
        metric: name of the task's metric that is its score; None takes the overall one of a task of this project, and
            the first one of any other.
        background: colour that transparent pixels of images are put on, "white" or "#rrggbb" (in quotes, since YAML
            takes what follows a # for a comment). None gives them the colour that is stored below them, as LLaVA's code
            does.
        blank_images: ask with grey images in the place of the questions' own, to see what can be answered without.
    """

    name: NameOrPath
    origin: Annotated[Literal["lmms-eval"] | None, Field(alias="from")] = None  # `from` is a word of Python's
    include_path: NameOrPath | None = None
    data: Data | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    prompt: NameOrPath | None = None
    parser: NameOrPath | None = None
    answers: Literal["letter", "generate"] = "letter"
    metric: NameOrPath | None = None
    background: Annotated[str, AfterValidator(_colour)] | None = None
    blank_images: bool = False

    @property
    def names_file(self) -> bool:
        """Whether the name is the path of a YAML file."""
        return self.name.lower().endswith((".yaml", ".yml"))

    @property
    def names_own_file(self) -> bool:
        """Whether the task is an lm-eval YAML file of the user's, named by its path or by its name in a folder."""
        return self.names_file or self.include_path is not None

    @model_validator(mode="after")
    def _found_in_one_place(self) -> TaskSpec:
        if self.names_file and self.include_path is not None:
            raise ValueError(f"`include_path` is for a task's name, and '{self.name}' is a file; leave one of them out")
        if self.origin and self.names_own_file:
            raise ValueError("`from` is for the name of a task of lmms-eval's; leave it out for a file of your own")
        if isinstance(self.data, dict) and not self.origin:
            message = "a mapping from hub ids to folders is for `from: lmms-eval`; name one file, or a hub id"
            raise UserError(Problem(message, ("data",)))
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`from` under the name that it has in a spec, and only if it is given: earlier versions had no such field."""
        fields = plain(self)
        origin = fields.pop("origin", None)
        return {**fields, "from": origin} if origin else fields
