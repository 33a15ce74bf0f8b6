"""From selections to what the language model reads: which features, and which columns of the prompt stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .models.views import Seen, SeenImage


@dataclass(frozen=True)
class KeptImage:
    """What the language model gets of one image.

    Attributes:
        features: [M, D] kept, merged and separating tokens in the order of the prompt.
        places: [M] the placeholder of the image that each stands at; a merged token shares that of a neighbour.
        indices: [K] places of the tokens kept, ascending.
        available: tokens there were to keep from, separators not counted.
        merged, separators: how many of the M are tokens made from others, and tokens of the model's own.
    """

    features: Tensor
    places: Tensor
    indices: Tensor
    available: int
    merged: int = 0
    separators: int = 0

    def to_json(self) -> dict[str, Any]:
        """As it is stored beside an answer."""
        more = {"separators": self.separators} if self.separators else {}
        return {"available": self.available, "kept": self.indices.tolist(), "merged": self.merged, **more}


class Part(NamedTuple):
    """A view after its selection: [front + K + back, D] features, [K] places kept, the places of the whole view."""

    features: Tensor
    kept: Tensor
    view: Tensor
    front: int


def budgets(seen: Seen, keep: int, per_image: bool) -> list[list[int]]:
    """Tokens that every view keeps, listed as `seen.views`; a view that has fewer keeps them all.

    Args:
        per_image: `keep` is of all views of an image together, split in proportion to their tokens (largest
            remainder; on a tie the earlier view). Else it is of each view.
    """
    if not per_image:
        return [[min(keep, views.tokens.count)] * views.tokens.batch for views in seen.views]
    split = [[0] * views.tokens.batch for views in seen.views]
    for image, whole in enumerate(seen.images):
        mine = [(g, v) for g, views in enumerate(seen.views) for v, owner in enumerate(views.owners) if owner == image]
        mine.sort(key=lambda at: int(seen.views[at[0]].places[at[1], 0]))  # views in the order of the prompt
        sizes = [seen.views[g].tokens.count for g, _ in mine]
        total = min(keep, whole.count)
        shares = [size * total // sum(sizes) for size in sizes]
        rest = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * total % sum(sizes)), i))
        for index in rest[: total - sum(shares)]:
            shares[index] += 1
        for (g, v), share in zip(mine, shares, strict=True):
            split[g][v] = share
    return split


def splice(image: SeenImage, parts: Sequence[Part]) -> KeptImage:
    """One image put together from its views: tokens in the order of the prompt, separators where their row lives."""
    device = image.features.device
    features, keys, indices, merged = [], [], [], 0
    for part in parts:
        made = len(part.features) - len(part.kept)
        # Merged tokens stand before the first or behind the last token of their view.
        places = torch.cat([part.view[:1].expand(part.front), part.kept, part.view[-1:].expand(made - part.front)])
        sides = torch.ones(len(places), dtype=torch.long, device=device)
        sides[: part.front] = 0
        sides[part.front + len(part.kept) :] = 2
        features.append(part.features)
        keys.append(places * 3 + sides)
        indices.append(part.kept)
        merged += made
    separators = _separators(image, torch.cat(keys) // 3) if image.separators is not None else None
    if separators is not None:
        features.append(image.features[separators])
        keys.append(separators * 3 + 1)
    key, order = torch.cat(keys).sort(stable=True)
    return KeptImage(
        torch.cat(features)[order], key // 3, torch.cat(indices).sort().values, image.count, merged,
        0 if separators is None else len(separators),
    )  # fmt: skip


def _separators(image: SeenImage, places: Tensor) -> Tensor:
    """Places of the separators whose row still has a token."""
    if image.separators is None or image.rows is None:
        return places[:0]
    alive = torch.isin(image.rows, image.rows[places].unique())
    return (image.separators & alive).nonzero()[:, 0]


def image_columns(placeholders: Tensor, lengths: Sequence[int]) -> list[tuple[int, Tensor]]:
    """(row, [L] columns) of every image's placeholders in a prompt [B, T].

    Raises:
        UserError: there are more or fewer placeholders than tokens, or an image would cross a row.
    """
    rows, columns = placeholders.nonzero(as_tuple=True)
    if len(rows) != sum(lengths):
        tokens = f"{lengths[0]}" if len(set(lengths)) == 1 else " + ".join(map(str, lengths))
        raise UserError(
            f"input_ids hold {len(rows)} image placeholders, but {len(lengths)} image(s) of {tokens} tokens were given"
        )
    found = []
    for index, (row, column) in enumerate(zip(rows.split(list(lengths)), columns.split(list(lengths)), strict=True)):
        if len(row) and bool((row != row[0]).any()):
            raise UserError(f"input_ids: the placeholders of image {index} are spread over two prompts")
        found.append((int(row[0]), column))
    return found


def kept_columns(placeholders: Tensor, spans: list[tuple[int, Tensor]], images: list[KeptImage]) -> list[Tensor]:
    """For every row of a prompt, the columns that its shortened form is made of; merged tokens repeat a column."""
    rows = [[(~row).nonzero()[:, 0]] for row in placeholders]
    for (row, columns), image in zip(spans, images, strict=True):
        rows[row].append(columns[image.places])
    return [torch.cat(parts).sort(stable=True).values for parts in rows]


def gather_columns(values: Tensor, columns: list[Tensor], fill: int, left: bool) -> Tensor:
    """[..., B, T] -> [..., B, longest]: the named columns of each row, padded."""
    longest = max(len(row) for row in columns)
    out = values.new_full((*values.shape[:-1], longest), fill)
    for index, row in enumerate(columns):
        start = longest - len(row) if left else 0
        out[..., index, start : start + len(row)] = values[..., index, row]
    return out


def detached(image: KeptImage) -> KeptImage:
    """Without its features, which nobody needs after the call, and on the host."""
    return replace(image, features=image.features[:0], places=image.places.cpu(), indices=image.indices.cpu())
