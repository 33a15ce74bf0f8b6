"""Synthetic look-up text: random words as keys, values and options."""

from __future__ import annotations

import numpy as np

Pieces = list[tuple[str, bool]]
"""(piece of text, is it determined by what came before)."""


def synthetic(rng: np.random.Generator, words: list[str]) -> Pieces:
    """Key-value look-up text, as (piece, is the piece determined by what came before).

    Look-up circuits form only under dense targets: a dozen determined pieces in a row of a hundred tokens.
    """
    n = int(rng.integers(3, 9))
    picked = [words[i] for i in rng.permutation(len(words))[: 2 * n]]
    keys, values = picked[:n], picked[n:]
    out: Pieces = []
    kind = int(rng.integers(6))
    if kind > 3:
        return two_hops(rng, picked)
    if kind == 3:  # options: content -> letter, the letter standing before the content
        keys, values = picked[: min(n, 5)], [f"{c}" for c in "ABCDE"[: min(n, 5)]]
        out = [(f"\n{v}. {k}", False) for k, v in zip(keys, values, strict=True)] + [("\n", False)]
    else:
        link, sep = [(" =", ","), (" is", "."), (" has", " and")][kind]
        for k, v in zip(keys, values, strict=True):
            out += [(f" {k}{link} {v}{sep}", False)]
    table = list(zip(keys, values, strict=True))
    for _ in range(2 if kind != 3 else 3):
        for i in rng.permutation(len(table)):
            k, v = table[i]
            if kind != 3 and rng.random() < 0.3:
                out += [(f" {v}?", False), (f" {k}", True), (";", False)]
            else:
                out += [(f" {k}:", False), (f" {v}", True), (";", False)]
    return out


def two_hops(rng: np.random.Generator, words: list[str]) -> Pieces:
    """Key -> value -> letter of the option that shows the value: what a question with options asks for."""
    n = min(len(words) // 2, int(rng.integers(2, 6)))
    keys, values = words[:n], words[n : 2 * n]
    out = [(f" {keys[i]} = {values[i]},", False) for i in rng.permutation(n)]
    options = rng.permutation(n)
    out += [(f"\n{'ABCDE'[place]}. {values[i]}", False) for place, i in enumerate(options)] + [("\n", False)]
    letter = {int(i): f" {'ABCDE'[place]}" for place, i in enumerate(options)}
    for _ in range(2):
        for i in map(int, rng.permutation(n)):
            how = rng.random()
            if how < 0.25:
                out += [(f" {keys[i]} =", False), (f" {values[i]}", True), (",", False)]
            else:
                out += [(f" {values[i] if how < 0.45 else keys[i]}?", False), (letter[i], True), (",", False)]
    return out
