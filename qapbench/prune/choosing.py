"""What selections wait for and are sent, and the choice for many prompts in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from qapbench.methods.fusing import Fusion
from qapbench.methods.measure import Measure
from qapbench.methods.pruner import Choice, Pruner
from qapbench.methods.tokens import Selection, VisionTokens
from qapbench.spec.run_spec import PruneSpec

from .prompt import Memo


class Wanted(NamedTuple):
    """A selection that a prompt waits for.

    Attributes:
        tokens: views of one image, or of several.
        keep: the budget of each view.
        memo: results for these views.
    """

    tokens: VisionTokens
    keep: int
    memo: Memo


class Chosen(NamedTuple):
    """What a prompt is sent that waits for a selection.

    Attributes:
        selection: the selection.
        relevance: the relevance that it followed; None if the pruner has none.
        sensitivity: the sensitivity that it followed; None if there is no metric.
    """

    selection: Selection
    relevance: Tensor | None
    sensitivity: Tensor | None


Steps = Generator[Wanted, Chosen, Any]
"""What one prompt is pruned in: yields what it wants, and goes on with what it is sent."""


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Chooses tokens in front of the decoder for prompts that wait, those with one budget in one call.

    Attributes:
        spec: the `prune` section.
        pruner: the method that chooses.
        sensitivity: the metric; None if the section names none.
        fusion: combines relevance and sensitivity; None stands for the registry's default.
        tower: identifies what relevance is measured by.
    """

    spec: PruneSpec
    pruner: Pruner
    sensitivity: Measure | None
    fusion: Fusion | None
    tower: Hashable

    def finish(self, prompts: Sequence[Steps]) -> list[Any]:
        """Run prompts to their ends, each to the bits of a run alone. Returns what each of them returns.

        Args:
            prompts: the steps of each prompt, not yet started.
        """
        found: dict[int, Any] = {}
        sent: dict[int, Chosen | None] = dict.fromkeys(range(len(prompts)))
        while sent:
            waiting: dict[int, Wanted] = {}
            for index, made in sent.items():
                try:
                    waiting[index] = prompts[index].send(made)  # type: ignore[arg-type]  # None starts a generator
                except StopIteration as end:
                    found[index] = end.value
            sent = dict(zip(waiting, self._chosen(list(waiting.values())), strict=True))
        return [found[index] for index in range(len(prompts))]

    def _chosen(self, wanted: Sequence[Wanted]) -> list[Chosen]:
        """The selections that prompts wait for, and the scores that they followed."""
        # Relevance depends on neither budget nor metric, sensitivity on the images alone.
        of = self.spec.method, self.tower
        relevances = _scores(of, [(one.memo.question, one.tokens) for one in wanted], self.pruner.relevance_each)
        sensitivities: list[Tensor | None] = [None] * len(wanted)
        if self.sensitivity is not None:
            shown = [(one.memo.image, one.tokens.projected) for one in wanted]
            sensitivities = _scores(("sensitivity", self.spec.sensitivity), shown, self.sensitivity.each)
        found: dict[int, Selection] = {}
        for keep in dict.fromkeys(one.keep for one in wanted):
            places = [place for place, one in enumerate(wanted) if one.keep == keep]
            choices = [Choice(wanted[at].tokens, sensitivities[at], relevances[at]) for at in places]
            found |= zip(places, self.pruner.select_each(choices, keep, self.fusion), strict=True)
        return [
            Chosen(found[place], *scores) for place, scores in enumerate(zip(relevances, sensitivities, strict=True))
        ]


Read = TypeVar("Read")


def _scores(
    key: Hashable,
    several: Sequence[tuple[dict[Hashable, Any], Read]],
    score: Callable[[list[Read]], Sequence[Tensor | None]],
) -> list[Tensor | None]:
    """The scores of several batches of views, each computed once for all that share its earlier results.

    Args:
        key: name of the scores among the results.
        several: earlier results, to which the scores are added, and what is scored.
        score: scores several in one call.
    """
    lacking = {id(known): (known, read) for known, read in several if key not in known}
    made = score([read for _, read in lacking.values()]) if lacking else []
    for (known, _), scores in zip(lacking.values(), made, strict=True):
        known[key] = scores
    return [known[key] for known, _ in several]
