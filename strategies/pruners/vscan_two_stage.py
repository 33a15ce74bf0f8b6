"""The pruner VScan with both of its stages, in front of the decoder and inside it."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from qapbench import Fraction, Pruner, pruner

from .vscan import VScan
from .vscan_decoder import VScanDecoder


@pruner("vscan_two_stage")
@dataclass(frozen=True)
class VScanTwoStage(VScanDecoder):
    """VScan as it was published: `vscan` shortens the prompt, and `vscan_decoder` drops tokens in the decoder's middle.

    `entry` * keep tokens of an image enter the decoder, rounded to the nearest, at most all of them. `keep` of them are
    left behind half of the layers. The merged tokens of the first stage are what the second one chooses among.
    Sensitivity enters at both stages: on the projected tokens, and on the hidden states.

    What differs from the released code is what differs in `vscan` and in `vscan_decoder`: exact budgets in the first
    stage, and tokens that keep their positions of the shortened prompt in the second one.

    Attributes:
        depth: fraction of the decoder's layers in front of the second stage. The release has 16 of 32 for LLaVA-1.5.
        entry: tokens that enter the decoder, as a multiple of `keep`. The release has 96 for 32.
        window: side of a window of the first stage; see `vscan`.
        local: share of local tokens in the first stage; see `vscan`.

    Source:
        VScan (arXiv 2505.22654); released code Tencent/SelfEvolvingAgent at a82450e, folder VScan.
    """

    entry: Annotated[float, Field(ge=1)] = 3.0
    window: Annotated[int, Field(ge=1)] = 6
    local: Fraction = 0.5

    @property
    def front(self) -> Pruner:
        return VScan(window=self.window, local=self.local)

    def entering(self, count: int, keep: int) -> int:
        return min(round(keep * self.entry), count)
