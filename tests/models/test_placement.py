"""Models that are spread over several devices when they are loaded: where what goes, and that no number changes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qapbench import UserError, compress
from qapbench.models import placement
from qapbench.models.family import family_of
from qapbench.models.loading import load_model
from qapbench.models.placement import place, shrunk, skeleton
from qapbench.models.unread import UnreadWeight
from qapbench.spec.run_spec import RunSpec
from tests.models.llava_checkpoints import THREE, batch_of, picture, save_llava

CPU, ALSO_CPU = torch.device("cpu"), torch.device("cpu", 0)  # two names, so that accelerate spreads a model over both
W4: dict[str, Any] = {"method": "rtn", "weights": {"bits": 4}, "storage": "packed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("placed"), layers=4)


def spec_of(folder: Path, **sections: Any) -> RunSpec:
    return RunSpec.parse({"name": "t", "model": str(folder), "task": "diagramqa", **sections})


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda device: size)


def test_whole_layers_are_placed_in_order_and_as_evenly_as_they_allow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 10**6)
    family = skeleton(folder, torch.float32)
    devices = [torch.device("cuda", index) for index in range(2)]
    found = place(family, devices).devices
    sizes = dict.fromkeys(devices, 0)
    for name, weight in family.model.named_parameters():
        places = [device for part, device in found.items() if f"{name}.".startswith(f"{part}.")]
        assert len(places) == 1
        sizes[places[0]] += weight.nbytes
    order = list(found.values())
    assert order == sorted(order, key=devices.index)
    assert not any(".layers." in name and name.rsplit(".", 1)[1].isdigit() is False for name in found)
    largest = max(sum(p.nbytes for p in block.parameters()) for block in family.blocks("language"))
    assert abs(sizes[devices[0]] - sizes[devices[1]]) <= 2 * largest


def test_what_stays_in_files_or_is_packed_counts_with_that_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = skeleton(folder, torch.float32)
    total = sum(weight.nbytes for weight in whole.model.parameters())
    linears = sum(linear.weight.nbytes for linear in whole.linears(["language"]).values())
    for spec, share in ((spec_of(folder, quantize=W4), 0.25), (spec_of(folder), 0.001)):
        family = skeleton(folder, torch.float32)
        shrunk(family, ["language"], spec)
        held = sum(weight.nbytes for weight in family.model.parameters())
        assert total - linears < held < total - linears * (1 - share)


def test_a_model_that_does_not_fit_on_all_devices_is_refused_in_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 50_000)
    rtn = {**W4, "storage": "unpacked"}
    for spec, why in ((spec_of(folder), "even if 28 linears stay"), (spec_of(folder, quantize=rtn), "none may stay")):
        message = rf"do not fit on 2 devices with .* free.*{why}.*`storage: packed`.*more GPUs"
        with pytest.raises(UserError, match=message):
            load_model(spec, CPU, devices=(CPU, ALSO_CPU))


@pytest.mark.parametrize("mode", ["full", "packed", "offload"])
def test_a_spread_model_has_the_weights_and_logits_of_one_that_is_not(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 500_000)
    # Both names are the CPU's, and a tensor has only one of them.
    monkeypatch.setattr("accelerate.utils.modeling.check_device_same", lambda one, other: True)
    spec, found, waiting = spec_of(folder, **({"quantize": W4} if mode == "packed" else {})), [], []
    for devices in ((), (CPU, ALSO_CPU)):
        model, processor = load_model(spec, CPU, offload=mode == "offload", devices=devices)
        assert len(set(getattr(model, "hf_device_map", {}).values())) == len(devices)
        inputs = batch_of(processor, [THREE[0]], [picture(0)])
        waiting.append(sum(isinstance(weight, UnreadWeight) for weight in model.parameters()))
        with torch.no_grad(), compress(model, spec, processor):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)
    assert waiting[0] == waiting[1] == (0 if mode == "full" else 28)


@pytest.mark.parametrize("devices", [(CPU,), (CPU, ALSO_CPU)])
def test_what_devices_have_no_room_for_stays_in_files_and_computes_the_same(
    folder: Path, devices: tuple[torch.device, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As few linears as can be, the last ones of the decoder, and the logits of a model that is all in memory."""
    monkeypatch.setattr("accelerate.utils.modeling.check_device_same", lambda one, other: True)
    spec, found = spec_of(folder, prune={"method": "divprune", "keep": 4}), []
    whole, processor = load_model(spec, CPU)
    linears = [name for name in family_of(whole).linears(["language"]) if ".layers." in name]
    total = sum(weight.nbytes for weight in whole.parameters())
    counts = []
    for size in (total, int(total * 0.7), int(total * 0.6)):
        free(monkeypatch, int(size / len(devices) / placement.USABLE))
        model, _ = load_model(spec, CPU, devices=devices)
        left = [
            name for name, linear in model.named_modules() if isinstance(getattr(linear, "weight", 0), UnreadWeight)
        ]
        assert left == linears[len(linears) - len(left) :]
        counts.append(len(left))
        held = sum(weight.nbytes for weight in model.parameters() if not isinstance(weight, UnreadWeight))
        assert held <= size
        inputs = batch_of(processor, [THREE[0]], [picture(0)])
        with torch.no_grad(), compress(model, spec, processor):
            found.append(model(**inputs).logits)
    with torch.no_grad(), compress(whole, spec, processor):
        assert all(torch.equal(whole(**inputs).logits, one) for one in found)
    assert counts == sorted(counts) and counts[-1] > counts[0]
    assert f"{counts[-1]} of 28 linears of the decoder's layers" in caplog.text
