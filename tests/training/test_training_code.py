"""The training code: its forward pass is the model's own, its rows are the benchmark's prompts, stages resume."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from qapbench.analysis.drawing import GAP, MARGIN, PANEL
from qapbench.tasks.diagramqa.draw import icons
from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Question
from training import kept, train
from training.companion import Companion
from training.curriculum import lookup
from training.decoder import Hints, order_losses
from training.joint import Joint, Reading
from training.labels import covered
from training.language import NOWHERE, Language
from training.loop import Loop
from training.model import IMAGE, N_PATCHES, PATCHES_SEEN, build_processor, build_tokenizers
from training.reading import Symbols, named, quiz_rows, show, text_quiz
from training.rows import LETTERS, chunk, prompt_text
from training.vision import Seeing, Vision, pixels_of

pytestmark = pytest.mark.usefixtures("one_thread")


def scenes_of(modality: str, count: int) -> list:
    return [sample(5, i, "train", modality=modality) for i in range(count)]


def test_the_forward_pass_is_that_of_transformers(models: tuple, speller) -> None:
    llava, _ = models
    scenes = scenes_of("image", 2)
    rows = [speller.row(scene.questions[0], image=True) for scene in scenes]
    stage = Joint(llava, speller, seed=0)
    everything = torch.arange(N_PATCHES).expand(2, -1)
    prefix = stage.prefix_of(stage.patches(scenes, everything), everything)
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


def test_a_sentence_ends_where_its_number_is_and_is_about_what_it_begins_to_differ_in(speller) -> None:
    for family in ("compare", "economy"):
        for scene in (sample(5, i, "train", family=family) for i in range(10)):
            for question in scene.questions:
                row = speller.row(question, image=False)
                pairs = [(speller.bpe.id_to_token(row.ids[end]), row.ids[about]) for end, about in row.told]
                sentences = question.hint.removesuffix(".").split(". ")
                assert len(pairs) == len(sentences) == 2
                for (digit, about), sentence, other in zip(pairs, sentences, sentences[::-1], strict=True):
                    assert f" {digit}0" in sentence
                    words = zip(speller.ids(f" {sentence}"), speller.ids(f" {other}"), strict=False)
                    assert about == next(mine for mine, theirs in words if mine != theirs)
                key = speller.key(question)
                naming = [key in speller.ids(f" {sentence}") for sentence in sentences]
                assert row.support == [end for (end, _), names in zip(row.told, naming, strict=True) if names]


def test_genes_are_looked_up_where_their_trait_is_told(speller) -> None:
    hint = "Gene D gives a sheep the tail length short. Gene d gives curly. D is dominant."
    for text, choices, answer, told in (
        ("A sheep has the genes dd. What is its tail length?", ["short", "curly"], 1, " curly"),
        ("Which genes give a sheep the tail length curly?", ["DD", "dd"], 1, " curly"),
        ("Which gene gives the tail length short?", ["D", "d"], 0, " short"),
    ):
        row = speller.row(Question(text, hint, choices, answer, "traits", "", "", ""), image=False)
        assert [row.ids[at] for at in row.support] == [speller.ids(told)[-1]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_order_of_words_is_judged_by_pairs(sign: float) -> None:
    place = torch.rand(20, dtype=torch.float64).float()
    hints = Hints(8)
    hints.aux_place.weight.data.zero_()[0, 0] = sign
    decoder = SimpleNamespace(early=lambda ids: ids[..., None] * torch.eye(8)[0])
    found = order_losses(decoder, hints, place[None], torch.zeros(20, dtype=torch.long), torch.arange(20), place)
    assert float(found["ordered"]) == (sign > 0)
    assert (float(found["order"]) < math.log(2)) == (sign > 0)


def stages(models: tuple, speller, labeller) -> list:
    """Every stage, as the first of 32 processes that share a batch."""
    llava, clip = models
    words = llava.get_input_embeddings().weight.detach()
    share = {"seed": 1, "rank": 0, "ranks": 32}
    return [
        Vision(llava, labeller, **share),
        Language(llava, speller, **share),
        Reading(llava, speller, labeller, **share),
        Seeing(llava, labeller, Symbols(labeller, speller, words, 0), **share),
        Joint(llava, speller, **share),
        Companion(llava, clip, speller, **share),
    ]


def test_some_patches_stand_where_they_stood(models: tuple, speller, labeller) -> None:
    """A prefix of some patches keeps their positions: with the others masked, all patches give the same."""
    stage = Reading(models[0], speller, labeller, seed=0)
    scenes = scenes_of("image", 1)
    chosen = torch.tensor([[3, 40, 41, 143]])
    ids = torch.tensor([speller.row(scenes[0].questions[0], image=True).ids])
    some = stage.prefix_of(stage.patches(scenes, chosen), chosen)
    whole = stage.prefix_of(stage.patches(scenes, torch.arange(N_PATCHES)[None]), torch.arange(N_PATCHES)[None])
    head = len(speller.image_head)
    kept = torch.cat([torch.arange(head), chosen[0] + head])
    for key, all_keys in zip(some.keys[:1], whole.keys[:1], strict=True):  # deeper ones have seen the others
        torch.testing.assert_close(key, all_keys[:, :, kept], atol=1e-5, rtol=1e-4)
    assert some.span == whole.span == head + N_PATCHES
    hidden, _ = stage.decoder.rows(ids, some, torch.tensor([0]), torch.tensor([ids.shape[1] - 1]))
    assert torch.isfinite(hidden).all()


def test_words_name_the_patches_of_what_they_are_true_of(speller) -> None:
    rng = np.random.default_rng(0)
    met = 0
    for scene in (sample(5, i, "train", family="position") for i in range(6)):
        shown = show(scene, speller, rng, 24)
        assert len(shown.patches.unique()) == 24 and (shown.patches.diff() > 0).all()
        for question in scene.questions:
            row = speller.row(question, image=True)
            asked = speller.bpe.decode(row.ids[row.question.start : row.question.stop]).strip()
            assert asked == question.question
            for at, marks in named(row.ids[: row.question.stop], shown.values, row.question.start):
                words = speller.bpe.decode(row.ids[: at + 1])
                true = [t for t in scene.things if words.endswith((t.name, *t.about.values()))]
                boxes = torch.stack([covered([thing.box]) > PATCHES_SEEN for thing in true]).any(0)
                assert marks.any() and boxes[shown.patches[marks]].all()
                met += 1
    assert met > 10


def test_a_quiz_asks_for_the_words_that_answer(speller) -> None:
    scenes = scenes_of("image", 12)
    rng = np.random.default_rng(0)
    part = quiz_rows([(show(scene, speller, rng, 24), scene.questions, scene.facts) for scene in scenes], speller)
    assert torch.equal(part.ids[part.row, part.at + 1], part.word)
    turn = speller.ids(" ASSISTANT:")[-1]
    assert (part.ids[part.row, part.at][part.asked] == turn).all()
    keys = [speller.key(question) for scene in scenes for question in scene.questions]
    assert part.word[part.asked].tolist() == [key for key in keys if key >= 0]
    last = [speller.ids(f" {fact.removesuffix('.')}")[-1] for scene in scenes for fact in scene.facts]
    assert part.word[~part.asked].tolist() == last
    assert not (part.patches.any(1) & part.support.any(1)).any()
    assert (part.patches.any(1) | part.support.any(1))[part.asked].float().mean() > 0.9


def test_a_text_quiz_asks_for_the_words_that_answer(speller) -> None:
    questions = [scene.questions[0] for scene in scenes_of("text", 10)]
    part = text_quiz(questions, speller)
    asked = [question for question in questions if speller.key(question) >= 0]
    assert torch.equal(part.ids[part.row, part.at + 1], part.word)
    assert part.word.tolist() == [speller.key(question) for question in asked]
    assert part.family == [question.family for question in asked]
    assert part.support.any(1).all() and not part.support[torch.arange(len(asked)), part.at].any()


def test_every_stage_reaches_all_that_it_trains(models, speller, labeller) -> None:
    for stage in stages(models, speller, labeller):
        for module in stage.trained.values():
            module.zero_grad()
        loss, parts = stage.loss(0, 0.1)
        if isinstance(stage, Language):
            stage.hints.pace.zero_()  # what was right decides what is asked next
        again, _ = stage.loss(0, 0.1)
        assert torch.equal(loss, again) and parts, stage
        loss.backward()
        unreached = [
            f"{part}.{name}"
            for part, module in stage.trained.items()
            for name, p in module.named_parameters()
            if p.grad is None and "embeddings.position" not in name
        ]
        # The tower's own last norm belongs to the companion's joint space.
        assert [name for name in unreached if "post_layernorm" not in name] == [], stage


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


def test_a_sheet_shows_what_is_kept_of_each_family(tmp_path: Path) -> None:
    frame = pd.read_parquet("tasks/diagramqa/test.parquet")
    frame[frame.family.isin(["identify", "map"])].to_parquet(tmp_path / "two.parquet")
    page = kept.sheet("table2_w4a4", tmp_path / "two.parquet")
    lefts = [MARGIN + i * (PANEL + GAP) for i in range(3)]
    panels = [page.crop((left, MARGIN, left + PANEL, MARGIN + PANEL)) for left in lefts]
    colours = [len(panel.getcolors(1 << 20)) for panel in panels]
    assert min(colours[:2]) > 50 and colours[2] == 1  # two pictures, and nothing where there is no third family
