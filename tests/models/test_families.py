"""Every family from a checkpoint folder: what compression must not change, budgets, positions, what is recorded."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checkpoints import PICTURE, PROCESSORS, SIZES, picture_of, save_family
from llava_checkpoints import save_clip

from benchmarks.cost import drops_fit
from qapbench import DecoderPruner, RunSpec, UserError, compress, pruners
from qapbench.methods.tokens import per_token
from qapbench.models import family_of
from qapbench.models.family import families
from qapbench.models.loading import load_model
from qapbench.models.relevance import QuestionReader
from qapbench.models.unread import UnreadWeight, narrow
from qapbench.prune.splice import PrunedImage

pytestmark = pytest.mark.usefixtures("one_thread")
each_family = pytest.mark.parametrize("loaded", sorted(PROCESSORS), indirect=True)
# Every pruner on two of the families: `qapbench list --matrix`, and its test, have all pairs.
STEP = max(len(PROCESSORS) // 2, 1)
each_method_on_two = pytest.mark.parametrize(
    "method, loaded",
    [
        (method, family)
        for at, method in enumerate(pruners.names())
        for place, family in enumerate(sorted(PROCESSORS))
        if (at + place) % STEP == 0
    ],
    indirect=["loaded"],
)
KEEP = 3
M_ROPE = ("qwen2_5_vl", "qwen3_5", "qwen3_vl")  # families whose positions have three dimensions
MASKED = ("idefics3", "smolvlm")  # families that take a mask of pixels, or none
HOLDS = {"llava_next": True, "llava_onevision": True}  # families with new-line tokens


@dataclasses.dataclass
class Loaded:
    name: str
    model: Any
    processor: Any

    def ask(self, questions: list[tuple[str, list[int]]]) -> dict[str, Any]:
        """Inputs of questions, each with pictures by their number, marked by # in the text."""
        texts = [text.replace("#", PICTURE.get(self.name, "<image>")) for text, _ in questions]
        images = [picture_of(SIZES[number], number) for _, numbers in questions for number in numbers]
        if self.name == "gemma3":  # its processor wants to be told which images belong to which text
            images = [[picture_of(SIZES[at], at) for at in numbers] for _, numbers in questions] if images else []
        return dict(self.processor(text=texts, images=images or None, return_tensors="pt", padding=True))

    @property
    def one(self) -> dict[str, Any]:
        return self.ask([("USER: #\nWhat is this? ASSISTANT:", [2])])

    @property
    def mixed(self) -> dict[str, Any]:
        return self.ask(MIXED)


MIXED = [
    ("USER: #\nWhat is this? ASSISTANT:", [0]),
    ("USER: Where does the red fox live? ASSISTANT:", []),
    ("USER: #\nWhere does # the red fox live? ASSISTANT:", [2, 1]),
    ("USER: #\nA. cat B. dog ASSISTANT:", [3]),
]
ASKED = ["What is this?", "Where?", "Where does the red fox live?", "cat dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    found = {}
    for name in PROCESSORS:
        folder = save_family(name, tmp_path_factory.mktemp(name))
        spec = RunSpec.parse({"model": str(folder), "task": "diagramqa"})
        found[name] = Loaded(name, *load_model(spec, torch.device("cpu")))
    return found


@pytest.fixture
def loaded(request: Any, folders: dict[str, Loaded]) -> Loaded:
    return folders[request.param]


def prune(method: str = "attention", keep: int = KEEP, **more: Any) -> dict[str, Any]:
    return {"prune": {"method": method, "keep": keep, **more}}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return model(**inputs, **more).logits


@torch.no_grad()
def written(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **more)


def refused(loaded: Loaded, method: str) -> bool:
    """Whether a pruner reads a field that the family does not offer; if it does, that it is refused with a sentence."""
    pruner = pruners.create(method)
    lacking = set() if isinstance(pruner, DecoderPruner) else pruner.needs - pruner.optional
    lacking -= family_of(loaded.model).available_fields | QuestionReader.FIELDS
    if not drops_fit(family_of(loaded.model), pruner, KEEP):
        with pytest.raises(UserError, match="linear attention"), compress(loaded.model, prune(method)):
            logits(loaded.model, loaded.one)
        return True
    if lacking:
        with pytest.raises(UserError, match=f"{method} needs .*, which this model does not offer"):
            compress(loaded.model, prune(method)).__enter__()
    return bool(lacking)


def test_every_family_is_tested_from_a_folder() -> None:
    assert set(PROCESSORS) | {"llava"} == set(families.names())


@each_family
def test_an_empty_spec_is_the_hugging_face_path(loaded: Loaded) -> None:
    inputs = loaded.mixed
    plain, text = logits(loaded.model, inputs), written(loaded.model, inputs)
    with compress(loaded.model, {}):
        assert torch.equal(logits(loaded.model, inputs), plain)
        assert torch.equal(written(loaded.model, inputs), text)
    assert torch.equal(logits(loaded.model, inputs), plain)


@each_family
def test_matrices_in_16_bits_compute_the_same_bits(loaded: Loaded) -> None:
    model = copy.deepcopy(loaded.model)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    inputs = loaded.mixed
    plain, text = logits(model, inputs), written(model, inputs)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    narrow(model)
    held = [weight for weight in model.parameters() if isinstance(weight, UnreadWeight)]
    assert len(held) > 10 and all(weight.held_bytes == 2 * weight.numel() for weight in held)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(written(model, inputs), text)


@each_method_on_two
def test_keeping_everything_changes_nothing(method: str, loaded: Loaded) -> None:
    """Also what pruners see is complete: their tokens, put together again, are the model's own."""
    if refused(loaded, method):
        return
    inputs, mixed = loaded.one, loaded.mixed
    plain, text, batch = logits(loaded.model, inputs), written(loaded.model, inputs), logits(loaded.model, mixed)
    with compress(loaded.model, prune(method, 10_000, per="image")):
        assert torch.equal(logits(loaded.model, mixed), batch)
    with compress(loaded.model, prune(method, 10_000, per="image")) as receipt:
        assert torch.equal(logits(loaded.model, inputs), plain)
        assert torch.equal(written(loaded.model, inputs), text)
    tokens = receipt.tokens
    assert (
        tokens["mean"] + tokens.get("separators", 0)
        == (inputs["input_ids"] == loaded.model.config.image_token_id).sum()
    )


@each_method_on_two
def test_every_pruner_in_a_batch_with_padding_and_several_images(method: str, loaded: Loaded) -> None:
    if refused(loaded, method):
        return
    inputs = loaded.mixed
    kept: list[list[PrunedImage]] = []
    with compress(loaded.model, prune(method, sensitivity="combined"), on_images=kept.append) as receipt:
        out = written(loaded.model, inputs, relevance_text=ASKED)
        last = logits(loaded.model, inputs, relevance_text=ASKED)[:, -1]
    longest = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :longest], inputs["input_ids"])
    assert out.shape[1] <= longest + 5
    assert torch.isfinite(last).all()
    seen = family_of(loaded.model).encode_images(inputs, frozenset())
    views = [sum(group.owners.count(image) for group in seen.views) for image in range(4)]
    assert len(kept) == 2
    pruner = pruners.create(method)
    left = 0 if isinstance(pruner, DecoderPruner) and pruner.counts == "mean" else KEEP
    for images in kept:
        assert [len(image.indices) + image.merged for image in images] == [left * count for count in views]
    assert receipt.tokens["images"] == 8
    assert receipt.tokens["mean"] == (left * sum(views) / 4 or receipt.tokens["layer_mean"])


@each_family
@pytest.mark.parametrize("spec", [prune("cdpruner", sensitivity="combined"), prune("visionzip", 4), prune("divprune")])
def test_a_batch_answers_as_its_rows_alone(spec: dict[str, Any], loaded: Loaded) -> None:
    inputs = loaded.mixed
    start, asked = inputs["input_ids"].shape[1], iter(ASKED)
    with compress(loaded.model, spec):
        together = written(loaded.model, inputs, relevance_text=ASKED)[:, start:]
        for row, question in enumerate(MIXED):
            alone = loaded.ask([question])
            more = {"relevance_text": [next(asked) for _ in question[1]]} if question[1] else {}
            single = written(loaded.model, alone, **more)[:, alone["input_ids"].shape[1] :]
            width = min(single.shape[1], together.shape[1])
            assert torch.equal(together[row, :width], single[0, :width])


@each_family
def test_a_budget_of_the_whole_image(loaded: Loaded) -> None:
    """Split over its views in proportion, exactly; an image that has fewer keeps them all."""
    inputs = loaded.mixed
    kept: list[list[PrunedImage]] = []
    for keep in (1, 7, 20):
        with compress(loaded.model, prune("attention", keep, per="image"), on_images=kept.append):
            logits(loaded.model, inputs)
        assert [len(image.indices) for image in kept[-1]] == [min(keep, image.available) for image in kept[-1]]
    assert [len(images) for images in kept] == [4, 4, 4]


@each_family
@pytest.mark.parametrize("positions", ["compact", "keep"])
def test_pruned_logits_equal_spliced_embeddings(positions: str, loaded: Loaded) -> None:
    """The oracle: Hugging Face's own embeddings and positions with the dropped columns taken out by hand."""
    model, inputs = loaded.model, loaded.one
    kept: list[list[PrunedImage]] = []
    with compress(model, prune("attention", positions=positions), on_images=kept.append):
        pruned = logits(model, inputs)
    ((image,),) = kept
    caught: dict[str, Any] = {}
    language = family_of(model).parts["language"]
    handle = language.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True)
    logits(model, inputs)
    handle.remove()
    spot = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stays[spot] = False
    stays[spot[image.places]] = True
    if loaded.name in M_ROPE:  # three dimensions, which are kept in either case
        where = caught["position_ids"][-3:, :, stays]
        assert where[1].unique().numel() < where.shape[-1], "height repeats along a row"
    else:
        where = (stays.nonzero()[:, 0] if positions == "keep" else torch.arange(int(stays.sum())))[None]
    more: dict[str, Any] = {"attention_mask": torch.ones(1, int(stays.sum()), dtype=torch.long)}
    if isinstance(
        caught["attention_mask"], dict
    ):  # one mask per kind of layer, in which an image's tokens see each other
        masks = {kind: mask[:, :, stays][..., stays] for kind, mask in caught["attention_mask"].items()}
        assert all(bool((mask.triu(1) > 0).any()) for mask in masks.values())
        more["attention_mask"] = masks
    if "deepstack_visual_embeds" in caught:  # added behind the first layers, cut by the same index
        more["visual_pos_masks"] = caught["visual_pos_masks"][:, stays]
        more["deepstack_visual_embeds"] = [level[image.places] for level in caught["deepstack_visual_embeds"]]
        assert len(more["deepstack_visual_embeds"]) == 2
    with torch.no_grad():
        hidden = language(
            **more,
            inputs_embeds=caught["inputs_embeds"][:, stays],
            position_ids=where,
        ).last_hidden_state
        torch.testing.assert_close(pruned, model.lm_head(hidden), rtol=1e-4, atol=1e-4)


@each_family
def test_the_best_of_every_view_are_kept(loaded: Loaded) -> None:
    """Which places are kept, found here one view at a time from what the family records."""
    inputs = loaded.ask([("USER: #\nWhere does # fox live? ASSISTANT:", [2, 0])])
    seen = family_of(loaded.model).encode_images(inputs, frozenset({"cls_attention"}))
    expected: list[list[int]] = [[], []]
    for group in seen.views:
        assert group.tokens.cls_attention is not None
        for scores, places, owner in zip(group.tokens.cls_attention, group.places, group.owners, strict=True):
            expected[owner] += places[scores.topk(KEEP).indices].tolist()
    kept: list[list[PrunedImage]] = []
    with compress(loaded.model, prune("attention"), on_images=kept.append):
        logits(loaded.model, inputs)
    assert [image.indices.tolist() for image in kept[-1]] == [sorted(places) for places in expected]


@each_family
def test_views_hold_every_token_once_and_project_to_it(loaded: Loaded) -> None:
    """Places, raster order and the projector's input agree with the features that the model itself makes."""
    inputs, family = loaded.mixed, family_of(loaded.model)
    seen = family.encode_images(inputs, family.available_fields)
    places: list[list[int]] = [[] for _ in seen.images]
    for group in seen.views:
        grid = group.tokens.grid
        assert grid is not None
        assert grid[0] * grid[1] == group.tokens.count
        assert group.tokens.patches is not None
        torch.testing.assert_close(family.project(group.tokens.patches), group.tokens.projected)
        for projected, where, owner in zip(group.tokens.projected, group.places, group.owners, strict=True):
            assert torch.equal(seen.images[owner].features[where, : projected.shape[-1]], projected)
            places[owner] += where.tolist()
            columns = where.view(grid)
            assert (columns.diff(dim=0) > 0).all(), "rows run downwards"
            assert (columns.diff(dim=1) == 1).all(), "and along the row one by one"
    for image, found in zip(seen.images, places, strict=True):
        whole = torch.arange(len(image.features))
        expected = whole if image.separators is None else whole[~image.separators]
        assert sorted(found) == expected.tolist()
    recorded = {name for name in per_token() if getattr(seen.views[0].tokens, name) is not None}
    elsewhere = {"cls_token", "downsampled"}  # one per view, not per token
    assert recorded | {"grid", "image_ids"} == family.available_fields - elsewhere | {"projected"}


@pytest.mark.parametrize("loaded", sorted(set(PROCESSORS) - set(HOLDS)), indirect=True)
def test_an_image_at_a_lower_size(loaded: Loaded) -> None:
    """At its own size it is what the model makes of it; each view is scaled by itself, whatever else is in the call."""
    inputs, family = loaded.mixed, family_of(loaded.model)
    seen = family.encode_images(inputs, frozenset())
    for views in seen.views:
        with torch.no_grad():
            whole = family.downsampled(inputs, views.tokens.count, views)
            small = family.downsampled(inputs, 6, views)
        assert whole.shape[2:] == views.tokens.grid
        torch.testing.assert_close(whole.flatten(2).mT, views.tokens.projected, rtol=1e-4, atol=1e-5)
        assert small.shape[2] * small.shape[3] >= 6 > (small.shape[2] - 1) * (small.shape[3] - 1)
        assert small.shape[0] == views.tokens.batch
    kept: list[list[PrunedImage]] = []
    with compress(loaded.model, prune("downsample", 4), on_images=kept.append):
        out = written(loaded.model, inputs)
    counts = [sum(group.owners.count(image) for group in seen.views) for image in range(4)]
    assert [len(image.places) for image in kept[0]] == [4 * count for count in counts]
    assert out.shape[0] == 4


@pytest.mark.parametrize("loaded", sorted(HOLDS), indirect=True)
def test_a_new_line_stays_while_its_row_lives(loaded: Loaded) -> None:
    """Two tiles side by side: 16 tokens of the whole, then four lines of 8 and a new line each."""
    inputs = loaded.ask([("USER: #\nWhat? ASSISTANT:", [0])])
    kept: list[list[PrunedImage]] = []
    for keep in (1, 2, 4, 16):
        with compress(loaded.model, prune("attention", keep), on_images=kept.append):
            logits(loaded.model, inputs)
        (image,) = kept[-1]
        lines = {(place - 16) // 9 for place in image.indices.tolist() if place >= 16}
        assert image.separators == len(lines)
        expected = sorted(image.indices.tolist() + [16 + 9 * line + 8 for line in lines])
        assert image.places.tolist() == expected


def test_padding_has_no_views(folders: dict[str, Loaded]) -> None:
    """34 x 50 fills 43.5 x 64 of a canvas of 64 x 64 pixels: a line of patches goes above, and one below."""
    loaded = folders["llava_next"]
    seen = family_of(loaded.model).encode_images(loaded.one, frozenset())
    grids = sorted(group.tokens.grid for group in seen.views for _ in group.owners if group.tokens.grid)
    assert grids == [(3, 4)] * 4 + [(4, 4)]


def test_shrunk_patches_belong_to_the_tile_of_their_centre(folders: dict[str, Loaded], tmp_path: Path) -> None:
    """anyres_max_1 shrinks 6 x 8 patches of the tiles to at most 16."""
    loaded = folders["llava_onevision"]
    model, processor = loaded.model, loaded.processor
    before = model.config.vision_aspect_ratio, processor.vision_aspect_ratio
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_1"
    try:
        inputs, family = loaded.one, family_of(model)
        seen = family.encode_images(inputs, frozenset({"keys", "cls_attention", "patches", "image_ids"}))
        plain = logits(model, inputs)
        with compress(model, prune("visionzip", 10_000, per="image")):
            assert torch.equal(logits(model, inputs), plain)
        with compress(model, prune("vispruner", 2)) as receipt:
            assert torch.isfinite(logits(model, inputs)).all()
    finally:
        model.config.vision_aspect_ratio, processor.vision_aspect_ratio = before
    (image,) = seen.images
    assert image.count == 16 + 3 * 4
    assert sorted(group.tokens.grid for group in seen.views for _ in group.owners if group.tokens.grid) == [
        (1, 2),
        (1, 2),
        (2, 2),
        (2, 2),
        (4, 4),
    ]
    places = torch.cat([group.places.flatten() for group in seen.views]).sort().values
    assert image.separators is not None
    assert torch.equal(places, (~image.separators).nonzero()[:, 0])
    assert receipt.tokens["mean"] == 5 * 2


def test_one_image_among_several_is_a_single_view(folders: dict[str, Loaded]) -> None:
    """OneVision cuts no tiles where a prompt has several images and the processor is told so."""
    loaded = folders["llava_onevision"]
    images = [[picture_of(SIZES[0], 0), picture_of(SIZES[2], 2)]]
    text = ["USER: <image>\nWhere does <image> live? ASSISTANT:"]
    inputs = dict(loaded.processor(text=text, images=images, return_tensors="pt", padding=True))
    plain = logits(loaded.model, inputs)
    with compress(loaded.model, prune("random", 16)):
        assert torch.equal(logits(loaded.model, inputs), plain)
    kept: list[list[PrunedImage]] = []
    with compress(loaded.model, prune("hiprune"), on_images=kept.append):
        logits(loaded.model, inputs)
    assert [(len(i.indices), i.separators, i.available) for i in kept[-1]] == [(KEEP, 1, 16)] * 2
    assert all(image.places.tolist()[-1] == 16 for image in kept[-1])


@pytest.mark.parametrize("loaded", MASKED, indirect=True)
def test_tiles_are_told_apart_by_their_image(loaded: Loaded) -> None:
    """Images side by side, with text between them, and in several rows: two or four tiles and the image scaled down."""
    inputs = loaded.ask([("USER: ##\nWhat? # ASSISTANT:", [0, 3, 1]), ("USER: # ASSISTANT:", [0])])
    images = family_of(loaded.model).encode_images(inputs, frozenset()).images
    assert [image.count // 16 for image in images] == [3, 5, 3, 3]
    relevance = ["one", "two", "three", "four"]
    with compress(loaded.model, prune("cdpruner", 20, per="image"), loaded.processor) as receipt:
        logits(loaded.model, inputs, relevance_text=relevance)
    assert (receipt.tokens["images"], receipt.tokens["min"], receipt.tokens["max"]) == (4, 20, 20)


@pytest.mark.parametrize("loaded", MASKED, indirect=True)
def test_attention_of_shuffled_patches_is_their_mean(loaded: Loaded) -> None:
    """The tower's own eager attention, averaged over the 2 x 2 patches of a token."""
    inputs, tower = loaded.one, loaded.model.model.vision_model
    seen = family_of(loaded.model).encode_images(inputs, frozenset({"attention_received", "keys", "cls_attention"}))
    states: dict[str, torch.Tensor] = {}
    attention = tower.encoder.layers[-1].self_attn
    handles = [
        getattr(attention, name).register_forward_hook(lambda _, args, out, name=name: states.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    logits(loaded.model, inputs)
    for handle in handles:
        handle.remove()
    query, key = (states[name].unflatten(-1, (4, 8)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    rows = (query @ key.mT / 8**0.5).softmax(dim=-1).mean(dim=(1, 2)).view(-1, 8, 8)
    keys = states["k_proj"].unflatten(1, (8, 8))
    tokens = seen.views[0].tokens
    assert tokens.attention_received is not None
    assert tokens.keys is not None
    for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
        corner = (slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        found = tokens.attention_received[:, 4 * row + column]
        torch.testing.assert_close(found, rows[corner].mean(dim=(1, 2)))
        torch.testing.assert_close(tokens.keys[:, 4 * row + column], keys[corner].mean(dim=(1, 2)))
    assert torch.equal(tokens.cls_attention, tokens.attention_received)  # type: ignore[arg-type]


def test_smolvlms_own_processor_makes_the_same_inputs(folders: dict[str, Loaded], monkeypatch: Any) -> None:
    """It is loaded as that of Idefics3, because its own needs a video processor and num2words for videos."""
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    mine = folders["smolvlm"].processor
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    monkeypatch.setattr(transformers.SmolVLMProcessor, "check_argument_for_proper_class", lambda *_: None)
    theirs = transformers.SmolVLMProcessor(images, mine.tokenizer, None, image_seq_len=16)
    text, pictures = ["USER: <image>\nWhat? ASSISTANT:"] * 2, [[picture_of(size, 0)] for size in SIZES[:2]]
    found, expected = (
        processor(text=text, images=pictures, return_tensors="pt", padding=True) for processor in (mine, theirs)
    )
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_small_image_keeps_all_it_has(folders: dict[str, Loaded]) -> None:
    loaded = folders["qwen2_5_vl"]
    kept: list[list[PrunedImage]] = []
    with compress(loaded.model, prune("cdpruner", 20), on_images=kept.append) as receipt:
        logits(loaded.model, loaded.mixed, relevance_text=ASKED)
    counts = [(len(image.indices), image.available) for image in kept[-1]]
    assert all(count == min(20, available) for count, available in counts)
    assert len({available for _, available in counts}) > 1
    assert (receipt.tokens["min"], receipt.tokens["max"]) == (16, 20)


def test_attention_of_qwen_is_what_its_eager_attention_says(folders: dict[str, Loaded]) -> None:
    """Block 4 of 4 sees whole images; the mean over the four patches of each token, in raster order."""
    loaded = folders["qwen2_5_vl"]
    inputs, visual = loaded.one, loaded.model.model.visual
    needs = frozenset({"attention_received", "keys", "middle_attention_received", "shallow_cls_attention"})
    seen = family_of(loaded.model).encode_images(inputs, needs)
    weights: dict[int, list[torch.Tensor]] = {1: [], 3: []}
    before = visual.config._attn_implementation
    visual.set_attn_implementation("eager")
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    eager = modeling.eager_attention_forward

    def caught(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = eager(module, *args, **kwargs)
        for block, found in weights.items():
            if module is visual.blocks[block].attn:
                found.append(output[1])
        return output

    modeling.eager_attention_forward = caught
    try:
        logits(loaded.model, inputs)
    finally:
        modeling.eager_attention_forward = eager
        visual.set_attn_implementation(before)
    from transformers.vision_utils import get_vision_window_index

    window, _ = get_vision_window_index(inputs["image_grid_thw"], 2, 16, 4)
    fields = (3, "attention_received"), (1, "middle_attention_received"), (1, "shallow_cls_attention")
    for block, field in fields:
        (map_,) = weights[block]
        received = map_[0].mean(dim=(0, 1)).view(-1, 4).mean(dim=1)
        expected = torch.empty_like(received)
        expected[window] = received
        torch.testing.assert_close(getattr(seen.views[0].tokens, field)[0], expected, rtol=1e-4, atol=1e-6)


def test_attention_of_internvl_is_the_mean_of_four_patches(folders: dict[str, Loaded]) -> None:
    loaded = folders["internvl"]
    inputs, tower = loaded.one, loaded.model.model.vision_tower
    seen = family_of(loaded.model).encode_images(inputs, frozenset({"cls_attention", "keys"}))
    states: dict[str, torch.Tensor] = {}
    attention = tower.encoder.layer[-1].attention
    handles = [
        getattr(attention, name).register_forward_hook(lambda _, args, out, name=name: states.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        tower(inputs["pixel_values"])
    for handle in handles:
        handle.remove()
    query, key = (states[name].unflatten(-1, (4, 8)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    rows = (query[:, :, :1] @ key.mT / 8**0.5).softmax(dim=-1).mean(dim=1)[:, 0, 1:].view(-1, 8, 8)
    keys = states["k_proj"][:, 1:].unflatten(1, (8, 8))
    for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
        corner = (slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        tokens = seen.views[0].tokens
        assert tokens.cls_attention is not None
        assert tokens.keys is not None
        torch.testing.assert_close(tokens.cls_attention[:, 4 * row + column], rows[corner].mean(dim=(1, 2)))
        torch.testing.assert_close(tokens.keys[:, 4 * row + column], keys[corner].mean(dim=(1, 2)))


def test_attention_of_siglip_is_received_from_all_patches(folders: dict[str, Loaded]) -> None:
    loaded = folders["llava_onevision"]
    inputs = loaded.ask([("USER: #\nWhat? ASSISTANT:", [0])])
    seen = family_of(loaded.model).encode_images(inputs, frozenset({"cls_attention", "attention_received"}))
    tower = loaded.model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"][0], output_attentions=True).attentions[-1]
    tower.set_attn_implementation(before)
    tokens = seen.views[0].tokens
    torch.testing.assert_close(tokens.cls_attention[0], maps[0].mean(dim=(0, 1)), rtol=1e-4, atol=1e-6)
    assert torch.equal(tokens.cls_attention, tokens.attention_received)


def test_stand_ins_are_said(folders: dict[str, Loaded]) -> None:
    for name in ("qwen2_5_vl", "llava_onevision"):
        with compress(folders[name].model, prune("visionzip")) as receipt:
            pass
        assert [note.partition(":")[0] for note in receipt.fallbacks] == ["cls_attention", "cls_token"]
        with compress(folders[name].model, prune("hiprune")) as receipt:
            pass
        assert receipt.fallbacks == []
    with compress(folders["internvl"].model, prune("attention")) as receipt:
        pass
    assert receipt.fallbacks == []


def test_the_question_in_the_towers_own_space(folders: dict[str, Loaded], tmp_path: Path) -> None:
    """LLaVA-NeXT with its CLIP: relevance of each tile is computed with its text tower, and depends on the question."""
    loaded = folders["llava_next"]
    clip, inputs = str(save_clip(tmp_path / "clip")), loaded.one
    kept: list[list[PrunedImage]] = []
    for question in ("What is this?", "tree tree dog"):
        with compress(
            loaded.model, prune("cdpruner"), loaded.processor, text_tower=clip, on_images=kept.append
        ) as receipt:
            logits(loaded.model, inputs, relevance_text=[question])
        assert receipt.fallbacks == []
    (first,), (second,) = kept
    assert first.indices.tolist() != second.indices.tolist()


def test_llava_with_a_siglip_tower() -> None:
    """The family `llava` with a tower without CLS; a strategy that would drop a patch as if it were one is refused."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_select_strategy="full"
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 9, *[3] * 16, 7, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, 32, 32)}
    plain = logits(model, inputs)
    with compress(model, prune("visionzip", 16)):
        assert torch.equal(logits(model, inputs), plain)
    with compress(model, prune("visionzip", 5)) as receipt:
        assert torch.isfinite(logits(model, inputs)).all()
    assert receipt.tokens["mean"] == 5
    assert [note.partition(":")[0] for note in receipt.fallbacks] == ["cls_attention", "cls_token"]
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UserError, match="for siglip_vision_model only 'full' is supported"), compress(model, {}):
        pass


@each_family
def test_quantizing_reaches_every_part(loaded: Loaded) -> None:
    formats = {"weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
    spec = {"quantize": {"method": "rtn", **formats, "scope": ["language", "projector", "vision"]}, **prune()}
    with compress(loaded.model, spec) as receipt:
        logits(loaded.model, loaded.one)
    receipt.check()
    expected = {"language", "vision"} if loaded.name == "gemma3" else {"language", "projector", "vision"}
    assert {line.part for line in receipt.linears if line.calls} == expected


@each_family
def test_mistakes_are_named(loaded: Loaded, tmp_path: Path) -> None:
    model, inputs = loaded.model, loaded.one
    most = family_of(model).view_tokens
    if most is not None:
        with pytest.raises(UserError, match=rf"keep={most + 1} is out of range"), compress(model, prune(keep=most + 1)):
            logits(model, inputs)
    with pytest.raises(UserError, match="image placeholders"), compress(model, prune()):
        logits(model, {**inputs, "input_ids": inputs["input_ids"].clamp(max=3)})
    merging = compress(model, prune("prumerge", positions="keep"))
    with pytest.raises(UserError, match="no place for the tokens that prumerge merges"), merging:
        logits(model, inputs)
    with pytest.raises(UserError, match="videos cannot be pruned"), compress(model, prune()):
        model(**inputs, pixel_values_videos=torch.zeros(1))
    if loaded.name != "llava_next":
        clip = save_clip(tmp_path / "clip")
        with pytest.raises(UserError, match="no CLIP's"), compress(model, prune("cdpruner"), text_tower=str(clip)):
            pass
    for needed in family_of(model).image_inputs[1:2] if loaded.name not in MASKED else ():
        with pytest.raises(UserError, match=f"{needed}: needed"), compress(model, prune()):
            logits(model, {key: value for key, value in inputs.items() if key != needed})
