"""A table of profiles for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from qapbench.records.profile import Profile, Spread

from .fitting import fitted

HEADS = (
    *("run", "vision", "selection", "prefill", "prompt", "each token", "prompt >="),
    *("prompts/s", "tokens/s", "peak MB"),
)


def profile_table(profiles: Sequence[Profile], width: int = 200) -> Table:
    """A table with one row per run: median milliseconds of each stage, with quartiles.

    The time of simulated quantization is marked as that, with the cost model's bound beside it, since it is no
    speed-up.

    Args:
        profiles: the profiles.
        width: characters per line.
    """
    rows = []
    for one in profiles:
        mark = " simulated" if one.simulated else ""
        cells = [_shown(one.vision), _shown(one.selection), _shown(one.prefill) + mark]
        cells += [_shown(one.prompt) + mark, _shown(one.token) + mark]
        cells += ["–" if one.bound is None else f"{1e3 * one.bound:.3g}"]
        cells += [
            "–" if rate is None else f"{rate:.3g}{mark}" for rate in (one.prompts_per_second, one.tokens_per_second)
        ]
        rows.append([one.name, *cells, str(one.peak_memory_mb)])
    notes = []
    if profiles:
        one = profiles[0]
        notes.append(
            f"{one.device}, {one.dtype}, {one.threads} thread(s), attention {one.attention}, products by {one.matmul}; "
            f"batch {one.batch}, {one.repeats} repetitions, rows in turn; prompts/s: with {one.new_tokens} tokens "
            "answered to each; tokens/s: of decoding"
        )
    if any(one.simulated for one in profiles):
        notes.append("simulated: values of low-bit kernels in floating point, so its time is no speed-up of any kind")
    notes.append("prompt >=: the cost model's bound on this device; selection inside the decoder is part of prefill")
    return fitted("Measured, ms: median (quartiles)", HEADS, rows, notes, width)


def _shown(spread: Spread | None) -> str:
    """A spread in milliseconds; a dash if there is none."""
    if spread is None:
        return "–"
    return f"{1e3 * spread.median:.3g} ({1e3 * spread.low:.3g}–{1e3 * spread.high:.3g})"
