"""Forward passes and losses of the joint training: decoder, patch labels, patch relevance, captions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .data import COPY, FACT, LETTER, LM, WORD
from .model import IMAGE_ID, N_PATCHES

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
# The answer matters most, yet the dense targets are what makes look-up circuits form.
WEIGHTS = {LM: 0.3, LETTER: 1.0, WORD: 0.6, FACT: 0.7, COPY: 0.5}
NAMES = {LM: "lm", LETTER: "letter", WORD: "word", FACT: "fact", COPY: "copy"}
PROBE_LAYER = 4


class Heads(nn.Module):
    """Heads that exist only in training."""

    def __init__(self, width: int, text_width: int, n_names: int) -> None:
        super().__init__()
        self.aux_names = nn.Linear(width, n_names)
        self.aux_option = nn.Linear(text_width, 1)
        self.aux_scale = nn.Parameter(torch.tensor([2.3, 2.3]))
        self.aux_bias = nn.Parameter(torch.tensor([-1.0, -4.0]))


def vision_pass(llava: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of hidden state -2 and the CLS of the last layer."""
    x = (pixels.float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)
    out = llava.model.vision_tower(x, output_hidden_states=True)
    return out.hidden_states[-2][:, 1:], out.last_hidden_state[:, 0]


def prefix_cache(llava: Any, feats: Tensor, head: Tensor) -> DynamicCache:
    """Keys and values of ``<s>USER: <image>...`` for each image."""
    text = llava.get_input_embeddings()(head).to(feats.dtype).expand(len(feats), -1, -1)
    embeds = torch.cat([text, feats], 1)
    # Always an explicit mask: without mask and cache, positions are searched for packed sequences.
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    cache = DynamicCache()
    llava.model.language_model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


def row_hidden(llava: Any, chunk: dict[str, Tensor], prefix: Any) -> tuple[Tensor, Tensor]:
    """Last and two-thirds-depth hidden states of rows, each continuing the prefix of its image."""
    embeds = llava.get_input_embeddings()(chunk["ids"])
    mask, cache = chunk["mask"], None
    if prefix is not None:
        cache = DynamicCache()
        for i, layer in enumerate(prefix.layers):
            cache.update(layer.keys[chunk["image"]], layer.values[chunk["image"]], i)
        seen = mask.new_ones(len(mask), prefix.get_seq_length())
        mask = torch.cat([seen, mask], 1)
    out = llava.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        output_hidden_states=True,
    )
    return out.last_hidden_state, out.hidden_states[PROBE_LAYER]


def option_loss(heads: Heads, hidden: Tensor, right: Tensor) -> tuple[Tensor, int, int]:
    """Which option is right, read at the options themselves: loss summed over rows, hits, rows.

    Every option is judged where it stands, so that the answer's position only has to fetch a letter.
    """
    some = (right >= 0).any(1)
    score = heads.aux_option(F.rms_norm(hidden[some], hidden.shape[-1:])).float().squeeze(-1)
    score = score.masked_fill(right[some] < 0, -torch.inf)
    target = right[some].argmax(1)
    loss = F.cross_entropy(score, target, reduction="sum") if len(target) else score.sum()
    return loss, int((score.argmax(1) == target).sum()) if len(target) else 0, len(target)


def decoder_losses(llava: Any, heads: Heads, batch: dict[str, Any], patches: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Weighted next-token loss over all rows, and its mean per category."""
    feats = llava.model.multi_modal_projector(patches)
    prefix = prefix_cache(llava, feats, batch["head"])
    options, hits, asked = feats.new_zeros(()).float(), {True: 0, False: 0}, {True: 0, False: 0}
    hidden, targets, cats, image = [], [], [], []
    for kind, cache in (("image_rows", prefix), ("text_rows", None)):
        for chunk in batch[kind]:
            h, middle = row_hidden(llava, chunk, cache)
            loss, hit, n = option_loss(heads, middle, chunk["right"])
            options = options + loss
            hits[cache is not None] += hit
            asked[cache is not None] += n
            h = h[:, :-1]
            keep = chunk["cats"][:, 1:] > 0
            hidden.append(h[keep])
            targets.append(chunk["ids"][:, 1:][keep])
            cats.append(chunk["cats"][:, 1:][keep])
            image.append(torch.full_like(targets[-1], kind == "image_rows"))
    target, cat, is_image = torch.cat(targets), torch.cat(cats), torch.cat(image).bool()
    logits = llava.lm_head(torch.cat(hidden)).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    right = logits.argmax(-1) == target
    total = options / max(1, sum(asked.values()))
    parts: dict[str, float] = {"option": float(total.detach())}
    parts |= {f"option_{'image' if k else 'text'}_acc": hits[k] / max(1, asked[k]) for k in hits}
    # Patches speak the decoder's language: a thing's patches resemble the embedding of its name.
    names = batch["patch_names"]
    thing = names > 0
    speak = F.rms_norm(feats[thing], feats.shape[-1:]) @ llava.get_input_embeddings().weight.T.to(feats.dtype)
    spoken = batch["name_tokens"][names[thing]]
    log_p = F.log_softmax(speak.float() * 0.1, -1)
    aligned = -log_p.gather(1, spoken).mean()
    total = total + 0.5 * aligned
    parts["aligned"] = float(aligned.detach())
    for c, weight in WEIGHTS.items():
        at = cat == c
        if not at.any():
            continue
        mean = losses[at].mean()
        total = total + weight * mean
        parts[NAMES[c]] = float(mean.detach())
        if c in (LETTER, COPY):
            parts[f"{NAMES[c]}_acc"] = float(right[at].float().mean())
        if c in (LETTER, WORD, FACT) and (at & is_image).any():
            parts[f"{NAMES[c]}_image_acc"] = float(right[at & is_image].float().mean())
    return total, parts


def clip_losses(
    clip: Any, heads: Heads, batch: dict[str, Any], patches: Tensor, cls: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Patch names, relevance of patches to a text, and captions against CLS."""
    n = len(patches)
    names = batch["patch_names"]
    weight = torch.ones(heads.aux_names.out_features, device=names.device)
    weight[0] = 0.1
    label = F.cross_entropy(heads.aux_names(patches).float().flatten(0, 1), names.flatten(), weight)
    vision = clip.vision_model
    local = F.normalize(clip.visual_projection(vision.post_layernorm(patches)).float(), dim=-1)
    whole = F.normalize(clip.visual_projection(vision.post_layernorm(cls)).float(), dim=-1)
    text = clip.get_text_features(input_ids=batch["clip_ids"], attention_mask=batch["clip_mask"])
    question, caption, name = F.normalize(text.pooler_output.float(), dim=-1).split(n)
    scale, bias = heads.aux_scale.exp(), heads.aux_bias

    def balanced(logit: Tensor, positive: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
        pos = (each * positive).sum(1) / positive.sum(1).clamp(min=1)
        return (pos + (each * ~positive).sum(1) / (~positive).sum(1).clamp(min=1)).mean()

    # A question's text is compared within its own image: elsewhere its "top left" may be as relevant.
    own = torch.einsum("nd,npd->np", question, local) * scale[0] + bias[0]
    relevant = batch["positives"]
    some = relevant.any(1)
    relevance = balanced(own[some], relevant[some]) if some.any() else own.new_zeros(())
    every = name @ local.flatten(0, 1).T * scale[1] + bias[1]
    same = (names.flatten()[None] == batch["named"][:, None]) & (batch["named"] > 0)[:, None]
    naming = balanced(every, same)
    pair = whole @ caption.T * clip.logit_scale.exp().clamp(max=100)
    target = torch.arange(n, device=pair.device)
    contrast = (F.cross_entropy(pair, target) + F.cross_entropy(pair.T, target)) / 2
    total = 0.5 * label + 0.5 * relevance + 0.3 * naming + 0.2 * contrast
    with torch.no_grad():
        parts = {
            "patch": float(label),
            "relevance": float(relevance),
            "naming": float(naming),
            "caption": float(contrast),
            "caption_acc": float((pair.argmax(1) == target).float().mean()),
        }
    return total, parts


@torch.no_grad()
def option_scores(llava: Any, ids: list[list[int]], pixels: Tensor | None, letters: list[int]) -> Tensor:
    """Logits of the option letters after each prompt; one image per prompt, or none at all."""
    width = max(map(len, ids))
    tokens = torch.zeros(len(ids), width, dtype=torch.long)
    for r, row in enumerate(ids):
        tokens[r, : len(row)] = torch.tensor(row)
    last = torch.tensor([len(r) - 1 for r in ids])
    embeds = llava.get_input_embeddings()(tokens)
    if pixels is not None:
        patches, _ = vision_pass(llava, pixels)
        feats = llava.model.multi_modal_projector(patches)
        embeds = embeds.masked_scatter((tokens == IMAGE_ID).unsqueeze(-1), feats.to(embeds.dtype))
        assert int((tokens == IMAGE_ID).sum()) == len(ids) * N_PATCHES
    hidden = llava.model.language_model(
        inputs_embeds=embeds, attention_mask=(tokens != 0).long(), use_cache=False
    ).last_hidden_state
    return llava.lm_head(hidden[torch.arange(len(ids)), last]).float()[:, letters]
