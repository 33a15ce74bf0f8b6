"""Our model as lm-eval sees it: prompts in, letters or text out, every answer stored as it is made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from PIL import Image
from torch import Tensor

from qapbench.errors import UserError
from qapbench.receipt import Receipt

from .store import Answer, Store

TAIL = 32  # characters of a prompt that decide how the next token is spelled
MARK = "<image>"  # lm-eval's own, whatever the model's placeholder is
Progress = Callable[[int, int], None]


@dataclass
class Question:
    """All requests that lm-eval makes of one document."""

    instances: list[Instance] = field(default_factory=list)

    @property
    def first(self) -> Instance:
        return self.instances[0]

    @property
    def prompt(self) -> str:
        return self.first.args[0]

    @property
    def images(self) -> list[Any]:
        return self.first.args[2]["visual"] if len(self.first.args) > 2 else []

    def answer(self, outputs: list[Any]) -> str:
        """The text that was generated, or the continuation that is most likely."""
        if self.first.request_type == "generate_until":
            return outputs[0]
        best = max(range(len(outputs)), key=lambda index: outputs[index][0])
        return self.instances[best].args[1].strip()

    @property
    def order(self) -> tuple[Any, ...]:
        """Images first, long prompts first: memory peaks at the start and padding stays small."""
        return (-len(self.images), -len(self.prompt), self.first.task_name, self.first.doc_id)


Solved = tuple[list[Any], list[dict[str, Any]]]
"""The outputs of one question's requests, and what was seen of each of its images."""
Solve = Callable[[list[Question]], list[Solved]]


class CompressedLM(LM):
    """An lm-eval model around a loaded, compressed Hugging Face model.

    Args:
        store: where answers go; those already there are not made again.
        shared: answers of text-only questions, common to all runs that differ in pruning alone.
        shared_key: what they depend on besides the question.
    """

    MULTIMODAL = True

    def __init__(
        self, model: Any, processor: Any, receipt: Receipt, store: Store, batch_size: int,
        seed: int = 0, progress: Progress | None = None, shared: dict[Hashable, Answer] | None = None,
        shared_key: Hashable = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.processor = processor
        self.receipt = receipt
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.progress = progress or (lambda done, total: None)
        self.shared = {} if shared is None else shared
        self.shared_key = shared_key
        self.answered = 0  # questions of this session, shared answers among them
        self.computed = 0  # those that the model really answered
        self.image_token: int = model.config.image_token_id
        self._tokens_per_image = 0
        self._spelled: dict[tuple[str, str], list[int]] = {}

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The processor's own template; images go in as its image items."""
        messages = [{"role": turn["role"], "content": self._content(turn["content"])} for turn in chat_history]
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    def _content(self, text: str) -> list[dict[str, str]]:
        """lm-eval marks each image by `<image>` where it stands in the text."""
        items: list[dict[str, str]] = []
        for index, part in enumerate(text.split(MARK)):
            items += [{"type": "image"}] if index else []
            part = part.removeprefix("\n") if index else part
            items += [{"type": "text", "text": part}] if part else []
        return items

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation. One prefill answers all one-token continuations of a question."""
        return self._answer(requests, self._score)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Decoded continuations, cut at the task's stop strings."""
        return self._answer(requests, self._generate)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise UserError("task: perplexity tasks (loglikelihood_rolling) are not supported")

    # -- plan, resume, store --

    def _answer(self, requests: list[Instance], solve: Solve) -> list[Any]:
        """Answer every request, batch by batch in a fixed order, taking up where the store ends."""
        grouped: dict[tuple[Any, Any], Question] = {}
        for request in requests:
            grouped.setdefault((request.task_name, request.doc_id), Question()).instances.append(request)
        batches = list(_batches(sorted(grouped.values(), key=lambda q: q.order), self.batch_size))
        total = len(grouped)
        done, answers = self._resume(batches)
        self.progress(len(answers), total)
        for batch in batches[done:]:
            fresh = self._batch(batch, solve)
            self.store.append(fresh)
            answers += fresh
            self.answered += len(fresh)
            self.progress(len(answers), total)
        outputs: dict[int, Any] = {}
        for question, answer in zip(itertools.chain.from_iterable(batches), answers, strict=True):
            for instance, output in zip(question.instances, answer["outputs"], strict=True):
                outputs[id(instance)] = output
        return [tuple(outputs[id(r)]) if isinstance(outputs[id(r)], list) else outputs[id(r)] for r in requests]

    def _resume(self, batches: list[list[Question]]) -> tuple[int, list[Answer]]:
        """How many batches the store holds, and their answers; it is cut behind them.

        The last whole one is made again: every session then has a receipt of its own.
        """
        stored = self.store.read()
        ends = list(itertools.accumulate(map(len, batches)))
        whole = max(sum(1 for end in ends if end <= len(stored)) - 1, 0)
        kept = ends[whole - 1] if whole else 0
        planned = [(q.first.task_name, q.first.doc_id) for batch in batches[:whole] for q in batch]
        if [(answer.get("task"), answer.get("doc")) for answer in stored[:kept]] != planned:
            raise UserError(
                f"{self.store.path} does not hold the answers that this run would write; --fresh sets it aside"
            )
        self.store.keep(kept)
        return whole, stored[:kept]

    def _batch(self, batch: list[Question], solve: Solve) -> list[Answer]:
        keys = [(self.shared_key, q.first.task_name, q.first.doc_id) for q in batch]
        if not batch[0].images and all(key in self.shared for key in keys):
            return [self.shared[key] for key in keys]
        first = not self.computed
        answers = []
        for question, (outputs, images) in zip(batch, solve(batch), strict=True):
            doc = question.first.doc
            answer = {
                "task": question.first.task_name, "doc": question.first.doc_id,
                "id": str(doc.get("pid", question.first.doc_id)), "answer": question.answer(outputs),
                "outputs": outputs,
            }  # fmt: skip
            answers.append({**answer, "images": images} if images else answer)
        self.computed += len(batch)
        if first:
            self.receipt.check()  # a run that is not what its spec says ends here, not after hours
        if not batch[0].images:
            self.shared.update(zip(keys, answers, strict=True))
        return answers

    def _seen(self, batch: list[Question]) -> list[list[dict[str, Any]]]:
        """For each question, of each image: the visual tokens that the latest call gave the language model."""
        if self.receipt.latest is None:
            return [[{"available": self._tokens_per_image} for _ in question.images] for question in batch]
        images = iter(self.receipt.latest)
        return [[next(images).to_json() for _ in question.images] for question in batch]

    # -- the model --

    def _inputs(self, batch: list[Question], prompts: list[str]) -> dict[str, Any]:
        images = [_decoded(image) for question in batch for image in question.images]
        # Without an image to stand for, the placeholder's spelling is the question's own text.
        mark = self.processor.image_token
        texts = [p if q.images else p.replace(mark, f"< {mark[1:]}") for p, q in zip(prompts, batch, strict=True)]
        inputs = self.processor(text=texts, images=images or None, return_tensors="pt", padding=True)
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        self.receipt.latest = None
        if images:
            self._tokens_per_image = int((inputs["input_ids"] == self.image_token).sum()) // len(images)
        if images and self.receipt.pruning:
            inputs["relevance_text"] = [self._relevance_text(q) for q in batch for _ in q.images]
        return inputs

    def _relevance_text(self, question: Question) -> str:
        """What the pruner compares the image with: the task's own wording of it, else the whole prompt."""
        return question.first.doc.get("relevance_text") or question.prompt

    @torch.inference_mode()
    def _score(self, batch: list[Question]) -> list[Solved]:
        """For each question [log-likelihood, is greedy] per continuation."""
        spelled = [[self._spell(i.args[0], i.args[1]) for i in q.instances] for q in batch]
        one_prefill = all(len(ids) == 1 for question in spelled for ids in question)
        if not one_prefill or any(i.args[0] != q.prompt for q in batch for i in q.instances):
            return [self._score_each(question, ids) for question, ids in zip(batch, spelled, strict=True)]
        logits = self.model(**self._inputs(batch, [q.prompt for q in batch]), logits_to_keep=1).logits
        scores = logits[:, -1].float().log_softmax(dim=-1)
        outputs = [[_scored(row.unsqueeze(0), ids) for ids in q] for row, q in zip(scores, spelled, strict=True)]
        return list(zip(outputs, self._seen(batch), strict=True))

    def _score_each(self, question: Question, spelled: list[list[int]]) -> Solved:
        """Continuations of several tokens, or behind prompts of their own: one forward pass each."""
        outputs = []
        for instance, ids in zip(question.instances, spelled, strict=True):
            inputs = self._inputs([question], [instance.args[0]])
            extra = torch.tensor([ids], device=inputs["input_ids"].device)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], dim=1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(extra)], dim=1)
            logits = self.model(**inputs, logits_to_keep=len(ids) + 1).logits
            outputs.append(_scored(logits[0, :-1].float().log_softmax(dim=-1), ids))
        return outputs, self._seen([question])[0]

    def _spell(self, prompt: str, continuation: str) -> list[int]:
        """Token ids of a continuation behind a prompt; a space joins them where neither side has one."""
        glue = "" if prompt[-1:].isspace() or continuation[:1].isspace() else " "
        tail = prompt[-TAIL:]
        key = (tail, glue + continuation)
        if key not in self._spelled:
            tokenize = self.processor.tokenizer
            before = tokenize(tail, add_special_tokens=False).input_ids
            after = tokenize(tail + glue + continuation, add_special_tokens=False).input_ids
            if after[: len(before)] != before or len(after) == len(before):
                raise UserError(
                    f"task: the tokenizer merges {continuation!r} with the end of the prompt, so letters cannot be "
                    "scored; use `answers: generate`"
                )
            self._spelled[key] = after[len(before) :]
        return self._spelled[key]

    @torch.inference_mode()
    def _generate(self, batch: list[Question]) -> list[Solved]:
        """For each question [text]: greedy, unless the task samples; then seeded by the batch, not by its order."""
        options = dict(batch[0].first.args[1])
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        length = options.pop("max_gen_toks", None) or options.pop("max_new_tokens", 256)
        if options.get("do_sample"):
            torch.manual_seed(self.seed + batch[0].first.doc_id)
        else:
            options = {"do_sample": False, "num_beams": options.get("num_beams", 1)}
        inputs = self._inputs(batch, [q.prompt for q in batch])
        out = self.model.generate(**inputs, max_new_tokens=length, **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [([_until(text, until)], images) for text, images in zip(texts, self._seen(batch), strict=True)]


def _batches(questions: Iterable[Question], size: int) -> Iterable[list[Question]]:
    """Batches of one kind: text-only questions never share one with images, so pruning cannot touch them."""
    for _, group in itertools.groupby(questions, key=lambda q: (q.first.request_type, len(q.images))):
        members = list(group)
        yield from (members[at : at + size] for at in range(0, len(members), size))


def _decoded(image: Any) -> Image.Image:
    """A picture in RGB, from PIL or from a lazy handle with `load()`."""
    return (image if isinstance(image, Image.Image) else image.load()).convert("RGB")


def _scored(logprobs: Tensor, ids: list[int]) -> list[Any]:
    """[sum of log-probabilities, whether each is the most likely] of ids under logprobs [len(ids), V]."""
    chosen = torch.tensor(ids, device=logprobs.device)
    total = logprobs.gather(1, chosen.unsqueeze(1)).sum()
    return [float(total), bool((logprobs.argmax(dim=-1) == chosen).all())]


def _until(text: str, stops: list[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
