"""Runs forward passes: rows of equal length are batched, and no bit of a row depends on the other rows of its batch."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qapbench.models import Family, row_products
from qapbench.models.row_products import row_by_row
from qapbench.prune.cutting import TYPES
from qapbench.prune.generation import limit_on_length
from qapbench.prune.prompt import PrunedPrompt
from qapbench.tasking.questions import ContinuationTokenizer, Question

from .active_run import Result

REPEATS = 1 << 24  # step between the seeds of several samples of one answer; the generator reads 32 bits of a seed


@dataclass(frozen=True)
class Row:
    """One row of a forward pass.

    Attributes:
        prompt: the prompt with its images' features.
        options: options of generation as JSON; None if continuations are scored.
        tail: a continuation of several tokens, which follows the prompt.
        spelled: if there is no tail, the one-token continuations that are scored after the prompt.
        seed: seed of sampling; None if nothing is sampled.
    """

    prompt: PrunedPrompt
    options: str | None = None
    tail: tuple[int, ...] = ()
    spelled: tuple[int, ...] = ()
    seed: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens: the prompt and the tail."""
        return self.prompt.inputs["input_ids"].shape[1] + len(self.tail)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What rows must have in common to be batched without padding."""
        return self.length, len(self.tail), bool(self.prompt.features), self.options or "", self.alone

    @property
    def alone(self) -> bool:
        """Whether the row needs a batch of its own: it is sampled, or pruned inside the decoder."""
        return self.seed is not None or self.prompt.inside is not None


class BatchRunner:
    """Answers rows with a loaded, possibly quantized model.

    Args:
        family: the model.
        processor: the model's processor.
        batch_size: size of a forward pass in unpruned prompts: it holds no more tokens than that many of them. When
            continuations are scored on a CPU, it also holds no more tokens than leave the widest activation in the
            cache.
        seed: base of the seeds of sampling, to which the document's number is added, and for each further answer to the
            same question REPEATS.
    """

    def __init__(self, family: Family, processor: Any, batch_size: int = 1, seed: int = 0) -> None:
        self.family = family
        self.model = family.model
        self.tokenizer = processor.tokenizer
        self.continuations = ContinuationTokenizer(processor)
        self.batch_size = batch_size
        self.seed = seed
        width = getattr(self.model.config.get_text_config(), "intermediate_size", None)
        self.cached = row_products.CACHED // width if width and self.model.device.type == "cpu" else sys.maxsize

    def rows(self, question: Question, prompts: dict[str, PrunedPrompt]) -> list[Row]:
        """The rows that answer one question.

        Args:
            question: the question.
            prompts: text of a request -> its encoded prompt.
        """
        first = prompts[question.prompt]
        if question.generates:
            options = json.dumps(question.first.args[1], sort_keys=True)
            sampled = bool(question.first.args[1].get("do_sample"))
            seeds = [self.seed + question.first.doc_id + REPEATS * index for index in range(len(question.instances))]
            return [Row(first, options, seed=seed if sampled else None) for seed in seeds]
        spelled = [tuple(self.continuations.spell(*i.args[:2])) for i in question.instances]
        if len(prompts) == 1 and all(len(ids) == 1 for ids in spelled):
            return [Row(first, spelled=tuple(ids[0] for ids in spelled))]
        return [
            Row(prompts[instance.args[0]], tail=ids) for instance, ids in zip(question.instances, spelled, strict=True)
        ]

    @torch.no_grad()  # not inference_mode, whose tensors have no version to tell a shared input that was changed
    def results(self, rows: Sequence[Row], longest: int) -> list[Result]:
        """Run the rows.

        Args:
            rows: the rows.
            longest: number of tokens of the longest unpruned prompt among the questions being answered.

        Returns:
            For each row its outputs and the token counts of its images. The outputs are [text] if it generates,
                otherwise [log-likelihood, is most likely] for each of its continuations.
        """
        found: list[Result] = [([], [])] * len(rows)
        kinds = [(*row.kind, self._shortest(row)) for row in rows]
        order = sorted(range(len(rows)), key=kinds.__getitem__)
        batches: list[list[int]] = []
        for kind, group in itertools.groupby(order, key=kinds.__getitem__):
            members = list(group)
            apart = self.family.one_by_one or rows[members[0]].alone
            size = 1 if apart else max(1, self._room(rows[members[0]], longest) // kind[0])
            batches += [members[at : at + size] for at in range(0, len(members), size)]
        most = max((len(batch) * _beams(rows[batch[0]]) for batch in batches), default=1)
        with separately(self.model, self.family, most):
            for batch in batches:
                for index, result in zip(batch, self._results([rows[index] for index in batch]), strict=True):
                    found[index] = result
        return found

    def _shortest(self, row: Row) -> int:
        """The `min_length` under which a row generates at least as many tokens as without pruning; 0 if there is none.

        The checkpoint's generation config or the task sets it, and it counts the tokens of the whole prompt.
        """
        if row.options is None:
            return 0
        limit = limit_on_length(self.model, _options(row), "min_length", "min_new_tokens")
        return max(limit - row.prompt.removed, 0) if limit else 0

    def _room(self, row: Row, longest: int) -> int:
        """Largest number of tokens of a forward pass with rows of this kind.

        The cache limits only scoring: decoding reads every weight for each token, so every further row pays.
        """
        room = self.batch_size * longest
        return room if row.options is not None else min(room, self.cached)

    def _results(self, rows: list[Row]) -> list[Result]:
        if (inside := rows[0].prompt.inside) is not None:
            with inside() as images:
                return [(outputs, [image.stored() for image in images()]) for outputs in self._run(rows)]
        return [(outputs, row.prompt.images) for row, outputs in zip(rows, self._run(rows), strict=True)]

    def _run(self, rows: list[Row]) -> list[list[Any]]:
        inputs = _stacked([_with_tail(row) for row in rows])
        features = [feature for row in rows for feature in row.prompt.features]
        if features:
            inputs |= self.family.encoded(features)
        if rows[0].options is not None:
            return self._generate(rows, inputs)
        count = len(rows[0].tail)
        logits = self.model(**inputs, logits_to_keep=count + 1).logits
        logits = logits[:, -count - 1 :]  # some models give those of the whole prompt all the same
        if count:
            return [[_scored(at[:-1].float().log_softmax(-1), row.tail)] for row, at in zip(rows, logits, strict=True)]
        scores = [at[-1:].float().log_softmax(dim=-1) for at in logits]
        return [[_scored(at, (token,)) for token in row.spelled] for row, at in zip(rows, scores, strict=True)]

    def _generate(self, rows: list[Row], inputs: dict[str, Any]) -> list[list[Any]]:
        """Generate text: greedily, unless the task asks for sampling."""
        options = _options(rows[0])
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        length = options.pop("max_gen_toks", None) or options.pop("max_new_tokens", 256)
        if rows[0].seed is not None:
            torch.manual_seed(rows[0].seed)
        else:
            options = {"do_sample": False, "num_beams": options.get("num_beams", 1)}
        if shortest := self._shortest(rows[0]):
            options["min_length"] = shortest
        out = self.model.generate(**inputs, max_new_tokens=length, **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [[_until(text, until)] for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


@contextlib.contextmanager
def separately(model: Any, family: Family, rows: int) -> Iterator[None]:
    """While the context is open, the language model computes row by row; tower and projector are left alone.

    Args:
        model: the model.
        family: its family.
        rows: number of rows in the language model's largest batch, beams counted.
    """
    roots = [root for name in ("vision", "projector") for root in family.roots(name)]
    apart = {id(module) for root in roots for module in root.modules()}
    with row_by_row((module for module in model.modules() if id(module) not in apart), rows):
        yield


def _options(row: Row) -> dict[str, Any]:
    """The options of generation that a task gives."""
    return json.loads(row.options or "{}")


def _beams(row: Row) -> int:
    """Number of rows of the language model's batch that one row becomes."""
    return int(_options(row).get("num_beams") or 1)


def _with_tail(row: Row) -> dict[str, Any]:
    """The row's inputs, with its tail after the prompt."""
    inputs = dict(row.prompt.inputs)
    if row.tail:
        tail = torch.tensor([row.tail], device=inputs["input_ids"].device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tail)], dim=1)
        for name in set(TYPES) & inputs.keys():
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(tail)], dim=1)
        if "position_ids" in inputs:
            positions = inputs["position_ids"]
            steps = torch.arange(1, len(row.tail) + 1, device=tail.device)
            inputs["position_ids"] = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
    return inputs


def _stacked(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch from inputs that have one row each."""
    if len(inputs) == 1:
        return dict(inputs[0])
    # Positions may have further axes in front of the batch: [..., B, L].
    return {name: torch.cat([i[name] for i in inputs], dim=-2 if name == "position_ids" else 0) for name in inputs[0]}


def _scored(logprobs: Tensor, ids: tuple[int, ...]) -> list[Any]:
    """[sum of log-probabilities, whether each is the most likely] of a continuation.

    Args:
        logprobs: [len(ids), V] log-probabilities at its places.
        ids: its tokens.
    """
    chosen = torch.tensor(ids, device=logprobs.device)
    total = logprobs.gather(1, chosen.unsqueeze(1)).sum()
    return [float(total), bool((logprobs.argmax(dim=-1) == chosen).all())]


def _until(text: str, stops: list[str]) -> str:
    """The text up to the first of the stop strings, stripped."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
