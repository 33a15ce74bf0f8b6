"""The command that trains `diagram-llava` in stages, each for a given wall time.

    python -m training.train vision --minutes 30 --out runs/training
    python -m training.train language --minutes 30 --out runs/training
    python -m training.train reading --minutes 30 --out runs/training
    python -m training.train seeing --minutes 20 --out runs/training
    python -m training.train joint --minutes 30 --out runs/training
    python -m training.train companion --minutes 10 --out runs/training --export qapbench/models/embedded/diagram-llava

`reading` continues from the weights of `language`; `vision` depends on neither. `seeing` continues from `vision` and
from the symbols of `reading`, `joint` from `reading` and `seeing`, and `companion` from `seeing`. A stage that was
stopped continues from its checkpoint when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from transformers import CLIPModel, LlavaForConditionalGeneration

from .companion import Companion
from .joint import Joint, Reading
from .labels import Labeller, find_slots
from .language import Language
from .loop import Loop, keep_heap
from .model import build_models, export
from .reading import Symbols
from .rows import Speller
from .vision import Seeing, Vision
from .vocabulary import build_bpe

STAGES = ("vision", "language", "reading", "seeing", "joint", "companion")
BEFORE: dict[str, tuple[str, ...]] = {
    "vision": (),
    "language": (),
    "reading": ("language",),
    "seeing": ("vision", "reading"),
    "joint": ("reading", "seeing"),
    "companion": ("seeing",),
}
LEARNING_RATE = {"vision": 3e-3, "language": 4e-3, "reading": 3e-3, "seeing": 2e-3, "joint": 2e-3, "companion": 2e-3}


def restore(out: Path, stages: tuple[str, ...], modules: dict[str, torch.nn.Module]) -> None:
    """Load what earlier stages trained.

    Args:
        out: folder of the checkpoints.
        stages: names of the stages, in order. If several of them trained a module, the last one counts.
        modules: the modules to load into, by name. Others in the checkpoints are ignored.

    Raises:
        SystemExit: if a checkpoint is missing.
    """
    for stage in stages:
        if not (out / f"{stage}.pt").exists():
            raise SystemExit(f"{out / stage}.pt is missing: this stage goes on from `{stage}`")
        state = torch.load(out / f"{stage}.pt", map_location="cpu", weights_only=True)["modules"]
        for name in state.keys() & modules.keys():
            modules[name].load_state_dict(state[name])


def begin_with(source: Path, modules: dict[str, torch.nn.Module]) -> None:
    """Load the weights of an earlier run as initial values, without the state of its optimizer.

    Weights that are missing in either of the two are left out.

    Args:
        source: checkpoint of a stage, or an exported folder.
        modules: the modules to load into, by name.
    """
    if source.is_dir():
        llava = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        clip = CLIPModel.from_pretrained(source / "clip", dtype=torch.float32)
        state: dict[str, Any] = {name: module.state_dict() for name, module in modules_of(llava, clip).items()}
    else:
        state = torch.load(source, map_location="cpu", weights_only=True)["modules"]
    for name in state.keys() & modules.keys():
        modules[name].load_state_dict(state[name], strict=False)


def modules_of(llava: Any, clip: Any) -> dict[str, torch.nn.Module]:
    """The parts of the two models, by the names under which stages store them."""
    return {
        "tower": llava.model.vision_tower,
        "projector": llava.model.multi_modal_projector,
        "decoder": llava.model.language_model,
        "head": llava.lm_head,
        "text": clip.text_model,
        "text_projection": clip.text_projection,
        "visual_projection": clip.visual_projection,
        "post_norm": clip.vision_model.post_layernorm,
    }


def build(out: Path, seed: int) -> tuple[Any, Any, Speller, Labeller]:
    """Build the untrained models, and load the tokenizer and the labels that all stages of a run share.

    Args:
        out: folder with the run's `vocabulary.json`.
        seed: seed of the initial weights.

    Returns:
        LLaVA, its companion CLIP, the tokenizer, and the labeller of patches.
    """
    torch.manual_seed(seed)
    stored = json.loads((out / "vocabulary.json").read_text())
    speller = Speller(Tokenizer.from_str(stored["bpe"]))
    llava, clip = build_models(speller.bpe.get_vocab_size())
    return llava, clip, speller, Labeller(stored["slots"])


def worker(rank: int, args: argparse.Namespace) -> None:
    """Run a stage in one process."""
    keep_heap()
    torch.set_num_threads(args.threads)
    if args.ranks > 1:
        store = f"file://{(args.out / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.ranks)
    llava, clip, speller, labeller = build(args.out, args.seed)
    modules = modules_of(llava, clip)
    stage: Any
    if args.stage == "vision":
        stage = Vision(llava, labeller, args.seed, rank, args.ranks)
    elif args.stage == "language":
        stage = Language(llava, speller, args.seed, rank, args.ranks)
    elif args.stage == "reading":
        stage = Reading(llava, speller, labeller, args.seed, rank, args.ranks)
    elif args.stage == "seeing":
        words = llava.get_input_embeddings().weight.detach()
        stage = Seeing(llava, labeller, Symbols(labeller, speller, words, args.seed), args.seed, rank, args.ranks)
        modules["symbols"] = stage.symbols
    elif args.stage == "joint":
        stage = Joint(llava, speller, args.seed, rank, args.ranks)
    else:
        stage = Companion(llava, clip, speller, args.seed, rank, args.ranks)
    if args.init and args.init.is_dir():
        begin_with(args.init, {**modules, **stage.trained})
    else:
        restore(args.out, BEFORE[args.stage], {**modules, **stage.trained})
        if args.stage == "seeing":
            stage.fit_projector()
        if args.init:
            begin_with(args.init, stage.trained)
    for part in args.freeze:
        stage.trained[part].requires_grad_(False)
    loop = Loop(stage, args.out, args.minutes, args.lr or LEARNING_RATE[args.stage], rank, args.ranks)
    loop.resume()
    loop.train()
    if rank == 0 and args.export:
        done = tuple(name for name in STAGES if (args.out / f"{name}.pt").exists())
        restore(args.out, done, modules)
        export(llava, clip, speller.bpe, args.export)
    if args.ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--export", type=Path, help="write the public checkpoint folder at the end")
    parser.add_argument("--init", type=Path, help="initial weights: a checkpoint of this stage, or an exported folder")
    parser.add_argument("--freeze", nargs="*", default=[], metavar="PART", help="parts that are not trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="peak learning rate of Muon and AdamW")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes that share a batch")
    parser.add_argument("--threads", type=int, default=1, help="number of threads per process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "vocabulary.json").exists():
        stored = {"bpe": build_bpe(args.seed).to_str(), "slots": find_slots(args.seed)}
        (args.out / "vocabulary.json").write_text(json.dumps(stored))
    if args.ranks == 1:
        worker(0, args)
    else:
        (args.out / "rendezvous").unlink(missing_ok=True)
        mp.spawn(worker, (args,), nprocs=args.ranks)


if __name__ == "__main__":
    main()
