"""Pruning inside the decoder: visual tokens are dropped between two layers while the prompt passes through them.

Attention runs as the model has it (SDPA, flash or eager); of the layer that a pruner reads, only the rows that it asks
for are computed beside. Layers behind a drop get fewer columns: their masks, rotary embeddings and KV caches hold just
these, and what they answer is put back at its column of the prompt, so that nobody outside has to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .columns import Layout, cut, cut_mask
from .errors import UserError
from .models.layers import DecoderLayers
from .models.views import SeenImage
from .passage import Passage, Portion
from .receipt import Receipt
from .splice import KeptImage
from .strategy import DecoderPruner, Fusion, Metric
from .tokens import Selection, VisionTokens


class DecoderPruning:
    """Hooks on a decoder's layers that let a pruner drop tokens between them."""

    def __init__(
        self, layers: DecoderLayers, pruner: DecoderPruner, sensitivity: Metric | None, fusion: Fusion | None,
        receipt: Receipt,
    ) -> None:  # fmt: skip
        self.layers = layers
        self.pruner = pruner
        self.sensitivity = sensitivity
        self.fusion = fusion
        self.receipt = receipt
        self._installed = False
        self._announced: Passage | None = None  # a prompt that the next call will bring
        self._now: Passage | None = None  # the prompt that is in the layers
        self._passed: WeakKeyDictionary[Any, Passage] = WeakKeyDictionary()  # by the cache that it filled
        self._projected: dict[nn.Module, Tensor] = {}  # queries and keys of the layer before a drop

    @property
    def _name(self) -> str:
        return type(self.pruner).__name__

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks, put in place where they are not: what a cache holds is known as long as they stay."""
        if self._installed:
            yield
            return
        with contextlib.ExitStack() as stack:
            self._installed = True
            stack.callback(setattr, self, "_installed", False)
            for index, layer in enumerate(self.layers.layers):
                stack.callback(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True).remove)
                for projection in self.layers.projections(index):
                    stack.callback(projection.register_forward_hook(self._record(index)).remove)
            stack.callback(self.layers.layers[-1].register_forward_hook(self._leave).remove)
            yield

    @contextlib.contextmanager
    def prompt(self, portions: list[Portion], mask: Tensor, images: list[SeenImage]) -> Iterator[None]:
        """The call inside brings this prompt, with attention mask [B, L] and padded on either side.

        Columns behind the L are an answer that is scored; it has no say in what is kept.

        Raises:
            UserError: nothing is asked behind an image.
        """
        for portion in portions:
            if not len(portion.text):
                raise UserError(f"{self._name} reads the text behind an image, and a prompt has none")
            portion.budgets = self._stages(len(portion.entered), portion.keep)
        valid = mask.bool()
        columns = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)
        layout = Layout.of(columns, valid)
        self._announced = Passage(portions, images, [layout] * len(self.layers))
        try:
            yield
            if self._announced is not None:
                raise RuntimeError(f"{self._name}: the prompt never reached the decoder's layers")
        finally:
            self._announced = self._now = None
            self._projected.clear()

    def _stages(self, count: int, keep: int) -> dict[int, int]:
        """Budgets by the index of the first layer behind each stage."""
        if keep == count:
            return {}
        depth = len(self.layers)
        stages = self.pruner.stages(count, max(keep, 1), depth)
        places, budgets = [stage.after for stage in stages], [count, *(stage.keep for stage in stages)]
        if budgets != sorted(budgets, reverse=True) or budgets[-1] != max(keep, 1):
            raise RuntimeError(f"{self._name}: {stages} do not lead from {count} to {keep} tokens")
        if places != sorted(set(places)) or not 1 <= places[0] <= places[-1] < depth:
            raise RuntimeError(f"{self._name}: {stages} are not in order between {depth} layers")
        return {stage.after: stage.keep if keep else 0 for stage in stages}

    # -- hooks --

    def _enter(self, index: int) -> Any:
        """Before a layer: drop what is to be dropped, and cut what the layer is given."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            past = kwargs.get("past_key_values")
            if self._announced is not None:
                self._begin(args[0], past)
            passage = self._now
            if passage is None:
                return self._decode(index, args, kwargs)
            hidden = args[0]
            if index in passage.stages:
                hidden = self._drop(passage, index, hidden, kwargs["position_embeddings"])
            for portion in passage.portions:
                portion.counts.append(len(portion.left))
            if passage.whole(index):
                return None
            return (hidden, *args[1:]), {**kwargs, **cut(kwargs, passage.layouts[index], self._flash)}

        return hook

    def _begin(self, hidden: Tensor, past: Any) -> None:
        if getattr(past, "is_compileable", False):
            raise UserError(f"{self._name}: layers of different lengths need a dynamic KV cache, not a static one")
        passage, self._announced = self._announced, None
        self._now = passage
        if passage is None:
            return
        passage.enter(*hidden.shape[:2])
        if past is not None:
            self._passed[past] = passage
        if self.pruner.needs & {"embedded", "prompt_embeds"}:
            passage.embedded = hidden

    def _decode(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """New tokens behind a prompt: the mask has to fit the keys that the prompt left in this layer."""
        past: Any = kwargs.get("past_key_values")
        passage = self._passed.get(past) if past is not None else None
        if passage is None or passage.whole(index):
            return None
        batch, fresh = args[0].shape[:2]
        layout, prompt = passage.layouts[index], passage.layouts[0].columns.shape[1]
        new = past.get_seq_length(index) - layout.columns.shape[1] + fresh
        keys = layout.repeated(batch // len(layout.columns)).behind(prompt, new)
        return args, {**kwargs, "attention_mask": cut_mask(kwargs.get("attention_mask"), keys, fresh, self._flash)}

    @property
    def _flash(self) -> bool:
        return "flash" in str(self.layers.config._attn_implementation)

    def _record(self, index: int) -> Any:
        def hook(projection: nn.Module, args: Any, output: Tensor) -> None:
            if not self.pruner.ahead and self._now is not None and index + 1 in self._now.stages:
                self._projected[projection] = output

        return hook

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Behind the last layer: hidden states go back to their columns of the prompt; zero where they were dropped."""
        passage, self._now = self._now, None
        if passage is None:
            return None
        self._report(passage)
        passage.embedded = None
        if not passage.stages:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        layout = passage.layouts[-1]
        whole = hidden.new_zeros(*passage.layouts[0].columns.shape, hidden.shape[-1])
        rows, places = layout.valid.nonzero(as_tuple=True)
        whole[rows, layout.columns[rows, places]] = hidden[rows, places]
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    # -- one drop --

    def _drop(self, passage: Passage, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        layout, entering = passage.layouts[index], hidden
        gone = torch.zeros_like(layout.valid)
        chosen: list[tuple[Portion, Selection | None]] = []
        for portion in passage.portions:  # one by one, so that no batch changes them
            if index not in portion.budgets:
                continue
            places, columns = layout.row(portion.row)
            own = places[torch.searchsorted(columns, portion.columns)]
            gone[portion.row, own] = True
            selection = self._select(passage, index, portion, entering, rotary) if portion.budgets[index] else None
            if selection is not None:
                gone[portion.row, own[selection.indices[0]]] = False
                if selection.updated is not None:
                    hidden = hidden.clone() if hidden is entering else hidden
                    hidden[portion.row, own[selection.indices[0]]] = selection.updated[0].to(hidden.dtype)
            chosen.append((portion, selection))
        for portion, selection in chosen:
            portion.narrow(selection)
        left, places = layout.without(gone)
        passage.layouts[index:] = [left] * (len(passage.layouts) - index)
        self._projected.clear()
        return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def _select(
        self, passage: Passage, index: int, portion: Portion, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Selection:
        tokens = self._tokens(passage, index, portion, hidden, rotary)
        sensitivity = self.sensitivity(tokens.projected) if self.sensitivity else None
        selection = self.pruner.select(tokens, portion.budgets[index], sensitivity, self.fusion)
        if selection.merged is not None or (selection.updated is not None and selection.space != "projected"):
            raise RuntimeError(f"{self._name}: what is merged inside the decoder needs a place: use `updated`")
        return selection

    def _tokens(
        self, passage: Passage, index: int, portion: Portion, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> VisionTokens:
        """What is left of one view as its pruner may see it: a batch of one."""
        needs, row = self.pruner.needs, portion.row
        places, columns = passage.layouts[index].row(row)
        own = torch.searchsorted(columns, portion.columns)
        fields: dict[str, Tensor] = {}
        if needs & {"query_attention", "text_attention"}:
            asking = portion.text if "text_attention" in needs else portion.text[-1:]
            at = torch.searchsorted(columns, asking)
            cos, sin = (x[row if len(x) > 1 else 0, columns] for x in rotary)
            queries, keys, layer = self._queries_and_keys(index, hidden[row], row, places, at)
            rows = self.layers.rows(layer, queries, keys, (cos, sin), at)[:, own]
            fields = {"text_attention": rows.T, "query_attention": rows[-1]}
        if passage.embedded is not None:
            embedded = passage.embedded[row]
            fields |= {"prompt_embeds": embedded[portion.text], "embedded": embedded[portion.entered]}
        wanted: dict[str, Any] = {name: value.unsqueeze(0) for name, value in fields.items() if name in needs}
        return VisionTokens(hidden[row, places[own]].unsqueeze(0), **wanted)

    def _queries_and_keys(
        self, index: int, hidden: Tensor, row: int, places: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Queries of the places `at`, keys of all, before rotation, and the layer that they are of."""
        layer = index if self.pruner.ahead else index - 1
        queries, keys = self.layers.projections(layer)
        if not self.pruner.ahead:
            return self._projected[queries][row, places[at]], self._projected[keys][row, places], layer
        normed = self.layers.normed(layer, hidden[places].unsqueeze(0))
        return queries(normed[:, at])[0], keys(normed)[0], layer

    def _report(self, passage: Passage) -> None:
        """What the layers saw, into the receipt."""
        latest = []
        for image, seen in enumerate(passage.images):
            own = [portion for portion in passage.portions[:: passage.times] if portion.image == image]
            places = torch.cat([portion.places[portion.left] for portion in own]).cpu()
            made = torch.cat([portion.made for portion in own]).cpu()
            layers = tuple(map(sum, zip(*(portion.counts for portion in own), strict=True)))
            separators = 0 if seen.separators is None else int(seen.separators.sum())
            kept = KeptImage(
                seen.features[:0], places.sort().values, places[~made].sort().values, seen.count, int(made.sum()),
                separators, layers,
            )  # fmt: skip
            self.receipt.saw_image(kept.available, len(kept.indices), kept.merged, separators, layers)
            latest.append(kept)
        self.receipt.latest = latest
