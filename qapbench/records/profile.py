"""Profiles: measured times of a run's stages, typed, kept beside the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, ValidationError

from qapbench.errors import UserError
from qapbench.methods.parameters import problems_of

from .parts import Count, Part
from .record import read_json
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
    """What a batch of one prompt of a run took.

    Attributes:
        run_id: id of the run.
        name: its name.
        device: name of the GPU or CPU.
        dtype: dtype of the weights.
        threads: threads of the process.
        attention: attention that ran, as transformers names it, with the kernels of torch's that it used.
        matmul: the library that multiplied, with the products of torch's that were called.
        simulated: whether quantization was simulated. Its times are then those of the simulation, and say nothing of
            low-bit kernels.
        repeats: repetitions, each of which measured every row once.
        tokens: tokens of the prompt as it was prefilled; of a pruner inside the decoder before it drops any.
        new_tokens: tokens that were generated.
        batch: how often the prompt stood in the batch. All times are those of the batch.
        vision: tower and projector.
        selection: choosing tokens; None for a pruner inside the decoder, whose choice is part of `prefill`.
        prefill: the language model on the prompt, up to the first token.
        token: each token after it, the median of a repetition.
        prompt: all of it up to the first token.
        answer: all of it up to the last token; None in a profile of an earlier version.
        prompts_per_second: throughput: prompts that are answered in a second, each with `new_tokens` tokens.
        tokens_per_second: throughput of decoding: tokens after the first of each prompt.
        peak_memory_mb: peak memory while the row ran: of the GPU, or of the process on a CPU.
        bound: the cost model's least seconds for the prompts on this machine, with low-bit kernels where it multiplies
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
    batch: Annotated[int, Field(ge=1)] = 1
    vision: Spread
    selection: Spread | None = None
    prefill: Spread
    token: Spread
    prompt: Spread
    answer: Spread | None = None
    prompts_per_second: FiniteFloat | None = None
    tokens_per_second: FiniteFloat | None = None
    peak_memory_mb: Count
    bound: FiniteFloat | None = None


def write_profile(runs: Path, profile: Profile) -> None:
    """Keep a profile beside the runs; it replaces an earlier one of the same run and batch."""
    folder = runs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    batch = f"-batch{profile.batch}" if profile.batch > 1 else ""
    write_json(folder / f"{profile.run_id}{batch}.json", profile)


def read_profiles(runs: Path, batch: int = 1) -> dict[str, Profile]:
    """The profiles of one batch that lie beside some runs, by run id. What is no profile is left out."""
    found: dict[str, Profile] = {}
    for path in sorted((runs / FOLDER).glob("*.json")):
        try:
            profile = parse_profile(read_json(path))
        except UserError:
            continue
        if profile.batch == batch:
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
