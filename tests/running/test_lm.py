"""What lm-eval may ask of us, beyond our own tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import TOKENS, picture
from lm_eval.api.instance import Instance
from transformers import AutoModelForImageTextToText, AutoProcessor

from qapbench import RunSpec, UserError
from qapbench.records.answer import Answer
from qapbench.records.store import answers_of
from qapbench.running.active_run import ActiveRun
from qapbench.running.plan import Planned
from qapbench.running.session import Session
from qapbench.running.settings import Settings
from qapbench.running.sweep import Sweep
from qapbench.tasking.lm import AskingLM, content_items, refuse
from qapbench.tasking.outline import TaskOutline
from qapbench.tasking.questions import in_order

PRUNE = {"prune": {"method": "cdpruner", "keep": 5}}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model).eval()
    return model, AutoProcessor.from_pretrained(tiny_model)


Ask = Callable[..., tuple[Any, list[Answer]]]


@pytest.fixture
def ask(tiny_model: Path) -> Ask:
    """Outputs in the order of the requests, as lm-eval gets them, and what was stored."""

    def ask(folder: Path, requests: list[Instance], spec: dict[str, Any], size: int = 1) -> tuple[Any, list[Answer]]:
        run = RunSpec.parse({"model": str(tiny_model), "task": "foreign", **spec})
        asked = {"columns": [], "unavailable": {}, "embedded": False, "asked": {}, "stand_in": "", "fingerprint": ""}
        outline = TaskOutline(name="foreign", docs=[], count=len(requests), letter=False, **asked)
        plan = Planned(run, "id", "text", "group", folder / "id", outline, len(requests), 0, False)
        plan.folder.mkdir(parents=True)
        session = Session(Settings(folder, torch.device("cpu"), batch_size=size))
        Sweep(session, in_order(requests), [ActiveRun(plan)]).answer()
        stored = answers_of(plan.folder).read()
        lm = AskingLM(session.processor(run), answers=stored)
        return getattr(lm, requests[0].request_type)(requests), stored

    return ask


def choice(doc: int, context: str, continuation: str, index: int, images: list[Any] | None = None) -> Instance:
    arguments = (context, continuation, {"visual": images}) if images is not None else (context, continuation)
    metadata = ("foreign", doc, 1)
    return Instance("loglikelihood", {"id": doc}, arguments, index, metadata=metadata)


def likelihood(loaded: Any, context: str, continuation: str, image: Any = None) -> float:
    """The oracle: the whole text in one pass, log-probabilities of its last tokens summed."""
    model, processor = loaded
    whole = processor(text=[context + continuation], images=[image] if image else None, return_tensors="pt")
    prompt = processor(text=[context], images=[image] if image else None, return_tensors="pt")
    start = prompt["input_ids"].shape[1]
    with torch.no_grad():
        scores = model(**whole).logits[0].log_softmax(-1)
    ids = whole["input_ids"][0]
    return float(sum(scores[at - 1, ids[at]] for at in range(start, len(ids))))


def test_continuations_of_several_tokens(ask: Ask, loaded: Any, tmp_path: Path) -> None:
    context = "USER: What is this? ASSISTANT:"
    requests = [choice(0, context, f" {text}", index) for index, text in enumerate(["cat dog", "tree", "red fox live"])]
    found, _ = ask(tmp_path, requests, {})
    for (score, _), text in zip(found, ["cat dog", "tree", "red fox live"], strict=True):
        assert score == pytest.approx(likelihood(loaded, context, f" {text}"), abs=1e-3)


def test_contexts_that_differ_by_choice(ask: Ask, loaded: Any, tmp_path: Path) -> None:
    contexts = ["USER: cat ASSISTANT:", "USER: dog tree ASSISTANT:"]
    found, _ = ask(tmp_path, [choice(0, c, " tree", i) for i, c in enumerate(contexts)], {})
    expected = [likelihood(loaded, context, " tree") for context in contexts]
    assert [score for score, _ in found] == pytest.approx(expected, abs=1e-3)
    assert expected[0] != pytest.approx(expected[1], abs=1e-2)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_long_continuations_with_images_and_pruning(size: int, ask: Ask, tmp_path: Path) -> None:
    requests = [
        choice(doc, "USER: <image>\nWhat is this? ASSISTANT:", text, index, [picture(doc)])
        for doc in range(3)
        for index, text in enumerate([" cat dog", " tree fox live"])
    ]
    found, stored = ask(tmp_path / str(size), requests, PRUNE, size)
    alone, _ = ask(tmp_path / "alone", requests, PRUNE)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], abs=1e-4)
    assert [[len(image.kept or []) for image in answer.images or []] for answer in stored] == [[5]] * 3
    assert {image.available for answer in stored for image in answer.images or []} == {TOKENS}


def test_the_image_stands_where_the_text_says() -> None:
    assert content_items("What is shown in <image>? And <image>\nhere") == [
        {"type": "text", "text": "What is shown in "},
        {"type": "image"},
        {"type": "text", "text": "? And "},
        {"type": "image"},
        {"type": "text", "text": "here"},
    ]


def test_generation_stops_where_the_task_says(ask: Ask, tmp_path: Path) -> None:
    def generate(until: list[str], folder: str) -> str:
        options = {"until": until, "max_gen_toks": 12, "do_sample": False}
        request = Instance("generate_until", {}, ("USER: cat ASSISTANT:", options), 0, metadata=("t", 0, 1))
        return ask(tmp_path / folder, [request], {})[0][0]

    whole = generate([], "whole")
    assert len(whole) > 3
    stop = whole[2:4]
    assert generate([stop], "cut") == whole.split(stop)[0].strip()


def test_perplexity_is_refused() -> None:
    request = Instance("loglikelihood_rolling", {}, ("text",), 0, metadata=("t", 0, 1))
    with pytest.raises(UserError, match="roll over a whole text"):
        refuse([request])
