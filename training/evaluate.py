"""Evaluation of a checkpoint folder on a frozen split, by family, with nothing but transformers.

    python -m training.evaluate --model DIR --split tasks/diagramqa/test.parquet [--blank] [--json FILE]

The prompt is made by the processor's chat template. The answer is the option whose letter has the highest next-token
logit. With --blank, every image is replaced by a grey one; questions that are then still answered right do not need
the image.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

LETTERS = "ABCDE"
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson interval of a proportion; 95 % for the default `z`.

    Args:
        right: number of right answers.
        n: number of answers.
        z: quantile of the normal distribution.
    """
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    mid, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (mid - half) / d, (mid + half) / d


def prompt(processor: Any, row: Any) -> str:
    """Write the prompt for one row of the parquet file."""
    context = f"Context: {row.hint}\n" if row.hint else ""
    options = "\n".join(f"{LETTERS[i]}. {c}" for i, c in enumerate(row.choices))
    content = [{"type": "text", "text": f"{context}{row.question}\n{options}\n{INSTRUCTION}"}]
    if row.image is not None:
        content.insert(0, {"type": "image"})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.inference_mode()
def guesses(model: Any, processor: Any, frame: pd.DataFrame, blank: bool, batch: int) -> list[int]:
    """Answer the questions of a table: the index of the most likely option for each row."""
    texts = [prompt(processor, row) for row in frame.itertuples()]
    glue = "" if texts[0][-1].isspace() else " "  # an answer is separated from the chat template by one space
    letters = [processor.tokenizer.encode(f"{glue}{c}", add_special_tokens=False)[0] for c in LETTERS]
    has_image = [image is not None for image in frame.image]
    order = sorted(range(len(texts)), key=lambda i: (has_image[i], len(texts[i])))
    groups = [[i for i in order if has_image[i] is kind] for kind in (False, True)]
    out = [0] * len(texts)
    for group in groups:
        for s in range(0, len(group), batch):
            part = group[s : s + batch]
            images = None
            if has_image[part[0]]:
                images = [
                    Image.new("RGB", (96, 96), (128, 128, 128))
                    if blank
                    else Image.open(io.BytesIO(frame.image.iloc[i]["bytes"])).convert("RGB")
                    for i in part
                ]
            inputs = processor(images=images, text=[texts[i] for i in part], padding=True, return_tensors="pt").to(
                model.device
            )
            if images is not None:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            # Padding is on the left, so the answer is predicted at the last position of every row.
            logits = model(**inputs, logits_to_keep=1).logits[:, -1, letters].float()
            for i, row in zip(part, logits, strict=True):
                out[i] = int(row[: len(frame.choices.iloc[i])].argmax())
    return out


def evaluate(model: Any, processor: Any, frame: pd.DataFrame, blank: bool = False, batch: int = 32) -> dict:
    """Measure the accuracy over all questions, by modality and by family.

    Returns:
        For each group, the number of right answers, the number of questions, the accuracy, the ends of its 95 % Wilson
        interval, and the accuracy of guessing at random.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    chance: dict[str, float] = defaultdict(float)
    rows: Any = frame.itertuples()
    for row, guess in zip(rows, guesses(model, processor, frame, blank, batch), strict=True):
        modality = "text" if row.image is None else "image"
        for key in ("all", f"all {modality}", f"{modality}: {row.family}"):
            groups[key].append(guess == row.answer)
            chance[key] += 1 / len(row.choices)
    result = {}
    for key in sorted(groups):
        right, n = sum(groups[key]), len(groups[key])
        low, high = wilson(right, n)
        result[key] = {
            "right": right,
            "n": n,
            "accuracy": round(right / n, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "chance": round(chance[key] / n, 4),
        }
    return result


def main() -> None:
    """Run the command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=Path("qapbench/models/embedded/diagram-llava"))
    p.add_argument("--split", type=Path, default=Path("tasks/diagramqa/test.parquet"))
    p.add_argument("--blank", action="store_true")
    p.add_argument("--limit", type=int, default=0, help="only the first rows")
    p.add_argument("--dtype", default="float32", help="bfloat16 is the dtype of the file")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    processor = AutoProcessor.from_pretrained(args.model)
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    frame = pd.read_parquet(args.split)
    if args.limit:
        frame = frame.head(args.limit)
    result = evaluate(model, processor, frame, args.blank)
    for key, r in result.items():
        interval = f"{r['low']:.3f}-{r['high']:.3f}"
        print(f"| {key} | {r['n']} | {r['accuracy']:.3f} | {interval} | {r['chance']:.3f} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
