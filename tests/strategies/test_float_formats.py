"""Floating-point formats against a transcription by tables, bit by bit; what hardware and libraries do at the edges."""

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qapbench import Format, LinearPlan, UserError, fake_quantize, ptqs
from qapbench.methods.packed import CannotPackError
from qapbench.quantize.measured_bits import measured_bits
from qapbench.spec.run_spec import QuantizeSpec

GROUPS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "fp8": None}
RULES: list[dict[str, Any]] = [
    *({"format": name, "scale": rule} for name in ("mxfp4", "mxfp8") for rule in ("floor", "even", "rceil", "ceil")),
    *({"format": name, "scale": "compressed_tensors"} for name in GROUPS),
    {"format": "nvfp4", "scale": "tensor"},
    {"format": "nvfp4", "scale": "block"},
    {"format": "fp8", "scale": "amax"},
    {"format": "fp8", "group_size": 24},
]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8 = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]


def nearest(value: float, table: list[float]) -> float:
    """By search: the nearest number of the table, the even code of two; NaN stays, the rest saturates."""
    if math.isnan(value):
        return value
    size = min(abs(value), table[-1])
    code = min(range(len(table)), key=lambda code: (abs(table[code] - size), code % 2))
    return math.copysign(table[code], value)


def scaled(x: float, divide: Tensor | None, factor: Tensor | None) -> float:
    wide = torch.tensor(x, dtype=torch.float32)
    return float(wide / divide if factor is None else wide * factor)


def by_table(row: Tensor, whole: Tensor, format: str, scale: str = "") -> list[float]:
    """One group, in float32 (and for FP8 in the row's dtype where the published code says so)."""
    table = FP8 if format in ("fp8", "mxfp8") else FP4
    top, ours = table[-1], scale != "compressed_tensors"
    most = row.abs().amax()
    m, divide, factor = float(most), None, None
    if format == "fp8":
        by = most / top
        if not ours:
            by = torch.where(by == 0, torch.finfo(row.dtype).eps, by)
            rounded = [nearest(float((value + 0) / by + 0), table) for value in row]
            return [float(torch.tensor(value, dtype=row.dtype) * by) for value in rounded]
        by = by.float()
        divide = torch.tensor(1.0) if by == 0 else by
        out = divide
    elif format == "nvfp4" and not ours:
        up = 448 * 6 / whole.clamp(min=torch.finfo(whole.dtype).tiny)
        up = torch.nan_to_num(up, 1.0, 1.0).float()
        block = torch.tensor(nearest(float(up * (most / 6)), FP8))
        out = divide = (block if block != 0 else torch.tensor(0.125)) / up
    elif format == "nvfp4":
        down = torch.tensor(1.0) if scale == "block" else whole.float() / (448 * 6)
        down = torch.tensor(1.0) if down == 0 else down
        block = torch.tensor(nearest(float((most.float() / 6 / down).clamp(2.0**-6, 448)), FP8))
        out, factor = down * block, (1 / down) / block
    else:
        emax, bits = {"mxfp4": (2, 1), "mxfp8": (8, 3)}[format]
        fraction, exponent = math.frexp(m)  # m = fraction * 2^exponent, 0.5 <= fraction < 1
        power, lead = (exponent - 1, 2 * fraction) if m >= 2.0**-126 else (-127, 0.0)
        if scale == "rceil":
            power = -127 if m == 0 else max(math.ceil(float((most.float() / top).log2())), -127)
            factor = torch.tensor(1.0) if power == -127 else torch.tensor(2.0**-power)
        elif scale == "ceil":
            power = max(power + (lead > 1 or (power == -127 and m > 0)) - emax, -127)
        else:
            kept = bits if scale == "even" else 1 if not ours else None
            power = max(power + (kept is not None and lead >= 2 - 2.0 ** -(kept + 1)) - emax, -127)
        out = torch.tensor(2.0**power)
        divide = out.clamp(min=2.0**-126) if ours else out
    plus = 0 if not ours else None
    values = [float(value) if plus is None else float(value) + 0.0 for value in row]
    return [
        float((torch.tensor(nearest(0 * v if v == 0 else scaled(v, divide, factor), table)) * out).to(row.dtype))
        for v in values
    ]


def inputs(dtype: torch.dtype) -> Tensor:
    """[8, 48]: plain and wide rows, ties of both elements, powers of two, zeros of both signs, values near the ends."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(8, 48, generator=draw)
    x[1] *= torch.exp2(torch.randint(-30, 30, (48,), generator=draw).float())
    x[2] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]).repeat(6) * torch.tensor([1.0, -1.0]).repeat(24)
    x[3] = torch.tensor([448.0, 449, 463, 465, 480, 496, 7, 3.5]).repeat(6) * 2.0**-3
    x[4, :16], x[4, 16:32] = 0, -0.0
    x[5] *= 2.0**-100
    x[6, ::3] = 2.0**10
    x[7, :16], x[7, 16:32], x[7, 32:] = x[7, :16] * 2.0**-10, 7 * 2.0**5, 6 * 2.0**5
    return x.to(dtype)


@pytest.mark.parametrize("fields", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rule_matches_tables(fields: dict[str, Any], dtype: torch.dtype) -> None:
    x, format = inputs(dtype), Format(**fields)
    got = format(x)
    assert got.dtype == dtype
    size = fields.get("group_size") or GROUPS[fields["format"]] or 48
    for row, out in zip(x, got, strict=True):
        rule = fields.get("scale", "")
        wanted = [v for part in row.split(size) for v in by_table(part, x.abs().amax(), fields["format"], rule)]
        assert out.tolist() == wanted
        assert [math.copysign(1, v) for v in out.tolist()] == [math.copysign(1, v) for v in wanted]


@pytest.mark.parametrize("fields", RULES, ids=str)
def test_edges(fields: dict[str, Any]) -> None:
    """Zeros give zeros, a group with a NaN is NaN, and finite values of a usual size stay finite in float16 too."""
    format = Format(**fields)
    for zeros in (torch.zeros(3, 64), -torch.zeros(3, 64), torch.full((3, 64), 1e-45)):
        assert torch.equal(format(zeros).abs(), torch.zeros(3, 64))
    some = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    some[1] = 0
    assert torch.equal(format(some)[1].abs(), torch.zeros(96))
    some[2, 5] = torch.nan
    out = format(some)
    assert out[2, : fields.get("group_size") or GROUPS[fields["format"]] or 96].isnan().all()
    large = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 3e4).clamp(-65504, 65504).half()
    assert torch.isfinite(format(large)).all()
    assert format(some[:2].half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", RULES, ids=str)
def test_the_largest_numbers_stay_finite(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Where a rounded scale times the largest level would be infinite; a grid of ranges rounds as a row of its own."""
    if fields["format"].startswith("mx") and fields.get("scale") == "compressed_tensors" and dtype != torch.float16:
        pytest.skip("this library's own scale is infinite there")
    format, largest = Format(**fields), torch.finfo(dtype).max
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(3)) - 0.5
    x = torch.cat([x.sign() * largest, 2 * (largest * x), 1.9 * x.sign() * (largest / 2)]).to(dtype)
    out = format(x)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    if fields.get("scale") != "block":  # whose scale ends at 448
        assert ((out.double() - x.double()).abs() <= 0.51 * largest).all()
    for other in ("tensor", "channel", "block") if fields["format"] == "fp8" and "group_size" not in fields else ():
        assert torch.isfinite(Format(**fields, granularity=other)(x)).all()
    with contextlib.suppress(CannotPackError):
        assert torch.equal(format.packed(x)(x), out)


@pytest.mark.parametrize("scale, exponents", [("floor", [0, 0, 0, 0, 1]), ("even", [0, 0, 0, 1, 1])])
def test_the_published_table_of_mxfp4(scale: Any, exponents: list[int]) -> None:
    """Largest magnitudes 5, 6, 6.99, 7 and 8: the scale is 2^exponent."""
    x = torch.zeros(5, 32)
    x[:, 0], x[:, 1] = torch.tensor([5.0, 6, 6.99, 7, 8]), 0.5
    assert (
        Format(format="mxfp4", scale=scale)(x)[:, 1] == torch.tensor([0.5 if e == 0 else 0.0 for e in exponents])
    ).all()


def test_each_sample_has_its_own_tensor_scale_and_padding_has_none() -> None:
    format, draw = Format(format="nvfp4"), torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 32, generator=draw) * torch.tensor([1.0, 1e-4])[:, None, None]
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False
    x[1, :2] = 300
    out = format(x, valid)
    assert torch.equal(out[0], format(x[0]))
    assert torch.equal(out[1, 2:], format(x[1, 2:]))
    assert not torch.equal(out[1, 2:], format(x[1])[2:])
    assert LinearPlan(None, format).needs_tokens
    assert not LinearPlan(None, Format(format="mxfp4")).needs_tokens


def test_blocks_tensors_and_channels_share_one_scale() -> None:
    x = torch.randn(40, 72, generator=torch.Generator().manual_seed(2))
    squares = Format(format="fp8", granularity="block", group_size=32)(x)
    for rows, columns in itertools.product((slice(0, 32), slice(32, 40)), (slice(0, 32), slice(32, 64), slice(64, 72))):
        part = x[rows, columns]
        assert torch.equal(squares[rows, columns], Format(format="fp8")(part.reshape(1, -1)).view_as(part))
    assert torch.equal(Format(format="fp8", granularity="channel")(x), Format(format="fp8")(x.mT).mT)
    assert torch.equal(Format(format="fp8", granularity="tensor")(x), Format(format="fp8")(x.reshape(1, -1)).view_as(x))


@pytest.mark.parametrize("name", GROUPS)
def test_gradients_pass_and_change_nothing(name: Any) -> None:
    format, x = Format(format=name), torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    wanted = format(x)
    x.requires_grad_(True)
    out = format(x)
    assert torch.equal(out.detach(), wanted)
    out.sum().backward()
    assert x.grad is not None
    assert 0.5 < float(x.grad.mean()) < 1.5


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_receipt_tells_levels_from_other_values(name: Any, dtype: torch.dtype) -> None:
    format = Format(format=name)
    for width in (16, 48, 256):
        x = torch.randn(12, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        assert measured_bits(format(x), format)[0] == format.bits
        assert measured_bits(x, format)[0] == torch.finfo(dtype).bits
        assert measured_bits(fake_quantize(x, 6, symmetric=True), format)[0] > 4


METHODS = [name for name in ptqs.names() if ptqs.create(name).formats is None and name != "llm_int8"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "fp8"])
def test_every_method_makes_levels_of_the_format(name: str, format: Any) -> None:
    """Each weight ends on levels of the format, those of NVFP4 with one scale of the tensor; or the method refuses."""
    asked, method = Format(format=format), ptqs.create(name)
    torch.manual_seed(0)
    linears = {"0": nn.Linear(64, 24)}
    model = nn.Sequential(*linears.values()).requires_grad_(False)
    if "int" in method.weight_formats and format not in method.weight_formats:
        with pytest.raises(UserError, match=f"weights.format: this method makes int, not '{format}'"):
            method.check(asked, None)
        return
    plan = method.prepare(model, linears, asked, asked, [torch.randn(9, 64) for _ in range(3)])["0"]
    assert plan.weight is not None
    weight = linears["0"].weight.detach()
    new = plan.weight(weight if plan.transform is None else plan.transform.weight(weight))
    assert measured_bits(new, asked)[0] == asked.bits
    assert measured_bits(plan.new_input(torch.randn(1, 5, 64)), asked)[0] == asked.bits


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"format": "nvfp4", "bits": 8}, "`bits` of nvfp4 is 4"),
        ({"format": "mxfp4", "group_size": 16}, "`group_size` of mxfp4 is 32"),
        ({"format": "mxfp4", "scale": "tensor"}, "`scale` of mxfp4 is one of rceil, floor, even, ceil"),
        ({"format": "mxfp8", "granularity": "tensor"}, "`granularity` of mxfp8 is row; leave it out"),
        ({"format": "fp8", "symmetric": False}, "`symmetric` of fp8 is True"),
        ({"format": "fp8", "divisor": "half"}, "`divisor` of fp8 is qmax"),
        ({"bits": 4, "scale": "floor"}, "`scale` is the rule of a floating-point format"),
        ({"bits": 4, "granularity": "block"}, "`granularity: block` is that of `format: fp8`"),
        ({"format": "fp6"}, "Input should be 'int', 'fp8', 'mxfp8', 'mxfp4' or 'nvfp4'"),
    ],
)
def test_formats_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Format(**fields)


def test_a_wrong_name_is_the_only_mistake() -> None:
    with pytest.raises(ValidationError, match="1 validation error"):
        Format.model_validate({"format": "nvpf4"})


def test_as_data() -> None:
    """An integer format is written as before, so that ids stay; a floating-point one can be read back."""
    fields = "bits group_size symmetric granularity divisor zero_point"
    assert " ".join(Format(bits=4).model_dump()) == fields
    for fields in RULES:
        format = Format(**fields)
        assert Format.model_validate(format.model_dump()) == format
        assert Format.model_validate_json(format.model_dump_json()) == format
    spec = QuantizeSpec.model_validate(
        {"method": "rtn", "weights": {"format": "nvfp4"}, "activations": {"format": "fp8"}}
    )
    assert spec.label == "rtn W4A8 nvfp4 fp8"
    assert [str(Format(**fields)) for fields in RULES[-4:]] == ["nvfp4", "nvfp4 block", "fp8 row", "fp8 g24"]
    with pytest.raises(ValidationError, match="torchao runs W8A8"):
        both = {"weights": {"format": "fp8"}, "activations": {"format": "fp8"}}
        QuantizeSpec.model_validate({"method": "rtn", "backend": "torchao", **both})
