"""Reads spec files with made-up mistakes, as `qapbench validate` does, and counts how they end.

    python -m benchmarks.fuzz_specs --count 10000 --seed 0 [--half lived] [--only 17]

Every spec is a shipped one with mistakes put into its structure (keys dropped, swapped, doubled, values retyped,
nested, made huge or replaced by wrong Unicode), or into its bytes; some come with `--set` arguments and broken plugins.
Half of them are read in one long-lived process, the other half each in a process of its own, which has imported the
modules and read nothing. A spec may be valid or be refused. What must not be: a traceback, a message without field and
line, or more than 5 seconds, of which those count not in which other processes had the processor (where Linux says so).
Specs are the same for the same seed; `--half` reads those of one half, and `--only` shows one of them, and how it ends.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

SHIPPED = Path(__file__).parents[1] / "specs"
SLOW = 5.0  # seconds
PLACED = re.compile(r"line \d+: \S|--set |.*\(from --set ")
PLUGINS = {
    "good.py": b'from qapbench import metric\n\n@metric("fuzz_good")\ndef fuzz_good(tokens):\n    """Mean."""\n'
    b"    return tokens.abs().mean(dim=-1)\n",
    "half.py": b'from qapbench import metric\n\n@metric("fuzz_half")\ndef fuzz_half(tokens):\n    """Mean."""\n'
    b"    return tokens.mean(dim=-1)\n\nraise RuntimeError('\\nbroken')\n",
    "syntax.py": b"def (:\n",
    "nul.py": b"x = 1\x00\n",
    "bytes.py": bytes(range(256)),
    "exits.py": b"import sys\nsys.exit(3)\n",
    "beside.py": b"import syntax\n",
    "taken.py": b'from qapbench import metric\n\n@metric("l2")\ndef l2(tokens):\n    """Taken."""\n    return tokens\n',
    "deep.py": b"x = " + b"(" * 300 + b")" * 300 + b"\n",
    "text.txt": b"no Python",
}
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        2**64 - 1,
        -(2**63),
        0.5,
        -0.0,
        1e308,
        1e-300,
        "",
        " ",
        "~",
        "/",
        ".",
        "..",
    ),
    *(
        "a/b",
        "../..",
        "~nosuchuser/x",
        "/root/x",
        "\u202eabc",
        "\u00e9\u0301",
        "\U0001f600" * 40,
        "x" * 300,
        "x" * 4000,
    ),
    *(
        "x/" * 900,
        "C:\\x",
        "%s{0}",
        "[red]",
        "null",
        "1e5",
        "letter",
        "language",
        "rtn",
        "gptq",
        "cdpruner",
        "fastv",
        "l2",
    ),
    *(
        "combined",
        "convex",
        "diagram-llava",
        "diagramqa",
        "scienceqa",
        "diagramqa_letter",
        "sciencqa",
        "mmlu",
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": {}},
        {"a": None},
        {"cdpruner": {}},
        {"rtn": None},
        {"combined": {"bits": "x"}},
        ["language"] * 3,
    ),
    *({"bits": 4}, {"bits": 2, "group_size": 1, "symmetric": True}, [1, "a", None], {"name": "diagramqa", "limit": 1}),
]
RAW = [
    *(
        "!!binary aGk=",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!python/name:os.system",
        "!x y",
        "!!int z",
        "!!float z",
        "!!bool z",
    ),
    *(
        "9" * 4301,
        "0b_",
        "0x_",
        "0o9",
        "1:99:99",
        ".nan",
        "-.inf",
        "1e9999",
        "1.e+400",
        "<<",
        "=",
        "2026-11-28",
        "?",
        "|",
        ">-",
    ),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x07"',
        '"\\U00110000"',
        "&a [*a]",
        "*nowhere",
        "&a {<<: *a}",
        "{<<: [1]}",
        "[" * 400,
        "{a: " * 90,
    ),
    *(
        "'",
        '"',
        "- -",
        "{? [a]: b}",
        "%YAML 1.9",
        "---",
        "...",
        "\x85",
        "\ufeff",
        "\u2028",
        "@",
        "`",
        "!!map x",
        "!!str {a: b}",
    ),
]


def write_plugins(folder: Path) -> None:
    """Write the plugin files, of which most are broken, and a folder that is named like one."""
    for name, content in PLUGINS.items():
        (folder / name).write_bytes(content)
    (folder / "folder.py").mkdir(exist_ok=True)


def made_up(seed: int, index: int) -> tuple[bytes, list[str]]:
    """The text of one spec, and the `--set` arguments that go with it.

    Args:
        seed: seed of the campaign.
        index: number of the spec.
    """
    draw = random.Random(f"{seed}/{index}")
    source = draw.choice(sorted(SHIPPED.glob("*.yaml")))
    text = source.read_text(encoding="utf-8")
    if draw.random() < 0.75:
        data = yaml.safe_load(text)
        for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
            data = _mutated(data, draw)
        text = json.dumps(data) if draw.random() < 0.2 else yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if draw.random() < 0.45:
        for _ in range(draw.choice((1, 1, 2, 4))):
            text = _respelled(text, draw)
    encoded = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.15:
        encoded = _damaged(encoded, draw)
    changes = []
    if draw.random() < 0.15:
        key = draw.choice(
            ("prune.keep", "task.limit", "quantize.weights.bits", "model", "seed", "", ".", "x." * 40, "a\0")
        )
        value = draw.choice([*RAW, *map(repr, (4, 0, "x", [1]))])
        changes.append(draw.choice((f"{key}={value}", key, f"{key}==", f"{key}=null")))
    return encoded, changes


def _mutated(data: Any, draw: random.Random) -> Any:
    """The data with one change at one place of its structure."""
    data = copy.deepcopy(data)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key, below in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            collect(below)

    collect(data)
    if not places:
        return draw.choice(VALUES)
    (node, key), (other, another) = draw.choice(places), draw.choice(places)
    what = draw.randrange(12)
    if what == 0:
        del node[key]
    elif what == 1:
        node[key], other[another] = copy.deepcopy(other[another]), copy.deepcopy(node[key])
    elif what == 2:
        node[key] = copy.deepcopy(draw.choice(VALUES))
    elif what == 3:
        node[key] = str(node[key]) if draw.random() < 0.5 else [node[key]]
    elif what == 4:
        for _ in range(draw.choice((1, 2, 5, 40))):
            node[key] = {draw.choice(("a", "name", "prune", "cdpruner", "0")): node[key]}
    elif what == 5 and isinstance(node, dict):
        node[_misspelled(str(key), draw)] = node.pop(key)
    elif what == 6 and isinstance(node[key], str):
        node[key] = _misspelled(node[key], draw)
    elif what == 7:
        node[key] = [copy.deepcopy(node[key])] * draw.choice((0, 1, 3, 300))
    elif what == 8 and isinstance(data, dict):
        data["plugins"] = draw.sample([*PLUGINS, "none.py", "folder.py", "good.py"], draw.choice((1, 1, 2, 4)))
    elif what == 9 and isinstance(data, dict):
        axes = draw.choices(
            ("prune.keep", "seed", "task.limit", "prune", "model", "task", "quantize.method", ".", "a..b"), k=4
        )
        data["matrix"] = {axis: draw.choices(VALUES, k=draw.choice((1, 2, 12))) for axis in axes}
    elif what == 10 and isinstance(data, dict):
        data["task"] = _misspelled(draw.choice(("diagramqa", "scienceqa", "ai2_arc", "mmmu_val", "chartqa")), draw)
    elif isinstance(node, dict):
        node[draw.choice(("model", "name", "task", "prune.keep", "", "x" * 200, "9", "matrix"))] = draw.choice(VALUES)
    return data


def _misspelled(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text) + 1)
    more = draw.choice(("", "x", "\u0430", "\u202e", " ", ".", "-", "/", "\U0001f600", "y" * 200))
    return text[:place] + more + text[place + 1 :]


def _respelled(text: str, draw: random.Random) -> str:
    """The text with one change to its YAML: a line given twice, dropped, indented, or a value that no dump writes."""
    lines = text.split("\n")
    place = draw.randrange(len(lines))
    what = draw.randrange(6)
    if what == 0:
        lines.insert(place, lines[place])
    elif what == 1:
        del lines[place]
    elif what == 2:
        lines[place] = draw.choice((" ", "\t", "   ")) + lines[place]
    elif what == 3:
        lines.insert(place, draw.choice(RAW))
    else:
        head, colon, _ = lines[place].partition(":")
        lines[place] = f"{head}{colon} {draw.choice(RAW)}"
    return "\n".join(lines)


def _damaged(encoded: bytes, draw: random.Random) -> bytes:
    """The bytes with some of them cut, doubled or replaced."""
    damaged = bytearray(encoded)
    for _ in range(draw.choice((1, 2, 8, 64))):
        place = draw.randrange(len(damaged) + 1)
        what = draw.randrange(4)
        if what == 0:
            damaged[place : place + 1] = draw.randbytes(1)
        elif what == 1:
            del damaged[place : place + draw.choice((1, 3, 200))]
        elif what == 2:
            damaged[place:place] = draw.choice(
                (b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"\r", b"{", b"*", b"&", b": ", b"- ")
            )
        else:
            damaged[place:place] = damaged[: draw.choice((10, 100, 1000))]
    return bytes(damaged)


@dataclasses.dataclass(frozen=True)
class Ending:
    """How one spec ended.

    Attributes:
        index: number of the spec.
        kind: "valid", "refused", "traceback", "no place" (a message names no field or no line) or "slow".
        seconds: time that it took, apart from what other processes took.
        said: the messages, or the traceback.
    """

    index: int
    kind: str
    seconds: float
    said: str


class TooLong(BaseException):
    """Raised in a spec that takes much too long. It is no Exception, so that nothing swallows it."""


def seconds_now() -> float:
    """Seconds on a clock that stands still while this process could run but another has its processor."""
    try:
        waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        waited = 0.0
    return time.perf_counter() - waited


class Limit:
    """Raises TooLong in the main thread some seconds after the context was opened, see `seconds_now`.

    Args:
        seconds: how long it may stay open.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self.until = seconds_now() + self.seconds
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if (left := self.until - seconds_now()) > 0:
            signal.setitimer(signal.ITIMER_REAL, left)
            return
        raise TooLong


def read(index: int, encoded: bytes, changes: list[str], folder: Path) -> Ending:
    """Read one spec as `qapbench validate` does.

    Args:
        index: number of the spec.
        encoded: text of the file.
        changes: `--set` arguments.
        folder: where the file is written; plugins lie there.
    """
    import torch

    from qapbench.errors import UserError
    from qapbench.running.planner import Planner
    from qapbench.spec.spec_file import load_spec

    path = folder / f"spec-{os.getpid()}.yaml"
    path.write_bytes(encoded)
    started = seconds_now()
    try:
        with Limit(6 * SLOW):
            runs = load_spec(path, changes, Planner(folder / "runs", torch.device("cpu")).check)
        kind, said = "valid", f"{len(runs)} runs"
    except UserError as error:
        told = [str(problem) for problem in error.problems]
        said = "\n".join(told)
        kind = "refused" if told and all(PLACED.match(line) and "\n" not in line for line in told) else "no place"
        said.encode()  # what is told can be printed
    except (Exception, SystemExit, TooLong):
        kind, said = "traceback", traceback.format_exc()
    seconds = seconds_now() - started
    return Ending(index, "slow" if kind in ("valid", "refused") and seconds > SLOW else kind, seconds, said)


def in_a_process_of_its_own(one: Callable[[], Ending]) -> Ending:
    """Call a function in a fork of this process, which has read no spec."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        try:
            theirs.send(one())
        finally:
            os._exit(0)
    theirs.close()
    try:
        return ours.recv()
    finally:
        ours.close()
        os.waitpid(child, 0)


def endings(seed: int, indices: range | list[int], folder: Path, fresh: bool) -> list[Ending]:
    """How the specs of these numbers end.

    Args:
        seed: seed of the campaign.
        indices: numbers of the specs.
        folder: a folder for files.
        fresh: whether each is read in a process of its own.
    """
    import datasets  # noqa: F401  # here, so that every fork has them
    import torch  # noqa: F401

    from qapbench.methods.plugins import load_plugins
    from qapbench.running.planner import Planner  # noqa: F401
    from qapbench.tasking.registry import tasks

    load_plugins()
    tasks.names()
    warnings.simplefilter("ignore")
    write_plugins(folder)
    found = []
    for done, index in enumerate(indices):
        if done % 100 == 0:
            print(f"\r{done} of {len(indices)} specs", end="", file=sys.stderr, flush=True)
        encoded, changes = made_up(seed, index)

        def one(index: int = index, encoded: bytes = encoded, changes: list[str] = changes) -> Ending:
            return read(index, encoded, changes, folder)

        found.append(in_a_process_of_its_own(one) if fresh else one())
        if found[-1].kind not in ("valid", "refused"):
            print(
                f"--- spec {index}: {found[-1].kind}, {found[-1].seconds:.1f} s\n{found[-1].said[-2500:]}", flush=True
            )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", choices=["fresh", "lived"], help="only those of processes of their own, or of one")
    parser.add_argument("--only", type=int, help="show this one spec, and how it ends")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a data set or a model of a made-up name asks no hub
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if asked.only is not None:
            encoded, changes = made_up(asked.seed, asked.only)
            print(encoded.decode("utf-8", "backslashreplace"), *(f"--set {change!r}" for change in changes), sep="\n")
            (ending,) = endings(asked.seed, [asked.only], folder, fresh=False)
            print(f"{ending.kind}, {ending.seconds:.2f} s\n{ending.said}")
            return
        none = range(0)
        fresh = endings(asked.seed, none if asked.half == "lived" else range(0, asked.count, 2), folder, fresh=True)
        lived = endings(asked.seed, none if asked.half == "fresh" else range(1, asked.count, 2), folder, fresh=False)
    for name, some in (("a process of its own", fresh), ("one long-lived process", lived)):
        kinds = Counter(ending.kind for ending in some)
        slowest = max((ending.seconds for ending in some), default=0)
        counts = ", ".join(f"{kind} {kinds[kind]}" for kind in ("valid", "refused", "traceback", "no place", "slow"))
        print(f"{len(some)} specs, {name}: {counts}; slowest {slowest:.2f} s")
    sys.exit(any(ending.kind not in ("valid", "refused") for ending in (*fresh, *lived)))


if __name__ == "__main__":
    main()
