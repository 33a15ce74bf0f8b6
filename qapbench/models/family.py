"""The base class `Family`: what the framework has to know about a kind of model.

Families register themselves by model type.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.registry import Entry, Registry

from .checkpoint_format import format_of
from .encoded import EncodedImages, Views
from .layers import DecoderLayers, has_linear_attention
from .outline import ImageOutline, Size

# Sizes of the random models that `Family.tiny` makes, as keywords of their configs.
TINY_TOWER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TINY_TEXT: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Family(abc.ABC):
    """Uniform access to a loaded model: its parts, its image encoder, and its conventions for inputs.

    There is one subclass per kind of model. `@family(model_type)` registers it.

    Attributes:
        model: the Hugging Face model. A family neither copies nor owns it.
        image_inputs: keywords under which the model takes images, the pixels first.
        processor_class: name of the transformers processor to load without its video processor, whose torchvision is
            not needed here; None loads what AutoProcessor finds.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    processor_class: ClassVar[str | None] = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    @abc.abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """The module of each part that a spec's `scope` can name: language, projector and vision."""

    @property
    def image_token(self) -> int:
        """Id of the placeholder token. A prompt holds one placeholder for each visual token."""
        return self.model.config.image_token_id

    def roots(self, part: str) -> list[nn.Module]:
        """The modules that a part consists of: the one in `parts`, and others if a part is in several places."""
        return [self.parts[part]]

    @property
    @abc.abstractmethod
    def available_fields(self) -> frozenset[str]:
        """Fields of `VisionTokens` that `encode_images` can record for this model.

        `QuestionReader` adds those about the question.
        """

    def check_available(self, needs: frozenset[str]) -> None:
        """Check that this model can record all fields in `needs`.

        Raises:
            UserError: a field is missing; the message names it.
        """
        if missing := needs - self.available_fields:
            raise UserError(f"model: this vision tower cannot record {', '.join(sorted(missing))}")

    @property
    def substitutes(self) -> Mapping[str, str]:
        """Fields that `encode_images` fills with a counterpart -> a sentence about it, which the receipt repeats.

        A counterpart is recorded if this kind of model has nothing of a field's exact meaning.
        """
        return {}

    @property
    def clip_width(self) -> int | None:
        """Hidden size of the vision tower if it is CLIP's, and so has a joint space with a text tower; else None."""
        return None

    @property
    def view_tokens(self) -> int | None:
        """Number of tokens per view (image or tile). None if it depends on the image."""
        return None

    @abc.abstractmethod
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and projector on the images of a call and record the fields that are needed.

        Args:
            inputs: keyword arguments of the call as the processor makes them, including an attention mask.
            needs: fields of `VisionTokens` to record in addition to `projected`.

        Raises:
            UserError: this model cannot record a field, or an input is missing.
        """

    def seen_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """What `encode_images` makes of a call, on the model's first device, wherever tower and projector are."""
        return self.encode_images(inputs, needs).to(self.model.device)

    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """Views at a lower size, through tower and projector: [B, D, Y, X] with Y * X >= count.

        A family that names `downsampled` among its `available_fields` defines it.

        Args:
            inputs: keyword arguments of the call.
            count: number of tokens that are needed of each view.
            views: B views that `encode_images` made of the call, all of one grid.
        """
        raise NotImplementedError

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """What tower and prompt hold of images of these sizes. No weight is read, so the model may be without any.

        Args:
            sizes: height and width in pixels of the images of one call.

        Raises:
            UserError: this kind of model does not define it, so its cost is not known.
        """
        raise UserError(f"model: the cost of {type(self).__name__} is not known, since it defines no `outline`")

    def outline_downsampled(self, sizes: Sequence[Size], count: int) -> ImageOutline:
        """The outline of what `downsampled` encodes.

        Args:
            sizes: height and width in pixels of the images of one call.
            count: number of tokens that are needed.

        Raises:
            UserError: this kind of model does not define it, so what that costs is not known.
        """
        raise UserError(f"model: the cost of images of {type(self).__name__} at a lower size is not known")

    def tower_layers(self, needs: frozenset[str]) -> int:
        """Number of layers of the vision tower that run when `encode_images` records the fields in `needs`."""
        return len(self.blocks("vision"))

    def attention_layer(self, field: str) -> int | None:
        """Index, among the tower's layers, of the one whose attention a field holds; its cost follows from it.

        None stands for one that attends within the longest sequences of all.

        Args:
            field: a field of `VisionTokens`.
        """
        return None

    def rows_per_token(self, name: str) -> float:
        """Number of rows that a linear gets for each token that passes its layer; its cost follows from it.

        Args:
            name: name of the linear in the model.
        """
        return 1.0

    @property
    def tower(self) -> nn.Module:
        """The vision tower with the embedding of its patches."""
        return self.parts["vision"]

    def positions(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Position ids [..., B, T] of the whole prompt if they are more than a running count (M-RoPE); else None."""
        return None

    @abc.abstractmethod
    def project(self, patches: Tensor) -> Tensor:
        """Project patches that a pruner merged, [B, M, C], into the language model's space [B, M, D]."""

    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        """Keyword arguments that hand ready features to the model in place of pixels.

        `features` has one tensor [K, W] per image, as wide as the `features` of an `EncodedImage`.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # transformers annotates `pooler_output` as one tensor, but its models put a list of tensors there.
        pooled: Any = features
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}

    @classmethod
    @abc.abstractmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """Make a random model of a few thousand weights in memory.

        Returns (model, keyword arguments of one call with an image).
        """

    @property
    def decoder(self) -> DecoderLayers:
        """The language model's layers, for pruners that work inside it.

        Raises:
            UserError: the decoder is not built as such pruners need it; the message says why.
        """
        return DecoderLayers(self.parts["language"])

    @property
    def one_by_one(self) -> bool:
        """Whether the decoder answers one prompt at a time, because a row's last bits follow from the rows beside it.

        They do in linear attention: its gates (sigmoid, softplus) and products are functions that no module holds, so
        `row_by_row` does not reach them.
        """
        return has_linear_attention(self.model.config)

    @classmethod
    def default_text_tower(cls, config: Mapping[str, Any]) -> str | None:
        """Hub id of the CLIP checkpoint whose vision tower a model took over; None if it is not known.

        Args:
            config: the model's config as in config.json.
        """
        return None

    @classmethod
    def load_processor(cls, folder: Path, trust_remote_code: bool = False) -> Any:
        """Load the processor of a checkpoint folder, for images and text only.

        Args:
            folder: the checkpoint.
            trust_remote_code: whether a processor may be defined by Python code in the folder.
        """
        from transformers import AutoProcessor

        if cls.processor_class is None:
            return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return images_only(cls.processor_class).from_pretrained(folder)

    def complete(self, processor: Any) -> None:
        """Set what older checkpoints leave out of their processor, and make its tokenizer pad on the left."""
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    @property
    def core(self) -> nn.Module:
        """The module that every call, pruned or not, passes its `input_ids` to.

        Its arguments tell which tokens are being processed.
        """
        return self.model.model

    def blocks(self, part: str) -> list[nn.Module]:
        """The layers of a part in their order of execution, each of which takes the output of the one before it.

        These are the entries of the module list with the most linears. A part without such a list is a single block.

        Args:
            part: a key of `parts`.
        """
        root = self.parts[part]
        lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
        sizes = [sum(isinstance(inner, nn.Linear) for inner in module.modules()) for module in lists]
        return list(lists[sizes.index(max(sizes))]) if any(sizes) else [root]

    def linears(self, scope: Iterable[str]) -> dict[str, nn.Linear]:
        """The linear layers of the parts in `scope`, by their name in the model."""
        roots = {id(root) for part in scope for root in self.roots(part)}
        prefixes = [name for name, module in self.model.named_modules() if id(module) in roots]
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and any(name.startswith(f"{prefix}.") for prefix in prefixes)
        }


def images_only(name: str) -> Any:
    """The transformers processor class called `name`, without its video processor, which needs torchvision."""
    import transformers

    base = getattr(transformers, name)

    def get_attributes(cls: Any) -> list[str]:
        return [attribute for attribute in base.get_attributes() if attribute != "video_processor"]

    return type(name, (base,), {"get_attributes": classmethod(get_attributes)})


def _check_family(target: Any) -> None:
    if not (isinstance(target, type) and issubclass(target, Family)):
        raise TypeError(f"a family must be a subclass of qapbench.models.Family, got {target!r}")


def _target(entry: Entry[type[Family]], params: dict[str, Any]) -> type[Family]:
    target: Any = entry.target
    return target


families: Registry[type[Family]] = Registry("family", _target, _check_family, positional=1)
"""All families, by the `model_type` in the config of their models."""
family = families.register
"""Decorator that registers a family under the `model_type` in the config of its models."""


def default_tower(config: Mapping[str, Any]) -> str | None:
    """Hub id of the CLIP checkpoint that a model took its vision tower from; None if not known.

    `config` is its config.json.
    """
    if format := format_of(config):
        return format.default_text_tower(config)
    model_type = str(config.get("model_type"))
    return family_class(model_type).default_text_tower(config) if model_type in families else None


def family_class(model_type: str) -> type[Family]:
    """The family registered for a model type.

    Raises:
        UserError: there is none; the message names those that exist.
    """
    try:
        return families.create(model_type)
    except UserError as error:
        raise UserError([problem.under("model") for problem in error.problems]) from None


def family_of(model: Any) -> Family:
    """The `Family` object of a loaded model.

    Raises:
        UserError: no family is registered for its model type; the message names those that exist.
    """
    return family_class(getattr(getattr(model, "config", None), "model_type", type(model).__name__))(model)
