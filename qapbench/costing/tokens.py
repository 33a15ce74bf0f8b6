"""How many tokens each layer of the decoder receives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qapbench.methods.decoder_pruner import DecoderPruner, Stage
from qapbench.methods.pruner import Pruner
from qapbench.models.outline import ImageOutline
from qapbench.prune.splice import budgets, schedules
from qapbench.prune.stages import layer_counts, scheduled, stage_budgets
from qapbench.spec.run_spec import PruneSpec


@dataclass(frozen=True)
class ViewFlow:
    """The visual tokens of one view (an image, or a tile of one) on their way through the decoder.

    Attributes:
        count: tokens before pruning.
        keep: the view's budget.
        entered: tokens that enter the decoder.
        grid: (height, width) of the tokens, if they form a grid.
        last: tokens of images, separators included, up to the view's last one.
        stages: index of the first layer after a drop inside the decoder -> tokens that the drop leaves.
    """

    count: int
    keep: int
    entered: int
    grid: tuple[int, int] | None
    last: int
    stages: dict[int, int]


@dataclass(frozen=True)
class MeasuredTokens:
    """What was measured of the visual tokens of a prompt, in the place of what a spec plans.

    Attributes:
        available: tokens before pruning, without separators.
        layers: tokens that each layer of the decoder received, without separators; one number if all received the same.
        separators: tokens that the model added itself and that the decoder received.
    """

    available: float
    layers: tuple[float, ...]
    separators: float = 0.0


@dataclass(frozen=True)
class TokenFlow:
    """The visual tokens of a prompt.

    Attributes:
        views: the views of its images.
        layers: tokens that each layer receives, all views together, without separators.
        separators: tokens that the model adds itself (new lines) and that the first layer receives.
    """

    views: tuple[ViewFlow, ...]
    layers: tuple[float, ...]
    separators: float = 0.0

    @property
    def available(self) -> int:
        """Tokens before pruning, without separators."""
        return sum(view.count for view in self.views)

    def columns(self, text: int) -> tuple[float, ...]:
        """All tokens that each layer receives.

        Args:
            text: number of text tokens of the prompt.
        """
        return tuple(count + self.separators + text for count in self.layers)


def token_flow(
    outline: ImageOutline, spec: PruneSpec | None, pruner: Pruner | None, depth: int, most: int | None = None
) -> TokenFlow:
    """The tokens of images under a pruner.

    A pruner is asked how many tokens enter the decoder and, if it works inside the decoder, for its stages. Of the
    separators as many stay as there are kept tokens to have them, which is most if kept tokens gather in few lines.

    Args:
        outline: the images.
        spec: the `prune` section; None keeps all tokens.
        pruner: the pruner that it names.
        depth: number of the decoder's layers.
        most: tokens of a view; None if that depends on the image.

    Raises:
        UserError: the budget of a view is larger than the view.
    """
    encoded = outline.encoded
    listed = encoded.views
    if spec is None:
        keeps: Sequence[Sequence[int]] = [[views.tokens.count] * views.tokens.batch for views in listed]
        drops: Sequence[Sequence[tuple[Stage, ...]]] = [[()] * views.tokens.batch for views in listed]
    else:
        keeps, drops = budgets(encoded, spec, most), schedules(encoded, spec, most)
    begins = [0, *itertools.accumulate(len(image.features) for image in encoded.images)]
    flows = []
    for views, own, steps in zip(listed, keeps, drops, strict=True):
        count = views.tokens.count
        for keep, said, owner, places in zip(own, steps, views.owners, views.places, strict=True):
            entered = pruner.entering(count, keep) if pruner else count
            stages: dict[int, int] = {}
            if isinstance(pruner, DecoderPruner):
                stages = scheduled(said, entered, depth) if said else stage_budgets(pruner, entered, keep, depth)
            last = begins[owner] + int(places[-1]) + 1
            flows.append(ViewFlow(count, keep, entered, views.tokens.grid, last, stages))
    each = [layer_counts(view.stages, view.entered, depth) for view in flows]
    layers = tuple(float(sum(counts)) for counts in zip(*each, strict=True)) if flows else (0.0,) * depth
    separators = sum(0 if image.separators is None else int(image.separators.sum()) for image in encoded.images)
    if pruner and pruner.front and flows:
        separators = min(separators, int(layers[0]))
    return TokenFlow(tuple(flows), layers, float(separators))
