"""Pruning inside the decoder against the layers called by hand, one question at a time, without a cache."""

from typing import Any

import numpy as np
import pytest
import torch
from llava_checkpoints import THREE, TOKENS, batch_of, picture, save_llava
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from qapbench import DecoderPruner, UserError, VisionTokens, compress, metrics, pruners
from qapbench.models.family import family_of
from qapbench.prune.build import build_pruning
from qapbench.prune.prompt import PruningView
from qapbench.prune.splice import PrunedImage
from qapbench.receipt import Receipt
from qapbench.spec.run_spec import PruneSpec

INSIDE = [entry.name for entry in pruners if issubclass(entry.target, DecoderPruner)]  # type: ignore[arg-type]
KEEP, STEPS, LAYERS = 5, 4, 8
each_method = pytest.mark.parametrize("method", INSIDE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Any, Any]:
    """A LLaVA whose decoder has eight layers, and its processor."""
    folder = save_llava(tmp_path_factory.mktemp("deep"), layers=LAYERS)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    return model, AutoProcessor.from_pretrained(folder)


def spec(method: str, keep: int = KEEP, **more: Any) -> dict[str, Any]:
    return {"prune": {"method": method, "keep": keep, **more}}


@torch.no_grad()
def by_hand(model: Any, method: str, inputs: dict[str, Any], sensitivity: str | None) -> tuple[Tensor, list[int]]:
    """Logits of one unpadded question's last token, and the visual tokens each layer saw.

    Every layer is called on what is left, and Hugging Face's eager attention gives its whole map.
    """
    language, pruner = model.model.language_model, pruners.create(method)
    ids, image_id = inputs["input_ids"], model.config.image_token_id
    hidden = model.get_input_embeddings()(ids)
    visual = ids[0] == image_id
    seen = []
    if visual.any():
        hidden[0, visual] = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    end = inputs.get("asked", ids.shape[1])
    if pruner.front is not None and visual.any():
        view = family_of(model).encode_images(inputs, pruner.front.needs).single
        score = metrics.create(sensitivity)(view.projected) if sensitivity else None
        chosen = pruner.front.select(view, pruner.entering(view.count, KEEP), score)
        kept = visual.nonzero()[chosen.indices[0], 0]
        hidden[0, kept] = hidden[0, kept] if chosen.updated is None else chosen.updated[0]
        stays = ~visual
        stays[kept] = True
        hidden, visual, end = hidden[:, stays], visual[stays], end - int((~stays).sum())
    embedded = hidden[:, visual]
    positions = torch.arange(len(visual))
    behind = int(visual.nonzero().max()) + 1 if visual.any() else 0
    words = hidden[:, behind:end]
    stages = {s.after: s.keep for s in pruner.stages(int(visual.sum()), KEEP, LAYERS)} if visual.any() else {}
    maps: list[Tensor] = []

    def attend(index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = torch.full((len(positions), len(positions)), torch.finfo(torch.float32).min).triu(1)[None, None]
        layer, rotary = language.layers[index], language.rotary_emb(hidden, position_ids=positions[None])
        handle = layer.self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        past = DynamicCache(config=language.config)
        out = layer(
            hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions[None], past_key_values=past
        )
        handle.remove()
        return out, maps[-1].mean(dim=1)[0], past.layers[index].keys.transpose(1, 2).flatten(2)

    row, keys = torch.empty(0), torch.empty(0)
    for index in range(LAYERS):
        if index in stages:
            if pruner.ahead:
                _, row, keys = attend(index, hidden, positions)
            places = visual.nonzero()[:, 0]
            last = int((positions == end - 1).nonzero()[0])
            text = torch.arange(last - words.shape[1] + 1, last + 1)
            tokens = VisionTokens(
                projected=hidden[:, places],
                query_attention=row[last, places][None],
                text_attention=row[text][:, places].T[None],
                context_attention=context(language.layers[index], hidden[:, : places[-1] + 1])[:, places],
                rotated_keys=keys[:, places],
                text_keys=keys[:, text],
                final_states=language.norm(hidden[:, places]),
                text_states=language.norm(hidden[:, text]),
                prompt_embeds=words,
                embedded=embedded,
            )
            stays = torch.ones(len(positions), dtype=torch.bool)
            stays[places] = False
            if stages[index]:
                score = metrics.create(sensitivity)(tokens.projected) if sensitivity else None
                chosen = pruner.select(tokens, stages[index], score)
                if chosen.updated is not None:
                    hidden[0, places[chosen.indices[0]]] = chosen.updated[0]
                stays[places[chosen.indices[0]]] = True
            hidden, positions, visual = hidden[:, stays], positions[stays], visual[stays]
        seen.append(int(visual.sum()))
        hidden, row, keys = attend(index, hidden, positions)
    return model.lm_head(language.norm(hidden))[0, -1], seen


def context(layer: Any, hidden: Tensor) -> Tensor:
    """Attention [1, S] of the mean query of all places, without rotation or mask."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden[0])
    query, key = (proj(normed).unflatten(-1, (-1, attention.head_dim)) for proj in (attention.q_proj, attention.k_proj))
    mean, key = query.mean(dim=0), key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.stack([key[:, head] @ mean[head] for head in range(len(mean))]) / attention.head_dim**0.5
    return logits.softmax(dim=-1).mean(dim=0, keepdim=True)


def indices(kept: list[list[PrunedImage]]) -> list[int]:
    """What the last call kept of its image."""
    return kept[-1][0].indices.tolist()


def alone(processor: Any, row: int) -> dict[str, Any]:
    return batch_of(processor, [THREE[row]], {0: [picture(1)], 1: [], 2: [picture(2)]}[row])


def written_by_hand(
    model: Any, method: str, inputs: dict[str, Any], sensitivity: str | None
) -> tuple[list[int], Tensor]:
    """Greedy tokens and their logits, the whole sequence anew for each; what was chosen hangs on the question alone."""
    inputs = {**inputs, "asked": inputs["input_ids"].shape[1]}
    written, logits = [], []
    for _ in range(STEPS):
        last, _ = by_hand(model, method, inputs, sensitivity)
        written.append(int(last.argmax()))
        logits.append(last)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], last.argmax()[None, None]], dim=1)
    return written, torch.stack(logits)


@each_method
@pytest.mark.parametrize("sensitivity, attention", [(None, "sdpa"), ("combined", "eager")])
def test_a_padded_batch_decodes_as_each_row_by_hand(
    method: str, sensitivity: str | None, attention: str, deep: tuple[Any, Any]
) -> None:
    """Left padding, a row without an image, several tokens behind the prompt: logits of every step."""
    model, processor = deep
    inputs = batch_of(processor, THREE, [picture(1), picture(2)])
    expected = [written_by_hand(model, method, alone(processor, row), sensitivity) for row in range(3)]
    model.set_attn_implementation(attention)
    try:
        with torch.no_grad(), compress(model, spec(method, sensitivity=sensitivity)) as receipt:
            out = model.generate(
                **inputs,
                max_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        model.set_attn_implementation("eager")
    for row, (written, logits) in enumerate(expected):
        assert out.sequences[row, -STEPS:].tolist() == written
        torch.testing.assert_close(torch.stack([step[row] for step in out.logits]), logits, rtol=1e-4, atol=1e-4)
    _, seen = by_hand(model, method, alone(processor, 0), sensitivity)
    assert receipt.layers == [2 * count for count in seen]
    assert seen[0] == pruners.create(method).entering(TOKENS, KEEP)
    assert (seen[-1] if pruners.create(method).counts == "last" else np.mean(seen)) == KEEP
    assert receipt.tokens["layer_mean"] == np.mean(seen)
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0]


@each_method
def test_a_row_beside_a_longer_one_that_loses_nothing(method: str, deep: tuple[Any, Any]) -> None:
    """The longest row keeps its length, and the others their places behind other padding than the prompt's."""
    model, processor = deep
    longer = "USER: Where does the red fox live, and what does it eat when the days are short? " * 3
    inputs = batch_of(processor, [THREE[0], longer], [picture(1)])
    assert not (inputs["input_ids"][1] == model.config.image_token_id).any() and inputs["attention_mask"][1].all()
    assert not inputs["attention_mask"][0].all()
    with torch.no_grad(), compress(model, spec(method)):
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits, by_hand(model, method, alone(processor, 0), None)[0], rtol=1e-4, atol=1e-4)


@each_method
def test_right_padding_equals_left(method: str, deep: tuple[Any, Any]) -> None:
    model, processor = deep
    left = batch_of(processor, THREE, [picture(1), picture(2)])
    mask = left["attention_mask"]
    rolled = torch.stack([row.roll(int(m.sum())) for row, m in zip(left["input_ids"], mask, strict=True)])
    right = {**left, "input_ids": rolled, "attention_mask": mask.flip(-1)}
    with torch.no_grad(), compress(model, spec(method)):
        one, other = model(**left).logits, model(**right).logits
    gone = TOKENS - pruners.create(method).entering(TOKENS, KEEP)  # in front of the decoder, of each image
    images = (left["input_ids"] == model.config.image_token_id).any(dim=1)
    for row, length in enumerate(mask.sum(dim=1) - gone * images):
        torch.testing.assert_close(other[row, length - 1], one[row, -1], rtol=1e-4, atol=1e-4)


@each_method
def test_beams_sampling_and_no_cache(method: str, deep: tuple[Any, Any]) -> None:
    model, processor = deep
    inputs = batch_of(processor, THREE, [picture(1), picture(2)])
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), compress(model, spec(method)):
        together = model.generate(**inputs, **options, num_beams=3)
        for row in range(3):
            single = model.generate(**alone(processor, row), **options, num_beams=3)
            assert torch.equal(together[row, -STEPS:], single[0, -STEPS:])
        cached, bare = model(**inputs, use_cache=True).logits, model(**inputs, use_cache=False).logits
        assert torch.equal(cached, bare)
        with pytest.raises(UserError, match="need a dynamic KV cache"):
            model.generate(**inputs, **options, cache_implementation="static")


@each_method
def test_two_prompts_and_their_caches_in_turn(method: str, deep: tuple[Any, Any]) -> None:
    """What a cache holds hangs on the cache, not on which prompt came last; text-only prompts are let alone."""
    model, processor = deep
    first, second = alone(processor, 0), alone(processor, 2)
    text, pruner = alone(processor, 1), pruners.create(method)
    word = torch.tensor([[7]])
    with torch.no_grad():
        plain = model(**text).logits
        with compress(model, spec(method)):

            def follow(prompt: dict[str, Any], past: Any) -> Tensor:
                mask = torch.ones(1, prompt["input_ids"].shape[1] + 1, dtype=torch.long)
                place = {"position_ids": mask.sum(dim=1, keepdim=True) - 1} if pruner.front is None else {}
                return model(input_ids=word, past_key_values=past, attention_mask=mask, **place).logits

            wanted = [follow(prompt, model(**prompt).past_key_values) for prompt in (first, second)]
            pasts = [model(**prompt).past_key_values for prompt in (first, second)]
            assert torch.equal(model(**text).logits, plain)
            assert torch.equal(follow(first, pasts[0]), wanted[0])
            assert torch.equal(follow(second, pasts[1]), wanted[1])


@each_method
def test_words_behind_a_cache_are_read_as_in_one_pass(method: str, deep: tuple[Any, Any]) -> None:
    """With a mask over the caller's prompt and without; in one pass the words are an answer, which no pruner reads."""
    model, processor = deep
    prompt, words = alone(processor, 0), torch.tensor([[7, 9]])
    ids = torch.cat([prompt["input_ids"], words], dim=1)
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), words], dim=1)
    with torch.no_grad(), compress(model, spec(method)):
        whole = model(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels)
        for mask in ({"attention_mask": torch.ones_like(ids)}, {}):
            past = model(**prompt).past_key_values
            behind = model(input_ids=words, past_key_values=past, **mask)
            torch.testing.assert_close(behind.logits[0], whole.logits[0, -2:], rtol=1e-4, atol=1e-4)


def test_labels_end_the_question(deep: tuple[Any, Any]) -> None:
    """An answer that is scored has no say in what is kept."""
    model, processor = deep
    prompt = alone(processor, 0)
    kept: list[list[PrunedImage]] = []
    with torch.no_grad(), compress(model, spec("fastv"), on_images=kept.append):
        model(**prompt)
        for word in (5, 9):
            ids = torch.cat([prompt["input_ids"], torch.tensor([[word]])], dim=1)
            labels = torch.full_like(ids, -100)
            labels[0, -1] = word
            out = model(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels)
            assert torch.isfinite(out.loss)
            assert out.logits.shape[1] == ids.shape[1]
    first, second, third = ([image.indices.tolist() for image in images] for images in kept)
    assert first == second == third
    assert [len(places) for places in first] == [KEEP]


def test_quantized_layers_are_read_as_they_compute(deep: tuple[Any, Any]) -> None:
    """Attention comes from the quantized projections: at few bits it leads to other tokens."""
    model, processor = deep
    prompt = alone(processor, 0)
    formats = {"weights": {"bits": 2, "group_size": 16}, "activations": {"bits": 3}}
    found = []
    kept: list[list[PrunedImage]] = []
    for quantize in ({}, {"quantize": {"method": "rtn", **formats}}):
        asked = {**spec("pyramiddrop"), **quantize}
        with torch.no_grad(), compress(model, asked, on_images=kept.append) as receipt:
            model(**prompt)
        found.append(indices(kept))
        if quantize:
            receipt.check()
    assert found[0] != found[1]


def test_mistakes_are_named(deep: tuple[Any, Any], model: Any) -> None:
    big, processor = deep
    with pytest.raises(UserError, match="`positions: compact` cannot be had of fastv"):
        compress(big, spec("fastv", positions="compact")).__enter__()
    assert PruneSpec.model_validate({"method": "fastv", "keep": 5}).positions == "keep"
    assert PruneSpec.model_validate({"method": "attention", "keep": 5}).positions == "compact"
    assert PruneSpec.model_validate({"method": "vscan_two_stage", "keep": 5}).positions == "compact"
    with pytest.raises(UserError, match="keep=17 is out of range"), compress(big, spec("fastv", 17)):
        big(**alone(processor, 0))
    silent = batch_of(processor, ["<image>"], [picture(0)])
    with pytest.raises(UserError, match="reads the text behind an image"), compress(big, spec("fastv")):
        big(**silent)
    del model.model.language_model.layers[0].self_attn.scaling
    with pytest.raises(UserError, match="has no q_proj and k_proj to read attention from"):
        compress(model, spec("fastv")).__enter__()


def test_a_shallow_decoder(model: Any, one: dict[str, Any]) -> None:
    """Two layers leave one place to drop at."""
    kept: list[list[PrunedImage]] = []
    for method in INSIDE:
        with torch.no_grad(), compress(model, spec(method), on_images=kept.append) as receipt:
            model(**one)
        pruner = pruners.create(method)
        enter, left = pruner.entering(TOKENS, KEEP), KEEP if pruner.counts == "last" else 0  # type: ignore[attr-defined]
        assert receipt.layers == [enter, left]
        (image,) = kept[-1]
        assert list(image.layers) == [enter, left]
        assert len(image.indices) + image.merged == left


@pytest.mark.parametrize("depth", [2, 3, 6, 32, 40])
@pytest.mark.parametrize("count, keep", [(576, 575), (576, 192), (576, 72), (576, 1), (2, 1)])
@each_method
def test_stages_lead_to_the_budget(method: str, count: int, keep: int, depth: int) -> None:
    stages = pruners.create(method).stages(count, keep, depth)  # type: ignore[attr-defined]
    places, budgets = [s.after for s in stages], [s.keep for s in stages]
    assert places == sorted(set(places))
    assert all(0 < place < depth for place in places)
    assert budgets == sorted(budgets, reverse=True)
    if pruners.create(method).counts == "last":
        assert budgets[-1] == keep
        assert all(keep <= budget <= count for budget in budgets)
    else:
        seen = [next((b for p, b in reversed(stages) if p <= layer), count) for layer in range(depth)]
        assert budgets[-1] == 0 or places[-1] == depth - 1
        assert sum(seen) == max(keep * depth, count), "the first layer sees all tokens"


def test_released_schedules() -> None:
    """PyramidDrop halves behind 8, 16, 24 of 32; FastV drops behind 2; SparseVLM behind layers 2, 6, 15 from 0."""
    halves = pruners.create("pyramiddrop").stages(576, 72, 32)  # type: ignore[attr-defined]
    assert [tuple(stage) for stage in halves] == [(8, 288), (16, 144), (24, 72)]
    fast = pruners.create("fastv").stages(576, 144, 32)  # type: ignore[attr-defined]
    assert [tuple(stage) for stage in fast] == [(2, 144)]
    sparse = pruners.create("sparsevlm").stages(576, 118, 32)  # type: ignore[attr-defined]
    assert [stage.after for stage in sparse] == [3, 7, 16]
    withdrawn = pruners.create("vtw").stages(576, 270, 32)  # type: ignore[attr-defined]
    assert [tuple(stage) for stage in withdrawn] == [(15, 0)]
    unlike = pruners.create("dart").stages(576, 132, 32)  # type: ignore[attr-defined]
    assert [tuple(stage) for stage in unlike] == [(2, 132)]


def test_two_stages_are_one_pruner_after_the_other(deep: tuple[Any, Any]) -> None:
    """Without a second stage to speak of it is `vscan`; with nothing to do in front, `vscan_decoder`."""
    model, processor = deep
    prompt = alone(processor, 0)
    rows = {
        "vscan": ({"vscan_two_stage": {"entry": 1.0}}, "vscan"),
        "vscan_decoder": ({"vscan_two_stage": {"entry": 99.0}}, "vscan_decoder"),
    }
    for both, one in rows.values():
        found, kept = [], []
        for method in (both, one):
            positions = None if one == "vscan" else "keep"
            asked = {"prune": {"method": method, "keep": KEEP, "positions": positions}}
            with torch.no_grad(), compress(model, asked, on_images=kept.append):
                found.append(model(**prompt).logits[0, -1])
        torch.testing.assert_close(*found)
        assert indices(kept[-2:-1]) == indices(kept)


def test_what_two_stages_show_counts_all_tokens_of_the_image(deep: tuple[Any, Any]) -> None:
    model, processor = deep
    views: list[PruningView] = []
    asked = spec("vscan_two_stage", 3)["prune"]
    pruning = build_pruning(family_of(model), PruneSpec.model_validate(asked), Receipt(), on_view=views.append)
    prompt = alone(processor, 0)
    with torch.no_grad(), pruning.shortened(prompt, None) as short:
        model(**short)
    front, inside = views
    assert (front.layer, inside.layer) == (None, LAYERS // 2)
    assert (front.count, inside.count) == (TOKENS, TOKENS)
    assert len(front.kept) == 9
    assert torch.equal(inside.present, front.kept)
    assert set(inside.kept.tolist()) < set(front.kept.tolist())
