"""The base class of pruners: normalises and fuses scores, enforces the budget, and checks what was chosen."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qapbench.errors import UserError

from .fusing import Fusion, fusions
from .scores import check_budget, check_scores, joined, min_max
from .tokens import RelevanceSign, Selection, VisionTokens, all_finite


class Choice(NamedTuple):
    """What tokens are chosen from, and by what.

    Attributes:
        tokens: a batch of images.
        sensitivity: [B, N] from a metric, on any scale; None chooses by relevance alone.
        relevance: result of `Pruner.relevance(tokens)`, if it was computed before.
    """

    tokens: VisionTokens
    sensitivity: Tensor | None = None
    relevance: Tensor | None = None


class Pruner(abc.ABC):
    """A method that chooses visual tokens.

    Subclasses define how relevant each token is and how tokens are chosen. This class normalises and fuses the scores
    and enforces the budget. Subclasses are frozen dataclasses whose fields are the parameters that a spec can set.

    Attributes:
        needs: fields of `VisionTokens` that the method reads in addition to `projected`.
        optional: those of `needs` that may be missing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()

    @property
    def relevance_sign(self) -> RelevanceSign | None:
        """Sign of the similarity between token and question that counts as relevance.

        A method that measures such a similarity has a parameter of this name, and gives it to
        `VisionTokens.relevance_of`. None for any other method.
        """
        return None

    @property
    def front(self) -> Pruner | None:
        """The method that chooses in front of the decoder: this one. None if tokens are dropped only inside it."""
        return self

    @property
    def front_needs(self) -> frozenset[str]:
        """Fields of `VisionTokens` that are read in front of the decoder."""
        return self.front.needs if self.front else frozenset()

    def entering(self, count: int, keep: int) -> int:
        """Number of a view's tokens that enter the decoder.

        Args:
            count: tokens of the view.
            keep: its budget, at most `count`.
        """
        return keep

    def relevance(self, tokens: VisionTokens) -> Tensor | None:
        """Semantic relevance [B, N] on any scale, higher means keep. None if the method has no such score."""
        return None

    def relevance_each(self, several: Sequence[VisionTokens]) -> Sequence[Tensor | None]:
        """The relevance of several batches of images, for each of them what `relevance` gives.

        A method may override this to work on all of them at the same time. No bit may depend on the others.

        Args:
            several: the batches. Their sizes may differ.
        """
        return [self.relevance(tokens) for tokens in several]

    @abc.abstractmethod
    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        """Choose `keep` tokens per image.

        Args:
            tokens: a batch of images.
            scores: [B, N] from `scores`, not negative.
            keep: kept and merged tokens per image, with 1 <= keep < N.
        """

    def choose_each(self, scored: Sequence[tuple[VisionTokens, Tensor]], keep: int) -> list[Selection]:
        """Choose for several batches of images, for each of them what `choose` does.

        A method may override this to work on all of them at the same time. What is chosen for one must not depend on
        the others, to the last bit.

        Args:
            scored: (tokens, scores) as `choose` gets them. Their sizes may differ.
            keep: kept and merged tokens per image.
        """
        return [self.choose(tokens, scores, keep) for tokens, scores in scored]

    def select(
        self,
        tokens: VisionTokens,
        keep: int,
        sensitivity: Tensor | None = None,
        fusion: Fusion | None = None,
        relevance: Tensor | None = None,
    ) -> Selection:
        """Normalise and fuse the scores, choose tokens, and check the result.

        Args:
            tokens: a batch of images.
            keep: tokens per image that the language model will see, kept and merged ones together.
            sensitivity: [B, N] from a metric, on any scale; None chooses by relevance alone.
            fusion: combines relevance and sensitivity; None stands for the registry's default.
            relevance: result of `relevance(tokens)`, if it was computed before.

        Raises:
            UserError: the budget is out of range, a field is missing, or scores are not finite.
            RuntimeError: the method returned an invalid selection.
        """
        return self.select_each([Choice(tokens, sensitivity, relevance)], keep, fusion)[0]

    def select_each(self, choices: Sequence[Choice], keep: int, fusion: Fusion | None = None) -> list[Selection]:
        """Do for each of several choices what `select` does.

        Args:
            choices: what is chosen from.
            keep: as `select`.
            fusion: as `select`.

        Raises:
            UserError: as `select`.
            RuntimeError: as `select`.
        """
        required = sorted(self.needs - self.optional)
        for one in choices:
            check_budget(keep, one.tokens.count)
            for name in required:
                one.tokens.require(name, type(self).__name__)
        fewer = [one for one in choices if keep < one.tokens.count]
        scored = list(zip((one.tokens for one in fewer), self._scores_each(fewer, fusion), strict=True))
        found = self.choose_each(scored, keep) if scored else []
        together = joined([one.indices for one in found])
        ordered: Sequence[Tensor | None] = [None] * len(found)
        if together is not None:
            ordered = together.sort(dim=-1).values.split(len(together) // len(found))
        chosen = iter(zip(found, ordered, strict=True))
        return [
            Selection.everything(one.tokens)
            if keep == one.tokens.count
            else self._checked(*next(chosen), one.tokens, keep)
            for one in choices
        ]

    def scores(
        self, tokens: VisionTokens, sensitivity: Tensor | None, fusion: Fusion | None, relevance: Tensor | None = None
    ) -> Tensor:
        """The scores [B, N] that `choose` gets: relevance fused with sensitivity.

        Both are normalised to (0, 1] per image first. If only one of them is given, it is the score; if neither is, all
        scores are 1. The arguments are those of `select`.
        """
        return self._scores_each([Choice(tokens, sensitivity, relevance)], fusion)[0]

    def _scores_each(self, choices: Sequence[Choice], fusion: Fusion | None) -> list[Tensor]:
        """What `scores` gives for each of several choices."""
        relevances = [self.relevance(one.tokens) if one.relevance is None else one.relevance for one in choices]
        semantic = _normalised("relevance", choices, relevances)
        sensitive = _normalised("sensitivity", choices, [one.sensitivity for one in choices])
        fuse = fusion or fusions.create(fusions.default)
        if getattr(fuse, "batched", False):
            every, each = joined(semantic), joined(sensitive)
            if every is not None and each is not None:
                fused = fuse(every, each)
                if fused.shape == every.shape and all_finite(fused) and float(fused.amin()) >= 0:
                    return list(fused.split(len(fused) // len(choices)))
        found: list[Tensor] = []
        for one, relevance, sensitivity in zip(choices, semantic, sensitive, strict=True):
            if relevance is None or sensitivity is None:
                only, shown = sensitivity if relevance is None else relevance, one.tokens.projected
                every = shown.new_ones(shown.shape[:2], dtype=torch.float32) if only is None else only
                found.append(every)
                continue
            fused = fuse(relevance, sensitivity)
            check_scores(fused, one.tokens.projected, "fusion: scores")
            if float(fused.amin()) < 0:
                raise UserError("fusion: scores must not be negative")
            found.append(fused)
        return found

    def _checked(self, chosen: Selection, indices: Tensor | None, tokens: VisionTokens, keep: int) -> Selection:
        """A selection with its indices sorted, or a RuntimeError that names the method and its mistake.

        Args:
            chosen: the selection.
            indices: its indices, sorted; None if they are not sorted yet.
            tokens: what was chosen from.
            keep: how many tokens were asked for.
        """
        indices = chosen.indices.sort(dim=-1).values if indices is None else indices
        method = type(self).__name__
        if chosen.budget != keep or indices.shape[0] != tokens.batch:
            raise RuntimeError(f"{method} kept {chosen.budget} tokens where {keep} were asked for")
        rows = indices.tolist()  # sorted
        if any(row and (row[0] < 0 or row[-1] >= tokens.count) for row in rows):
            raise RuntimeError(f"{method} chose a token outside 0..{tokens.count - 1}")
        if any(len(set(row)) < len(row) for row in rows):
            raise RuntimeError(f"{method} chose a token twice")
        if chosen.updated is not None:
            if chosen.updated.shape[:2] != indices.shape:
                got, wanted = tuple(chosen.updated.shape[:2]), tuple(indices.shape)
                raise RuntimeError(f"{method} updated {got} tokens where it kept {wanted}")
            if not torch.equal(indices, chosen.indices):
                raise RuntimeError(f"{method} updated tokens that are not in ascending order")
        if chosen.made is not None and (chosen.updated is None or chosen.made.shape != indices.shape):
            raise RuntimeError(f"{method} says where it made tokens, but not which")
        return dataclasses.replace(chosen, indices=indices)


def _normalised(name: str, choices: Sequence[Choice], values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The scores of several choices, each checked and normalised per image; those of one size in one call.

    Args:
        name: what the scores are, for messages.
        choices: the choices.
        values: for each of them its scores [B, N]; None where there are none.
    """
    together = joined(values)
    sizes = [one.tokens.projected.shape[:2] for one in choices]
    sized = sizes == [None if value is None else value.shape for value in values]
    if together is not None and sized and together.is_floating_point() and all_finite(together):
        return list(min_max(together.float()).split(len(together) // len(values)))
    found: list[Tensor | None] = []
    for one, value in zip(choices, values, strict=True):
        if value is not None:
            check_scores(value, one.tokens.projected, name)
        found.append(None if value is None else min_max(value.float()))
    return found
