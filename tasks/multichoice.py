"""Multiple-choice questions with an optional image, asked and scored as in the published results on ScienceQA.

This module holds the prompts, the parsers of generated answers, the columns of the published tables, and the documents
that lm-eval iterates over.

Sources: lmms-eval (tasks/scienceqa); haotian-liu/LLaVA (scripts/convert_sqa_to_llava*.py, and
llava/eval/eval_science_qa.py as it was at the ScienceQA releases); royalneverwin/QVLM
(llava/eval/eval_science_qa.py).
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
from qapbench.tasking.text import quoted

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
    """A wording in which questions are put to a model.

    Attributes:
        body: function that writes the question, context and options of a row. The relevance of visual tokens is
            measured against this text.
        instruction: text that follows the body in the prompt, but is no part of the text that relevance is measured
            against.
        parser: name of the parser that fits the answers to this prompt.
        max_gen_toks: largest number of tokens in a generated answer.
    """

    body: Callable[[dict[str, Any]], str]
    instruction: str
    parser: str
    max_gen_toks: int


def _cqm(row: dict[str, Any]) -> str:
    """Write the context, the question, and one option per line, as LLaVA-1.5 and lmms-eval do."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    pairs = zip(string.ascii_uppercase, row["choices"], strict=False)
    return f"{context}{row['question']}\n" + "\n".join(f"{letter}. {choice}" for letter, choice in pairs)


def _qcm(row: dict[str, Any]) -> str:
    """Write the question, the context, and all options in one line, as for LLaVA fine-tuned on ScienceQA.

    The reference writes `Question: ` in front, and its converter removes that again, so it is left out here. Double
    spaces become single spaces.
    """
    pairs = zip(string.ascii_uppercase, row["choices"], strict=False)
    options = " ".join(f"({letter}) {choice}" for letter, choice in pairs)
    text = f"{row['question']}\nContext: {row['hint'].strip() or 'N/A'}\nOptions: {options}"
    return text.replace("  ", " ").strip()


# The prompts of LEA and LEPA are equal. Their models were trained to end answers differently, so the parsers differ.
PROMPTS = {
    "cqm_a": Prompt(_cqm, f"\n{INSTRUCTION}", parser="lmms", max_gen_toks=16),
    "qcm_lea": Prompt(_qcm, "", parser="llava", max_gen_toks=1024),
    "qcm_lepa": Prompt(_qcm, "", parser="qvlm", max_gen_toks=1024),
}


def _llava(text: str, letters: Sequence[str]) -> str | None:
    """Find the answered letter by the three rules of LLaVA's evaluation; None if no rule applies.

    The rules are: the whole text is one letter; the text begins with `X. `; the text contains `The answer is X.`
    exactly once. As in the reference, a bare `A.` is not an answer, the first rule that applies decides even if its
    letter is not one of the options, and the full stop of the last rule matches any character.
    """
    known = string.ascii_uppercase[: max(5, len(letters))]
    if len(text) == 1 and text in known:
        return text
    if len(text) >= 3 and text[0] in known and text[1:3] == ". ":
        return text[0]
    return _only(re.findall(r"The answer is ([A-Z]).", text))


def _lmms(text: str, letters: Sequence[str]) -> str | None:
    """Find the answered letter by the rules of lmms-eval; None if no rule applies.

    Either the whole text is one letter, in upper or lower case, or it begins with a capital letter and a full stop.
    """
    if len(text) == 1:
        return text.upper()
    return text[0] if text[:1].isupper() and text[1:2] == "." else None


def _qvlm(text: str, letters: Sequence[str]) -> str | None:
    """Find the answered letter by QVLM's rule: the text contains `ANSWER: X.` exactly once; None otherwise.

    As in the reference, the full stop matches any character.
    """
    return _only(re.findall(r"ANSWER: ([A-Z]).", text))


def _only(found: list[str]) -> str | None:
    return found[0] if len(found) == 1 else None


PARSERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "llava": _llava,
    "lmms": _lmms,
    "qvlm": _qvlm,
}
GUESSES = {"qvlm"}
"""Parsers whose reference guesses at random if it finds no answer. Here the guess is determined by seed and `pid`."""


def parse(doc: dict[str, Any], text: str) -> tuple[int | None, bool]:
    """Find the choice that a generated text answers with.

    A letter that is not one of the question's options counts as no answer.

    Returns:
        The index of the choice, or None, which counts as wrong; and whether the text could not be parsed, in which
        case the index, if there is one, is a guess.
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
    """A task's own source of questions for calibration.

    Attributes:
        rows: function of (number of samples, seed) that draws so many rows, with the columns that `rows.read` returns.
        version: string that changes whenever the rows drawn for a given seed change.
    """

    rows: Callable[[int, int], list[dict[str, Any]]]
    version: str


class Docs(Sequence[dict[str, Any]]):
    """The documents of one data set, which lm-eval iterates over: small dicts without the bytes of images.

    Attributes:
        features: dict whose keys are the fields of a document; lm-eval reads them.
        unavailable: for each column that cannot be counted in these data, the reason.
        fingerprint: fingerprint of the data, from `rows.read`.
        prompt, parser: names of the prompt and of the parser in use.
        generation: options of decoding that the prompt requires; they override the YAML's `generation_kwargs`.
        numbered: whether the data have no ids, so that the ids of the questions are row numbers.
        calibration: function of (number of samples, seed, parquet file or None) that draws so many questions for the
            calibration of a quantizer, with the same prompt as these documents.
        calibration_version: version of the task's own calibration questions; "" if it has none.
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
    """Load a data set as the split `test`. This is what lm-eval calls as the task's `custom_dataset`.

    lm-eval passes all of the task's metadata as keyword arguments. Those that are not listed here are ignored.

    Args:
        data: path of a parquet file, or the id of a data set on the hub. `rows.REQUIRED` lists its columns.
        prompt: name of a prompt in PROMPTS.
        parser: name of a parser in PARSERS; None takes the parser that belongs to the prompt.
        seed: seed of the parsers that guess.
        limit: keep only so many questions, from the start. Which columns are unavailable is decided on all questions.
        calibration: the task's own source of calibration questions; without one, users have to name a file.

    Returns:
        The documents, under the key "test".

    Raises:
        UserError: if the prompt or the parser is unknown, or the data cannot be read or are wrong.
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
    """Turn rows into documents, which also hold the prompt and what is needed to score an answer."""
    docs = []
    for row in rows:
        body = form.body(row).strip()
        letters = list(string.ascii_uppercase[: len(row["choices"])])
        image = f"{IMAGE}\n" if row["image"] is not None else ""
        docs.append(
            {
                **row,
                "text": f"{image}{quoted([body], [IMAGE])[0]}{form.instruction}",
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
    """Draw `samples` rows for calibration, from a file without replacement, or from the task's own source.

    Raises:
        UserError: if there is neither a file nor a source, or the file is wrong or has too few rows.
    """
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
    """The columns of the published tables in which a question counts, in the order of COLUMNS."""
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
    """The columns for which it is unknown whether some question belongs to them, each with the reason."""
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
    """The images of the question, still encoded. There is at most one."""
    return [] if doc["image"] is None else [doc["image"]]


def process_results(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Score the answer to one question.

    Args:
        doc: a document of `Docs`.
        results: `[text]` for a generated answer, or one `(log-likelihood, is_greedy)` per option.

    Returns:
        1 (right) or 0 (wrong) for each column in which the question counts, and 1 or 0 under "unparsed", which tells
        whether the answer could not be parsed.
    """
    if isinstance(results[0], str):
        index, unparsed = parse(doc, results[0])
    else:
        index, unparsed = _likeliest([likelihood for likelihood, _ in results])
    right = float(index == doc["answer"])
    return {**dict.fromkeys(doc["columns"], right), "unparsed": float(unparsed)}


def _likeliest(likelihoods: Sequence[float]) -> tuple[int | None, bool]:
    """Find the option with the highest log-likelihood; the first one, if several are equal.

    Returns:
        The index and False, or None and True if any value is NaN, since NaN cannot be compared.
    """
    if any(math.isnan(value) for value in likelihoods):
        return None, True
    return max(range(len(likelihoods)), key=likelihoods.__getitem__), False
