"""Answers the questions of many runs of one model; what is equal is computed once.

For each quantized model, questions are the outer loop and runs the inner one. An image is therefore encoded once for
all runs and then forgotten. Only the feature cache grows with the number of questions, and it has a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qapbench.hashing import add_tensor
from qapbench.models import Family, family_of
from qapbench.models.positions import positions_needed, positions_of
from qapbench.prune.prompt import PrunedPrompt
from qapbench.prune.pruning import Pruning
from qapbench.receipt import ImageTokens, Receipt
from qapbench.records.answer import Answer
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.images import UnreadablePictureError, check_pictures
from qapbench.tasking.questions import Question, RefusedPictureError

from .active_run import FLUSH, ActiveRun, Clock, Result, earlier_results, worker_of
from .batches import BatchRunner, Row
from .feature_cache import FeatureCache
from .plan import PruneKey
from .prompt_encoder import PromptEncoder
from .refusals import left_out
from .session import Session

Prompts = dict[str, dict[PruneKey, PrunedPrompt]]
"""The prompts of one question: text -> prune key -> prompt."""
AHEAD = 32  # batches of questions whose texts are embedded together
MEMORY = 1 << 30  # bytes of pruned prompts that are kept in memory for later groups


def answer_runs(
    session: Session, runs: Sequence[ActiveRun], docs: set[int] | None = None, share: tuple[int, int] = (0, 1)
) -> dict[str, int]:
    """Answer the missing questions of runs in this process.

    Args:
        session: holds the model.
        runs: runs of one model and one task.
        docs: documents to answer; all if None.
        share: (index, number) of the part of the questions that this process answers.

    Returns:
        The peak memory of this process, and that of its phases. Questions that were refused say so themselves.

    Raises:
        NotQuantizedError: a run asks for quantization that never reached a matmul.
        RunFailedError: more questions are refused than a run may leave out.
    """
    questions = session.questions(runs[0].spec)
    sweep = Sweep(session, questions, runs, limit=MEMORY // share[1])
    mine = [
        question
        for index, question in enumerate(questions)
        if (docs is None or question.place[1] in docs or question is sweep.first)
        and worker_of(question, index, share[1]) == share[0]
    ]
    with contextlib.closing(sweep.feature_cache):
        sweep.answer(mine)
    return session.phases.peaks


class Sweep:
    """Answers the missing questions of runs of one model and one task.

    A group is the runs of one quantized model.

    Args:
        session: holds the model and the settings.
        questions: questions of the task, in the order of the work.
        active_runs: the runs.
        limit: bytes of pruned prompts that are kept in memory for later groups.

    Attributes:
        first: the first question that the model's processor accepts. Receipts are measured with it.

    Raises:
        RunFailedError: the processor refuses more questions than a run may leave out.
    """

    def __init__(
        self, session: Session, questions: Sequence[Question], active_runs: Sequence[ActiveRun], limit: int = MEMORY
    ) -> None:
        spec, settings = active_runs[0].spec, session.settings
        model, self.processor = session.model(spec)
        self.session = session
        self.family = family_of(model)
        self.positions = positions_of(model)
        self.questions = questions
        self.active_runs = active_runs
        self.batch_size = settings.batch_size
        self.clock = Clock()
        self.clock.active_runs = active_runs
        self.feature_cache = FeatureCache(limit, settings.runs if settings.spill else None)
        self.batch_runner = BatchRunner(self.family, self.processor, settings.batch_size, spec.seed)
        self._flushed = time.monotonic()
        self.first = self._first()
        for active in active_runs:
            active.open(questions, self.first)

    def answer(self, asked: Sequence[Question] | None = None) -> None:
        """Answer questions for every run that has not answered them.

        Args:
            asked: the questions; all if None.

        Raises:
            NotQuantizedError: a run asks for quantization that never reached a matmul.
        """
        asked = self.questions if asked is None else asked
        groups: dict[str, list[ActiveRun]] = {}
        for active in self.active_runs:
            groups.setdefault(active.planned.group, []).append(active)
        self._report(self.active_runs)
        encoders: dict[Any, PromptEncoder] = {}
        waiting = list(groups.values())
        while waiting:
            runs = waiting.pop(0)
            missing = [q for q in asked if q.refused is None and any(q.place not in active.have for active in runs)]
            if missing:
                self._answer_group(runs, [active for later in waiting for active in later], missing, encoders)

    def _first(self) -> Question:
        """The first question that the model's processor accepts: the same in every process and session."""
        encoder = PromptEncoder(self.family, self.processor, {})
        for question in self.questions:
            if not question.images:
                return question
            try:
                with self._naming_unreadable():
                    encoder.inputs(question, question.prompt)
                return question
            except RefusedPictureError as error:
                self._leave_out(question, error)
        raise LookupError("no question is left")  # `left_out` raises before

    def _leave_out(self, question: Question, error: RefusedPictureError) -> None:
        """Note that the model's processor refuses a question."""
        question.refused = error.why
        left_out(self.questions)

    @contextlib.contextmanager
    def _naming_unreadable(self) -> Iterator[None]:
        """If a picture cannot be decoded, name all that cannot."""
        try:
            yield
        except UnreadablePictureError:
            check_pictures((one.id, one.images) for one in self.questions)
            raise

    # -- one quantized model --

    def _answer_group(
        self,
        runs: list[ActiveRun],
        later: list[ActiveRun],
        missing: list[Question],
        encoders: dict[Any, PromptEncoder],
    ) -> None:
        """Quantize the model, and answer the missing questions of one group.

        Args:
            runs: the runs of the group.
            later: the runs of later groups, for which features may be kept.
            missing: questions that some run of the group has not answered.
            encoders: prompt encoders by the group whose vision side they belong to; None if quantization leaves it
                alone.
        """
        self.clock.active_runs = runs
        group = runs[0].planned.group
        known = {} if runs[0].planned.fresh else earlier_results(self.session.settings.runs, group)
        before = _vision_side(self.family)
        with contextlib.ExitStack() as stack:
            with self.clock.stage("quantize"):
                receipt = stack.enter_context(self.session.quantized(runs[0].planned))
            stack.callback(self._flush, runs, force=True)
            own = group if _vision_side(self.family) != before or _touches_vision(runs[0].spec) else None
            waiting = [active for active in later if own is None and not _touches_vision(active.spec)]
            encoder = encoders.get(own) or self._encoder([*runs, *waiting])
            encoders[own] = encoder
            for at in range(0, len(missing), self.batch_size):
                if at % (AHEAD * self.batch_size) == 0:
                    encoder.expect(missing[at : at + AHEAD * self.batch_size])
                window = missing[at : at + self.batch_size]
                self._answer_window(window, runs, waiting, encoder, receipt, known)

    def _encoder(self, runs: Sequence[ActiveRun]) -> PromptEncoder:
        """A prompt encoder that serves the pruning configurations of all these runs."""
        prunings: dict[str, Pruning] = {}
        for active in runs:
            key = active.prune_key
            if key is not None and key not in prunings and (pruning := self.session.pruning(active.spec)) is not None:
                prunings[key] = pruning
        return PromptEncoder(self.family, self.processor, prunings, self.clock.stage)

    def _answer_window(
        self,
        window: Sequence[Question],
        runs: list[ActiveRun],
        later: list[ActiveRun],
        encoder: PromptEncoder,
        receipt: Receipt,
        known: dict[str, Result],
    ) -> None:
        """Answer a batch of questions for the runs of one group.

        Args:
            window: the questions.
            runs: the runs of the group.
            later: runs of later groups that can use the same image features.
            encoder: encodes the questions.
            receipt: measures the quantized model.
            known: results of this group's earlier runs by content key.
        """
        encoded: dict[tuple[str, int], Prompts] = {}
        for question in window:
            try:
                encoded[question.place] = self._encode(question, runs, later, encoder)
            except RefusedPictureError as error:
                self._leave_out(question, error)
        window = [question for question in window if question.place in encoded]
        every = [prompt for prompts in encoded.values() for by_key in prompts.values() for prompt in by_key.values()]
        longest = max(map(_length, every), default=1)
        jobs: dict[str, tuple[list[Row], list[ActiveRun]]] = {}
        wanted: list[tuple[Question, ActiveRun, str]] = []
        for question in window:
            for active in (active for active in runs if question.place not in active.have):
                prompts = {text: by_key[active.prune_key] for text, by_key in encoded[question.place].items()}
                rows = self.batch_runner.rows(question, prompts)
                key = _key(active.planned.values, rows)
                wanted.append((question, active, key))
                if question is self.first:
                    known.pop(key, None)  # receipts are measured on a forward pass, not taken from an earlier run
                if key not in known:
                    jobs.setdefault(key, (rows, []))[1].append(active)
        first = [key for question, _, key in wanted if question is self.first and key in jobs]
        fresh = {key: self._measured(*jobs.pop(key), longest, receipt, encoder) for key in dict.fromkeys(first)}
        fresh |= self._compute(jobs, longest)
        payers: set[str] = set()
        for question, active, key in wanted:
            outputs, images = fresh.get(key) or known[key]
            active.computed += key in fresh and key not in payers
            payers.add(key)
            own = [by_key[active.prune_key] for by_key in encoded[question.place].values()]
            if all(
                prompt.inside is None for prompt in own
            ):  # a run with equal content may have selected its tokens in another way
                images = [image for prompt in own for image in prompt.images]
            needed = max(positions_needed(prompt.inputs) for prompt in own)
            beyond = needed if self.positions is not None and needed > self.positions else None
            active.add(_answer(question, outputs, images[: len(question.images)], key, beyond))
        self._flush(runs)

    def _encode(
        self, question: Question, runs: list[ActiveRun], later: list[ActiveRun], encoder: PromptEncoder
    ) -> Prompts:
        """The prompts of a question under the keys that need them.

        Prompts that later groups need go into the feature cache.
        """
        now = [active for active in runs if question.place not in active.have]
        then = [active for active in later if question.place not in active.have] if question.images else []
        found = {}
        for text in dict.fromkeys(instance.args[0] for instance in question.instances):
            name = (question.place, text)
            prompts = self.feature_cache.get(name, self.family.model.device)
            lacking = dict.fromkeys(active.prune_key for active in (*now, *then) if active.prune_key not in prompts)
            if any(active.prune_key in lacking for active in now):
                self.clock.active_runs = [*now, *then]
                with self._naming_unreadable():
                    prompts |= encoder.encode(question, text, lacking)
                self.clock.active_runs = runs
            # A prompt that is pruned inside the decoder has no features of its own to keep.
            keys = dict.fromkeys(active.prune_key for active in then)
            kept = {key: prompts[key] for key in keys if key in prompts and prompts[key].inside is None}
            self.feature_cache.drop(name)
            if kept:
                with self.clock.stage("feature cache", then):
                    self.feature_cache.put(name, kept)
            found[text] = prompts
        return found

    def _measured(
        self, rows: list[Row], runs: list[ActiveRun], longest: int, receipt: Receipt, encoder: PromptEncoder
    ) -> Result:
        """Answer the first question in a forward pass of its own.

        What reached the matmuls meanwhile is stored as the receipt of these runs.
        """
        for line in receipt.linears:
            if line.part == "language":  # linears of the tower and projector were measured when the image was encoded
                line.calls, line.activation_bits, line.activation_levels = 0, None, None
        if receipt.kv is not None:
            receipt.kv.restart()
        with self.clock.stage("measure", runs):
            result = _joined([self.batch_runner.results([row], longest)[0] for row in rows])
        receipt.check()  # a run that is not quantized as asked fails now, not after hours
        for active in runs:
            pruning = encoder.prunings.get(active.prune_key) if active.prune_key else None
            active.write_receipt(receipt, pruning.receipt if pruning else Receipt(), self.positions)
        return result

    def _compute(self, jobs: dict[str, tuple[list[Row], list[ActiveRun]]], longest: int) -> dict[str, Result]:
        """The result of each job, by its content key.

        Args:
            jobs: content key -> its rows, and the runs that want the result.
            longest: number of tokens of the longest unpruned prompt.
        """
        fresh: dict[str, Result] = {}
        for stage in ("text", "dense", "pruned"):
            part = {key: rows for key, (rows, _) in jobs.items() if _stage_of(rows[0]) == stage}
            sharers = [active for key in part for active in jobs[key][1]]
            if part:
                with self.clock.stage(stage, sharers):
                    found = iter(self.batch_runner.results([row for rows in part.values() for row in rows], longest))
                    fresh |= {key: _joined([next(found) for _ in rows]) for key, rows in part.items()}
        return fresh

    # -- storing answers --

    def _flush(self, runs: Sequence[ActiveRun], force: bool = False) -> None:
        """Write the answers of runs to disk if the last time was long enough ago, or `force` is True."""
        now = time.monotonic()
        if force or now - self._flushed >= FLUSH:
            with self.clock.stage("store"):
                for active in runs:
                    active.flush()
            self._report(runs)
            self._flushed = time.monotonic()

    def _report(self, runs: Sequence[ActiveRun]) -> None:
        refused = sum(question.refused is not None for question in self.questions)
        for active in runs:
            self.session.progress(active.spec.name, len(active.have) + refused, active.planned.total)


def _answer(question: Question, outputs: list[Any], images: list[ImageTokens], key: str, beyond: int | None) -> Answer:
    task, doc = question.place
    marked = [
        image.model_copy(update={"transparent": transparent})
        for image, transparent in zip(images, question.transparent, strict=True)
    ]
    return Answer(
        task=task,
        doc=doc,
        id=question.id,
        answer=question.answer(outputs),
        outputs=outputs,
        key=key,
        images=marked or None,
        positions=beyond,
    )


def _joined(results: Sequence[Result]) -> Result:
    """One result from those of all rows of a question."""
    return [output for outputs, _ in results for output in outputs], [
        image for _, images in results for image in images
    ]


def _key(group: str, rows: Sequence[Row]) -> str:
    """Content key: a hash of everything that the outputs depend on.

    That is the quantized model, the prompt as it receives it, and what is asked.
    """
    total = hashlib.sha256(group.encode())
    for row in rows:
        total.update(json.dumps([row.options, row.tail, row.spelled, row.seed, row.prompt.tag]).encode())
        for name, value in sorted(row.prompt.inputs.items()):
            total.update(name.encode())
            add_tensor(total, value)
        for feature in row.prompt.features:
            add_tensor(total, feature)
    return total.hexdigest()[:32]


def _length(prompt: PrunedPrompt) -> int:
    return int(prompt.inputs["input_ids"].shape[1])


def _stage_of(row: Row) -> str:
    """The stage that a row's time is counted under: without an image, with all tokens, or pruned."""
    if not row.prompt.features:
        return "text"
    return "pruned" if any(image.pruned for image in row.prompt.images) else "dense"


def _touches_vision(spec: RunSpec) -> bool:
    """Whether the run quantizes the vision tower or the projector."""
    return spec.quantize is not None and bool({"vision", "projector"} & set(spec.quantize.scope))


def _vision_side(family: Family) -> list[tuple[int, int]]:
    """Identities and versions of the tensors of tower, projector and embeddings; they change if quantization does."""
    roots = [family.parts["vision"], family.parts["projector"], family.model.get_input_embeddings()]
    return [(id(tensor), tensor._version) for root in roots for tensor in root.parameters()]
