"""What a pruner inside the decoder reads of the tokens that are left of a view between two layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.tokens import VisionTokens
from qapbench.models.layers import DecoderLayers
from qapbench.quantize.call_tokens import watch_of

from .state import DecoderState, ViewState

OF_TEXT = frozenset({"query_attention", "text_attention"})
KEYS = frozenset({"rotated_keys", "text_keys"})
OF_ATTENTION = OF_TEXT | KEYS | {"context_attention"}
STATES = frozenset({"final_states", "text_states"})
EMBEDDED = frozenset({"embedded", "prompt_embeds"})


def check_drops(layers: DecoderLayers, pruner: DecoderPruner, drops: Iterable[int]) -> None:
    """Check that a decoder allows the drops of a pruner.

    Args:
        layers: the decoder's layers.
        pruner: the pruner.
        drops: for each drop, the index of the first layer after it.

    Raises:
        UserError: it does not; the message says why.
    """
    for index in sorted(drops):
        read = index if pruner.ahead else index - 1
        layers.check_drop(type(pruner).__name__, index, read if pruner.needs & OF_ATTENTION else None)


class DecoderFields:
    """Makes the fields of `VisionTokens` that a pruner names, and computes nothing else.

    Args:
        core: the module that takes the `input_ids` of every call.
        layers: the decoder's layers.
        pruner: names the fields, and the layer that is read.

    Attributes:
        projected: the query and key projections of the layer before a drop -> their outputs, for a pruner that reads
            that layer.

    Raises:
        UserError: the decoder lacks what the pruner reads.
    """

    def __init__(self, core: nn.Module, layers: DecoderLayers, pruner: DecoderPruner) -> None:
        self.core = core
        self.layers = layers
        self.needs = pruner.needs
        self.ahead = pruner.ahead
        self.projected: dict[nn.Module, Tensor] = {}
        if self.needs & STATES and layers.norm is None:
            raise UserError(f"model: {type(pruner).__name__} reads states after the decoder's last norm; it has none")

    @property
    def projections(self) -> bool:
        """Whether queries and keys are read, of the layer before the drop and as it computed them."""
        return not self.ahead and bool(self.needs & OF_ATTENTION)

    def tokens(
        self, state: DecoderState, index: int, view: ViewState, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> VisionTokens:
        """The tokens that are left of one view, with the fields that the pruner reads, as a batch of one.

        Args:
            state: the prompt.
            index: index of the layer after the drop.
            view: the view.
            hidden: [B, C, D] hidden states of the columns that are left.
            rotary: cosine and sine of the prompt's columns.
        """
        needs, row = self.needs, view.row
        home = hidden.device  # the prompt's columns, its angles and its first states may be on other ones
        places, columns = state.layouts[index].row(row)
        own, text = (torch.searchsorted(columns, wanted).to(home) for wanted in (view.columns, view.text))
        cos, sin = (x[row if len(x) > 1 else 0, columns.to(x.device)].to(home) for x in rotary)
        places, columns = places.to(home), columns.to(home)
        layer = index if self.ahead else index - 1
        fields: dict[str, Tensor] = {}
        if needs & OF_TEXT:
            at = text if "text_attention" in needs else text[-1:]
            queries, keys = self._queries_and_keys(layer, hidden[row], row, places, columns, at)
            rows = self.layers.rows(layer, queries, keys, (cos, sin), at)[:, own]
            fields |= {"text_attention": rows.T, "query_attention": rows[-1]}
        if "context_attention" in needs:
            before = torch.arange(int(own[-1]) + 1, device=own.device)
            queries, keys = self._queries_and_keys(layer, hidden[row], row, places, columns, before)
            fields["context_attention"] = self.layers.context(layer, queries, keys[before])[own]
        if needs & KEYS:
            _, keys = self._queries_and_keys(layer, hidden[row], row, places, columns, own[:0])
            keys = self.layers.rotated_keys(layer, keys, from_zero(cos, sin))
            fields |= {"rotated_keys": keys[own], "text_keys": keys[text]}
        if needs & STATES and self.layers.norm is not None:
            fields |= {"final_states": self.layers.norm(hidden[row, places[own]]).to(home)}
            fields |= {"text_states": self.layers.norm(hidden[row, places[text]]).to(home)}
        if state.embedded is not None:
            embedded = state.embedded[row]
            read, entered = (embedded[at.to(embedded.device)].to(home) for at in (view.text, view.entered))
            fields |= {"prompt_embeds": read, "embedded": entered}
        wanted: dict[str, Any] = {name: value.unsqueeze(0) for name, value in fields.items() if name in needs}
        return VisionTokens(hidden[row, places[own]].unsqueeze(0), **wanted)

    def _queries_and_keys(
        self, layer: int, hidden: Tensor, row: int, places: Tensor, columns: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries of a layer at the places `at` and keys at all `places`, before rotation.

        Args:
            layer: index of the layer: the one after the drop if the pruner is `ahead`, otherwise the one before it.
            hidden: [C, D] hidden states of the row.
            row: row of the batch.
            places: [S] places of the row's tokens.
            columns: [S] columns of the prompt that these tokens have.
            at: [R] places, among the S tokens, of the queries.
        """
        queries, keys = self.layers.projections(layer)
        if not self.ahead:
            asked, held = (self.projected[one].to(hidden.device) for one in (queries, keys))
            return asked[row, places[at]], held[row, places]
        normed = self.layers.normed(layer, hidden[places].unsqueeze(0))
        watch = watch_of(self.core)
        if watch is None:
            return queries(normed[:, at])[0], keys(normed)[0]
        # The range of an input may span all tokens, so the projection gets all of them, as in the layer itself.
        with watch.only(row, columns):
            return queries(normed)[0, at], keys(normed)[0]


def from_zero(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [S, width], as if the first of S places were position 0.

    A row that is padded on the left may begin at any position. Attention does not depend on it, but rotated keys do.
    """
    scale = (cos[:1].square() + sin[:1].square()).sqrt()
    return (cos * cos[:1] + sin * sin[:1]) / scale, (sin * cos[:1] - cos * sin[:1]) / scale
