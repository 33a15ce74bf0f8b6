"""Which sensitivity metric predicts the harm of leaving a token out? The summary: rank correlations, by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import rankdata

STUDY = "study.json"
BOOTSTRAP = 10_000

TARGETS = {
    "answer": "answer of the quantized model changes: KL in nats over the options",
    "error": "quantization error of the tokens that stay grows: relative error of hidden states, mean over layers",
    "full": "answer of the full-precision model changes: what is lost without any quantization",
}


class StudyRow(BaseModel):
    """One question of a study as it is stored.

    Attributes:
        scores: of every unit, by `metric NAME` or `relevance NAME`.
        effects: of leaving each unit out, by the names of TARGETS.
        changed: 1 where the quantized model then answers otherwise, else 0.
        notes: what the scores did otherwise than asked.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Annotated[Literal[1], Field(alias="schema", exclude=True)] = 1
    id: str
    scores: dict[str, list[float]]
    effects: dict[str, list[float]]
    changed: list[int]
    notes: list[str] = Field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data as it is stored."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Correlation(BaseModel):
    """Mean over questions of Spearman's rho; its 95 % interval by bootstrap over questions; n: questions with one."""

    model_config = ConfigDict(extra="forbid")

    rho: float | None
    low: float | None = None
    high: float | None = None
    n: int


class Predictor(BaseModel):
    """One score of tokens, and how it goes with each kind of harm."""

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: Literal["metric", "relevance"]
    correlations: dict[str, Correlation]


class Summary(BaseModel):
    """A study as it is written and shown.

    Attributes:
        questions: asked so far; sample: asked for; units: tokens or blocks left out, in all.
        block: side of a unit, in tokens.
        changed: share of the units without which the quantized model answers otherwise.
        targets: the kinds of harm: name -> what it is.
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
    """[M, T] Spearman's rho of scores [M, U] and harm [T, U] over units; NaN where one of them is constant."""
    ranked = [rankdata(values, axis=1) for values in (scores, harm)]
    centred = [values - values.mean(axis=1, keepdims=True) for values in ranked]
    lengths = [np.sqrt((values**2).sum(axis=1)) for values in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[0] @ centred[1].T) / np.outer(*lengths)


def summarize(rows: Sequence[StudyRow], seed: int) -> list[Predictor]:
    """The mean correlation of every score with every harm, best predictor of the answer first."""
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
    """Mean and interval of the questions that have one; each bootstrap draw is its questions' weights."""
    known = ~np.isnan(rhos)
    n = int(known.sum())
    if not n:
        return Correlation(rho=None, n=0)
    drawn = weights[:, known]
    totals = drawn.sum(axis=1)
    means = (drawn @ rhos[known])[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Correlation(rho=float(rhos[known].mean()), low=float(low), high=float(high), n=n)
