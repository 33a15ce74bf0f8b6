"""The text that the tokenizer is trained on."""

from __future__ import annotations

from tokenizers import Tokenizer

from qapbench.tasks.diagramqa.draw import icons
from qapbench.tasks.diagramqa.generate import sample

from .model import EOS, train_bpe
from .rows import HEAD, LETTERS, prompt_text


def build_bpe(seed: int, count: int = 6000) -> Tokenizer:
    """Train a byte-level BPE in which nearly every word that can be an answer is one token.

    Args:
        seed: seed of the training scenes.
        count: number of training scenes whose texts are used.
    """
    texts = [f" {name}" for name in icons() for _ in range(20)]
    for i in range(count):
        scene = sample(seed, i, "train")
        texts += scene.facts
        for question in scene.questions:
            texts.append(f"{HEAD}{prompt_text(question, scene.image is not None)} {LETTERS[question.answer]}{EOS}")
            texts += [f" {choice}" for choice in question.choices]
    return train_bpe(texts)
