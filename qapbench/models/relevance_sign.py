"""Which sign of the similarity between image and question counts as relevance: it belongs to the text tower.

Two towers of the same build may differ: of OpenAI's CLIP, patches that matter to a text are found to have a low
similarity with it, and a tower whose patches were aligned with text has it the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qapbench.checkpoints.json_files import read_mapping
from qapbench.errors import UserError
from qapbench.methods.tokens import Sign

FIELD = "relevance_sign"
"""Field of a text tower's config.json that says the sign."""
KNOWN: dict[str, Sign] = {
    "openai/clip-vit-base-patch16": "negative",
    "openai/clip-vit-base-patch32": "negative",
    "openai/clip-vit-large-patch14": "negative",
    "openai/clip-vit-large-patch14-336": "negative",
}
"""Hub ids of text towers whose config does not say the sign -> the sign. Source: the released code of CDPruner (arXiv
2506.10967), which was measured on them."""
RELEASED: Sign = "negative"
"""The sign in the released codes, which is taken where nothing is known."""


@dataclass(frozen=True)
class TowerSign:
    """The sign of a text tower.

    Attributes:
        value: the sign.
        reason: where it is taken from, in words.
        known: whether something is known of this tower; if not, `value` is that of the released codes.
    """

    value: Sign
    reason: str
    known: bool = True


WITHOUT_TOWER = TowerSign(
    RELEASED, "as in the released codes; nothing is known of similarities of the language model's embeddings", False
)
"""The sign where there is no text tower, and image and question are compared in the language model's embeddings."""


def tower_sign(folder: Path) -> TowerSign:
    """The sign of the text tower in a checkpoint folder.

    It is taken from the field `relevance_sign` of config.json, else from a table of known towers. They are known by
    their hub id, which is written in `_name_or_path` of the config, or is the name of the folder.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: config.json cannot be read, or names a sign that does not exist.
    """
    config = read_mapping(folder / "config.json", "text_tower")
    said = config.get(FIELD)
    if said is not None:
        if said not in ("negative", "positive"):
            raise UserError(
                f"text_tower: {FIELD} in '{folder / 'config.json'}' must be 'negative' or 'positive', got {said!r}"
            )
        return TowerSign(said, "said by the text tower's config.json")
    names = (str(config.get("_name_or_path") or ""), *_names(folder))
    for name in names:
        for hub_id, sign in KNOWN.items():
            if name.strip("/").rpartition("/")[2] == hub_id.rpartition("/")[2]:
                return TowerSign(sign, f"as known of {hub_id}")
    return TowerSign(
        RELEASED, "as in the released codes; this text tower is not known, and its config.json does not say it", False
    )


def _names(folder: Path) -> list[str]:
    """Names under which a folder may hold a known tower: its own, and in the hub's cache that of the repository."""
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return [folder.name, cached.removeprefix("models--").replace("--", "/")]
