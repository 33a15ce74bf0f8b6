"""Profiles: measured times of a run's stages, typed, kept beside the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, ValidationError

from qapbench.errors import UserError
from qapbench.methods.parameters import problems_of

from .record import Count, Part, read_json
from .store import write_json

FOLDER = "profiles"
"""Name of the folder of profiles, beside those of the runs."""


class Spread(Part):
    """Seconds that something took, over the repetitions.

    Attributes:
        median: their median.
        low: their lower quartile.
        high: their upper quartile.
    """

    median: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class Profile(Part):
    """What one prompt of a run took, measured at batch 1.

    Attributes:
        run_id: id of the run.
        name: its name.
        device: name of the GPU or CPU.
        dtype: dtype of the weights.
        threads: threads of the process.
        attention: attention that ran, as transformers names it.
        matmul: what multiplied.
        simulated: whether quantization was simulated. Its times are then those of the simulation, and say nothing of
            low-bit kernels.
        repeats: repetitions, each of which measured every row once.
        tokens: tokens of the prompt as it was prefilled; of a pruner inside the decoder before it drops any.
        new_tokens: tokens that were generated.
        vision: tower and projector.
        selection: choosing tokens; None for a pruner inside the decoder, whose choice is part of `prefill`.
        prefill: the language model on the prompt, up to the first token.
        token: each token after it, the median of a repetition.
        prompt: all of it up to the first token.
        peak_memory_mb: peak memory: of the GPU for this row, or of the process so far on a CPU.
        bound: the cost model's least seconds for the prompt on this machine, with low-bit kernels where it multiplies
            in low bits; None where the machine's peaks are not known.
    """

    run_id: str
    name: str
    device: str
    dtype: str
    threads: Count
    attention: str
    matmul: str
    simulated: bool
    repeats: Annotated[int, Field(ge=1)]
    tokens: Count
    new_tokens: Count
    vision: Spread
    selection: Spread | None = None
    prefill: Spread
    token: Spread
    prompt: Spread
    peak_memory_mb: Count
    bound: FiniteFloat | None = None


def write_profile(runs: Path, profile: Profile) -> None:
    """Keep a profile beside the runs; it replaces an earlier one of the same run."""
    folder = runs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{profile.run_id}.json", profile)


def read_profiles(runs: Path) -> dict[str, Profile]:
    """The profiles that lie beside some runs, by run id. What is no profile is left out."""
    found: dict[str, Profile] = {}
    for path in sorted((runs / FOLDER).glob("*.json")):
        try:
            profile = parse_profile(read_json(path))
        except UserError:
            continue
        found[profile.run_id] = profile
    return found


def parse_profile(data: Any) -> Profile:
    """A profile from plain data.

    Raises:
        UserError: fields are missing or wrong.
    """
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise UserError(problems_of(error, Profile)) from None
