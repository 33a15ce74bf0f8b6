"""The loss of calibration samples, for methods that learn from what the whole language model answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qapbench.quantize.call_tokens import UNLABELLED

from .blocks import Block
from .capturing import Reached, catching
from .passes import Pass
from .runner import Calibration
from .spill import Spill


class AnswerLoss:
    """The loss of each sample, as a function of what linears of the language model hold and are given.

    It is the mean cross-entropy of the labelled tokens, from logits in float32. A sample without labels, and a model of
    no known family, has the mean squared difference from the output in full precision over the mean square of that.
    The calls of the language model are captured once, so that images are encoded once.

    Args:
        calibration: the model and its samples. The model is in full precision now.
        linears: linears of the language model, by their name in the model.
    """

    def __init__(self, calibration: Calibration, linears: Mapping[str, nn.Linear]) -> None:
        model, family = calibration.model, calibration.family
        module: nn.Module = model if family is None else family.parts["language"]
        name = next(name for name, inner in model.named_modules() if inner is module)
        self._block = Block(name, module, linears, [], spill=Spill())
        self._labels: list[Tensor | None] = []
        self._head: nn.Module | None = None if family is None else model.get_output_embeddings()  # type: ignore[operator]
        for sample in calibration.source.samples:
            with contextlib.suppress(Reached), catching([module], module, self._block.spill) as caught:
                inputs, tokens, labels = calibration.inputs(sample)
                calibration.forward(inputs)
            self._block.passes.append(replace(caught[0][0], tokens=tokens))
            told = self._head is not None and labels is not None and bool((labels[:, 1:] != UNLABELLED).any())
            self._labels.append(labels if told else None)
        plain = (None if told is not None else self._block.run(one) for one, told in self._told())
        self._plain = [None if output is None else self._block.spill.keep(output) for output in plain]

    def _told(self) -> list[tuple[Pass, Tensor | None]]:
        """Each call with its labels."""
        return list(zip(self._block.passes, self._labels, strict=True))

    def __len__(self) -> int:
        return len(self._labels)

    def __call__(
        self,
        index: int,
        weights: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Loss of one sample. Gradients flow if they are enabled; the other arguments are those of `Block.forward`."""
        output = self._block.forward(self._block.passes[index], weights, inputs)
        labels, plain = self._labels[index], self._plain[index]
        if plain is not None or labels is None or self._head is None:
            wanted = output if plain is None else plain.to(output.device)
            return self._block.off(index, output, wanted).mean() / wanted.float().square().mean()
        following = labels[:, 1:].to(output.device)
        told = following != UNLABELLED
        return cross_entropy(self._head(output[:, :-1][told]).float(), following[told])
