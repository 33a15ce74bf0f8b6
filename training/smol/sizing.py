"""Estimates for the training of `smol-llava`: FLOPs, samples per second, memory, and the size of the trained parts.

    python -m training.smol.sizing
    python -m training.smol.sizing --count 200 --start runs/smol-start     # content of packs, and time to draw one

The forward pass counts as 2 FLOPs per weight and token. The gradients of activations count as much again, and so do the
gradients of weights, if the weights are trained. Attention is counted as if the mask of a pack hid nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.labels import Labeller, find_slots

from .model import RANK
from .packs import LENGTH, LETTER, PAD, Packs, Wording

PEAK = 989e12
"""FLOP/s of an H100 (SXM) in dense bfloat16, according to its data sheet."""
SHARE = 0.15
"""Share of the peak that is assumed. Eager PyTorch at width 576 spends most of its time outside of matrix products."""
MINUTES = 20
BATCH = 24  # packs per step
CHATS = 7.8
"""Chats per pack, as measured with --count."""


@dataclass(frozen=True)
class Decoder:
    """The sizes of a Llama; by default those of SmolLM2-135M.

    Attributes:
        width: width of the hidden states.
        inner: width of the MLP.
        layers: number of blocks.
        kv: width of the keys, over all heads.
        vocabulary: number of tokens.
    """

    width: int = 576
    inner: int = 1536
    layers: int = 30
    kv: int = 192
    vocabulary: int = 49216

    @property
    def linears(self) -> int:
        """Number of weights of all linear layers in the blocks."""
        return self.layers * (2 * self.width**2 + 2 * self.width * self.kv + 3 * self.width * self.inner)

    def lora(self, rank: int) -> int:
        """Number of weights of LoRA on all linear layers in the blocks."""
        attention = 2 * (2 * self.width) + 2 * (self.width + self.kv)
        return self.layers * rank * (attention + 3 * (self.width + self.inner))

    def forward(self, tokens: int) -> float:
        """FLOPs of the forward pass of a row of `tokens` tokens, without the head."""
        return 2 * self.linears * tokens + 4 * self.layers * tokens**2 * self.width


@dataclass(frozen=True)
class Tower:
    """The sizes of a CLIP vision tower whose MLP has four times its width; by default those of `diagram-llava`.

    Attributes:
        width: width of the hidden states.
        layers: number of blocks.
        image: side of an image in pixels.
        patch: side of a patch in pixels.
    """

    width: int = 160
    layers: int = 5
    image: int = 96
    patch: int = 8

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return (self.image // self.patch) ** 2

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        block = 12 * self.width**2 + 13 * self.width  # four projections, MLP, their biases, two norms
        around = 3 * self.patch**2 * self.width + (self.tokens + 2) * self.width + 4 * self.width
        return self.layers * block + around

    def projector(self, width: int) -> int:
        """Number of parameters of a projector of two layers whose output has width `width`."""
        return (self.width + 1) * width + (width + 1) * width

    def forward(self) -> float:
        """FLOPs of the forward pass of one image."""
        tokens = self.tokens + 1
        return 2 * self.layers * 12 * self.width**2 * tokens + 4 * self.layers * tokens**2 * self.width


def table() -> str:
    """Write the estimates as a Markdown table with one column per vision tower."""
    decoder = Decoder()
    towers = {"diagram-llava's": Tower(), "wider, 144 tokens": Tower(320, 8), "wider, 256 tokens": Tower(320, 8, 128)}
    text_companion = 1.0e6  # roughly the number of weights of the CLIP text tower and projections of `diagram-llava`
    rows: dict[str, list[str]] = {}

    def add(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    for tower in towers.values():
        longer = tower.tokens - Tower().tokens  # a larger grid makes packs longer, for the same chats
        length = LENGTH + longer
        forward = decoder.forward(length)
        answers = 2 * decoder.vocabulary * decoder.width * 80
        eyes = 3 * tower.forward() + 6 * tower.projector(decoder.width) * tower.tokens
        joint = 2 * forward + 2 * answers + 3 * 2 * decoder.lora(RANK) * length + eyes
        first = 2 * forward + 2 * answers + eyes
        packs = PEAK * SHARE / joint
        shipped = tower.parameters + tower.projector(decoder.width) + decoder.lora(RANK) + text_companion
        add("vision tower, million weights", f"{tower.parameters / 1e6:.2f}")
        add("projector, million weights", f"{tower.projector(decoder.width) / 1e6:.2f}")
        add(f"LoRA of rank {RANK}, million weights", f"{decoder.lora(RANK) / 1e6:.2f}")
        add("trained parts in bfloat16, MB", f"{2 * shipped / 1e6:.1f}")
        add("tokens per pack", f"{length}")
        add("projector stage, GFLOPs per pack", f"{first / 1e9:.0f}")
        add("joint stage, GFLOPs per pack", f"{joint / 1e9:.0f}")
        add("joint stage, GFLOPs per sample (one chat)", f"{joint / CHATS / 1e9:.0f}")
        add(f"packs/s at {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s", f"{packs:.0f}")
        add("samples/s", f"{packs * CHATS:.0f}")
        add(f"steps of {BATCH} packs in {MINUTES} minutes", f"{packs * 60 * MINUTES / BATCH:,.0f}")
        add(f"million samples in {MINUTES} minutes", f"{packs * CHATS * 60 * MINUTES / 1e6:.2f}")
        # Per token and block, in bfloat16: residual stream, norms, four projections of attention, gate and up
        # projections and their product, and again the inputs of LoRA.
        activations = decoder.layers * (14 * decoder.width + 6 * decoder.inner) * 2 * length * BATCH
        add("activations of a step, GB", f"{activations / 1e9:.0f}")
    head = f"| | {' | '.join(towers)} |\n|---|{'--:|' * len(towers)}\n"
    return head + "\n".join(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())


def count(start: Path, packs: int) -> str:
    """Measure the content of packs with the real tokenizer, and the CPU time to draw them.

    Args:
        start: a folder that was written by `training.smol.model`.
        packs: number of packs to draw.

    Returns:
        One sentence with the results.
    """
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(start)
    wording = Wording(processor.tokenizer, processor.chat_template, Tower().tokens)
    data = Packs(wording, Labeller(find_slots(0, 300)), seed=1)
    began = time.process_time()
    drawn = [data[i] for i in range(packs)]
    spent = (time.process_time() - began) / packs
    chats = sum(int(pack["segment"].max()) for pack in drawn) / packs
    letters = sum(int((pack["kind"] == LETTER).sum()) for pack in drawn) / packs
    due = sum(int((pack["kind"] > 0).sum()) for pack in drawn) / packs
    full = sum(int((pack["segment"] != PAD).sum()) for pack in drawn) / packs / LENGTH
    return (
        f"{packs} packs: {chats:.2f} chats ({letters:.2f} of them questions answered by letter), {due:.0f} targets, "
        f"{full:.0%} of {LENGTH} tokens filled, {1e3 * spent:.1f} ms of CPU to draw one"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=0, help="measure so many packs, instead of estimating")
    parser.add_argument("--start", type=Path, default=Path("runs/smol-start"))
    args = parser.parse_args()
    print(count(args.start, args.count) if args.count else table())


if __name__ == "__main__":
    main()
