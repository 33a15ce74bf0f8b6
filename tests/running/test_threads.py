"""Threads of the processes that answer questions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qapbench
from qapbench import RunSpec
from qapbench.running import threads
from qapbench.running.engines import make_settings
from qapbench.running.estimate import estimate
from qapbench.running.plan import Planned
from qapbench.running.planner import Planner
from qapbench.running.settings import Settings
from qapbench.running.threads import in_words, shared_out, threads_of, using_threads

Spec = Callable[..., dict[str, Any]]
SEVEN_B = {
    "text_config": {"hidden_size": 4096, "intermediate_size": 11008},
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096},
}


@pytest.mark.parametrize(
    ("config", "small"),
    [
        ({"hidden_size": 192, "intermediate_size": 512}, True),
        ({"text_config": {"hidden_size": 192, "intermediate_size": 512}}, True),
        ({"text_config": {"hidden_size": 192, "intermediate_size": 512}, "vision_config": {"hidden_size": 768}}, False),
        (SEVEN_B, False),
        (SEVEN_B["text_config"], False),
        ({"vision_config": {"hidden_size": 64}}, False),  # nothing is known of the decoder
    ],
)
def test_a_small_model_gets_one_thread(
    config: dict[str, Any], small: bool, spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "read_config", lambda spec: config)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    spec, settings = RunSpec.parse(spec_of()), Settings(tmp_path, torch.device("cpu"))
    assert threads_of(spec, settings) == (1 if small else 6)
    assert threads_of(spec, dataclasses.replace(settings, workers=4)) == 1
    assert threads_of(spec, dataclasses.replace(settings, workers=2)) == (1 if small else 3)
    assert threads_of(spec, dataclasses.replace(settings, device=torch.device("cuda"))) == 6
    assert threads_of(spec, dataclasses.replace(settings, threads=5, workers=2)) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert threads_of(spec, settings) == 6


def test_a_command_says_how_it_shares_its_work(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 192, "intermediate_size": 512}
    monkeypatch.setattr(threads, "read_config", lambda spec: SEVEN_B if "seven" in spec.model else small)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one, other = (RunSpec.parse(spec_of(model=name)) for name in ("a/tiny", "b/seven"))
    settings = Settings(tmp_path, torch.device("cpu"))
    assert in_words([one, one], settings) == "cpu with 6 cores: 1 process of 1 thread, batches of 8"
    two = dataclasses.replace(settings, workers=2, batch_size=3)
    said = "cpu with 6 cores: 2 processes of 1 thread (tiny) or 3 threads (seven), batches of 3"
    assert in_words([one, other], two) == said
    assert (
        in_words([one], dataclasses.replace(two, threads=4))
        == "cpu with 6 cores: 2 processes of 4 threads, batches of 3"
    )
    assert in_words([one], dataclasses.replace(two, device=torch.device("cuda"))) == "cuda: 2 processes, batches of 3"
    assert in_words([one], dataclasses.replace(settings, engine="ray")) == "ray: batches of 8"


def test_processes_are_started_where_they_pay(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 192, "intermediate_size": 512}
    monkeypatch.setattr(threads, "read_config", lambda spec: SEVEN_B if spec.name == "seven" else small)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = {"bytes": 10**12}
    monkeypatch.setattr(threads, "free_bytes", lambda device: free["bytes"])
    planner, cpu = Planner(tmp_path, torch.device("cpu")), torch.device("cpu")
    plan = planner.plan(RunSpec.parse(spec_of()))

    def lacking(*counts: int, **more: Any) -> list[Planned]:
        spec = plan.spec.model_copy(update=more)
        return [dataclasses.replace(plan, spec=spec, total=count + 7, answered=7) for count in counts]

    unsaid = make_settings(tmp_path, cpu, may_share=True)
    for counts, processes in {(): 1, (599,): 1, (600,): 2, (350, 280): 2, (1100,): 3, (10**6,): 4}.items():
        assert shared_out(unsaid, lacking(*counts)).workers == processes
    many = lacking(10**6)
    assert shared_out(make_settings(tmp_path, cpu), many).workers == 1
    assert shared_out(make_settings(tmp_path, cpu, workers=3), many).workers == 3
    assert shared_out(dataclasses.replace(unsaid, threads=1), many).workers == 4
    assert shared_out(dataclasses.replace(unsaid, threads=2), many).workers == 1
    assert shared_out(dataclasses.replace(unsaid, device=torch.device("cuda")), many).workers == 1
    assert shared_out(unsaid, [*many, *lacking(10**6, name="seven", model="seven")]).workers == 1
    one = estimate(plan.spec, unsaid).total
    for free["bytes"], processes in {7 * one: 3, 3 * one: 1, one: 1}.items():
        assert shared_out(unsaid, many).workers == processes
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert shared_out(unsaid, many).workers == 1


def test_threads_are_put_back_and_recorded(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
    (record,) = qapbench.run(RunSpec.parse(spec_of(task={"limit": 2})), tmp_path, threads=2)
    assert torch.get_num_threads() == before
    assert record.environment.threads == 2
