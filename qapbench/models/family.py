"""What the framework has to know about a model: where its visual tokens, towers and linears are."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from qapbench.errors import UserError, nearest
from qapbench.tokens import VisionTokens

_families: dict[str, type[Family]] = {}


class Family(abc.ABC):
    """One loaded model, seen through its family.

    Attributes:
        model: the Hugging Face model, not owned.
        image_input: the keyword under which the model takes pixels.
    """

    image_input: ClassVar[str] = "pixel_values"

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    @abc.abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """The module of each scope: language, projector, vision."""

    @property
    @abc.abstractmethod
    def image_token(self) -> int:
        """Id of the placeholder that stands for one visual token."""

    @property
    @abc.abstractmethod
    def offers(self) -> frozenset[str]:
        """Fields of VisionTokens that `see` can record for this model; those about the question come from
        `QuestionReader`."""

    @abc.abstractmethod
    def see(self, pixels: Tensor, needs: frozenset[str]) -> VisionTokens:
        """Run the vision tower and the projector on a batch of images, and record what is needed.

        Args:
            pixels: one image a row, as the processor makes them.
            needs: fields of VisionTokens to record beyond `projected`.
        """

    @abc.abstractmethod
    def project(self, patches: Tensor) -> Tensor:
        """[B, M, C] merged patches into the language model's space [B, M, D]."""

    @abc.abstractmethod
    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        """Keywords that hand ready features, one [K, D] an image, to the model in place of pixels."""

    @classmethod
    def default_text_tower(cls, config: Mapping[str, Any]) -> str | None:
        """Hub id of the CLIP checkpoint whose vision tower models of this config (as in JSON) took over."""
        return None

    def complete(self, processor: Any) -> None:
        """Fill in what older checkpoints leave out of their processor, and pad on the left."""
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    @property
    def core(self) -> nn.Module:
        """The module that takes `input_ids` in every call, pruned or not: what it is given says which tokens run."""
        return self.model.model

    def blocks(self, part: str) -> list[nn.Module]:
        """The layers of a part, each of which takes what the one before answers; the part itself where it has none."""
        root = self.parts[part]
        lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
        sizes = [sum(isinstance(inner, nn.Linear) for inner in module.modules()) for module in lists]
        return list(lists[sizes.index(max(sizes))]) if any(sizes) else [root]

    def linears(self, scope: Iterable[str]) -> dict[str, nn.Linear]:
        """The linears of those parts, by their name in the model."""
        roots = {id(self.parts[part]) for part in scope}
        prefixes = [name for name, module in self.model.named_modules() if id(module) in roots]
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and any(name.startswith(f"{prefix}.") for prefix in prefixes)
        }


def family(model_type: str) -> Callable[[type[Family]], type[Family]]:
    """Decorator: this class serves models whose config says `model_type`."""

    def decorate(cls: type[Family]) -> type[Family]:
        _families[model_type] = cls
        return cls

    return decorate


def default_tower(config: Mapping[str, Any]) -> str | None:
    """The default text tower of a checkpoint, by its config.json."""
    cls = _families.get(str(config.get("model_type")))
    return cls.default_text_tower(config) if cls else None


def family_of(model: Any) -> Family:
    """The model seen through its family; a UserError names the families that there are."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in _families:
        raise UserError(f"model: no family for model type '{model_type}'; {nearest(model_type, _families)}")
    return _families[model_type](model)
