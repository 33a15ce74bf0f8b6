"""SCOPE, MMTok, DART, HoloV, VScan, ToMe, PACT and VTW against what their own public code answers on fixed inputs.

The vectors are an optional folder, named by QAPBENCH_PARITY; without it these tests skip.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity_vectors import load, needs_vectors
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import VisionTokens, pruners, top_k
from qapbench.models.layers import DecoderLayers
from qapbench.strategies.pruners.dart import least_alike
from qapbench.strategies.pruners.tome import match
from qapbench.strategies.pruners.vscan import spread, windows

pytestmark = needs_vectors


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def decoder(width: int) -> DecoderLayers:
    """Two layers of attention with heads of a width, whose projections are not called."""
    attention = SimpleNamespace(q_proj=None, k_proj=None, head_dim=width, scaling=width**-0.5)
    layer = SimpleNamespace(self_attn=attention, input_layernorm=None)
    return DecoderLayers(SimpleNamespace(layers=[layer, layer], config=SimpleNamespace()))


@pytest.mark.parametrize("case", ["default_n576", "batch2_n144", "alpha2_n196"])
def test_scope(case: str) -> None:
    tensors, about = load(f"pruners/scope/{case}")
    assert about["status"]["fp64_indices_agree"]
    params, patches = about["params"], tensors["in.hidden_states"][:, 1:]
    attention = tensors["in.cls_attention_per_head"].mean(dim=1)
    tokens = VisionTokens(patches, patches=patches, cls_attention=attention, heads=params["heads"])
    wanted = tensors["out.kept_sorted"]
    pruner = pruners.create("scope", alpha=params["ALPHA"], combine=params["COMBINED"])
    assert torch.equal(pruner.select(tokens, wanted.shape[1]).indices, wanted)


@pytest.mark.parametrize("case", ["default_n576", "small_n64_k8", "qwen_temps_n196"])
def test_mmtok(case: str) -> None:
    tensors, about = load(f"pruners/mmtok/{case}")
    assert about["status"]["fp64_indices_agree"]
    params = about["params"]
    tokens = VisionTokens(
        tensors["in.vision_features"],
        patches=tensors["in.vision_features_clip"],
        prompt_embeds=tensors["in.text_token_embedding"][None],
    )
    temperatures = {
        f"{side}_temperature": params[f"softmax_{short}_temperature"]
        for side, short in (("text", "tv"), ("vision", "vv"))
    }
    pruner = pruners.create("mmtok", alpha=params["alpha"], **temperatures)
    indices = pruner.select(tokens, params["target_vision_tokens"]).indices
    assert torch.equal(indices, tensors["out.selected_indices_sorted"])


@pytest.mark.parametrize("case", ["default_n576", "ratio_n64", "keep1"])
def test_dart(case: str) -> None:
    """Pivots are the release's, and take their turns in the order that its set of positions happened to have."""
    tensors, about = load(f"pruners/dart/{case}")
    assert about["status"]["fp64_indices_agree"]
    params, states = about["params"], tensors["in.layer_output"]
    first, stop = params["image_token_start_index"], params["image_token_start_index"] + params["N"]
    keys = tensors["in.key_states"].transpose(1, 2).flatten(2)
    normed = (
        states * (states.square().mean(dim=-1, keepdim=True) + params["rms_eps"]).rsqrt() * tensors["in.norm_weight"]
    )
    close(normed, tensors["mid.last_layer_state"])
    tokens = VisionTokens(
        states[:, first:stop],
        rotated_keys=keys[:, first:stop],
        text_keys=keys[:, stop:],
        final_states=normed[:, first:stop],
        text_states=normed[:, stop:],
    )
    most = params["pivot_image_token"]
    pruner = pruners.create("dart", image_pivots=most, text_pivots=params["pivot_text_token"])
    relevance = pruner.relevance(tokens)
    assert relevance is not None
    torch.testing.assert_close(relevance[0], tensors["mid.k_l1_image"], rtol=1e-5, atol=0)
    pivots = top_k(relevance, most)
    assert torch.equal(pivots[0], tensors["mid.pivot_image_indices"].sort().values - first)
    unit, keep = normalize(normed, dim=-1), about["status"]["kept"]
    kept = least_alike(unit[:, tensors["mid.pivot_visit_order"]] @ unit[:, first:stop].mT, pivots, keep)
    wanted = tensors["out.retained_image_indices_sorted"] - first
    assert torch.equal(kept[0].sort().values, wanted)
    ours = pruner.select(tokens, keep).indices[0]
    assert len(set(ours.tolist()) & set(wanted.tolist())) > 0.9 * keep, "our order of turns changes little"


@pytest.mark.parametrize("case", ["default_n576", "uneven_b2_n150", "qwen_n256"])
def test_holov(case: str) -> None:
    """Where the release loses tokens that a run cannot hold, ours keeps its choice and others besides."""
    tensors, about = load(f"pruners/holov/{case}")
    assert about["status"]["fp64_indices_agree"]
    params, features = about["params"], tensors["in.image_tokens"]
    tokens = VisionTokens(features, cls_attention=tensors["in.attention"].reshape(features.shape[:2]))
    pruner = pruners.create("holov", runs=params["num_patches"], context=params["alpha"])
    for ours, theirs in zip(
        pruner.select(tokens, params["new_image_token_num"]).indices, tensors["out.indices"], strict=True
    ):
        kept = set(theirs[theirs >= 0].tolist())
        assert kept <= set(ours.tolist())
        assert len(kept) == len(ours) or bool((theirs < 0).any())


def test_vscan_in_front_for_llava() -> None:
    tensors, about = load("pruners/vscan/stage1_llava_default_t96")
    assert about["status"]["fp64_indices_agree"]
    params = about["params"]
    tokens = VisionTokens(
        tensors["in.image_features"] @ tensors["in.projector_weight"],
        cls_attention=tensors["in.cls_attn_layer_minus2"].mean(dim=1),
        shallow_cls_attention=tensors["in.cls_attn_layer5"].mean(dim=1),
        grid=(24, 24),
    )
    selection = pruners.create("vscan").select(tokens, params["visual_token_num"])
    assert torch.equal(selection.indices, tensors["out.kept_sorted"])
    assert selection.updated is not None
    close(selection.updated, tensors["out.merged_tokens"])


def test_vscan_in_front_for_qwen() -> None:
    tensors, about = load("pruners/vscan/stage1_qwen_default_12x16")
    assert about["status"]["fp64_indices_agree"]
    params = about["params"]
    grid, side = (params["grid_h"], params["grid_w"]), params["window_size"]
    local, attention = tensors["in.attn_local"][None], tensors["in.attn_global"][None]
    tokens = VisionTokens(
        tensors["in.image_embeds"][None], cls_attention=attention, shallow_cls_attention=local, grid=grid
    )
    details = spread(local, windows(grid, side), len(tensors["out.local_indices"]))[0]
    assert torch.equal(details.sort().values, tensors["out.local_indices"].sort().values)
    selection = pruners.create("vscan", window=side).select(tokens, len(tensors["out.kept_sorted"]))
    assert torch.equal(selection.indices[0], tensors["out.kept_sorted"])
    assert selection.updated is not None
    close(selection.updated[0], tensors["out.merged_tokens"])


def test_vscan_inside() -> None:
    tensors, about = load("pruners/vscan/stage2_default_96_to_32")
    assert about["status"]["fp64_indices_agree"]
    params, states = about["params"], tensors["in.hidden_states"]
    width, length = params["D"] // params["heads"], states.shape[1]
    normed = (
        states * (states.square().mean(dim=-1, keepdim=True) + params["rms_eps"]).rsqrt() * tensors["in.norm_weight"]
    )
    queries, keys = (normed[0] @ tensors[f"in.{name}_proj_weight"].T for name in "qk")
    turns = params["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
    angle = (torch.arange(length).unsqueeze(1) * turns).repeat(1, 2)
    last, first = torch.tensor([length - 1]), params["image_start"]
    row = decoder(width).rows(0, queries[last], keys, (angle.cos(), angle.sin()), last)
    row = row[:, first : first + params["current_image_tokens"]]
    close(row, tensors["mid.score"])
    tokens = VisionTokens(states[:, first : first + row.shape[1]], query_attention=row)
    indices = pruners.create("vscan_decoder").select(tokens, params["next_image_tokens"]).indices
    wanted = tensors["out.kept_sorted"]
    assert indices.tolist() in (wanted.tolist(), (wanted - first).tolist())


@pytest.mark.parametrize("case", ["half_n144_b2", "r16_cls_n197", "sizes_n256_r40"])
def test_tome_one_step(case: str) -> None:
    """A token that may not merge away, as a tower's CLS, is one of endless worth; the release then sorts what stays."""
    tensors, about = load(f"pruners/tome/{case}")
    assert about["status"]["fp64_groups_agree"]
    params, values = about["params"], tensors["in.x"]
    worth = torch.ones(values.shape[:2])
    if params["class_token"]:
        worth[:, 0] = torch.inf
    pairs = match(tensors["in.metric"].double(), worth, params["r"])
    assert torch.equal(pairs.source, tensors["out.src_idx"])
    assert torch.equal(pairs.target, tensors["out.dst_idx"])
    if params["class_token"]:
        pairs = pairs._replace(stay=pairs.stay.sort(dim=-1).values)
    assert torch.equal(pairs.stay, tensors["out.unm_idx"])
    size = tensors.get("in.size", torch.ones(values.shape[:2]))
    close(pairs.mean(values, size), tensors["out.merged_x_wavg"])
    close(pairs.reduced(size, "sum"), tensors["out.size"])


@pytest.mark.parametrize("case", ["one_step_n576_r288", "steps_n576_to_32"])
def test_tome_to_a_budget(case: str) -> None:
    tensors, about = load(f"pruners/tome/{case}")
    assert about["status"]["fp64_members_agree"]
    group = tensors["out.members"][0].float().argmax(dim=0)  # of each token
    selection = pruners.create("tome").select(
        VisionTokens(tensors["in.x"], keys=tensors["in.metric"]), tensors["out.x"].shape[1]
    )
    ours = group[selection.indices[0]]
    assert len(set(ours.tolist())) == len(ours)
    assert selection.updated is not None
    assert selection.made is not None
    close(selection.updated[0], tensors["out.x"][0, ours])
    assert torch.equal(selection.made[0], tensors["out.size"][0, ours, 0] > 1)


def pact(tokens: VisionTokens, about: dict[str, Any], params: dict[str, Any], important: float) -> Any:
    pruner = pruners.create("pact", important=important, cutoff=params["cutoff"], recovery=params["coef_pruned"])
    return pruner.select(tokens, about["status"]["kept"])


@pytest.mark.parametrize("case", ["default_n196", "dbdpc_only_n256", "euti_only_n144"])
def test_pact(case: str) -> None:
    tensors, about = load(f"pruners/pact/{case}")
    assert about["status"]["fp64_indices_agree"]
    params, image = about["params"], tensors["in.is_image"].bool()
    used, first, stop = params["effective"], params["prefix"], params["prefix"] + params["N"]
    hidden, importance = tensors["in.hidden_states"][:, image], torch.ones(1, params["N"])
    if used["token_pruning"]:
        queries, keys = (tensors[f"in.current_{name}"][0, :stop] for name in "qk")
        importance = decoder(params["head_dim"]).context(0, queries, keys)[None, first:]
    tokens = VisionTokens(hidden, context_attention=importance, rotated_keys=tensors["in.current_k_cosine"][:, image])
    share = used["pruning_tokeep_percentage_value"] if used["token_pruning"] else 1.0
    wanted = tensors["out.kept_image_indices"]
    if not used["use_DBDPC"]:
        relevance = pruners.create("pact").relevance(tokens)
        assert relevance is not None
        torch.testing.assert_close(relevance[0], tensors["mid.prune_scores"], rtol=1e-5, atol=0)
        assert torch.equal(top_k(relevance, int(params["N"] * share))[0], wanted)
        return
    selection = pact(tokens, about, used, share)
    assert torch.equal(selection.indices[0], wanted)
    behind = slice(first, first + len(wanted))
    close(selection.updated[0], tensors["out.hidden_states"][0, behind])
    assert torch.equal(selection.made[0], tensors["out.log_weights_all"][behind] > 0)


@pytest.mark.parametrize("case", ["n144_nopruned_cut05", "n316_pruned260_cut021"])
def test_pact_clusters(case: str) -> None:
    """The first N rows are those that importance left."""
    tensors, about = load(f"pruners/pact/{case}")
    assert about["status"]["fp64_sets_agree"]
    hidden, left = tensors["in.hidden"], about["params"]["N"]
    importance = (torch.arange(len(hidden)) < left).float() + 1e-9
    attention = (importance / hidden.norm(dim=-1))[None]
    tokens = VisionTokens(hidden[None], context_attention=attention, rotated_keys=tensors["in.keys"][None])
    selection = pact(tokens, about, about["params"], min((left + 0.5) / len(hidden), 1.0))
    wanted = tensors["out.mask"][:, 0].nonzero()[:, 0]
    assert torch.equal(selection.indices[0], wanted)
    close(selection.updated[0], tensors["out.hidden"][wanted])
    assert torch.equal(selection.made[0], tensors["out.weights"][wanted] > 1)


@pytest.mark.parametrize("case", ["withdraw_default_k15", "renumber_prefill_b2"])
def test_vtw(case: str) -> None:
    """All tokens leave before layer k, which is the mean k N / 32 over 32 layers. Positions are always kept here."""
    tensors, about = load(f"pruners/vtw/{case}")
    params, hidden = about["params"], tensors["in.hidden_states"]
    first, count, layer = params["system_token_nums"], params["image_token_nums"], params["k"]
    pruner: Any = pruners.create("vtw")
    assert pruner.stages(count, count * layer // 32, 32) == [(layer, 0)]
    stays = torch.ones(hidden.shape[1], dtype=torch.bool)
    stays[first : first + count] = False
    assert torch.equal(hidden[:, stays], tensors["out.hidden_states"])
    if params["pe_type"] == "keep":
        assert torch.equal(tensors["in.position_ids"][:, stays], tensors["out.position_ids"])
