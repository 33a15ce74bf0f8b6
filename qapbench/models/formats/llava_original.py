"""LLaVA v1.3 and v1.5 in the original layout of their authors (liuhaotian/llava-...): one Llama and a projector.

The vision tower is a separate checkpoint, named by `mm_vision_tower`. Weights are renamed in memory. The result is a
`LlavaForConditionalGeneration` of the family `llava`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.checkpoints.find import find_checkpoint
from qapbench.errors import Problem, UserError
from qapbench.models.checkpoint_format import CheckpointFormat, checkpoint_format
from qapbench.models.relevance import BESIDE
from qapbench.models.streaming import Weights

IMAGE, START, END = "<image>", "<im_start>", "<im_end>"
TYPES = ("llava", "llava_llama")  # values of `model_type`
# Patterns of weight names -> the name in transformers. The first pattern that matches applies.
RENAMED = (
    (r"^model\.mm_projector\.(?:0\.)?(weight|bias)$", r"model.multi_modal_projector.linear_1.\1"),
    (r"^model\.mm_projector\.2\.(weight|bias)$", r"model.multi_modal_projector.linear_2.\1"),
    (r"^model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", "model.vision_tower."),
    (r"^model\.(?!vision_tower\.|multi_modal_projector\.)", "model.language_model."),
)
# Buffers that transformers computes itself.
DERIVED = re.compile(r"rotary_emb\.inv_freq$|position_ids$")
# The system prompts llava_v1 (models with a linear projector) and vicuna_v1 (LLaVA-1.5) differ in one word: {0}.
SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the {0}'s questions. "
)
TURNS = (
    "{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}ASSISTANT: {{% else %}}USER: {{% endif %}}"
    "{{% for c in m['content'] if c['type'] == 'image' %}}{image}\n{{% endfor %}}"
    "{{% for c in m['content'] if c['type'] == 'text' %}}{{{{ c['text'] }}}}{{% endfor %}}"
    "{{% if m['role'] == 'assistant' %}}{{{{ eos_token or '</s>' }}}}{{% else %}} {{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
)


class LinearProjector(nn.Module):
    """Projector of LLaVA v1.3: a single linear layer from width `inward` to width `outward`."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inward, outward)

    def forward(self, image_features: Tensor) -> Tensor:
        """Project image features [..., inward] -> [..., outward]."""
        return self.linear_1(image_features)


@checkpoint_format("llava-original")
class OriginalLlava(CheckpointFormat):
    """The original layout of LLaVA's authors.

    Its vision tower is looked for in three places: a folder of the name in `mm_vision_tower`, the folder `clip/` in the
    checkpoint's own folder, and the hub.
    """

    @staticmethod
    def matches(config: Mapping[str, Any]) -> bool:
        """Whether the config names a vision tower in `mm_vision_tower`."""
        return "mm_vision_tower" in config

    @staticmethod
    def default_text_tower(config: Mapping[str, Any]) -> str | None:
        """The checkpoint in `mm_vision_tower`, whose text tower belongs to its vision tower."""
        named = config.get("mm_vision_tower")
        return named if isinstance(named, str) else None

    def companion(self, fetch: bool = True) -> Path:
        """Folder of the CLIP checkpoint with the vision tower.

        Args:
            fetch: whether it may be downloaded.

        Raises:
            UserError: it cannot be found.
        """
        named = str(self.config["mm_vision_tower"])
        for folder in (self.folder / named, self.folder / BESIDE):
            if folder.is_dir():
                named = str(folder)
                break
        return find_checkpoint(named, "model.mm_vision_tower", fetch).folder

    def load(self, dtype: str) -> tuple[Any, Any]:
        """Load the checkpoint as a model of the family `llava`.

        Args:
            dtype: name of a torch dtype, such as "bfloat16".

        Returns:
            (model, processor).

        Raises:
            UserError: this variant of LLaVA is not supported, the vision tower cannot be found, or weights do not fit.
        """
        self._check()
        tower = self.companion()
        from transformers import AutoTokenizer, CLIPVisionModel

        precision = getattr(torch, dtype)
        vision: Any = CLIPVisionModel.from_pretrained(tower, dtype=precision, use_safetensors=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, use_fast=True)
        weights = {f"model.vision_tower.{name}": value for name, value in vision.state_dict().items()}
        weights |= self._weights(precision)
        image_token = self._image_token(tokenizer, weights)
        model = self._model(vision.config, weights, image_token, precision)
        return model, self._processor(tower, vision.config, tokenizer)

    def empty(self, dtype: str) -> Any:
        """The model without weights, from the configs of the checkpoint and of its vision tower, and the tokenizer.

        Raises:
            UserError: this variant of LLaVA is not supported, or the vision tower is not on this machine.
        """
        self._check()
        from transformers import AutoTokenizer, CLIPVisionConfig

        image_token = self._image_token(AutoTokenizer.from_pretrained(self.folder, use_fast=True), {})
        vision = CLIPVisionConfig.from_pretrained(self.companion(fetch=False))
        words = max(int(self.config["vocab_size"]), image_token + 1)
        with torch.device("meta"):
            return self._unfilled(vision, words, image_token, getattr(torch, dtype))

    def _check(self) -> None:
        """Raise a UserError for variants that would load as something different from what they are."""
        config = self.config
        refusals = {
            f"model_type '{config.get('model_type')}'": config.get("model_type") not in TYPES,
            f"mm_projector_type '{self._projector}'": self._projector not in ("linear", "mlp2x_gelu"),
            "a resampler": bool(config.get("mm_resampler_type")),
            "the CLS token among the features": config.get("mm_vision_select_feature", "patch") != "patch",
            "image tiles (LLaVA-NeXT; use the checkpoint in Hugging Face layout, llava-hf/llava-v1.6-...)": "anyres"
            in str(config.get("image_aspect_ratio"))
            or str(config.get("mm_patch_merge_type", "flat")) != "flat",
        }
        if found := [what for what, wrong in refusals.items() if wrong]:
            raise UserError(Problem(f"a LLaVA in the original layout with {found[0]} is not supported", ("model",)))

    @property
    def _projector(self) -> str:
        """Type of the projector."""
        return self.config.get("mm_projector_type") or "linear"

    def _weights(self, precision: torch.dtype) -> dict[str, Tensor]:
        """The weights of all shards, under their names in transformers."""
        found = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            with Weights(shard) as file:
                for name in file.keys():  # noqa: SIM118  (the file is no dict)
                    if not DERIVED.search(name):
                        found[renamed(name)] = file.get_tensor(name).to(precision)
        return found

    def _image_token(self, tokenizer: Any, weights: dict[str, Tensor]) -> int:
        """Id of the placeholder token, which the original layout lacks.

        If the embeddings and the head end before that id, rows of zeros are added. `_model` tells `generate` to
        suppress the token.
        """
        if IMAGE not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
        token = int(tokenizer.convert_tokens_to_ids(IMAGE))
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in weights and (short := token + 1 - len(weights[name])) > 0:
                weights[name] = torch.cat([weights[name], weights[name].new_zeros(short, weights[name].shape[1])])
        return token

    def _unfilled(self, vision: Any, words: int, image_token: int, precision: torch.dtype) -> Any:
        """Build the model, with weights that are not initialised.

        Args:
            vision: config of the vision tower.
            words: rows of the embeddings.
            image_token: id of the placeholder token.
            precision: dtype of the weights.
        """
        from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
        from transformers.initialization import no_init_weights

        own = {k: v for k, v in self.config.items() if not k.startswith(("mm_", "model_type", "architectures"))}
        text = LlamaConfig.from_dict({**own, "vocab_size": words, "dtype": precision})
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_token,
            vision_feature_layer=self.config.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="default",
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            tie_word_embeddings=bool(self.config.get("tie_word_embeddings", False)),
        )
        config.mm_vision_tower = self.config["mm_vision_tower"]  # default checkpoint of the text tower
        before = torch.get_default_dtype()
        torch.set_default_dtype(precision)
        try:
            with no_init_weights():
                model: Any = LlavaForConditionalGeneration(config)
                if self._projector == "linear":
                    model.model.multi_modal_projector = LinearProjector(vision.hidden_size, text.hidden_size)
        finally:
            torch.set_default_dtype(before)
        return model

    def _model(self, vision: Any, weights: dict[str, Tensor], image_token: int, precision: torch.dtype) -> Any:
        """Build the model around the weights, without initialising or copying them."""
        from transformers import GenerationConfig

        words = len(weights["model.language_model.embed_tokens.weight"])
        model = self._unfilled(vision, words, image_token, precision)
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        if model.config.tie_word_embeddings:
            model.tie_weights()
            missing = [name for name in missing if name != "lm_head.weight"]
        if missing or unexpected:
            what = f"lack {sorted(missing)[0]}" if missing else f"hold {sorted(unexpected)[0]}, which has no place"
            raise UserError(Problem(f"the weights in {self.folder} {what}", ("model",)))
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        model.generation_config.suppress_tokens = [image_token]
        model.name_or_path = model.config._name_or_path = str(self.folder)
        return model

    def _processor(self, tower: Path, vision: Any, tokenizer: Any) -> Any:
        """Make the processor: image transform, tokenizer and chat template of the training code."""
        from transformers import CLIPImageProcessorPil, LlavaProcessor
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        clip = CLIPImageProcessorPil.from_pretrained(tower).to_dict()
        pad = self.config.get("image_aspect_ratio") == "pad"
        # "pad" fills the image up to a square with the mean colour before scaling; otherwise its middle is cut out.
        images = (LlavaImageProcessorPil if pad else CLIPImageProcessorPil).from_dict({**clip, "do_pad": pad})
        image = f"{START}{IMAGE}{END}" if self.config.get("mm_use_im_start_end") else IMAGE
        who = "human" if self._projector == "linear" else "user"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=IMAGE,
            chat_template=SYSTEM.format(who) + TURNS.format(image=image),
        )


def renamed(name: str) -> str:
    """Name in transformers of a weight that is called `name` in the original layout."""
    for pattern, new in RENAMED:
        after, count = re.subn(pattern, new, name)
        if count:
            return after
    return name
