"""How strongly the loss of a model's answers depends on the outputs of its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.methods.plans import Tokens
from qapbench.quantize.call_tokens import UNLABELLED

from .passes import first


@dataclass(frozen=True)
class Gradient:
    """Mean |d loss / d output| of a module, over the tokens of each kind. NaN if there were none.

    Attributes:
        vision: over visual tokens.
        text: over all other tokens.
        answer: over tokens with a label.
    """

    vision: float
    text: float
    answer: float


class OutputGradients(contextlib.ExitStack):
    """Records mean |d loss / d output| of modules while its context is open.

    Args:
        model: the loaded model.
        modules: names of modules in it.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self._sums: dict[str, list[list[float]]] = {name: [[], [], []] for name in modules}
        self._masks: list[Tensor] = []
        self._leaf: list[Tensor] = []
        # The graph begins at the embeddings, because weights need no gradient.
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self.callback(embeddings.register_forward_hook(self._begin).remove)
        for name in self._sums:
            self.callback(model.get_submodule(name).register_forward_hook(self._watch(name)).remove)

    def add(self, inputs: Any, tokens: Tokens | None, labels: Tensor) -> None:
        """Run one sample forward and backward.

        Args:
            inputs: its keyword arguments, without labels.
            tokens: what is known of its tokens.
            labels: its labels.
        """
        answer = (labels != UNLABELLED).flatten()
        vision = torch.zeros_like(answer) if tokens is None else tokens.vision.flatten()
        self._masks[:] = [vision, ~vision, answer]
        with torch.enable_grad():
            loss = self.model(**inputs, labels=labels, use_cache=False).loss
            torch.autograd.grad(loss, self._leaf)  # runs the hooks without accumulating gradients in parameters

    def means(self) -> dict[str, Gradient]:
        """The gradient of each module, averaged over the tokens and channels of each sample, then over samples."""
        return {
            name: Gradient(*(sum(v) / len(v) if v else float("nan") for v in kinds))
            for name, kinds in self._sums.items()
        }

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self._leaf[:] = [output.detach().requires_grad_(True)]
        return self._leaf[0]

    def _watch(self, name: str) -> Any:
        def note(gradient: Tensor) -> None:
            size = gradient.detach().float().abs().mean(dim=-1).flatten()
            for values, mask in zip(self._sums[name], self._masks, strict=True):
                if mask.any():
                    values.append(float(size[mask.to(size.device)].mean()))

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first(output).register_hook(note)

        return hook
