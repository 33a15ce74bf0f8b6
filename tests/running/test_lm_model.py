"""qapbench as a model of lm-eval: the same answers as its own runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from llava_checkpoints import picture

import qapbench
from qapbench import RunSpec, UserError
from qapbench.lm_eval import register
from qapbench.records.store import answers_of
from qapbench.running.live import LiveModel, live_settings, one_spec
from qapbench.running.session import Session

WORDS = ["cat", "dog", "tree fox"]
COMMON = {
    "test_split": "test",
    "dataset_path": "parquet",
    "doc_to_target": "{{options.index(answer)}}",
    "doc_to_image": ["image"],
    "doc_to_text": "<image>\n{{question}}",
}
TASKS: dict[str, dict[str, Any]] = {
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_choice": WORDS,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "texts": {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
WIDTH = {"bits": 4, "group_size": 16}
COMPRESSED = {
    "quantize": {
        "method": "rtn",
        "weights": {"bits": 4, "group_size": 16},
        "activations": {"bits": 4, "group_size": 16},
    },
    "prune": {"method": "cdpruner", "keep": 5},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks on six questions, two of them on one image."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {
            "question": "What is this?" + " cat" * at,
            "options": WORDS,
            "answer": WORDS[at % 3],
            "image": picture(at // 2 * 2),
        }
        for at in range(6)
    ]
    table = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for name, entries in TASKS.items():
        data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.parquet")}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **COMMON, **data, **entries}))
    return tmp_path


def test_lm_eval_gets_the_answers_of_our_runs(folder: Path, tiny_model: Path) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    register()
    register()
    spec = {"model": str(tiny_model), "task": "none", **COMPRESSED}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    given = {"batch_size": 4, "max_batch_size": None, "device": "cpu"}
    model = get_model("qapbench").create_from_arg_string(f"spec={folder / 'spec.yaml'}", given)
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(list(TASKS))
    found = evaluate(model, tasks, apply_chat_template=True, bootstrap_iters=0)
    assert found is not None
    for name in TASKS:
        own = RunSpec.parse({**spec, "task": str(folder / f"{name}.yaml")})
        (record,) = qapbench.run(own, folder / "runs", device="cpu")
        ours = {answer.doc: answer.outputs for answer in answers_of(folder / "runs" / record.run_id).read()}
        theirs = {
            sample["doc_id"]: [list(one[0]) if name == "letters" else one[0] for one in sample["resps"]]
            for sample in found["samples"][name]
        }
        assert json.dumps(theirs, sort_keys=True) == json.dumps(ours, sort_keys=True)
        (column,) = record.scores.columns
        assert found["results"][name][f"{column.name},none"] == column.accuracy


def test_the_batch_size_is_a_number(tmp_path: Path) -> None:
    assert live_settings("4", "cpu", str(tmp_path), False).batch_size == 4
    for wrong in ("auto", 0, "auto:4"):
        with pytest.raises(UserError, match=f"batch_size: a whole number above 0, got '{wrong}'"):
            live_settings(wrong, "cpu", str(tmp_path), False)


def test_the_arguments_name_one_run(tiny_model: Path, tmp_path: Path) -> None:
    assert one_spec(None, "m").model == "m"
    assert one_spec(None, "m").quantize is None
    with pytest.raises(UserError, match="name a model by `pretrained`, a spec file by `spec`, or both"):
        one_spec(None, None)
    with pytest.raises(
        UserError, match=r"quickstart has 6 runs; add run=NAME with one of 'full precision', 'W4A4 dense'"
    ):
        one_spec("quickstart", "m")
    with pytest.raises(UserError, match="quickstart has no run 'W4A4 densee'; did you mean 'W4A4 dense'"):
        one_spec("quickstart", "m", "W4A4 densee")
    found = one_spec("quickstart", str(tiny_model), "W4A4 cdpruner 32")
    assert (found.model, found.prune and found.prune.keep) == (str(tiny_model), 32)
    assert one_spec("scienceqa", None).model == "llava-hf/llava-1.5-7b-hf"


def test_a_calibrated_model_answers_as_its_run(
    spec_of: Callable[..., dict[str, Any]], questions: Path, tmp_path: Path
) -> None:
    calibration = {"samples": 3, "data": str(questions), "pruned": True}
    quantize = {"method": "smoothquant", "weights": WIDTH, "activations": WIDTH, "calibration": calibration}
    spec = RunSpec.parse(spec_of(quantize=quantize, prune=COMPRESSED["prune"]))
    (record,) = qapbench.run(spec, tmp_path, device="cpu")
    settings = live_settings(3, "cpu", str(tmp_path), False)
    asked = [request for question in Session(settings).questions(spec) for request in question.instances]
    found: dict[int, list[Any]] = {}
    for request, output in zip(asked, LiveModel(spec, settings).answer(asked), strict=True):
        found.setdefault(request.doc_id, []).append(output)
    ours = {answer.doc: answer.outputs for answer in answers_of(tmp_path / record.run_id).read()}
    assert json.dumps(found, sort_keys=True) == json.dumps(ours, sort_keys=True)
