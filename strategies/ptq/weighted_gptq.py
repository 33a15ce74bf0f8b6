"""Token-weighted GPTQ: weights are rounded for the tokens that matter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import Block, Format, Gram, UserError, metrics, min_max, ptq

from .gptq import GPTQ

ATTENTION = "attention"


@ptq("weighted_gptq")
@dataclass(frozen=True)
class WeightedGPTQ(GPTQ):
    """GPTQ that makes sum_t w_t ||(W - Q) x_t||^2 small, where w_t weighs token t.

    The importance of a sample's tokens is mapped to [1, `most`] by its minimum and maximum, and then divided by its
    mean, so that every sample counts alike. Everything else is `gptq`; with constant weights it is `gptq` itself.

    The weights are those of RSQ. VLMQ (arXiv 2508.03351) weighs tokens by gradients; its code is not public, and
    nothing here is verified against it.

    Attributes:
        importance: "attention", the attention that a token receives in its decoder layer, summed over queries and
            averaged over heads; or the name of a sensitivity metric, computed on the inputs of each linear. Outside the
            decoder there is no such attention, and all tokens weigh the same.
        most: weight of the most important token, where the least important one has 1. RSQ has 3.

    Source:
        RSQ (Sung et al., 2025); ylsung/rsq at 1a7cf31, fake_quant/input_weighting_module.py.
    """

    importance: str = ATTENTION
    most: Annotated[float, Field(ge=1)] = 3.0

    @property
    def used_metrics(self) -> tuple[str, ...]:
        return () if self.importance == ATTENTION else (self.importance,)

    def check(self, weights: Format | None, activations: Format | None) -> None:
        super().check(weights, activations)
        for name in self.used_metrics:
            if name not in metrics.names():
                known = ", ".join((ATTENTION, *metrics.names()))
                raise UserError(f"method.weighted_gptq.importance: no metric '{name}'; it is one of {known}")
            if metrics.create(name).needs:
                raise UserError(
                    f"method.weighted_gptq.importance: '{name}' looks at the language model, not at inputs alone"
                )

    def grams(self, block: Block) -> Mapping[str, Gram]:
        if self.importance == ATTENTION:
            received = block.attention_received()
            found = None if received is None else lambda sample, _: received[sample]
            return block.observe(lambda _: WeightedGram(self.most, found))
        metric = metrics.create(self.importance)
        return block.observe(lambda _: WeightedGram(self.most, lambda _, x: metric(x[None])[0]))


class WeightedGram(Gram):
    """Sum of w_t x_t x_t^T over all tokens, where the weights of each sample have the mean 1.

    Args:
        most: weight of a sample's most important token before that, where the least important one has 1.
        importance: importance [T] of the tokens x [T, in] of the sample with this index; None weighs all alike.
    """

    def __init__(self, most: float, importance: Callable[[int, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.most, self.importance = most, importance

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        if self.importance is not None:
            scores = self.importance(self.samples, x)
            x = weighted(x, 1 + (self.most - 1) * min_max(scores[None].float())[0])
        super().__call__(x, vision)


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Tokens x [T, in] times the roots of their weights [T] divided by their mean, in float32."""
    return x.float() * (weights / weights.sum() * len(weights)).sqrt().unsqueeze(1)
