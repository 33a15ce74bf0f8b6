"""Prunes inside the decoder: visual tokens are dropped between two layers while the prompt passes through them.

Attention runs as the model does it (SDPA, flash or eager). Of the layer whose attention a pruner reads, only the rows
that it needs are computed in addition. Layers after a drop receive fewer columns, and their masks, rotary embeddings
and KV caches hold only these. After the last layer, hidden states return to their columns of the prompt, so that code
outside the decoder needs no change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.fusing import Fusion
from qapbench.methods.measure import Metric
from qapbench.methods.tokens import Selection
from qapbench.models.layers import DecoderLayers, device_of
from qapbench.quantize.call_tokens import watch_of
from qapbench.receipt import Receipt

from .decoder_fields import EMBEDDED, DecoderFields, check_drops
from .prompt import PruningView
from .splice import PrunedImage
from .stages import scheduled, stage_budgets
from .state import DecoderState, ViewState
from .token_layout import TokenLayout, causal, cut, cut_mask


class DecoderPruning:
    """Hooks on a decoder's layers that let a pruner drop tokens between them.

    Args:
        core: the module that takes the `input_ids` of every call; quantizers may ask which tokens its layers hold.
        layers: the decoder's layers.
        pruner: selects the tokens.
        sensitivity: metric whose scores are fused with the pruner's; None for none.
        fusion: combines both scores.
        receipt: counts kept tokens.
        on_view: called with the scores and the selection of every view.
    """

    def __init__(
        self,
        core: nn.Module,
        layers: DecoderLayers,
        pruner: DecoderPruner,
        sensitivity: Metric | None,
        fusion: Fusion | None,
        receipt: Receipt,
        on_view: Callable[[PruningView], None] | None = None,
    ) -> None:
        self.core = core
        self.layers = layers
        self.pruner = pruner
        self.fields = DecoderFields(core, layers, pruner)
        self.sensitivity = sensitivity
        self.fusion = fusion
        self.receipt = receipt
        self.on_view = on_view
        self._installed = False
        self._announced: DecoderState | None = None  # the prompt that the next call brings
        self._pristine: DecoderState | None = None  # the open prompt before any call
        self._now: DecoderState | None = None  # the prompt that is passing through the layers
        self._passed: WeakKeyDictionary[Any, DecoderState] = WeakKeyDictionary()  # KV cache -> prompt that filled it

    @property
    def _name(self) -> str:
        return type(self.pruner).__name__

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While the context is open, the hooks are in place. Nested contexts share them.

        What a KV cache holds is known only until they are removed.
        """
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
            for index, layer in enumerate(self.layers.layers[: self.layers.added_behind]):
                stack.callback(layer.register_forward_hook(self._spread(index)).remove)
            stack.callback(self.layers.layers[-1].register_forward_hook(self._leave).remove)
            yield

    @contextlib.contextmanager
    def prompt(
        self, view_states: list[ViewState], mask: Tensor, images: list[PrunedImage]
    ) -> Iterator[list[PrunedImage]]:
        """Announce the prompt that the next call inside the context brings.

        Columns that follow the prompt are an answer to score. The pruner does not read it.

        Args:
            view_states: views of its images.
            mask: [B, L] attention mask, padded on either side.
            images: the images as they enter.

        Yields:
            The images after pruning; empty until the prompt has left the last layer.

        Raises:
            UserError: tokens of an image are to be dropped by text behind it, and no text of the prompt follows it.
        """
        for view in view_states:
            count, depth = len(view.entered), len(self.layers)
            own = scheduled(view.steps, count, depth) if view.steps else None
            view.budgets = stage_budgets(self.pruner, count, view.keep, depth) if own is None else own
            check_drops(self.layers, self.pruner, view.budgets)
            if view.budgets and not len(view.text) and self.pruner.needs & self.pruner.TEXT_FIELDS:
                raise UserError(
                    f"{self._name} reads the text behind an image, and a prompt has none (labelled text is an answer)"
                )
        valid = mask.bool()
        columns = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)
        layout = TokenLayout.of(columns, valid)
        self._pristine = DecoderState(view_states, images, [layout] * len(self.layers))
        self._announced = state = replace(self._pristine)
        try:
            yield state.kept
            if self._announced is not None:
                raise RuntimeError(f"{self._name}: the prompt never reached the decoder's layers")
        finally:
            self._announced = self._pristine = self._now = None
            self.fields.projected.clear()

    # -- hooks --

    def _enter(self, index: int) -> Any:
        """The hook before a layer: it drops tokens if a stage ends here, and cuts what the layer is given."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            past = kwargs.get("past_key_values")
            if index == 0 and self._announced is None and past is None and self._pristine is not None:
                self._announced = replace(self._pristine, again=True)  # without a cache every token passes each time
            if self._announced is not None:
                self._begin(layer, args[0], past)
            state = self._now
            if state is None:
                return self._decode(index, args, kwargs)
            hidden = args[0]
            if index in state.stages:  # accelerate moves it to the layer's device only behind this hook
                hidden = hidden.to(device_of(layer))
            if 1 <= index <= self.layers.added_behind and not state.whole(index - 1):
                hidden = gathered(hidden, state.layouts[index - 1].columns)
            if index in state.stages:
                # Layers may turn their keys differently, so the angles are those of the layer that is read.
                read = None if self.pruner.ahead else state.rotary
                hidden = self._drop(state, index, hidden, read or kwargs["position_embeddings"])
            state.rotary = kwargs["position_embeddings"]
            for view in state.view_states:
                view.counts.append(len(view.left))
            if state.whole(index):
                return None
            return (hidden, *args[1:]), {**kwargs, **cut(kwargs, state.layouts[index], self._flat(index))}

        return hook

    def _begin(self, layer: nn.Module, hidden: Tensor, past: Any) -> None:
        """Take up the announced prompt, which has reached the first layer.

        Args:
            layer: the first layer.
            hidden: [B, L, D] hidden states.
            past: the KV cache, or None.

        Raises:
            UserError: the layers are called in a way under which they cannot have different lengths.
        """
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise UserError(f"{self._name}: gradient checkpointing runs layers again, when tokens are dropped already")
        if getattr(past, "is_compileable", False):
            raise UserError(f"{self._name}: layers of different lengths need a dynamic KV cache, not a static one")
        state, self._announced = self._announced, None
        self._now = state
        if state is None:
            return
        if hidden.shape[1] < state.layouts[0].columns.shape[1]:
            raise UserError(f"{self._name}: the prompt has to pass in one piece; leave out prefill_chunk_size")
        self._check_window(hidden.shape[1])
        state.enter(*hidden.shape[:2])
        if past is not None:
            self._passed[past] = state
        if self.pruner.needs & EMBEDDED:
            state.embedded = hidden

    def _decode(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of a layer for new tokens after a prompt, with a mask that fits the keys in the layer's cache."""
        past: Any = kwargs.get("past_key_values")
        state = self._passed.get(past) if past is not None else None
        if state is None or state.whole(index) or index not in self.layers.attending:
            return None
        batch, fresh = args[0].shape[:2]
        # Candidates that came with the prompt may have been taken back since: what follows it is counted anew.
        layout, prompt = state.layouts[index].ahead_of(state.tail), state.layouts[0].columns.shape[1] - state.tail
        new = past.get_seq_length(index) - layout.columns.shape[1] + fresh
        self._check_window(prompt + new)
        keys = layout.repeated(batch // len(layout.columns)).behind(prompt, new)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4 and mask.shape[-1] != prompt + new:
            # Made for the keys of another layer of the same kind, the first one, which is cut already.
            return args, {**kwargs, "attention_mask": causal(keys, fresh, mask.dtype)}
        return args, {**kwargs, "attention_mask": cut_mask(mask, keys, fresh, self._flat(index))}

    def _check_window(self, length: int) -> None:
        """Check that a prompt and its answer fit into the layers' sliding window, which then never slides.

        Args:
            length: their number of columns.

        Raises:
            UserError: they do not.
        """
        if self.layers.window is not None and length > self.layers.window:
            raise UserError(
                f"{self._name}: prompt and answer have {length} tokens, more than the {self.layers.window} that the "
                "model's layers with a sliding window see; pruners in front of the decoder have no such limit"
            )

    def _flat(self, index: int) -> bool:
        """Whether a layer takes two-dimensional masks, which only tell padding: flash and linear attention do."""
        return index not in self.layers.attending or "flash" in str(self.layers.config._attn_implementation)

    def _record(self, index: int) -> Any:
        """The hook after a projection: it keeps queries and keys that the next layer's drop will need."""

        def hook(projection: nn.Module, args: Any, output: Tensor) -> None:
            if self.fields.projections and self._now is not None and index + 1 in self._now.stages:
                self.fields.projected[projection] = output

        return hook

    def _spread(self, index: int) -> Any:
        """The hook after a layer behind which the model adds to whole prompts: the layer's output becomes one."""

        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            state, last = self._now, index + 1 == len(self.layers)
            return None if state is None or state.whole(index) or last else on_columns(output, state, index)

        return hook

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """The hook after the last layer: hidden states return to their columns; dropped columns are zero."""
        state, self._now = self._now, None
        if state is None:
            return None
        if not state.again:
            self._report(state)
        state.embedded = None
        return on_columns(output, state, -1) if state.stages else None

    # -- one drop --

    def _drop(self, state: DecoderState, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Drop tokens before a layer.

        Args:
            state: the prompt.
            index: index of the layer.
            hidden: [B, C, D] hidden states of the columns that are left.
            rotary: cosine and sine of the prompt's columns, in the layer that the pruner reads.

        Returns:
            Hidden states of the columns that stay.
        """
        layout, entering, home = state.layouts[index], hidden, state.layouts[index].columns.device
        gone = torch.zeros_like(layout.valid)
        chosen: list[tuple[ViewState, Selection]] = []
        for view in state.view_states:  # one by one, so that no result depends on the batch
            if index not in view.budgets:
                continue
            places, columns = layout.row(view.row)
            own = places[torch.searchsorted(columns, view.columns)]
            gone[view.row, own] = True
            selection = self._select(state, index, view, entering, rotary)
            stays = own[selection.indices[0].to(home)]
            gone[view.row, stays] = False
            if selection.updated is not None:
                hidden = hidden.clone() if hidden is entering else hidden
                hidden[view.row, stays.to(hidden.device)] = selection.updated[0].to(hidden.dtype)
            chosen.append((view, selection))
        for view, selection in chosen:
            view.narrow(selection)
        left, places = layout.without(gone)
        state.layouts[index:] = [left] * (len(state.layouts) - index)
        self.fields.projected.clear()
        if (watch := watch_of(self.core)) is not None:
            watch.narrow(left.columns, left.valid)
        return gathered(hidden, places)

    def _select(
        self, state: DecoderState, index: int, view: ViewState, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Selection:
        """The selection of one view before a layer. It is empty if no token is to stay."""
        budget, on_view = view.budgets[index], None if state.again else self.on_view
        none = Selection(view.left.new_empty(1, 0))
        if not budget and on_view is None:
            return none
        tokens = self.fields.tokens(state, index, view, hidden, rotary)
        sensitivity = self.sensitivity(tokens.projected) if self.sensitivity else None
        relevance = self.pruner.relevance(tokens) if on_view else None
        selection = self.pruner.select(tokens, budget, sensitivity, self.fusion, relevance) if budget else none
        if selection.merged is not None or (selection.updated is not None and selection.space != "projected"):
            raise RuntimeError(f"{self._name}: what is merged inside the decoder needs a place: use `updated`")
        if on_view is not None:
            present, scores = view.among[view.left], (relevance, sensitivity)
            on_view(PruningView.of(view.image, view.count, present, view.grid, scores, selection, layer=index))
        return selection

    def _report(self, state: DecoderState) -> None:
        """Count in the receipt what the layers received, and store the images after pruning in the state."""
        for index, image in enumerate(state.images):
            own = [view for view in state.view_states[:: state.times] if view.image == index]
            places = torch.cat([view.places[view.left] for view in own]).cpu()
            made = torch.cat([view.made for view in own]).cpu()
            layers = tuple(map(sum, zip(*(view.counts for view in own), strict=True)))
            kept = PrunedImage(
                image.features[:0],
                places.sort().values,
                places[~made].sort().values,
                image.available,
                int(made.sum()),
                image.separators,
                layers,
            )
            self.receipt.saw_image(kept.available, len(kept.indices), kept.merged, kept.separators, layers)
            state.kept.append(kept)


def gathered(hidden: Tensor, places: Tensor) -> Tensor:
    """Hidden states [B, S, D] at places [B, S] of [B, L, D]."""
    return hidden.gather(1, places.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def on_columns(output: Any, state: DecoderState, index: int) -> Any:
    """A layer's output with its hidden states at their columns of the whole prompt; dropped columns are zero.

    Args:
        output: that of the layer: hidden states, or a tuple that begins with them.
        state: the prompt.
        index: index of the layer.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    layout = state.layouts[index].to(hidden.device)
    whole = hidden.new_zeros(*state.layouts[0].columns.shape, hidden.shape[-1])
    rows, places = layout.valid.nonzero(as_tuple=True)
    whole[rows, layout.columns[rows, places]] = hidden[rows, places]
    return (whole, *output[1:]) if isinstance(output, tuple) else whole
