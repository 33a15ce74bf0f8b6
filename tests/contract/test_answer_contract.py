"""Kept tokens are those of the prompt alone: in scoring, generation and calibration, for every pruner and family."""

from typing import Any

import pytest
import torch

from benchmarks.cost import drops_fit
from qapbench import DecoderPruner, UserError, compress, pruners
from qapbench.models.family import families, family_of
from qapbench.models.relevance import QuestionReader
from qapbench.prune.build import build_pruning
from qapbench.prune.cutting import TYPES
from qapbench.prune.prompt import PruningView
from qapbench.prune.splice import PrunedImage
from qapbench.quantize.calibration import Calibration, CalibrationSamples
from qapbench.receipt import Receipt
from qapbench.spec.run_spec import PruneSpec

KEEP = 4
IN_FRONT = [entry.name for entry in pruners if not issubclass(entry.target, DecoderPruner)]  # type: ignore[arg-type]
READERS = [name for name in IN_FRONT if pruners.create(name).needs & {"text_embeds", "prompt_embeds"}]
each_family = pytest.mark.parametrize("family", sorted({*families.names()} - {"idefics3"}))  # SmolVLM2's code


def made(family: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    return families.create(family).tiny()


def offered(model: Any, names: list[str]) -> list[str]:
    """Those of the pruners that read no field which the model's family does not offer, and drop tokens where it can."""
    fields = family_of(model).available_fields | QuestionReader.FIELDS | DecoderPruner.DECODER_FIELDS
    created = {name: pruners.create(name) for name in names}
    return [
        name
        for name, pruner in created.items()
        if pruner.needs - pruner.optional <= fields and drops_fit(family_of(model), pruner, KEEP)
    ]


def answered(prompt: dict[str, Any], *parts: tuple[bool, list[int]]) -> dict[str, Any]:
    """The prompt with tokens behind it, in parts that have labels or none."""
    more = torch.tensor([[token for _, tokens in parts for token in tokens]])
    known = torch.tensor([[labelled for labelled, tokens in parts for _ in tokens]])
    longer = {**prompt, "input_ids": torch.cat([prompt["input_ids"], more], dim=1)}
    for name, fill in (("attention_mask", 1), *((name, 0) for name in TYPES)):
        if name in prompt:
            longer[name] = torch.cat([prompt[name], torch.full_like(more, fill)], dim=1)
    nothing = torch.full_like(prompt["input_ids"], -100)
    return {**longer, "labels": torch.cat([nothing, more.masked_fill(~known, -100)], dim=1)}


def places(kept: list[list[PrunedImage]]) -> list[list[list[int]]]:
    """Kept tokens of each image of each call."""
    return [[image.indices.tolist() for image in images] for images in kept]


ANSWERS = ([(True, [20, 21, 22])], [(True, [30]), (False, [31, 32]), (True, [33])])


@each_family
def test_scoring_and_generation_keep_what_the_prompt_keeps(family: str) -> None:
    model, prompt = made(family)
    for name in offered(model, pruners.names()):
        kept: list[list[PrunedImage]] = []
        with torch.no_grad(), compress(model, {"prune": {"method": name, "keep": KEEP}}, on_images=kept.append):
            model(**prompt)
            for answer in ANSWERS:
                assert torch.isfinite(model(**answered(prompt, *answer)).loss)
            model.generate(**prompt, max_new_tokens=1, do_sample=False)
        first, *others = places(kept)
        assert others == [first] * (len(ANSWERS) + 1), name


@each_family
def test_calibration_keeps_what_the_prompt_keeps(family: str) -> None:
    model, prompt = made(family)
    for name in offered(model, IN_FRONT):
        views: list[PruningView] = []
        spec = PruneSpec.model_validate({"method": name, "keep": KEEP})
        pruning = build_pruning(families.create(family)(model), spec, Receipt(), on_view=views.append)
        kept = []
        for sample in (prompt, *(answered(prompt, *answer) for answer in ANSWERS)):
            views.clear()
            samples = CalibrationSamples([sample])
            Calibration(model, samples, pruning.family, pruning.shorten).observe({}, lambda linear: None)  # type: ignore[arg-type,return-value]
            kept.append([view.kept.tolist() for view in views])
        assert kept[0], name
        assert kept[1:] == kept[:1] * len(ANSWERS), name


@pytest.mark.parametrize("name", READERS)
def test_a_prompt_of_answers_alone_is_refused(name: str) -> None:
    model, prompt = made("llava")
    refused = pytest.raises(UserError, match=r"the prompt has none: leave the question's `labels` at -100")
    with torch.no_grad(), compress(model, {"prune": {"method": name, "keep": KEEP}}), refused:
        model(**prompt, labels=prompt["input_ids"])
    with torch.no_grad(), compress(model, {"prune": {"method": name, "keep": 16}}):
        assert torch.isfinite(model(**prompt, labels=prompt["input_ids"]).loss)


@each_family
def test_an_earlier_answer_is_part_of_a_later_images_prompt(family: str) -> None:
    """Two images, the first one's answer between them: it is read for the second image, and not for the first."""
    model, prompt = made(family)
    inputs = families.create(family).image_inputs
    along = {"pixel_values": -1} if family == "minicpmv4_6" else {}  # which has patches of all images in one row
    images = {key: torch.cat([value] * 2, along.get(key, 0)) for key, value in prompt.items() if key in inputs}
    base = {key: value for key, value in prompt.items() if key not in inputs}
    for name in READERS:
        kept: list[list[PrunedImage]] = []
        with torch.no_grad(), compress(model, {"prune": {"method": name, "keep": KEEP}}, on_images=kept.append):
            for first, second in (([9], [12]), ([40, 41], [12]), ([40, 41], [50])):
                turn = answered(base, (True, first))
                ids = torch.cat([turn["input_ids"], prompt["input_ids"], torch.tensor([second])], dim=1)
                labels = torch.cat([turn["labels"], torch.full_like(prompt["input_ids"], -100)], dim=1)
                labels = torch.cat([labels, torch.tensor([second])], dim=1)
                types = {name: (ids == 3).long() for name in TYPES if name in prompt}
                model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **types, **images)
        one, two, three = places(kept)
        assert one[0] == two[0] == three[0], name
        assert two[1] == three[1], name
