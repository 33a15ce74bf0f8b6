"""Outliers in the activations of a checkpoint, which make it hard to quantize: measured, and put in.

    python -m training.outliers measure [--model FOLDER] [--questions 64]
    python -m training.outliers find --out qapbench/models/embedded/diagram-llava-outliers/directions.safetensors
    python -m training.outliers put --model FOLDER --directions FILE --strength 12 --out FOLDER

`measure` prints three tables. The first describes, for every block of the decoder, the inputs of the attention, of the
MLP and of its down projection, without the first token: the kurtosis over all values (3 for a normal distribution), the
largest magnitude divided by the median, and the RMS of the largest channel divided by that of the median channel; also
the norm of the first token divided by the median norm of the others. The second describes single visual tokens at the
same places: the largest magnitude of a token divided by its median magnitude, as the median over tokens and as three
upper quantiles. The third describes the visual tokens after each block of the vision tower and after the projector: the
largest L2 norm in an image divided by the median, and the share of tokens whose norm is larger than three medians.

`find` looks at training scenes, or at the questions of a parquet file, for directions of the residual stream in which
few tokens lie far out (those of highest kurtosis), and for gated neurons that few tokens drive; for visual tokens and
for text tokens. `put` writes a checkpoint in which these directions are channels with outliers, and whose outputs are
unchanged (qapbench/checkpoints/outliers.py has the steps). Both take any Llama-like model that `qapbench` has a family
for, and refuse one whose outputs would change.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from qapbench.checkpoints.find import find_checkpoint
from qapbench.checkpoints.outliers import NORMS, Outliers, layout_of, put_in
from qapbench.errors import UserError
from qapbench.models import family_of
from qapbench.tasks.diagramqa.generate import build

from .evaluate import prompt

TOLERANCE = 1e-5  # largest change of a logit, relative to the largest logit
SUBSPACE = 48  # principal components in which a direction is looked for, at most
STARTS, STEPS = 12, 60  # of the fixed-point iteration for one direction


def describe(x: Tensor) -> dict[str, float]:
    """Measure how heavy the tails of activations [T, D] are."""
    x = x.double()
    centred = x - x.mean()
    channels = x.square().mean(0).sqrt()
    return {
        "kurtosis": float(centred.pow(4).mean() / centred.square().mean() ** 2),
        "max / median": float(x.abs().max() / x.abs().median()),
        "channel max / median": float(channels.max() / channels.median()),
    }


def describe_tokens(x: Tensor) -> dict[str, float]:
    """Measure max / median of the magnitudes of each token of [T, D], and its quantiles over tokens."""
    size = x.double().abs()
    ratio = size.amax(dim=-1) / size.median(dim=-1).values
    names = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "largest": 1.0}
    found = {name: float(ratio.quantile(share)) for name, share in names.items()}
    return found | {"max / rms": float((size.amax(dim=-1) / size.square().mean(dim=-1).sqrt()).max())}


def norms(x: Tensor) -> dict[str, float]:
    """Measure the norms of tokens [B, N, D], relative to the median norm in their image."""
    size = x.double().norm(dim=-1)
    ratio = size / size.median(dim=1, keepdim=True).values
    return {
        "max / median": float(ratio.max(dim=1).values.mean()),
        "beyond 3 medians": float((ratio > 3).double().mean()),
    }


def calls(processor: Any, frame: pd.DataFrame) -> Iterator[Any]:
    """The model's keyword arguments for each question of a table with the columns of DiagramQA's."""
    rows: Any = frame.itertuples()
    for row in rows:
        image = None if row.image is None else Image.open(io.BytesIO(row.image["bytes"])).convert("RGB")
        yield processor(images=image, text=prompt(processor, row), return_tensors="pt")


@torch.inference_mode()
def measure(model: Any, processor: Any, frame: pd.DataFrame) -> list[dict[str, dict[str, float]]]:
    """Run the model on the questions of a table, one at a time, and measure its activations and visual tokens.

    Returns:
        The measures of activations, those of single visual tokens at the same places, and those of visual tokens in
        front of the decoder, each by the place in the model.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda module, args, output: seen[name].append(output.float())

    handles = [model.model.multi_modal_projector.register_forward_hook(keep("tokens: projected"))]
    for i, block in enumerate(model.model.vision_tower.encoder.layers):
        handles.append(block.register_forward_hook(keep(f"tokens: tower block {i}")))
    for i, block in enumerate(model.model.language_model.layers):
        handles.append(block.input_layernorm.register_forward_hook(keep(f"block {i} attention")))
        handles.append(block.post_attention_layernorm.register_forward_hook(keep(f"block {i} mlp")))
        handles.append(
            block.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, i=i: seen[f"block {i} down"].append(args[0].float())
            )
        )
    visual = []
    for inputs in calls(processor, frame):
        visual.append(inputs["input_ids"][0] == model.config.image_token_id)
        model(**inputs)
    for handle in handles:
        handle.remove()
    activations, single, tokens = {}, {}, {}
    for name, parts in seen.items():
        if name.startswith("tokens: "):
            states = torch.cat(parts)
            tokens[name.removeprefix("tokens: ")] = norms(states[:, 1:] if "tower" in name else states)
        else:
            first = torch.cat([part[0, :1] for part in parts])
            rest = torch.cat([part[0, 1:] for part in parts])
            ratio = float(first.norm(dim=-1).mean() / rest.norm(dim=-1).median())
            activations[name] = describe(rest) | {"first token norm / median": ratio}
            single[name] = describe_tokens(torch.cat([part[0, at] for part, at in zip(parts, visual, strict=True)]))
    return [activations, single, tokens]


# -- finding and putting in --


@torch.inference_mode()
def activations_of(model: Any, inputs: list[Any]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """The norms' outputs without gains, and the inputs of the down projections, by kind of token.

    Args:
        model: the model, in float64.
        inputs: keyword arguments of its calls.

    Returns:
        For "visual" and "text" tokens, one [T, D] per norm in their order, and one [T, H] per layer.
    """
    language: Any = family_of(model).parts["language"]
    layers = language.layers
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles: list[Any] = []
    for i, layer in enumerate(layers):
        for half, norm in enumerate(getattr(layer, name) for name in NORMS):
            handles.append(norm.register_forward_hook(_keeper(seen[f"norm {2 * i + half}"], norm)))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(_keeper(seen[f"down {i}"])))
    visual = []
    for one in inputs:
        visual.append(one["input_ids"][0] == model.config.image_token_id)
        model(**one)
    for handle in handles:
        handle.remove()

    def of(name: str, kind: str) -> Tensor:
        wanted = [at if kind == "visual" else ~at for at in visual]
        return torch.cat([part[at] for part, at in zip(seen[name], wanted, strict=True)])

    depth = len(layers)
    return {
        kind: ([of(f"norm {i}", kind) for i in range(2 * depth)], [of(f"down {i}", kind) for i in range(depth)])
        for kind in ("visual", "text")
    }


def _keeper(into: list[Tensor], norm: nn.Module | None = None) -> Any:
    """A hook that keeps a norm's output divided by its gains or, without a norm, a linear's input."""

    def after(module: Any, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        value = args[0] if norm is None or output is None else output / module.weight
        into.append(value[0].double().clone())

    return after


def find(model: Any, inputs: list[Any], each: int, seed: int = 0) -> dict[str, Tensor]:
    """Find the places for outliers of visual tokens and of text tokens.

    Args:
        model: the model, in float64.
        inputs: keyword arguments of its calls, images among them.
        each: directions per norm, and neurons per layer.
        seed: of the first guesses of each direction.

    Returns:
        `KIND.directions` [norms, each, D] float64 and `KIND.neurons` [layers, each] for both kinds of token.
    """
    found = {}
    for kind, (normed, driven) in activations_of(model, inputs).items():
        generator = torch.Generator().manual_seed(seed)
        width = normed[0].shape[-1]
        basis = torch.zeros(0, width, dtype=torch.float64)
        for x in normed:
            for _ in range(each):
                basis = torch.cat([basis, rarest_direction(x, basis, generator)[None]])
        found[f"{kind}.directions"] = basis.view(len(normed), each, width)
        found[f"{kind}.neurons"] = torch.stack([_kurtosis(x).topk(each).indices for x in driven])
    return found


def rarest_direction(x: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """A direction [D] of high kurtosis of tokens [T, D], orthogonal to those found before [n, D].

    The tokens are whitened in their first principal components, and the fixed-point iteration of FastICA
    (Hyvarinen 1999) for the fourth power runs from several random starts. The direction of the best one is that in
    which the tokens are measured, not the one in which they lie.
    """
    y = x - x @ basis.T @ basis
    values, vectors = torch.linalg.eigh(y.T @ y / len(y))
    values, vectors = values[-SUBSPACE:], vectors[:, -SUBSPACE:]
    values, vectors = values[values > values[-1] * 1e-9], vectors[:, values > values[-1] * 1e-9]
    white = y @ vectors / values.sqrt()
    best, reached = white.new_zeros(len(values)), -1.0
    for _ in range(STARTS):
        u = torch.randn(len(values), generator=generator, dtype=torch.float64)
        for _ in range(STEPS):
            u = u / u.norm()
            u = (white * (white @ u).pow(3)[:, None]).mean(dim=0) - 3 * u
        u = u / u.norm()
        if (kurtosis := float((white @ u).pow(4).mean())) > reached:
            best, reached = u, kurtosis
    direction = vectors @ (best / values.sqrt())
    for _ in range(2):  # the second time removes what rounding left
        direction = direction - basis.T @ (basis @ direction)
        direction = direction / direction.norm()
    return direction


def _kurtosis(x: Tensor) -> Tensor:
    """Kurtosis [H] of each channel of [T, H], around zero."""
    return x.pow(4).mean(dim=0) / x.square().mean(dim=0).square().clamp(min=1e-300)


def put(model: Any, outliers: Outliers, strength: float, place: Any, inputs: list[Any]) -> float:
    """Put outliers into a model in place, and compare its outputs.

    Args:
        model: the model, in float64.
        outliers: where they belong.
        strength: factor of the chosen channels.
        place: "norms" or "neurons".
        inputs: keyword arguments of calls to compare.

    Returns:
        The largest change of a logit, relative to the largest logit.

    Raises:
        UserError: the decoder is not built as Llama's, or outputs change. The model is then of no use.
    """
    before = [_logits(model, one) for one in inputs]
    _untie(model)
    state = model.state_dict()
    new = put_in(state, layout_of(list(state), _writer(model)), outliers, strength, place)
    model.load_state_dict(new)
    change = max(
        float((_logits(model, one) - old).abs().max() / old.abs().max())
        for one, old in zip(inputs, before, strict=True)
    )
    if not change <= TOLERANCE:
        raise UserError(
            f"a {model.config.model_type} answers otherwise with another basis (a logit changes by {change:.1g} of the "
            "largest): its decoder has something that Llama's does not have"
        )
    return change


@torch.inference_mode()
def _logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return model(**inputs).logits[0, -1].double()


def _untie(model: Any) -> None:
    """Give the head a weight of its own, which the gains of the last norm go into."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _writer(model: Any) -> str:
    """Name of the projector's last linear."""
    return list(family_of(model).linears(["projector"]))[-1]


def _loaded(name: str) -> tuple[Any, Any, Path]:
    """A model in float64, its processor and its folder."""
    folder = find_checkpoint(name).folder
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, use_safetensors=True).eval()
    return model, type(family_of(model)).load_processor(folder), folder


def _questions(data: Path | None, count: int) -> pd.DataFrame:
    """Questions of a parquet file, or of training scenes: three with an image for each one without."""
    if data is not None:
        return pd.read_parquet(data).head(count)
    return build("train", 0, images=count - count // 4, texts=count // 4)


def _prepared(args: argparse.Namespace, count: int) -> tuple[Any, list[Any], Path]:
    """The model, the calls for its questions, and its folder."""
    model, processor, folder = _loaded(args.model)
    inputs = []
    for one in calls(processor, _questions(args.data, count)):
        if "pixel_values" in one:
            one["pixel_values"] = one["pixel_values"].double()
        inputs.append(one)
    return model, inputs, folder


def _measure(args: argparse.Namespace) -> None:
    folder = find_checkpoint(args.model).folder
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    frame = pd.read_parquet(args.data or "tasks/diagramqa/test.parquet")
    frame = frame[frame.image.notna()].head(args.questions)
    for table in measure(model, AutoProcessor.from_pretrained(folder), frame):
        names = list(next(iter(table.values())))
        print("| " + " | ".join(["place", *names]) + " |\n|" + " --- |" * (len(names) + 1))
        for place, values in table.items():
            print("| " + " | ".join([place, *(f"{values[name]:.2f}" for name in names)]) + " |")
        print()


def _find(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    model, inputs, _ = _prepared(args, args.questions)
    found = find(model, inputs, args.each, args.seed)
    save_file(found, args.out)
    for name, value in found.items():
        print(f"{name}: {tuple(value.shape)}")


def _put(args: argparse.Namespace) -> None:
    from safetensors.torch import load_file

    if args.out.exists():
        raise UserError(f"--out {args.out} exists; name a new folder")
    found = load_file(args.directions)
    model, inputs, folder = _prepared(args, 8)
    outliers = Outliers(found[f"{args.tokens}.directions"].double(), found[f"{args.tokens}.neurons"])
    change = put(model, outliers, args.strength, args.place, inputs)
    model.float().save_pretrained(args.out)
    type(family_of(model)).load_processor(folder).save_pretrained(args.out)
    print(f"{args.out}: largest change of a logit {change:.1g} of the largest, on {len(inputs)} questions")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, text in ((_measure, "measure outliers"), (_find, "find directions"), (_put, "put outliers in")):
        command = commands.add_parser(run.__name__.removeprefix("_"), help=text)
        command.add_argument("--model", default="diagram-llava", help="embedded name, folder or hub id")
        command.add_argument("--data", type=Path, help="parquet file with the columns of DiagramQA's")
        command.set_defaults(run=run)
        if run is not _put:
            command.add_argument("--questions", type=int, default=64 if run is _measure else 160)
        if run is _find:
            command.add_argument("--each", type=int, default=2, help="directions per norm, neurons per layer")
            command.add_argument("--seed", type=int, default=0)
        if run is _put:
            command.add_argument("--directions", type=Path, required=True, help="what `find` wrote")
            command.add_argument("--strength", type=float, required=True)
            command.add_argument("--tokens", choices=("visual", "text"), default="visual")
            command.add_argument("--place", choices=("norms", "neurons"), default="norms")
        if run is not _measure:
            command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        args.run(args)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
