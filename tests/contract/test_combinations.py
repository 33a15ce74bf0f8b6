"""Every quantization method with every pruner: an answer with a right receipt, or one sentence why not.

Here each of these pairs runs on one of the families; `qapbench list --matrix ptq` runs and shows it on all of them.
"""

import itertools
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from test_ptq_contract import made_by, method
from typer.testing import CliRunner

from qapbench import Format, LinearPlan, Tokens, UserError, compress, fusions, pruners, ptqs
from qapbench.analysis import compatibility
from qapbench.analysis.compatibility import KEEP, CompatibilityResult, run_ptq_matrix, sampled
from qapbench.cli import app
from qapbench.models.family import families
from qapbench.quantize.measured_bits import measured_bits


def test_the_sample_has_every_pair_once() -> None:
    taken = {(family, ptq): sampled(family, ptq) for family in families.names() for ptq in ptqs.names()}
    pairs = [(ptq, pruner) for (_, ptq), some in taken.items() for pruner in some]
    assert sorted(pairs) == sorted(itertools.product(ptqs.names(), pruners.names()))


@pytest.mark.parametrize("family", families.names())
def test_every_combination(family: str) -> None:
    cells = list(run_ptq_matrix([family], new_tokens=1, sample=True))
    assert {(q, p) for q in ptqs.names() for p in sampled(family, q)} == {(cell.ptq, cell.pruner) for cell in cells}
    assert [cell for cell in cells if cell.outcome == "failed"] == []
    for cell in cells:
        assert bool(cell.reason) == (cell.outcome == "refused")
        if cell.outcome == "refused" and "linear attention" in cell.reason:
            assert cell.reason.startswith("prune.method: ")
        elif cell.outcome == "refused":
            assert cell.pruner in cell.reason
            assert str(cell.ptq) in cell.reason or "which this model does not offer" in cell.reason
        else:
            assert cell.tokens["mean"] < cell.tokens["available"]


@pytest.mark.parametrize("fusion", fusions.names())
def test_every_fusion_of_a_quantized_model(fusion: str) -> None:
    """Sensitivity inside the decoder is that of quantized hidden states, and their receipt stays right."""
    model, inputs = families.create("llava").tiny()
    int8 = {"bits": 8, "symmetric": True}
    quantize = {"method": "llm_int8", "weights": int8, "activations": int8}
    for pruner in pruners.names():
        prune = {"method": pruner, "keep": KEEP, "sensitivity": "combined", "fusion": fusion}
        with torch.inference_mode(), compress(model, {"quantize": quantize, "prune": prune}) as receipt:
            assert torch.isfinite(model(**inputs).logits).all()
        receipt.check()
        assert receipt.most == KEEP


def test_calibration_pruned_inside_the_decoder_is_refused_by_name() -> None:
    model, inputs = families.create("llava").tiny()
    spec = {
        "quantize": {"method": "qvlm", "calibration": {"pruned": True}},
        "prune": {"method": "fastv", "keep": KEEP},
    }
    with pytest.raises(UserError, match="fastv drops tokens inside the decoder"):
        compress(model, spec, calibration=[inputs]).__enter__()


def test_the_command(monkeypatch: Any) -> None:
    told = [
        CompatibilityResult("llava", "random", "runs", ptq="rtn", activations="8-bit sym row"),
        CompatibilityResult(
            "llava", "fastv", "refused", "rtn and fastv differ", ptq="rtn", activations="8-bit sym row"
        ),
    ]
    monkeypatch.setattr(compatibility, "run_ptq_matrix", lambda: iter(told))
    run = CliRunner().invoke(app, ["list", "--matrix", "ptq", "--json"])
    assert json.loads(run.stdout) == [cell.to_json() for cell in told]
    monkeypatch.setattr("qapbench.cli.items.out", Console(width=200))
    table = CliRunner().invoke(app, ["list", "--matrix", "ptq"]).stdout
    assert "refused [1]" in table
    assert "[1] rtn and fastv differ" in table
    wrong = CliRunner().invoke(app, ["list", "--matrix", "fusions"])
    assert wrong.exit_code != 0


@pytest.mark.parametrize("name", ptqs.names())
def test_what_every_forward_pass_reads_lives_where_the_weight_lives(name: str) -> None:
    """A plan placed on another device reads no tensor that stayed behind: `meta` stands for a GPU."""
    model = torch.nn.Sequential(torch.nn.Linear(48, 40), torch.nn.GELU(), torch.nn.Linear(40, 24))
    linears = {key: linear for key, linear in model.named_modules() if isinstance(linear, torch.nn.Linear)}
    samples = [torch.randn(5, 48) for _ in range(2)]
    plans = method(name).prepare(model, linears, *made_by(name), samples)
    for key, plan in plans.items():
        assert plan.to(torch.device("cpu")) == plan, "what is in place already is not copied"
        placed: LinearPlan = plan.to(torch.device("meta"))
        held = [placed.transform, placed.activation]
        assert {tensor.device.type for part in held for tensor in tensors_in(part)} <= {"meta"}
        x = torch.empty(1, 4, linears[key].in_features, device="meta")
        every = torch.ones(1, 4, dtype=torch.bool, device="meta")
        assert placed.new_input(x, Tokens(every, every)).device.type == "meta"


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, Format) or not hasattr(value, "__dict__"):
        return []
    return [tensor for inner in vars(value).values() for tensor in tensors_in(inner)]


def test_no_linear_keeps_a_mask() -> None:
    """llm_int8 tells the receipt where it was exact, one flag per channel, and keeps nothing afterwards."""
    model, inputs = families.create("llava").tiny()
    int8 = {"bits": 8, "symmetric": True}
    spec = {"quantize": {"method": {"llm_int8": {"threshold": 1.0}}, "weights": int8, "activations": int8}}
    made: list[Any] = []
    activation = (
        ptqs.create("llm_int8", threshold=1.0)
        .prepare(model, {"one": torch.nn.Linear(48, 48)}, None, Format(**int8))["one"]
        .activation
    )
    activation(torch.randn(2, 500, 48))  # type: ignore[misc]
    assert activation.exact.shape == (2, 1, 48)  # type: ignore[union-attr]
    kind = type(activation)
    with pytest.MonkeyPatch.context() as patch:
        plain = kind.__init__
        patch.setattr(kind, "__init__", lambda self, *args: (plain(self, *args), made.append(self))[0])
        with torch.inference_mode(), compress(model, spec) as receipt:
            model(**inputs)
            assert len(made) == len(receipt.linears)
            assert all(one.exact is None for one in made)
    assert any(line.activation_exact for line in receipt.linears)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 5, 11, 16, 17, 40])
def test_few_tokens_show_that_their_channels_are_quantized(tokens: int, dtype: torch.dtype) -> None:
    """One range per channel, taken from the values or wider: up to 16 tokens have no more than 16 values anyway."""
    format = Format(bits=4, granularity="channel", zero_point="free")
    x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    wide = format.levels.grid(-3.1 * torch.ones(64), 3.7 * torch.ones(64))
    assert measured_bits(format(x), format)[0] == 4
    assert measured_bits(wide(x), format)[0] == 4
    if tokens > 3:  # three values lie on some grid
        assert measured_bits(x, format)[0] == torch.finfo(dtype).bits or (dtype == torch.bfloat16 and tokens < 8)
