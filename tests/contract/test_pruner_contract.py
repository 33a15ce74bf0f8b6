"""What every pruner owes, alone and fused with a sensitivity by every fusion."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qapbench import Pruner, Selection, UserError, VisionTokens, fusions, metrics, pruners
from qapbench.methods.pruner import Choice
from qapbench.methods.scores import min_max

each_pruner = pytest.mark.parametrize("name", pruners.names())
each_pair = pytest.mark.parametrize("name, fusion", list(itertools.product(pruners.names(), fusions.names())))

PER_TOKEN = (
    "projected",
    "patches",
    "cls_attention",
    "keys",
    "image_embeds",
    "last_cls_attention",
    "last_keys",
    "attention_received",
    "middle_attention_received",
    "shallow_cls_attention",
    "query_attention",
    "text_attention",
    "context_attention",
    "rotated_keys",
    "final_states",
)
PER_IMAGE = ("cls_token", "text_embeds", "prompt_embeds", "text_keys", "text_states", "downsampled", "embedded")

# Where permuting the tokens need not permute the answer: what of it does not follow, and why.
NOT_EQUIVARIANT = {
    "avgpool": ("indices", "cells are neighbours in the grid"),
    "downsample": ("indices", "cells are neighbours in the grid"),
    "divprune": ("indices", "two tokens that are each other's nearest tie for the first place, and the lower wins"),
    "hiprune": ("indices", "buffers are neighbours in the grid"),
    "prumerge_plus": ("indices", "samples are spread over the raster order"),
    "random": ("indices", "noise is drawn by position"),
    "holov": ("indices", "runs are neighbours in the raster order"),
    "tome": ("indices", "every second token of the raster order looks for one among the others"),
    "vtw": ("indices", "without a sensitivity no token is worth more than another, and the lower wins"),
    "visionzip": ("merged", "contextual targets are every step-th token of the raster order"),
}


def permuted(tokens: VisionTokens, order: Tensor) -> VisionTokens:
    fields = {name: value[:, order] for name in PER_TOKEN if (value := getattr(tokens, name)) is not None}
    return dataclasses.replace(tokens, **fields)


def cast(tokens: VisionTokens, dtype: torch.dtype) -> VisionTokens:
    names = PER_TOKEN + PER_IMAGE
    return dataclasses.replace(tokens, **{name: getattr(tokens, name).to(dtype) for name in names})


def switched_off(fusion: str) -> dict[str, Any]:
    """The parameters under which a fusion lets no sensitivity in."""
    return extreme(fusion, {"semantic": 1.0, "weight": 0.0})


def switched_on(fusion: str) -> dict[str, Any]:
    return extreme(fusion, {"semantic": 0.0, "weight": 50.0})


def extreme(fusion: str, values: dict[str, float]) -> dict[str, Any]:
    known = fusions.describe(fusion)["parameters"]
    chosen = {key: value for key, value in values.items() if key in known}
    assert len(chosen) == 1, f"fusion '{fusion}': neither `semantic` nor `weight`; say here what turns it off"
    return chosen


def check(selection: Selection, batch: int, count: int, keep: int) -> None:
    indices, merged = selection.indices, selection.merged
    assert selection.budget == keep
    assert indices.shape[0] == batch
    assert indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < count)).all()
    assert (indices.diff(dim=-1) > 0).all(), "not ascending, or twice the same"
    assert selection.mask(count).sum() == indices.numel()
    assert 0 <= selection.front <= (0 if merged is None else merged.shape[1])
    if merged is not None:
        assert indices.shape[1] + merged.shape[1] == keep
        assert merged.shape[0] == batch
        assert torch.isfinite(merged).all()
        assert selection.space in ("patches", "projected")
    if selection.updated is not None:
        assert selection.updated.shape[:2] == indices.shape
        assert selection.made is None or selection.made.shape == indices.shape
        assert torch.isfinite(selection.updated).all()


def same(one: Selection, other: Selection) -> bool:
    """Equal to the bit."""
    for a, b in ((one.merged, other.merged), (one.updated, other.updated)):
        if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
            return False
    return torch.equal(one.indices, other.indices)


def close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-6)


@each_pruner
@pytest.mark.parametrize("keep", [1, 2, 24, 48, 49])
@pytest.mark.parametrize("fused", [False, True])
def test_exact_budget_and_determinism(name: str, keep: int, fused: bool, tokens: VisionTokens) -> None:
    before = [getattr(tokens, field).clone() for field in PER_TOKEN + PER_IMAGE]
    sensitivity = metrics.create("combined")(tokens.projected) if fused else None
    selection = pruners.create(name).select(tokens, keep, sensitivity)
    check(selection, 3, 49, keep)
    assert same(selection, pruners.create(name).select(tokens, keep, sensitivity))
    after = [getattr(tokens, field) for field in PER_TOKEN + PER_IMAGE]
    assert all(map(torch.equal, before, after)), "the tokens were changed"


@each_pruner
def test_keeping_all_keeps_the_tokens_as_they_are(name: str, tokens: VisionTokens) -> None:
    selection = pruners.create(name).select(tokens, 49)
    assert selection.merged is None
    assert torch.equal(selection.indices, torch.arange(49).expand(3, 49))


@each_pruner
def test_one_token(name: str, tokens_of: Any) -> None:
    check(pruners.create(name).select(tokens_of(batch=2, grid=(1, 1)), 1), 2, 1, 1)


@each_pruner
@pytest.mark.parametrize("count", [2, 3])
def test_few_tokens(name: str, count: int, tokens_of: Any) -> None:
    few = tokens_of(batch=2, grid=(1, count))
    for keep in range(1, count + 1):
        check(pruners.create(name).select(few, keep, metrics.create("l2")(few.projected)), 2, count, keep)


@each_pruner
@pytest.mark.parametrize("keep", [0, -1, 50])
def test_a_budget_out_of_range_is_refused(name: str, keep: int, tokens: VisionTokens) -> None:
    with pytest.raises(UserError, match=rf"keep={keep} is out of range: an image has 49 tokens"):
        pruners.create(name).select(tokens, keep)


@each_pruner
@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_changes_nothing(name: str, fused: bool, tokens: VisionTokens) -> None:
    pruner = pruners.create(name)
    for keep in (1, 2, 24, 48):
        sensitivity = metrics.create("combined")(tokens.projected) if fused else None
        together = pruner.select(tokens, keep, sensitivity)
        rows = [None if sensitivity is None else sensitivity[i : i + 1] for i in range(3)]
        alone = Selection.stack([pruner.select(tokens[i], keep, rows[i]) for i in range(3)])
        assert torch.equal(together.indices, alone.indices)
        assert close(together.merged, alone.merged)
        assert close(together.updated, alone.updated)
        assert (together.space, together.front) == (alone.space, alone.front)


@each_pruner
def test_permuting_tokens_permutes_the_choice(name: str, tokens: VisionTokens) -> None:
    exempt, _reason = NOT_EQUIVARIANT.get(name, ("", ""))
    order = torch.randperm(49, generator=torch.Generator().manual_seed(5))
    place = order.argsort()  # where each token went
    sensitivity = metrics.create("combined")(tokens.projected)
    moved = permuted(tokens, order)
    for keep in (1, 2, 24, 48):
        for scores in (None, sensitivity):
            one = pruners.create(name).select(tokens, keep, scores)
            other = pruners.create(name).select(moved, keep, None if scores is None else scores[:, order])
            if exempt != "indices":
                assert torch.equal(place[one.indices].sort(dim=-1).values, other.indices)
            if exempt == "":
                assert close(one.merged, other.merged)
                if one.updated is not None and other.updated is not None:
                    rows = place[one.indices].argsort(dim=-1).unsqueeze(-1)
                    assert close(one.updated.take_along_dim(rows, dim=1), other.updated)


@pytest.mark.parametrize("name", sorted(NOT_EQUIVARIANT))
def test_the_exceptions_are_needed(name: str, tokens: VisionTokens) -> None:
    order = torch.randperm(49, generator=torch.Generator().manual_seed(5))
    follows = []
    for keep in (24, 32):
        one = pruners.create(name).select(tokens, keep)
        other = pruners.create(name).select(permuted(tokens, order), keep)
        moved = order.argsort()[one.indices].sort(dim=-1).values
        found = {"indices": torch.equal(moved, other.indices), "merged": close(one.merged, other.merged)}
        follows.append(found[NOT_EQUIVARIANT[name][0]])
    assert not all(follows), "take it out of NOT_EQUIVARIANT"


@each_pair
@pytest.mark.parametrize("keep", [1, 16, 48])
def test_weight_zero_is_semantic_only(name: str, fusion: str, keep: int, tokens: VisionTokens) -> None:
    pruner, sensitivity = pruners.create(name), metrics.create("combined")(tokens.projected)
    fuse = fusions.create(fusion, **switched_off(fusion))
    assert same(pruner.select(tokens, keep, sensitivity, fuse), pruner.select(tokens, keep))


@each_pair
def test_sensitivity_with_weight_changes_the_choice(name: str, fusion: str, tokens: VisionTokens) -> None:
    pruner, sensitivity = pruners.create(name), metrics.create("combined")(tokens.projected)
    fuse = fusions.create(fusion, **switched_on(fusion))
    fused = pruner.select(tokens, 16, sensitivity, fuse)
    assert not torch.equal(fused.indices, pruner.select(tokens, 16).indices)
    check(fused, 3, 49, 16)


@each_pair
def test_constant_sensitivity_changes_nothing(name: str, fusion: str, tokens: VisionTokens) -> None:
    """A metric that tells no tokens apart has no say in methods that only order; none may become NaN."""
    constant = torch.full((3, 49), 7.0)
    chosen = pruners.create(name).select(tokens, 16, constant, fusions.create(fusion))
    check(chosen, 3, 49, 16)


@each_pruner
def test_the_default_fusion_is_applied(name: str, tokens: VisionTokens) -> None:
    sensitivity = metrics.create("l2")(tokens.projected)
    pruner = pruners.create(name)
    named = pruner.select(tokens, 16, sensitivity, fusions.create("convex", semantic=0.7))
    assert same(pruner.select(tokens, 16, sensitivity), named)


@each_pruner
def test_wrong_sensitivity_refused(name: str, tokens: VisionTokens) -> None:
    pruner = pruners.create(name)
    for shape in ((3, 48), (1, 49), (49,), (3, 49, 1)):
        with pytest.raises(UserError, match=r"sensitivity: expected \[3, 49\]"):
            pruner.select(tokens, 8, torch.ones(shape))
    with pytest.raises(UserError, match="sensitivity: expected a floating tensor"):
        pruner.select(tokens, 8, torch.ones(3, 49, dtype=torch.long))
    for bad in (float("nan"), float("inf")):
        sensitivity = torch.ones(3, 49)
        sensitivity[2, 3] = bad
        with pytest.raises(UserError, match="sensitivity: 1 of 147 values are not finite"):
            pruner.select(tokens, 8, sensitivity)


@each_pruner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype, tokens: VisionTokens) -> None:
    half = cast(tokens, dtype)
    sensitivity = metrics.create("combined")(half.projected).to(dtype)
    for keep in (1, 2, 24, 48):
        check(pruners.create(name).select(half, keep, sensitivity), 3, 49, keep)


@each_pruner
@pytest.mark.parametrize("sizes", [[7] * 9, [7, 5, 7, 7, 3]])
def test_relevance_beside_others_keeps_its_bits(name: str, sizes: list[int], tokens_of: Any) -> None:
    pruner = pruners.create(name)
    several = [tokens_of(batch=1 + at % 2, grid=(side, side), seed=at) for at, side in enumerate(sizes)]
    several += [tokens_of(batch=1, grid=(side, side), seed=at) for at, side in enumerate(sizes)]
    alone = [pruner.relevance(one) for one in several]
    for first in (0, len(sizes)):
        for count in range(1, len(sizes) + 1):
            found = pruner.relevance_each(several[first : first + count])
            for one, other in zip(found, alone[first:], strict=False):
                assert one is other if one is None or other is None else torch.equal(one, other)


@pytest.mark.parametrize("fusion", fusions.names())
@pytest.mark.parametrize("count", [49, 144, 7])
def test_scores_fused_beside_others_keep_their_bits(fusion: str, count: int, tokens_of: Any) -> None:
    draw, fuse = torch.Generator().manual_seed(2), fusions.create(fusion)
    several = [
        Choice(tokens_of(batch=1, grid=(1, count), seed=at), *torch.rand(2, 1, count, generator=draw))
        for at in range(9)
    ]
    pruner = pruners.create("cdpruner")
    alone = [pruner.scores(*one[:2], fuse, one.relevance) for one in several]
    for number in range(2, 10):
        assert all(map(torch.equal, pruner._scores_each(several[:number], fuse), alone))


@pytest.mark.parametrize("together", [False, True])
def test_scores_in_half_precision_are_normalised_in_float32(together: bool, tokens: VisionTokens) -> None:
    scores = metrics.create("l2")(tokens.projected).bfloat16()
    choices = (
        [Choice(tokens, relevance=scores)] * 2 if together else [Choice(tokens, relevance=scores, sensitivity=scores)]
    )
    seen: list[Tensor] = []

    class Seeing(Pruner):
        def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
            seen.append(scores)
            return Selection(torch.arange(keep).expand(tokens.batch, -1))

    Seeing().select_each(choices, 12)
    wide = min_max(scores.float())
    expected = wide if together else fusions.create(fusions.default)(wide, wide)
    assert [one.dtype for one in seen] == [torch.float32] * len(choices)
    assert all(torch.equal(one, expected) for one in seen)


@each_pruner
def test_what_it_needs_is_named(name: str, tokens: VisionTokens) -> None:
    """It reads nothing that it does not name, and a missing field is an error that says who needs it."""
    pruner = pruners.create(name)
    needed = pruner.needs | {"projected"}
    assert pruner.optional <= pruner.needs
    fields = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    kept = {key: value for key, value in fields.items() if key in needed or key == "heads"}
    if "keys" not in kept:
        kept.pop("heads")
    assert same(pruner.select(VisionTokens(**kept), 16), pruner.select(tokens, 16))
    for field in sorted(pruner.needs):
        without = VisionTokens(**{key: value for key, value in kept.items() if key != field})
        if field in pruner.optional:
            check(pruner.select(without, 16), 3, 49, 16)
        else:
            with pytest.raises(UserError, match=rf"needs tokens\.{field}"):
                pruner.select(without, 16)


@each_pruner
def test_identical_tokens(name: str, tokens: VisionTokens) -> None:
    """Rank one and every score a tie: still exactly `keep` distinct tokens."""
    fields = {field: getattr(tokens, field)[:, :1].expand_as(getattr(tokens, field)) for field in PER_TOKEN}
    alike = dataclasses.replace(tokens, **fields)
    for keep in (1, 2, 24, 48):
        check(pruners.create(name).select(alike, keep, torch.zeros(3, 49)), 3, 49, keep)


@pytest.mark.parametrize("field", PER_TOKEN + PER_IMAGE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_tokens_are_refused_by_name(field: str, bad: float, tokens: VisionTokens) -> None:
    value = getattr(tokens, field).clone()
    value.view(-1)[3] = bad
    with pytest.raises(UserError, match=rf"tokens\.{field}: 1 of {value.numel()} values are not finite"):
        dataclasses.replace(tokens, **{field: value})


def test_vision_tokens_check_shapes_once(tokens: VisionTokens) -> None:
    wrong: dict[str, Any] = {
        "patches": torch.zeros(3, 48, 40),
        "cls_attention": torch.zeros(3, 49, 1),
        "keys": torch.zeros(2, 49, 32),
        "cls_token": torch.zeros(3, 41),
        "text_embeds": torch.zeros(3, 2, 25),
        "image_embeds": torch.zeros(3, 49, 24, dtype=torch.long),
        "prompt_embeds": "text",
    }
    for field, value in wrong.items():
        with pytest.raises(UserError, match=r"tokens\.\w+: ") as whole:
            dataclasses.replace(tokens, **{field: value})
        with pytest.raises(UserError) as added:
            dataclasses.replace(tokens, **{field: None}).adding("positive", **{field: value})
        assert str(added.value).split(":")[0] == str(whole.value).split(":")[0]
    for field, value in {"grid": (7, 8), "heads": 5, "image_ids": ("a",)}.items():
        with pytest.raises(UserError, match=r"tokens\.(grid|keys|image_ids): "):
            dataclasses.replace(tokens, **{field: value})


def test_images_of_a_batch(tokens: VisionTokens) -> None:
    assert torch.equal(tokens[1].projected, tokens.projected[1:2])
    assert tokens[-1].image_ids == tokens[2].image_ids == ("image-0-2",)
    assert tokens[1:].batch == 2
    with pytest.raises(IndexError):
        tokens[3]
    one_by_one = [image.image_ids for image in itertools.islice(tokens, 10)]
    assert one_by_one == [("image-0-0",), ("image-0-1",), ("image-0-2",)], "iteration must end"


class Faulty(Pruner):
    """A method with a fault: the base class says which, instead of handing it on."""

    def __init__(self, indices: Tensor, relevance: Tensor | None = None) -> None:
        self.indices, self.scored = indices, relevance

    def relevance(self, tokens: VisionTokens) -> Tensor | None:
        return self.scored

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(self.indices)


@pytest.mark.parametrize(
    "row, message",
    [
        ([4, 4], "Faulty chose a token twice"),
        ([1, 2, 3], "Faulty kept 3 tokens where 2 were asked for"),
        ([1, 49], r"Faulty chose a token outside 0\.\.48"),
        ([-1, 4], r"Faulty chose a token outside 0\.\.48"),
    ],
)
def test_a_faulty_method_is_named(row: list[int], message: str, tokens: VisionTokens) -> None:
    with pytest.raises(RuntimeError, match=message):
        Faulty(torch.tensor([row] * 3)).select(tokens, 2)


def test_the_base_class_sorts(tokens: VisionTokens) -> None:
    chosen = Faulty(torch.tensor([[9, 2]] * 3)).select(tokens, 2)
    assert chosen.indices.tolist() == [[2, 9]] * 3


def test_bad_relevance_and_bad_fusion_are_named(tokens: VisionTokens) -> None:
    good = torch.tensor([[1, 2]] * 3)
    with pytest.raises(UserError, match="relevance: 147 of 147 values are not finite"):
        Faulty(good, torch.full((3, 49), float("nan"))).select(tokens, 2)
    with pytest.raises(UserError, match=r"relevance: expected \[3, 49\], got \(3, 48\)"):
        Faulty(good, torch.zeros(3, 48)).select(tokens, 2)
    fine = Faulty(good, torch.rand(3, 49))
    with pytest.raises(UserError, match="fusion: scores: 147 of 147 values are not finite"):
        fine.select(tokens, 2, torch.rand(3, 49), lambda r, s: r / 0)
    with pytest.raises(UserError, match=r"fusion: scores: expected \[3, 49\], got \(3,\)"):
        fine.select(tokens, 2, torch.rand(3, 49), lambda r, s: r[:, 0])
