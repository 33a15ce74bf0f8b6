"""Tells lmms-eval of the model `qapbench`: the entry point of the group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any

MODEL = "qapbench.running.lmms_model.QapbenchLmms"


def manifest() -> Any:
    """lmms-eval's manifest of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="qapbench", simple_class_path=MODEL)
