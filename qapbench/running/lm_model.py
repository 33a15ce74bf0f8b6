"""qapbench as a model of lm-eval. `python -m qapbench.lm_eval` makes lm-eval know it by its name."""

from __future__ import annotations

import dataclasses

from lm_eval.api.instance import Instance

from qapbench.tasking.lm import MARK, AskingLM
from qapbench.tasking.text import quoted

from .live import LiveModel, live_settings, one_spec
from .settings import BATCH


class QapbenchLM(AskingLM):
    """A model that is quantized and pruned as a spec says.

    Runs write prompts with the chat template of the model; lm-eval does so if it is told to (`--apply_chat_template`).

    Args:
        pretrained: name of an embedded model, a checkpoint folder, or a hub id; None takes that of the spec.
        spec: a spec file, or the name of a shipped one; None compresses nothing.
        run: name of a run of the spec, needed if there are several.
        batch_size: number of questions answered together. No answer depends on it.
        device: "cpu", "cuda" or another torch device; if None, a GPU if there is one.
        runs: folder in which results of calibration are kept.
        trust_remote_code: let a checkpoint run its own Python code.
        max_batch_size: given by lm-eval, and not used.

    Raises:
        UserError: the model or the spec are wrong.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        spec: str | None = None,
        run: str | None = None,
        batch_size: int | str = BATCH,
        device: str | None = None,
        runs: str = "runs",
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        settings = live_settings(batch_size, device, runs, trust_remote_code)
        one = one_spec(spec, pretrained, run)
        self.live = LiveModel(one, settings)
        super().__init__(self.live.processor, one.model)
        self._applied = False

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as a prompt, by the processor's template. Images become its image items."""
        self._applied = True
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def as_prompt(self, context: str) -> str:
        """A context of lm-eval's as a prompt. If no chat template was applied, its marks become placeholders."""
        if self._applied:
            return context
        return str(self.processor.image_token).join(quoted(context.split(MARK), self.special))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The (log-likelihood, is most likely) of each continuation."""
        return [tuple(output) for output in self.live.answer(self._asked(requests))]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that is generated for each request."""
        return self.live.answer(self._asked(requests))

    def _asked(self, requests: list[Instance]) -> list[Instance]:
        """The requests with prompts for this model, each an object of its own, also where one is asked repeatedly."""
        made = []
        for request in requests:
            prompt, asked, *rest = request.args
            visual = (rest[0].get("visual") if rest else None) or []
            pictures = {"visual": visual if isinstance(visual, list) else [visual]}
            made.append(dataclasses.replace(request, arguments=(self.as_prompt(prompt), asked, pictures), resps=[]))
        return made
