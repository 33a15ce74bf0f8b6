"""What the framework has to know about a model: where its visual tokens, towers and linears are."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qapbench.errors import UserError, nearest

from .layers import DecoderLayers
from .layouts import layout_of
from .views import Seen

_families: dict[str, type[Family]] = {}

# Parts of `tiny` models, as keywords of their configs.
TINY_TOWER: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TINY_TEXT: Mapping[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Family(abc.ABC):
    """One loaded model, seen through its family.

    Attributes:
        model: the Hugging Face model, not owned.
        image_inputs: the keywords under which the model takes images, the pixels first.
        processor_class: name of the transformers processor, where AutoProcessor would want what we do not need (a
            video processor and its torchvision).
        stand_ins: fields that `look` fills with a natural counterpart of what they mean -> what stands there. The
            receipt repeats it.
        clip_width: width of the vision tower, where it is a CLIP's and so has a joint space with text; else None.
        view_tokens: tokens of a view; None where it depends on the image.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    processor_class: ClassVar[str | None] = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    @abc.abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """The module of each scope: language, projector, vision."""

    @property
    def image_token(self) -> int:
        """Id of the placeholder that stands for one visual token."""
        return self.model.config.image_token_id

    @property
    @abc.abstractmethod
    def offers(self) -> frozenset[str]:
        """Fields of VisionTokens that `see` can record for this model; those about the question come from
        `QuestionReader`."""

    def check_offered(self, needs: frozenset[str]) -> None:
        """Raise UserError where this model does not offer one of these fields."""
        if missing := needs - self.offers:
            raise UserError(f"model: this vision tower cannot record {', '.join(sorted(missing))}")

    @property
    def stand_ins(self) -> Mapping[str, str]:
        return {}

    @property
    def clip_width(self) -> int | None:
        return None

    @property
    def view_tokens(self) -> int | None:
        return None

    @abc.abstractmethod
    def look(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> Seen:
        """Run the vision tower and the projector on the images of a call, and record what is needed.

        Args:
            inputs: the call's keywords, as the processor makes them; a mask is among them.
            needs: fields of VisionTokens to record beyond `projected`.
        """

    def positions(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """[..., B, T] position ids of the whole prompt, where they are more than a running count; else None."""
        return None

    @abc.abstractmethod
    def project(self, patches: Tensor) -> Tensor:
        """[B, M, C] merged patches into the language model's space [B, M, D]."""

    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        """Keywords that hand ready features, one [K, D] an image, to the model in place of pixels."""
        # Annotated as one tensor upstream, but the models fill it with a list of tensors.
        pooled: Any = features
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}

    @classmethod
    @abc.abstractmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random model of a few thousand weights and one call's inputs with an image, made in memory."""

    @property
    def decoder(self) -> DecoderLayers:
        """The language model's layers, for pruners inside it; a UserError says why where they cannot be had."""
        return DecoderLayers(self.parts["language"])

    @classmethod
    def default_text_tower(cls, config: Mapping[str, Any]) -> str | None:
        """Hub id of the CLIP checkpoint whose vision tower models of this config (as in JSON) took over."""
        return None

    @classmethod
    def load_processor(cls, folder: Path, trust_remote_code: bool = False) -> Any:
        """The processor of a checkpoint folder, for images and text only."""
        from transformers import AutoProcessor

        if cls.processor_class is None:
            return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return images_only(cls.processor_class).from_pretrained(folder)

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


def images_only(name: str) -> Any:
    """The transformers processor of that name without its video processor, which needs torchvision."""
    import transformers

    base = getattr(transformers, name)

    def get_attributes(cls: Any) -> list[str]:
        return [attribute for attribute in base.get_attributes() if attribute != "video_processor"]

    return type(name, (base,), {"get_attributes": classmethod(get_attributes)})


def family(model_type: str) -> Callable[[type[Family]], type[Family]]:
    """Decorator: this class serves models whose config says `model_type`."""

    def decorate(cls: type[Family]) -> type[Family]:
        _families[model_type] = cls
        return cls

    return decorate


def default_tower(config: Mapping[str, Any]) -> str | None:
    """The default text tower of a checkpoint, by its config.json."""
    if layout := layout_of(config):
        return layout.default_text_tower(config)
    cls = _families.get(str(config.get("model_type")))
    return cls.default_text_tower(config) if cls else None


def families() -> dict[str, type[Family]]:
    """All families, by the model type of their configs."""
    return dict(sorted(_families.items()))


def family_class(model_type: str) -> type[Family]:
    """The family of a model type; a UserError names the families that there are."""
    if model_type not in _families:
        raise UserError(f"model: no family for model type '{model_type}'; {nearest(model_type, _families)}")
    return _families[model_type]


def family_of(model: Any) -> Family:
    """The model seen through its family.

    Raises:
        UserError: there is none; it names those that there are.
    """
    return family_class(getattr(getattr(model, "config", None), "model_type", type(model).__name__))(model)
