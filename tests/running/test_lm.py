"""What lm-eval may ask of us, beyond our own tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import TOKENS, picture
from lm_eval.api.instance import Instance
from transformers import AutoModelForImageTextToText, AutoProcessor

from qapbench import RunSpec, UserError, compress
from qapbench.models.family import family_of
from qapbench.prune.build import build_pruning
from qapbench.receipt import Receipt
from qapbench.records.answer import Answer
from qapbench.records.store import answers_of
from qapbench.running.active_run import ActiveRun
from qapbench.running.batches import BatchRunner
from qapbench.running.feature_cache import FeatureCache
from qapbench.running.plan import Planned
from qapbench.running.prompt_encoder import PromptEncoder
from qapbench.running.session import Session
from qapbench.running.settings import Settings
from qapbench.running.sweep import Sweep
from qapbench.spec.run_spec import PruneSpec
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


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_long_continuations_behind_a_prompt_that_the_decoder_prunes(method: str, loaded: Any) -> None:
    """The continuation goes through every layer, and its tokens are scored as `compress` scores them."""
    model, processor = loaded
    family, text, spec = family_of(model), "USER: <image>\ncat ASSISTANT:", {"method": method, "keep": 5}
    pruning = build_pruning(family, PruneSpec.model_validate(spec), Receipt(), processor)
    (question,) = in_order([choice(0, text, " a dog or a tree", 0, [picture(3)])])
    encoder, runner = PromptEncoder(family, processor, {"it": pruning}), BatchRunner(family, processor)
    prompts = encoder.encode(question, text, ["it"])
    (row,) = runner.rows(question, {text: prompts["it"]})
    assert len(row.tail) > 2
    ((outputs, images),) = runner.results([row], row.length)
    (total, _), ids = outputs[0], torch.tensor([row.tail])
    assert images[0].kept is not None
    whole = dict(processor(text=[text], images=[picture(3)], return_tensors="pt"))
    labels = torch.cat([torch.full_like(whole["input_ids"], -100), ids], dim=1)
    whole["input_ids"] = torch.cat([whole["input_ids"], ids], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad(), compress(model, {"prune": spec}):
        expected = -float(model(**whole, labels=labels).loss) * len(row.tail)
    assert total == pytest.approx(expected, rel=1e-4)


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


@pytest.mark.parametrize("where", ["checkpoint", "task"])
def test_min_length_counts_the_whole_prompt(where: str, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint's generation config, or of a task that samples; beside rows that lost other numbers of tokens."""
    model, processor = loaded
    family, text = family_of(model), "USER: <image>\ncat ASSISTANT:"
    options: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": where == "task"}
    length = processor(text=[text], images=[picture(3)], return_tensors="pt")["input_ids"].shape[1]
    written: list[int] = []
    generate = model.generate

    def counting(**kwargs: Any) -> Any:
        out = generate(**kwargs)
        written.extend([out.shape[1] - kwargs["input_ids"].shape[1]] * len(out))
        return out

    monkeypatch.setattr(model, "generate", counting)
    # Every token but one ends the text, but none before there are `min_length` tokens: prompt + 4, and then one more.
    monkeypatch.setattr(model.generation_config, "eos_token_id", [*range(5), *range(6, len(processor.tokenizer))])
    if where == "task":
        options["min_length"] = length + 4
    else:
        monkeypatch.setattr(model.generation_config, "min_length", length + 4)
    specs = {
        "some": {"method": "random", "keep": 5},
        "fewer": {"method": "random", "keep": 2},
        "inside": {"method": "fastv", "keep": 5},
    }
    prunings = {
        key: build_pruning(family, PruneSpec.model_validate(spec), Receipt(), processor) for key, spec in specs.items()
    }
    request = Instance("generate_until", {"id": 0}, (text, options, {"visual": [picture(3)]}), 0, metadata=("t", 0, 1))
    (question,) = in_order([request])
    encoder, runner = PromptEncoder(family, processor, prunings), BatchRunner(family, processor, batch_size=4)
    prompts = encoder.encode(question, text, [None, *specs])
    rows = [row for prompt in prompts.values() for row in runner.rows(question, {text: prompt})]
    assert [row.prompt.removed for row in rows] == [0, TOKENS - 5, TOKENS - 2, 0]
    runner.results(rows, length)
    assert written == [5] * len(rows)
    cache = FeatureCache(10**6)
    cache.put("here", prompts)
    assert [one.removed for one in cache.get("here", torch.device("cpu")).values()][1:3] == [TOKENS - 5, TOKENS - 2]


def test_perplexity_is_refused() -> None:
    request = Instance("loglikelihood_rolling", {}, ("text",), 0, metadata=("t", 0, 1))
    with pytest.raises(UserError, match="roll over a whole text"):
        refuse([request])
