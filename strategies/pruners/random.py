"""Random choice of tokens, the floor that every pruner has to beat."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench import Pruner, Selection, VisionTokens, pruner, top_k


@pruner("random")
@dataclass(frozen=True)
class Random(Pruner):
    """Keep random tokens: the relevance is uniform noise, drawn from the seed and the image's content.

    If the images carry no content hash, all get the same draw, so that an image's tokens do not depend on its batch.
    Sensitivity is fused with the noise.

    Attributes:
        seed: seed of the noise. None takes the seed of the run; outside a run it stands for 0.

    Source:
        No paper. The baseline that other pruners have to beat.
    """

    needs = frozenset({"image_ids"})
    optional = frozenset({"image_ids"})
    seed: int | None = None

    def relevance(self, tokens: VisionTokens) -> Tensor:
        ids = tokens.image_ids or ("",) * tokens.batch
        rows = [
            torch.rand(tokens.count, dtype=torch.float32, generator=_generator(self.seed or 0, image)) for image in ids
        ]
        return torch.stack(rows).to(tokens.projected.device)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))


def _generator(seed: int, image: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{image}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
