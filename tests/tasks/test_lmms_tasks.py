"""Tasks of lmms-eval's on small local data: prompts, pictures and scores are those of lmms-eval's own evaluator."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lmms_data_sets import (
    GQA,
    MMBENCH,
    MME,
    MMMU,
    MMSTAR,
    POPE,
    SCIENCEQA,
    SEED,
    TEXTVQA,
    VIZWIZ,
    VQAV2,
    DataSet,
    write_all,
)

from qapbench import UserError
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.groups import expanded
from qapbench.tasking.images import digest_image
from qapbench.tasking.lmms_data import DataSource
from qapbench.tasking.lmms_index import find_lmms_task
from qapbench.tasking.tasks import LoadedTask, load_task

pytestmark = [
    pytest.mark.lmms,
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"),
]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Case:
    """A task on its data set.

    Attributes:
        sets: its data.
        answers: an answer for every question.
        first: the prompt of the first question, written out.
        pictures: number of pictures of each question.
        scores: the score of each question in the metric `metric`.
        totals: lmms-eval's figures, computed by hand.
        metric: name of that metric.
    """

    sets: Sequence[DataSet]
    answers: list[str]
    first: str
    pictures: list[int]
    scores: list[float]
    totals: dict[str, float]
    metric: str


CASES = {
    "pope": Case(
        [POPE],
        ["Yes", "yes", "no", " no ", "No."],
        f"Is there a cat in the image?{SHORT}",
        [1] * 5,
        [1, 0, 0, 1, 0],  # "No." is not "no"
        {
            "pope_accuracy": 2 / 5,
            "pope_precision": 1 / 2,
            "pope_recall": 1 / 2,
            "pope_f1_score": 1 / 2,
            "pope_yes_ratio": 2 / 5,
        },
        "pope_accuracy",
    ),
    "mme": Case(
        [MME],
        ["Yes", "No", "yes.", "Yes", "No", "no", "Maybe", "No"],
        f"Is this a cat?{SHORT}",
        [1] * 8,
        [1, 1, 1, 0],
        {"mme_perception_score": (200 + 50) / 2, "mme_cognition_score": (50 + 50) / 2},
        "mme_perception_score",
    ),
    "textvqa_val": Case(
        [TEXTVQA],
        ["Red.", "2"],
        f"What color is it?{SHORT}",
        [1, 1],
        [1.0, 1.0],
        {"exact_match": 1.0},
        "exact_match",
    ),
    "gqa": Case(GQA, ["No", "man"], f"Is it overcast?{SHORT}", [1, 1], [1, 0], {"exact_match": 0.5}, "exact_match"),
    "mmbench_en_dev_static": Case(
        [MMBENCH],
        ["A", "The answer is (A).", "a cat"],
        f"Which one is shown? There are several options:\nA. a cat\nB. a dog\n{LETTER}",
        [1, 1, 1],
        [100, 0, 100],
        {"gpt_eval_score": 200 / 3},
        "gpt_eval_score",
    ),
    "scienceqa_img": Case(
        [SCIENCEQA],
        ["a", "B. fly"],
        f"Which is a mammal?\nA. cat\nB. fly\nC. fern{LETTER}",
        [1, 1],
        [1, 1],
        {"exact_match": 1.0},
        "exact_match",
    ),
    "vqav2_val": Case(
        [VQAV2],
        ["dark red", "3"],
        f"what color is it?{SHORT}",
        [1, 1],
        [9 / 10, 0],
        {"exact_match": 0.45},
        "exact_match",
    ),
    "vizwiz_vqa_val": Case(
        [VIZWIZ],
        ["dark red", "Unanswerable"],
        f"What color is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}",
        [1, 1],
        [(3 * 2 / 3 + 7) / 10, 1.0],
        {"exact_match": 0.95},
        "exact_match",
    ),
    "seedbench": Case(
        [SEED],
        ["A. One", "b", "B"],
        f"How many cats are there?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}",
        [1, 1, 3],
        [1, 0, 1],
        {"seed_image": 0.5, "seed_video": 1.0, "seed_all": 2 / 3},
        "seed_all",
    ),
    "mmstar": Case(
        [MMSTAR],
        ["A", "B", "C", "the answer is A"],
        f"Which option is shown? Options: A: cat, B: dog, C: fox, D: tree{LETTER[:-1]}",
        [1] * 4,
        [1, 1, 1, 0],
        {"coarse perception": 1.0, "math": 0.5, "average": (1 + 1 + 0.5) / 3},
        "average",
    ),
    "mmmu_val": Case(
        [MMMU],
        ["A", "A", "There are 12."],
        "What is in <image 1>?\nA. a cat\nB. a dog\n\nAnswer with the option's letter from the given choices directly.",
        [1, 2, 1],
        [1, 0, 1],
        {"mmmu_acc": 0.66667},
        "mmmu_acc",
    ),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of each task's data; datasets keeps its copies beside them."""
    root = tmp_path_factory.mktemp("hub")
    for name, case in CASES.items():
        write_all(case.sets, root / name)
    before = os.environ.get("LMMS_EVAL_DATASETS_CACHE")
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(root / "cache")
    yield root
    del os.environ["LMMS_EVAL_DATASETS_CACHE"]
    if before is not None:
        os.environ["LMMS_EVAL_DATASETS_CACHE"] = before


@pytest.fixture(scope="module")
def loaded(roots: Path) -> dict[str, LoadedTask]:
    """Every task, loaded by a spec that names the folder of its data."""
    return {
        name: load_task(TaskSpec.model_validate({"name": name, "from": "lmms-eval", "data": str(roots / name)}))
        for name in CASES
    }


def theirs(name: str, answers: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """What lmms-eval's own evaluator makes of the answers, and the model that gave them."""
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import evaluate
    from lmms_eval.tasks import TaskManager, get_task_dict

    class Stored(lmms):
        """Gives stored answers, and keeps what it was asked."""

        def __init__(self) -> None:
            super().__init__()
            self.asked: dict[int, tuple[str, list[str], dict[str, Any]]] = {}

        def generate_until(self, requests: Any) -> list[str]:
            for text, options, visual, doc, task, split in (request.args for request in requests):
                shown = visual(self.task_dict[task][split][doc])
                self.asked[doc] = text, [digest_image(image) for image in shown], options
            return [answers[request.args[3]] for request in requests]

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        generate_until_multi_round = loglikelihood

    monkeypatch.chdir(folder)  # where lmms-eval finds local data by their hub ids
    manager = TaskManager("ERROR", include_path=str(find_lmms_task(name).path.parent), include_defaults=False)
    tasks = get_task_dict([name], manager)
    tasks[name].aggregation().pop("submission", None)  # a file for an evaluation server, which needs openpyxl
    model = Stored()
    model.task_dict[name] = tasks[name].dataset
    arguments = Namespace(process_with_media=False, output_path=str(folder), reasoning_tags=None)
    found = evaluate(model, tasks, bootstrap_iters=0, cli_args=arguments, process_docs_parallel=1)
    return found["results"][name], model


@pytest.mark.parametrize("name", CASES)
def test_prompts_pictures_and_scores_are_those_of_lmms_eval(
    name: str, loaded: dict[str, LoadedTask], roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, task = CASES[name], loaded[name]
    assert task.count == len(case.answers)
    assert (task.score or task.columns[-1]) == case.metric
    assert task.docs[0]["relevance_text"] == case.first
    marks = "<image>\n" * case.pictures[0]
    assert task.task.doc_to_text(task.docs[0]) == marks + case.first
    assert [len(task.images(doc)) for doc in range(task.count)] == case.pictures

    scored = [task.task.process_results(task.docs[at], [text]) for at, text in enumerate(case.answers)]
    values = [one[case.metric] for one in scored if case.metric in one]
    assert values == pytest.approx(case.scores)
    assert all(isinstance(value, float) for value in values)
    items = {metric: [one[metric] for one in scored if metric in one] for metric in task.task.aggregation()}
    totals = {metric: task.task.aggregation()[metric](some) for metric, some in items.items() if some}
    assert totals == pytest.approx(case.totals)

    found, model = theirs(name, case.answers, roots / name, monkeypatch)
    assert {metric: found[f"{metric},none"] for metric in totals} == pytest.approx(totals)
    task.task.build_all_requests(limit=None)
    for request in task.task.instances:
        text, pictures, options = model.asked[request.doc_id]
        shown = request.args[2]["visual"]
        assert request.args[0].replace("<image>\n", "") == text
        assert [picture.digest() for picture in shown] == pictures
        assert [digest_image(picture.decode().picture) for picture in shown] == pictures
        kept = {key: options.get(key) for key in ("until", "max_new_tokens")}
        assert {key: request.args[1].get(key) for key in kept} == kept
        assert request.args[1]["do_sample"] is False


def test_a_choice_is_the_most_likely_one(roots: Path) -> None:
    data = {"lmms-lab-encoder/SEED-Bench": str(roots / "seedbench" / SEED.path)}
    task = load_task(TaskSpec.model_validate({"name": "seedbench_ppl", "from": "lmms-eval", "data": data}))
    assert task.letter
    task.task.build_all_requests(limit=1)
    texts = [request.args[:2] for request in task.task.instances]
    assert texts == [("<image>\nHow many cats are there? Answer :", f" {n}") for n in ("One", "Two", "Three", "Four")]
    likely = [(-1.0, True), (-2.0, False), (-3.0, False), (-4.0, False)]
    assert task.task.process_results(task.docs[0], likely) == {"acc": 1.0}
    assert task.task.process_results(task.docs[1], likely) == {"acc": 0.0}


def spec(name: str, **more: Any) -> TaskSpec:
    return TaskSpec.model_validate({"name": name, "from": "lmms-eval", **more})


def test_the_identity_follows_the_content_of_the_data(
    roots: Path, tmp_path: Path, loaded: dict[str, LoadedTask]
) -> None:
    moved = write_all(GQA, tmp_path / "moved")
    assert load_task(spec("gqa", data=str(moved))).fingerprint == loaded["gqa"].fingerprint
    changed = [GQA[0], DataSet(GQA[1].path, GQA[1].split, GQA[1].features, GQA[1].rows[::-1], GQA[1].config)]
    other = load_task(spec("gqa", data=str(write_all(changed, tmp_path / "changed"))))
    assert other.fingerprint != loaded["gqa"].fingerprint, "the pictures are data too"
    assert other.code == loaded["gqa"].code
    assert other.code != loaded["pope"].code


def test_data_are_found_by_hub_id_by_name_and_as_a_file(roots: Path, loaded: dict[str, LoadedTask]) -> None:
    folder = roots / "pope" / POPE.path
    (file,) = folder.rglob("*.parquet")
    wanted = loaded["pope"].fingerprint
    for data in (folder, folder.parent, file, {POPE.path: str(folder)}, {POPE.path: str(file)}):
        given = data if isinstance(data, dict) else str(data)
        assert load_task(spec("pope", data=given)).fingerprint == wanted, data


def test_folders_without_a_readme_are_read_by_the_names_of_their_files(tmp_path: Path) -> None:
    root = write_all(GQA, tmp_path)
    (root / GQA[0].path / "README.md").unlink()
    task = load_task(spec("gqa", data=str(root)))
    assert [task.docs[at]["answer"] for at in range(2)] == ["no", "woman"]
    assert [len(task.images(at)) for at in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "gqa",
            {POPE.path: "POPE"},
            r"task.data: the data set lmms-lab-encoder/GQA is missing: task.data says nothing of it, only of "
            r"lmms-lab-encoder/POPE; .*`hf download lmms-lab-encoder/GQA --repo-type dataset --local-dir data/GQA`",
        ),
        ("pope", "none", r"POPE is missing: none does not exist; .*--local-dir none/POPE` fetches it"),
        ("pope", "POPE", r"POPE has no parquet file of the split test, only of the splits validation"),
        ("pope", "empty", r"empty has no parquet file;"),
    ],
)
def test_missing_data_are_one_sentence_with_the_command(
    name: str, data: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "POPE").mkdir()
    (tmp_path / "POPE" / "validation-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=message) as caught:
        load_task(spec(name, data=data))
    assert "\n" not in str(caught.value)


def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"POPE is missing: the hub did not give it \(\w+: .*\); where .*hf download .*names it"
    ):
        load_task(spec("pope"))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("popee", {}, r"task.name: lmms-eval has no task 'popee'; did you mean 'pope'\?"),
        ("pope_full", {}, r"'pope_full' is a group of tasks; name one of them: pope_adv, pope_pop, pope_random"),
        ("textvqa_test", {}, r"'textvqa_test' has no score, only answers to be handed in"),
        ("videomme", {}, r"task.name: 'videomme' asks about videos; what can be asked about is pictures"),
        ("ovo_forward", {}, r"'ovo_forward' is of the kind generate_until_multi_round; what can be asked is"),
        ("pope", {"prompt": "mine"}, r"task.prompt: lmms-eval's task 'pope' has its own prompt; leave `prompt` out"),
        ("pope", {"answers": "letter"}, r"task.answers: task 'pope' is of the kind generate_until"),
        (
            "mmbench_en_dev",
            {},
            r"'mmbench_en_dev' has its answers judged by a service on the network \(api.openai.com\)",
        ),
    ],
)
def test_mistakes_are_named(name: str, more: dict[str, Any], message: str, roots: Path) -> None:
    folder = roots / ("mmbench_en_dev_static" if name == "mmbench_en_dev" else "pope")
    with pytest.raises(UserError, match=message):
        load_task(spec(name, data=str(folder), **more))


def test_a_group_stands_for_its_tasks() -> None:
    names = [one.name for one in expanded([spec("pope_full", limit=3)])]
    assert names == ["pope_adv", "pope_pop", "pope_random"]
    tagged = [one.name for one in expanded([spec("redteam", limit=3)])]
    assert {"safety_jailbreakbench_benign", "safety_jailbreakbench_harmful"} <= set(tagged), "the name of a tag, too"
    assert len(tagged) == len(set(tagged))


def test_load_dataset_is_as_before_afterwards() -> None:
    import datasets.load

    build, own_map = datasets.load.load_dataset_builder, datasets.Dataset.map
    with DataSource("none", ["test"]).serving():
        assert datasets.load.load_dataset_builder is not build
    assert datasets.load.load_dataset_builder is build
    assert datasets.Dataset.map is own_map
