"""Builds a pruning from a `prune` section and a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qapbench.errors import UserError
from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.kinds import metrics, pruners
from qapbench.methods.measure import Measure
from qapbench.methods.pruner import Pruner
from qapbench.models import Family
from qapbench.models.family import default_tower
from qapbench.models.relevance import QuestionReader, TextTower, find_tower, load_tower
from qapbench.models.unread import any_unread
from qapbench.receipt import Receipt
from qapbench.spec.run_spec import PruneSpec

from .first_reads import on_model
from .prompt import PruningView
from .pruning import Pruning
from .splice import PrunedImage


def build_pruning(
    family: Family,
    spec: PruneSpec,
    receipt: Receipt,
    processor: Any = None,
    tower: TextTower | str | None = None,
    owner: str | None = None,
    on_images: Callable[[list[PrunedImage]], None] | None = None,
    on_view: Callable[[PruningView], None] | None = None,
) -> Pruning:
    """The pruning of one `prune` section on a loaded model.

    Args:
        family: the model.
        spec: the `prune` section.
        receipt: counts kept tokens, and notes fallbacks.
        processor: reads and writes the question's text; the tokenizer in the model's folder if None.
        tower: text tower that `compress` was given: a loaded one, a folder, or a hub id.
        owner: text tower that the spec names, used if `tower` is None.
        on_images: called with the images of every prompt of a wrapped call, after pruning.
        on_view: called with the scores and the selection of every view.

    Raises:
        UserError: the method needs fields that this model does not offer.
    """
    receipt.pruning = spec.label
    pruner = pruners.create(spec.method.name, **spec.method.params)
    inside = isinstance(pruner, DecoderPruner)
    if missing := missing_fields(pruner, family):
        raise UserError(
            f"prune.method: {spec.method} needs {', '.join(sorted(missing))}, which this model does not offer"
        )
    needs, optional = pruner.front_needs, pruner.front.optional if pruner.front else frozenset[str]()
    for name in sorted(needs & family.substitutes.keys()):
        receipt.fall_back(f"{name}: {family.substitutes[name]}")
    for name in sorted(optional - family.available_fields - QuestionReader.FIELDS):
        receipt.fall_back(f"{name}: this model has none, and {spec.method} does without")
    joint = joint_space(family, tower or owner, receipt) if needs & {"image_embeds", "text_embeds"} else None
    reader = QuestionReader(needs, joint, family.model.get_input_embeddings())
    receipt.relevance_sign = _sign_in_words(pruner, reader, receipt)
    sensitivity: Measure | None = None
    if spec.sensitivity:
        measure = metrics.create(spec.sensitivity.name, **spec.sensitivity.params)
        if inside and measure.needs:
            raise UserError(
                f"prune.sensitivity: {spec.sensitivity} looks at the language model's first layer, and {spec.method} "
                "drops tokens behind it"
            )
        sensitivity = on_model(measure, family)
    return Pruning(family, spec, pruner, sensitivity, reader, receipt, processor, on_view, on_images)


def missing_fields(pruner: Pruner, family: Family) -> frozenset[str]:
    """The fields of `VisionTokens` that a pruner needs and a family's models do not offer."""
    optional = pruner.front.optional if pruner.front else frozenset[str]()
    missing = pruner.front_needs - optional - family.available_fields - QuestionReader.FIELDS
    if isinstance(pruner, DecoderPruner):
        missing |= pruner.needs - pruner.optional - DecoderPruner.DECODER_FIELDS
    return missing


def joint_space(family: Family, named: TextTower | str | None, receipt: Receipt) -> TextTower | None:
    """The text tower of the joint embedding space that relevance is measured in.

    Args:
        family: the model.
        named: a tower that was asked for; None looks for the one that belongs to the model.
        receipt: notes the fallback if there is no tower.

    Returns:
        The loaded tower; None if relevance has to use the language model's embeddings.

    Raises:
        UserError: a tower was asked for, and the model's vision tower is not from CLIP.
    """
    if family.clip_width is None:
        if named is not None:
            raise UserError("text_tower: this model's vision tower is no CLIP's, so no text tower shares its space")
        receipt.fall_back("relevance from the language model's embeddings: the vision tower is no CLIP's")
        return None
    if isinstance(named, TextTower):
        return named
    config = family.model.config
    folder, reason = find_tower(named, str(family.model.name_or_path), default_tower(config.to_dict()), True)
    if folder is None:
        receipt.fall_back(f"relevance from the language model's embeddings: {reason}")
        return None
    return load_tower(folder, family.clip_width, family.model.device, any_unread(family.model))


def _sign_in_words(pruner: Pruner, reader: QuestionReader, receipt: Receipt) -> str | None:
    """The sign of relevance that a pruner takes, and why; None for a pruner that has none.

    Args:
        pruner: the pruner.
        reader: what the text tower says.
        receipt: notes a text tower of which nothing is known.
    """
    if pruner.relevance_sign is None:
        return None
    if pruner.relevance_sign != "auto":
        return f"{pruner.relevance_sign}: said by the spec"
    if reader.tower is not None and not reader.sign.known:
        receipt.fall_back(f"relevance_sign: {reader.sign.value}, {reader.sign.reason}")
    return f"{reader.sign.value}: {reader.sign.reason}"
