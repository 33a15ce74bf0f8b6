"""The joint image-text space of CLIP, in which patches of an image are compared with the question."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qapbench.checkpoints.find import find_checkpoint
from qapbench.checkpoints.json_files import why_not_loaded
from qapbench.errors import UserError
from qapbench.hashing import state_of_tree
from qapbench.memory import give_back_freed
from qapbench.methods.tokens import VisionTokens

from .relevance_sign import WITHOUT_TOWER, TowerSign, tower_sign
from .row_products import row_by_row
from .streaming import streaming
from .unread import Postponed, narrow, read_all

BESIDE = "clip"  # folder of the companion CLIP inside a model's own folder
PADDED = 8  # lengths to which texts are padded are multiples of this, so that many texts have the same length
TOGETHER = 32  # texts that go through the tower side by side
KNOWN = 2**14  # texts whose embeddings are kept


class Kept(Protocol):
    """Embeddings of texts that are kept somewhere."""

    def of(self, texts: list[str]) -> dict[str, Tensor]:
        """Those of some texts that are there: text -> [1, M, P]."""

    def keep(self, made: Mapping[str, Tensor]) -> None:
        """Add the embeddings of texts."""


class TextTower:
    """The text tower of a CLIP checkpoint and the two projections into its joint image-text space.

    A LLaVA checkpoint holds a vision tower, but neither the text tower nor the projections. They come from a second
    checkpoint, the companion CLIP, whose vision encoder is dropped after loading.

    Args:
        folder: checkpoint folder that `CLIPModel.from_pretrained` can load (safetensors), with its tokenizer.
        vision_width: hidden size of the model's vision tower, which the joint space must fit.
        device: where to put the modules.
        narrowly: on a CPU, hold matrices in 16 bits where the checkpoint does; they are computed with in float32 all
            the same.

    Raises:
        UserError: the checkpoint cannot be loaded, or its width is a different one.

    Attributes:
        sign: sign of the similarity in the joint space that counts as relevance.
        known: texts that were embedded before -> their embeddings.
    """

    def __init__(
        self, folder: str | Path, vision_width: int, device: torch.device | str = "cpu", narrowly: bool = False
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        def load(postponed: Postponed | None) -> Any:
            with streaming(postponed):
                clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            return clip.eval().requires_grad_(False)

        postponed = Postponed(torch.float32, torch.device("cpu"))
        try:
            clip = load(postponed)
            if not postponed.settle(clip, (module for module in clip.modules() if isinstance(module, nn.Linear))):
                clip = load(None)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError: no common base
            raise why_not_loaded(Path(folder), error, "text_tower", "a CLIP checkpoint") from error
        width = clip.config.vision_config.hidden_size
        if width != vision_width:
            raise UserError(
                f"text_tower: '{folder}' belongs to a vision tower of width {width}, the model's has {vision_width}"
            )
        self.device = torch.device(device)
        self.text: nn.Module = clip.text_model  # the layers of the vision encoder are never read
        if narrowly and self.device.type == "cpu":
            narrow(self.text, in_files_too=True)
            give_back_freed()
        else:
            read_all(self.text)
            self.text.to(device)
        self.text_projection: nn.Module = clip.text_projection.to(device)
        self.visual_norm: nn.Module = clip.vision_model.post_layernorm.to(device)
        self.visual_projection: nn.Module = clip.visual_projection.to(device)
        self.length: int = clip.config.text_config.max_position_embeddings
        self.sign: TowerSign = tower_sign(Path(folder))
        self.known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def embed_patches(self, patches: Tensor) -> Tensor:
        """Project patches [B, N, C] into the joint space [B, N, P], in float32.

        Post-layernorm and visual projection are applied as in CDPruner.
        """
        return self.visual_projection(self.visual_norm(patches.float()))

    def embed_text(self, text: str) -> Tensor:
        """Embed one text in the joint space: [1, M, P] in float32, in M segments that together hold all of it.

        As in CDPruner's code nothing is truncated: the token ids are cut into segments of the context length, the last
        of which is padded with zeros. Only the last segment holds the end token at which CLIP pools; the others are
        pooled at their first token.
        """
        return self.known[text] if text in self.known else self.embed_texts([text])[0]

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], kept: Kept | None = None) -> list[Tensor]:
        """Embed several texts, each as `embed_text` does and to the same bits.

        Args:
            texts: the texts.
            kept: embeddings on disk, to which new ones are added; None if there are none.

        Texts that were embedded before are not computed again. Padding behind the last token is cut to what is left of
        a multiple of PADDED tokens: attention is causal, so no padding reaches the token that is pooled.
        """
        if len(self.known) > KNOWN:
            self.known.clear()
        if kept is not None:
            found = kept.of([text for text in dict.fromkeys(texts) if text not in self.known])
            self.known |= {text: value.to(self.device) for text, value in found.items()}
        rows: dict[int, list[tuple[str, int, Tensor]]] = defaultdict(list)
        for text in dict.fromkeys(texts):
            if text not in self.known:
                for index, row in enumerate(self._segments(text)):
                    rows[len(row)].append((text, index, row))
        made: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for alike in rows.values():
            for at in range(0, len(alike), TOGETHER):
                some = alike[at : at + TOGETHER]
                for (text, index, _), embedded in zip(some, self._embed([row for *_, row in some]), strict=True):
                    made[text][index] = embedded
        for text, parts in made.items():
            self.known[text] = torch.stack([parts[index] for index in sorted(parts)]).unsqueeze(0)
        if kept is not None:
            kept.keep({text: self.known[text] for text in made})
        return [self.known[text] for text in texts]

    def _segments(self, text: str) -> list[Tensor]:
        """Token ids of a text, cut and padded."""
        # Without `split_special_tokens`, an end token that the question spells would move the place that is pooled.
        options = {"truncation": False, "verbose": False, "split_special_tokens": True}
        ids = self.tokenizer(text, return_tensors="pt", **options).input_ids[0]
        *full, last = ids.split(self.length)
        padding = min(-len(last) % PADDED, self.length - len(last))
        return [*full, torch.nn.functional.pad(last, (0, padding))]

    def _embed(self, segments: list[Tensor]) -> Tensor:
        """The embeddings [S, P] of S segments of equal length. None depends on the others."""
        modules = [*self.text.modules(), *self.text_projection.modules()]
        with row_by_row(modules, len(segments)):
            out = self.text(input_ids=torch.stack(segments).to(self.device))
            return self.text_projection(out.pooler_output.unsqueeze(1)).squeeze(1)


def find_tower(
    named: str | None, model_folder: str, default: str | None, fetch: bool = True
) -> tuple[Path | None, str]:
    """Find the companion CLIP of a model.

    The first of these is taken: the checkpoint named; the folder `clip/` in the model's own folder; the hub checkpoint
    whose vision tower the model took over. If there is none, relevance falls back on the language model's embeddings.

    Args:
        named: folder, hub id or embedded name that the spec or the caller names; None if neither does.
        model_folder: the model's own folder; "" if it has none.
        default: hub id of the checkpoint that the vision tower came from; None if it is not known.
        fetch: whether a hub id may be downloaded.

    Returns:
        (folder of the companion CLIP, ""), or (None, the reason why there is none).

    Raises:
        UserError: `named` is given and cannot be found, or `clip/` is there and is no checkpoint.
    """
    if named:
        return find_checkpoint(named, "text_tower", fetch).folder, ""
    if model_folder and (Path(model_folder) / BESIDE).is_dir():
        return find_checkpoint(str(Path(model_folder) / BESIDE), "text_tower").folder, ""
    if default is None:
        return None, "no CLIP text tower is known for this model"
    return _default_tower(default, fetch)


@functools.lru_cache(maxsize=64)
def _default_tower(default: str, fetch: bool) -> tuple[Path | None, str]:
    """The result of `find_tower` for a hub id. An unreachable hub is asked once per process."""
    try:
        return find_checkpoint(default, "text_tower", fetch).folder, ""
    except UserError as error:
        return None, str(error)


def load_tower(folder: Path, vision_width: int, device: torch.device, narrowly: bool = False) -> TextTower:
    """Load a text tower; the arguments are those of `TextTower`.

    A process that asks for the same tower again gets the same object, unless its files changed (the latest two are
    kept).
    """
    return _loaded_tower(folder, state_of_tree(folder), vision_width, device, narrowly)


@functools.lru_cache(maxsize=2)
def _loaded_tower(folder: Path, state: object, vision_width: int, device: torch.device, narrowly: bool) -> TextTower:
    return TextTower(folder, vision_width, device, narrowly)


class QuestionReader:
    """Computes the fields of `VisionTokens` that concern the question.

    With a text tower, image and question are embedded in its joint space. Without one, both come from the language
    model: the projected tokens, and the mean embedding of the question's tokens.

    Args:
        needs: fields that the pruner reads; those outside FIELDS are ignored.
        tower: the text tower; None if there is none.
        embed: the language model's embedding: token ids [L] -> [L, D].
    """

    FIELDS = frozenset({"image_embeds", "text_embeds", "prompt_embeds"})

    def __init__(self, needs: frozenset[str], tower: TextTower | None, embed: Callable[[Tensor], Tensor]) -> None:
        self.needs = needs & self.FIELDS
        self.tower = tower
        self.embed = embed

    @property
    def visual(self) -> frozenset[str]:
        """Fields that the model must record so that `fields` can be computed."""
        return frozenset({"patches"}) if self.tower and "image_embeds" in self.needs else frozenset()

    @property
    def sign(self) -> TowerSign:
        """The sign of the similarity between image and question that counts as relevance."""
        return WITHOUT_TOWER if self.tower is None else self.tower.sign

    @property
    def needs_text(self) -> bool:
        """Whether the question is needed as text, and not only as token ids."""
        return self.tower is not None and "text_embeds" in self.needs

    @property
    def needs_words(self) -> bool:
        """Whether a question given as text is needed as token ids of the language model."""
        return "prompt_embeds" in self.needs or (self.tower is None and "text_embeds" in self.needs)

    def of_image(self, image: VisionTokens, known: dict[Hashable, Any]) -> dict[str, Tensor]:
        """The fields that are needed and that follow from the image alone.

        Args:
            image: the image's tokens, one row for each of its B views.
            known: earlier results for this image, to which new ones are added.
        """
        if "image_embeds" not in self.needs:
            return {}
        tower = self.tower
        if tower is None:
            return {"image_embeds": image.projected}
        patches = image.require("patches", "the text tower")
        return {"image_embeds": memoized(known, ("image_embeds", id(tower)), lambda: tower.embed_patches(patches))}

    def of_question(
        self,
        image: VisionTokens,
        text: str | None,
        prompt: Callable[[], Tensor],
        given: Tensor | None,
        known: dict[Hashable, Any],
    ) -> dict[str, Tensor]:
        """The fields that are needed and that follow from the question.

        Args:
            image: the image's tokens, one row for each of its B views.
            text: the question, for the text tower.
            prompt: makes [L] token ids of the prompt without placeholders, padding and answer.
            given: [L] token ids of a question that is to take the place of the prompt; None takes the prompt.
            known: earlier results for this image and question, to which new ones are added.

        Raises:
            UserError: the text tower needs the question and `text` is None.
        """
        tower, found = self.tower, dict[str, Tensor]()
        if self.needs_words:
            if given is None:
                words = memoized(known, "prompt_embeds", lambda: self.embed(prompt()).unsqueeze(0))
            else:
                words = self.embed(given).unsqueeze(0)
            found["prompt_embeds"] = words = words.to(image.projected.device)
            if tower is None:
                found["text_embeds"] = words.mean(dim=1, keepdim=True)
        if tower is not None and "text_embeds" in self.needs:
            if text is None:
                raise UserError("relevance needs the question: pass `relevance_text=`, or `compress` a processor")
            found["text_embeds"] = tower.embed_text(text)
        return {name: value.expand(image.batch, -1, -1) for name, value in found.items() if name in self.needs}


def memoized(memo: dict[Hashable, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """The value stored in `memo` under `key`, computed with `make` and stored if it is missing."""
    if key not in memo:
        memo[key] = make()
    return memo[key]
