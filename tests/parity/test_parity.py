"""Against what the methods' own public code answers on fixed inputs.

The vectors are an optional folder, named by QAPBENCH_PARITY; without it these tests skip and the float64
oracles under tests/strategies stand alone.
"""

from types import SimpleNamespace

import pytest
import torch
from parity_vectors import load, needs_vectors
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from qapbench import Selection, VisionTokens, fake_quantize, pruners, quantizers, top_k
from qapbench.models.layers import DecoderLayers
from qapbench.strategies.pruners.divprune import max_min
from qapbench.strategies.pruners.dpp import greedy_map
from qapbench.strategies.pruners.sparsevlm import cluster, rating
from qapbench.strategies.pruners.vispruner import distinct

pytestmark = needs_vectors


def cosines(features: Tensor) -> Tensor:
    unit = normalize(features.float(), dim=-1)
    return unit @ unit.mT


def budgets(tensors: dict[str, Tensor]) -> list[int]:
    prefix = "out.greedy_order_T"
    return sorted(int(key.removeprefix(prefix)) for key in tensors if key.startswith(prefix))


def question(tensors: dict[str, Tensor]) -> VisionTokens:
    batch = len(tensors["in.projected_features"])
    return VisionTokens(
        projected=tensors["in.projected_features"],
        image_embeds=tensors["in.image_embeds"],
        text_embeds=tensors["in.text_embeds"].unsqueeze(0).expand(batch, -1, -1),
    )


def test_cdpruner_one_image() -> None:
    tensors, about = load("pruners/cdpruner/case01_b1_n64")
    tokens, pruner = question(tensors), pruners.create("cdpruner")
    torch.testing.assert_close(pruner.scores(tokens, None, None), tensors["mid.relevance"], rtol=0, atol=1e-5)
    for keep in budgets(tensors):
        status = about["status"][f"T{keep}"]
        assert all(status["fp64_same_set"]), "not a case to compare"
        assert status["min_rel_margin"] > 1e-5, "not a case to compare"
        assert torch.equal(pruner.select(tokens, keep).indices, tensors[f"out.kept_sorted_T{keep}"])
        order = greedy_map(cosines(tokens.projected), tensors["mid.relevance"], keep)
        assert torch.equal(order, tensors[f"out.greedy_order_T{keep}"])
    quality = tensors["mid.relevance"]
    kernel = quality.unsqueeze(2) * cosines(tokens.projected) * quality.unsqueeze(1)
    torch.testing.assert_close(kernel, tensors["mid.kernel"], rtol=0, atol=1e-5)


def test_cdpruner_batch_of_crops() -> None:
    """The reference normalises relevance over the batch, ours per image: compare the stages around that."""
    tensors, about = load("pruners/cdpruner/case05_b5_n144_crops")
    assert all(about["status"]["T32"]["fp64_same_set"])
    tokens, pruner = question(tensors), pruners.create("cdpruner")
    raw = pruner.relevance(tokens)
    assert raw is not None
    over_batch = (raw - raw.min() + 1e-6) / (raw.max() - raw.min())
    torch.testing.assert_close(over_batch, tensors["mid.relevance"], rtol=0, atol=1e-5)
    order = greedy_map(cosines(tokens.projected), tensors["mid.relevance"], 32)
    assert torch.equal(order, tensors["out.greedy_order_T32"])
    assert torch.equal(order.sort(dim=-1).values, tensors["out.kept_sorted_T32"])
    assert not torch.equal(pruner.select(tokens, 32).indices, order.sort(dim=-1).values), "ours is per image"


def test_cdpruner_keeps_all() -> None:
    tensors, _about = load("pruners/cdpruner/case12_keep_all_T_eq_N")
    tokens, pruner = question(tensors), pruners.create("cdpruner")
    torch.testing.assert_close(pruner.scores(tokens, None, None), tensors["mid.relevance"], rtol=0, atol=1e-5)
    assert torch.equal(pruner.select(tokens, 16).indices, tensors["out.kept_sorted_T16"])
    order = greedy_map(cosines(tokens.projected), tensors["mid.relevance"], 16)
    assert sorted(order[0].tolist()) == list(range(16))


@pytest.mark.parametrize("case", ["case01_b1_n64_d16c4", "case03_b1_n576_54_10"])
def test_visionzip(case: str) -> None:
    tensors, about = load(f"pruners/visionzip/{case}")
    assert about["status"]["fp64_same_dominant"]
    assert about["status"]["fp64_same_assignment"]
    hidden, params = tensors["in.hidden_states"], about["params"]
    tokens = VisionTokens(
        projected=hidden[:, 1:],  # not read by the method
        patches=hidden[:, 1:],
        cls_token=hidden[:, 0],
        cls_attention=tensors["in.cls_attn_row"].mean(dim=1)[:, 1:],
        keys=tensors["in.key_metric_headmean"][:, 1:],
    )
    keep = params["dominant_public_arg"] + params["contextual"]
    pruner = pruners.create("visionzip", contextual=params["contextual"] / keep)
    selection = pruner.select(tokens, keep)
    with_cls = torch.cat([torch.zeros(1, 1, dtype=torch.long), selection.indices + 1], dim=1)
    assert torch.equal(with_cls, tensors["out.dominant_sorted_incl_cls"])
    assert selection.merged is not None
    assert selection.front == 1
    kept = tokens.require("patches", "test")[0, selection.indices[0]].unsqueeze(0)
    spliced = torch.cat([selection.merged[:, :1], kept, selection.merged[:, 1:]], dim=1)
    torch.testing.assert_close(spliced, tensors["out.tokens"], rtol=0, atol=1e-5)
    if case.startswith("case03"):  # the released split is our default
        assert torch.equal(pruners.create("visionzip").select(tokens, keep).indices, selection.indices)


@pytest.mark.parametrize("case", ["case01_fixed_b1_n64", "case03_auto_b1_n576"])
def test_trim(case: str) -> None:
    """Of the automatic budget only its number is taken over; the reference's tokens are float16."""
    tensors, about = load(f"pruners/trim/{case}")
    assert about["status"]["fp64_same_mask"]
    patches = tensors["in.image_features"]
    weight, bias = tensors["in.post_layernorm.weight"], tensors["in.post_layernorm.bias"]
    normed = layer_norm(patches, weight.shape, weight, bias, about["params"]["layer_norm_eps"])
    tokens = VisionTokens(
        projected=patches,  # not read by the method
        patches=patches,
        image_embeds=normed @ tensors["in.visual_projection.weight"].T,
        text_embeds=tensors["in.text_embeds"].unsqueeze(1),
    )
    pruner = pruners.create("trim")
    relevance = pruner.relevance(tokens)
    assert relevance is not None
    torch.testing.assert_close(relevance.softmax(dim=-1), tensors["mid.softmax_scores"], rtol=0, atol=1e-5)
    selection = pruner.select(tokens, about["status"]["n_out"])
    assert torch.equal(selection.indices, tensors["out.kept_sorted"])
    assert selection.merged is not None
    spliced = torch.cat([patches[:, selection.indices[0]], selection.merged], dim=1)
    assert torch.equal(spliced[:, :-1].half(), tensors["out.tokens"][:, :-1])
    # The mean's last bits are the order of summation, and one of them may carry over a rounding to float16.
    torch.testing.assert_close(spliced.half().float(), tensors["out.tokens"].float(), rtol=2**-10, atol=1e-5)


def test_divprune() -> None:
    tensors, about = load("pruners/divprune/case01_n64")
    assert about["status"]["fp64_same_order"]
    assert about["status"]["min_rel_margin"] > 1e-5
    tokens = VisionTokens(projected=tensors["in.visual_tokens"].unsqueeze(0))
    distance = 1 - cosines(tokens.projected)
    torch.testing.assert_close(distance[0], tensors["mid.cosine_distance"], rtol=0, atol=1e-5)
    wanted = tensors["out.selection_order"]
    assert torch.equal(max_min(distance, torch.ones(1, 64), 16)[0], wanted)
    selection = pruners.create("divprune").select(tokens, 16)
    assert torch.equal(selection.indices[0], tensors["out.kept_sorted"])


def test_vispruner() -> None:
    tensors, about = load("pruners/vispruner/case01_b1_n64_T16")
    params, patches = about["params"], tensors["in.image_features"]
    attention = tensors["in.cls_attn_heads"].mean(dim=1)
    tokens = VisionTokens(projected=patches, patches=patches, cls_attention=attention)
    keep, share = params["visual_token_num"], params["important_ratio"]
    selection = pruners.create("vispruner", important=share).select(tokens, keep)
    assert torch.equal(selection.mask(params["N"]), tensors["out.index_mask"])
    assert torch.equal(pruners.create("vispruner").select(tokens, keep).indices, selection.indices), "our default"
    order = attention.argsort(dim=-1, descending=True)
    important = tensors["out.important_indices"]
    assert torch.equal(order[:, : important.shape[1]], important)
    diverse = distinct(cosines(patches), order[:, important.shape[1] :], keep - important.shape[1])
    assert torch.equal(diverse, tensors["out.diverse_indices"])


@pytest.mark.parametrize("case", ["case01_adv_fixed_b2_n64", "case02_adv_adaptive_b1_n64"])
def test_prumerge(case: str) -> None:
    """Of the adaptive budget only its number is taken over; the reference orders centres by attention."""
    tensors, about = load(f"pruners/prumerge/{case}")
    status, hidden, keys = about["status"], tensors["in.hidden_states"], tensors["in.k_proj_out"]
    assert status["fp64_same_kept"]
    assert all(status["complement_matches_true"])
    logits = tensors["in.q_proj_out_cls"] @ keys.mT / keys.shape[-1] ** 0.5
    attention = logits.softmax(dim=-1)[:, 0, 1:]
    torch.testing.assert_close(attention, tensors["mid.cls_attn"], rtol=0, atol=1e-5)
    tokens = VisionTokens(
        projected=hidden[:, 1:],  # not read by the method
        patches=hidden[:, 1:],
        last_cls_attention=attention,
        last_keys=keys[:, 1:],
    )
    selection = pruners.create("prumerge").select(tokens, status["n_out"])
    order = tensors["out.kept_indices_in_order"]
    assert torch.equal(selection.indices, order.sort(dim=-1).values)
    assert selection.updated is not None
    assert selection.merged is not None
    by_attention = order.argsort(dim=-1).argsort(dim=-1).unsqueeze(-1)
    ours = torch.cat([selection.updated.take_along_dim(by_attention, dim=1), selection.merged], dim=1)
    torch.testing.assert_close(ours, tensors["out.tokens"], rtol=0, atol=1e-5)


def test_hiprune() -> None:
    tensors, about = load("pruners/hiprune/case02_T64")
    params = about["params"]
    middle, deep = (tensors[f"in.attn_{name}_layer"].mean(dim=(1, 2))[:, 1:] for name in ("object", "deep"))
    tokens = VisionTokens(
        projected=torch.zeros(1, 576, 1), attention_received=deep, middle_attention_received=middle, grid=(24, 24)
    )
    anchor = int(middle.argmax())
    assert 0 < anchor % 24 < 23, "at the edge the reference wraps around"
    assert 24 <= anchor < 552, "at the edge the reference wraps around"
    selection = pruners.create("hiprune", alpha=params["alpha"]).select(tokens, params["retention_total"])
    assert torch.equal(selection.mask(576), tensors["out.index_mask"])
    assert torch.equal(pruners.create("hiprune").select(tokens, 64).indices, selection.indices), "our default"


def test_fastv() -> None:
    tensors, about = load("pruners/fastv/case05_hf_n64_small")
    params = about["params"]
    assert about["status"]["fp64_same_set"]
    first, count = params["sys_len"], params["n_image"]
    row = tensors["in.attn_last_query"].mean(dim=1)[:, first : first + count]
    tokens = VisionTokens(projected=torch.zeros(1, count, 1), query_attention=row)
    keep = about["status"]["n_keep_image"]
    selection = pruners.create("fastv").select(tokens, keep)
    assert torch.equal(selection.indices[0], tensors["out.image_kept_sorted_rel"])
    assert torch.equal(row[0].argsort(descending=True)[:keep], tensors["out.image_topk_desc_rel"])
    stays = torch.ones(params["seq_len"], dtype=torch.bool)
    stays[first : first + count] = selection.mask(count)[0]
    assert torch.equal(stays.nonzero()[:, 0], tensors["out.keep_sequence_indices"])


def test_pyramiddrop() -> None:
    """Query and keys come rotated already: the rows are computed with a rotation by nothing."""
    tensors, about = load("pruners/pyramiddrop/case03_n64_keep16")
    params = about["params"]
    query, keys = tensors["in.query"], tensors["in.keys"]
    width = params["head_dim"]
    attention = SimpleNamespace(q_proj=None, k_proj=None, head_dim=width, scaling=width**-0.5)
    layer = SimpleNamespace(self_attn=attention, input_layernorm=None)
    layers = DecoderLayers(SimpleNamespace(layers=[layer, layer], config=SimpleNamespace()))
    unturned = torch.ones(params["seq"], width), torch.zeros(params["seq"], width)
    flat = (query.transpose(0, 1).flatten(1), keys.transpose(0, 1).flatten(1))
    last = torch.tensor([params["seq"] - 1])
    row = layers.rows(0, *flat, unturned, last)[:, params["image_index"] : params["image_index"] + params["N"]]
    torch.testing.assert_close(row[0], tensors["mid.scores"], rtol=0, atol=1e-5)
    tokens = VisionTokens(projected=torch.zeros(1, params["N"], 1), query_attention=row)
    selection = pruners.create("pyramiddrop").select(tokens, params["keep"])
    assert torch.equal(selection.indices[0], tensors["out.kept_sorted_rel"])


def test_sparsevlm_raters_and_mask() -> None:
    tensors, about = load("pruners/sparsevlm/case02_ret64_layer2")
    params = about["params"]
    hidden = tensors["in.hidden_states"]
    start, stop = params["v_token_start"], params["v_token_start"] + params["n_vision"]
    visual, words = hidden[:, start:stop], hidden[:, stop:]
    raters = rating(visual, words)
    assert torch.equal(raters[0].nonzero()[:, 0], tensors["out.text_raters_rel"])
    attention = tensors["in.attn_text_rows"].mean(dim=1)[:, :, start:stop].mT
    tokens = VisionTokens(projected=visual, text_attention=attention, prompt_embeds=words, embedded=visual)
    relevance = pruners.create("sparsevlm").relevance(tokens)
    torch.testing.assert_close(relevance, tensors["out.relation_vis_text"], rtol=0, atol=1e-5)
    assert relevance is not None
    kept = Selection(top_k(relevance, about["status"]["kept"])).mask(params["n_vision"])
    assert torch.equal(kept, tensors["out.mask"])


def test_sparsevlm_clusters() -> None:
    """The reference adds a little noise to densities and 1e-6 to the size of a cluster; its centres go by score."""
    tensors, about = load("pruners/sparsevlm/merge01_M61_k7")
    assert about["status"]["same_under_other_noise_seed"]
    merged, centres = cluster(tensors["in.tokens"], about["params"]["cluster_num"])
    by_place = tensors["out.centers"][0].argsort()
    assert torch.equal(centres[0], tensors["out.centers"][0, by_place])
    torch.testing.assert_close(merged[0], tensors["out.merged"][0, by_place], rtol=0, atol=1e-5)


def test_fastervlm_is_the_vectors_of_cls_attention() -> None:
    """VisPruner's important part is FasterVLM."""
    tensors, _about = load("pruners/vispruner/case01_b1_n64_T16")
    attention, important = tensors["in.cls_attn_heads"].mean(dim=1), tensors["out.important_indices"]
    tokens = VisionTokens(projected=tensors["in.image_features"], cls_attention=attention)
    for name in ("fastervlm", "attention"):
        chosen = pruners.create(name).select(tokens, important.shape[1]).indices
        assert torch.equal(chosen, important.sort(dim=-1).values)


BITS = (4, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("library", ["ct", "ao"])
def test_asymmetric_is_the_libraries(bits: int, library: str) -> None:
    """compressed-tensors and torchao, float32: zero, constant and all-positive groups included."""
    tensors, _about = load("quant/conventions/group128")
    ours = fake_quantize(tensors["x_float32"], bits, 128)
    torch.testing.assert_close(ours, tensors[f"{library}_float32_b{bits}_asym"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_symmetric_is_the_plain_formula(bits: int, dtype: str) -> None:
    """absmax / (2^(b-1) - 1), which is not the libraries' scale; the reference is float32 for both inputs."""
    tensors, _about = load("quant/conventions/group128")
    x, plain = tensors[f"x_{dtype}"], tensors[f"plain_qmax_{dtype}_b{bits}_sym"]
    torch.testing.assert_close(fake_quantize(x.float(), bits, 128, symmetric=True), plain, rtol=0, atol=1e-5)
    assert torch.equal(fake_quantize(x, bits, 128, symmetric=True), plain.to(x.dtype))
    library = tensors[f"ct_{dtype}_b{bits}_sym"].float()
    assert (plain - library).abs().max() > 0.1, "the conventions differ; the vectors show it"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("library", ["ct", "ao"])
def test_asymmetric_in_bfloat16(bits: int, library: str) -> None:
    """The libraries compute in bfloat16; ours computes in float32 and rounds once: they agree to a bound.

    Either result is within half a level of x but for its own roundings, so they are at most one level apart
    plus those. bfloat16 rounds by 2^-9 of the value, and no value exceeds the group's range, which is 2^b - 1
    levels. Five roundings count: the libraries' scale, quotient, zero point and result, and our result.
    """
    tensors, _about = load("quant/conventions/group128")
    x = tensors["x_bfloat16"]
    theirs = tensors[f"{library}_bfloat16_b{bits}_asym"].float()
    ours = fake_quantize(x, bits, 128)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, fake_quantize(x.float(), bits, 128).bfloat16())
    groups = x.float().unflatten(-1, (-1, 128))
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    bound = (span * (1 / (2**bits - 1) + 5 * 2**-9)).repeat_interleave(128, dim=-1)
    assert ((ours.float() - theirs).abs() <= bound).all()
    # And float32 inside is what it is for: never farther from x on the whole.
    assert (ours - x).float().norm() <= (theirs - x).float().norm()


@pytest.mark.parametrize("bits", BITS)
def test_all_positive_groups_reach_zero_unlike_awq(bits: int) -> None:
    """AWQ clamps the zero point of a group without zero in its range; elsewhere it is the same."""
    tensors, _about = load("quant/conventions/group128")
    x = tensors["x_float32"]
    ours, awq = fake_quantize(x, bits, 128), tensors[f"awqstyle_fp32_float32_b{bits}_asym"]
    groups = x.unflatten(-1, (-1, 128))
    inside = ((groups.amin(-1) <= 0) & (groups.amax(-1) >= 0)).repeat_interleave(128, dim=-1)
    torch.testing.assert_close(ours[inside], awq[inside], rtol=0, atol=1e-5)
    assert (ours - x)[~inside].abs().max() < (awq - x)[~inside].abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_absmax_is_smoothquants(bits: int) -> None:
    """Activations per token and weights per output channel."""
    tensors, _about = load("quant/smoothquant/absmax_primitives")
    absmax = quantizers.create("absmax", bits=bits)
    torch.testing.assert_close(absmax(tensors["x"]), tensors[f"act_tok_b{bits}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(absmax(tensors["w"]), tensors[f"w_ch_b{bits}"], rtol=0, atol=1e-5)
