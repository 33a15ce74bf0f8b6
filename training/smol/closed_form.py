"""A projector in closed form, for a training that has little time: ridge regression from patches to words.

    python -m training.smol.closed_form --fit 4000 --scenes 64

Before any gradient, a patch is shown to the language model as the mean of the embeddings of the words that are true of
it, as far as a linear function of fixed features of the patch can tell them. The command fits a projector, and prints
what it explains and whether the untrained language model reads it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qapbench.tasks.diagramqa.generate import sample
from training.labels import RELATIONS, Labeller, find_slots
from training.vision import counted, pixels_of, see

from .model import TOWER, find_base, start
from .packs import Wording

BACKGROUND = "empty"
"""What the words of a patch are where no thing is."""
BATCH = 32  # scenes at a time
SAYING = "Name one thing that the picture shows."
BEGUN = "The picture shows a"
"""What the language model is asked, and how its answer begins."""
Turn = Callable[[Tensor], Tensor]


class Meanings:
    """The mean embedding of the words that are true of a patch.

    Args:
        labeller: defines the slots and their values.
        wording: spells words as token ids.
        words: [V, D] embeddings of the language model's tokens.
    """

    def __init__(self, labeller: Labeller, wording: Wording, words: Tensor) -> None:
        self.slots = [place for slot, place in labeller.places.items() if slot not in RELATIONS]
        self.starts = torch.tensor([0, *labeller.sizes[:-1]]).cumsum(0)[self.slots]
        rows, sizes = [], []
        for values in labeller.slots.values():
            for value in values:
                ids = wording.ids(f" {value or BACKGROUND}")
                rows.append(words[ids].float().sum(0))
                sizes.append(len(ids))
        self.sums, self.sizes = torch.stack(rows).cpu(), torch.tensor(sizes)

    def __call__(self, labels: Tensor) -> Tensor:
        """Turn labels [..., slots] into [..., D]. Slots of relations are left out: their words name another thing."""
        of = labels[..., self.slots]
        which = (of + self.starts).clamp(min=0)
        there = of >= 0
        count = (self.sizes[which] * there).sum(-1, keepdim=True).clamp(min=1)
        return (self.sums[which] * there[..., None]).sum(-2) / count


@torch.no_grad()
def fit_projector(
    llava: Any, wording: Wording, labeller: Labeller, seed: int, count: int, ridge: float = 1e-3
) -> float:
    """Set the weights of the projector in closed form, in place.

    The first linear layer gets the principal directions of the patches, as many random ones as there is room for, and
    the negatives of all of them: gelu(z) - gelu(-z) = z, so linear functions of the patches stay in reach. The second
    one solves the ridge regression from there to `Meanings`.

    Args:
        llava: the LLaVA model.
        wording: spells words as token ids.
        labeller: labels the patches of scenes.
        seed: seed of the scenes and of the random directions.
        count: number of training scenes to fit to.
        ridge: weight of the penalty, in mean squared features.

    Returns:
        The share of the variance of `Meanings` that the projector explains, on 64 scenes of the validation split.
    """
    projector = llava.model.multi_modal_projector
    meanings = Meanings(labeller, wording, llava.get_input_embeddings().weight.detach())
    patches, wanted = _pairs(llava, labeller, meanings, seed, "train", count)
    mean = patches.mean(0, dtype=torch.float64)
    values, directions = torch.linalg.eigh(_moments(patches, patches, lambda some: some.double() - mean))
    half = projector.linear_1.out_features // 2
    principal = (directions / values.clamp(min=values[-1] * 1e-6).sqrt()).T.flip(0)[:half]
    drawn = torch.randn(half - len(principal), len(principal), generator=torch.Generator().manual_seed(seed))
    weight = torch.cat([principal, drawn.double() @ principal / len(principal) ** 0.5])
    weight = torch.cat([weight, -weight])
    projector.linear_1.weight.zero_()[: 2 * half] = weight
    projector.linear_1.bias.zero_()[: 2 * half] = -weight @ mean

    def features(of: Tensor) -> Tensor:
        hidden = projector.act(projector.linear_1(of)).double()
        return torch.cat([hidden, torch.ones(len(hidden), 1, dtype=torch.float64)], 1)

    gram, both = _moments(patches, patches, features), _moments(patches, wanted, features, torch.Tensor.double)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(gram, both)
    projector.linear_2.weight.copy_(solved[:-1].T)
    projector.linear_2.bias.copy_(solved[-1])
    seen, meant = _pairs(llava, labeller, meanings, 0, "val", 64)
    missing = (projector(seen) - meant).square().sum()
    return 1 - float(missing / (meant - wanted.mean(0)).square().sum())


def _pairs(
    llava: Any, labeller: Labeller, meanings: Meanings, seed: int, split: str, count: int
) -> tuple[Tensor, Tensor]:
    """[n, C] patches of scenes, and what they mean, [n, D]. Of the background, every fifth patch counts."""
    patches, wanted = [], []
    for first in range(0, count, BATCH):
        scenes = [sample(seed, i, split, modality="image") for i in range(first, min(first + BATCH, count))]
        seen, _ = see(llava, pixels_of(scenes))
        labels = labeller.all_patches(scenes)
        kept = counted(labels[..., labeller.places["name"]])
        patches.append(seen.cpu()[kept])
        wanted.append(meanings(labels[kept]))
    return torch.cat(patches), torch.cat(wanted)


def _moments(one: Tensor, other: Tensor, of: Turn, of_other: Turn | None = None) -> Tensor:
    """Mean product of what two [n, ...] tensors are turned into, in float64, without holding all of that at once."""
    parts = zip(one.split(2**15), other.split(2**15), strict=True)
    return sum((of(a).T @ (of_other or of)(b) for a, b in parts), torch.zeros(())) / len(one)


@torch.no_grad()
def reading(llava: Any, wording: Wording, labeller: Labeller, count: int, blank: bool = False) -> float:
    """How well the language model tells the things of a picture from other things, when it says what it shows.

    Args:
        llava: the LLaVA model.
        wording: spells words as token ids.
        labeller: knows all things that can be in a picture.
        count: number of scenes of the validation split.
        blank: whether to show grey pictures in their place.

    Returns:
        The mean over scenes of the probability that the first token of a thing in the picture is more likely to be said
        than that of a thing that is not in it (AUC). 0.5 is chance.
    """
    names = [name for name in labeller.slots["name"] if name.islower() and name.isalpha()]
    tokens = torch.tensor([wording.ids(f" {name}")[0] for name in names])
    prompt = [*wording.chat(SAYING, image=True), *wording.ids(BEGUN)]
    ids = torch.tensor([prompt])
    found = []
    for index in range(count):
        scene = sample(0, index, "val", modality="image")
        there = torch.isin(tokens, tokens[[name in {thing.name for thing in scene.things} for name in names]])
        if not there.any() or there.all():
            continue
        pixels = pixels_of([scene])
        pixels = torch.zeros_like(pixels) if blank else pixels
        logits = llava(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits[0, -1, tokens]
        more = (logits[there, None] > logits[~there]).double() + (logits[there, None] == logits[~there]).double() / 2
        found.append(more.mean().item())
    return statistics.fmean(found)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", help="file of the language model, if its package is not installed")
    parser.add_argument("--fit", type=int, default=4000, help="number of scenes to fit the projector to")
    parser.add_argument(
        "--slots", type=int, default=6000, help="number of scenes to collect the labels of patches from"
    )
    parser.add_argument("--scenes", type=int, default=64, help="number of validation scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    llava, processor, _ = start(args.gguf or find_base(), TOWER, args.seed)
    wording = Wording(processor.tokenizer, processor.chat_template, llava.config.image_seq_length)
    labeller = Labeller(find_slots(args.seed, args.slots))
    untrained = reading(llava, wording, labeller, args.scenes)
    explained = fit_projector(llava, wording, labeller, args.seed, args.fit)
    read, blank = (reading(llava, wording, labeller, args.scenes, blank) for blank in (False, True))
    figures = {"explained": explained, "read": read, "blank": blank, "untrained": untrained}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
