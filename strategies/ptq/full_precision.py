"""What blocks would give in full precision, for methods that learn to come near it."""

from torch import Tensor

from qapbench import Block


class FullPrecision:
    """Follows a calibration block by block, and keeps the latest block's outputs in full precision.

    The first block of a list of layers starts from its own inputs, every later one from these outputs.
    """

    def __init__(self) -> None:
        self._layers = ""  # list of layers of the latest block
        self._outputs: list[Tensor] = []

    def outputs(self, block: Block) -> list[Tensor]:
        """Outputs of a block for each pass, kept in host memory. Blocks are given in the order of a forward pass."""
        layers = block.name.rpartition(".")[0]
        follows = self._layers == layers and len(self._outputs) == len(block.passes)
        passes = block.passes
        if follows:
            passes = [one.fed(x) for one, x in zip(block.passes, self._outputs, strict=True)]
        plain = Block(block.name, block.module, block.linears, passes, block.current, block.spill)
        self._layers, self._outputs = layers, [output.to("cpu") for output in plain.outputs()]
        return self._outputs
