"""LLaVA-1.5-7B, 576 to 32 tokens, W4A4: every number of the example in docs/cost.md, by hand."""

import json
import math
import re
from pathlib import Path

import pytest

from qapbench import Cost, Prompt, UserError, cost
from qapbench.costing.known import known_configs

LAYERS, WIDTH, INNER, WORDS, TEXT = 32, 4096, 11008, 32064, 64
WEIGHTS = 4 * WIDTH**2 + 3 * WIDTH * INNER  # of a layer's linears: query, key, value, output; gate, up, down
ROWS = 4 * WIDTH + 2 * INNER + WIDTH  # their output channels
PRUNE = {"method": "cdpruner", "keep": 32}
W4A4 = {"method": "rtn", "weights": {"bits": 4}, "activations": {"bits": 4}}
FOUR = {"weights": {"bits": 4, "symmetric": True}, "activations": {"bits": 4, "symmetric": True}}
ONLINE = ("quarot", "quip")
PARAMETERS = 7_063_427_072  # of the checkpoint, in float16


@pytest.fixture(scope="module")
def dense() -> Cost:
    return cost("llava-1.5-7b")


@pytest.fixture(scope="module")
def pruned() -> Cost:
    return cost("llava-1.5-7b", {"prune": PRUNE})


@pytest.fixture(scope="module")
def both() -> Cost:
    return cost("llava-hf/llava-1.5-7b-hf", {"prune": PRUNE, "quantize": W4A4})


def prefill(tokens: int) -> int:
    return LAYERS * (2 * WEIGHTS * tokens + 4 * WIDTH * tokens**2) + 2 * WIDTH * WORDS


def test_flops(dense: Cost, pruned: Cost, both: Cost) -> None:
    assert WEIGHTS == 202_375_168
    assert dense.flops.prefill == prefill(576 + TEXT)
    assert pruned.flops.prefill == both.flops.prefill == prefill(32 + TEXT)
    assert pruned.flops.prefill / dense.flops.prefill == pytest.approx(0.147, abs=5e-4)
    decoded = LAYERS * (2 * WEIGHTS + 4 * WIDTH * (96 + 1)) + 2 * WIDTH * WORDS
    assert pruned.flops.decode == decoded
    tower = 23 * (577 * 2 * 12 * 1024**2 + 4 * 1024 * 577**2) + 576 * 2 * 3 * 14**2 * 1024
    assert dense.flops.tower == tower, "the 24th layer is read by nobody"
    assert dense.flops.projector == 576 * 2 * (1024 * WIDTH + WIDTH**2)
    assert dense.flops.selection == 0
    # CDPruner: the text tower (12 layers of width 768 on 32 tokens), the patches in the joint space, and its kernel.
    text = 12 * (32 * 2 * 12 * 768**2 + 4 * 768 * 32**2) + 2 * 768**2
    kernel = 2 * 576**2 * WIDTH
    assert text + 2 * 1024 * 768 * 576 < pruned.flops.selection <= 1.2 * (text + 2 * 1024 * 768 * 576 + kernel)
    assert pruned.flops.prompt / 1e12 == pytest.approx(1.65, abs=0.01)


def test_bops(pruned: Cost, both: Cost) -> None:
    linears, rest = LAYERS * 2 * WEIGHTS * 96, LAYERS * 4 * WIDTH * 96**2 + 2 * WIDTH * WORDS
    assert pruned.bops.prefill == pruned.flops.prefill
    assert both.bops.prefill == pytest.approx(linears / 16 + rest)
    assert both.bops.prefill / 1e12 == pytest.approx(0.083, abs=5e-4)


def test_bytes(dense: Cost, pruned: Cost, both: Cost) -> None:
    assert dense.weight_bytes == pruned.weight_bytes == 2 * PARAMETERS
    linears = LAYERS * WEIGHTS
    stored = linears // 2 + LAYERS * ROWS * 2 + LAYERS * ROWS // 2  # levels, float16 scales, 4-bit zero points
    assert both.weight_bytes == 2 * (PARAMETERS - linears) + stored == 4_416_245_760
    assert dense.kv_bytes == 640 * LAYERS * 2 * WIDTH * 2
    assert both.kv_bytes == pruned.kv_bytes == 96 * LAYERS * 2 * WIDTH * 2 == 50_331_648


def test_rooflines(dense: Cost, pruned: Cost, both: Cost) -> None:
    full, fewer, small = (one.bounds("h100") for one in (dense, pruned, both))
    assert (full["prefill"].limit, fewer["prefill"].limit) == ("compute", "memory")
    assert 1e3 * full["prefill"].seconds == pytest.approx(8.60, abs=0.005)
    norms = (2 * LAYERS + 1) * WIDTH
    weights = LAYERS * WEIGHTS + WIDTH * WORDS + norms
    moved = 2 * weights + 2 * 2 * WIDTH * LAYERS * 97
    assert fewer["decode"].seconds == pytest.approx(moved / 3350e9)
    assert full["decode"].limit == fewer["decode"].limit == "memory"
    assert 0.97 < fewer["decode"].seconds / full["decode"].seconds < 1, "decoding gains nothing from pruning"
    assert full["decode"].seconds / small["decode"].seconds > 3.5, "but from fewer bits per weight"
    weights_only = cost("llava-1.5-7b", {"prune": PRUNE, "quantize": {**W4A4, "activations": None}})
    assert weights_only.bounds("h100")["decode"] == small["decode"], "and nothing from fewer bits per activation"
    times = [round(1e3 * bound[stage].seconds, 2) for stage in ("prefill", "decode") for bound in (full, fewer, small)]
    assert times == [8.60, 3.96, 1.06, 4.05, 3.96, 1.06]
    assert pruned.intensity["decode"] == pytest.approx(1, abs=0.02)


def test_a_batch_reads_weights_once_and_every_cache(dense: Cost) -> None:
    many = cost("llava-1.5-7b", None, Prompt(batch=64))
    assert many.flops.decode == 64 * dense.flops.decode
    assert many.kv_bytes == 64 * dense.kv_bytes
    assert many.work["decode"].bytes - dense.work["decode"].bytes == pytest.approx(63 * 641 * LAYERS * 4 * WIDTH)


def test_layers_of_pruners_inside_the_decoder() -> None:
    fastv = cost("llava-1.5-7b", {"prune": {"method": "fastv", "keep": 32}})
    assert fastv.tokens_per_layer == (576.0,) * 2 + (32.0,) * 30
    assert fastv.layer_mean == (2 * 576 + 30 * 32) / 32
    assert fastv.tokens_share == fastv.layer_mean / 576
    assert fastv.kv_bytes == (sum(fastv.tokens_per_layer) + 32 * TEXT) * 4 * WIDTH
    # One query of the last token over the 640 tokens of the second layer.
    assert fastv.flops.selection == 2 * 640 * WIDTH


def test_rotations_that_run_online(both: Cost) -> None:
    """QuaRot rotates what enters output and down projections; QuIP both sides of every linear. 11008 = 43 x 2^8."""
    stream, inner = WIDTH * 12, INNER * (8 + 2 * 43)
    tokens = (32 + TEXT) * LAYERS
    turned = {
        method: cost("llava-1.5-7b", {"prune": PRUNE, "quantize": {"method": method, **FOUR}}) for method in ONLINE
    }
    assert turned["quarot"].flops.prefill - both.flops.prefill == tokens * (stream + inner)
    assert turned["quarot"].flops.decode - both.flops.decode == LAYERS * (stream + inner)
    assert turned["quarot"].bops.prefill - both.bops.prefill == pytest.approx(tokens * (stream + inner))
    assert turned["quip"].flops.prefill - both.flops.prefill == tokens * (
        8 * stream + 2 * (stream + inner) + stream + inner
    )


@pytest.mark.parametrize(
    ("name", "parameters"),  # of 13B: Vicuna, 64 more words, the projector, the tower
    [
        ("llava-1.5-13b", 13_015_864_320 + 2 * 64 * 5120 + 31_467_520 + 303_507_456),
        ("llava-next-7b", PARAMETERS + 4096),
        ("qwen2.5-vl-7b", 8_292_166_656),
    ],
)
def test_configs_of_well_known_checkpoints_have_their_parameters(name: str, parameters: int) -> None:
    assert cost(name).weight_bytes == 2 * parameters


def test_every_shipped_config_has_a_cost() -> None:
    for name in known_configs():
        found = cost(name, {"prune": {"method": "attention", "keep": 64}})
        assert all(math.isfinite(value) and value > 0 for value in vars(found.flops).values())
        assert json.loads(json.dumps(found.to_json()))["tokens_per_layer"] == list(found.tokens_per_layer)


def test_mistakes_are_said_in_one_message() -> None:
    with pytest.raises(UserError, match=r"model: no model or folder 'llava-1.5-7'; did you mean 'llava-1.5-7b'\?"):
        cost("llava-1.5-7")
    with pytest.raises(UserError, match="keep=577 is out of range: an image has 576 tokens"):
        cost("llava-1.5-7b", {"prune": {"method": "random", "keep": 577}})
    with pytest.raises(UserError, match=r"no device 'h10'; did you mean 'h100'\?"):
        cost("llava-1.5-7b").bounds("h10")
    with pytest.raises(UserError, match=r"prompt\.batch: 0 is not between 1"):
        Prompt(batch=0)


def test_the_docs_say_these_numbers(dense: Cost, pruned: Cost, both: Cost) -> None:
    """The table and the sentences of the example, to the digits that stand there. Other tests compute them by hand."""
    text = (Path(__file__).parents[2] / "docs" / "cost.md").read_text("utf-8").split("## Worked example")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    said = {row[0]: [float(re.match(r"[\d.]+", cell).group()) for cell in row[1:]] for row in rows[1:]}  # type: ignore[union-attr]
    costs = (dense, pruned, both)
    bounds = [one.bounds("h100") for one in costs]
    assert said == {
        "tokens that the decoder prefills": [one.layer_mean + TEXT for one in costs],
        "prefill, TFLOPs": [round(one.flops.prefill / 1e12, 3) for one in costs],
        "prefill, T BOPs": [round(one.bops.prefill / 1e12, 3) for one in costs],
        "tower and projector, TFLOPs": [round((one.flops.tower + one.flops.projector) / 1e12, 3) for one in costs],
        "weights, GB": [round(one.weight_bytes / 1e9, 3) for one in costs],
        "KV cache, MB": [round(one.kv_bytes / 1e6, 1) for one in costs],
        "prefill on an H100, least ms": [round(1e3 * one["prefill"].seconds, 2) for one in bounds],
        "decoded token on an H100 at batch 1, least ms": [round(1e3 * one["decode"].seconds, 2) for one in bounds],
    }
    flat = " ".join(text.split())
    many = [cost("llava-1.5-7b", spec, Prompt(batch=64)).kv_bytes / 1e9 for spec in (None, {"prune": PRUNE})]
    read = 2 * (LAYERS * WEIGHTS + WIDTH * WORDS + (2 * LAYERS + 1) * WIDTH) / 1e9
    full, fewer = (one["prefill"].seconds for one in bounds[:2])
    for sentence in (
        f"from {dense.flops.prompt / 1e12:.2f} to {pruned.flops.prompt / 1e12:.2f} TFLOPs",
        f"at most {full / fewer:.1f} times as fast as that of 640 tokens, not {prefill(640) / prefill(96):.1f} times",
        f"all weights of the language model, {read:.1f} GB, and {dense.kv_bytes / 1e9:.2f} GB of cache",
        f"where an H100 needs {989e12 / 3350e9:.0f} to be busy",
        f"({bounds[1]['decode'].seconds / bounds[2]['decode'].seconds:.1f} times)",
        f"the cache is {many[0]:.0f} GB without pruning and {many[1]:.1f} GB with it",
    ):
        assert sentence in flat
