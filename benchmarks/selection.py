"""Speed of every pruner's selection of tokens, and of CDPruner compared to a plain transcription of the published code.

    python -m benchmarks.selection

CDPruner is also compared to one matrix product that it cannot avoid. Everything runs on one thread. A time is the best
of several repeats, of the thread's own CPU time, which other work on the machine affects least. Only ratios within one
run are meaningful.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, VisionTokens, pruners

COUNT, WIDTH, PATCH, JOINT, SIDE, WORDS = 576, 4096, 1024, 768, 24, 40  # LLaVA-1.5 7B with CLIP ViT-L/14-336
KINDS = {"random": "tokens independent", "alike": "twelve groups and a common direction, as images have"}


def plain_cdpruner(tokens: VisionTokens, keep: int) -> Tensor:
    """Select tokens as the released code of CDPruner does: [B, keep] indices.

    It computes the relevance, the kernel, and the greedy MAP of all images of a batch in parallel.
    """
    image = normalize(tokens.require("image_embeds", "benchmark"), dim=-1)
    text = normalize(tokens.require("text_embeds", "benchmark"), dim=-1)
    relevance = -(image @ text.mT).mean(dim=-1)
    low, high = relevance.aminmax(dim=-1, keepdim=True)
    relevance = (relevance - low + 1e-6) / (high - low)
    unit = normalize(tokens.projected, dim=-1)
    kernel = relevance.unsqueeze(2) * (unit @ unit.mT) * relevance.unsqueeze(1)
    batch = torch.arange(len(kernel))
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    found, vectors = [], kernel.new_zeros(keep, *gain.shape)
    for step in range(keep):
        best = gain.argmax(dim=-1)
        found.append(best)
        known = torch.einsum("sb,sbn->bn", vectors[:step, batch, best], vectors[:step])
        vectors[step] = (kernel[batch, best] - known) / gain[batch, best].sqrt().unsqueeze(-1)
        gain = gain - vectors[step].square()
        gain[batch, best] = -torch.inf
    return torch.stack(found, dim=1).sort(dim=-1).values


def kernel_matmul(tokens: VisionTokens) -> Tensor:
    """The matrix product that a kernel of all pairs of tokens needs: [B, N, N]."""
    return tokens.projected @ tokens.projected.mT


def make_tokens(batch: int, kind: str, seed: int = 0) -> VisionTokens:
    """Draw random tokens of the shapes of LLaVA-1.5 7B, with everything that any pruner needs.

    Args:
        batch: number of images.
        kind: one of KINDS.
        seed: seed of the random numbers.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draw)

    projected = normal(COUNT, WIDTH)
    if kind == "alike":
        group = torch.randint(0, 12, (COUNT,), generator=draw)
        projected = 0.3 * projected + normal(12, WIDTH)[:, group] + normal(1, WIDTH)
    attention: dict[str, Any] = {
        name: normal(COUNT).softmax(dim=-1)
        for name in (
            "cls_attention",
            "last_cls_attention",
            "attention_received",
            "middle_attention_received",
            "shallow_cls_attention",
            "query_attention",
            "context_attention",
        )
    }
    return VisionTokens(
        projected,
        patches=normal(COUNT, PATCH),
        keys=normal(COUNT, PATCH),
        heads=16,
        cls_token=normal(PATCH),
        image_embeds=normal(COUNT, JOINT),
        text_embeds=normal(1, JOINT),
        prompt_embeds=normal(WORDS, WIDTH),
        last_keys=normal(COUNT, PATCH),
        text_attention=normal(COUNT, WORDS).softmax(dim=1),
        rotated_keys=normal(COUNT, WIDTH),
        text_keys=normal(WORDS, WIDTH),
        final_states=projected,
        text_states=normal(WORDS, WIDTH),
        embedded=projected,
        downsampled=normal(WIDTH, 6, 6),
        grid=(SIDE, SIDE),
        image_ids=tuple(map(str, range(batch))),
        **attention,
    )


def fastest(calls: Mapping[str, Callable[[], Tensor]], repeats: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Run all calls in turn, several times. Returns the least milliseconds and the last result of each call."""
    best, given = dict.fromkeys(calls, float("inf")), {}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.thread_time()
            given[name] = call()
            best[name] = min(best[name], (time.thread_time() - started) * 1e3)
    return best, given


def kept(pruner: Pruner, tokens: VisionTokens, keep: int) -> Tensor:
    """[B, keep] indices of the tokens that the pruner selects."""
    return pruner.select(tokens, keep).indices


def cdpruner(repeats: int) -> Table:
    """Compare CDPruner to its plain transcription, for both kinds of tokens, two batch sizes and three budgets."""
    table = Table("tokens", "batch", "whole matmul ms", "keep", "plain ms", "ours ms", "plain / ours", "same tokens")
    ours = pruners.create("cdpruner")
    for kind in KINDS:
        for batch in (1, 8):
            tokens = make_tokens(batch, kind)
            calls: dict[str, Callable[[], Tensor]] = {"matmul": functools.partial(kernel_matmul, tokens)}
            for keep in (128, 64, 32):
                calls[f"plain {keep}"] = functools.partial(plain_cdpruner, tokens, keep)
                calls[f"ours {keep}"] = functools.partial(kept, ours, tokens, keep)
            took, given = fastest(calls, repeats)
            for keep in (128, 64, 32):
                plain, own = took[f"plain {keep}"], took[f"ours {keep}"]
                same = (given[f"plain {keep}"] == given[f"ours {keep}"]).float().mean()
                row = [f"{took['matmul']:.1f}", str(keep), f"{plain:.1f}", f"{own:.1f}", f"{plain / own:.1f}"]
                table.add_row(kind, str(batch), *row, f"{same:.1%}")
    return table


def every_pruner(repeats: int, keep: int) -> Table:
    """Measure all pruners on one image."""
    tokens = make_tokens(1, "random")
    table = Table("pruner", f"ms per image, keep {keep}")
    calls = {name: functools.partial(kept, pruners.create(name), tokens, keep) for name in pruners.names()}
    for name, took in fastest(calls, repeats)[0].items():
        table.add_row(name, f"{took:.2f}")
    return table


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repeats, of which the best counts.")] = 5,
    keep: Annotated[int, typer.Option(min=1, max=COUNT - 1, help="Tokens to keep, in the table of all pruners.")] = 32,
) -> None:
    """Measure the time of the selection alone, with N=576, D=4096 and C=1024 in float32."""
    torch.set_num_threads(1)
    console = Console()
    console.print(every_pruner(repeats, keep))
    console.print(f"CDPruner beside a plain transcription; {KINDS}", highlight=False)
    console.print(cdpruner(repeats))


if __name__ == "__main__":
    typer.run(main)
