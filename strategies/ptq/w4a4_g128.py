"""W4A4 in groups of 128, as QAPruner describes it."""

from dataclasses import dataclass

from qapbench import Format, UserError, ptq

from .rtn import RTN

G128 = Format(bits=4, group_size=128)


@ptq("w4a4-g128")
@dataclass(frozen=True)
class W4A4G128(RTN):
    """Round weights and activations to nearest in one format: 4 bits, asymmetric, groups of 128 channels.

    This is what the paper describes. The released code on which the paper builds does something else, which is `qvlm`.

    Source:
        QAPruner (arXiv 2604.02816), the text of the paper.
    """

    formats = (G128, G128)

    def check(self, weights: Format | None, activations: Format | None) -> None:
        super().check(weights, activations)
        for side, asked in (("weights", weights), ("activations", activations)):
            if asked not in (None, G128):
                raise UserError(f"w4a4-g128 is one format by definition: leave {side} out, or take the method rtn")
