"""How well does the harm of leaving a token out agree with itself, if it is measured twice?

    python -m benchmarks.harm_noise outliers --questions 24 [--set task.data=val.parquet]

For each question, every visual token is left out of the quantized model, as `qapbench study sensitivity` does: once
with the prompt as it is, and once with its embeddings moved at random by a thousandth of their size. This changes the
full-precision model hardly at all, but lets later roundings fall differently. Spearman's correlation of the two
measurements is the reliability of the harm; by the attenuation formula, no score that is free of noise itself can be
expected to correlate with the harm by more than the square root of it. The quantizer is that of the spec's first
quantized run.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qapbench.analysis.leave_one_out import OcclusionEffect, Spliced, occlusion_effects, units_of
from qapbench.analysis.question import find_questions, image_questions
from qapbench.analysis.sensitivity import studies_of
from qapbench.analysis.study import TARGETS, spearman
from qapbench.models import family_of
from qapbench.running.planner import Planner
from qapbench.running.prompt_encoder import PromptEncoder
from qapbench.running.session import Session
from qapbench.running.settings import Settings
from qapbench.spec.spec_file import load_spec

STEP = 1e-3  # size of the random step, relative to the RMS of each embedding


def effects(
    pair: tuple[Spliced, Spliced], inputs: dict[str, Any], options: list[int], seed: int | None
) -> OcclusionEffect:
    """The effect of leaving each token out of a prompt.

    Args:
        pair: the quantized model and the one in full precision.
        inputs: the models' keyword arguments for the prompt.
        options: token ids of the answers.
        seed: of the random step; None takes none.
    """
    for spliced in pair:
        spliced.start(inputs)
        if seed is not None:
            x = spliced.embeds
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
            spliced.restart(x + STEP * x.square().mean(dim=-1, keepdim=True).sqrt() * noise)
    units = units_of(pair[0].view.count, pair[0].view.grid, 1)
    return occlusion_effects(*pair, inputs, units, options, 16)


@torch.inference_mode()
def reliability(spec: str, changes: list[str], count: int) -> dict[str, list[float]]:
    """Spearman's correlation of both measurements of each harm, one value per question.

    Args:
        spec: name or path of a spec.
        changes: changes to it, as `--set` takes them.
        count: number of questions with an image.
    """
    study = studies_of(load_spec(spec, changes), count)[0]
    session = Session(Settings(Path("runs"), torch.device("cpu")))
    model, processor = session.model(study.spec)
    full = Spliced(copy.deepcopy(model))
    found: dict[str, list[float]] = {name: [] for name in TARGETS}
    questions = find_questions(session, study.spec, image_questions(session.task(study.spec))[:count])
    encoder = PromptEncoder(family_of(model), processor, {})
    with session.quantized(Planner(Path("runs"), torch.device("cpu")).plan(study.spec)):
        quantized = Spliced(model)
        for place, question in enumerate(questions):
            inputs = encoder.inputs(question.question, question.question.prompt)
            first, second = (effects((quantized, full), inputs, question.ids, seed) for seed in (None, place))
            for name in TARGETS:
                pair = [getattr(one, name).numpy()[None] for one in (first, second)]
                found[name].append(float(spearman(*pair)[0, 0]))
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    args = parser.parse_args()
    print("| harm | reliability | standard error | ceiling of a correlation | questions |\n|---|--:|--:|--:|--:|")
    for name, values in reliability(args.spec, args.changes, args.questions).items():
        known = np.array([value for value in values if not math.isnan(value)])
        mean, error = known.mean(), known.std(ddof=1) / math.sqrt(len(known))
        print(f"| {name} | {mean:.3f} | {error:.3f} | {math.sqrt(max(mean, 0)):.2f} | {len(known)} |")


if __name__ == "__main__":
    main()
