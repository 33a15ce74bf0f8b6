"""Where the decoder starts: with the attention heads of key -> value look-up in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def _rows(n: int, d: int) -> torch.Tensor:
    """``n`` orthonormal random rows of length ``d``."""
    return torch.linalg.qr(torch.randn(d, n)).Q.T.contiguous()


def _set(linear: nn.Linear, rows: slice, cols: slice, value: torch.Tensor, noise: float = 0.1) -> None:
    """Rows and columns of a matrix; what else is in those rows becomes small noise."""
    linear.weight[rows].normal_(0, noise / math.sqrt(linear.in_features))
    linear.weight[rows, cols] = value


@torch.no_grad()
def place_lookup_heads(llava: Any) -> None:
    """Initialises the decoder so that look-up circuits need not be found by chance.

    "Which value belongs to this key" takes two heads in a row: one that carries the preceding tokens along,
    and one that finds an earlier place with the same preceding tokens.  A small decoder trained for an hour
    on two cores does not find the pair, so both start in place.  Of the residual stream, channel 0 starts
    as a constant, the following channels hold the token (content), the last 64 what precedes it: 32 the
    token one back (``one``), 32 the token two back (``two``).

    * Layer 0: head 0 attends one back, head 1 two back, through the rotary phase of the constant; each
      copies a 32-dimensional sketch of the content found there into its channels.
    * Layers 1 and 2: heads 0 and 2 attend to places whose ``two`` is my ``one`` ("k = v" from "k:") and head
      1 to places whose ``one`` is my content (classical induction), and copy content; head 3 attends to
      places whose content is my ``one`` and copies their ``two`` ("A. fox" from "fox:").

    Everything stays trainable and the architecture is the plain Llama one.
    """
    cfg = llava.config.text_config
    d, hd = cfg.hidden_size, cfg.head_dim
    content, one, two = slice(1, d - 2 * hd), slice(d - 2 * hd, d - hd), slice(d - hd, d)
    width = d - 2 * hd - 1
    const = 3.3
    emb = llava.get_input_embeddings().weight
    emb.zero_()
    emb[:, content].normal_(0, 0.5)
    emb[:, 0] = const
    proj = llava.model.multi_modal_projector
    for lin in (proj.linear_1, proj.linear_2):
        lin.weight.normal_(0, 1.0 / math.sqrt(lin.in_features))
        lin.bias.zero_()
    proj.linear_2.weight[0] = 0
    proj.linear_2.weight[d - 2 * hd :] = 0
    proj.linear_2.bias[0] = const
    # An untied head that starts as the (scaled) embeddings: copying a token is then half learnt.
    llava.lm_head.weight.copy_(emb * 0.1)
    llava.lm_head.weight[:, 0] = 0
    freqs = cfg.rope_parameters["rope_theta"] ** (-torch.arange(hd // 2) / (hd // 2))
    # Rotary pairs that hardly turn within a prompt can compare contents.
    slow = [j for j in range(hd // 2) if freqs[j] < 0.006]
    slow += [j + hd // 2 for j in slow]
    sketch = _rows(hd, width)
    for i, layer in enumerate(llava.model.language_model.layers):
        attn = layer.self_attn
        for lin in (attn.q_proj, attn.k_proj, attn.v_proj):
            lin.weight.normal_(0, 1.0 / math.sqrt(d))
        # Keys resemble queries (like attends to like) and outputs resemble inputs (what is read is copied).
        noise = torch.randn_like(attn.k_proj.weight) / math.sqrt(d)
        attn.k_proj.weight.copy_(0.8 * attn.q_proj.weight + 0.6 * noise)
        attn.o_proj.weight.copy_(0.3 * attn.v_proj.weight.T)
        for lin in (layer.mlp.gate_proj, layer.mlp.up_proj):
            lin.weight.normal_(0, 1.0 / math.sqrt(d))
        layer.mlp.down_proj.weight.normal_(0, 0.2 / math.sqrt(cfg.intermediate_size))
        copies = _rows(3 * hd, width).split(hd)
        for head in range((2, 4, 4)[i] if i < 3 else 0):
            rows = slice(head * hd, (head + 1) * hd)
            attn.o_proj.weight[:, rows] = 0
            if i == 0:
                q, k = torch.zeros(hd, 1), torch.zeros(hd, 1)
                # Only the four fastest rotary pairs tell neighbours apart.
                for j in range(4):
                    q[j], q[j + hd // 2] = math.cos(freqs[j] * (head + 1)), -math.sin(freqs[j] * (head + 1))
                    k[j] = 1.0
                _set(attn.q_proj, rows, slice(0, 1), q)
                _set(attn.k_proj, rows, slice(0, 1), k)
                _set(attn.v_proj, rows, content, sketch, 0.0)
                attn.o_proj.weight[(one, two)[head], rows] = torch.eye(hd) * 0.8
                continue
            match = torch.zeros(hd, hd)
            match[slow] = 1.6 * _rows(len(slow), hd)
            if head == 1:
                _set(attn.q_proj, rows, content, match @ sketch)
                _set(attn.k_proj, rows, one, match)
            else:
                _set(attn.q_proj, rows, one, match)
                _set(attn.k_proj, rows, *((content, match @ sketch) if head == 3 else (two, match)))
            if head < 3:
                _set(attn.v_proj, rows, content, copies[head])
                attn.o_proj.weight[content, rows] = copies[head].T
            else:
                _set(attn.v_proj, rows, two, torch.eye(hd))
                attn.o_proj.weight[content, rows] = sketch.T
