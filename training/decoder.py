"""The forward pass of the decoder in training, in which several rows share the prefix of one image, and the losses.

The result is that of `LlamaForCausalLM`, which a test checks. There are two differences in how it is computed: the keys
and values of an image are computed once for all questions about it, and the attention of a few positions is recorded.
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
"""Indices of blocks whose attention is trained directly.

In TELL, a word should attend to what it goes with: to the word that its sentence is about, or to the patches that it
names. In LOOK, the position of the answer should attend to the evidence, and in PICK to the right option. The word of
the answer is predicted from the output of LOOK. Without these hints, the two look-ups (from question to answer, and
from answer to letter) were not learnt within the time that is affordable on a CPU.
"""
HINTED_HEADS = 2  # number of heads per block whose attention is trained directly
SHELVES = 32  # number of equal parts that the dictionary is divided into
FAMILIES = {name: i for i, name in enumerate([EASY, HARD, *image_families(), *text_families()])}
Seen = dict[Any, Any]
"""What a forward pass records: log-attention by block, the states after LOOK ("said"), and whose attention it is."""


class Hints(nn.Module):
    """Modules that exist only in training, and a record of how well each family of questions is answered.

    Attributes:
        aux_judge: scores an option, from the state of its last token.
        aux_place: predicts the position of a word in the dictionary, as a number and as one of SHELVES parts.
        pace: [families] running share of right answers, which decides what is asked next.
    """

    pace: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.aux_judge = nn.Linear(width, 1)
        self.aux_place = nn.Linear(width, 1 + SHELVES)
        self.register_buffer("pace", torch.zeros(len(FAMILIES)))

    def of(self, family: str) -> float:
        """Running share of right answers in a family."""
        return float(self.pace[FAMILIES[family]])

    def mark(self, hits: Tensor, families: Sequence[str]) -> None:
        """Update the running shares.

        Args:
            hits: [Q] bool, which questions were answered right.
            families: the family of each question.
        """
        which = torch.tensor([FAMILIES[family] for family in families])
        for family in which.unique():
            mine = which == family
            self.pace[family].lerp_(hits[mine].float().mean(), 0.01 * min(5, int(mine.sum())))

    def draw(self, families: Sequence[str], rng: np.random.Generator) -> str:
        """Draw a family. The lower its running share of right answers, the more likely it is drawn."""
        weights = np.array([1.1 - self.of(family) for family in families])
        return families[int(rng.choice(len(families), p=weights / weights.sum()))]


@dataclass
class Prefix:
    """Keys and values of what comes before the rows.

    Attributes:
        keys: [B, heads, P, d] for each block.
        values: [B, heads, P, d] for each block.
        span: number of positions that the prefix occupies; more than P if some patches of an image are left out.
    """

    keys: list[Tensor]
    values: list[Tensor]
    span: int = 0

    @property
    def length(self) -> int:
        """P, the number of keys."""
        return self.keys[0].shape[2] if self.keys else 0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary position embedding to queries or keys."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


class Decoder:
    """The language model of a `LlavaForConditionalGeneration`, with a forward pass for training.

    Args:
        llava: the model.
        options: token ids of the option letters, as they occur in answers.
    """

    def __init__(self, llava: Any, options: list[int]) -> None:
        self.options = options
        self.core, self.head = llava.model.language_model, llava.lm_head
        self.heads = self.core.config.num_attention_heads

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids [...]: [..., D]."""
        return self.core.embed_tokens(ids)

    def say(self, states: Tensor) -> Tensor:
        """Predict a word from states [..., D] after a block in the middle: [..., V] logits.

        The states are compared to the embeddings of words. A word that is predicted there therefore looks, to later
        blocks, like a word in the text.
        """
        return F.rms_norm(states, states.shape[-1:]) @ self.core.embed_tokens.weight.T * 0.2

    def prefix(
        self, embeds: Tensor, depth: int | None = None, positions: Tensor | None = None, span: int | None = None
    ) -> Prefix:
        """Compute the keys and values of a prefix.

        Args:
            embeds: [B, P, D] embeddings.
            depth: number of blocks to run; None for all.
            positions: [B, P] positions of the embeddings; None if they are consecutive.
            span: number of positions that the prefix occupies; None for P.
        """
        out = Prefix([], [], span or embeds.shape[1])
        self._blocks(embeds, None, None, out, {}, depth, positions)
        return out

    def early(self, ids: Tensor) -> Tensor:
        """Run the blocks before LOOK on rows [R, L] of token ids: [R, L, D] normalised states."""
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
        """Run rows that continue prefixes.

        Args:
            ids: [R, L] token ids, padded on the right, where causal attention never sees the padding.
            prefix: the prefixes; None for text-only rows.
            image: [R] index of the prefix that each row continues; None for text-only rows.
            asked: [Q] position in its row of each token whose attention is recorded.
            row: [Q] row of each of these tokens; None if there is one in every row, in order.
            told: [F, 2 or more] row and position of further tokens whose attention is recorded, under separate keys.
            depth: number of blocks to run; None for all.

        Returns:
            [R, L, D] final states, and what was recorded.
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
    """Log-attention of some tokens to all positions.

    Args:
        q: [R, heads, L, d] queries.
        k: [R, heads, P + L, d] keys.
        asked: [Q] positions of the tokens in their rows.
        start: P, the length of the prefix.
        row: [Q] rows of the tokens; None if there is one in every row, in order.

    Returns:
        [Q, HINTED_HEADS, P + L].
    """
    query = q[torch.arange(len(q), device=q.device) if row is None else row, :HINTED_HEADS, asked]
    k = k[:, :HINTED_HEADS] if row is None else k[row, :HINTED_HEADS]
    logits = torch.einsum("rhd,rhld->rhl", query, k) / q.shape[-1] ** 0.5
    later = torch.arange(k.shape[2], device=q.device)[None] > (start + asked)[:, None]
    return logits.masked_fill(later[:, None], -torch.inf).log_softmax(-1)


# Weights of the losses that `losses` and `drill_losses` return.
WEIGHTS = {
    "letter": 1.0,
    "word": 1.0,
    "look": 0.3,
    "pick": 0.3,
    "tell": 0.2,
    "read": 0.3,
    "judge": 0.3,
    "own": 0.3,
    "text": 0.1,
}


def losses(decoder: Decoder, hints: Hints, part: Chunk, prefix: Prefix | None) -> dict[str, Tensor]:
    """Losses on whole questions, as sums.

    Args:
        decoder: the decoder.
        hints: modules that exist only in training.
        part: the rows.
        prefix: the prefixes that the rows continue; None for text-only rows.

    Returns:
        These losses: `letter`, of the answer's letter; `word`, of its word after LOOK; `look`, of the attention to the
        evidence; `read`, of the attention of words to the patches that they name; `pick`, of the attention to the right
        option; `judge`, of judging the options; `own`, of predicting an option's own letter at its end; `text`, of all
        other tokens. Some of them have a count under the same name with `_n`, by which the sum has to be divided;
        the others are sums over rows. `hit` [R] tells which letters were right; `word_hit` and `judge_hit` are numbers
        of right predictions.
    """
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
    """Losses on quizzes, as means.

    Only the blocks up to LOOK are run, which predict the word of the answer. That costs half of what whole rows cost,
    and every row has several answers.

    Args:
        decoder: the decoder.
        part: the rows, of which row i continues prefix i.
        prefix: the prefixes; None for text-only rows.

    Returns:
        The losses, and [Q] which words were right. The losses are `said`, of the word; `read`, of the attention of
        words to the patches that they name; `tell`, of the attention of a sentence's end to what the sentence is about;
        `look`, of the attention of the answer's position to the evidence.
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
    """Losses on predicting, from the states before LOOK, where words are in the dictionary.

    Args:
        decoder: the decoder.
        hints: modules that exist only in training.
        ids: [R, L] rows of words.
        row: [W] row of each word.
        at: [W] position of each word's last token.
        place: [W] position of each word in the dictionary, in [0, 1).

    Returns:
        The mean losses `order`, of which one of two words comes first, and `shelf`, of the part of the dictionary that
        a word is in; and `ordered`, the share of pairs whose order is right.
    """
    told = hints.aux_place(decoder.early(ids)[row, at])
    ahead = told[None, :, 0] - told[:, None, 0]
    pairs = place[None] > place[:, None]
    shelf = F.cross_entropy(told[:, 1:], (place * SHELVES).long())
    return {"order": F.softplus(-ahead[pairs]).mean(), "shelf": shelf, "ordered": (ahead[pairs] > 0).float().mean()}


def _read(seen: Seen, patches: Tensor, start: int) -> Tensor:
    """Mean negative log-attention of M words in block TELL to the patches [M, n] that they name."""
    marks = _padded(patches, start)[:, None]
    return -seen[TELL, "told"][..., :start].masked_fill(~marks, -torch.inf).logsumexp(-1).mean()


def _tell(seen: Seen, told: Tensor) -> Tensor:
    """Mean negative log-attention of the ends of sentences to what these are about, in rows without an image.

    Args:
        seen: what the forward pass recorded.
        told: [F, 3] row of each sentence, and the positions of its end and of what it is about.
    """
    return -seen[TELL, "told"][torch.arange(len(told), device=told.device), :, told[:, 2]].mean()


def drill_losses(decoder: Decoder, part: DrillRows) -> dict[str, Tensor]:
    """Losses on drills, as sums over answers.

    Returns:
        The losses `letter`, of the answer, and, as in `losses` and `quiz_losses`, `pick`, `look`, `tell` and `word`.
        Each has a count under the same name with `_n`; `pick`, `look` and `word` have the number of right answers under
        the same name with `_hit`.
    """
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
    """Extend marks [R, N] on patches to marks [R, start] on the prefix, whose last N positions are the patches."""
    return F.pad(patches, (start - patches.shape[1], 0)) if start else patches[:, :0]


@torch.no_grad()
def letters(decoder: Decoder, part: Chunk, prefix: Prefix | None) -> Tensor:
    """Answer the questions: [R] index of the most likely letter among the options that a row has."""
    hidden, _ = decoder.rows(part.ids, prefix, part.image, part.asked)
    rows = torch.arange(len(part.ids), device=part.ids.device)
    scores = decoder.head(hidden[rows, part.asked])[:, decoder.options]
    return scores.masked_fill(part.ends < 0, -torch.inf).argmax(-1)
