"""Quantized checkpoints: what `quantize` writes, transformers reads, and it answers as the run that it came from."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from llava_checkpoints import save_llava
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.utils.quantization_config import CompressedTensorsConfig
from typer.testing import CliRunner

import qapbench
from qapbench import Format, RunSpec, UserError
from qapbench.cli import app
from qapbench.models import compressed
from qapbench.models.loading import load_model
from qapbench.records.store import answers_of
from qapbench.running import saving
from qapbench.running.saving import check_saving, save_quantized
from qapbench.running.session import Session
from qapbench.running.settings import Settings

Spec = Callable[..., dict[str, Any]]
G8 = {"bits": 4, "group_size": 8}
HALF = {"bits": 8, "symmetric": True, "divisor": "half"}
QMAX = {"bits": 8, "symmetric": True}
W4 = {"bits": 4}
AMAX = {"format": "fp8"}
FP8 = {"format": "fp8", "scale": "compressed_tensors"}
MXFP4, NVFP4 = ({"format": name, "scale": "compressed_tensors"} for name in ("mxfp4", "nvfp4"))
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "W4A16": ("pack-quantized", "gptq", G8, None),
    "W3A16 symmetric": ("pack-quantized", "rtn", {"bits": 3, "symmetric": True}, None),
    "W4A4": ("pack-quantized", "rtn", G8, G8),
    "W8A8": ("int-quantized", "rtn", {"bits": 8, "symmetric": True}, HALF),
    "FP8": ("float-quantized", "rtn", {"format": "fp8"}, FP8),
    "FP8 blocks": ("float-quantized", "rtn", {"format": "fp8", "granularity": "block", "group_size": 16}, None),
    "MXFP4": ("mxfp4-pack-quantized", "gptq", {"format": "mxfp4"}, None),
    "MXFP4 and activations": ("mxfp4-pack-quantized", "rtn", {"format": "mxfp4", "scale": "floor"}, MXFP4),
    "MXFP8 and activations": ("mxfp8-quantized", "rtn", {"format": "mxfp8"}, {**MXFP4, "format": "mxfp8"}),
    "NVFP4": ("nvfp4-pack-quantized", "rtn", NVFP4, None),
    "NVFP4 of GPTQ": ("nvfp4-pack-quantized", "gptq", NVFP4, None),
}
HALVES = ("W4A16", "MXFP4", "NVFP4", "NVFP4 of GPTQ")  # made in bfloat16
CPU = torch.device("cpu")


def section(kind: str, questions: Path) -> dict[str, Any]:
    _, method, weights, activations = KINDS[kind]
    calibration = {"samples": 2, "data": str(questions)}
    return {"method": method, "weights": weights, "activations": activations, "calibration": calibration}


def answered(spec: dict[str, Any], runs: Path) -> tuple[list[Any], Any]:
    (record,) = qapbench.run(RunSpec.parse(spec), runs)
    return [(answer.doc, answer.answer) for answer in answers_of(runs / record.run_id).read()], record


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths are multiples of 32."""
    return save_llava(tmp_path_factory.mktemp("wide") / "llava", width=64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_answers_as_its_run(
    kind: str, spec_of: Spec, wide_model: Path, questions: Path, tmp_path: Path
) -> None:
    dtype = "bfloat16" if kind in HALVES else "float32"
    spec = spec_of(quantize=section(kind, questions), dtype=dtype)
    if kind.startswith("MX"):
        spec |= {"model": str(wide_model)}
    session = Session(Settings(tmp_path / "runs", CPU))
    saved = save_quantized(RunSpec.parse(spec), tmp_path / "saved", session)
    assert (saved.layout, saved.linears) == (KINDS[kind][0], 14)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "saved"][not (tmp_path / "runs").exists() :]
    config = json.loads((saved.folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == saved.layout
    assert "lm_head" in config["quantization_config"]["ignore"]
    tensors = load_file(saved.folder / "model.safetensors")
    scales = [tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("weight_global_scale")]
    assert scales == [(1,)] * (14 if saved.layout.startswith("nvfp4") else 0), "the library makes them so"

    wanted, _ = answered(spec, tmp_path / "runs")
    got, record = answered({**spec, "model": str(saved.folder), "quantize": None}, tmp_path / "runs")
    assert got == wanted
    assert len(got) == 14
    assert record.receipt.summary.startswith(f"as the checkpoint has it: compressed-tensors {saved.layout} W")

    with pytest.raises(UserError, match=r"is quantized already .*leave `quantize` out"):
        qapbench.run(RunSpec.parse({**spec, "model": str(saved.folder)}), tmp_path / "runs")


def test_linears_with_formats_of_their_own_are_groups_of_one_checkpoint(
    spec_of: Spec, questions: Path, tmp_path: Path
) -> None:
    overrides = {"layers.1.*": None, "down_proj": {"activations": {"bits": 8}}, "v_proj": {"activations": None}}
    spec = spec_of(quantize={**section("W4A4", questions), "overrides": overrides})
    saved = save_quantized(RunSpec.parse(spec), tmp_path / "saved", Session(Settings(tmp_path / "runs", CPU)))
    assert (saved.layout, saved.linears) == ("pack-quantized", 7)
    config = json.loads((saved.folder / "config.json").read_text())["quantization_config"]
    assert sorted(len(group["targets"]) for group in config["config_groups"].values()) == [1, 1, 5]
    targets = {name for group in config["config_groups"].values() for name in group["targets"]}
    assert len(targets) == 7
    assert not targets & set(config["ignore"])
    assert sum("language_model.layers.1." in name for name in config["ignore"]) == 7
    wanted, _ = answered(spec, tmp_path / "runs")
    got, _ = answered({**spec, "model": str(saved.folder), "quantize": None}, tmp_path / "runs")
    assert got == wanted

    several = {**section("W4A16", questions), "overrides": {"v_proj": {"weights": {"bits": 8}}}}
    with pytest.raises(UserError, match=r"quantize\.overrides: compressed-tensors cannot store weights of several"):
        check_saving(RunSpec.parse(spec_of(quantize=several)), tmp_path / "other", torch.device("cpu"))
    other = {**section("W4A16", questions), "overrides": {"v_proj": {"weights": {"format": "mxfp4"}}}}
    with pytest.raises(UserError, match=r"quantize\.overrides: compressed-tensors cannot store weights of several"):
        check_saving(RunSpec.parse(spec_of(quantize=other)), tmp_path / "other", torch.device("cpu"))
    path = saved.folder / "config.json"
    whole = json.loads(path.read_text())
    next(iter(whole["quantization_config"]["config_groups"].values()))["weights"]["num_bits"] = 8
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="2 groups of linears whose weights are quantized differently"):
        load_model(RunSpec.parse(spec_of(model=str(saved.folder))), CPU)


def test_transformers_reads_the_values_of_the_format(spec_of: Spec, tmp_path: Path) -> None:
    spec = RunSpec.parse(spec_of(quantize={"method": "rtn", "weights": G8}))
    session = Session(Settings(tmp_path / "runs", CPU))
    saved = save_quantized(spec, tmp_path / "saved", session)
    plain, _ = session.model(spec)
    read = AutoModelForImageTextToText.from_pretrained(
        saved.folder, dtype="float32", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name, tensor in plain.state_dict().items():
        inside = "language_model.layers" in name and name.endswith("proj.weight")
        assert torch.equal(read.state_dict()[name], Format(**G8)(tensor) if inside else tensor), name


@pytest.mark.parametrize("kind", ["W3A16 symmetric", "W8A8", "FP8"])
def test_transformers_answers_alike(kind: str, spec_of: Spec, questions: Path, tmp_path: Path) -> None:
    spec = RunSpec.parse(spec_of(quantize=section(kind, questions)))
    session = Session(Settings(tmp_path / "runs", CPU))
    saved = save_quantized(spec, tmp_path / "saved", session)
    inputs = {"input_ids": torch.tensor([[1, 7, 9, 30, 12]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    model, _ = session.model(spec)
    with torch.no_grad():
        with qapbench.compress(model, spec):
            ours = model(**inputs).logits
        theirs = AutoModelForImageTextToText.from_pretrained(saved.folder, dtype="float32")(**inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("quantize", "field", "said"),
    [
        ({"method": "rtn", "activations": G8}, "quantize.weights", "weights that are not quantized"),
        (
            {"method": "rtn", "weights": {"format": "mxfp4"}},
            "quantize.weights.group_size",
            "groups of 32 in .* 48 inputs",
        ),
        ({"method": "rtn", "weights": {"format": "nvfp4"}}, "quantize.weights.scale", "the rule tensor"),
        ({"method": "rtn", "weights": NVFP4}, "dtype", "nvfp4 weights in float32"),
        ({"method": "rtn", "weights": NVFP4, "activations": NVFP4}, "quantize.activations.format", "nvfp4 activations"),
        ({"method": "rtn", "weights": {**W4, "granularity": "tensor"}}, "quantize.weights.granularity", "per tensor"),
        ({"method": "rtn", "weights": G8, "activations": QMAX}, "quantize.activations.divisor", "half"),
        ({"method": "rtn", "weights": G8, "activations": FP8}, "quantize.activations.format", "beside int weights"),
        ({"method": "rtn", "weights": AMAX, "activations": AMAX}, "quantize.activations.scale", "amax"),
        ({"method": "rtn", "weights": {**W4, "group_size": 7}}, "quantize.weights.group_size", "do not divide"),
        ({"method": "quip", "weights": G8}, "quantize.method", "what quip does to the input of"),
        ({"method": "qvlm", "activations": None, "weights": {"bits": 4, "group_size": 64}}, "quantize.method", "nf4"),
    ],
)
def test_what_the_format_cannot_say_is_refused(
    quantize: dict[str, Any], field: str, said: str, spec_of: Spec, questions: Path, tmp_path: Path
) -> None:
    calibration = {"samples": 1, "data": str(questions)}
    spec = RunSpec.parse(spec_of(quantize={**quantize, "calibration": calibration}))
    with pytest.raises(UserError, match=f"{field}: compressed-tensors cannot store .*{said}"):
        save_quantized(spec, tmp_path / "saved", Session(Settings(tmp_path / "runs", CPU)))
    assert not (tmp_path / "saved").exists()


def test_whole_or_not_at_all(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RunSpec.parse(spec_of(quantize={"method": "rtn", "weights": G8}))
    session = Session(Settings(tmp_path / "runs", CPU))
    monkeypatch.setattr(saving, "SHARD", 20_000)
    several = save_quantized(spec, tmp_path / "several", session)
    assert len(list(several.folder.glob("*.safetensors"))) > 3
    load_model(RunSpec.parse(spec_of(model=str(several.folder))), CPU)
    with pytest.raises(UserError, match="there is something already"):
        check_saving(spec, several.folder, CPU)

    def full(source: Path, folder: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(saving, "_copy_others", full)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(spec, tmp_path / "torn", session)
    assert [path.name for path in tmp_path.iterdir()] == ["several"]


def test_the_commands_of_the_documentation(
    tiny_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/packed.md writes them, on a small model and few questions."""
    text = (Path(__file__).parents[2] / "docs" / "packed.md").read_text()
    monkeypatch.chdir(tmp_path)
    task = json.dumps({"name": "scienceqa", "data": str(questions)})
    for name, block in re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)```", text, re.DOTALL):
        smaller = block.replace("{name: diagramqa, limit: 40}", task).replace("diagram-llava", str(tiny_model))
        Path(name).write_text(smaller.replace("group_size: 32", "group_size: 16"))
    commands = re.findall(r"^qapbench (.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    said = []
    for command in commands:
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, done.output
        said.append(done.output)
    assert "pack-quantized, 14 linears at " in said[1]
    assert (tmp_path / "diagram-w4a16" / "model.safetensors").is_file()
    packed, saved = sorted(qapbench.load_records(tmp_path / "runs"), key=lambda record: record.name)
    assert [answer.answer for answer in answers_of(tmp_path / "runs" / packed.run_id).read()] == [
        answer.answer for answer in answers_of(tmp_path / "runs" / saved.run_id).read()
    ]
    assert "as the checkpoint has it: compressed-tensors pack-quantized W4A16 g16" in saved.receipt.summary


# -- checkpoints of others --

LOCAL = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nvfp4-pack-quantized": ({**LOCAL, "dynamic": False}, {**LOCAL, "dynamic": "local"}),
    "float-quantized": (STATIC, STATIC),
}


def made_by_others(layout: str, source: Path, folder: Path) -> Path:
    """A checkpoint as the library compresses it, with static scales of its inputs."""
    weights, inputs = OTHERS[layout]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": layout}
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(layout)
    shutil.copytree(source, folder)
    tensors, left = load_file(folder / "model.safetensors"), []
    for name in [key for key in tensors if key.endswith("proj.weight")]:
        owner = name.removesuffix(".weight")
        if "vision" in name:
            left.append(owner)
            continue
        w = tensors.pop(name)
        given = {"weight": w}
        if layout == "float-quantized":
            given["weight_scale"] = w.abs().amax().reshape(1) / 448
            more = {"input_scale": torch.tensor([0.01])}
        else:
            up = 2688 / w.abs().amax().reshape(1)
            given["weight_global_scale"] = up
            blocks = w.unflatten(1, (-1, 16)).abs().amax(dim=-1) / 6 * up
            given["weight_scale"] = blocks.to(torch.float8_e4m3fn).float()
            more = {"input_global_scale": torch.tensor([600.0])}
        tensors |= {f"{owner}.{key}": value for key, value in {**compressor.compress(given, scheme), **more}.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*vision.*", "re:.*multi_modal.*"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", OTHERS)
def test_checkpoints_of_others(layout: str, tiny_model: Path, spec_of: Spec, tmp_path: Path) -> None:
    folder = made_by_others(layout, tiny_model, tmp_path / "theirs")
    spec = RunSpec.parse(spec_of(model=str(folder)))
    model, _ = load_model(spec, CPU)
    assert layout in (compressed.described(model) or "")
    linear = model.model.language_model.layers[0].mlp.gate_proj
    assert linear.weight.dtype == torch.float32
    seen: list[torch.Tensor] = []
    linear.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x = torch.randn(1, 3, 48)
    linear(x)
    (rounded,) = seen
    assert not torch.equal(rounded, x)
    assert (rounded - x).norm() < 0.2 * x.norm()
    if layout == "float-quantized":
        assert torch.equal(rounded, (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01)
    _, record = answered(spec_of(model=str(folder)), tmp_path / "runs")
    assert f"compressed-tensors {layout} W" in record.receipt.summary


def test_inputs_that_are_not_known_are_refused() -> None:
    with pytest.raises(UserError, match="model: the inputs of q_proj are quantized to 8-bit float per block"):
        compressed.rounding_of({"num_bits": 8, "type": "float", "strategy": "block", "dynamic": True}, {}, "q_proj")
    with pytest.raises(UserError, match="static scales per tensor"):
        compressed.rounding_of(STATIC, {}, "q_proj")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": {}}}}
    with pytest.raises(UserError, match="pip install 'qapbench\\[compressed-tensors\\]'"):
        compressed.loading_arguments(tmp_path, config)
    assert compressed.loading_arguments(tmp_path, {}) == {}
