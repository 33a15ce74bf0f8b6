"""Trains ``diagram-llava`` within a wall-clock budget.

    python -m training.train --minutes 65 --seed 0 --out DIR [--resume] [--export DIR]

A checkpoint (models, optimizer, step, time used, random state) is written every five minutes, and
``--resume`` continues from it: batches depend on (seed, step) alone.  The learning rate follows the share
of the budget that is used up, so that a run ends on time on a machine of any speed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer

from qapbench.tasks.diagramqa.generate import sample

from .data import HEAD, INSTRUCTION, Batcher, build_vocabulary, loader, user_text
from .losses import Heads, clip_losses, decoder_losses, option_scores, vision_pass
from .model import IMAGE, N_PATCHES, build_models, export, parameter_counts
from .muon import build_optimizer


def keep_heap() -> None:
    """Makes glibc keep freed memory: page faults of fresh buffers cost a fifth of a CPU step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            libc.mallopt(option, value)


def schedule(progress: float, step: int) -> float:
    """Linear warm-up, a plateau, and a linear decay over the last two thirds of the budget."""
    return min(1.0, (step + 1) / 60) * min(1.0, max(0.0, (1 - progress) / 0.67))


def to_device(x: Any, device: torch.device) -> Any:
    """Moves nested tensors."""
    if isinstance(x, torch.Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}
    return [to_device(v, device) for v in x] if isinstance(x, list) else x


def validate(llava: Any, batcher: Batcher, n: int, batch: int = 48) -> dict[str, list[int]]:
    """Right answers and questions per family, on ``n`` scenes of the validation split."""
    letters = [batcher.ids(f" {c}")[0] for c in "ABCDE"]
    items: dict[bool, list[tuple[list[int], Any, Any]]] = {True: [], False: []}
    for i in range(n):
        scene = sample(0, i, "val", modality="image" if i % 3 else "text")
        for q in scene.questions[:2]:
            image = scene.image is not None
            text = (IMAGE * N_PATCHES + "\n" if image else "") + user_text(q, INSTRUCTION)
            ids = batcher.ids(f"{HEAD}{text} ASSISTANT:")
            items[image].append((ids, np.asarray(scene.image) if image else None, q))
    result: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for image, all_items in items.items():
        all_items.sort(key=lambda it: len(it[0]))
        for s in range(0, len(all_items), batch):
            part = all_items[s : s + batch]
            pixels = None
            if image:
                pixels = torch.from_numpy(np.stack([p for _, p, _ in part])).permute(0, 3, 1, 2)
            scores = option_scores(llava, [ids for ids, _, _ in part], pixels, letters)
            for row, (_, _, q) in zip(scores, part, strict=True):
                guess = int(row[: len(q.choices)].argmax())
                result[q.family][0] += guess == q.answer
                result[q.family][1] += 1
    return dict(result)


def save(path: Path, **state: Any) -> None:
    """Atomic ``torch.save``."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


class Run:
    """One training run, fresh or resumed."""

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        self.args, self.out, self.rank = args, args.out, rank
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        stored = json.loads((self.out / "vocab.json").read_text())
        self.bpe, names = Tokenizer.from_str(stored["bpe"]), stored["names"]
        self.llava, self.clip = build_models(self.bpe.get_vocab_size())
        self.heads = Heads(
            self.llava.config.vision_config.hidden_size, self.llava.config.text_config.hidden_size, len(names)
        )
        if self.device.type == "cpu":
            # The CPU's fused bfloat16 attention is slow in the backward pass; both give the same numbers.
            self.llava.set_attn_implementation("eager")
            self.clip.set_attn_implementation("eager")
        self.modules = [self.llava, self.clip, self.heads]
        for m in self.modules:
            m.to(self.device)
        self.opt = build_optimizer(self.modules, args.lr, args.lr_adam)
        self.batcher = Batcher(self.bpe, names, args.seed, rank=rank, ranks=args.ranks)
        self.step, self.used = args.first_step, 0.0
        if args.init:
            self._init_from(args.init)
        if args.resume and (self.out / "last.pt").exists():
            self._load()
        self.params = [p for g in self.opt.param_groups for p in g["params"]]
        if rank == 0:
            print(parameter_counts(self.llava, self.clip), "step", self.step, flush=True)

    def _init_from(self, path: Path) -> None:
        """Starts from the weights of an earlier run's checkpoint."""
        states = torch.load(path, map_location=self.device, weights_only=False)["models"]
        for m, s in zip(self.modules, states, strict=True):
            m.load_state_dict(s, strict=m is not self.heads)

    def _load(self) -> None:
        state = torch.load(self.out / "last.pt", map_location=self.device, weights_only=False)
        for m, s in zip(self.modules, state["models"], strict=True):
            m.load_state_dict(s)
        self.opt.load_state_dict(state["opt"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.used = state["step"], state["used"]

    def checkpoint(self, used: float) -> None:
        """Everything a resumed run needs."""
        save(
            self.out / "last.pt",
            models=[m.state_dict() for m in self.modules],
            opt=self.opt.state_dict(),
            rng=torch.get_rng_state(),
            step=self.step,
            used=used,
        )

    def export(self) -> None:
        """The two public folders."""
        if self.args.export:
            export(self.llava, self.clip, self.bpe, self.args.export)

    def log(self, **entry: Any) -> None:
        """One line of the learning curve."""
        with (self.out / "log.jsonl").open("a") as f:
            f.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)

    def one_step(self, batch: dict[str, Any], progress: float) -> dict[str, float]:
        """Forward, backward, update; returns the loss parts."""
        batch = to_device(batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            patches, cls = vision_pass(self.llava, batch["pixels"])
            loss, parts = decoder_losses(self.llava, self.heads, batch, patches)
            aux, more = clip_losses(self.clip, self.heads, batch, patches, cls)
        (loss + aux).backward()
        self.average(progress)
        norm = torch.nn.utils.clip_grad_norm_(self.params, 5.0)
        factor = schedule(progress, self.step)
        for group in self.opt.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        return {**parts, **more, "norm": float(norm), "loss": float(loss.detach() + aux.detach())}

    def average(self, progress: float) -> None:
        """Averages the gradients over processes, and tells all of them the first one's progress."""
        self.progress = progress
        if self.args.ranks == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        clock = torch.tensor([progress * self.args.ranks if self.rank == 0 else 0.0])
        flat = torch.cat([g.flatten() for g in grads] + [clock])
        dist.all_reduce(flat)
        flat /= self.args.ranks
        self.progress = float(flat[-1])
        for p, g in zip(self.params, flat[:-1].split([g.numel() for g in grads]), strict=True):
            p.grad = g.view_as(p)

    def evaluate(self, minutes: float) -> None:
        """Validation accuracy by family into the learning curve."""
        torch.set_num_threads(self.args.ranks * self.args.threads)
        with torch.autocast(self.device.type, torch.bfloat16):
            result = validate(self.llava, self.batcher, self.args.val_scenes)
        torch.set_num_threads(self.args.threads)
        right, n = (sum(v[i] for v in result.values()) for i in (0, 1))
        families = {k: round(v[0] / v[1], 3) for k, v in sorted(result.items())}
        self.log(step=self.step, minutes=minutes, val=round(right / n, 4), val_n=n, families=families)

    def train(self) -> None:
        """The loop."""
        args, count = self.args, 0
        sums: dict[str, float] = defaultdict(float)
        budget, start = args.minutes * 60, time.time() - self.used
        batches = loader(self.batcher, self.step, args.workers)
        last_save = last_val = last_export = time.time()
        self.progress = self.used / budget
        while self.progress < 1:
            for key, value in self.one_step(next(batches), (time.time() - start) / budget).items():
                sums[key] += value
            count += 1
            self.step += 1
            if self.rank:
                continue
            now = time.time()
            if self.step % args.log_every == 0:
                minutes = round((now - start) / 60, 2)
                self.log(step=self.step, minutes=minutes, **{k: round(v / count, 4) for k, v in sums.items()})
                sums.clear()
                count = 0
            if now - last_val > args.val_every * 60:
                self.evaluate(round((now - start) / 60, 2))
                last_val = time.time()
            if now - last_save > 300:
                self.checkpoint(now - start)
                last_save = now
            if now - last_export > 900:
                self.export()
                last_export = now
        if self.rank == 0:
            self.checkpoint(budget)
            self.export()
            self.evaluate(round((time.time() - start) / 60, 2))


def worker(rank: int, args: argparse.Namespace) -> None:
    """One process of the run."""
    keep_heap()
    torch.set_num_threads(args.threads)
    if args.ranks > 1:
        store = f"file://{(args.out / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.ranks)
    Run(args, rank).train()
    if args.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--minutes", type=float, default=65)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--export", type=Path, help="folder of the public checkpoint")
    p.add_argument("--init", type=Path, help="last.pt of an earlier run, to start from its weights")
    p.add_argument("--first-step", type=int, default=0, help="of the data, after an earlier run")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--lr", type=float, default=4e-3, help="of Muon")
    p.add_argument("--lr-adam", type=float, default=2e-3)
    p.add_argument("--ranks", type=int, default=2, help="processes; 1 on a GPU")
    p.add_argument("--threads", type=int, default=1, help="of each process")
    p.add_argument("--workers", type=int, default=0, help="that draw batches ahead, for each process")
    p.add_argument("--log-every", type=int, default=20)
    p.add_argument("--val-every", type=float, default=6.0, help="minutes")
    p.add_argument("--val-scenes", type=int, default=450)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    vocab = args.out / "vocab.json"
    if not vocab.exists():
        bpe, names = build_vocabulary(args.seed)
        vocab.write_text(json.dumps({"bpe": bpe.to_str(), "names": names}))
    (args.out / "rendezvous").unlink(missing_ok=True)
    if args.ranks == 1:
        worker(0, args)
    else:
        mp.spawn(worker, (args,), nprocs=args.ranks)


if __name__ == "__main__":
    main()
