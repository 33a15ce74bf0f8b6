"""Answers the questions of many runs of one model; what is equal is computed once.

For each quantized model, questions are the outer loop and runs the inner one. An image is therefore encoded once for
all runs and then forgotten. Only the feature cache grows with the number of questions, and it has a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qapbench.hashing import add_tensor
from qapbench.models import Family, family_of
from qapbench.models.kept_texts import KeptTexts
from qapbench.models.positions import positions_needed, positions_of
from qapbench.prune.prompt import PrunedPrompt
from qapbench.prune.pruning import Pruning
from qapbench.receipt import ImageTokens, Receipt
from qapbench.records.answer import Answer
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.images import UnreadablePictureError, check_pictures
from qapbench.tasking.questions import Question, RefusedPictureError

from .active_run import FLUSH, ActiveRun, Clock, Result, earlier_results
from .batches import BatchRunner, Row
from .feature_cache import FeatureCache
from .fingerprints import TOWER
from .plan import PruneKey
from .prompt_encoder import Asked, PromptEncoder, first_accepted
from .refusals import left_out
from .session import Session

Prompts = dict[str, dict[PruneKey, PrunedPrompt]]
"""The prompts of one question: text -> prune key -> prompt."""
TEXTS = "texts"  # name of the folder of embedded questions, beside those of the runs
AHEAD = 32  # batches of questions whose texts are embedded together
MEMORY = 1 << 30  # bytes of pruned prompts that are kept in memory for later groups


def answer_runs(session: Session, runs: Sequence[ActiveRun], docs: set[int] | None = None) -> dict[str, int]:
    """Answer the missing questions of runs in this process.

    Args:
        session: holds the model.
        runs: runs of one model and one task.
        docs: documents to answer; all if None.

    Returns:
        The peak memory of this process, and that of its phases. Questions that were refused say so themselves.

    Raises:
        NotQuantizedError: a run asks for quantization that never reached a matmul.
        RunFailedError: more questions are refused than a run may leave out.
    """
    questions = session.questions(runs[0].spec)
    sweep = Sweep(session, questions, runs, MEMORY)
    mine = [one for one in questions if docs is None or one.place[1] in docs or one is sweep.first]
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
        self._encoders: dict[Any, PromptEncoder] = {}
        with self._naming_unreadable():
            self.first = first_accepted(questions, self.processor)
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
        waiting = list(groups.values())
        while waiting:
            runs = waiting.pop(0)
            missing = [q for q in asked if q.refused is None and any(q.place not in active.have for active in runs)]
            if missing:
                with self.quantized(runs, [active for later in waiting for active in later]) as windows:
                    for _ in windows(missing):
                        pass

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

    @contextlib.contextmanager
    def quantized(
        self, runs: list[ActiveRun], later: list[ActiveRun]
    ) -> Iterator[Callable[[Sequence[Question]], Iterator[None]]]:
        """While the context is open, the model is quantized as the runs of one group ask.

        Args:
            runs: the runs of the group.
            later: the runs of later groups, for which features may be kept.

        Yields:
            A function that answers questions which some run of the group has not answered, and yields after each batch.
        """
        self.clock.active_runs = runs
        group = runs[0].planned.group
        known = {} if runs[0].planned.fresh else earlier_results(self.session.settings.runs, group)
        before = _vision_side(self.family)
        with contextlib.ExitStack() as stack:
            with self.clock.stage("quantize"):
                receipt = stack.enter_context(self.session.quantized(runs[0].planned))
            stack.callback(self._flush, runs, force=True)
            # The group whose vision side an encoder belongs to; None if quantization leaves it alone.
            own = group if _vision_side(self.family) != before or _touches_vision(runs[0].spec) else None
            waiting = [active for active in later if own is None and not _touches_vision(active.spec)]
            if own not in self._encoders:  # that of None serves every group that leaves the vision side alone
                alike = [one for one in self.active_runs if own is None and not _touches_vision(one.spec)]
                self._encoders[own] = self._encoder([*runs, *alike])
            encoder = self._encoders[own]

            def windows(missing: Sequence[Question]) -> Iterator[None]:
                size = self.batch_size
                for at in range(0, len(missing), size):
                    if at % (AHEAD * size) == 0:
                        encoder.expect(missing[at : at + AHEAD * size])
                    self._answer_window(missing[at : at + size], runs, waiting, encoder, receipt, known)
                    yield

            yield windows

    def _encoder(self, runs: Sequence[ActiveRun]) -> PromptEncoder:
        """A prompt encoder that serves the pruning configurations of all these runs."""
        prunings: dict[str, Pruning] = {}
        kept: dict[int, KeptTexts] = {}
        for active in runs:
            key = active.prune_key
            if key is not None and key not in prunings and (pruning := self.session.pruning(active.spec)) is not None:
                prunings[key] = pruning
                tower, content = pruning.reader.tower, active.planned.fingerprints.get(TOWER)
                if tower is not None and content is not None and not active.planned.fresh:
                    kept[id(tower)] = KeptTexts(self.session.settings.runs / TEXTS, content, tower.device.type)
        return PromptEncoder(self.family, self.processor, prunings, self.clock.stage, kept)

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
        encoded = self._encode(window, runs, later, encoder)
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
        self, window: Sequence[Question], runs: list[ActiveRun], later: list[ActiveRun], encoder: PromptEncoder
    ) -> dict[tuple[str, int], Prompts]:
        """For each question that the processor accepts, by its place, the prompts under the keys that need them.

        Prompts that later groups need go into the feature cache.
        """
        found: dict[tuple[str, int], Prompts] = {}
        needing: dict[tuple[str, int], tuple[list[ActiveRun], list[ActiveRun]]] = {}
        asked: list[Asked] = []
        for question in window:
            now = [active for active in runs if question.place not in active.have]
            then = [active for active in later if question.place not in active.have] if question.images else []
            needing[question.place], found[question.place] = (now, then), {}
            for text in dict.fromkeys(instance.args[0] for instance in question.instances):
                prompts = self.feature_cache.get((question.place, text), self.family.model.device)
                found[question.place][text] = prompts
                lacking = dict.fromkeys(active.prune_key for active in (*now, *then) if active.prune_key not in prompts)
                if any(active.prune_key in lacking for active in now):
                    asked.append(Asked(question, text, tuple(lacking)))
        wanting = {id(active): active for one in asked for part in needing[one.question.place] for active in part}
        self.clock.active_runs = list(wanting.values()) or runs
        with self._naming_unreadable():
            made = encoder.encode_each(asked)
        self.clock.active_runs = runs
        for one, prompts_or_error in zip(asked, made, strict=True):
            if isinstance(prompts_or_error, RefusedPictureError):
                if one.question.refused is None:
                    self._leave_out(one.question, prompts_or_error)
                found.pop(one.question.place, None)
            elif one.question.place in found:
                found[one.question.place][one.prompt] |= prompts_or_error
        for place, by_text in found.items():
            then = needing[place][1]
            for text, prompts in by_text.items():
                self.feature_cache.drop((place, text))
                # A prompt that is pruned inside the decoder has no features of its own to keep.
                keys = dict.fromkeys(active.prune_key for active in then)
                kept = {key: prompts[key] for key in keys if key in prompts and prompts[key].inside is None}
                if kept:
                    with self.clock.stage("feature cache", then):
                        self.feature_cache.put((place, text), kept)
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
    roots = [*family.roots("vision"), *family.roots("projector"), family.model.get_input_embeddings()]
    return [(id(tensor), tensor._version) for root in roots for tensor in root.parameters()]
