"""`generate` and `forward` of a pruned model take every argument as they do without pruning, or refuse it."""

import contextlib
from typing import Any

import pytest
import torch
from llava_checkpoints import TOKENS, batch_of, picture
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria

from qapbench import DecoderPruner, UserError, compress, pruners
from qapbench.models.family import families, family_of
from qapbench.prune.build import build_pruning
from qapbench.receipt import Receipt
from qapbench.spec.run_spec import PruneSpec

pytestmark = pytest.mark.usefixtures("one_thread")
INSIDE = [entry.name for entry in pruners if issubclass(entry.target, DecoderPruner)]  # type: ignore[arg-type]
KEEP, NEW = 5, 4
GREEDY = {"do_sample": False, "eos_token_id": None}
each_side = pytest.mark.parametrize("method", ["attention", "visionzip", "sparsevlm"])
each_family = pytest.mark.parametrize("family", families.names())


def prune(method: str, **more: Any) -> dict[str, Any]:
    return {"prune": {"method": method, "keep": KEEP, **more}}


def left_of(method: str) -> int:
    """Tokens of an image that the last layer receives."""
    return KEEP if pruners.create(method).counts == "last" else 0  # type: ignore[attr-defined]


@torch.no_grad()
def written(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    # Random weights would write placeholders, too.
    return model.generate(**inputs, **{**GREEDY, "suppress_tokens": [model.config.image_token_id], **more})


@torch.no_grad()
def told(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return written(model, inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **more)


def counts(limit: int) -> Any:
    """A criterion of a caller's own, which counts the prompt."""

    class Long:
        def __call__(self, ids: Tensor, scores: Any) -> Tensor:
            return torch.full((len(ids),), ids.shape[1] >= limit)

    return Long()


@each_side
def test_lengths_count_the_callers_prompt(method: str, model: Any, one: dict[str, Any]) -> None:
    """`max_length` wherever it stands, and criteria; `min_length` against `min_new_tokens`."""
    end = one["input_ids"].shape[1] + NEW
    config = GenerationConfig(max_length=end, suppress_tokens=[model.config.image_token_id], **GREEDY)
    with compress(model, prune(method)):
        expected = written(model, one, max_new_tokens=NEW)
        assert expected.shape[1] == end
        assert torch.equal(written(model, one, max_length=end), expected)
        with torch.no_grad():
            assert torch.equal(model.generate(**one, generation_config=config), expected)
            assert torch.equal(model.generate(one["input_ids"], config, **{**one, "input_ids": None}), expected)
        assert config.max_length == end
        for one_criterion in (MaxLengthCriteria(max_length=end), counts(end)):
            criteria = StoppingCriteriaList([one_criterion])
            more = {} if isinstance(one_criterion, MaxLengthCriteria) else {"max_new_tokens": 30}
            assert torch.equal(written(model, one, stopping_criteria=criteria, **more), expected)
        stop = int(expected[0, -NEW])  # the first new token would end the answer
        free = written(model, one, max_new_tokens=6, min_new_tokens=3, eos_token_id=stop)
        assert free.shape[1] > end - NEW + 2
        assert torch.equal(written(model, one, max_new_tokens=6, min_length=end - 1, eos_token_id=stop), free)
        limits = {"max_new_tokens": 6, "min_length": end - 1, "suppress_tokens": [model.config.image_token_id]}
        short = GenerationConfig(**limits, do_sample=False, eos_token_id=stop)
        with torch.no_grad():
            assert torch.equal(model.generate(**one, generation_config=short), free)
        model.generation_config.max_length = end
        assert torch.equal(written(model, one), expected)
        assert torch.equal(written(model, one, max_new_tokens=NEW), expected)
        model.generation_config.max_length = end - NEW
        with pytest.raises(UserError, match=rf"max_length: {end - NEW} leaves no room behind a prompt of {end - NEW}"):
            written(model, one)


class Seen:
    """What a caller's processor, prefix function or streamer was given."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(ids.clone())
        return scores

    def allowed(self, row: int, ids: Tensor) -> list[int]:
        self.ids.append(ids[None].clone())
        return list(range(300))

    def put(self, value: Tensor) -> None:
        self.ids.append(value.view(1, -1))

    def end(self) -> None:
        self.ids.append(torch.zeros(1, 0, dtype=torch.long))


@each_side
def test_what_reads_the_sequence_sees_it_whole(method: str, model: Any, one: dict[str, Any]) -> None:
    processor, prefix, streamer = Seen(), Seen(), Seen()
    with compress(model, prune(method)):
        more = {"logits_processor": [processor], "prefix_allowed_tokens_fn": prefix.allowed, "streamer": streamer}
        out = written(model, one, max_new_tokens=NEW, **more)
        beams = Seen()
        written(model, one, max_new_tokens=2, num_beams=3, logits_processor=[beams])
    length = one["input_ids"].shape[1]
    for seen in (processor, prefix):
        assert [ids.tolist() for ids in seen.ids] == [out[:, : length + step].tolist() for step in range(NEW)]
    assert torch.equal(torch.cat(streamer.ids, dim=1), out)
    assert all(torch.equal(ids[:, :length], one["input_ids"].expand(3, -1)) for ids in beams.ids)


@pytest.mark.parametrize("method", INSIDE)
def test_without_a_cache_every_token_is_pruned(method: str, model: Any, three: dict[str, Any]) -> None:
    """Each step passes the whole sequence, and the same tokens are dropped in it; the receipt counts them once."""
    with compress(model, prune(method)) as receipt:
        cached, bare = told(model, three), told(model, three, use_cache=False)
        assert receipt.images == 4
        assert receipt.tokens["mean"] == (left_of(method) or receipt.tokens["layer_mean"])
        assert torch.equal(bare.sequences, cached.sequences)
        torch.testing.assert_close(torch.stack(bare.logits), torch.stack(cached.logits), rtol=1e-4, atol=1e-4)
        model.generation_config.use_cache = False
        assert torch.equal(told(model, three).sequences, cached.sequences)
    model.generation_config.use_cache = True
    assert not torch.equal(torch.stack(told(model, three).logits), torch.stack(cached.logits))


@pytest.mark.parametrize("method", INSIDE)
def test_a_run_on_a_checkpoint_without_a_cache(method: str, model: Any, one: dict[str, Any]) -> None:
    """Runs open the context of the prompt themselves, and the checkpoint says `use_cache: false`."""
    family = family_of(model)
    spec = PruneSpec.model_validate({"method": method, "keep": KEEP})
    pruning = build_pruning(family, spec, Receipt())
    pruned = pruning.prune(one, family.encode_images(one, pruning.needs))
    assert pruned.inside is not None
    found = []
    for cached in (True, False):
        model.generation_config.use_cache = cached
        with pruned.inside() as images:
            found.append(told(model, {**pruned.inputs, **family.encoded(pruned.features)}))
        assert [len(image.indices) + image.merged for image in images()] == [left_of(method)]
    with_cache, without = found
    assert torch.equal(without.sequences, with_cache.sequences)
    torch.testing.assert_close(torch.stack(without.logits), torch.stack(with_cache.logits), rtol=1e-4, atol=1e-4)


@each_side
def test_prompt_lookup_writes_the_same(method: str, model: Any, one: dict[str, Any]) -> None:
    """Candidates come with the prompt and are taken back, also from layers of different lengths."""
    ids = torch.cat([one["input_ids"], one["input_ids"][:, -8:]], dim=1)
    prompt = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with compress(model, prune(method)):
        for inputs in (one, prompt):
            expected = told(model, inputs)
            found = told(model, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
            assert torch.equal(found.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def behind(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The inputs of a conversation that goes on: the same images, more tokens."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = {**inputs, "input_ids": ids}
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], inputs[name].new_full((len(ids), more), fill)], dim=1)
    return longer


def two_turns(model: Any, inputs: dict[str, Any], images: tuple[str, ...], question: list[int]) -> tuple[Any, Any]:
    """(the second turn on the first one's cache, the conversation after the second question)."""
    first = told(model, inputs)
    asked = torch.tensor([question]).expand(len(first.sequences), -1)
    conversation = behind(inputs, torch.cat([first.sequences, asked], dim=1))
    text = {name: value for name, value in conversation.items() if name not in images}
    return told(model, text, past_key_values=first.past_key_values), conversation


@each_family
@pytest.mark.parametrize("positions", ["compact", "keep"])
def test_a_second_turn_is_what_comes_of_the_whole_conversation(family: str, positions: str) -> None:
    """This pruner does not read the text, so that computing from nothing keeps the same tokens."""
    torch.manual_seed(0)
    kind = families.create(family)
    model, inputs = kind.tiny()
    with compress(model, prune("attention", positions=positions)):
        second, conversation = two_turns(model, inputs, kind.image_inputs, [9, 20, 21])
        expected = told(model, conversation)
        assert torch.equal(second.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(second.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
        third = torch.cat([second.sequences, torch.tensor([[30, 31]])], dim=1)
        text = {"input_ids": third, "past_key_values": second.past_key_values}
        again, whole = told(model, text), told(model, behind(inputs, third))
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # by hand: one token behind the cache of a forward pass
            past = model(**inputs).past_key_values
            word = torch.tensor([[17]])
            step = model(input_ids=word, past_key_values=past).logits[:, -1]
            full = model(**behind(inputs, torch.cat([inputs["input_ids"], word], dim=1))).logits[:, -1]
        torch.testing.assert_close(step, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["attention", *INSIDE])
def test_a_second_turn_of_a_padded_batch(method: str, model: Any, three: dict[str, Any]) -> None:
    """What is kept is what the first question kept: labels behind it say the same of a pass from nothing."""
    with compress(model, prune(method)):
        second, conversation = two_turns(model, three, ("pixel_values",), [50, 60, 70])
        ids = conversation["input_ids"]
        labels = ids.clone()
        labels[:, : three["input_ids"].shape[1]] = -100
        with torch.no_grad():
            whole = model(**conversation, labels=labels).logits[:, -1]
        torch.testing.assert_close(second.logits[0], whole, rtol=1e-4, atol=1e-4)
        assert torch.equal(second.sequences[:, : ids.shape[1]], ids)


def test_new_tokens_alone_and_an_empty_cache(model: Any, three: dict[str, Any]) -> None:
    with compress(model, prune("attention")):
        cache = DynamicCache()
        first = written(model, three, max_new_tokens=NEW, past_key_values=cache)
        assert torch.equal(first, told(model, three).sequences)
        other = told(model, three)
        asked = torch.tensor([[50, 60, 70]] * 3)
        mask = behind(three, torch.cat([first, asked], dim=1))["attention_mask"]
        whole = told(
            model,
            {"input_ids": torch.cat([first, asked], dim=1), "attention_mask": mask, "past_key_values": cache},
        )
        # The last token that was written is not in the cache yet.
        fresh = {"input_ids": torch.cat([first[:, -1:], asked], dim=1), "attention_mask": mask}
        alone = told(model, fresh, past_key_values=other.past_key_values)
        assert torch.equal(alone.sequences[:, -NEW:], whole.sequences[:, -NEW:])
        torch.testing.assert_close(torch.stack(alone.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pictured", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_cache_that_was_emptied_forgets_its_pruned_prompt(
    pictured: bool, alone: bool, model: Any, processor: Any, one: dict[str, Any]
) -> None:
    """Then it is filled by a text, or by a prompt whose image is within the budget, and a second turn follows."""
    text = batch_of(processor, ["USER: Where do the red fox and its young live? ASSISTANT:"], [])
    inputs, spec = (one, {"prune": {"method": "attention", "keep": TOKENS}}) if pictured else (text, prune("attention"))

    def turns(cache: DynamicCache, first: Any, then: Any) -> Tensor:
        with first:
            ids = told(model, inputs, past_key_values=cache).sequences
        whole = torch.cat([ids, torch.tensor([[50, 60, 70]])], dim=1)
        fresh = whole[:, cache.get_seq_length() :] if alone else whole
        with then:
            second = told(model, {"input_ids": fresh, "attention_mask": torch.ones_like(whole)}, past_key_values=cache)
        return torch.stack(second.logits)

    used = DynamicCache()
    with compress(model, prune("attention")):
        told(model, batch_of(processor, ["USER: <image>\nWho? ASSISTANT:"], [picture(1)]), past_key_values=used)
    used.reset()
    found = turns(used, compress(model, spec), compress(model, prune("attention")))
    expected = turns(DynamicCache(), contextlib.nullcontext(), contextlib.nullcontext())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_right_is_refused(model: Any, one: dict[str, Any], three: dict[str, Any]) -> None:
    def refused(sentence: str) -> Any:
        return pytest.raises(UserError, match=sentence)

    text = {"input_ids": torch.tensor([[1, 50, 60]])}
    with torch.no_grad(), compress(model, prune("attention")):
        for more in ({"assistant_model": model}, {"assistant_early_exit": 1}, {"token_healing": True}):
            with refused(f"{next(iter(more))}: cannot be combined with pruning, because"):
                written(model, one, max_new_tokens=2, **more)
        embeds = model.get_input_embeddings()(one["input_ids"])
        for call in (model, model.generate):
            with refused("inputs_embeds, in which images cannot be told from text, cannot be pruned"):
                call(inputs_embeds=embeds)
        with refused("mm_encoder_outputs: ready features cannot be pruned"):
            model(input_ids=one["input_ids"], mm_encoder_outputs={"image": None, "video": None})
        with refused("logits_to_keep: give a number"):
            model(**one, logits_to_keep=torch.tensor([3]))
        with refused(r"attention_mask: pruning needs one value for each token"):
            model(**{**one, "attention_mask": torch.ones(1, 1, 5, 5)})
        cache = told(model, one).past_key_values
        with refused("with an empty cache"):
            model.generate(**one, past_key_values=cache, max_new_tokens=2)
        with refused("has to begin with the prompt that the KV cache holds"):
            written(model, text, past_key_values=cache, max_new_tokens=2)
        with refused("holds all of them already"):
            ids = torch.cat([one["input_ids"], torch.tensor([[50]])], dim=1)
            written(model, {"input_ids": ids}, past_key_values=cache, max_new_tokens=2)
        word = torch.tensor([[50]])
        with refused("position_ids: leave them out behind a pruned prompt"):
            model(input_ids=word, past_key_values=cache, position_ids=torch.tensor([[40]]))
        with refused(r"attention_mask: expected \d+ or \d+ columns"):
            model(input_ids=word, past_key_values=cache, attention_mask=torch.ones(1, 3))
        beams = told(model, one, num_beams=2).past_key_values
        with refused("the cache holds 2 rows of 1 prompts, the call 1"):
            model(input_ids=word, past_key_values=beams)
        cache.crop(KEEP - cache.get_seq_length())
        with refused("cut into its pruned prompt"):
            model(input_ids=word, past_key_values=cache)
        assert torch.equal(written(model, text, max_new_tokens=2)[:, :3], text["input_ids"])
    with torch.no_grad(), compress(model, prune("fastv")):
        cache = told(model, one).past_key_values
        with refused("the prompt has to pass in one piece"):
            written(model, one, max_new_tokens=2, prefill_chunk_size=4)
    with torch.no_grad(), compress(model, prune("attention")), refused("pruned between layers in another context"):
        model(input_ids=word, past_key_values=cache)


def test_training_is_right_or_refused(model: Any, one: dict[str, Any]) -> None:
    """Gradients reach the language model, and where they would not reach what is trained, a sentence says so."""
    model.train()
    labels = one["input_ids"].clone()
    labels[:, :-3] = -100
    with compress(model, prune("attention")):
        with pytest.raises(UserError, match="no gradient passes through pruning to the vision tower and the projector"):
            model(**one, labels=labels)
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.requires_grad_(False)
        model(**one, labels=labels).loss.backward()
    weights = dict(model.model.language_model.named_parameters())
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in weights.values())
    for method in INSIDE:
        model.zero_grad()
        with compress(model, prune(method)):
            model(**one, labels=labels).loss.backward()
        assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in weights.values())
    model.gradient_checkpointing_enable()
    with compress(model, prune("fastv")), pytest.raises(UserError, match="gradient checkpointing runs layers again"):
        model(**one, labels=labels)
