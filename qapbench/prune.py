"""Pruning around a model's own `forward` and `generate`: see, select, shorten the prompt, hand over."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .decoder import DecoderPruning
from .errors import UserError
from .models import Family
from .models.relevance import QuestionReader, recalled
from .models.views import Seen, Views
from .passage import portions
from .receipt import Receipt
from .shown import Memo, Shown
from .spec import PruneSpec
from .splice import Part, budgets, detached, gather_columns, image_columns, kept_columns, splice
from .strategy import DecoderPruner, Metric, Pruner, fusions
from .tokens import Selection, VisionTokens

# Inputs as long as the prompt, beyond ids, mask and positions, and what pads them; the loss skips -100.
PER_TOKEN = {"labels": -100, "mm_token_type_ids": 0, "token_type_ids": 0}
VIDEO = "pixel_values_videos"


@dataclasses.dataclass
class PrunedCalls:
    """Wraps the two entry points of a model.

    A prompt with N placeholders an image becomes an ordinary prompt with `keep` of them, and the kept features go
    in by the model's own door. Caches, masks and decoding then need no change.
    """

    family: Family
    spec: PruneSpec
    pruner: Pruner
    sensitivity: Metric | None
    reader: QuestionReader
    receipt: Receipt
    processor: Any = None

    def __post_init__(self) -> None:
        fusion = self.spec.fusion
        self.fusion = fusions.create(fusion.name, **fusion.params) if fusion else None
        self.decoder: DecoderPruning | None = None
        if isinstance(self.pruner, DecoderPruner):
            self.decoder = DecoderPruning(self.family.decoder, self.pruner, self.sensitivity, self.fusion, self.receipt)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Shadow `forward` and `generate` on the instance; deleting the shadows restores the class's own."""
        model = self.family.model
        held = {name: model.__dict__[name] for name in ("forward", "generate") if name in model.__dict__}
        model.forward = self._wrap_forward(model.forward)
        model.generate = self._wrap_generate(model.generate)
        try:
            with self.decoder.installed() if self.decoder else contextlib.nullcontext():
                yield
        finally:
            for name in ("forward", "generate"):
                if name in held:
                    setattr(model, name, held[name])
                else:
                    delattr(model, name)

    def _wrap_forward(self, forward: Any) -> Any:
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def pruned(*args: Any, relevance_text: list[str] | None = None, **kwargs: Any) -> Any:
            if args:
                kwargs = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
            if not self._has_images(kwargs):
                return forward(**kwargs)
            with self.shortened(kwargs, relevance_text) as short:
                return forward(**short)

        return pruned

    def _wrap_generate(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def pruned(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            relevance_text = kwargs.pop("relevance_text", None)
            if inputs is not None:
                kwargs["input_ids"] = inputs
            if not self._has_images(kwargs):
                return generate(None, *args, **kwargs)
            prompt = kwargs["input_ids"]
            with self.shortened(kwargs, relevance_text) as short:
                removed = prompt.shape[1] - short["input_ids"].shape[1]
                if short.get("max_length") is not None:  # counts the prompt, which got shorter
                    short["max_length"] -= removed
                output = generate(None, *args, **short)
            return _with_prompt(output, prompt, short["input_ids"].shape[1])

        return pruned

    def _has_images(self, kwargs: dict[str, Any]) -> bool:
        if kwargs.get(VIDEO) is not None:
            raise UserError(f"{VIDEO}: videos cannot be pruned, only images")
        return kwargs.get(self.family.image_inputs[0]) is not None

    @property
    def needs(self) -> frozenset[str]:
        """What the model must record of an image."""
        return (self.pruner.needs & self.family.offers) | self.reader.visual

    def shorten(self, kwargs: dict[str, Any], relevance_text: list[str] | None = None) -> dict[str, Any]:
        """The call's keywords as `shortened` has them, for calibration.

        Raises:
            UserError: the pruner works inside the decoder, whose blocks calibration runs one by one.
        """
        if self.decoder:
            raise UserError(
                f"quantize.calibration.pruned: {self.spec.method} drops tokens inside the decoder, so its calibration "
                "cannot be pruned; set pruned: false"
            )
        with self.shortened(kwargs, relevance_text) as short:
            return short

    @contextlib.contextmanager
    def shortened(self, kwargs: dict[str, Any], relevance_text: list[str] | None) -> Iterator[dict[str, Any]]:
        """The call's keywords with pruned placeholders gone and chosen features in place of pixels.

        A pruner inside the decoder takes nothing out of the prompt; while the context is open it waits for it there.
        """
        if kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None:
            raise UserError("pruning needs input_ids with image placeholders; inputs_embeds cannot be pruned")
        if kwargs.get("past_key_values") is not None:
            raise UserError("pruning starts at the prompt: call without past_key_values")
        if kwargs.get("attention_mask") is None:
            kwargs = {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}
        shown = self.show(kwargs, self.family.look(kwargs, self.needs), relevance_text)
        self.receipt.latest = shown.chosen
        for image in shown.chosen or ():
            self.receipt.saw_image(image.available, len(image.indices), image.merged, image.separators)
        with shown.inside() if shown.inside else contextlib.nullcontext():
            yield {**shown.inputs, **self.family.encoded(shown.features)}

    def show(
        self, prompt: dict[str, Any], seen: Seen, relevance_text: list[str] | None = None, memo: Memo | None = None
    ) -> Shown:
        """What the language model gets of a prompt and its images.

        Args:
            prompt: the call's keywords, a mask among them; its pixels are not looked at.
            seen: its images, at least with the fields of `needs`.
            relevance_text: one question an image; the prompt is decoded where it is None.
            memo: what was computed of these images and this prompt for other selections.
        """
        ids, mask = prompt["input_ids"], prompt["attention_mask"]
        placeholders = ids == self.family.image_token
        spans = image_columns(placeholders, [len(image.features) for image in seen.images])
        if self.decoder:
            return self._show_inside(self.decoder, prompt, seen, spans, mask.bool() & ~placeholders)
        rows = [row for row, _ in spans]
        parts = self._select(seen, ids, mask, placeholders, rows, relevance_text, Memo() if memo is None else memo)
        images = [splice(image, own) for image, own in zip(seen.images, parts, strict=True)]
        if self.spec.positions == "keep" and any(image.merged for image in images):
            raise UserError(
                f"prune.positions: 'keep' has no place for the tokens that {self.spec.method} merges; use 'compact'"
            )
        inputs = self._handed(prompt, mask, kept_columns(placeholders, spans, images))
        said = [image.to_json() for image in images]
        return Shown(inputs, [image.features for image in images], said, [detached(image) for image in images])

    def _show_inside(
        self, decoder: DecoderPruning, prompt: dict[str, Any], seen: Seen, spans: list[tuple[int, Tensor]], text: Tensor
    ) -> Shown:
        """The whole prompt, of which the decoder drops tokens on the way."""
        mask = prompt["attention_mask"]
        if prompt.get("labels") is not None:  # the answer has no say in what is kept
            text = text & ((prompt["labels"] != PER_TOKEN["labels"]).cumsum(dim=1) == 0)
        keeps = self._budgets(seen)

        @contextlib.contextmanager
        def inside() -> Iterator[Callable[[], list[dict[str, Any]]]]:
            with decoder.installed(), decoder.prompt(portions(seen, keeps, spans, text), mask, seen.images):
                yield lambda: [image.to_json() for image in self.receipt.latest or ()]

        everything = [torch.arange(mask.shape[1], device=mask.device)] * len(mask)
        inputs, features = self._handed(prompt, mask, everything), [image.features for image in seen.images]
        said = [{"available": image.count} for image in seen.images]
        return Shown(inputs, features, said, inside=inside, tag=self.spec.model_dump_json())

    def _handed(self, prompt: dict[str, Any], mask: Tensor, columns: list[Tensor]) -> dict[str, Any]:
        """The call's keywords without images, and those columns of its prompt."""
        cut = self._cut(prompt, mask, columns)
        for name in self.family.image_inputs:
            cut.pop(name, None)
        return cut

    def _select(
        self, seen: Seen, ids: Tensor, mask: Tensor, placeholders: Tensor, rows: list[int],
        relevance_text: list[str] | None, memo: Memo,
    ) -> list[list[Part]]:  # fmt: skip
        """For every image, its views after their selections."""
        if relevance_text is not None and len(relevance_text) != len(rows):
            raise UserError(f"relevance_text: {len(relevance_text)} texts for {len(rows)} images")
        parts: list[list[Part]] = [[] for _ in rows]
        words = mask.bool() & ~placeholders
        for index, (views, keeps) in enumerate(zip(seen.views, self._budgets(seen), strict=True)):
            # Views of one budget are chosen from together; where the question counts, those of one image.
            by = [(keep, owner if self.reader.needs else 0) for keep, owner in zip(keeps, views.owners, strict=True)]
            for (keep, _), group in itertools.groupby(range(len(by)), key=by.__getitem__):
                span = list(group)
                if keep == 0:
                    continue
                mine = memo.of((index, span[0], span[-1]))
                image = views.owners[span[0]]
                text = relevance_text[image] if relevance_text else None
                key = ("tokens", self.needs, self.reader.needs, id(self.reader.tower))
                asked = ids[rows[image]], words[rows[image]]
                make = functools.partial(self._tokens, views, slice(span[0], span[-1] + 1), *asked, text, mine)
                tokens = recalled(mine.question, key, make)
                selection = self._choose(tokens, keep, mine)
                features = self._features(tokens, selection)
                for view, made, kept in zip(span, features, selection.indices, strict=True):
                    places = views.places[view]
                    parts[views.owners[view]].append(Part(made, places[kept], places, selection.front))
        return parts

    def _tokens(
        self, views: Views, span: slice, ids: Tensor, words: Tensor, text: str | None, memo: Memo
    ) -> VisionTokens:
        """What the pruner reads of some views, and of the question: the same for every pruner that reads the same."""
        tokens = views.tokens[span].only(self.needs)
        if not self.reader.needs:
            return tokens
        prompt = ids[words]
        text = self._decode(prompt) if text is None else text
        asked: dict[str, Any] = self.reader.fields(tokens, text, prompt, memo.image, memo.question)
        return dataclasses.replace(tokens, **asked)

    def _budgets(self, seen: Seen) -> list[list[int]]:
        most = self.family.view_tokens
        if most is not None and self.spec.per == "tile" and self.spec.keep > most:
            raise UserError(f"keep={self.spec.keep} is out of range: an image has {most} tokens (1..{most})")
        return budgets(seen, self.spec.keep, self.spec.per == "image")

    def _choose(self, tokens: VisionTokens, keep: int, memo: Memo) -> Selection:
        sensitivity, metric = None, self.sensitivity
        if metric is not None:
            sensitivity = recalled(memo.image, self.spec.sensitivity, lambda: metric(tokens.projected))
        relevance = None
        if keep < tokens.count:  # neither the budget nor the metric enters in what the method calls relevant
            method = (self.spec.method, id(self.reader.tower))
            relevance = recalled(memo.question, method, lambda: self.pruner.relevance(tokens))
        return self.pruner.select(tokens, keep, sensitivity, self.fusion, relevance)

    def _decode(self, prompt: Tensor) -> str | None:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return None if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=True)

    def _features(self, tokens: VisionTokens, selection: Selection) -> list[Tensor]:
        """What the language model gets for each image: [K + M, D], merged tokens at their place."""
        width = tokens.projected.shape[-1]
        if selection.updated is not None:
            chosen = self._in_language_space(tokens, selection, selection.updated)
        else:
            chosen = tokens.projected.gather(1, selection.indices.unsqueeze(-1).expand(-1, -1, width))
        if selection.merged is not None:
            merged = self._in_language_space(tokens, selection, selection.merged)
            front, back = merged[:, : selection.front], merged[:, selection.front :]
            chosen = torch.cat([front, chosen, back], dim=1)
        return list(chosen)

    def _in_language_space(self, tokens: VisionTokens, selection: Selection, made: Tensor) -> Tensor:
        if selection.space == "patches":
            made = self.family.project(made.to(tokens.require("patches", "merging").dtype))
        return made.to(tokens.projected.dtype)

    def _cut(self, kwargs: dict[str, Any], mask: Tensor, columns: list[Tensor]) -> dict[str, Any]:
        """The call's keywords, every per-token input cut to those columns and padded on the side that was padded."""
        left = bool(mask[:, -1].all())
        given = self.family.positions(kwargs)
        short = gather_columns(mask, columns, 0, left)
        if given is not None:  # positions that are more than a count stay what they are
            positions = gather_columns(given, columns, 0, left)
        elif self.spec.positions == "keep":
            counted = kwargs.get("position_ids")
            counted = (mask.cumsum(dim=-1) - 1).clamp(min=0) if counted is None else counted.expand_as(mask)
            positions = gather_columns(counted, columns, 0, left)
        else:
            positions = (short.cumsum(dim=-1) - 1).clamp(min=0)
        pad = self.family.model.config.get_text_config().pad_token_id or 0
        fills = {"input_ids": pad, **PER_TOKEN}
        cut = {
            name: gather_columns(kwargs[name], columns, fill, left)
            for name, fill in fills.items()
            if kwargs.get(name) is not None
        }
        return {**kwargs, **cut, "attention_mask": short, "position_ids": positions}


def _with_prompt(output: Any, prompt: Tensor, cut: int) -> Any:
    """The generated tokens behind the caller's own prompt."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    repeats = sequences.shape[0] // prompt.shape[0]
    whole = torch.cat([prompt.repeat_interleave(repeats, dim=0), sequences[:, cut:]], dim=1)
    if isinstance(output, Tensor):
        return whole
    output.sequences = whole
    return output
