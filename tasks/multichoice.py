"""Multiple-choice questions with an optional image, as ScienceQA asks and counts them.

Prompts, answer parsers, the columns of the published tables, and the documents that lm-eval iterates over.
References: lmms-eval (tasks/scienceqa); haotian-liu/LLaVA (scripts/convert_sqa_to_llava*.py and, as at its
ScienceQA releases, llava/eval/eval_science_qa.py); royalneverwin/QVLM (llava/eval/eval_science_qa.py).
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from qapbench.errors import Problem, UserError, nearest

from .rows import LazyImage, read

__all__ = [
    "COLUMNS",
    "PARSERS",
    "PROMPTS",
    "CalibrationSource",
    "Docs",
    "LazyImage",
    "dataset",
    "doc_to_image",
    "process_results",
]

IMAGE = "<image>"
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Prompt:
    """How a question is put.

    Attributes:
        body: question, context and options of a row; what relevance to the image is measured against.
        instruction: what follows the body in the prompt only.
        parser: the parser that its answers are meant for.
        max_gen_toks: tokens that an answer may take.
    """

    body: Callable[[dict[str, Any]], str]
    instruction: str
    parser: str
    max_gen_toks: int


def _cqm(row: dict[str, Any]) -> str:
    """Context, question, options one a line: LLaVA-1.5 and lmms-eval."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    pairs = zip(string.ascii_uppercase, row["choices"], strict=False)
    return f"{context}{row['question']}\n" + "\n".join(f"{letter}. {choice}" for letter, choice in pairs)


def _qcm(row: dict[str, Any]) -> str:
    """Question, context, options in one line: LLaVA fine-tuned on ScienceQA.

    The reference writes `Question: ` in front and its converter takes it away again; double spaces become
    single ones.
    """
    pairs = zip(string.ascii_uppercase, row["choices"], strict=False)
    options = " ".join(f"({letter}) {choice}" for letter, choice in pairs)
    text = f"{row['question']}\nContext: {row['hint'].strip() or 'N/A'}\nOptions: {options}"
    return text.replace("  ", " ").strip()


# The LEA and LEPA prompts are the same; the models were taught to end differently, hence the parsers.
PROMPTS = {
    "cqm_a": Prompt(_cqm, f"\n{INSTRUCTION}", parser="lmms", max_gen_toks=16),
    "qcm_lea": Prompt(_qcm, "", parser="llava", max_gen_toks=1024),
    "qcm_lepa": Prompt(_qcm, "", parser="qvlm", max_gen_toks=1024),
}


def _llava(text: str, letters: Sequence[str]) -> str | None:
    """The whole text is a letter; or it begins `X. `; or it says exactly once `The answer is X.`.

    As in the reference a bare `A.` is not an answer, the first rule that applies decides even where its
    letter is none of the options, and the full stop of the last rule stands for any character.
    """
    known = string.ascii_uppercase[: max(5, len(letters))]
    if len(text) == 1 and text in known:
        return text
    if len(text) >= 3 and text[0] in known and text[1:3] == ". ":
        return text[0]
    return _only(re.findall(r"The answer is ([A-Z]).", text))


def _lmms(text: str, letters: Sequence[str]) -> str | None:
    """The whole text is a letter, large or small; or it begins with a capital letter and a full stop."""
    if len(text) == 1:
        return text.upper()
    return text[0] if text[:1].isupper() and text[1:2] == "." else None


def _qvlm(text: str, letters: Sequence[str]) -> str | None:
    """It says exactly once `ANSWER: X.` (any character for the full stop, as in the reference)."""
    return _only(re.findall(r"ANSWER: ([A-Z]).", text))


def _only(found: list[str]) -> str | None:
    return found[0] if len(found) == 1 else None


PARSERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "llava": _llava,
    "lmms": _lmms,
    "qvlm": _qvlm,
}
GUESSES = {"qvlm"}
"""Parsers whose reference guesses at random where there is no answer; here the guess follows seed and pid."""


def parse(doc: dict[str, Any], text: str) -> tuple[int | None, bool]:
    """What a text answers.

    A letter that is none of the question's options is no answer: wrong, and unparsed.

    Returns:
        index: of the choice, or None (which is wrong).
        unparsed: no rule of the parser applied; the index, if any, is a guess.
    """
    letters, parser = doc["letters"], doc["parser"]
    letter = PARSERS[parser](text.strip(), letters)
    if letter in letters:
        return letters.index(letter), False
    if parser in GUESSES:
        return random.Random(f"{doc['seed']}/{doc['pid']}").randrange(len(letters)), True
    return None, True


@dataclass(frozen=True)
class CalibrationSource:
    """A task's own questions for calibration.

    Attributes:
        rows: (samples, seed) -> as many rows, as `rows.read` gives them.
        version: changes whenever the rows of a seed do.
    """

    rows: Callable[[int, int], list[dict[str, Any]]]
    version: str


class Docs(Sequence[dict[str, Any]]):
    """The documents of one data set, as lm-eval iterates over them: small dicts without image bytes.

    Attributes:
        features: the fields of a document (lm-eval reads its keys).
        unavailable: column -> why it cannot be counted in these data.
        fingerprint: of the data.
        prompt, parser: the names in effect.
        generation: what the prompt asks of decoding, over the YAML's `generation_kwargs`.
        numbered: the data have no ids; the questions' are row numbers.
        calibration: (samples, seed, parquet file or None) -> as many questions that quantization may look at, put as
            these are.
        calibration_version: of the task's own source of such questions; "" where it has none.
    """

    def __init__(
        self,
        docs: list[dict[str, Any]],
        unavailable: dict[str, str],
        fingerprint: str,
        prompt: str,
        parser: str,
    ) -> None:
        self._docs = docs
        self.prompt, self.parser = prompt, parser
        self.generation = {"max_gen_toks": PROMPTS[prompt].max_gen_toks}
        self.numbered = bool(docs[0].get("numbered"))
        self.features: dict[str, None] = dict.fromkeys(docs[0])
        self.unavailable, self.fingerprint = unavailable, fingerprint
        self.calibration: Callable[[int, int, str | None], Sequence[dict[str, Any]]] | None = None
        self.calibration_version = ""

    def __len__(self) -> int:
        return len(self._docs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._docs)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._docs[index]

    def __repr__(self) -> str:
        return f"Docs({len(self)} questions)"


def dataset(
    data: str,
    prompt: str = "cqm_a",
    parser: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    calibration: CalibrationSource | None = None,
    **_: Any,
) -> dict[str, Docs]:
    """lm-eval's `custom_dataset`: the split `test`. lm-eval passes the whole metadata, hence the rest.

    Args:
        data: a parquet file or a hub id (`rows.read` names the columns).
        prompt: one of PROMPTS.
        parser: one of PARSERS; the prompt's own where None.
        seed: of the parsers that guess.
        limit: only the first questions. Which columns are unavailable is decided on all of them.
        calibration: the task's own questions for calibration; without it users name a file.

    Raises:
        UserError: unknown prompt or parser, or wrong data.
    """
    form = PROMPTS[_known("prompt", prompt, PROMPTS)]
    parser = _known("parser", parser or form.parser, PARSERS)
    rows, fingerprint = read(data)
    unavailable = unknown_columns(rows)
    docs = Docs(_documents(rows[:limit], form, unavailable, parser, seed), unavailable, fingerprint, prompt, parser)

    def calibrate(samples: int, asked: int, file: str | None) -> list[dict[str, Any]]:
        return _documents(_calibration_rows(samples, asked, file, calibration), form, {}, parser, seed)

    docs.calibration, docs.calibration_version = calibrate, calibration.version if calibration else ""
    return {"test": docs}


def _documents(
    rows: list[dict[str, Any]], form: Prompt, unavailable: dict[str, str], parser: str, seed: int
) -> list[dict[str, Any]]:
    """Rows as documents: what is asked, and what counts as an answer."""
    docs = []
    for row in rows:
        body = form.body(row).replace(IMAGE, "").strip()
        letters = list(string.ascii_uppercase[: len(row["choices"])])
        image = f"{IMAGE}\n" if row["image"] is not None else ""
        docs.append(
            {
                **row,
                "text": f"{image}{body}{form.instruction}",
                "relevance_text": body,
                "letters": letters,
                "letter": letters[row["answer"]],
                "columns": [name for name in columns_of(row) if name not in unavailable],
                "parser": parser,
                "seed": seed,
            }
        )
    return docs


def _calibration_rows(
    samples: int, seed: int, file: str | None, source: CalibrationSource | None
) -> list[dict[str, Any]]:
    """So many rows of a file, drawn without replacement, or of the task's own source."""
    where = ("quantize", "calibration")
    if file is None:
        if source is None:
            message = "this task has no calibration questions of its own; name a parquet file, such as its train split"
            raise UserError(Problem(message, (*where, "data")))
        return source.rows(samples, seed)
    try:
        rows, _ = read(file)
    except UserError as error:
        raise UserError([Problem(problem.message, (*where, "data")) for problem in error.problems]) from None
    if len(rows) < samples:
        raise UserError(Problem(f"{samples} asked for, but {file} holds {len(rows)}", (*where, "samples")))
    return [rows[index] for index in random.Random(seed).sample(range(len(rows)), samples)]


def _known(kind: str, name: str, valid: dict[str, Any]) -> str:
    if name not in valid:
        raise UserError(Problem(f"unknown {kind} '{name}'; {nearest(name, valid)}", ("task", kind)))
    return name


def columns_of(row: dict[str, Any]) -> list[str]:
    """The columns that a question counts in, in the order of COLUMNS."""
    subject = SUBJECTS.get(row["subject"].strip().lower())
    grade = _grade(row["grade"])
    member = {
        subject: subject is not None,
        "TXT": bool(row["hint"]),
        "IMG": row["image"] is not None,
        "NO": not row["hint"] and row["image"] is None,
        "G1-6": grade is not None and grade <= 6,
        "G7-12": grade is not None and grade > 6,
        "Avg": True,
    }
    return [name for name in COLUMNS if member.get(name)]


def unknown_columns(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Columns that some question may or may not belong to, each with the reason."""
    unknown = {
        "subject": sum(row["subject"].strip().lower() not in SUBJECTS for row in rows),
        "grade": sum(_grade(row["grade"]) is None for row in rows),
    }
    fields = {"NAT": "subject", "SOC": "subject", "LAN": "subject", "G1-6": "grade", "G7-12": "grade"}
    return {
        name: f"{field} unknown for {unknown[field]} of {len(rows)} questions"
        for name, field in fields.items()
        if unknown[field]
    }


def _grade(text: str) -> int | None:
    match = re.fullmatch(r"(?:grade)?\s*(\d{1,2})", text.strip().lower())
    return int(match[1]) if match and 1 <= int(match[1]) <= 12 else None


def doc_to_image(doc: dict[str, Any]) -> list[LazyImage]:
    """The question's images, still encoded: at most one."""
    return [] if doc["image"] is None else [doc["image"]]


def process_results(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """1 or 0 for each column that the question counts in, and whether its answer could not be parsed.

    Args:
        doc: one of Docs.
        results: `[text]` of a generated answer, or one `(log-likelihood, is_greedy)` an option.
    """
    if isinstance(results[0], str):
        index, unparsed = parse(doc, results[0])
    else:
        index, unparsed = _likeliest([likelihood for likelihood, _ in results])
    right = float(index == doc["answer"])
    return {**dict.fromkeys(doc["columns"], right), "unparsed": float(unparsed)}


def _likeliest(likelihoods: Sequence[float]) -> tuple[int | None, bool]:
    """The first of the highest; none where a NaN makes them incomparable."""
    if any(math.isnan(value) for value in likelihoods):
        return None, True
    return max(range(len(likelihoods)), key=likelihoods.__getitem__), False
