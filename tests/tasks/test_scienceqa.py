"""ScienceQA and DiagramQA through lm-eval: prompts, columns, images that stay on disk."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from question_files import ROWS, load, picture, png, row

from qapbench import UserError
from qapbench.tasking.registry import own_tasks
from qapbench.tasking.tasks import LoadedTask, quiet
from qapbench.tasking.text import unquoted
from qapbench.tasks import multichoice
from qapbench.tasks.multichoice import COLUMNS, LazyImage

OFFICIAL = Path(os.environ.get("QAPBENCH_SCIENCEQA", "no parquet file of the test split"))


class Scripted(LM):
    """Answers from a table; keeps the requests that it saw."""

    MULTIMODAL = True

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__()
        self.answers, self.seen = answers, []

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        self.seen += requests
        return [self.answers[r.doc["pid"]] for r in requests]

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        self.seen += requests
        return [(self.answers[r.doc["pid"]][r.idx], False) for r in requests]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        raise NotImplementedError


def evaluate(loaded: LoadedTask, lm: LM) -> dict[str, Any]:
    """What lm-eval makes of the answers. An empty task manager spares reading all of its 14,000 files."""
    empty = TaskManager(include_defaults=False)
    with quiet():
        return simple_evaluate(model=lm, tasks=[loaded.task], limit=loaded.count, bootstrap_iters=0, task_manager=empty)


# -- through lm-eval --


@pytest.mark.parametrize("name", ["scienceqa", "diagramqa"])
def test_generated_answers(write: Any, name: str) -> None:
    loaded = load(write(), name)
    lm = Scripted({"10": " b ", "11": "C. z", "12": "B", "13": "It is A"})
    results = evaluate(loaded, lm)["results"][name]
    expected = dict.fromkeys(COLUMNS, 0.5) | {"SOC": 1, "LAN": 0, "NO": 1}
    assert {key: results[f"{key},none"] for key in COLUMNS} == expected
    assert results["unparsed,none"] == 1 / 4
    text, generation, extra = lm.seen[0].args
    assert text.startswith("<image>\nContext: A hint.\n")
    assert generation == {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 16}
    assert [type(image) for image in extra["visual"]] == [LazyImage]
    assert lm.seen[1].args[2] == {"visual": []}


@pytest.mark.parametrize("name", ["scienceqa", "diagramqa"])
def test_option_letters(write: Any, name: str) -> None:
    loaded = load(write(), name, answers="letter")
    lm = Scripted({"10": [-2.0, -1.0], "11": [-1.0, -2.0, -3.0], "12": [-1.0, -1.0], "13": [math.nan, -1.0]})
    results = evaluate(loaded, lm)["results"][f"{name}_letter"]
    assert loaded.letter
    assert results["Avg,none"] == 2 / 4  # a tie takes the first; NaN is no answer
    assert results["unparsed,none"] == 1 / 4
    assert [request.args[1] for request in lm.seen[2:5]] == ["A", "B", "C"]
    assert lm.seen[0].args[0] == loaded.docs[0]["text"]


def test_logged_samples_can_be_written_and_hash_alike(write: Any) -> None:
    data = write()
    lm = Scripted(dict.fromkeys(("10", "11", "12", "13"), "A"))
    first, second = (evaluate(load(data), lm)["samples"]["scienceqa"] for _ in range(2))
    assert [s["doc_hash"] for s in first] == [s["doc_hash"] for s in second]
    assert len(json.dumps(first, default=str)) < 20_000


def test_limit_and_description(write: Any) -> None:
    loaded = load(write(), limit=2)
    assert (loaded.count, len(loaded.docs), loaded.ids) == (2, 2, ["10", "11"])
    assert loaded.columns == list(COLUMNS)
    assert loaded.fingerprint == hashlib.sha256(Path(write()).read_bytes()).hexdigest()
    assert not loaded.stand_in
    assert set(own_tasks()) == {"scienceqa", "diagramqa"}


# -- prompts --


def test_cqm_a(write: Any) -> None:
    docs = load(write()).docs
    body = "Context: A hint.\nWhich 10?\nA. one\nB. two"
    assert docs[0]["text"] == (f"<image>\n{body}\nAnswer with the option's letter from the given choices directly.")
    assert docs[0]["relevance_text"] == body
    assert docs[1]["text"] == (
        "Which 11?\nA. x\nB. y\nC. z\nAnswer with the option's letter from the given choices directly."
    )
    assert (docs[1]["letters"], docs[1]["letter"], docs[1]["topic"]) == (["A", "B", "C"], "C", "t")


@pytest.mark.parametrize(("prompt", "parser"), [("qcm_lea", "llava"), ("qcm_lepa", "qvlm")])
def test_qcm(write: Any, prompt: str, parser: str) -> None:
    loaded = load(write(), prompt=prompt)
    docs = loaded.docs
    assert docs[0]["text"] == "<image>\nWhich 10?\nContext: A hint.\nOptions: (A) one (B) two"
    assert docs[1]["text"] == "Which 11?\nContext: N/A\nOptions: (A) x (B) y (C) z"
    assert "Context: Only text." in docs[3]["text"]
    assert docs[3]["relevance_text"] == docs[3]["text"]
    assert docs[0]["parser"] == parser
    assert loaded.task.config.generation_kwargs["max_gen_toks"] == 1024


def test_image_marks_in_a_question_do_not_multiply(write: Any) -> None:
    docs = load(write([row("1", question="What is <image>?", image=picture(png("red")))])).docs
    assert docs[0]["text"].count("<image>") == 1  # the one of the question is marked as text
    assert unquoted(docs[0]["text"]).count("<image>") == 2
    assert "What is <image>?" in docs[0]["relevance_text"]


# -- columns --


def test_columns(write: Any) -> None:
    assert [doc["columns"] for doc in load(write()).docs] == [
        ["NAT", "TXT", "IMG", "G1-6", "Avg"],
        ["SOC", "NO", "G7-12", "Avg"],
        ["LAN", "IMG", "G1-6", "Avg"],
        ["NAT", "TXT", "G7-12", "Avg"],
    ]


def test_a_column_unknown_for_one_question_is_unavailable(write: Any) -> None:
    loaded = load(write([*ROWS[:3], row("13", grade=None, subject="biology")]), limit=2)
    because = "{} unknown for 1 of 4 questions"
    assert loaded.unavailable == {
        **dict.fromkeys(("NAT", "SOC", "LAN"), because.format("subject")),
        **dict.fromkeys(("G1-6", "G7-12"), because.format("grade")),
    }
    assert loaded.docs[0]["columns"] == ["TXT", "IMG", "Avg"]
    assert loaded.columns == list(COLUMNS)
    results = loaded.task.process_results(loaded.docs[0], ["B"])
    assert results == {"TXT": 1.0, "IMG": 1.0, "Avg": 1.0, "unparsed": 0.0}


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the real test split is not here")
def test_official_counts() -> None:
    loaded = load(str(OFFICIAL))
    counts = collections.Counter(name for doc in loaded.docs for name in doc["columns"])
    assert counts == {"NAT": 2252, "SOC": 889, "LAN": 1100, "TXT": 2046, "IMG": 2017, "NO": 1435, "Avg": 4241}
    assert loaded.unavailable["G1-6"] == "grade unknown for 3880 of 4241 questions"


# -- images --


def test_images_stay_on_disk(write: Any, tmp_path: Path) -> None:
    (tmp_path / "c.png").write_bytes(png("lime"))
    rows = [*ROWS, row("14", image=picture(None, "c.png")), row("15", image=picture(None))]
    docs = load(write(rows)).docs
    image = docs[2]["image"]
    assert image.load().mode == "RGB"
    assert image.load().getpixel((0, 0)) == (0, 0, 255)
    assert image.digest() == hashlib.sha256(png("blue", "RGBA")).hexdigest()
    assert docs[4]["image"].load().getpixel((0, 0)) == (0, 255, 0)
    assert [doc["image"] is None for doc in docs] == [False, True, False, True, False, True]
    assert docs[5]["columns"] == ["NAT", "NO", "G1-6", "Avg"]
    assert repr(image) == "LazyImage(data.parquet, row 2)"
    packed = pickle.dumps(image)
    assert len(packed) < 400
    again = pickle.loads(packed)
    assert again == image
    assert again.digest() == image.digest()
    assert len(pickle.dumps(list(docs))) < 10_000
    assert not any(isinstance(value, bytes) for doc in docs for value in doc.values())


def test_a_broken_picture_and_changed_data(write: Any) -> None:
    data = write([row("1", image=picture(b"not a picture"))])
    (image,) = multichoice.doc_to_image(load(data).docs[0])
    with pytest.raises(UserError, match=r"data\.parquet, row 0.*not a readable picture"):
        image.load()
    stale = LazyImage(image.data, image.stamp + 1, 0)
    with pytest.raises(UserError, match="changed or went away"):
        stale.load()
