"""OmniQuant, QuIP, Q-VLM, MBQ and MQuant: each formula against float64 numpy, or against what it has to improve."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qapbench import Block, Calibration, Format, Gradient, LinearPlan, Rotation, Tokens, UserError, ptqs
from qapbench.methods.plans import TokenActivation
from qapbench.quantize.calibration.passes import Pass
from qapbench.spec.run_spec import QuantizeSpec
from qapbench.strategies.ptq import mbq, mquant, omniquant, quip, qvlm

W4, A4 = Format(bits=4), Format(bits=4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs [T, in] with a few directions and channels that dominate, as a model's."""
    x = random(tokens, width, seed=seed) @ random(width, width, seed=seed + 1) / width**0.5
    x[:, ::11] *= 8
    return x


def model_and_samples() -> tuple[nn.Sequential, dict[str, nn.Linear], list[Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 24))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return model, linears, [correlated(30, 48, seed) for seed in range(6)]


def loss(model: nn.Module, linears: dict[str, nn.Linear], plans: dict[str, LinearPlan], samples: list[Tensor]) -> float:
    """Mean squared error of the planned model's output."""
    import contextlib

    from qapbench.quantize.install import installed

    with torch.no_grad():
        wanted = [model(x) for x in samples]
        with contextlib.ExitStack() as stack:
            for name, plan in plans.items():
                stack.enter_context(installed(linears[name], plan))
            return sum(float((model(x) - y).square().mean()) for x, y in zip(samples, wanted, strict=True))


# -- methods with formats of their own --


def test_methods_that_name_their_formats_need_none_in_the_spec() -> None:
    spec = QuantizeSpec.model_validate({"method": "w4a4-g128"})
    assert spec.weights == spec.activations == Format(bits=4, group_size=128)
    assert spec.label == "w4a4-g128 W4A4"
    spec = QuantizeSpec.model_validate({"method": "qvlm"})
    assert spec.activations == Format(bits=4, granularity="channel", zero_point="free")
    with pytest.raises(UserError, match="w4a4-g128 is one format by definition: leave weights out"):
        ptqs.create("w4a4-g128").check(Format(bits=4), None)
    with pytest.raises(UserError, match=r"activations\.granularity: this method makes tensor, not 'row'"):
        ptqs.create("mquant").check(W4, A4)
    with pytest.raises(UserError, match=r"activations\.granularity: this method makes row or tensor"):
        ptqs.create("rtn").check(None, Format(bits=4, granularity="channel"))


def test_w4a4_g128_is_rtn_in_that_format() -> None:
    model, linears, _ = model_and_samples()
    g128 = Format(bits=4, group_size=128)
    ours, plain = (ptqs.create(name).prepare(model, linears, g128, g128) for name in ("w4a4-g128", "rtn"))
    assert ours == plain


# -- QuIP --


def test_ldlq_feedback_is_the_factor_of_the_hessian() -> None:
    x = correlated(60, 24).double()
    gram = x.mT @ x
    a = quip.upper_unit(gram, damping=0.0).numpy()
    assert np.allclose(np.tril(a, -1), 0)
    assert np.allclose(np.diag(a), 1)
    inverse = np.linalg.inv(a)
    diagonal = inverse @ gram.numpy() @ inverse.T
    assert np.abs(diagonal - np.diag(np.diag(diagonal))).max() < 1e-6 * np.abs(diagonal).max()


@pytest.mark.parametrize("group_size", [None, 16])
def test_ldlq_column_by_column(group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocked code against the recurrence taken literally, in float64."""
    monkeypatch.setattr(quip, "COLUMNS", 8)
    w, x, format = random(6, 40, seed=9), correlated(80, 40), Format(bits=3, group_size=group_size)
    gram = x.mT @ x
    got = quip.ldlq(w, gram, format, 0.01).numpy()
    a, weights = quip.upper_unit(gram.double(), 0.01).numpy(), w.double().numpy()
    done, size = np.zeros_like(weights), group_size or 40
    for k in range(40):
        part = weights[:, k - k % size : k - k % size + size]
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        scale = (high - low) / 7
        zero = np.round(-low / scale)
        column = weights[:, k] + (weights[:, :k] - done[:, :k]) @ a[:k, k]
        done[:, k] = (np.clip(np.round(column / scale) + zero, 0, 7) - zero) * scale
    assert (np.abs(got - done) < 1e-4).mean() > 0.98, "more than roundings at a tie, and what follows them"


def test_quip_beats_rounding_and_undoes_its_rotations() -> None:
    model, linears, samples = model_and_samples()
    format = Format(bits=3)
    plans = ptqs.create("quip").prepare(model, linears, format, None, samples)
    plain = ptqs.create("rtn").prepare(model, linears, format, None)
    assert loss(model, linears, plans, samples) < 0.7 * loss(model, linears, plain, samples)
    unrounded = {name: LinearPlan(transform=plan.transform) for name, plan in plans.items()}
    assert loss(model, linears, unrounded, samples) < 1e-9


# -- OmniQuant --


def test_clipping_matches_float64() -> None:
    w, high, low = random(5, 20), random(5, 3, seed=1), random(5, 3, seed=2)
    got = omniquant.clip_quantize(w, high, low, Format(bits=4, group_size=8, zero_point="free")).numpy()
    for row, group in np.ndindex(5, 3):
        part = w[row, 8 * group : 8 * group + 8].double().numpy()
        least = part.min() / (1 + np.exp(-float(low[row, group])))
        most = part.max() / (1 + np.exp(-float(high[row, group])))
        scale = (most - least) / 15
        zero = np.round(-least / scale)
        wanted = (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale
        np.testing.assert_allclose(got[row, 8 * group : 8 * group + len(part)], wanted, atol=1e-5)


@pytest.mark.parametrize("activations", [None, A4])
def test_omniquant_learns(activations: Format | None) -> None:
    model, linears, samples = model_and_samples()
    errors = []
    for epochs in (0, 30):
        method = ptqs.create("omniquant", epochs=epochs)
        plans = method.prepare(model, linears, Format(bits=3), activations, samples)
        errors.append(loss(model, linears, plans, samples))
    assert errors[1] < 0.9 * errors[0]
    assert all(parameter.grad is None for parameter in model.parameters())


class Stack(nn.Module):
    """Blocks in one list, as a decoder's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_omniquant_wants_what_full_precision_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is fitted to its full-precision output on full-precision inputs, from what quantized blocks made."""
    wanted: list[list[Tensor]] = []
    given: list[list[Tensor]] = []
    fit = omniquant.Learner.fit

    def spy(self: omniquant.Learner, targets: list[Tensor], *rest: Any) -> None:
        wanted.append(targets)
        given.append(list(self.block.outputs()))
        fit(self, targets, *rest)

    def chains(self: Calibration, linears: dict[str, nn.Linear]) -> list[Any]:
        return [[(f"layers.{i}", layer, {f"layers.{i}.0": layer[0]}) for i, layer in enumerate(model.layers)]]

    monkeypatch.setattr(omniquant.Learner, "fit", spy)
    monkeypatch.setattr(Calibration, "_chains", chains)  # as a family would name the blocks
    model = Stack()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    samples = [random(5, 24, seed=seed) for seed in range(3)]
    ptqs.create("omniquant", epochs=1).prepare(model, linears, Format(bits=2), A4, samples)
    assert len(wanted) == 3
    with torch.no_grad():
        for index, x in enumerate(samples):
            for depth, layer in enumerate(model.layers):
                x = layer(x)
                torch.testing.assert_close(wanted[depth][index], x, atol=1e-6, rtol=1e-6)
                off = float((given[depth][index] - x).abs().max())
                assert off == 0 if depth == 0 else off > 0.05


# -- Q-VLM --


def test_ranges_run_with_the_sequence() -> None:
    """Prefill: a range of each channel over the sample's own tokens. Decoding widens it."""
    act = qvlm.RunningRange()
    x, valid = random(2, 6, 5), torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    vision = torch.zeros_like(valid)
    out = act(x, Tokens(vision, valid, prefill=True))
    assert torch.equal(out[1, 2:], qvlm.CHANNEL(x[1:, 2:])[0])
    step = 3 * random(2, 1, 5, seed=1)
    got = act(step, Tokens(vision[:, :1], valid[:, -1:], prefill=False))
    for row, start in ((0, 0), (1, 2)):
        seen = torch.cat([x[row, start:], step[row]]).double().numpy()
        low, high = seen.min(axis=0), seen.max(axis=0)
        scale = (high - low) / 15
        zero = np.round(-low / scale)
        wanted = (np.clip(np.round(seen[-1] / scale) + zero, 0, 15) - zero) * scale
        np.testing.assert_allclose(got[row, 0].numpy(), wanted, atol=1e-5)
    fresh = act(x[:1], Tokens(vision[:1], valid[:1], prefill=True))
    assert torch.equal(fresh[0], out[0]), "a new sequence begins anew"


def test_static_ranges_are_static_until_decoding() -> None:
    low, high = -torch.ones(5), 2 * torch.ones(5)
    act = qvlm.RunningRange((low, high))
    x = 5 * random(1, 4, 5)
    tokens = Tokens(torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(act(x, tokens), qvlm.CHANNEL.levels.grid(low, high)(x))
    assert act(x, tokens).max() <= 2
    later = Tokens(tokens.vision[:, :1], tokens.valid[:, :1], prefill=False)
    assert act(torch.full((1, 1, 5), 7.0), later).max() > 6.5


def gate_oracle(inputs: list[list[list[np.ndarray]]], threshold: float | None, period: int) -> list[list[list[bool]]]:
    """Whether each sample updates each range, transcribed from the released code's formulas in float64.

    Args:
        inputs: by block, linear and sample, the quantized input [T, in].
        threshold: of the first release; None for the second.
        period: of blocks that update always.
    """
    opened: list[list[list[bool]]] = [[[] for _ in block] for block in inputs]
    for sample in range(len(inputs[0][0])):
        history: list[float] = []
        last = 0.0
        previous = np.zeros((0, 0))
        for number, block in enumerate(inputs, start=1):
            for place, linear in enumerate(block):
                limit = (np.mean(history) if history else np.nan) if threshold is None else threshold
                opened[number - 1][place].append(bool(sample == 0 or number % period == 1 % period or last >= limit))
                x = np.abs(linear[sample])
                if threshold is not None or place == 0 or previous.shape != x.shape:
                    a = x / np.maximum(np.linalg.norm(x, axis=0), 1e-12)
                    last = float(np.mean(-np.sum(a * np.log(a + 1e-7), axis=0)))
                else:
                    p, q = (v / np.maximum(v.sum(axis=0), 1e-12) for v in (previous, x))
                    joint, conditional = p * q, q / (p + 1e-5)
                    with np.errstate(invalid="ignore"):
                        joint, conditional = joint / joint.sum(axis=0), conditional / conditional.sum(axis=0)
                    last = float(np.mean(-np.sum(joint * np.log(conditional + 1e-5), axis=0)))
                previous = x
                if not np.isnan(last):
                    history.append(last)
    return opened


@pytest.mark.parametrize("threshold", [None, 2.5])
@pytest.mark.parametrize("dead", [False, True])
def test_the_gate_is_that_of_the_release(threshold: float | None, dead: bool) -> None:
    """Seven linears of a block, of two widths as in LLaMA, of which three read one input. Some channels may be zero."""
    draw = np.random.default_rng(0)
    inputs = []
    for _ in range(5):
        shared = [draw.normal(size=(12, 6)) * 4.0 ** draw.normal(size=(12, 1)) for _ in range(3)]
        others = [
            [draw.normal(size=(12, w)) * 4.0 ** draw.normal(size=(12, 1)) for _ in range(3)] for w in (6, 6, 6, 9)
        ]
        inputs.append([shared, shared, [x * 1.1 for x in shared], *others])
    if dead:
        inputs[1][3][1][:, 2] = 0
    gate = qvlm.Gate(threshold, period=3)
    opened: list[list[list[bool]]] = []
    for gate.block, block in enumerate(inputs, start=1):
        opened.append([[] for _ in block])
        for sample in range(3):
            for place, linear in enumerate(block):
                opened[-1][place].append(gate.opens(sample))
                gate.note(sample, torch.from_numpy(linear[sample]).float())
    assert opened == gate_oracle(inputs, threshold, 3)
    decided = [one for number in (1, 2, 4) for linear in opened[number] for one in linear[1:]]
    assert set(decided) == {True, False}, sorted(v for values in gate.values.values() for v in values)


def test_entropy_belongs_to_the_fixed_gate() -> None:
    ptqs.create("qvlm", gate="fixed", entropy=30.0).check(None, None)
    with pytest.raises(UserError, match="`entropy` is the threshold of `gate: fixed`"):
        ptqs.create("qvlm", entropy=30.0).check(None, None)


def test_the_search_for_a_share() -> None:
    x = random(50, 6)
    gate = qvlm.Gate(threshold=0, period=1)
    seen = qvlm.StaticRange(gate, [0])
    seen(x, torch.zeros(50, dtype=torch.bool))
    best = seen.best()

    def score(share: float) -> float:
        low, high = x.amin(0).clamp(max=0) * share, x.amax(0).clamp(min=0) * share
        return float((qvlm.CHANNEL.levels.grid(low, high)(x) - x).abs().sqrt().mean())

    shares = [1 - step / 10 for step in range(7)]
    chosen = float(best["high"][0] / x[:, 0].max())
    assert min(score(share) for share in shares) == pytest.approx(score(min(shares, key=lambda s: abs(s - chosen))))
    a = np.abs(x.double().numpy())
    a /= np.linalg.norm(a, axis=0)
    assert qvlm.entropy(x) == pytest.approx(float(-(a * np.log(a + 1e-7)).sum(axis=0).mean()), rel=1e-5)


# -- MBQ --


def test_vision_counts_by_the_ratio_and_the_question_not() -> None:
    error = random(1, 5, 4)
    vision, answer = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 0]).bool()
    size = error[0].abs().double().numpy()
    wanted = 2.5 * size[:2].sum() + size[3:4].sum()
    assert mbq.weighed(error, vision, answer, 2.5) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 3.0])
def test_the_scale_is_the_releases(ratio: float) -> None:
    """Symmetric weights and tokens; the error over answer and visual tokens alone, transcribed in float64."""
    torch.manual_seed(1)
    linear, format = nn.Linear(24, 10, bias=False), Format(bits=4, symmetric=True)
    x = random(2, 20, 24) * torch.logspace(-1, 1, 24)
    x[:, :12] = x[:, :12].flip(-1)  # the question and the image want other scales than the answer
    vision, answer = torch.zeros(2, 1, 20, dtype=torch.bool)
    vision[:, 6:12], answer[:, 15:] = True, True
    tokens = Tokens(vision, torch.ones_like(vision))
    passes = [Pass((one[None],), {}, tokens, labelled=answer) for one in x]
    mean = x.flatten(0, 1).abs().mean(dim=0)

    def round_rows(v: np.ndarray) -> np.ndarray:
        scale = np.abs(v).max(axis=1, keepdims=True) / 7
        return np.round(v / scale) * scale

    w, rows = linear.weight.detach().double().numpy(), x.double().numpy()
    counted = ratio * vision[0].double().numpy() + answer[0].double().numpy()
    errors, scales, everything = [], [], []
    for step in range(20):
        scale = np.maximum(mean.double().numpy() ** (step / 20), 1e-4)
        scale /= np.sqrt(scale.max() * scale.min())
        off = np.stack([round_rows(one / scale) @ round_rows(w * scale).T - one @ w.T for one in rows])
        errors.append((np.abs(off).sum(axis=2) * counted).sum())
        everything.append((np.abs(off).sum(axis=2) * np.where(vision[0], ratio, 1)).sum())
        scales.append(scale)
    block = Block("", linear, {"": linear}, passes)
    found = mbq.search(block, {"": linear}, mean, ratio, format, format)
    np.testing.assert_allclose(found.numpy(), scales[int(np.argmin(errors))], rtol=1e-4)
    if ratio < 1:
        assert np.argmin(everything) != np.argmin(errors), "counting the question would change nothing here"


def test_the_ratio_is_that_of_the_sublayers_end() -> None:
    from qapbench import Group

    def group(*names: str) -> Group:
        return Group({name: nn.Linear(1, 1) for name in names}, None, "")

    groups = [group("l.3.a.q", "l.3.a.k"), group("l.3.a.o"), group("l.3.m.gate", "l.3.m.up"), group("l.3.m.down")]
    assert mbq.ends(groups) == ["l.3.a.o", "l.3.a.o", "l.3.m.down", "l.3.m.down"]
    assert mbq.kind("l.3.a.o") == mbq.kind("l.14.a.o") != mbq.kind("l.3.m.down")
    assert mbq.ratio_of(Gradient(vision=1.0, text=9.0, answer=4.0)) == 0.25
    assert np.isnan(mbq.ratio_of(Gradient(vision=1.0, text=9.0, answer=float("nan"))))


def test_mbq_beats_rounding() -> None:
    model, linears, samples = model_and_samples()
    both = Format(bits=4, symmetric=True)
    plans = ptqs.create("mbq").prepare(model, linears, both, both, samples)
    plain = ptqs.create("rtn").prepare(model, linears, both, both)
    assert loss(model, linears, plans, samples) < 0.9 * loss(model, linears, plain, samples)


# -- MQuant --


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clipped_range_is_the_releases(bits: int, symmetric: bool) -> None:
    """80 shares, 1 to 0.21; all 2^b levels. Transcribed in float64; some rows reach the lowest."""
    w, half = random(12, 64) ** 3, 2 ** (bits - 1)
    w[:4] *= -w[:4].sign() * torch.tensor([1.0, 0.2]).repeat(32)
    grid = mquant.clipped(w, Format(bits=bits, symmetric=symmetric))
    got = grid(w).double().numpy()
    chosen = set()
    for row, scale, values in zip(w.double().numpy(), grid.scale[:, 0].double().numpy(), got, strict=True):
        best, least = None, np.inf
        for index in range(80):
            share = 1 - index / 100
            low, high = share * min(row.min(), 0), share * max(row.max(), 0)
            if symmetric:
                s, zero, lowest = max(-low, high) / (half - 1), 0.0, -half
            else:
                s, lowest = (high - low) / (2 * half - 1), 0
                zero = np.round(-low / s)
            q = (np.clip(np.round(row / s) + zero, lowest, lowest + 2 * half - 1) - zero) * s
            error = (np.abs(q - row) ** 2.4).sum()
            if error < least:
                best, least = (s, q, index), error
        assert best is not None
        assert scale == pytest.approx(best[0], rel=1e-5)
        np.testing.assert_allclose(values, best[1], atol=1e-5)
        chosen.add(best[2])
    assert len(chosen) > 2, "hardly clipped"
    assert len(mquant.SHARES) == 80
    if symmetric:
        assert (grid(w) / grid.scale).round().min() == -half, "the lowest level is never used"


@pytest.mark.parametrize("ends", [(-3.0, 2.0), (-2.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (-1.28, 1.27)])
def test_static_scales_are_the_releases(ends: tuple[float, float]) -> None:
    """max(|min| / 128, max / 127) with the levels -128 to 127, the range widened to zero."""
    for format in (mquant.MQuant.formats[1], Format(bits=8, symmetric=True, granularity="tensor")):
        act = mquant.ByModality(format, torch.tensor(ends), torch.tensor([-9.0, 9.0]))
        x = torch.linspace(-4, 4, 301).view(1, -1, 1)
        tokens = Tokens(torch.ones(1, 301, dtype=torch.bool), torch.ones(1, 301, dtype=torch.bool))
        scale = max(-min(ends[0], 0) / 128, max(ends[1], 0) / 127)
        steps = x.double().numpy() / scale
        clear = np.abs(steps - np.floor(steps) - 0.5) > 1e-4
        np.testing.assert_allclose(
            act(x, tokens).numpy()[clear], (np.clip(np.round(steps), -128, 127) * scale)[clear], atol=1e-5
        )


def test_static_scales_are_those_of_the_modality() -> None:
    format = Format(bits=8, symmetric=True, granularity="tensor")
    rotation = Rotation.random(8, 0)
    ranges = mquant.Ranges(rotation)
    x, vision = random(10, 8), torch.arange(10) < 4
    x[vision] *= 50
    ranges(x, vision)
    turned = rotation(x)
    found = ranges.found
    assert torch.equal(found["vision"], torch.stack([turned[:4].min(), turned[:4].max()]))
    assert torch.equal(found["text"], torch.stack([turned[4:].min(), turned[4:].max()]))
    act: TokenActivation = mquant.ByModality(format, found["vision"], found["text"])
    out = act(turned[None], Tokens(vision[None], torch.ones(1, 10, dtype=torch.bool)))
    scale = max(-float(turned[4:].min()) / 128, float(turned[4:].max()) / 127)
    assert float((out[0, 4:] - turned[4:]).abs().max()) <= scale / 2 + 1e-6
    assert act(turned[None]).abs().max() <= turned[4:].abs().max() + scale, "of no known modality: text"


def test_rotation_helps_static_scales_and_feedback_helps_rounding() -> None:
    model, linears, samples = model_and_samples()
    w, a = Format(bits=4, symmetric=True), Format(bits=4, symmetric=True, granularity="tensor")
    rotated = ptqs.create("mquant").prepare(model, linears, None, a, samples)
    plain = ptqs.create("rtn").prepare(model, linears, None, a)
    assert loss(model, linears, rotated, samples) < 0.7 * loss(model, linears, plain, samples)
    gptq, rtn = (ptqs.create("mquant", rounding=r).prepare(model, linears, w, None, samples) for r in ("gptq", "rtn"))
    assert loss(model, linears, gptq, samples) < 0.7 * loss(model, linears, rtn, samples)


def modality_first(vision: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Order the visual tokens before all others, as MQuant's AIFS does.

    Args:
        vision: [B, L] bool, True for visual tokens.
        valid: [B, L] bool, True for tokens that are not padding.

    Returns:
        The old place of each token in the new order, [B, L]; and the attention mask for it, [B, 1, L, L] bool, True if
        the token of a row may see that of a column because it was before it in the old order.
    """
    order = (~vision).to(torch.int8).argsort(dim=-1, stable=True)
    seen = valid.gather(1, order).unsqueeze(1)
    causal = order.unsqueeze(1) <= order.unsqueeze(2)
    itself = torch.eye(vision.shape[1], dtype=torch.bool)  # so that the row of a padding token is not empty
    return order, ((causal & seen) | itself).unsqueeze(1)


@pytest.mark.parametrize("left", [True, False])
def test_tokens_reordered_by_modality_change_nothing(left: bool) -> None:
    """MQuant's reordering of tokens (AIFS) may be left out of a simulation, because it changes no output.

    The decoder is in full precision. Embeddings, positions and mask are permuted, and the outputs are put back.
    """
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model: Any = LlamaModel(config).eval()
    x, valid = random(2, 12, 32), torch.ones(2, 12, dtype=torch.bool)
    valid[1, slice(0, 3) if left else slice(9, 12)] = False
    vision = valid & (torch.arange(12) % 5 > 2)
    positions = (valid.long().cumsum(dim=-1) - 1).clamp(min=0)
    order, mask = modality_first(vision, valid)
    assert not torch.equal(order, order.sort(dim=-1).values)
    for row, count in zip(vision.gather(1, order), vision.sum(dim=-1), strict=True):
        assert row[:count].all()
        assert all(a >= b for a, b in pairwise(row.tolist()))

    def permuted(values: Tensor) -> Tensor:
        return values.gather(1, order.view(*order.shape, *[1] * (values.ndim - 2)).expand_as(values))

    with torch.no_grad():
        plain = model(inputs_embeds=x, attention_mask=valid.long(), position_ids=positions).last_hidden_state
        moved = model(
            inputs_embeds=permuted(x), attention_mask=mask, position_ids=permuted(positions)
        ).last_hidden_state
    back = torch.empty_like(moved).scatter(1, order.unsqueeze(-1).expand_as(moved), moved)
    torch.testing.assert_close(back[valid], plain[valid], rtol=1e-4, atol=1e-5)
