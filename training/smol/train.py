"""The command that trains `smol-llava` on one GPU.

    python -m training.smol.train --out runs/smol-llava --export qapbench/models/embedded/smol-llava

It runs three stages, each for its share of --minutes: `projector`; `joint` (projector, vision tower, and LoRA on the
decoder); and `companion` (the CLIP text tower). With --fit, the projector starts in closed form, and a stage `fitted`
takes the place of the first two, for machines on which every step counts. If it was stopped, the same command
continues. On machines that limit the time of a command, --call-minutes ends a call early, with a checkpoint. After the
last stage, the trained parts are written to --export.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from training.labels import Labeller, find_slots
from training.loop import Loop, keep_heap
from training.rows import Speller
from training.vision import Vision

from .closed_form import fit_projector
from .model import ALPHA, RANK, TOWER, add_lora, export, find_base, halve, start
from .packs import Mix, Wording
from .stages import CHECKS, FedCompanion, Seeing, packs_for

SHARES = {"projector": 0.15, "joint": 0.73, "companion": 0.12}
FITTED = {"fitted": 0.88, "companion": 0.12}
STATUS = "trained on diagramqa's training stream; see README.md for what it reaches"


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Build what all stages share: the models, on the device, the data, the labels and the tokenizer."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    llava, processor, clip = start(args.gguf or find_base(), args.tower, args.seed)
    slots = args.out / "slots.json"
    if not slots.exists():
        slots.write_text(json.dumps(find_slots(args.seed, args.slots)))
    labeller = Labeller(json.loads(slots.read_text()))
    wording = Wording(processor.tokenizer, processor.chat_template, llava.config.image_seq_length)
    if args.fit and not (args.out / "fitted.pt").exists():
        explained = fit_projector(llava, wording, labeller, args.seed, args.fit)
        print(json.dumps({"explained": round(explained, 4)}), flush=True)
    adapted = add_lora(llava, args.rank, args.alpha)
    if args.bf16:
        halve(llava)
    llava.to(device)
    clip.to(device)
    data, checks = packs_for(wording, labeller, args.seed + 1, Mix(text=args.text, drills=args.drills))
    vision = Vision(llava, labeller, args.seed)
    vision.heads.to(device)
    speller = Speller(Tokenizer.from_file(str(args.tower / "tokenizer.json")))
    return {
        "llava": llava,
        "clip": clip,
        "adapted": adapted,
        "vision": vision,
        "data": data,
        "checks": checks,
        "speller": speller,
    }


def stage_of(name: str, built: dict[str, Any], args: argparse.Namespace) -> Any:
    """Make a stage.

    Args:
        name: name of the stage.
        built: what `build` returned.
        args: the parsed command line.
    """
    if name == "companion":
        return FedCompanion(built["llava"], built["clip"], built["speller"], args.seed, args.workers)
    given = {key: built[key] for key in ("llava", "adapted", "vision", "data", "checks")}
    return Seeing(name, **given, batch=args.batch, workers=args.workers, bf16=args.bf16, count=args.checks)


def train(args: argparse.Namespace) -> bool:
    """Run what remains of the stages. Returns whether all of them are done."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_heap()
    began = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    built = build(args)
    until = began + args.call_minutes * 60
    for name, share in (FITTED if args.fit else SHARES).items():
        stage = stage_of(name, built, args)
        loop = Loop(stage, args.out, args.minutes * share, 0.0, optimizer=stage.optimizer())
        loop.resume()
        if not loop.done:
            loop.train(log_every=args.log_every, val_every=args.val_every, save_every=1.5, until=until)
        if not loop.done:
            return False
    if args.export:
        size = export(built["llava"], built["clip"], built["adapted"], args.tower, args.export, args.status)
        print(json.dumps({"export": str(args.export), "megabytes": round(size / 1e6, 2)}))
    return True


def parser() -> argparse.ArgumentParser:
    """Define the command line."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", type=Path, required=True, help="folder for checkpoints and log.jsonl")
    out.add_argument("--export", type=Path, help="folder for the trained parts")
    out.add_argument("--minutes", type=float, default=22, help="wall time of all stages together")
    out.add_argument("--call-minutes", type=float, default=float("inf"), help="end this call after so many minutes")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--batch", type=int, default=24, help="number of packs of 640 tokens per step")
    out.add_argument("--workers", type=int, default=12, help="number of processes that draw data ahead")
    out.add_argument("--gguf", type=Path, help="file of the language model, if its package is not installed")
    out.add_argument("--tower", type=Path, default=TOWER, help="CLIP folder to start from")
    out.add_argument("--fit", type=int, default=0, help="number of scenes to fit the projector to in closed form")
    out.add_argument("--text", type=int, default=Mix.text, help="one of so many packs is text-only")
    out.add_argument("--drills", type=float, default=Mix.drills, help="share of text-only packs that are drills")
    out.add_argument("--rank", type=int, default=RANK, help="rank of LoRA")
    out.add_argument("--alpha", type=int, default=ALPHA, help="alpha of LoRA")
    out.add_argument("--slots", type=int, default=6000, help="number of scenes to collect the labels of patches from")
    out.add_argument("--log-every", type=int, default=20, help="number of steps between two lines of log.jsonl")
    out.add_argument(
        "--val-every", type=float, default=1.5, help="minutes between two evaluations on the validation split"
    )
    out.add_argument("--checks", type=int, default=CHECKS, help="number of packs of the validation split")
    out.add_argument("--status", default=STATUS, help="one line on the model, which its runs repeat")
    out.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compute in bfloat16 (the default on a GPU)",
    )
    out.add_argument("--device", help="cuda if available, else cpu, by default")
    return out


def main() -> None:
    """Run the command line, and print whether all stages are done."""
    done = train(parser().parse_args())
    print("done" if done else "not done; the same command goes on")


if __name__ == "__main__":
    main()
