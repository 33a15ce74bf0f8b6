"""The compatibility matrix of pruners, quantization methods and model families, measured on tiny random models."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from qapbench.compression import compress
from qapbench.errors import UserError, first_line
from qapbench.methods.formats import Format
from qapbench.methods.kinds import pruners, ptqs
from qapbench.methods.quantization import PTQ
from qapbench.models.family import families
from qapbench.quantize.calibration import CalibrationSamples
from qapbench.receipt import NotQuantizedError, Receipt

KEEP = 5  # budget; a view of a tiny model has 16 or 20 tokens
FAMILIES = 3  # number of families, about, that a sample tries each quantization method on
Outcome = Literal["runs", "refused", "failed"]
# Formats that are tried for a method that has none of its own, on both sides; the first that it makes is taken.
FORMATS = (Format(bits=4, group_size=16), Format(bits=8, symmetric=True))
FEW = {"iters": 3, "epochs": 1, "steps": 2}  # steps of methods that learn: whether they run does not depend on how long
TENSOR = Format(bits=8, symmetric=True, granularity="tensor")


@dataclasses.dataclass(frozen=True)
class CompatibilityResult:
    """The outcome of one pruner on one model family, which may be quantized.

    Attributes:
        family: name of the model family.
        pruner: name of the pruner.
        outcome: "runs", "refused" (by a UserError), or "failed" (by any other error, with logits that are not finite,
            or with a receipt that does not show the quantization).
        reason: why it was refused or failed; "" if it runs.
        tokens: token counts of the receipt over one forward pass and one `generate`, of which a quantized model makes
            only the latter.
        notes: the receipt's fallbacks, that is, what was done otherwise than on a CLIP tower.
        ptq: name of the quantization method; None if the model is in full precision.
        activations: format of the activations in words; None if they are not quantized.
    """

    family: str
    pruner: str
    outcome: Outcome
    reason: str = ""
    tokens: dict[str, float | int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    ptq: str | None = None
    activations: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return dataclasses.asdict(self)


def run_matrix() -> Iterator[CompatibilityResult]:
    """Run every registered pruner on every model family and yield one result each.

    A pruner that refuses a model, or crashes on it, is a result too.
    """
    for name in families.names():
        model, inputs = _tiny(name)
        for pruner in pruners.names():
            yield _run(name, pruner, model, inputs)


def run_ptq_matrix(
    names: Iterable[str] | None = None, new_tokens: int = 2, sample: bool = False
) -> Iterator[CompatibilityResult]:
    """Run every registered pruner under every quantization method on every model family and yield one result each.

    A method runs with its own formats or, if it has none, with the first of a few that it makes; if it makes
    activations that share a scale over all tokens, it runs with these too.

    Args:
        names: the model families; None for all.
        new_tokens: how many tokens each answer has.
        sample: whether to run each pruner under each method on one family only; see `sampled`.
    """
    for name in families.names() if names is None else names:
        model, inputs = _tiny(name)
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100  # methods that read gradients take the last two tokens for the answer
        with tempfile.TemporaryDirectory() as kept:
            samples = CalibrationSamples([{**inputs, "labels": labels}], cache=Path(kept))
            for ptq in ptqs.names():
                taken = sampled(name, ptq) if sample else pruners.names()
                for weights, activations in _formats(ptqs.create(ptq)) if taken else ():
                    formats = weights, activations
                    yield from _run_quantized(name, ptq, formats, model, inputs, samples, new_tokens, taken)


def sampled(family: str, ptq: str) -> list[str]:
    """Names of the pruners that a sample of the matrix runs under a quantization method on a model family.

    Over all families every pruner meets every method once. A method is tried on a few families, because calibrating
    takes the most time.
    """
    turn = ptqs.names().index(ptq)
    step = max(len(families.names()) // FAMILIES, 1)
    tried = families.names()[turn % step :: step]
    if family not in tried:
        return []
    return [name for at, name in enumerate(pruners.names()) if (at + turn) % len(tried) == tried.index(family)]


def _tiny(family: str) -> tuple[Any, dict[str, Any]]:
    """The family's tiny model and one call's inputs, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return families.create(family).tiny()


def _formats(method: PTQ) -> list[tuple[Format | None, Format | None]]:
    """Pairs of formats (weights, activations) under which a method is run.

    Activations whose range spans a whole tensor are tried with the methods that do not calibrate: what they are told of
    the tokens is the same for all methods, and calibrating takes the most time.
    """
    pairs = [method.formats] if method.formats is not None else [(format, format) for format in FORMATS]
    taken = [pair for pair in pairs if _makes(method, *pair)][:1]
    if taken and not method.calibrates and method.formats is None and _makes(method, taken[0][0], TENSOR):
        taken.append((taken[0][0], TENSOR))
    return taken


def _makes(method: PTQ, weights: Format | None, activations: Format | None) -> bool:
    with contextlib.suppress(UserError):
        method.check(weights, activations)
        return True
    return False


def _run(family: str, pruner: str, model: Any, inputs: dict[str, Any]) -> CompatibilityResult:
    @torch.inference_mode()
    def answer() -> tuple[torch.Tensor, Receipt]:
        with compress(model, {"prune": {"method": pruner, "keep": KEEP}}) as receipt:
            logits = model(**inputs).logits
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        return logits, receipt

    return _result(CompatibilityResult(family, pruner, "runs"), answer)


def _run_quantized(
    family: str,
    ptq: str,
    formats: tuple[Format | None, Format | None],
    model: Any,
    inputs: dict[str, Any],
    samples: CalibrationSamples,
    new_tokens: int,
    taken: list[str],
) -> Iterator[CompatibilityResult]:
    """Quantize the model once, as a sweep does, and run the pruners in `taken` on it."""
    sides = {"weights": formats[0], "activations": formats[1]}
    few = {key: value for key, value in FEW.items() if key in ptqs.validate(ptq, {})}
    section = {
        "method": {ptq: few},
        **{side: format.model_dump() for side, format in sides.items() if format is not None},
    }
    with contextlib.ExitStack() as stack:
        quantization: Receipt | None = None
        why: Exception | None = None
        try:
            quantization = stack.enter_context(compress(model, {"quantize": section}, calibration=samples))
        except Exception as error:  # told for every pruner, like their own errors
            why = error
        for pruner in taken:

            @torch.inference_mode()
            def answer(pruner: str = pruner) -> tuple[torch.Tensor, Receipt]:
                if quantization is None:
                    raise why or RuntimeError("the model was not quantized")
                for line in quantization.linears:
                    line.calls = 0  # bits are measured at the first call, so at the first one of each pruner
                with compress(model, {"prune": {"method": pruner, "keep": KEEP}}) as receipt:
                    out = model.generate(
                        **inputs,
                        max_new_tokens=new_tokens,
                        do_sample=False,
                        eos_token_id=None,
                        output_logits=True,
                        return_dict_in_generate=True,
                    )
                quantization.check()
                return torch.cat(out.logits), receipt

            said = str(formats[1]) if formats[1] is not None else None
            yield _result(CompatibilityResult(family, pruner, "runs", ptq=ptq, activations=said), answer)


def _result(cell: CompatibilityResult, answer: Any) -> CompatibilityResult:
    """The cell with its outcome.

    Args:
        cell: says what is run.
        answer: runs it and returns (logits, receipt).
    """
    try:
        logits, receipt = answer()
    except UserError as error:
        return dataclasses.replace(cell, outcome="refused", reason=first_line(error))
    except NotQuantizedError as error:
        return dataclasses.replace(cell, outcome="failed", reason=first_line(error))
    except Exception as error:  # the matrix reports every error that a method raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        return dataclasses.replace(cell, outcome="failed", reason=reason)
    if not torch.isfinite(logits).all():
        return dataclasses.replace(cell, outcome="failed", reason="logits are not finite")
    return dataclasses.replace(cell, tokens=receipt.tokens, notes=receipt.fallbacks)
