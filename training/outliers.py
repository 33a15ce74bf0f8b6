"""Measurement of outliers in the activations and visual tokens of a checkpoint, which make it hard to quantize.

    python -m training.outliers --model qapbench/models/embedded/diagram-llava [--questions 64]

The first table describes, for every block of the decoder, the inputs of the attention, of the MLP and of its down
projection, without the first token: the kurtosis over all values (3 for a normal distribution), the largest magnitude
divided by the median, and the RMS of the largest channel divided by that of the median channel; also the norm of the
first token divided by the median norm of the others. The second table describes the visual tokens after each block of
the vision tower and after the projector: the largest L2 norm in an image divided by the median, and the share of tokens
whose norm is larger than three medians.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from .evaluate import prompt


def describe(x: Tensor) -> dict[str, float]:
    """Measure how heavy the tails of activations [T, D] are."""
    x = x.double()
    centred = x - x.mean()
    channels = x.square().mean(0).sqrt()
    return {
        "kurtosis": float(centred.pow(4).mean() / centred.square().mean() ** 2),
        "max / median": float(x.abs().max() / x.abs().median()),
        "channel max / median": float(channels.max() / channels.median()),
    }


def norms(x: Tensor) -> dict[str, float]:
    """Measure the norms of tokens [B, N, D], relative to the median norm in their image."""
    size = x.double().norm(dim=-1)
    ratio = size / size.median(dim=1, keepdim=True).values
    return {
        "max / median": float(ratio.max(dim=1).values.mean()),
        "beyond 3 medians": float((ratio > 3).double().mean()),
    }


@torch.inference_mode()
def measure(model: Any, processor: Any, frame: pd.DataFrame) -> tuple[dict[str, dict], dict[str, dict]]:
    """Run the model on the questions of a table, one at a time, and measure its activations and visual tokens.

    Returns:
        The measures of activations and those of visual tokens, each by the place in the model.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda module, args, output: seen[name].append(output.float())

    handles = [model.model.multi_modal_projector.register_forward_hook(keep("tokens: projected"))]
    for i, block in enumerate(model.model.vision_tower.encoder.layers):
        handles.append(block.register_forward_hook(keep(f"tokens: tower block {i}")))
    for i, block in enumerate(model.model.language_model.layers):
        handles.append(block.input_layernorm.register_forward_hook(keep(f"block {i} attention")))
        handles.append(block.post_attention_layernorm.register_forward_hook(keep(f"block {i} mlp")))
        handles.append(
            block.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, i=i: seen[f"block {i} down"].append(args[0].float())
            )
        )
    rows: Any = frame.itertuples()
    for row in rows:
        image = Image.open(io.BytesIO(row.image["bytes"])).convert("RGB")
        model(**processor(images=image, text=prompt(processor, row), return_tensors="pt"))
    for handle in handles:
        handle.remove()
    activations, tokens = {}, {}
    for name, parts in seen.items():
        if name.startswith("tokens: "):
            states = torch.cat(parts)
            tokens[name.removeprefix("tokens: ")] = norms(states[:, 1:] if "tower" in name else states)
        else:
            first = torch.cat([part[0, :1] for part in parts])
            rest = torch.cat([part[0, 1:] for part in parts])
            ratio = float(first.norm(dim=-1).mean() / rest.norm(dim=-1).median())
            activations[name] = describe(rest) | {"first token norm / median": ratio}
    return activations, tokens


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qapbench/models/embedded/diagram-llava"))
    parser.add_argument("--split", type=Path, default=Path("tasks/diagramqa/test.parquet"))
    parser.add_argument("--questions", type=int, default=64)
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    frame = pd.read_parquet(args.split)
    frame = frame[frame.image.notna()].head(args.questions)
    for table in measure(model, AutoProcessor.from_pretrained(args.model), frame):
        names = list(next(iter(table.values())))
        print("| " + " | ".join(["place", *names]) + " |\n|" + " --- |" * (len(names) + 1))
        for place, values in table.items():
            print("| " + " | ".join([place, *(f"{values[name]:.2f}" for name in names)]) + " |")
        print()


if __name__ == "__main__":
    main()
