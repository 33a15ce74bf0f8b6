"""The work of choosing tokens: what a pruner reads, what it computes, and the tokens that it makes."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.fusing import fusions
from qapbench.methods.kinds import metrics, pruners
from qapbench.methods.pruner import Pruner
from qapbench.methods.registry import Registry
from qapbench.methods.tokens import VisionTokens
from qapbench.models.outline import ImageOutline, Size
from qapbench.models.relevance import PADDED, QuestionReader
from qapbench.models.tower import OF_CLS
from qapbench.prune.decoder_fields import KEYS, OF_TEXT
from qapbench.spec.run_spec import PruneSpec

from .bits import Bits
from .flops import projector_work, tower_work
from .prompt import Prompt
from .shape import ModelShape
from .tokens import TokenFlow, ViewFlow
from .work import Work, work

OF_ATTENTION = frozenset({*OF_CLS, "attention_received", "middle_attention_received"})


@dataclass(frozen=True)
class TextTowerShape:
    """The text tower of a companion CLIP.

    Attributes:
        width: width of its hidden states.
        inner: width inside of its MLP.
        layers: number of its layers.
        length: tokens of a segment of the text.
        joint: width of the joint image-text space.
    """

    width: int
    inner: int
    layers: int
    length: int
    joint: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> TextTowerShape:
        """The shape in a CLIP's config.json."""
        text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "max_position_embeddings": 77}
        text |= config.get("text_config") or {}
        width, inner, layers = (text[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        return TextTowerShape(width, inner, layers, text["max_position_embeddings"], config.get("projection_dim", 512))

    def flops(self, tokens: int) -> float:
        """FLOPs of embedding a text of so many tokens, cut into segments of which the last one is padded."""
        whole, rest = divmod(tokens, self.length)
        padded = min(math.ceil(rest / PADDED) * PADDED, self.length)
        lengths = [self.length] * whole + ([padded] if rest else [])
        per_token = 2 * (4 * self.width**2 + 2 * self.width * self.inner)
        segments = (self.layers * (per_token * n + 4 * self.width * n**2) for n in lengths)
        return sum(segments) + len(lengths) * 2 * self.width * self.joint


@dataclass(frozen=True)
class Selecting:
    """Who chooses among which tokens.

    Attributes:
        shape: the model.
        spec: the `prune` section.
        pruner: the pruner that it names.
        outline: the images.
        sizes: their sizes in pixels.
        flow: their tokens under the pruner.
        prompt: the prompt.
        tower: the text tower of the joint space; None if relevance is measured in the language model's embeddings.
        bits: formats of the model, for the parts of it that are run again.
    """

    shape: ModelShape
    spec: PruneSpec
    pruner: Pruner
    outline: ImageOutline
    sizes: Sequence[Size]
    flow: TokenFlow
    prompt: Prompt
    tower: TextTowerShape | None
    bits: Bits

    def work(self) -> Work:
        """The work of choosing the tokens of one prompt."""
        parts = [] if self.pruner.front is None else [self._in_front()]
        if isinstance(self.pruner, DecoderPruner):
            parts += [self._inside(view) for view in self.flow.views]
        return Work.total(parts)

    @property
    def _strategies(self) -> tuple[str, str | None, str | None]:
        """Pruner, sensitivity and fusion as JSON."""
        named = (self.spec.sensitivity, self.spec.fusion)
        sensitivity, fusion = (None if one is None else json.dumps([one.name, one.params]) for one in named)
        return json.dumps([self.spec.method.name, self.spec.method.params]), sensitivity, fusion

    # -- in front of the decoder --

    def _in_front(self) -> Work:
        """The choice of the tokens that enter the decoder. What it would read is read also if all of them do."""
        chosen = [view for view in self.flow.views if 0 < view.entered < view.count]
        if not chosen:
            return self._read()
        parts = [self._read(), self._of_question()]
        for view, times in Counter((v.count, v.entered, v.grid) for v in chosen).items():
            count, keep, grid = view
            fields = json.dumps(self._fields(count, grid, keep))
            measured, made = measured_choice(*self._strategies, keep, fields, in_front=True)
            parts += [work(measured * times), projector_work(self.shape, made * times, self.bits)]
        if "downsampled" in self._needs:
            for keep in {view.entered for view in chosen}:
                smaller = self.shape.family.outline_downsampled(self.sizes, keep)
                parts.append(tower_work(self.shape, smaller, len(self.shape.tower), self.bits))
                parts.append(projector_work(self.shape, smaller.projected, self.bits))
        return Work.total(parts)

    @property
    def _needs(self) -> frozenset[str]:
        """Fields that the pruner reads in front of the decoder and this model has."""
        return self.pruner.front_needs & (self.shape.family.available_fields | QuestionReader.FIELDS)

    def _read(self) -> Work:
        """Attention that is computed for the pruner: 2 q s width FLOPs, of q queries over s tokens.

        It is one query for attention of a CLS token. Where the tower has none, attention received from all tokens
        stands in, and all tokens are queries.
        """
        longest = max(self.outline.attended, key=lambda layer: sum(length**2 for length in layer), default=())
        total = 0.0
        for name in self._needs & OF_ATTENTION:
            at = self.shape.family.attention_layer(name)
            lengths = longest if at is None else self.outline.attended[at]
            single = name in OF_CLS and name not in self.shape.family.substitutes
            total += sum(2 * (1 if single else length) * length * self.shape.tower_width for length in lengths)
        return work(total)

    def _of_question(self) -> Work:
        """The question in the joint space of a text tower, and the patches there."""
        if self.tower is None:
            return Work()
        total = 0.0
        if "image_embeds" in self.pruner.front_needs:
            total += 2 * self.shape.tower_width * self.tower.joint * self.outline.projected
        if "text_embeds" in self.pruner.front_needs:
            total += self.tower.flops(self.prompt.after)
        return work(total)

    def _fields(self, count: int, grid: tuple[int, int] | None, keep: int) -> dict[str, Any]:
        """Shapes of the fields of `VisionTokens` in front of the decoder, of a batch of one view."""
        shape, tower = self.shape, self.tower
        patches, joint = shape.projector[0].inward, tower.joint if tower else shape.width
        segments = math.ceil(self.prompt.after / tower.length) if tower else 1
        tensors = {
            "projected": [count, shape.width],
            "patches": [count, patches],
            "keys": [count, shape.tower_width],
            "last_keys": [count, shape.tower_width],
            "cls_token": [shape.tower_width],
            "image_embeds": [count, joint],
            "text_embeds": [segments, joint],
            "prompt_embeds": [self.prompt.text, shape.width],
            **{name: [count] for name in OF_ATTENTION},
        }
        needs = self._needs
        if "downsampled" in needs:
            smaller = self.shape.family.outline_downsampled(self.sizes[:1], keep).encoded.single.grid
            tensors["downsampled"] = [shape.width, *(smaller or ())]
        named = {name: size for name, size in tensors.items() if name in needs or name == "projected"}
        return {"tensors": named, "heads": shape.tower_heads, "grid": grid}

    # -- inside the decoder --

    def _inside(self, view: ViewFlow) -> Work:
        """The drops of one view: what is read of a layer at each of them, and the choice."""
        parts = []
        left = view.entered
        for layer, keep in view.stages.items():
            if keep:
                columns = self.flow.columns(self.prompt.text)[layer - 1]
                fields = json.dumps(self._fields_inside(left, view.entered))
                parts.append(self._read_inside(columns, view.last))
                parts.append(work(measured_choice(*self._strategies, keep, fields)[0]))
            left = keep
        return Work.total(parts)

    def _read_inside(self, columns: float, last: int) -> Work:
        """Queries and keys that are made for the pruner alone, and the rows of attention that it reads.

        Args:
            columns: tokens in front of the drop.
            last: tokens of images up to the view's last one.
        """
        shape, needs, total = self.shape, self.pruner.needs, 0.0
        ahead = isinstance(self.pruner, DecoderPruner) and self.pruner.ahead
        query, key = shape.heads * shape.head_width, shape.key_heads * shape.head_width
        words = self.prompt.after
        up_to = min(self.prompt.before + last, columns)

        def made(queries: float) -> float:
            """FLOPs of the projections, where the layer behind the drop has not computed them yet."""
            return 2 * shape.width * (query * queries + key * columns) if ahead else 0.0

        if needs & OF_TEXT:
            rows = words if "text_attention" in needs else 1
            total += made(rows) + 2 * rows * columns * query
        if "context_attention" in needs:
            total += made(up_to) + 2 * up_to * query
        if needs & KEYS:
            total += made(0)
        return work(total)

    def _fields_inside(self, left: int, entered: int) -> dict[str, Any]:
        """Shapes of the fields of `VisionTokens` inside the decoder."""
        shape, words = self.shape, self.prompt.after
        keys = shape.key_heads * shape.head_width
        tensors = {
            "projected": [left, shape.width],
            "query_attention": [left],
            "text_attention": [left, words],
            "context_attention": [left],
            "rotated_keys": [left, keys],
            "text_keys": [words, keys],
            "final_states": [left, shape.width],
            "text_states": [words, shape.width],
            "prompt_embeds": [words, shape.width],
            "embedded": [entered, shape.width],
        }
        needs = self.pruner.needs
        named = {name: size for name, size in tensors.items() if name in needs or name == "projected"}
        return {"tensors": named, "heads": 1, "grid": None}


@functools.lru_cache(maxsize=256)
def measured_choice(
    method: str, sensitivity: str | None, fusion: str | None, keep: int, fields: str, in_front: bool = False
) -> tuple[int, int]:
    """Run a pruner on random tokens of these shapes, and count the FLOPs of its matrix products.

    Methods choose by loops and sorts, so there is no formula that would hold for all of them, and what is counted is
    what the method really does. Where that depends on the values (CDPruner on a CPU computes only the rows of its
    kernel that it needs), the count is that of random tokens.

    Args:
        method: name and parameters of the pruner as JSON.
        sensitivity: the same of the metric; None for none.
        fusion: the same of the fusion.
        keep: the budget.
        fields: shapes of the fields of `VisionTokens` as JSON, without the batch.
        in_front: whether it is the choice in front of the decoder that is counted, not one inside.

    Returns:
        (FLOPs, number of tokens that it made before the projector, and which that still has to project).
    """
    given = json.loads(fields)
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {
        name: torch.rand(1, *size, generator=generator) for name, size in given["tensors"].items()
    }
    grid = tuple(given["grid"]) if given["grid"] else None
    tokens = VisionTokens(heads=given["heads"], grid=grid, image_ids=("random",), **values)
    named: Pruner = _made(pruners, method)
    pruner = named.front if in_front and named.front else named
    metric, combine = _made(metrics, sensitivity), _made(fusions, fusion)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        chosen = pruner.select(tokens, keep, metric(tokens.projected) if metric else None, combine)
    made = 0
    if chosen.space == "patches":
        made = sum(0 if one is None else one.shape[1] for one in (chosen.merged, chosen.updated))
    return counter.get_total_flops(), made


def _made(registry: Registry[Any], item: str | None) -> Any:
    """A registered item from its name and parameters as JSON; None for None."""
    if item is None:
        return None
    name, params = json.loads(item)
    return registry.create(name, **params)
