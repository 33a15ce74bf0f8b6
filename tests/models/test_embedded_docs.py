"""The page on models: its example for the embedded model runs as it stands there."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_embedded_model_is_loaded_and_compressed_as_the_page_says() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Embedded models")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["receipt"].tokens["mean"] == 32
    assert found["out"].shape[1] > found["inputs"]["input_ids"].shape[1]
