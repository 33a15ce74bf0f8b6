"""Assembly of a pruned prompt: which features the language model reads, and which columns of the prompt stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.methods.decoder_pruner import Stage
from qapbench.models.encoded import EncodedImage, EncodedImages
from qapbench.receipt import ImageTokens
from qapbench.spec.run_spec import PruneSpec


@dataclass(frozen=True)
class PrunedImage:
    """One image as the language model reads it after pruning.

    Attributes:
        features: [M, W] kept tokens, merged tokens and separators, in the order of the prompt, as wide as those of the
            image without pruning.
        places: [M] the image's placeholder at which each of them stands. A merged token shares the placeholder of a
            neighbour.
        indices: [K] places of the kept tokens, ascending.
        available: number of tokens before pruning, without separators.
        merged: how many of the M are tokens made from others.
        separators: how many of the M are tokens that the model adds itself (new lines).
        layers: tokens that each decoder layer received, if tokens are dropped inside the decoder. The other
            attributes then describe what the last layer received.
    """

    features: Tensor
    places: Tensor
    indices: Tensor
    available: int
    merged: int = 0
    separators: int = 0
    layers: tuple[int, ...] = ()

    def stored(self) -> ImageTokens:
        """The counts and indices that are stored with an answer."""
        return ImageTokens(
            available=self.available,
            kept=self.indices.tolist(),
            merged=self.merged,
            separators=self.separators,
            layers=list(self.layers),
        )


class Part(NamedTuple):
    """One view after its selection of K tokens.

    Attributes:
        features: [front + K + back, D] merged tokens, kept tokens, and further merged tokens.
        kept: [K] places of the kept tokens.
        view: [N] places of all tokens of the view.
        at: index of the view's group among those of `EncodedImages.views`, and of the view in it.
        front: number of merged tokens before the kept ones.
        made: [K] bool, True for a kept token that was made from several; None if there is none.
    """

    features: Tensor
    kept: Tensor
    view: Tensor
    at: tuple[int, int]
    front: int
    made: Tensor | None = None

    @property
    def between(self) -> int:
        """Number of merged tokens that have no place of their own."""
        return self.features.shape[0] - self.kept.shape[0]  # `len` of a tensor takes longer


def budgets(encoded: EncodedImages, spec: PruneSpec, most: int | None) -> list[list[int]]:
    """Number of tokens that each view keeps, listed like `encoded.views`. A view with fewer tokens keeps all of them.

    A budget per image is split among its views in proportion to their tokens, by largest remainder; of equal remainders
    the earlier view's wins.

    Args:
        encoded: the images of a call.
        spec: the `prune` section.
        most: tokens of a view; None if that depends on the image.

    Raises:
        UserError: the budget of a view is larger than the view.
        ValueError: the budget is a cost, which has to be turned into a number of tokens first.
    """
    if spec.budget is not None:
        raise ValueError(f"keep: {spec.budget} is not resolved")
    if spec.per == "tile":
        if most is not None and spec.keep > most:
            raise UserError(f"keep={spec.keep} is out of range: an image has {most} tokens (1..{most})")
        return [[min(spec.keep, views.tokens.count)] * views.tokens.batch for views in encoded.views]
    split = [[0] * views.tokens.batch for views in encoded.views]
    for image, whole in enumerate(encoded.images):
        owners = [(g, v, owner) for g, views in enumerate(encoded.views) for v, owner in enumerate(views.owners)]
        mine = [(g, v) for g, v, owner in owners if owner == image]
        if len(mine) > 1:
            mine.sort(key=lambda at: int(encoded.views[at[0]].places[at[1], 0]))  # order of the prompt
        sizes = [encoded.views[g].tokens.count for g, _ in mine]
        total = min(spec.keep, whole.count)
        shares = [size * total // sum(sizes) for size in sizes]
        rest = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * total % sum(sizes)), i))
        for index in rest[: total - sum(shares)]:
            shares[index] += 1
        for (g, v), share in zip(mine, shares, strict=True):
            split[g][v] = share
    return split


def schedules(encoded: EncodedImages, spec: PruneSpec, most: int | None) -> list[list[tuple[Stage, ...]]]:
    """The drops inside the decoder that a spec says, with each view's own budgets, listed like `encoded.views`.

    The arguments are those of `budgets`, and so is how a budget is split among views.
    """
    each = []
    for step in spec.schedule:
        own = spec.model_copy(update={"keep": step.keep, "schedule": ()})
        each.append([[Stage(step.layer, keep) for keep in keeps] for keeps in budgets(encoded, own, most)])
    if not each:
        return [[()] * views.tokens.batch for views in encoded.views]
    return [list(zip(*steps, strict=True)) for steps in zip(*each, strict=True)]


def splice(image: EncodedImage, parts: Sequence[Part]) -> PrunedImage:
    """Assemble one image from its views.

    Tokens get the order of the prompt. A separator stays if its line still has a token. What the language model gets of
    a token besides its feature is cut by the same index: a merged token has that of the place where it stands.

    Args:
        image: the image without pruning.
        parts: its views after their selections.
    """
    if len(parts) == 1 and not parts[0].between and image.separators is None:  # in the order of the prompt already
        return _spliced_view(image, parts[0])
    device = image.features.device
    features, keys, indices, merged = [], [], [], 0
    for part in parts:
        made = part.between
        # Merged tokens come before the first or after the last token of their view.
        places = torch.cat([part.view[:1].expand(part.front), part.kept, part.view[-1:].expand(made - part.front)])
        sides = torch.ones(len(places), dtype=torch.long, device=device)
        sides[: part.front] = 0
        sides[part.front + len(part.kept) :] = 2
        features.append(part.features)
        keys.append(places * 3 + sides)  # sort key: the place, and before (0), at (1) or after (2) it
        indices.append(part.kept if part.made is None else part.kept[~part.made])
        merged += made + len(part.kept) - len(indices[-1])
    separators = _separators(image, torch.cat(keys) // 3) if image.separators is not None else None
    if separators is not None:
        features.append(image.features[separators, : features[0].shape[-1]])
        keys.append(separators * 3 + 1)
    key, order = torch.cat(keys).sort(stable=True)
    chosen, places = torch.cat(features)[order], key // 3
    if (width := chosen.shape[-1]) < image.features.shape[-1]:
        chosen = torch.cat([chosen, image.features[places, width:]], dim=-1)
    return PrunedImage(
        chosen,
        places,
        torch.cat(indices).sort().values,
        image.count,
        merged,
        0 if separators is None else len(separators),
    )


def _spliced_view(image: EncodedImage, part: Part) -> PrunedImage:
    """Assemble an image of a single view, whose tokens all have places of their own."""
    chosen, width = part.features, part.features.shape[-1]
    if width < image.features.shape[-1]:
        chosen = torch.cat([chosen, image.features[part.kept, width:]], dim=-1)
    indices = part.kept if part.made is None else part.kept[~part.made]
    return PrunedImage(chosen, part.kept, indices, image.count, part.kept.shape[0] - indices.shape[0])


def _separators(image: EncodedImage, places: Tensor) -> Tensor:
    """Places of the separators whose line still has a token at one of `places`, or never had one."""
    if image.separators is None or image.rows is None:
        return places[:0]
    alive = torch.isin(image.rows, image.rows[places].unique())
    alive |= ~torch.isin(image.rows, image.rows[~image.separators].unique())
    return (image.separators & alive).nonzero()[:, 0]


def image_columns(placeholders: Tensor, lengths: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Find the placeholders of each image in a prompt.

    Args:
        placeholders: [B, T] bool, True at placeholders.
        lengths: number of placeholders of each image.

    Returns:
        (row, [L] columns) for each image.

    Raises:
        UserError: the number of placeholders does not match, or the placeholders of an image are spread over two rows.
    """
    alone = len(placeholders) == 1
    rows, columns = placeholders.nonzero().unbind(1)
    if len(rows) != sum(lengths):
        tokens = f"{lengths[0]}" if len(set(lengths)) == 1 else " + ".join(map(str, lengths))
        raise UserError(
            f"input_ids hold {len(rows)} image placeholders, but {len(lengths)} image(s) of {tokens} tokens were given"
        )
    if alone:
        return [(0, column) for column in (columns.split(list(lengths)) if len(lengths) > 1 else [columns])]
    found = []
    for index, (row, column) in enumerate(zip(rows.split(list(lengths)), columns.split(list(lengths)), strict=True)):
        if len(row) and bool((row != row[0]).any()):
            raise UserError(f"input_ids: the placeholders of image {index} are spread over two prompts")
        found.append((int(row[0]), column))
    return found


def kept_columns(placeholders: Tensor, spans: list[tuple[int, Tensor]], images: list[PrunedImage]) -> list[Tensor]:
    """For each row of a prompt, the columns that its shortened form consists of. A merged token repeats a column.

    Args:
        placeholders: [B, T] bool, True at placeholders.
        spans: row and columns of each image's placeholders, from `image_columns`.
        images: the images after pruning.
    """
    rows = [[row.nonzero()[0]] for row in (~placeholders).cpu().numpy()]  # calls of numpy are the cheaper ones
    for (row, columns), image in zip(spans, images, strict=True):
        rows[row].append(columns.index_select(0, image.places.to(columns.device)).cpu().numpy())
    return [torch.from_numpy(np.sort(np.concatenate(parts))).to(placeholders.device) for parts in rows]


def gather_columns(values: Tensor, columns: list[Tensor], fill: int, left: bool) -> Tensor:
    """Gather columns of each row and pad the rows to equal length: [..., B, T] -> [..., B, longest].

    Args:
        values: [..., B, T].
        columns: for each of the B rows, the columns to gather.
        fill: value of the padding.
        left: whether to pad on the left.
    """
    if len(columns) == 1:
        return values.index_select(-1, columns[0])
    longest = max(len(row) for row in columns)
    out = values.new_full((*values.shape[:-1], longest), fill)
    for index, row in enumerate(columns):
        start = longest - len(row) if left else 0
        out[..., index, start : start + len(row)] = values[..., index, row]
    return out


def detached(image: PrunedImage) -> PrunedImage:
    """A copy without features, which are not needed after the call, and with its other tensors on the host."""
    return replace(image, features=image.features[:0], places=image.places.cpu(), indices=image.indices.cpu())
