"""`quantize.overrides`: which formats a linear gets, what is refused, and what identifies a run."""

import fnmatch
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qapbench import Format, RunSpec, UserError
from qapbench.methods.formats import LinearFormats

NAMES = [
    f"model.language_model.layers.{layer}.{name}"
    for layer in (0, 1, 10)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]
GLOBS = ["*", "down_proj", "*.down_proj", "layers.0.*", "layers.1.*", "mlp.*", "*q_proj", "layers.1*", NAMES[0], "proj"]
OWN: dict[str, dict[str, Any]] = {
    "weights": {"bits": 4, "group_size": 32},
    "activations": {"bits": 8, "symmetric": True},
}
CHANGES: list[dict[str, Any] | None] = [
    None,
    {"weights": {"bits": 8}},
    {"weights": {"bits": 2, "group_size": None}},
    {"weights": None},
    {"activations": None},
    {"activations": {"bits": 4, "symmetric": False}},
    {"weights": {"format": "fp8"}, "activations": {"format": "nvfp4"}},
]


INT8: dict[str, Any] = {side: {"bits": 8, "symmetric": True} for side in OWN}


def spec(overrides: Any, **quantize: Any) -> RunSpec:
    section = {"method": "rtn", **OWN, "overrides": overrides, **quantize}
    return RunSpec.parse({"model": "m", "task": "t", "quantize": section})


def formats(overrides: Any, linear: str, **quantize: Any) -> LinearFormats:
    section = spec(overrides, **quantize).quantize
    assert section is not None
    return section.formats_of(linear)


def wanted(change: Any) -> tuple[Format | None, Format | None]:
    """The formats of a change, written out."""
    if change is None:
        return None, None
    sides = []
    for side in ("weights", "activations"):
        own = change.get(side, {})
        base = {} if own and own.get("format", "int") != "int" else OWN[side]
        sides.append(None if own is None else Format.model_validate({**base, **own}))
    return sides[0], sides[1]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(GLOBS), st.sampled_from(CHANGES), max_size=5))
def test_the_first_that_fits_counts_and_the_rest_is_the_sections(overrides: dict[str, Any]) -> None:
    run = spec(overrides)
    assert run.quantize is not None
    for name in NAMES:
        parts = name.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        first = next((glob for glob in overrides if any(fnmatch.fnmatchcase(end, glob) for end in ends)), None)
        assert run.quantize.formats_of(name) == wanted({} if first is None else overrides[first])
    plain = run.model_dump(mode="json")
    assert RunSpec.parse(plain) == run
    assert ("overrides" in plain["quantize"]) == bool(overrides)


def test_a_run_without_overrides_has_the_id_that_it_always_had() -> None:
    assert spec({}).digest({}) == spec(None).digest({}) == spec([]).digest({})
    assert "overrides" not in spec({}).canonical()


def test_order_counts_for_the_id_since_it_counts_for_the_result() -> None:
    one, other = {"mlp.*": None, "*.down_proj": {"weights": {"bits": 8}}}, {"*.down_proj": {"weights": {"bits": 8}}}
    turned = {**other, "mlp.*": None}
    assert spec(one).digest({}) != spec(turned).digest({})
    assert formats(one, NAMES[2]) == (None, None)
    assert formats(turned, NAMES[2])[0] == Format(bits=8, group_size=32)


def test_formats_may_stand_in_overrides_alone() -> None:
    only = {"down_proj": {"weights": {"bits": 4}}}
    assert formats(only, NAMES[2], weights=None, activations=None) == (Format(bits=4), None)
    assert formats(only, NAMES[0], weights=None, activations=None) == (None, None)
    with pytest.raises(UserError, match="give `weights`, `activations` or both"):
        spec({"down_proj": None}, weights=None, activations=None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"*": {"weight": {"bits": 8}}}, r"quantize\.overrides\.\*\.weight: unknown field; did you mean 'weights'\?"),
        ({"*": {"weights": {"bits": 9}}}, r"quantize\.overrides\.\*\.weights\.bits: .* less than or equal to 8"),
        ({"*": {}}, r"quantize\.overrides\.\*: says nothing; give `weights`, `activations` or both"),
        ({"*": 8}, r"quantize\.overrides\.\*: expected `weights`, `activations` or both, or null"),
        ({"re:.*down": None}, r"a glob and no regular expression"),
        ("down_proj", r"quantize\.overrides: expected a mapping from globs to formats"),
        ({"*": {"activations": {"granularity": "channel"}}}, r"overrides\.\*\.activations\.granularity: this method"),
        ([{"linears": "*", "weights": {"bits": 1}}, 3], r"quantize\.overrides\.0\.weights\.bits.*\n.*overrides\.1: "),
    ],
)
def test_mistakes_are_named_at_their_place(overrides: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        spec(overrides)


@pytest.mark.parametrize("method", ["w4a4-g128", "qvlm", "llm_int8"])
def test_a_method_of_one_format_takes_full_precision_only(method: str) -> None:
    given: dict[str, Any] = {"weights": None, "activations": None}
    if method == "llm_int8":
        given = INT8
    assert formats({"*": None}, NAMES[0], method=method, **given) == (None, None)
    with pytest.raises(UserError, match=r"quantize\.overrides\.\*.*: .* by definition"):
        spec({"*": {"weights": {"bits": 3}}}, method=method, **given)


def test_a_kernel_has_to_exist_for_every_override() -> None:
    assert formats({"*": None}, NAMES[0], backend="torchao", **INT8) == (None, None)
    with pytest.raises(UserError, match=r"overrides\.\*\.backend: torchao runs W8A8"):
        spec({"*": {"weights": {"bits": 4}}}, backend="torchao", **INT8)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"down_prj": None}, r"overrides\.down_prj: fits no linear in scope; did you mean 'down_proj'\?"),
        ({"layer.0.*": None}, r"did you mean 'layers\.0'\?"),
        ({"model.layers.1.*": None}, r"did you mean 'language_model\.layers\.1'\?"),
        ({"*": None, "down_proj": None}, r"overrides\.down_proj: never counts, since those before it take all"),
    ],
)
def test_a_glob_that_fits_nothing_is_told_with_the_nearest_names(overrides: Any, said: str) -> None:
    section = spec(overrides).quantize
    assert section is not None
    with pytest.raises(UserError, match=said):
        section.formats(NAMES)
