"""The training code: its forward pass is the model's own, its rows are the benchmark's prompts, stages resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qapbench.tasks.diagramqa.draw import icons
from qapbench.tasks.diagramqa.generate import sample
from training import train
from training.companion import Companion
from training.curriculum import lookup
from training.language import NOWHERE, Joint, Language
from training.loop import Loop
from training.model import IMAGE, N_PATCHES, build_processor, build_tokenizers
from training.rows import LETTERS, chunk, prompt_text, quiz_rows
from training.vision import Vision, pixels_of, see

pytestmark = pytest.mark.usefixtures("one_thread")


def scenes_of(modality: str, count: int) -> list:
    return [sample(5, i, "train", modality=modality) for i in range(count)]


def test_the_forward_pass_is_that_of_transformers(models: tuple, speller) -> None:
    llava, _ = models
    scenes = scenes_of("image", 2)
    rows = [speller.row(scene.questions[0], image=True) for scene in scenes]
    stage = Joint(llava, speller, seed=0)
    prefix = stage.prefix_of(stage.projector(see(llava, pixels_of(scenes))[0]))
    part = chunk(rows, [0, 1], [NOWHERE, NOWHERE])
    hidden, _ = stage.decoder.rows(part.ids, prefix, part.image, part.asked)
    for i, (scene, row) in enumerate(zip(scenes, rows, strict=True)):
        placeholders = [speller.ids(IMAGE)[0]] * N_PATCHES
        ids = torch.tensor([speller.image_head + placeholders + row.ids])
        out = llava(input_ids=ids, pixel_values=pixels_of([scene]), attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(
            llava.lm_head(hidden[i, : len(row.ids)]), out[0, -len(row.ids) :], atol=2e-4, rtol=1e-3
        )


@pytest.mark.parametrize("modality", ["image", "text"])
def test_rows_are_the_prompts_of_the_benchmark(speller, modality: str) -> None:
    """Head, image and row, spelled apart, are the ids that the processor makes of the whole chat."""
    tokenizer, _ = build_tokenizers(speller.bpe)
    processor = build_processor(tokenizer)
    for scene in scenes_of(modality, 25):
        question = scene.questions[0]
        image = scene.image is not None
        text = prompt_text(question, image).strip().removesuffix(" ASSISTANT:")
        content = [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": [{"type": "image"}, *content] if image else content}]
        whole = processor.apply_chat_template(chat, add_generation_prompt=True)
        spelled = processor(images=scene.image, text=whole, return_tensors="pt")["input_ids"][0].tolist()
        row = speller.row(question, image)
        front = speller.image_head + [speller.ids(IMAGE)[0]] * N_PATCHES if image else []
        assert front + row.ids[:-2] == spelled
        assert row.ids[-2] == speller.ids(f" {LETTERS[question.answer]}")[0]
        assert row.asked == len(row.ids) - 3
        for end, choice in zip(row.ends, question.choices, strict=True):
            assert speller.bpe.decode(row.ids[: end + 1]).endswith(choice)


def test_support_is_where_the_hint_names_the_answer(speller) -> None:
    rng = np.random.default_rng(0)
    words = [name for name in icons() if len(speller.ids(f" {name}")) == 1]
    assert len(words) > 30
    for _ in range(30):
        question = lookup(rng, words, easy=0)
        row = speller.row(question, image=False)
        assert row.support
        for at in row.support:
            sentence = speller.bpe.decode(row.ids[: at + 1]).rpartition(".")[2]
            assert question.choices[question.answer] in sentence


def stages(models: tuple, speller, labeller) -> list:
    llava, clip = models
    return [
        Vision(llava, labeller, seed=1),
        Language(llava, speller, seed=1),
        Joint(llava, speller, seed=1),
        Companion(llava, clip, speller, seed=1),
    ]


def test_a_quiz_asks_for_the_words_that_answer(speller) -> None:
    scenes = scenes_of("image", 12)
    quizzes = [([(q, NOWHERE) for q in scene.questions], scene.facts) for scene in scenes]
    part = quiz_rows(quizzes, speller)
    assert torch.equal(part.ids[part.row, part.at + 1], part.word)
    turn = speller.ids(" ASSISTANT:")[-1]
    assert (part.ids[part.row, part.at][part.asked] == turn).all()
    keys = [speller.key(question) for scene in scenes for question in scene.questions]
    assert part.word[part.asked].tolist() == [key for key in keys if key >= 0]
    last = [speller.ids(f" {fact.removesuffix('.')}")[-1] for scene in scenes for fact in scene.facts]
    assert part.word[~part.asked].tolist() == last


@pytest.mark.parametrize("which", range(4))
def test_every_stage_reaches_all_that_it_trains(models, speller, labeller, which: int) -> None:
    stage = stages(models, speller, labeller)[which]
    loss, parts = stage.loss(0, 0.1)
    again, _ = stage.loss(0, 0.1)
    assert torch.equal(loss, again) and parts
    loss.backward()
    unreached = [
        f"{part}.{name}"
        for part, module in stage.trained.items()
        for name, p in module.named_parameters()
        if p.grad is None and "embeddings.position" not in name
    ]
    # The tower's own last norm belongs to the companion's joint space.
    assert [name for name in unreached if "post_layernorm" not in name] == []


def test_a_stage_goes_on_from_its_checkpoint(models, speller, tmp_path: Path) -> None:
    stage = Language(models[0], speller, seed=3)
    loop = Loop(stage, tmp_path, minutes=1, lr=1e-3, rank=0, ranks=1)
    loop.step, loop.used = 7, 12.0
    loop.store()
    kept = models[0].lm_head.weight.clone()
    with torch.no_grad():
        models[0].lm_head.weight.zero_()
    other = Loop(stage, tmp_path, minutes=1, lr=1e-3, rank=0, ranks=1)
    other.resume()
    assert (other.step, other.used) == (7, 12.0)
    assert torch.equal(models[0].lm_head.weight, kept)


def test_the_command_trains_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speller, labeller) -> None:
    """A budget of a moment: one step, a learning curve, a checkpoint folder that transformers loads."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    stored = {"bpe": speller.bpe.to_str(), "slots": labeller.slots}
    (tmp_path / "vocabulary.json").write_text(json.dumps(stored))
    export = tmp_path / "model"
    argv = ["train", "vision", "--minutes", "0.001", "--out", str(tmp_path), "--export", str(export)]
    monkeypatch.setattr("sys.argv", argv)
    threads = torch.get_num_threads()
    train.main()
    torch.set_num_threads(threads)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["stage"] == "vision"
    model = AutoModelForImageTextToText.from_pretrained(export)
    assert AutoProcessor.from_pretrained(export).tokenizer.convert_tokens_to_ids(IMAGE) == model.config.image_token_id


def test_a_stage_starts_from_an_exported_folder(models, speller, tmp_path: Path) -> None:
    llava, clip = models
    train.export(llava, clip, speller.bpe, tmp_path / "model", dtype=torch.float32)
    torch.manual_seed(1)
    other, other_clip = train.build_models(speller.bpe.get_vocab_size())
    assert not torch.equal(other.lm_head.weight, llava.lm_head.weight)
    train.begin_with(tmp_path / "model", train.modules_of(other, other_clip))
    for name, value in llava.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert torch.equal(other_clip.text_projection.weight, clip.text_projection.weight)
