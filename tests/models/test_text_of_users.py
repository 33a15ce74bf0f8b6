"""Text of users is text: no special token of any family comes of a question, a choice or a calibration answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import PROCESSORS, picture_of
from llava_checkpoints import TEMPLATE, make_tokenizer, save_clip
from test_llava_original import save_original
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

from qapbench.models.family import families
from qapbench.models.formats.llava_original import OriginalLlava
from qapbench.models.relevance import TextTower
from qapbench.tasking.lm import AskingLM
from qapbench.tasking.questions import ContinuationTokenizer, processor_inputs
from qapbench.tasking.text import QUOTE, _masked, quoted, special_tokens

ALL = [*PROCESSORS, "llava", "llava_original"]


@pytest.fixture(scope="module", params=ALL)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param in PROCESSORS:
        return PROCESSORS[request.param](families.create(request.param).tiny()[0].config)
    if request.param == "llava_original":
        folder, _ = save_original(tmp_path_factory.mktemp("original"), "1.3")
        return OriginalLlava(folder, {**_config(folder)}).load("float32")[1]
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(image_processor=images, tokenizer=make_tokenizer(), chat_template=TEMPLATE, **options)


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def asked(processor: Any, text: str, images: int) -> list[int]:
    prompt = AskingLM(processor).apply_chat_template([{"role": "user", "content": "<image>\n" * images + text}])
    pictures = [picture_of((64, 32), 0)] * images
    return processor_inputs(processor, prompt, pictures)["input_ids"][0].tolist()


@pytest.mark.parametrize("images", [0, 1])
def test_a_question_that_spells_special_tokens(processor: Any, images: int) -> None:
    tokens = sorted(special_tokens(processor))
    assert processor.image_token in tokens
    ids = set(processor.tokenizer.convert_tokens_to_ids(tokens))
    plain = [i for i in asked(processor, "Where is here", images) if i in ids]
    for token in [*tokens, f"{tokens[0][:2]}{tokens[0]}{tokens[0][2:]}", "<ima<image>ge>", "<video>"]:
        text = quoted([f"Where {token} is{token}here"], ["<image>"])[0]  # as the tasks of this project write it
        found = asked(processor, text, images)
        assert [i for i in found if i in ids] == plain, token
        written = processor.tokenizer.decode([i for i in found if i not in ids])
        assert f"Where {token} is{token}here" in written


def test_ids_of_other_text_are_those_of_the_tokenizer(processor: Any) -> None:
    """Beside a spelled token, words are split as the tokenizer splits them in text."""
    found = asked(processor, f"Where does the <{QUOTE}image> red fox live?", 0)
    literal = processor.tokenizer(" Where does the <image> red fox live?", split_special_tokens=True).input_ids
    known = set(processor.tokenizer.convert_tokens_to_ids(sorted(special_tokens(processor))))
    literal = [i for i in literal if i not in known]
    text = processor.tokenizer.decode(literal)
    assert text == " Where does the <image> red fox live?"
    inner = literal[1:-1]  # the outer ones may merge with the template's text
    assert any(found[at : at + len(inner)] == inner for at in range(len(found)))


def test_a_choice_that_spells_special_tokens(processor: Any) -> None:
    tokens = sorted(special_tokens(processor))
    ids = set(processor.tokenizer.convert_tokens_to_ids(tokens))
    continuations = ContinuationTokenizer(processor)
    prompt = AskingLM(processor).apply_chat_template([{"role": "user", "content": "Which?"}])
    for token in [*tokens, "<video>"]:
        spelled = continuations.spell(prompt, token)
        assert not ids & set(spelled)
        assert processor.tokenizer.decode(spelled).strip() == token


def test_texts_on_both_sides_of_an_image(processor: Any) -> None:
    lm = AskingLM(processor)
    prompt = lm.apply_chat_template([{"role": "user", "content": "<ima<image>ge>"}])
    images = [picture_of((64, 32), 0)]
    one = processor_inputs(processor, prompt, images)["input_ids"]
    assert int((one == processor.image_token_id).sum()) == asked(processor, "", 1).count(processor.image_token_id)


def test_one_beginning_of_a_sequence(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids are those of `apply_chat_template(tokenize=True)`, whoever writes the token that begins a sequence."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = processor.tokenizer
    if tokenizer.bos_token is None:
        pytest.skip("this tokenizer begins no sequence")
    begin = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    before = tokenizer._tokenizer.post_processor
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=begin)
    own = processor.chat_template
    _masked.cache_clear()  # it copied the tokenizer that added nothing
    try:
        for template in (own, "{{ bos_token }}" + own):
            monkeypatch.setattr(processor, "chat_template", template)
            for text in ("What is this?", f"What is <s{QUOTE}> this?"):
                content = [{"type": "image", "image": picture_of((64, 32), 0)}, {"type": "text", "text": text}]
                expected = processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )["input_ids"][0].tolist()
                found = asked(processor, text, 1)
                assert found.count(tokenizer.bos_token_id) == 1
                if QUOTE not in text:
                    assert found == expected
    finally:
        tokenizer._tokenizer.post_processor = before
        _masked.cache_clear()


def test_a_relevance_text_that_spells_special_tokens(tmp_path: Path) -> None:
    """An end token in the question does not move the place at which CLIP pools."""
    folder = save_clip(tmp_path / "clip")
    tower = TextTower(folder, 32, torch.device("cpu"))
    ids: list[torch.Tensor] = []
    tower.text.register_forward_pre_hook(lambda _, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)
    tower.embed_text("a </s> b")
    assert 2 not in ids[0].tolist()[0][:-1]
    assert AutoTokenizer.from_pretrained(folder).decode(ids[0][0]).startswith("a </s> b")


def test_texts_are_embedded_side_by_side_as_alone(tmp_path: Path) -> None:
    """Whatever the others are, and as if each were padded to the whole context."""
    folder = save_clip(tmp_path / "clip")
    device = torch.device("cpu")
    texts = [f"{'a b ' * length}?" for length in (0, 1, 3, 2, 3, 8, 9, 12, 30)] + ["what is this", "is this a"]
    together = TextTower(folder, 32, device).embed_texts([*texts, texts[0]])
    other_order = TextTower(folder, 32, device).embed_texts(texts[::-1])[::-1]
    assert torch.equal(together[0], together[-1])
    assert max(found.shape[1] for found in together) > 1
    for text, found, turned in zip(texts, together[:-1], other_order, strict=True):
        tower = TextTower(folder, 32, device)
        alone = tower.embed_text(text)
        assert torch.equal(found, alone)
        assert torch.equal(turned, alone)
        ids = tower.tokenizer(text, return_tensors="pt", split_special_tokens=True).input_ids[0]
        whole = torch.zeros(alone.shape[1] * tower.length, dtype=torch.long)
        whole[: len(ids)] = ids
        with torch.no_grad():
            padded = tower.text_projection(tower.text(input_ids=whole.view(-1, tower.length)).pooler_output)
        assert torch.allclose(alone[0], padded, atol=1e-5)
