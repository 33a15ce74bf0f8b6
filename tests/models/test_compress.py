"""`compress` around a LLaVA: what it must not change, and what it must."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_checkpoints import THREE, TOKENS, batch_of, picture, save_clip
from transformers import AutoModelForImageTextToText, AutoTokenizer

from qapbench import DecoderPruner, UserError, compress, pruners
from qapbench.models import family_of
from qapbench.prune.splice import PrunedImage

W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
RELEVANCE = ["What is this?", "Where does the red fox live?"]


def prune(method: str = "attention", keep: int = 5, **more: Any) -> dict[str, Any]:
    return {"prune": {"method": method, "keep": keep, **more}}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return model(**inputs, **more).logits


@torch.no_grad()
def tokens(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **more)


def hooks_of(model: Any) -> list[tuple[int, int]]:
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def test_an_empty_spec_is_the_hugging_face_path(model: Any, three: dict[str, Any]) -> None:
    plain, text = logits(model, three), tokens(model, three)
    with compress(model, {}) as receipt:
        assert torch.equal(logits(model, three), plain)
        assert torch.equal(tokens(model, three), text)
    assert receipt.summary() == "full precision"


@pytest.mark.parametrize("method", pruners.names())
def test_keeping_everything_changes_nothing(
    method: str, model: Any, one: dict[str, Any], three: dict[str, Any], processor: Any
) -> None:
    """Also of a padded batch, without a mask, and where all of the text is labelled."""
    bare = {name: value for name, value in one.items() if name != "attention_mask"}
    labelled = {**one, "labels": one["input_ids"]}
    calls = (one, three, bare, labelled)
    plain, text = [logits(model, call) for call in calls], [tokens(model, call) for call in (one, three)]
    with compress(model, prune(method, TOKENS), processor):
        assert all(torch.equal(logits(model, call), expected) for call, expected in zip(calls, plain, strict=True))
        assert all(torch.equal(tokens(model, call), found) for call, found in zip((one, three), text, strict=True))


@pytest.mark.parametrize("method", pruners.names())
@pytest.mark.parametrize("sensitivity", [None, "combined"])
def test_every_pruner_runs_in_a_mixed_padded_batch(
    method: str, sensitivity: str | None, model: Any, three: dict[str, Any]
) -> None:
    with compress(model, prune(method, 5, sensitivity=sensitivity)) as receipt:
        out = tokens(model, three, relevance_text=RELEVANCE)
        scored = logits(model, three, relevance_text=RELEVANCE)
    longest = three["input_ids"].shape[1]
    assert torch.equal(out[:, :longest], three["input_ids"])
    assert out.shape[1] <= longest + 6
    assert torch.isfinite(scored[:, -1]).all()
    pruner = pruners.create(method)
    if isinstance(pruner, DecoderPruner) and pruner.counts == "mean":  # one of two layers sees all
        mean, left = TOKENS // 2, 0
    else:
        mean = left = 5
    assert {"images": 4, "available": TOKENS, "mean": mean, "min": mean, "max": mean}.items() <= receipt.tokens.items()
    assert receipt.tokens["kept"] + receipt.tokens["merged"] == left


def test_the_model_is_as_before_to_the_bit(model: Any, three: dict[str, Any]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    plain = logits(model, three)
    hooks = hooks_of(model)  # transformers' own: it records hidden states by hooks
    with compress(model, {"quantize": {**W4A4, "scope": ["language", "projector", "vision"]}, **prune()}):
        changed = logits(model, three, relevance_text=RELEVANCE)
    assert not torch.allclose(changed[:, -1], plain[:, -1])
    assert {name: torch.equal(before[name], value) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert not {"forward", "generate"} & set(vars(model))
    assert hooks_of(model) == hooks
    assert torch.equal(logits(model, three), plain)


def test_the_model_is_restored_after_an_error(model: Any, one: dict[str, Any]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), compress(model, {"quantize": W4A4, **prune()}):
        raise ZeroDivisionError
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("positions", ["compact", "keep"])
def test_pruned_logits_equal_spliced_embeddings(positions: str, model: Any, one: dict[str, Any]) -> None:
    """The oracle: Hugging Face's own embeddings with the dropped columns taken out by hand."""
    keep = 5
    with torch.no_grad():
        family = family_of(model)
        seen = family.see(one["pixel_values"], frozenset({"cls_attention"}))
        chosen = pruners.create("attention").select(seen, keep).indices[0]
        embeds = model.get_input_embeddings()(one["input_ids"])
        spot = (one["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        embeds[0, spot] = seen.projected[0]
        stays = torch.ones(embeds.shape[1], dtype=torch.bool)
        stays[spot] = False
        stays[spot[chosen]] = True
        kept = embeds[:, stays]
        where = stays.nonzero()[:, 0] if positions == "keep" else torch.arange(int(stays.sum()))
        hidden = model.model.language_model(
            inputs_embeds=kept, position_ids=where[None], attention_mask=torch.ones(1, len(where), dtype=torch.long)
        ).last_hidden_state
        expected = model.lm_head(hidden)
    with compress(model, prune("attention", keep, positions=positions)):
        torch.testing.assert_close(logits(model, one), expected, rtol=1e-5, atol=1e-5)


def test_kept_positions_differ_from_compact_ones_and_isolate_nothing(model: Any, one: dict[str, Any]) -> None:
    """Gaps in position ids without a mask would be read as borders of packed sequences: the last token would
    then see nothing of the image."""
    with compress(model, prune("attention", 5, positions="keep")):
        first = logits(model, one)[:, -1]
        other = logits(model, {**one, "pixel_values": one["pixel_values"].flip(-1)})[:, -1]
    with compress(model, prune("attention", 5)):
        compact = logits(model, one)[:, -1]
    assert not torch.allclose(first, compact, atol=1e-4)
    assert not torch.allclose(first, other, atol=1e-4)


@pytest.mark.parametrize("spec", [prune("cdpruner", 5, sensitivity="combined"), {"quantize": W4A4}])
def test_a_batch_answers_as_its_rows_alone(
    spec: dict[str, Any], model: Any, three: dict[str, Any], processor: Any
) -> None:
    pictures = {0: [picture(1)], 1: [], 2: [picture(2)]}
    more = {"relevance_text": RELEVANCE} if "prune" in spec else {}
    with compress(model, spec):
        together = tokens(model, three, **more)[:, three["input_ids"].shape[1] :]
        for row, text in enumerate(THREE):
            alone = batch_of(processor, [text], pictures[row])
            if more and pictures[row]:
                more = {"relevance_text": [RELEVANCE[row // 2]]}
            single = tokens(model, alone, **(more if pictures[row] else {}))[:, alone["input_ids"].shape[1] :]
            width = min(single.shape[1], together.shape[1])
            assert torch.equal(together[row, :width], single[0, :width])


def test_right_padding_and_labels(model: Any, three: dict[str, Any], processor: Any) -> None:
    ids, mask = three["input_ids"], three["attention_mask"]
    rolled = torch.stack([row.roll(int(m.sum())) for row, m in zip(ids, mask, strict=True)])
    right = {**three, "input_ids": rolled, "attention_mask": mask.flip(-1)}
    labels = rolled.masked_fill((rolled == model.config.image_token_id) | (right["attention_mask"] == 0), -100)
    with compress(model, prune("attention", 5)), torch.no_grad():
        out = model(**right, labels=labels)
        reference = model(**three).logits
    ends = [int(row.sum()) - int(has) * (TOKENS - 5) for row, has in zip(mask, [1, 0, 1], strict=True)]
    for row, end in enumerate(ends):
        torch.testing.assert_close(out.logits[row, end - 1], reference[row, -1], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(out.loss)


def test_beams_and_several_sequences(model: Any, one: dict[str, Any]) -> None:
    with compress(model, prune()), torch.no_grad():
        out = model.generate(**one, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
        whole = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.shape[0] == 2
    assert torch.equal(out[:, : one["input_ids"].shape[1]], one["input_ids"].expand(2, -1))
    assert torch.equal(whole.sequences[:, : one["input_ids"].shape[1]], one["input_ids"])


def test_max_length_counts_the_callers_prompt(model: Any, one: dict[str, Any]) -> None:
    limit = one["input_ids"].shape[1] + 3
    with compress(model, prune()), torch.no_grad():
        out = model.generate(**one, max_length=limit, do_sample=False, eos_token_id=None)
    assert out.shape[1] == limit


def test_merged_tokens_go_through_the_projector(model: Any, one: dict[str, Any]) -> None:
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    kept: list[list[PrunedImage]] = []
    with compress(model, prune("visionzip", 8), on_images=kept.append) as receipt:
        logits(model, one)
    handle.remove()
    family = family_of(model)
    with torch.no_grad():
        tokens_seen = family.see(one["pixel_values"], pruners.create("visionzip").needs)
        selection = pruners.create("visionzip").select(tokens_seen, 8)
        assert selection.merged is not None
        cls = family.project(selection.merged[:, :1])[0, 0]
    start = int((one["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    torch.testing.assert_close(seen[0][0, start], cls)
    assert receipt.tokens["merged"] == selection.merged.shape[1] == 2
    ((image,),) = kept
    assert torch.equal(image.indices, selection.indices[0])
    assert (image.merged, image.available) == (2, TOKENS)


def test_what_the_family_records(llava_folder: Path, one: dict[str, Any]) -> None:
    """CLS attention and keys from hooks equal those of eager attention that returns its weights."""
    eager = AutoModelForImageTextToText.from_pretrained(llava_folder, attn_implementation="eager").eval()
    sdpa = AutoModelForImageTextToText.from_pretrained(llava_folder, attn_implementation="sdpa").eval()
    seen = family_of(sdpa).see(one["pixel_values"], frozenset({"cls_attention", "keys", "cls_token", "patches"}))
    with torch.no_grad():
        tower = eager.model.vision_tower(one["pixel_values"], output_attentions=True, output_hidden_states=True)
    expected = tower.attentions[-2].mean(dim=1)[:, 0, 1:]
    assert seen.cls_attention is not None
    assert seen.patches is not None
    torch.testing.assert_close(seen.cls_attention, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.patches, tower.hidden_states[-2][:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.cls_token, tower.hidden_states[-2][:, 0], rtol=1e-4, atol=1e-5)
    assert seen.grid == (4, 4)
    assert seen.heads == 4


def test_attention_of_other_layers(llava_folder: Path, one: dict[str, Any]) -> None:
    """Received attention equals eager's; the last layer's single-head row is computed here from its projections."""
    eager = AutoModelForImageTextToText.from_pretrained(llava_folder, attn_implementation="eager").eval()
    needs = {"attention_received", "middle_attention_received", "last_cls_attention", "last_keys"}
    needs |= {"shallow_cls_attention"}
    seen = family_of(eager).see(one["pixel_values"], frozenset(needs))
    layers, states = eager.model.vision_tower.encoder.layers, {}
    handles = [
        getattr(layers[-1].self_attn, name).register_forward_hook(
            lambda module, args, output, name=name: states.update({name: output})
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        tower = eager.model.vision_tower(one["pixel_values"], output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for name, layer in (("attention_received", -2), ("middle_attention_received", 0)):
        expected = tower.attentions[layer].mean(dim=1).mean(dim=1)[:, 1:]
        torch.testing.assert_close(getattr(seen, name), expected, rtol=1e-4, atol=1e-6)
    shallow = tower.attentions[0].mean(dim=1)[:, 0, 1:]
    torch.testing.assert_close(seen.shallow_cls_attention, shallow, rtol=1e-4, atol=1e-6)
    width = states["k_proj"].shape[-1]
    row = (states["q_proj"][:, :1] @ states["k_proj"].mT / width**0.5).softmax(dim=-1)[:, 0, 1:]
    torch.testing.assert_close(seen.last_cls_attention, row, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.last_keys, states["k_proj"][:, 1:], rtol=1e-4, atol=1e-5)


def test_updated_tokens_go_through_the_projector(model: Any, one: dict[str, Any]) -> None:
    """PruMerge's centres stand at the kept places, the rest's sum after them."""
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad(), compress(model, prune("prumerge", 6)) as receipt:
        model(**one)
    handle.remove()
    with torch.no_grad():
        family = family_of(model)
        pruner = pruners.create("prumerge")
        selection = pruner.select(family.see(one["pixel_values"], pruner.needs), 6)
        assert selection.updated is not None
        assert selection.merged is not None
        expected = family.project(torch.cat([selection.updated, selection.merged], dim=1))[0]
    start = int((one["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    torch.testing.assert_close(seen[0][0, start : start + 6], expected)
    assert (receipt.tokens["kept"], receipt.tokens["merged"]) == (5, 1)


def test_mistakes_are_named(model: Any, one: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep=17 is out of range"), compress(model, prune(keep=17)):
        logits(model, one)
    with pytest.raises(UserError, match="unknown section 'quantise'"), compress(model, {"quantise": {}}):
        pass
    with pytest.raises(UserError, match="0 image placeholders, but 1 image"), compress(model, prune()):
        logits(model, {**one, "input_ids": one["input_ids"].clamp(min=4)})
    with pytest.raises(UserError, match="inputs_embeds"), compress(model, prune()):
        logits(model, {"inputs_embeds": torch.zeros(1, 3, 48), "pixel_values": one["pixel_values"]})
    merging = compress(model, prune("visionzip", 8, positions="keep"))
    with pytest.raises(UserError, match="no place for the tokens that visionzip merges"), merging:
        logits(model, one)
    wide = save_clip(tmp_path / "wide", width=64)
    with pytest.raises(UserError, match="width 64"), compress(model, prune("cdpruner"), text_tower=str(wide)):
        pass
    with pytest.raises(UserError, match=r"^model: no family 'Linear'; "), compress(torch.nn.Linear(2, 2), {}):
        pass


def test_the_question_is_read_from_the_prompt(model: Any, one: dict[str, Any], processor: Any) -> None:
    """Without a processor the tokenizer of the model's own folder serves."""
    kept: list[list[PrunedImage]] = []
    with compress(model, prune("cdpruner"), on_images=kept.append):
        plain = logits(model, one)
    with compress(model, prune("cdpruner"), processor, on_images=kept.append):
        assert torch.equal(logits(model, one), plain)
    with compress(model, prune("cdpruner"), on_images=kept.append):
        logits(model, one, relevance_text=["tree tree tree"])
    (bare,), (given,), (other,) = kept
    assert torch.equal(bare.indices, given.indices)
    assert not torch.equal(bare.indices, other.indices)


def test_what_becomes_of_images_is_told_call_by_call(model: Any, one: dict[str, Any], three: dict[str, Any]) -> None:
    """Once a call, also for `generate`, which calls the model again and again; not of a call without images."""
    kept: list[list[PrunedImage]] = []
    with compress(model, prune("visionzip", 5), on_images=kept.append) as receipt:
        logits(model, one)
        assert [len(images) for images in kept] == [1]
        tokens(model, three)
        assert [len(images) for images in kept] == [1, 2]
        logits(model, {name: three[name] for name in ("input_ids", "attention_mask")}, pixel_values=None)
    assert [len(images) for images in kept] == [1, 2]
    told = [image for images in kept for image in images]
    assert receipt.images == len(told) == 3
    assert receipt.kept == sum(len(image.indices) for image in told)
    assert receipt.merged == sum(image.merged for image in told)
    for image in told:
        assert image.indices.tolist() == sorted(image.indices.tolist())
        assert len(image.places) == len(image.indices) + image.merged + image.separators == 5
        assert (image.available, image.layers) == (TOKENS, ())


def test_calibration_that_prunes_tells_nobody(model: Any, one: dict[str, Any]) -> None:
    kept: list[list[PrunedImage]] = []
    quantize = {"method": "gptq", "weights": W4A4["weights"], "calibration": {"pruned": True}}
    with compress(model, {"quantize": quantize, **prune()}, calibration=[one], on_images=kept.append):
        assert kept == []
        logits(model, one)
    assert len(kept) == 1


def test_without_a_text_tower_relevance_falls_back_and_says_so(tmp_path: Path, one: dict[str, Any]) -> None:
    from llava_checkpoints import save_llava

    model = AutoModelForImageTextToText.from_pretrained(save_llava(tmp_path / "bare")).eval()
    with compress(model, prune("cdpruner")) as receipt:
        logits(model, one)
    assert len(receipt.fallbacks) == 1
    assert "language model's embeddings" in receipt.fallbacks[0]
    with compress(model, prune("attention")) as receipt:
        logits(model, one)
    assert receipt.fallbacks == []


def test_the_given_question_is_read_as_words(model: Any, one: dict[str, Any], processor: Any) -> None:
    """Also with a text tower: the words of `relevance_text` take the place of the prompt's."""
    words = processor.tokenizer("tree fox", add_special_tokens=False, split_special_tokens=True).input_ids
    with torch.no_grad():
        pruner = pruners.create("mmtok")
        seen = family_of(model).see(one["pixel_values"], frozenset({"patches"}))
        text = model.get_input_embeddings()(torch.tensor([words]))
        expected = pruner.select(dataclasses.replace(seen, prompt_embeds=text), 5).indices[0]
    kept: list[list[PrunedImage]] = []
    with compress(model, prune("mmtok"), processor, on_images=kept.append):
        logits(model, one, relevance_text=["tree fox"])
        logits(model, one)
    (given,), (prompt,) = kept
    assert given.indices.tolist() == expected.tolist()
    assert given.indices.tolist() != prompt.indices.tolist()


def test_an_image_at_a_lower_size(model: Any, one: dict[str, Any]) -> None:
    """The tower sees as many patches as are asked for, and what it makes of them is what the decoder gets."""
    pixels = torch.nn.functional.interpolate(one["pixel_values"], (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        core = model.model
        hidden = core.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
        expected = core.multi_modal_projector(hidden[:, 1:])
        family = family_of(model)
        (views,) = family.encode_images(one, frozenset()).views
        small = family.downsampled(one, 4, views)
        assert small.shape[2:] == (2, 2)
        assert torch.equal(small.flatten(2).mT, expected)
        assert family.downsampled(one, 5, views).shape[2:] == (3, 2)
        torch.testing.assert_close(family.downsampled(one, TOKENS, views).flatten(2).mT, views.tokens.projected)
    given: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad(), compress(model, prune("downsample", 4)) as receipt:
        model(**one)
    handle.remove()
    visual = (one["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    assert torch.equal(given[0][:, visual[0] : visual[0] + 4], expected)
    assert (receipt.tokens["kept"], receipt.tokens["merged"]) == (0, 4)


@pytest.mark.parametrize("positions", ["compact", "keep"])
def test_a_merged_token_with_a_place_keeps_its_position(positions: str, model: Any, one: dict[str, Any]) -> None:
    """Four cells of 4 x 4 tokens: the first of the tokens nearest to the middle of each."""
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad(), compress(model, prune("avgpool", 4, positions=positions)):
        model(**one)
    handle.remove()
    start = int((one["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    places = [0, 2, 8, 10] if positions == "keep" else [0, 1, 2, 3]
    assert seen[0][0, start : start + 4].tolist() == [start + place for place in places]


@pytest.mark.parametrize("method", ["cdpruner", "trim"])
def test_without_a_text_tower_the_given_question_is_read(method: str, tmp_path: Path, one: dict[str, Any]) -> None:
    """The question's words are embedded by the language model, in place of the prompt's."""
    from llava_checkpoints import save_llava

    model = AutoModelForImageTextToText.from_pretrained(save_llava(tmp_path / "bare")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bare")
    question = "Where does the red fox live? tree <image> </s>"
    words = tokenizer(question, add_special_tokens=False, split_special_tokens=True).input_ids
    assert not set(words) & set(tokenizer.all_special_ids)
    with torch.no_grad():
        pruner, seen = pruners.create(method), family_of(model).see(one["pixel_values"], frozenset({"patches"}))
        text = model.get_input_embeddings()(torch.tensor([words])).mean(dim=1, keepdim=True)
        asked = dataclasses.replace(seen, image_embeds=seen.projected, text_embeds=text)
        expected = pruner.select(asked, 5).indices[0]
    kept: list[list[PrunedImage]] = []
    with compress(model, prune(method), on_images=kept.append):
        logits(model, one)
        logits(model, one, relevance_text=[question])
        with pytest.raises(UserError, match="relevance_text: a text is empty"):
            logits(model, one, relevance_text=[""])
    (prompt,), (given,) = kept
    assert given.indices.tolist() == expected.tolist()
    assert given.indices.tolist() != prompt.indices.tolist()
