"""The command `cost`: what the rows of a spec cost, whether or not the model is there."""

from __future__ import annotations

import json
import logging
import re
from typing import Annotated

import typer

from qapbench.errors import UserError

from . import completion
from .console import SetOption, out


def cost(
    spec: Annotated[
        str | None,
        typer.Argument(
            help="A spec file or a shipped spec; the model as it is if left out.", autocompletion=completion.specs
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Count for this model: llava-1.5-7b, a config's folder, ...")
    ] = None,
    changes: SetOption = None,
    before: Annotated[int, typer.Option(help="Text tokens in front of the images.")] = 35,
    after: Annotated[int, typer.Option(help="Text tokens behind them.")] = 29,
    image: Annotated[list[str] | None, typer.Option(help="Size of an image in pixels, WIDTHxHEIGHT.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated.")] = 1,
    batch: Annotated[int, typer.Option(help="Prompts side by side.")] = 1,
    device: Annotated[str | None, typer.Option(help="Least times on h100, a100, l4, ..., or here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a prompt costs under each run of a spec: tokens, FLOPs, BOPs, bytes, and the least time on a device.

    No weight is read, so the model need not be there.

    \b
    Examples:
      qapbench cost --model llava-1.5-7b table2
      qapbench cost --model llava-1.5-7b --device h100
    """
    from qapbench.spec.run_spec import RunSpec
    from qapbench.spec.spec_file import load_spec

    sizes = tuple(map(_size, image or ["672x672"]))
    if spec is None and not model:
        raise UserError("cost: name a spec, or a model with --model")
    asked: list[RunSpec] = []
    if spec is None:
        asked += [RunSpec.parse({"name": name, "model": name, "task": "none"}) for name in model or ()]
    else:
        named = [[f"model={json.dumps(name)}"] for name in model or ()] or [list[str]()]
        asked += [run for one in named for run in load_spec(spec, [*(changes or ()), *one])]

    from qapbench.analysis.cost_table import cost_table
    from qapbench.costing.cost import cost as cost_of
    from qapbench.costing.devices import find_device_peaks
    from qapbench.costing.prompt import Prompt

    peaks = find_device_peaks(device) if device else None
    prompt = Prompt(before, after, sizes, new_tokens, batch)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    found = [(one.name, cost_of(one.model, one, prompt)) for one in asked]
    dense = {}
    for one, (_, counted) in zip(asked, found, strict=True):
        if counted.model not in dense:
            plain = one.model_copy(update={"quantize": None, "prune": None})
            dense[counted.model] = cost_of(one.model, plain, prompt)
    if as_json:
        rows = []
        for name, counted in found:
            bounds = counted.bounds(peaks) if peaks else {}
            times = {stage: {"seconds": b.seconds, "limit": b.limit} for stage, b in bounds.items()}
            rows.append({"name": name, **counted.to_json(), **({"bounds": times} if peaks else {})})
        typer.echo(json.dumps(rows))
    elif len(found) == 1:
        out.print(found[0][1].summary(peaks), markup=False, highlight=False, soft_wrap=True)
    else:
        out.print(cost_table(found, dense, peaks, out.width))


def _size(text: str) -> tuple[int, int]:
    """Height and width of an image that is written as WIDTHxHEIGHT.

    Raises:
        UserError: it is written otherwise.
    """
    if not (match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)):
        raise UserError(f"--image {text!r}: a size in pixels is written WIDTHxHEIGHT, such as 672x672")
    return int(match[2]), int(match[1])
