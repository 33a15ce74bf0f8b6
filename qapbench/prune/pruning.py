"""One pruning configuration on one model: shortens prompts to what the decoder receives."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.fusing import fusions
from qapbench.methods.measure import Measure
from qapbench.methods.pruner import Pruner
from qapbench.methods.tokens import Selection, VisionTokens
from qapbench.models import Family
from qapbench.models.encoded import EncodedImages, Views
from qapbench.models.relevance import QuestionReader, memoized
from qapbench.receipt import ImageTokens, Receipt
from qapbench.spec.run_spec import PruneSpec

from .choosing import Chooser, Steps, Wanted
from .cutting import cut
from .decoder import DecoderPruning
from .prompt import Inside, Memo, PrunedPrompt, PruningView
from .question import Questions, asked_text
from .splice import (
    Part,
    PrunedImage,
    budgets,
    detached,
    image_columns,
    kept_columns,
    schedules,
    splice,
)
from .state import Entering, view_states
from .turns import filled


class Ask(NamedTuple):
    """A prompt to prune.

    Attributes:
        prompt: the model's keyword arguments, with an attention mask. Its pixels are used only by a method that reads
            the image at a lower size.
        encoded: its images, with at least the fields of `Pruning.needs`.
        relevance_text: one question per image; None reads the prompt.
        memo: results for these images and this prompt that several selections share.
    """

    prompt: dict[str, Any]
    encoded: EncodedImages
    relevance_text: list[str] | None
    memo: Memo


@dataclasses.dataclass
class Pruning:
    """Shortens prompts of one model as one `prune` section asks.

    A prompt with N placeholders per image becomes an ordinary prompt with `keep` placeholders, and the features of the
    kept tokens are given to the model as ready features. KV caches, masks and generation then need no change.

    Attributes:
        family: the model.
        spec: the `prune` section.
        pruner: the pruner that it names.
        sensitivity: the metric that it names; None if it names none.
        reader: adds the fields of `VisionTokens` that depend on the question.
        receipt: counts kept tokens, and notes fallbacks.
        processor: reads and writes the question's text; None stands for the tokenizer in the model's folder.
        on_view: called with the scores and the selection of every view.
        on_images: called with the images of every prompt of a wrapped call, after pruning.
    """

    family: Family
    spec: PruneSpec
    pruner: Pruner
    sensitivity: Measure | None
    reader: QuestionReader
    receipt: Receipt
    processor: Any = None
    on_view: Callable[[PruningView], None] | None = None
    on_images: Callable[[list[PrunedImage]], None] | None = None

    def __post_init__(self) -> None:
        fusion = self.spec.fusion
        self.fusion = fusions.create(fusion.name, **fusion.params) if fusion else None
        # Nothing is chosen in front of the decoder without a method for it.
        front, tower = self.pruner.front or self.pruner, id(self.reader.tower)
        self._chooser = Chooser(self.spec, front, self.sensitivity, self.fusion, tower)
        self._questions = Questions(str(self.spec.method), self.family, self.reader, self.processor)
        self.decoder: DecoderPruning | None = None
        if isinstance(self.pruner, DecoderPruner):
            self.decoder = DecoderPruning(
                self.family.core,
                self.family.decoder,
                self.pruner,
                self.sensitivity,
                self.fusion,
                self.receipt,
                self.on_view,
            )

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """Fields that the model must record when it encodes an image."""
        return (self.pruner.front_needs & self.family.available_fields) | self.reader.visual

    # Configs of transformers look every name up in several places, which takes longer than a small tensor operation.
    @functools.cached_property
    def _view_tokens(self) -> int | None:
        return self.family.view_tokens

    @functools.cached_property
    def _image_token(self) -> int:
        return self.family.image_token

    @functools.cached_property
    def _pad_token(self) -> int:
        return self.family.model.config.get_text_config().pad_token_id or 0

    def shorten(self, kwargs: dict[str, Any], relevance_text: list[str] | None = None) -> dict[str, Any]:
        """The keyword arguments of a call, shortened for calibration.

        Args:
            kwargs: the model's keyword arguments.
            relevance_text: one question per image; None reads the prompt.

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
        """The keyword arguments of a call, with fewer placeholders, and features of the kept tokens in place of pixels.

        A pruner inside the decoder leaves the prompt whole, and drops tokens in the call that is made while the context
        is open.

        Args:
            kwargs: the model's keyword arguments.
            relevance_text: one question per image; None reads the prompt.

        Raises:
            UserError: the call is not a prompt of token ids, or as `prune`.
        """
        if kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None:
            raise UserError("pruning needs input_ids with image placeholders; inputs_embeds cannot be pruned")
        if filled(kwargs.get("past_key_values")):
            raise UserError("pruning starts at the prompt: call without past_key_values, or with an empty cache")
        if kwargs.get("attention_mask") is None:
            kwargs = {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}
        if kwargs["attention_mask"].ndim != 2:
            raise UserError("attention_mask: pruning needs one value for each token, [batch, length]")
        pruned = self.prune(kwargs, self.family.seen_images(kwargs, self.needs), relevance_text)
        ready = {**pruned.inputs, **self.family.encoded(pruned.features)}
        same = all(torch.equal(ready[name], kwargs[name]) for name in ("input_ids", "attention_mask"))
        if same and self.family.positions(kwargs) is None:  # nothing was removed: the model counts as it would alone
            ready["position_ids"] = kwargs.get("position_ids")
        if pruned.inside is None:
            for image in pruned.chosen or ():
                self.receipt.saw_image(image.available, len(image.indices), image.merged, image.separators)
            self._tell([detached(image) for image in pruned.chosen or ()])
            yield ready
            return
        with pruned.inside() as images:
            yield ready
        self._tell(images())

    def _tell(self, images: list[PrunedImage]) -> None:
        """Hand the images after pruning to `on_images`, if it is set."""
        if self.on_images is not None:
            self.on_images(images)

    def prune(
        self,
        prompt: dict[str, Any],
        encoded: EncodedImages,
        relevance_text: list[str] | None = None,
        memo: Memo | None = None,
    ) -> PrunedPrompt:
        """The prompt as the decoder receives it.

        Args:
            prompt: as `Ask`.
            encoded: as `Ask`.
            relevance_text: as `Ask`.
            memo: as `Ask`.

        Raises:
            UserError: as `prune_each`.
        """
        return self.prune_each([Ask(prompt, encoded, relevance_text, Memo() if memo is None else memo)])[0]

    def prune_each(self, asks: Sequence[Ask]) -> list[PrunedPrompt]:
        """Several prompts as the decoder receives them. None depends on the others.

        Runs, `compress`, calibration, `explain` and `study` all use this method.

        Args:
            asks: the prompts.

        Raises:
            UserError: the budget is out of range, placeholders and tokens do not match, or `positions: keep` meets
                merged tokens.
        """
        return self._chooser.finish([self._pruned(*ask) for ask in asks])

    def _pruned(
        self, prompt: dict[str, Any], encoded: EncodedImages, relevance_text: list[str] | None, memo: Memo
    ) -> Steps:
        """The steps in which one prompt is pruned. They return a `PrunedPrompt`."""
        ids, mask = prompt["input_ids"], prompt["attention_mask"]
        placeholders = ids == self._image_token
        spans = image_columns(placeholders, [len(image.features) for image in encoded.images])

        def question(image: int) -> Tensor:
            (text,) = asked_text(mask.bool() & ~placeholders, prompt.get("labels"), [spans[image]])
            return ids[spans[image][0], text]

        keeps = budgets(encoded, self.spec, self._view_tokens)
        parts = yield from self._select(prompt, encoded, keeps, question, relevance_text, memo)
        images = [splice(image, own) for image, own in zip(encoded.images, parts, strict=True)]
        if self.spec.positions == "keep" and any(part.between for own in parts for part in own):
            raise UserError(
                f"prune.positions: 'keep' has no place for the tokens that {self.spec.method} merges; use 'compact'"
            )
        inputs = self._handed(prompt, mask, kept_columns(placeholders, spans, images))
        features = [image.features for image in images]
        removed = ids.shape[1] - inputs["input_ids"].shape[1]
        if self.decoder is None:
            return PrunedPrompt(inputs, features, [image.stored() for image in images], images, removed=removed)
        grids = [views.tokens.grid for views in encoded.views]
        drops = schedules(encoded, self.spec, self._view_tokens)
        views = [[Entering.of(part, keeps, grids, drops) for part in own] for own in parts]
        inside = self._inside(self.decoder, inputs, images, views)
        said = [ImageTokens(available=image.available) for image in images]
        return PrunedPrompt(inputs, features, said, inside=inside, tag=self.spec.model_dump_json(), removed=removed)

    def _inside(
        self,
        decoder: DecoderPruning,
        inputs: dict[str, Any],
        images: list[PrunedImage],
        views: list[list[Entering]],
    ) -> Inside:
        """A context in which the decoder drops tokens of a prompt.

        Args:
            decoder: drops tokens between layers.
            inputs: the prompt as the decoder receives it.
            images: its images.
            views: for each image its views.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        placeholders = ids == self._image_token
        spans = image_columns(placeholders, [len(image.features) for image in images])
        asked = asked_text(mask.bool() & ~placeholders, inputs.get("labels"), spans)

        @contextlib.contextmanager
        def inside() -> Iterator[Callable[[], list[PrunedImage]]]:
            states = view_states(images, views, spans, asked)
            with decoder.installed(), decoder.prompt(states, mask, images) as kept:
                yield lambda: kept

        return inside

    def _handed(self, prompt: dict[str, Any], mask: Tensor, columns: list[Tensor]) -> dict[str, Any]:
        """The keyword arguments without images, cut to some columns of the prompt.

        Args:
            prompt: the model's keyword arguments.
            mask: its attention mask.
            columns: for each row, the columns that stay.
        """
        family = self.family
        left = {name: value for name, value in prompt.items() if name not in family.image_inputs}
        return cut(left, mask, columns, family.positions(prompt), self.spec.positions == "keep", self._pad_token)

    def _select(
        self,
        prompt: dict[str, Any],
        encoded: EncodedImages,
        keeps: list[list[int]],
        question: Callable[[int], Tensor],
        relevance_text: list[str] | None,
        memo: Memo,
    ) -> Steps:
        """Choose the tokens of every view in front of the decoder.

        Returns for every image its views after their selections: list[list[Part]].

        Args:
            prompt: the model's keyword arguments.
            encoded: the images.
            keeps: the budget of each view, listed like `encoded.views`.
            question: makes, for an image, token ids [L] of the text that the pruner may read.
            relevance_text: one question per image; None reads `question`.
            memo: results that several selections share.
        """
        count = len(encoded.images)
        if relevance_text is not None and len(relevance_text) != count:
            raise UserError(f"relevance_text: {len(relevance_text)} texts for {count} images")
        parts: list[list[Part]] = [[] for _ in range(count)]
        for index, (views, own) in enumerate(zip(encoded.views, keeps, strict=True)):
            entering = [self.pruner.entering(views.tokens.count, keep) for keep in own]
            # Neighbouring views with one budget form a batch; if the pruner reads the question, of one image only.
            by = [(keep, owner if self.reader.needs else 0) for keep, owner in zip(entering, views.owners, strict=True)]
            for (keep, _), group in itertools.groupby(range(len(by)), key=by.__getitem__):
                span = list(group)
                if keep == 0:
                    continue
                mine = memo.of((index, span[0], span[-1]))
                image = views.owners[span[0]]
                text = relevance_text[image] if relevance_text else None
                budget = keep if "downsampled" in self.needs else None
                reads = ("tokens", self.needs, self.reader.needs, id(self.reader.tower), budget)
                batch = slice(span[0], span[-1] + 1)
                everything = keep == views.tokens.count and self.on_view is None  # whatever the question is
                if everything or self.pruner.front is None:
                    tokens = views.tokens[batch]
                    selection = Selection.everything(tokens)
                else:
                    own_question = functools.partial(question, image)
                    see = functools.partial(self._seen, prompt, views, batch, budget, mine)
                    seen = memoized(mine.image, reads, see)
                    ask = functools.partial(self._questions.added, seen, own_question, text, mine.question)
                    tokens = memoized(mine.question, reads, ask)
                    owners = [views.owners[view] for view in span]
                    selection = yield from self._choose(tokens, keep, mine, owners)
                features = self._features(tokens, selection)
                for row, view in enumerate(span):
                    places, made = views.places[view], None if selection.made is None else selection.made[row]
                    kept, at = places[selection.indices[row]], (index, view)
                    part = Part(features[row], kept, places, at, selection.front, made)
                    parts[views.owners[view]].append(part)
        return parts

    def _seen(self, prompt: dict[str, Any], views: Views, span: slice, budget: int | None, memo: Memo) -> VisionTokens:
        """The fields of some views that the pruner reads, but for those about the question.

        Args:
            prompt: the model's keyword arguments.
            views: views of equal size.
            span: which of them.
            budget: number of tokens to read the image at; None if the pruner does not read it at a lower size.
            memo: results for these views.
        """
        tokens = views.tokens[span].only(self.needs)
        if budget is not None:
            make = functools.partial(self.family.downsampled, prompt, budget, views)
            small = memoized(memo.image, ("downsampled", budget), make)
            tokens = dataclasses.replace(tokens, downsampled=small[span].to(tokens.projected.device))
        if not self.reader.needs:
            return tokens
        return tokens.adding(self.reader.sign.value, **self.reader.of_image(tokens, memo.image))

    def _choose(self, tokens: VisionTokens, keep: int, memo: Memo, owners: list[int]) -> Steps:
        """Choose the tokens of a batch of views in front of the decoder. Returns the selection.

        Args:
            tokens: the views.
            keep: the budget of each.
            memo: results for these views.
            owners: index of the image that each view belongs to.
        """
        selection, relevance, sensitivity = yield Wanted(tokens, keep, memo)
        if self.on_view is not None:
            every = torch.arange(tokens.count)
            for row, owner in enumerate(owners):
                scores = (relevance, sensitivity)
                self.on_view(PruningView.of(owner, tokens.count, every, tokens.grid, scores, selection, row))
        return selection

    def _features(self, tokens: VisionTokens, selection: Selection) -> list[Tensor]:
        """Features for the language model, one [K + M, D] per view.

        The M merged tokens are in front of the K kept ones or after them.
        """
        if selection.updated is not None:
            chosen = list(self._in_language_space(tokens, selection, selection.updated))
        else:
            rows = zip(tokens.projected, selection.indices, strict=True)
            chosen = [features.index_select(0, indices) for features, indices in rows]
        if selection.merged is not None:
            at = selection.front
            merged = self._in_language_space(tokens, selection, selection.merged)
            chosen = [torch.cat([made[:at], kept, made[at:]]) for made, kept in zip(merged, chosen, strict=True)]
        return chosen

    def _in_language_space(self, tokens: VisionTokens, selection: Selection, made: Tensor) -> Tensor:
        """Tokens that a pruner made, in the language model's space and dtype."""
        if selection.space == "patches":
            made = self.family.project(made.to(tokens.require("patches", "merging").dtype))
        return made.to(tokens.projected)
