"""How much memory and disk a run will need, estimated from headers and configs: no model is loaded for it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qapbench.checkpoints.find import find_checkpoint
from qapbench.checkpoints.headers import Stored, stored
from qapbench.errors import Problem, UserError
from qapbench.memory import free_bytes
from qapbench.methods.kinds import pruners, ptqs
from qapbench.methods.packed import packed_bytes
from qapbench.models.checkpoint_format import format_of
from qapbench.models.family import default_tower
from qapbench.models.loading import left_in_files, may_leave, precision, read_config
from qapbench.models.placement import USABLE
from qapbench.models.relevance import find_tower
from qapbench.models.unread import is_matrix, may_wait
from qapbench.quantize.calibration import spill
from qapbench.spec.items import created
from qapbench.spec.prune_spec import PruneSpec
from qapbench.spec.run_spec import RunSpec

from .fingerprints import needs_tower
from .settings import Settings

PROCESS = 500 * 10**6  # bytes of Python with torch and transformers
ANSWER = 1000  # bytes of a stored answer
WORDS = 120  # tokens of a prompt beside those of its image
IMAGE = 1280  # tokens of an image, where the config does not say
GB = 10**9
VISION = ("vision", "visual")  # parts of the names of weights of the vision side


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        device: the device that holds the model, or the devices that share it, in words.
        parts: what takes memory there -> bytes, of all processes together.
        host: bytes in host memory, where the device is another one.
        disk: bytes of what is stored.
        certain: the part of the device's memory without which the model cannot even be loaded.
        left: bytes of weights that stay in files, because the device has no room for them.
    """

    device: str
    parts: Mapping[str, int]
    host: int
    disk: int
    certain: int
    left: int = 0

    @property
    def total(self) -> int:
        """Peak memory on the device in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """The estimate as a sentence."""
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.parts.items() if size)
        host = f"; in host memory about {_size(self.host)}" if self.host else ""
        left = f"; {_size(self.left)} of weights stay in files, and every pass reads them" if self.left else ""
        return f"about {_size(self.total)} of memory on {self.device} ({parts}){left}{host}; {_size(self.disk)} on disk"


def estimate(spec: RunSpec, settings: Settings, questions: int = 0) -> Estimate:
    """Estimate what a run needs.

    Args:
        spec: the run.
        settings: where and how it is made.
        questions: number of questions.

    Raises:
        UserError: the model is not there. It is not downloaded.
    """
    folder = find_checkpoint(spec.model, fetch=False).folder
    config = read_config(spec, fetch=False)
    width: int = getattr(torch, precision(spec, settings.device)).itemsize
    tensors = stored(folder)
    if format := format_of(config):
        with contextlib.suppress(UserError):  # it is still to be downloaded
            tensors += stored(format(folder, config).companion(fetch=False))
    left = left_in_files(spec, settings.device, config, settings.offload)
    weights = held = needed = _weights(spec, tensors, width, left)
    if settings.devices and may_leave(spec, settings.device, config):
        needed = min(weights, _weights(spec, tensors, width, left_in_files(spec, settings.device, config, True)))
    if needed < weights and (free := _free(settings)) is not None:
        held = max(needed, min(weights, int(free * USABLE)))
    parts = {"weights": held}
    if needs_tower(spec):
        tower, _ = find_tower(spec.text_tower, str(folder), default_tower(config), False)
        texts = [one for one in stored(tower) if "vision_model.encoder" not in one.name] if tower else []
        parts["text tower"] = sum(_narrowed(tensor, 4) if left else tensor.loaded(4) for tensor in texts)
    disk = questions * ANSWER
    linears = [tensor for tensor in tensors if len(tensor.shape) == 2 and ".layers." in tensor.name]
    largest = max((tensor.count for tensor in linears), default=0)
    if settings.offload or held < weights:
        parts["reading"] = 2 * largest * width
    if spec.quantize:
        parts["quantizing"] = largest * (2 * width + 8)  # a new weight, and float32 copies of it on the way
        if spec.packs:
            parts["quantizing"] += largest * width  # the buffer that a weight is unpacked to
        if spec.quantize.calibration and created(ptqs, spec.quantize.method).calibrates:
            found = sum(tensor.loaded(width) for tensor in linears)
            samples = 2 * spec.quantize.calibration.samples * _tokens(config) * _of(config, "hidden_size") * width
            kept = min(found, spill.LIMIT) + min(samples, spill.LIMIT)  # the rest waits in temporary files
            parts["calibration"] = kept + 8 * max(_of(config, "intermediate_size"), 1) ** 2
            disk += found
    parts["activations"] = _activations(config, spec, settings, width)
    everywhere = {name: size * settings.workers for name, size in parts.items()}
    process = PROCESS * settings.workers
    if settings.device.type == "cpu":
        everywhere["processes"] = process
    host = 0 if settings.device.type == "cpu" else process + max((t.loaded(width) for t in tensors), default=0)
    certain = (needed + (PROCESS if settings.device.type == "cpu" else 0)) * settings.workers
    shared = len(settings.devices)
    device = f"{shared} {settings.device.type} devices together" if shared > 1 else settings.device.type
    return Estimate(device, everywhere, host, disk, certain, weights - held)


def _weights(spec: RunSpec, tensors: Sequence[Stored], width: int, left: Collection[str]) -> int:
    """Bytes of the weights of a model as a run holds them.

    Args:
        spec: the run.
        tensors: what the checkpoint holds.
        width: bytes of a value of the model's dtype.
        left: parts of the model whose linears stay in their files, unless they are quantized.
    """
    total = 0
    for tensor in tensors:
        part = "vision" if any(word in tensor.name for word in VISION) else "language"
        stays = part in left and may_wait(tensor.name, tensor.dtype, tensor.shape)
        weights = spec.weights_of(part)
        if stays and weights is not None and spec.packs:
            total += packed_bytes(weights, tensor.shape[0], tensor.shape[1])
        elif not stays or weights is not None:
            total += _narrowed(tensor, width) if left and not stays else tensor.loaded(width)
    return total


def _narrowed(tensor: Stored, width: int) -> int:
    """Bytes that a tensor takes where matrices are held in no more bits than they have in their file."""
    loaded = tensor.loaded(width)
    return min(loaded, tensor.size) if is_matrix(tensor.name, tensor.dtype, tensor.shape) else loaded


def of_all(specs: Sequence[RunSpec], settings: Settings, totals: Sequence[int]) -> list[str]:
    """Sentences on what runs need that are made one after another: the largest need of each kind of run.

    Args:
        specs: the runs.
        settings: where and how they are made.
        totals: number of questions of each.
    """
    found: dict[str, tuple[Estimate, int]] = {}
    for spec, total in zip(specs, totals, strict=True):
        one = estimate(spec, settings, total)
        best, disk = found.get(spec.model, (one, 0))
        found[spec.model] = (one if one.total > best.total else best, disk + one.disk)
    free = _free(settings)
    known = "" if free is None else f"; {_size(free)} are free"
    return [f"{Path(model).name} needs {replace(best, disk=disk)}{known}" for model, (best, disk) in found.items()]


def refuse_unless_it_fits(spec: RunSpec, settings: Settings) -> None:
    """Refuse a run whose model cannot be loaded in the memory that is free now.

    Where nobody says how much is free, nothing is refused.

    Raises:
        UserError: the weights alone do not fit. It says what would help.
    """
    free = _free(settings)
    if free is None:
        return
    needs = estimate(spec, settings)
    if needs.certain <= free:
        return
    what = f"the run needs {needs}, and {_size(free)} are free; {_what_helps(spec, settings, needs)}"
    raise UserError(Problem(what, ("model",)))


def _free(settings: Settings) -> int | None:
    """Bytes that are free on the device of a run, or on all that share its model; None where nobody says."""
    known = [free_bytes(device) for device in settings.held_on]
    return None if None in known else sum(size for size in known if size is not None)


def _what_helps(spec: RunSpec, settings: Settings, needs: Estimate) -> str:
    """What a user can do, the mildest first."""
    ways = []
    if settings.workers > 1:
        ways.append(f"fewer --workers (each holds a model of {_size(needs.parts['weights'] // settings.workers)})")
    if precision(spec, settings.device) == "float32":
        ways.append(f"`dtype: bfloat16` (weights of {_size(needs.parts['weights'] // 2)})")
    if (smaller := _packed(spec)) is not None:
        weights = estimate(smaller, settings).parts["weights"] // settings.workers
        ways.append(f"`storage: packed` under `quantize` (weights of {_size(weights)})")
    if not settings.offload and (spec.quantize is None or spec.quantize.weights is None):
        with contextlib.suppress(UserError):  # this model cannot be offloaded
            weights = estimate(spec, replace(settings, offload=True)).parts["weights"] // settings.workers
            ways.append(f"`--offload`, which is slow (weights of {_size(weights)})")
    if settings.device.type == "cuda" and not settings.devices:
        if torch.cuda.device_count() > 1:
            ways.append("`--device-map auto`, which uses all GPUs")
        elif may_leave(spec, settings.device, read_config(spec, fetch=False)):
            ways.append("`--device-map auto`, which leaves layers in files that the GPU has no room for")
    ways.append("a machine with more memory" if settings.device.type == "cpu" else "a larger GPU, or `--device cpu`")
    return "what helps: " + ", or ".join(ways)


def _packed(spec: RunSpec) -> RunSpec | None:
    """The same run with packed weights; None if it quantizes no weights, or packs them already."""
    quantize = spec.quantize
    if quantize is None or quantize.weights is None or spec.packs or quantize.backend != "simulate":
        return None
    return spec.model_copy(update={"quantize": quantize.model_copy(update={"storage": "packed"})})


def _activations(config: Mapping[str, Any], spec: RunSpec, settings: Settings, width: int) -> int:
    """Bytes of the activations and the KV cache of a forward pass, roughly."""
    tokens = settings.batch_size * _tokens(config, spec.prune)
    hidden, inner, layers = (_of(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = max(_of(config, "num_attention_heads"), 1)
    shared = _of(config, "num_key_value_heads") or heads
    return tokens * width * (8 * hidden + 3 * inner + 2 * layers * hidden * shared // heads)


def _tokens(config: Mapping[str, Any], prune: PruneSpec | None = None) -> int:
    """Tokens of a prompt with an image that enter the decoder, roughly.

    Args:
        config: the model's config.
        prune: how its images are pruned. A budget that follows from a cost is not known yet.
    """
    said = config.get("image_seq_length")
    of_image = said if isinstance(said, int) else IMAGE
    if prune is not None and prune.budget is None:
        of_image = created(pruners, prune.method).entering(of_image, min(prune.keep, of_image))
    return WORDS + of_image


def _of(config: Mapping[str, Any], name: str) -> int:
    """A size of the language model; 0 if the config does not say."""
    inner = config.get("text_config")
    for one in (inner, config):
        if isinstance(one, Mapping) and isinstance(one.get(name), int):
            return int(one[name])
    return 0


def _size(size: int) -> str:
    """Bytes in words."""
    return f"{size / GB:.1f} GB" if size >= GB // 10 else f"{max(round(size / 10**6), 1)} MB"
