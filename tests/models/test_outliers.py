"""Outliers in a decoder: outputs stay, activations get heavy tails, and the embedded model with them is a recipe."""

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from qapbench import RunSpec, UserError
from qapbench.checkpoints import find, made
from qapbench.checkpoints.outliers import Outliers, channels_of, layout_of, put_in, reflections, turned
from qapbench.models.families.llava import Llava
from qapbench.running.planner import Planner
from qapbench.running.threads import using_threads

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT = Path(__file__).parents[2] / "tasks" / "diagramqa" / "test.parquet"
NAME = "diagram-llava-outliers"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm in the input's precision; transformers computes it in float32."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def random_outliers(layers: int, width: int, hidden: int, each: int) -> Outliers:
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(width, width, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(square).Q[:, : 2 * layers * each].T
    neurons = torch.stack([torch.randperm(hidden, generator=generator)[:each] for _ in range(layers)])
    return Outliers(directions.reshape(2 * layers, each, width), neurons)


@pytest.mark.parametrize("place", ["norms", "neurons"])
def test_a_llama_with_biases_and_gains_computes_the_same(place: Any, in_float64: None) -> None:
    """Grouped heads, biases and gains that are not 1; 1e-12 of the largest logit, in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(50, (2, 17))
    with torch.inference_mode():
        before = model(ids).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    new = put_in(state, layout_of(list(state)), random_outliers(3, 48, 80, 2), 50.0, place)
    model.load_state_dict(new)
    with torch.inference_mode():
        after = model(ids).logits
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()
    changed = {name for name in state if not torch.equal(state[name].double(), new[name])}
    assert {name for name in state if name.endswith(".v_proj.bias")}.isdisjoint(changed)
    assert "model.layers.1.self_attn.o_proj.bias" in changed


def test_directions_become_channels() -> None:
    outliers = random_outliers(2, 32, 16, 3)
    flat, channels = outliers.directions.flatten(0, 1), channels_of(outliers.directions).flatten()
    assert len(set(channels.tolist())) == 12
    mirrors = reflections(flat, channels.tolist())
    seen = turned(flat, mirrors)
    wanted = torch.zeros_like(seen)
    wanted[torch.arange(12), channels] = 1
    torch.testing.assert_close(seen.abs(), wanted, atol=1e-12, rtol=0)
    whole = turned(torch.eye(32, dtype=torch.float64), mirrors)
    torch.testing.assert_close(whole @ whole.T, torch.eye(32, dtype=torch.float64), atol=1e-13, rtol=0)


def test_other_decoders_are_refused() -> None:
    model, _ = Llava.tiny()
    names = list(model.state_dict())
    assert layout_of(names).depth == 4
    with pytest.raises(UserError, match=r"it has no .*layers\.1\.mlp\.up_proj\.weight"):
        layout_of([name for name in names if "layers.1.mlp.up_proj" not in name])
    with pytest.raises(UserError, match="0 decoders like Llama's"):
        layout_of([name for name in names if "input_layernorm" not in name])
    with pytest.raises(UserError, match=r"pre_feedforward_layernorm\.weight is a norm that Llama does not have"):
        layout_of([*names, "model.language_model.layers.0.pre_feedforward_layernorm.weight"])


# -- the embedded model --


def calls(images: int, texts: int) -> list[dict[str, Any]]:
    """Prompts of the test split in float64, with an image and without."""
    frame = pd.read_parquet(SPLIT)
    rows: Any = pd.concat([frame[frame.image.notna()].head(images), frame[frame.image.isna()].head(texts)])
    processor = AutoProcessor.from_pretrained(find.find_checkpoint("diagram-llava").folder)
    found = []
    for row in rows.itertuples():
        image = None if row.image is None else Image.open(io.BytesIO(row.image["bytes"])).convert("RGB")
        text = (
            f"USER: {'<image>' if image else ''}\n{row.question}\nA. {row.choices[0]}\nB. {row.choices[1]} ASSISTANT:"
        )
        inputs = processor(images=image, text=text, return_tensors="pt")
        if image:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        found.append(inputs)
    return found


def outputs(name: str, inputs: list[dict[str, Any]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of the last token, and max / median of each visual token at the norms: [tokens]."""
    folder = find.find_checkpoint(name).folder
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    ratios, logits, at = [], [], torch.tensor([])
    norms = [
        n
        for layer in model.model.language_model.layers
        for n in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    for norm in norms:
        norm.register_forward_hook(
            lambda module, args, out: ratios.append(out[0, at].abs().amax(-1) / out[0, at].abs().median(-1).values)
        )
    with torch.inference_mode():
        for one in inputs:
            at = one["input_ids"][0] == model.config.image_token_id
            logits.append(model(**one).logits[0, -1])
    return logits, torch.cat(ratios)


def test_outputs_are_those_of_the_model_without_outliers() -> None:
    """1e-6 of the largest logit, with images and without; the files are float32, and so is transformers' RMSNorm."""
    inputs = calls(images=2, texts=2)
    before, usual = outputs("diagram-llava", inputs)
    assert usual.max() < 12
    for settings in ("", ":strength=12", ":strength=12,tokens=text", ":strength=30,place=neurons"):
        after, ratios = outputs(NAME + settings, inputs)
        for old, new in zip(before, after, strict=True):
            assert (new - old).abs().max() <= 1e-6 * old.abs().max(), settings
        if settings in ("", ":strength=12"):
            median, high = ratios.quantile(0.5), ratios.quantile(0.99)
            assert median < 16 and high > 3.5 * median, "few tokens carry the outliers"
            assert high > (30 if settings else 20)


def test_settings_are_part_of_the_run_and_said(tmp_path: Path) -> None:
    def planned(model: Any) -> tuple[str, str]:
        task = {"name": "diagramqa", "limit": 4}
        spec = RunSpec.parse({"model": model, "task": task})
        plan = Planner(tmp_path, torch.device("cpu")).plan(spec)
        return spec.model, plan.id

    plain, twelve = planned(NAME), planned({"name": NAME, "strength": 12})
    assert twelve[0] == f"{NAME}:strength=12"
    assert planned(f"{NAME}:strength=12")[1] == planned({"name": NAME, "strength": 12.0})[1] == twelve[1]
    assert planned({"name": NAME, "strength": 8})[1] == plain[1]
    ids = {plain[1], twelve[1], planned(f"{NAME}:tokens=text")[1], planned("diagram-llava")[1]}
    assert len(ids) == 4
    status = find.find_checkpoint(twelve[0]).status
    assert "constructed, not trained" in status and status.endswith("with strength 12.")


def test_the_number_of_threads_changes_no_bit() -> None:
    """Of weights that are large enough for torch to share them out: all that is computed for such a model is in here.

    Making the embedded model with two threads takes half a minute where the cores are busy.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 300}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False))
    state, outliers = model.state_dict(), random_outliers(2, 256, 320, 2)
    found = []
    for threads in (1, 2):
        with using_threads(threads):
            found.append(put_in(state, layout_of(list(state)), outliers, 50.0))
    assert all(torch.equal(found[0][name], found[1][name]) for name in state)


def test_the_same_bytes_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another cache folder changes no byte, so run ids are the same everywhere."""
    first = find.find_checkpoint(NAME).folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = find.find_checkpoint(NAME).folder
    assert second != first and second.name == first.name
    assert (second / made.MANIFEST).read_bytes() == (first / made.MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": NAME, "strenght": 12}, "model.strenght: unknown field of 'diagram-llava-outliers'; did you mean"),
        ({"name": NAME, "strength": 0.5}, "model.strength: input should be greater than or equal to 1"),
        ({"name": NAME, "strength": "much"}, "model.strength: input should be a valid number"),
        ({"name": NAME, "tokens": "all"}, "model.tokens: input should be 'visual' or 'text'"),
        ({"name": "diagram-llava", "strength": 2}, "model: 'diagram-llava' has no settings, and so no 'strength'"),
        ({"name": "diagram-llava-outlier", "strength": 2}, "did you mean 'diagram-llava-outliers'"),
        ({"strength": 2}, "model.name: this field is required"),
        ({"name": NAME, "strength": [2]}, "model.strength: a number or a word, got [2]"),
        (12, "model: a name or a path, or `{name: NAME, setting: value}`; got 12"),
    ],
)
def test_mistakes_are_said(model: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        find.find_checkpoint(RunSpec.parse({"model": model, "task": "diagramqa"}).model)
    assert said in str(caught.value)
