"""The summary of a sensitivity study: rank correlations between scores of tokens and the effect of leaving them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.stats import rankdata

STUDY = "study.json"
BOOTSTRAP = 10_000  # resamples

TARGETS = {
    "answer": "answer of the quantized model changes: KL in nats over the options",
    "error": "quantization error of the tokens that stay grows: relative error of hidden states, mean over layers",
    "full": "answer of the full-precision model changes: what is lost without any quantization",
}


class StudyRow(BaseModel):
    """One question of a study, as it is stored.

    Attributes:
        id: the question's id in the data.
        scores: `metric NAME` or `relevance NAME` -> score of every unit.
        effects: name of a target (see TARGETS) -> effect of leaving each unit out.
        changed: for each unit, 1 if the quantized model answers otherwise without it, else 0.
        notes: what was done otherwise than asked when the scores were computed.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Annotated[Literal[1], Field(alias="schema", exclude=True)] = 1
    id: str
    scores: dict[str, list[float]]
    effects: dict[str, list[float]]
    changed: list[int]
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_value_per_unit(self) -> StudyRow:
        values = [*self.scores.values(), *self.effects.values()]
        if self.effects.keys() != TARGETS.keys() or any(len(given) != len(self.changed) for given in values):
            raise ValueError("scores and effects have one value per unit")
        return self

    def to_json(self) -> dict[str, Any]:
        """The row as plain data, as it is stored."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Correlation(BaseModel):
    """Spearman's rank correlation, averaged over questions.

    Attributes:
        rho: the mean; None if no question has a correlation.
        low: lower end of its 95 % interval, by bootstrap over questions.
        high: upper end of that interval.
        n: number of questions that have a correlation. Where scores or effects are constant, there is none.
    """

    model_config = ConfigDict(extra="forbid")

    rho: float | None
    low: float | None = None
    high: float | None = None
    n: int


class Predictor(BaseModel):
    """A score of tokens, and its correlation with each effect of leaving tokens out.

    Attributes:
        name: name of the sensitivity metric or of the pruner.
        kind: "metric", or "relevance" for a pruner's.
        correlations: name of a target (see TARGETS) -> correlation.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: Literal["metric", "relevance"]
    correlations: dict[str, Correlation]


class Summary(BaseModel):
    """A study, as it is written to its file and shown.

    Attributes:
        id: hash of the study.
        name: name of the studied run.
        created: time in ISO 8601, UTC.
        model: the model as its spec names it.
        task: name of the task.
        quantization: the quantization in words.
        spec: the studied run as plain data.
        questions: number of questions that were asked.
        sample: number of questions that were asked for.
        units: number of omissions over all questions.
        block: side of a unit, in tokens.
        changed: share of the units without which the quantized model answers otherwise.
        targets: name of each effect -> its meaning.
        predictors: the scores, best predictor of the answer's change first.
        fingerprints: content hashes of what the study read.
        environment: machine and library versions.
        timing: seconds of the last session, and the number of questions that it asked.
        notes: what a reader of the numbers has to know.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    study: Literal["sensitivity"] = "sensitivity"
    id: str
    name: str
    created: str
    model: str
    task: str
    quantization: str
    spec: dict[str, Any]
    questions: int
    sample: int
    units: int
    block: int
    changed: float
    targets: dict[str, str]
    predictors: list[Predictor]
    fingerprints: dict[str, str]
    environment: dict[str, Any]
    timing: dict[str, float]
    notes: list[str]


def spearman(scores: np.ndarray, harm: np.ndarray) -> np.ndarray:
    """Spearman's rho [M, T] over units; NaN where a row is constant.

    Args:
        scores: [M, U] scores of the units.
        harm: [T, U] effects of leaving the units out.
    """
    ranked = [rankdata(values, axis=1) for values in (scores, harm)]
    centred = [values - values.mean(axis=1, keepdims=True) for values in ranked]
    lengths = [np.sqrt((values**2).sum(axis=1)) for values in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[0] @ centred[1].T) / np.outer(*lengths)


def summarize(rows: Sequence[StudyRow], seed: int) -> list[Predictor]:
    """The mean correlation of every score with every effect, best predictor of the answer's change first.

    Args:
        rows: the questions, which all have the same scores.
        seed: of the bootstrap.
    """
    names = list(rows[0].scores)
    rhos = np.stack(
        [
            spearman(np.array([row.scores[n] for n in names]), np.array([row.effects[t] for t in TARGETS]))
            for row in rows
        ]
    )  # [questions, M, T]
    draws = np.random.default_rng(seed).integers(len(rows), size=(BOOTSTRAP, len(rows)))
    weights = np.stack([np.bincount(draw, minlength=len(rows)) for draw in draws]).astype(float)
    found = []
    for place, name in enumerate(names):
        kind, _, label = name.partition(" ")
        correlations = {t: _correlation(rhos[:, place, i], weights) for i, t in enumerate(TARGETS)}
        found.append(Predictor.model_validate({"name": label, "kind": kind, "correlations": correlations}))
    return sorted(found, key=_strength, reverse=True)


def _strength(predictor: Predictor) -> float:
    rho = predictor.correlations["answer"].rho
    return -math.inf if rho is None else rho


def _correlation(rhos: np.ndarray, weights: np.ndarray) -> Correlation:
    """Mean and interval of the correlations, over the questions that have one.

    Args:
        rhos: [questions] correlations, NaN for a question without one.
        weights: [BOOTSTRAP, questions] how often each resample draws each question.
    """
    known = ~np.isnan(rhos)
    n = int(known.sum())
    if not n:
        return Correlation(rho=None, n=0)
    drawn = weights[:, known]
    totals = drawn.sum(axis=1)
    means = (drawn @ rhos[known])[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Correlation(rho=float(rhos[known].mean()), low=float(low), high=float(high), n=n)
