"""DiagramQA: determinism, disjoint splits, no answer leaks from frequencies, and the frozen test split."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qapbench.tasks.diagramqa import draw, generate
from qapbench.tasks.diagramqa.families import FAMILIES
from qapbench.tasks.diagramqa.generate import build, image_families, sample, text_families
from qapbench.tasks.diagramqa.scene import Question, Scene

FROZEN = Path(generate.__file__).parent / "test.parquet"
SEED, IMAGES, TEXTS = 2026, 2400, 1200
ROWS = IMAGES + TEXTS


def key(scene: Scene, question: Question) -> int:
    pixels = scene.image.tobytes() if scene.image is not None else b""
    text = "|".join([question.question, question.hint, *sorted(question.choices)])
    return zlib.crc32(pixels + text.encode())


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample(5, i, "train", family=name) for name in FAMILIES for i in range(60)]


@pytest.fixture(scope="module")
def frozen() -> list[dict]:
    return pq.read_table(FROZEN).to_pylist()


def test_sample_depends_on_its_arguments_only() -> None:
    for index in range(40):
        first, again = sample(3, index), sample(3, index)
        assert first.questions == again.questions
        assert first.things == again.things
        assert first.facts == again.facts
        assert (first.image is None) == (again.image is None)
        if first.image is not None and again.image is not None:
            assert first.image.tobytes() == again.image.tobytes()


def test_other_seed_index_or_split_gives_other_scenes() -> None:
    def prints(seed: int, split: str, start: int) -> set[int]:
        made = [sample(seed, start + i, split, modality="image") for i in range(20)]
        return {zlib.crc32(s.image.tobytes()) for s in made if s.image is not None}

    sets = [prints(1, "train", 0), prints(2, "train", 0), prints(1, "train", 20), prints(1, "val", 0)]
    assert all(len(s) == 20 for s in sets)
    assert len(set.union(*sets)) == 80


@pytest.mark.parametrize("arguments", [{"split": "dev"}, {"family": "algebra"}, {"modality": "audio"}])
def test_unknown_arguments_are_rejected(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        sample(0, 0, **arguments)


def test_train_and_test_share_no_question() -> None:
    sets = {}
    for split in ("train", "val", "test"):
        made = [sample(0, i, split) for i in range(500)]
        sets[split] = {key(scene, q) for scene in made for q in scene.questions}
        assert len(sets[split]) > 1000
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["val"]
    assert not sets["val"] & sets["test"]


def test_frozen_text_questions_never_occur_in_training(frozen: list[dict]) -> None:
    held = {(r["question"], r["hint"], *sorted(r["choices"])) for r in frozen if r["image"] is None}
    for i in range(1500):
        for q in sample(0, i, "train", modality="text").questions:
            assert (q.question, q.hint, *sorted(q.choices)) not in held


def test_questions_are_well_formed(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.questions
        for q in scene.questions:
            assert 2 <= len(q.choices) <= 5
            assert len(set(q.choices)) == len(q.choices)
            assert 0 <= q.answer < len(q.choices)
            assert len(q.question.split()) < 25
            assert len(q.hint.split()) < 40
            assert q.subject in ("natural science", "social science", "language science")
            assert 1 <= int(q.grade.removeprefix("grade")) <= 12
            assert FAMILIES[q.family].modality == ("text" if scene.image is None else "image")


def test_boxes_lie_inside_the_image(scenes: list[Scene]) -> None:
    for scene in scenes:
        boxes = [thing.box for thing in scene.things]
        for q in scene.questions:
            # Every image question says where to look, and no text-only question does.
            assert bool(q.relevant) == (scene.image is not None)
            boxes += q.relevant
        if scene.image is not None:
            assert scene.image.size == (draw.SIDE, draw.SIDE)
            assert scene.image.mode == "RGB"
            assert scene.things
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= draw.SIDE
            assert 0 <= y0 < y1 <= draw.SIDE


def test_relevant_boxes_hold_something_that_was_drawn(scenes: list[Scene]) -> None:
    for scene in scenes:
        if scene.image is None:
            continue
        pixels = np.asarray(scene.image)
        for q in scene.questions:
            for x0, y0, x1, y1 in q.relevant:
                assert (pixels[y0:y1, x0:x1] != pixels[y0, x0]).any(), "the box has one colour"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_answer_positions_are_uniform(name: str) -> None:
    observed: Counter[tuple[int, int]] = Counter()
    for i in range(200):
        for q in sample(9, i, family=name).questions:
            observed[len(q.choices), q.answer] += 1
    for k in {k for k, _ in observed}:
        counts = np.array([observed[k, a] for a in range(k)])
        expected = counts.sum() / k
        if expected >= 20:
            # 20 is far beyond the 99.9 % quantile of chi-square with at most 4 degrees of freedom.
            assert ((counts - expected) ** 2 / expected).sum() < 20


@pytest.mark.parametrize("name", image_families())
def test_frequencies_do_not_answer_image_questions(name: str) -> None:
    """A guesser that knows how often each choice is right gains next to nothing without the image."""
    seen: Counter[tuple] = Counter()
    right: Counter[tuple] = Counter()
    for i in range(400):
        for q in sample(11, i, family=name).questions:
            for k, choice in enumerate(q.choices):
                seen[q.topic, len(q.choices), choice] += 1
                right[q.topic, len(q.choices), choice] += k == q.answer
    hits, chance, total = 0, 0.0, 0
    for i in range(400):
        for q in sample(12, i, family=name).questions:
            keys = [(q.topic, len(q.choices), choice) for choice in q.choices]
            rates = [(right[x] + 1) / (seen[x] + len(keys)) for x in keys]
            hits += int(np.argmax(rates)) == q.answer
            chance += 1 / len(keys)
            total += 1
    # Questions of one scene are correlated, so the margin is wider than for independent ones.
    assert hits / total < chance / total + 0.06


def test_families_cover_both_modalities_and_all_subjects() -> None:
    assert len(image_families()) >= 10
    assert len(text_families()) >= 8
    assert not set(image_families()) & set(text_families())
    assert {f.subject for f in FAMILIES.values()} == {
        "natural science",
        "social science",
        "language science",
    }


def test_magnet_answers_follow_from_the_poles() -> None:
    verbs = set()
    for i in range(60):
        scene = sample(4, i, family="magnets")
        for q in scene.questions:
            if q.topic != "attract or repel":
                continue
            # The red half is the north pole: read the colours, not the generator's own labels.
            reds = []
            for x0, y0, x1, y1 in q.relevant:
                area = np.asarray(scene.image)[y0:y1, x0:x1].reshape(-1, 3).astype(int)
                reds.append(bool(np.median(area[:, 0]) > np.median(area[:, 2])))
            verb = "repel" if reds[0] == reds[1] else "attract"
            assert q.choices[q.answer] == verb
            verbs.add(verb)
    assert verbs == {"attract", "repel"}


def test_tallest_bar_is_the_tallest_box() -> None:
    checked = 0
    for i in range(60):
        scene = sample(4, i, family="chart")
        bars = {t.name: t.box[3] - t.box[1] for t in scene.things if t.name.endswith(" bar")}
        for q in scene.questions:
            if q.question == "What color is the tallest bar?":
                assert f"{q.choices[q.answer]} bar" == max(bars, key=lambda name: bars[name])
                checked += 1
    assert checked > 10


def test_held_out_icons_appear_in_their_split_only() -> None:
    held = set(draw.icons(held_out=True))
    assert 0.1 < len(held) / len(draw.index()) < 0.2
    for split in ("train", "test"):
        for i in range(300):
            scene = sample(6, i, split, modality="image")
            assert not held & {thing.name for thing in scene.things}
            assert not held & {choice for q in scene.questions for choice in q.choices}
    decorated = 0
    for i in range(60):
        scene = sample(6, i, "heldout", modality="image")
        decorated += bool(held & {thing.name for thing in scene.things})
        assert not held & {choice for q in scene.questions for choice in q.choices}
    assert decorated > 20


def test_frozen_split_has_the_documented_columns_and_shares(frozen: list[dict]) -> None:
    assert pq.read_schema(FROZEN).names == [
        "pid",
        "image",
        "question",
        "choices",
        "answer",
        "hint",
        "subject",
        "grade",
        "topic",
        "family",
    ]
    assert pq.read_schema(FROZEN).remove_metadata().equals(generate.schema())
    assert len(frozen) == ROWS
    assert len({r["pid"] for r in frozen}) == ROWS
    images = [r for r in frozen if r["image"] is not None]
    assert len(images) == IMAGES
    assert max(Counter(r["image"]["path"] for r in images).values()) == 2
    assert 0.4 < np.mean([r["hint"] != "" for r in images]) < 0.65
    texts = [r for r in frozen if r["image"] is None]
    assert 0.3 < np.mean([r["hint"] != "" for r in texts]) < 0.7
    assert {r["family"] for r in frozen} == set(FAMILIES)
    older = np.mean([int(r["grade"].removeprefix("grade")) >= 7 for r in frozen])
    assert 0.25 < older < 0.75
    shares = Counter(r["subject"] for r in frozen)
    assert min(shares.values()) > 0.12 * ROWS
    held = set(draw.icons(held_out=True))
    assert not held & {choice for r in images for choice in r["choices"]}


@pytest.mark.parametrize("n", [100, 400, 1000])
def test_every_beginning_of_the_frozen_split_is_stratified(frozen: list[dict], n: int) -> None:
    whole = Counter(r["family"] for r in frozen)
    for name, count in Counter(r["family"] for r in frozen[:n]).items():
        assert abs(count - whole[name] * n / ROWS) <= 1


def test_frozen_rows_can_be_made_again(frozen: list[dict]) -> None:
    made = build("test", SEED, 30, 30).to_dict("records")
    compared = 0
    same_pillow = pq.read_schema(FROZEN).metadata[b"pillow"].decode() == PIL.__version__
    stored = {r["pid"]: r for r in frozen}
    for row in made:
        if row["pid"] not in stored:  # the last image may have given one question here and two there
            continue
        old = stored[row["pid"]]
        assert {k: row[k] for k in row if k != "image"} == {k: old[k] for k in old if k != "image"}
        if row["image"] is None:
            assert old["image"] is None
            continue
        new_pixels, old_pixels = (
            np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])), dtype=int) for r in (row, old)
        )
        assert new_pixels.shape == old_pixels.shape == (draw.SIDE, draw.SIDE, 3)
        if same_pillow:
            assert (new_pixels == old_pixels).all()
        else:
            # Another Pillow may smooth letters and icons a little differently.
            assert np.abs(new_pixels - old_pixels).mean() < 2
        compared += 1
    assert compared >= 20
