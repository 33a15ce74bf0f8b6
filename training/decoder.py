"""The decoder's forward pass for training: one image prefix shared by several rows, and the losses on them.

The mathematics is that of `LlamaForCausalLM` (a test compares the two); what differs is that keys and values of an
image are computed once for all of its questions, and that a few attention rows can be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qapbench.tasks.diagramqa.generate import image_families, text_families

from .curriculum import EASY, HARD
from .reading import QuizRows
from .rows import Chunk, DrillRows

TELL, LOOK, PICK = 1, 3, 4
"""Blocks whose attention is shown what a word goes with (the first word of its sentence, or the patches that it names),
the evidence, and the right option. The answer's word is read out after LOOK. Without these hints the two look-ups
(question -> answer -> letter) did not form within the time that a CPU has."""
HINTED_HEADS = 2
SHELVES = 32
FAMILIES = {name: i for i, name in enumerate([EASY, HARD, *image_families(), *text_families()])}
Seen = dict[Any, Any]
"""What is looked at on the way: attention rows by block, and what asks for them."""


class Hints(nn.Module):
    """What exists only in training: a judge of options where they stand, where in the dictionary a word is (its place,
    and its shelf of so many), and how far the look-ups have come.

    Attributes:
        pace: running share right of each family, which decides what is asked next.
    """

    pace: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.aux_judge = nn.Linear(width, 1)
        self.aux_place = nn.Linear(width, 1 + SHELVES)
        self.register_buffer("pace", torch.zeros(len(FAMILIES)))

    def of(self, family: str) -> float:
        return float(self.pace[FAMILIES[family]])

    def mark(self, hits: Tensor, families: Sequence[str]) -> None:
        """Take up which questions were answered right."""
        which = torch.tensor([FAMILIES[family] for family in families])
        for family in which.unique():
            mine = which == family
            self.pace[family].lerp_(hits[mine].float().mean(), 0.01 * min(5, int(mine.sum())))

    def draw(self, families: Sequence[str], rng: np.random.Generator) -> str:
        """A family: the rather, the less of it is mastered."""
        weights = np.array([1.1 - self.of(family) for family in families])
        return families[int(rng.choice(len(families), p=weights / weights.sum()))]


@dataclass
class Prefix:
    """Keys and values [B, heads, P, d] per block of what stands in front of rows, and the positions that it spans."""

    keys: list[Tensor]
    values: list[Tensor]
    span: int = 0

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


class Decoder:
    """A view of a `LlavaForConditionalGeneration`'s language model.

    Args:
        options: ids of the option letters, as answers are spelled.
    """

    def __init__(self, llava: Any, options: list[int]) -> None:
        self.options = options
        self.core, self.head = llava.model.language_model, llava.lm_head
        self.heads = self.core.config.num_attention_heads

    def embed(self, ids: Tensor) -> Tensor:
        return self.core.embed_tokens(ids)

    def say(self, states: Tensor) -> Tensor:
        """Logits of the word that states in mid-depth stand for, in the space of the embeddings: what the decoder says
        to itself is then the same to later blocks as a word that stands in the text."""
        return F.rms_norm(states, states.shape[-1:]) @ self.core.embed_tokens.weight.T * 0.2

    def prefix(
        self, embeds: Tensor, depth: int | None = None, positions: Tensor | None = None, span: int | None = None
    ) -> Prefix:
        """[B, P, D] embeddings -> their keys and values, in the first `depth` blocks or in all.

        Args:
            positions: [B, P], where these are only some of `span` positions.
        """
        out = Prefix([], [], span or embeds.shape[1])
        self._blocks(embeds, None, None, out, {}, depth, positions)
        return out

    def early(self, ids: Tensor) -> Tensor:
        """[R, L] rows of text -> [R, L, D] normed states that block LOOK starts from."""
        states = self._blocks(self.embed(ids), None, None, None, {}, LOOK)
        return F.rms_norm(states, states.shape[-1:])

    def rows(
        self,
        ids: Tensor,
        prefix: Prefix | None,
        image: Tensor | None,
        asked: Tensor,
        row: Tensor | None = None,
        told: Tensor | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, Seen]:
        """[R, L] rows behind their prefixes -> ([R, L, D] final states, what was looked at on the way).

        Padding is on the right, where causal attention never sees it. With `depth`, only so many blocks are run.
        """
        seen: Seen = {"asked": asked, "row": row, "told": told}
        x = self._blocks(self.embed(ids), prefix, image, None, seen, depth)
        return self.core.norm(x), seen

    def _blocks(
        self,
        x: Tensor,
        prefix: Prefix | None,
        owner: Tensor | None,
        store: Prefix | None,
        seen: Seen,
        depth: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        start, first = (prefix.length, prefix.span) if prefix is not None else (0, 0)
        length = x.shape[1]
        if positions is None:
            positions = torch.arange(first, first + length, device=x.device)[None]
        cos, sin = self.core.rotary_emb(x, positions)
        cos, sin = cos[:, None], sin[:, None]
        mask = None
        if start:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
        for i, layer in enumerate(self.core.layers[:depth]):
            attention = layer.self_attn
            normed = layer.input_layernorm(x)
            q, k, v = (
                proj(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if store is not None:
                store.keys.append(k)
                store.values.append(v)
            if prefix is not None and owner is not None:
                k = torch.cat([prefix.keys[i][owner], k], dim=2)
                v = torch.cat([prefix.values[i][owner], v], dim=2)
            if "asked" in seen and i in (TELL, LOOK, PICK):
                seen[i] = _row_of_attention(q, k, seen["asked"], start, seen["row"])
                if seen["told"] is not None:
                    row, end = seen["told"][:, :2].T
                    seen[i, "told"] = _row_of_attention(q, k, end, start, row)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if "asked" in seen and i == LOOK:
                seen["said"] = x
        return x


def _row_of_attention(q: Tensor, k: Tensor, asked: Tensor, start: int, row: Tensor | None) -> Tensor:
    """[Q, heads, P + L] log-attention of the asking positions (one a row unless `row` says whose they are)."""
    query = q[torch.arange(len(q), device=q.device) if row is None else row, :HINTED_HEADS, asked]
    k = k[:, :HINTED_HEADS] if row is None else k[row, :HINTED_HEADS]
    logits = torch.einsum("rhd,rhld->rhl", query, k) / q.shape[-1] ** 0.5
    later = torch.arange(k.shape[2], device=q.device)[None] > (start + asked)[:, None]
    return logits.masked_fill(later[:, None], -torch.inf).log_softmax(-1)


WEIGHTS = {
    "letter": 1.0, "word": 1.0, "look": 0.3, "pick": 0.3, "tell": 0.2, "read": 0.3,
    "judge": 0.3, "own": 0.3, "text": 0.1,
}  # fmt: skip


def losses(decoder: Decoder, hints: Hints, part: Chunk, prefix: Prefix | None) -> dict[str, Tensor]:
    """Loss of each kind summed over rows (`text`: over tokens), the counts that they are means over, and hits."""
    naming = part.naming if len(part.naming) else None
    hidden, seen = decoder.rows(part.ids, prefix, part.image, part.asked, told=naming)
    rows = torch.arange(len(part.ids), device=part.ids.device)
    start = prefix.length if prefix is not None else 0
    out: dict[str, Tensor] = {}
    logits = decoder.head(hidden[rows, part.asked])
    out["letter"] = F.cross_entropy(logits, part.letter, reduction="sum")
    out["hit"] = logits.argmax(-1) == part.letter
    worded = part.word >= 0
    said = decoder.say(seen["said"][rows, part.asked][worded])
    out["word"] = F.cross_entropy(said, part.word[worded], reduction="sum")
    out["word_hit"] = (said.argmax(-1) == part.word[worded]).sum()
    out["word_n"] = worded.sum()
    evidence = torch.cat([_padded(part.patches, start), part.support], dim=1)
    shown = evidence.any(1)
    if shown.any():
        mass = seen[LOOK][shown].masked_fill(~evidence[shown][:, None], -torch.inf).logsumexp(-1)
        out["look"] = -mass.mean(1).sum()
        out["look_n"] = shown.sum()
    if naming is not None:
        out |= {"read": _read(seen, part.seen, start) * len(naming), "read_n": torch.tensor(len(naming))}
    chosen = part.ends[rows, part.answer] + start
    out["pick"] = -seen[PICK][rows, :, chosen].mean(1).sum()
    judged = hints.aux_judge(F.rms_norm(seen["said"], seen["said"].shape[-1:]))[..., 0]
    judged = judged.gather(1, part.ends.clamp(min=0)).masked_fill(part.ends < 0, -torch.inf)
    out["judge"] = F.cross_entropy(judged, part.answer, reduction="sum")
    out["judge_hit"] = (judged.argmax(-1) == part.answer).sum()
    ends = part.ends >= 0
    own = decoder.head(decoder.core.norm(seen["said"][rows[:, None], part.ends.clamp(min=0)][ends]))
    options = torch.tensor(decoder.options, device=own.device).expand(ends.shape)[ends]
    out["own"] = F.cross_entropy(own, options, reduction="sum")
    out["own_n"] = ends.sum()
    inside = torch.arange(part.ids.shape[1] - 1, device=part.ids.device)[None] < part.lengths[:, None] - 1
    inside[rows, part.asked] = False
    text = decoder.head(hidden[:, :-1][inside])
    out["text"] = F.cross_entropy(text, part.ids[:, 1:][inside], reduction="sum")
    out["text_n"] = inside.sum()
    return out


def quiz_losses(decoder: Decoder, part: QuizRows, prefix: Prefix | None) -> tuple[dict[str, Tensor], Tensor]:
    """Mean losses of what is read from an image, many words in a row, and [Q] which words were right.

    `said`: the word; `read`: words that name something look at it; `tell`: a sentence's end looks at what it is about;
    `look`: whoever asks looks at those words. Only the blocks that find the word are run: half of the cost of whole
    rows, and several answers in each.
    """
    images = torch.arange(len(part.ids), device=part.ids.device)
    naming = torch.cat([part.naming, part.told[:, :2]])
    start = prefix.length if prefix is not None else 0
    looking = naming if len(naming) else None
    _, seen = decoder.rows(part.ids, prefix, images, part.at, part.row, looking, depth=LOOK + 1)
    said = decoder.say(seen["said"][part.row, part.at])
    out = {"said": F.cross_entropy(said, part.word)}
    if len(part.naming):
        out["read"] = _read(seen, part.seen, start)
    elif len(part.told):
        out["tell"] = _tell(seen, part.told)
    evidence = torch.cat([_padded(part.patches, start), part.support], dim=1)
    shown = evidence.any(1)
    if shown.any():
        out["look"] = -seen[LOOK][shown].masked_fill(~evidence[shown][:, None], -torch.inf).logsumexp(-1).mean()
    return out, said.argmax(-1) == part.word


def order_losses(
    decoder: Decoder, hints: Hints, ids: Tensor, row: Tensor, at: Tensor, place: Tensor
) -> dict[str, Tensor]:
    """What words [W] of rows [R, L] must tell before it is asked: their places [W] in the dictionary, in [0, 1).

    `order`: of any two, which comes first; `shelf`: about where each is.
    """
    told = hints.aux_place(decoder.early(ids)[row, at])
    ahead = told[None, :, 0] - told[:, None, 0]
    pairs = place[None] > place[:, None]
    shelf = F.cross_entropy(told[:, 1:], (place * SHELVES).long())
    return {"order": F.softplus(-ahead[pairs]).mean(), "shelf": shelf, "ordered": (ahead[pairs] > 0).float().mean()}


def _read(seen: Seen, patches: Tensor, start: int) -> Tensor:
    """Mean -log of the attention of words that name something on the patches [M, n] of it."""
    marks = _padded(patches, start)[:, None]
    return -seen[TELL, "told"][..., :start].masked_fill(~marks, -torch.inf).logsumexp(-1).mean()


def _tell(seen: Seen, told: Tensor) -> Tensor:
    """Mean -log of the attention of the ends of sentences [F, 3] on what those are about, in rows without an image."""
    return -seen[TELL, "told"][torch.arange(len(told), device=told.device), :, told[:, 2]].mean()


def drill_losses(decoder: Decoder, part: DrillRows) -> dict[str, Tensor]:
    """Loss of each kind over the answers of drills, summed, with counts and hits."""
    hidden, seen = decoder.rows(part.ids, None, None, part.at, part.row, part.told if len(part.told) else None)
    out: dict[str, Tensor] = {}
    logits = decoder.head(hidden[part.row, part.at])
    each = F.cross_entropy(logits, part.answer, reduction="none")
    hits = logits.argmax(-1) == part.answer
    queries = torch.arange(len(part.at), device=part.at.device)
    for name, block, mine in (("pick", PICK, part.option), ("look", LOOK, ~part.option)):
        if mine.any():
            mass = seen[block][queries, :, part.evidence].mean(1)
            out |= {name: -mass[mine].sum(), f"{name}_n": mine.sum(), f"{name}_hit": hits[mine].sum()}
    if len(part.told):
        out |= {"tell": _tell(seen, part.told) * len(part.told), "tell_n": torch.tensor(len(part.told))}
    values = ~part.option
    if values.any():
        said = decoder.say(seen["said"][part.row, part.at][values])
        out |= {"word": F.cross_entropy(said, part.answer[values], reduction="sum"), "word_n": values.sum()}
        out["word_hit"] = (said.argmax(-1) == part.answer[values]).sum()
    return out | {"letter": each.sum(), "letter_n": torch.tensor(len(each))}


def _padded(patches: Tensor, start: int) -> Tensor:
    """[R, N] patch marks as marks on the prefix, whose last N places are the patches."""
    return F.pad(patches, (start - patches.shape[1], 0)) if start else patches[:, :0]


@torch.no_grad()
def letters(decoder: Decoder, part: Chunk, prefix: Prefix | None) -> Tensor:
    """[R] index of the likeliest letter among those that a row offers."""
    hidden, _ = decoder.rows(part.ids, prefix, part.image, part.asked)
    rows = torch.arange(len(part.ids), device=part.ids.device)
    scores = decoder.head(hidden[rows, part.asked])[:, decoder.options]
    return scores.masked_fill(part.ends < 0, -torch.inf).argmax(-1)
