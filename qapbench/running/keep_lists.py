"""`qapbench select`: which tokens of every image are kept, as a table for programs that take pruned embeddings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from qapbench import __version__
from qapbench.errors import Problem, UserError
from qapbench.files import replace_synced
from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.kinds import pruners
from qapbench.models import Family, family_of
from qapbench.models.encoded import EncodedImages
from qapbench.prune.prompt import PrunedPrompt
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.questions import Question, RefusedPictureError

from .plan import Planned, prune_key
from .planner import Planner
from .prompt_encoder import PromptEncoder
from .refusals import left_out
from .session import Session

if TYPE_CHECKING:
    import pyarrow

VERSION = "1"
"""Version of the table's columns, in its metadata under `keep_list`."""
AHEAD = 256  # questions whose texts are embedded together


def schema() -> pyarrow.Schema:
    """The columns of the table, one row per run, question and image."""
    import pyarrow as pa

    number, text = pa.int32(), pa.string()
    numbers = pa.list_(pa.field("element", number))  # as parquet names it
    columns = [
        pa.field("run", text, nullable=False),  # name of the run in the spec
        pa.field("model", text, nullable=False),
        pa.field("task", text, nullable=False),
        pa.field("method", text, nullable=False),  # pruner, budget and sensitivity in words
        pa.field("id", text, nullable=False),  # of the question in the data
        pa.field("image", number, nullable=False),  # which of the question's images
        pa.field("picture", text, nullable=False),  # content hash of the picture
        pa.field("available", number, nullable=False),  # tokens that could be pruned
        # Height and width of every view of the image, in tokens; one of each unless it is cut into tiles.
        pa.field("heights", numbers, nullable=False),
        pa.field("widths", numbers, nullable=False),
        pa.field("kept", numbers, nullable=False),  # places among the image's placeholders, ascending
        pa.field("separators", numbers, nullable=False),  # places of the model's own tokens that stay (new lines)
        pa.field("merged", number, nullable=False),  # further tokens, made from several, which no index stands for
        pa.field("embeds", text),  # file with the prompt's embeddings
    ]
    return pa.schema(columns, metadata={"keep_list": VERSION, "qapbench": __version__})


def select(specs: Sequence[RunSpec], session: Session, planner: Planner, embeds: Path | None = None) -> pyarrow.Table:
    """The kept tokens of every image that the runs of a spec ask about. Nothing is answered and nothing stored.

    Args:
        specs: the runs. Those that do not prune are left out.
        session: holds the model.
        planner: plans the runs.
        embeds: folder for the embeddings of every prompt; None for none.

    Returns:
        A table as in `schema`, by run, then by the order of the questions in the data.

    Raises:
        UserError: no run prunes, one prunes inside the decoder, or the decoder gets more of an image than embeddings.
    """
    import pyarrow as pa

    runs = [part for spec in specs if spec.prune is not None for part in planner.parts(spec)]
    if not runs:
        raise UserError(Problem("no run of the spec prunes, so every token is kept", ("prune",)))
    for run in runs:
        _check_in_front(run)
    together: dict[tuple[str, str, str], list[tuple[int, Planned]]] = {}
    for at, run in enumerate(runs):
        plan = planner.plan(run)
        together.setdefault((run.model, plan.group, run.task.model_dump_json()), []).append((at, plan))
    rows: list[tuple[tuple[int, int, int], dict[str, Any]]] = []
    for group in together.values():
        rows += _rows(group, session, embeds)
    rows.sort(key=lambda row: row[0])
    return pa.Table.from_pylist([row for _, row in rows], schema=schema())


def write(table: pyarrow.Table, path: Path) -> None:
    """Write the table as a parquet file, whole or not at all."""
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_synced(path, buffer.getvalue())


def _check_in_front(run: RunSpec) -> None:
    """Check that a run chooses its tokens in front of the decoder."""
    if run.prune is not None and isinstance(pruners.create(run.prune.method.name), DecoderPruner):
        why = f"{run.prune.method} drops tokens between the decoder's layers, so there is no list to hand to its input"
        raise UserError(Problem(why, ("prune", "method")))


def _rows(
    group: Sequence[tuple[int, Planned]], session: Session, embeds: Path | None
) -> list[tuple[tuple[int, int, int], dict[str, Any]]]:
    """The rows of runs that ask one quantized model the same questions, each with its place in the table.

    Args:
        group: the runs, each with its place in the spec.
        session: holds the model.
        embeds: folder for the embeddings of every prompt.
    """
    first = group[0][1].spec
    model, processor = session.model(first)
    family, found = family_of(model), []
    everything = session.questions(first)
    with session.quantized(group[0][1]):
        prunings = {str(prune_key(plan.spec)): session.pruning(plan.spec) for _, plan in group}
        encoder = PromptEncoder(family, processor, {key: one for key, one in prunings.items() if one is not None})
        asked = [question for question in everything if question.images]
        for done, question in enumerate(asked):
            if done % AHEAD == 0:
                encoder.expect(asked[done : done + AHEAD])
            try:
                prompts = encoder.encode(question, question.prompt, list(prunings))
            except RefusedPictureError as error:
                question.refused = error.why
                left_out(everything)
                continue
            for at, plan in group:
                prompt = prompts[str(prune_key(plan.spec))]
                name = None if embeds is None else f"{at:03}-{question.place[1]:06}.safetensors"
                if embeds is not None and name is not None:
                    embeds.mkdir(parents=True, exist_ok=True)
                    replace_synced(embeds / name, save(embedded(family, prompt)))
                for image, row in enumerate(_of_question(plan.spec, question, prompt, encoder.encoded)):
                    found.append(((at, question.place[1], image), {**row, "embeds": name}))
            session.progress(f"{first.name}: selecting", done + 1, len(asked))
    return found


def _of_question(
    run: RunSpec, question: Question, prompt: PrunedPrompt, encoded: EncodedImages
) -> list[dict[str, Any]]:
    """The rows of one question under one run, without `embeds`."""
    rows = []
    for image, (counts, whole, picture) in enumerate(
        zip(prompt.images, encoded.images, question.pictures, strict=True)
    ):
        views = [
            (int(places[0]), view.tokens.grid or (1, view.tokens.count))
            for view in encoded.views
            for owner, places in zip(view.owners, view.places, strict=True)
            if owner == image
        ]
        grids = [grid for _, grid in sorted(views)]
        chosen, separators = prompt.chosen, whole.separators
        left = torch.arange(len(whole.features)) if chosen is None else chosen[image].places.cpu()
        own = [] if separators is None else [int(place) for place in left if separators[place]]
        rows.append(
            {
                "run": run.name,
                "model": run.model,
                "task": run.task.name,
                "method": run.prune.label if run.prune else "",
                "id": question.id,
                "image": image,
                "picture": picture,
                "available": counts.available,
                "heights": [height for height, _ in grids],
                "widths": [width for _, width in grids],
                "kept": counts.kept,
                "separators": own,
                "merged": counts.merged,
            }
        )
    return rows


@torch.no_grad()
def embedded(family: Family, prompt: PrunedPrompt) -> dict[str, torch.Tensor]:
    """The embeddings of a prompt as its decoder gets them: `prompt_embeds` [S, D], and `position_ids` [..., S].

    Args:
        family: the model.
        prompt: a prompt of one row, pruned in front of the decoder.

    Raises:
        UserError: the decoder gets more of an image than embeddings.
    """
    ids = prompt.inputs["input_ids"]
    embeds = family.model.get_input_embeddings()(ids.masked_fill(ids == family.image_token, 0)).clone()
    if any(one.shape[-1] != embeds.shape[-1] for one in prompt.features):
        kind = family.model.config.model_type
        raise UserError(f"--embeds: the decoder of a {kind} gets more of an image than embeddings can hold")
    embeds[ids == family.image_token] = torch.cat(prompt.features).to(embeds.dtype)
    positions = prompt.inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    return {"prompt_embeds": embeds[0].contiguous().cpu(), "position_ids": positions[..., 0, :].contiguous().cpu()}
