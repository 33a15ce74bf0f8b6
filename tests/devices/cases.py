"""Answers of a tiny LLaVA on one far device and spread over two, method by method: one line of JSON for each case.

Run by `test_spread.py` in a process of its own: `python -m tests.devices.cases FOLDER [CASE ...]`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.devices.far import Mixed, devices, spread

# isort: split
from transformers import AutoModelForImageTextToText, AutoProcessor

from qapbench import compress
from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.kinds import pruners
from qapbench.running.execute import make_runs
from qapbench.running.settings import Settings
from qapbench.spec.run_spec import RunSpec
from tests.models.llava_checkpoints import THREE, batch_of, picture, save_clip, save_llava

LAYERS = 4
BITS: dict[str, Any] = {"weights": {"bits": 4}, "activations": {"bits": 4}}
WHOLE_TENSOR = {**BITS, "activations": {"bits": 8, "granularity": "tensor"}}  # padding and dropped tokens count
EVERYWHERE = ["language", "projector", "vision"]
FRONT = ("cdpruner", "visionzip", "mmtok")


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the cases -> what of a spec they compress by."""
    yield "dense", {}
    yield "rtn", {"quantize": {"method": "rtn", "scope": EVERYWHERE, **BITS}}
    yield "rtn packed", {"quantize": {"method": "rtn", "storage": "packed", **BITS}}
    yield "quarot", {"quantize": {"method": {"quarot": {"rounding": "rtn"}}, "activations": {"bits": 4}}}
    yield "smoothquant", {"quantize": {"method": "smoothquant", "calibration": {"samples": 1}, **BITS}}
    yield "kv", {"quantize": {"method": "rtn", "kv": {"keys": {"bits": 4}, "values": {"bits": 4}}, **BITS}}
    for name in pruners.names():
        if name in FRONT or isinstance(pruners.create(name), DecoderPruner):
            yield name, {"prune": {"method": name, "keep": 5}}
    yield (
        "fastv of rtn",
        {
            "prune": {"method": "fastv", "keep": 5},
            "quantize": {"method": "rtn", **WHOLE_TENSOR, "kv": {"keys": {"bits": 4}, "values": {"bits": 4}}},
        },
    )


def answers(model: Any, spec: dict[str, Any], processor: Any, where: torch.device) -> list[torch.Tensor]:
    """Logits of two padded prompts, and some generated tokens if the case quantizes a KV cache or nothing."""

    def placed(text: str, seed: int) -> dict[str, Any]:
        return {name: value.to(where) for name, value in batch_of(processor, [text], [picture(seed)]).items()}

    two = batch_of(processor, [THREE[0], THREE[2]], [picture(0), picture(1)])
    prompts = {name: value.to(where) for name, value in two.items()}
    with torch.no_grad(), compress(model, spec, processor, calibration=[placed(THREE[2], 7)]):
        found = [model(**prompts).logits]
        if not spec or "kv" in spec.get("quantize", {}):
            found.append(model.generate(**prompts, max_new_tokens=2, do_sample=False))
    return [one.cpu() for one in found]


def runs(folder: Path, places: tuple[torch.device, ...]) -> list[tuple[str, bytes]]:
    """Ids and stored answers of runs of a model that is on these devices, where it was put when it was loaded."""
    sections: list[dict[str, Any]] = [
        {"prune": {"method": "cdpruner", "keep": 4}},  # with a text tower
        {
            "prune": {"method": "fastv", "keep": 4},
            "quantize": {"method": "smoothquant", "calibration": {"samples": 1}, **BITS},
        },
    ]
    task = {"name": "diagramqa", "limit": 2, "answers": "letter"}
    specs = [
        RunSpec.parse({"name": str(at), "model": str(folder), "task": task, **one}) for at, one in enumerate(sections)
    ]
    several = places if len(places) > 1 else ()
    settings = Settings(folder.parent / f"on {len(places)}", places[0], devices=several)
    records = make_runs(specs, settings)
    return [(one.run_id, (settings.runs / one.run_id / "answers.jsonl").read_bytes()) for one in records]


def main(folder: Path, asked: list[str]) -> None:
    """Print whether each case has the same bits on one device and on two, or why it failed."""
    torch.set_num_threads(1)
    save_llava(folder, layers=LAYERS)
    processor = AutoProcessor.from_pretrained(folder)
    with devices() as (first, second):
        near, far = str(first), str(second)
        decoder = {f"layers.{index}": far if index >= LAYERS // 2 else near for index in range(LAYERS)}
        language = {"embed_tokens": near, "rotary_emb": near, "norm": far, **decoder}
        split = {"vision_tower": near, "multi_modal_projector": near}
        split |= {f"language_model.{name}": place for name, place in language.items()}
        places = {"lm_head": far, **{f"model.{name}": place for name, place in split.items()}}
        models = [
            spread(AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False), one)
            for one in ({"": near}, places)
        ]
        try:
            torch.ones(2, device=first) + torch.ones(2, device=second)
        except Mixed as error:
            print(json.dumps({"case": "mixed", "equal": False, "why": str(error)}))
        for name, spec in cases():
            if asked and name not in asked:
                continue
            why = ""
            try:
                one, two = (answers(model, spec, processor, first) for model in models)
                equal = all(map(torch.equal, one, two))
            except Exception:  # reported to the test, which fails
                equal, why = False, traceback.format_exc()
            print(json.dumps({"case": name, "equal": equal, "why": why}), flush=True)
        if not asked or "runs" in asked:
            save_clip(folder / "clip")
            one, two = (runs(folder, (first, second)[:count]) for count in (1, 2))
            print(json.dumps({"case": "runs", "equal": one == two, "why": f"{one} {two}"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
