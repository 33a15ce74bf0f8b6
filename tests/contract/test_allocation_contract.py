"""What every allocation of bits owes, and what a model makes of what it chose (`quantize.allocate`)."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_checkpoints import THREE
from test_ptq_on_a_model import logits, samples_of

from qapbench import CalibrationSamples, RunSpec, UserError, allocations, compress, cost

each_allocation = pytest.mark.parametrize("name", allocations.names())
BITS = [2, 3, 4, 8]
quick = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@each_allocation
@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 10**6), st.floats(2, 8))
def test_the_mean_is_kept_and_the_choice_is_the_same_again(name: str, sizes: list[int], seed: int, mean: float) -> None:
    errors = torch.rand(len(sizes), len(BITS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = allocations.create(name)(errors, BITS, sizes, mean)
    assert len(chosen) == len(sizes)
    spent = sum(size * BITS[place] for size, place in zip(sizes, chosen, strict=True))
    assert spent <= mean * sum(sizes) + 1e-6
    assert allocations.create(name)(errors.clone(), list(BITS), list(sizes), mean) == chosen


@quick
@given(
    st.lists(st.sampled_from([5, 12, 24, 30]), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.floats(2, 9),
    st.booleans(),
)
def test_sensitivity_is_the_best_of_all_choices(sizes: list[int], seed: int, mean: float, tied: bool) -> None:
    errors = torch.rand(len(sizes), len(BITS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    errors = (errors * 4).round() if tied else errors
    chosen = allocations.create("sensitivity")(errors, BITS, sizes, mean)

    def total(places: Any) -> float:
        return sum(float(errors[layer, place]) for layer, place in enumerate(places))

    every = itertools.product(range(len(BITS)), repeat=len(sizes))
    within = (c for c in every if sum(n * BITS[i] for n, i in zip(sizes, c, strict=True)) <= mean * sum(sizes) + 1e-6)
    assert total(chosen) == pytest.approx(min(map(total, within)))


def test_sizes_of_real_models_keep_the_budget_too() -> None:
    """Weights with no large common divisor: costs are rounded up to steps."""
    sizes = [4096 * 4096 + layer for layer in range(48)]
    errors = (
        torch.rand(48, len(BITS), generator=torch.Generator().manual_seed(3), dtype=torch.float64).sort(dim=1).values
    )
    chosen = allocations.create("sensitivity")(errors.flip(1), BITS, sizes, 4.0)
    spent = sum(size * BITS[place] for size, place in zip(sizes, chosen, strict=True)) / sum(sizes)
    assert 3.9 < spent <= 4
    with pytest.raises(UserError, match="less than the fewest of the choices"):
        allocations.create("sensitivity")(errors, BITS, sizes, 1.9)


@pytest.fixture(scope="module")
def samples(processor: Any) -> list[dict[str, Any]]:
    return samples_of(processor, THREE[:1])


@each_allocation
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("per", ["layer", "linear"])
def test_what_was_chosen_can_be_copied_as_overrides(
    name: str, method: str, per: str, model: Any, samples: Any, asked: Any, tmp_path: Path
) -> None:
    allocate = {"method": name, "bits": 3.5, "choices": [8, 2, 4], "per": per}
    spec = {"method": method, "weights": {"bits": 4, "group_size": 16}, "overrides": {"layers.0.self_attn.*": None}}
    source = CalibrationSamples(samples, cache=tmp_path, fingerprints={"model": "one"})
    outputs = []
    for _ in range(2):  # measured, then read
        with compress(model, {"quantize": {**spec, "allocate": allocate}}, calibration=source) as receipt:
            outputs.append(logits(model, asked))
    receipt.check()
    use = receipt.allocation
    assert use is not None
    assert receipt.calibration is not None
    assert receipt.calibration.reused
    assert use.bits <= use.bits_asked == 3.5
    assert len(use.errors) == len(use.overrides) == (2 if per == "layer" else 3 + 7)
    assert all(row[0] > row[1] > row[2] > 0 for row in use.errors.values()), "fewer bits, more error"
    overrides = {**spec["overrides"], **use.overrides}
    with compress(model, {"quantize": {**spec, "overrides": overrides}}, calibration=samples) as copied:
        outputs.append(logits(model, asked))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert [line.weight_bits for line in copied.linears] == [line.weight_bits for line in receipt.linears]
    assert f"bits per weight, by {name})" in receipt.summary()
    planned, measured = (
        cost(model, {"quantize": {**spec, **more}}, receipt=receipt.linears)
        for more in ({"overrides": overrides}, {"allocate": allocate})
    )
    assert measured.weight_bytes == planned.weight_bytes
    assert measured.bops == planned.bops


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"allocate": "sensitivty"}, r"quantize\.allocate\.method: no allocation .*did you mean 'sensitivity'"),
        ({"allocate": {"method": "sensitivity", "bits": 2, "choices": [4]}}, r"allocate\.bits: a mean of 2 is less"),
        ({"allocate": {"method": "sensitivity", "choices": [9]}}, r"allocate\.choices\.0: .* less than or equal to 8"),
        ({"weights": {"format": "nvfp4"}}, r"quantize\.allocate: nvfp4 weights have no bits to choose"),
        ({"weights": None, "activations": {"bits": 8}}, r"quantize\.allocate: weights that are not quantized"),
        (
            {"method": "w4a4-g128", "weights": None},
            r"quantize\.allocate\.choices: w4a4-g128 is one format by definition",
        ),
    ],
)
def test_mistakes_are_named_at_their_place(changed: dict[str, Any], said: str) -> None:
    quantize = {"method": "rtn", "weights": {"bits": 4}, "allocate": "sensitivity", **changed}
    with pytest.raises(UserError, match=said):
        RunSpec.parse({"model": "m", "task": "t", "quantize": quantize})


def test_a_run_says_how_it_allocates() -> None:
    def of(**more: Any) -> RunSpec:
        return RunSpec.parse({"model": "m", "task": "t", "quantize": {"method": "rtn", "weights": {"bits": 4}, **more}})

    run = of(allocate="sensitivity")
    assert run.quantize is not None
    assert run.quantize.calibration is not None
    assert run.quantize.label == "rtn W4A16 (mean 4 bits by sensitivity)"
    assert RunSpec.parse(run.model_dump(mode="json")) == run
    assert len({one.digest({}) for one in (of(), run, of(allocate={"method": "sensitivity", "bits": 5}))}) == 3
    assert "allocate" not in of().canonical()


def test_without_samples_it_says_so(model: Any) -> None:
    spec = {"quantize": {"method": "rtn", "weights": {"bits": 4}, "allocate": "sensitivity"}}
    with (
        pytest.raises(UserError, match=r"quantize\.allocate: sensitivity needs calibration samples"),
        compress(model, spec),
    ):
        pass


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([0], r"for each of 2 layers the index of its bits in \[2, 3, 4, 8\], got \[0\]"),
        ([0, 4], r"got \[0, 4\]"),
        ([0, -1], r"got \[0, -1\]"),
        ([2.0, 0], r"got \[2.0, 0\]"),
        ([3, 3], "takes 8 bits per weight, more than the mean of 3"),
    ],
)
def test_what_a_method_may_not_return_is_said(
    places: Any, said: str, model: Any, samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocations, "create", lambda *_, **__: lambda *_: places)
    asked = {"method": "rtn", "weights": {"bits": 3}, "allocate": "sensitivity"}
    with pytest.raises(UserError, match=said), compress(model, {"quantize": asked}, calibration=samples):
        pass
