"""Compares the cost model with what `torch.utils.flop_counter` counts while a model answers.

`python -m benchmarks.cost` does so for every pruner on the tiny model of every family, and prints the ratios of what is
said to what is counted. With `--wide` the models have about 100 million weights, with `--sample` every pruner is tried
on one family.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from qapbench import DecoderPruner, Prompt, Pruner, UserError, compress, cost, pruners
from qapbench.costing.tokens import MeasuredTokens
from qapbench.models import family_of
from qapbench.models.family import Family, families
from qapbench.prune.build import missing_fields
from qapbench.prune.decoder_fields import check_drops
from qapbench.prune.stages import stage_budgets
from qapbench.receipt import Receipt

PROMPTS = {
    "gemma3": Prompt(before=3, after=3, images=((32, 32),)),
    "idefics3": Prompt(before=4, after=8, images=((32, 64),)),
    "internvl": Prompt(before=3, after=3, images=((32, 64),)),
    "llava": Prompt(before=3, after=3, images=((32, 32),)),
    "llava_next": Prompt(before=3, after=3, images=((32, 64),)),
    "llava_onevision": Prompt(before=3, after=3, images=((32, 64),)),
    "minicpmv4_6": Prompt(before=3, after=7, images=((32, 64),)),
    "qwen2_5_vl": Prompt(before=3, after=3, images=((32, 40),)),
    "qwen3_5": Prompt(before=3, after=3, images=((32, 40),)),
    "qwen3_vl": Prompt(before=3, after=3, images=((32, 40),)),
    "smolvlm": Prompt(before=4, after=8, images=((32, 64),)),
}
"""The prompts of `Family.tiny`."""
SMALL = {
    "minicpmv4_6": {"longest": 32},
    "qwen3_5": {"least_tokens": 1},
    "qwen3_vl": {"least_tokens": 1},
    "idefics3": {"longest_edge": 2},
    "smolvlm": {"longest_edge": 2},
}
"""What the processor would do with images as small as those of `Family.tiny`, where it enlarges others."""
WIDE = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 10}
TOLERANCE = 0.01


@dataclass(frozen=True)
class Agreement:
    """What is said of one prompt and the start of its answer, over what is counted.

    Attributes:
        prompt: ratio of the FLOPs up to the logits of the prompt's last token.
        decode: ratio of the FLOPs of the tokens after the first one.
        kv_bytes: bytes of the KV cache, as said and as it is.
        weight_bytes: bytes of the weights, as said and as they are.
    """

    prompt: float
    decode: float
    kv_bytes: tuple[float, int]
    weight_bytes: tuple[int, int]

    @property
    def agrees(self) -> bool:
        """Whether FLOPs agree within one percent, and bytes exactly."""
        near = all(abs(ratio - 1) <= TOLERANCE for ratio in (self.prompt, self.decode))
        return near and all(said == real for said, real in (self.kv_bytes, self.weight_bytes))


def tiny_model(family: type, wide: bool = False) -> tuple[Any, dict[str, Any]]:
    """A family's tiny model, or one of about 100 million weights, and one call's inputs.

    Attention is eager, since the counter does not see the attention kernel of a CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = family.tiny()  # type: ignore[attr-defined]
        if wide:
            config = model.config
            for name, value in WIDE.items():
                setattr(config.get_text_config(), name, value)
            text = config.get_text_config()
            text.num_key_value_heads, text.head_dim, text.vocab_size = 5, 64, 32000
            if kinds := getattr(text, "layer_types", None):
                text.layer_types = (kinds * 3)[: text.num_hidden_layers]
            if "mrope_section" in (text.rope_parameters or {}):
                turned = 0.5 * text.head_dim * text.rope_parameters.get("partial_rotary_factor", 1)
                text.rope_parameters["mrope_section"] = [int(turned * part) for part in (0.25, 0.375, 0.375)]
            if hasattr(config.vision_config, "out_hidden_size"):
                config.vision_config.out_hidden_size = text.hidden_size
            model = type(model)(type(config)(**config.to_dict())).eval()
    model.set_attn_implementation("eager")
    return model, inputs


@torch.inference_mode()
def agreement(model: Any, inputs: dict[str, Any], spec: dict[str, Any], prompt: Prompt) -> Agreement:
    """Answer a prompt with three tokens under a spec, and compare what that costs with what is said of it.

    Args:
        model: the model.
        inputs: keyword arguments of one call.
        spec: the spec as `compress` takes it.
        prompt: what the call holds.
    """
    counted: list[int] = []
    with compress(model, spec) as receipt, FlopCounterMode(display=False) as counter:
        handle = model.lm_head.register_forward_hook(lambda *_: counted.append(counter.get_total_flops()))
        options = {"max_new_tokens": 3, "eos_token_id": None, "return_dict_in_generate": True}
        cache = model.generate(**inputs, do_sample=False, **options).past_key_values
        handle.remove()
    decoded = len(counted) - 1
    with contextlib.ExitStack() as stack:
        for name, value in SMALL.get(model.config.model_type, {}).items():
            stack.enter_context(mock.patch.object(type(family_of(model)), name, value))
        measured = _separated(receipt, model, spec, prompt)
        said = cost(model, spec, replace(prompt, new_tokens=decoded), tokens=measured)
    layers = [(layer.keys, layer.values) for layer in cache.layers if hasattr(layer, "keys")]
    states = [state for layer in cache.layers if not hasattr(layer, "keys") for state in _states(layer)]
    held = sum(value.numel() * value.element_size() for pair in (*layers, states) for value in pair)
    fed = sum(value[:, :, :decoded].numel() * value.element_size() for pair in layers for value in pair)
    weights = {value.data_ptr(): value.numel() * value.element_size() for value in model.state_dict().values()}
    return Agreement(
        said.flops.prompt / counted[0],
        decoded * said.flops.decode / (counted[-1] - counted[0]),
        (said.kv_bytes + fed, held),
        (said.weight_bytes, sum(weights.values())),
    )


def _states(layer: Any) -> list[torch.Tensor]:
    """What a KV cache holds of a layer with linear attention."""
    return [*layer.conv_states.values(), *layer.recurrent_states.values()]


def _separated(receipt: Receipt, model: Any, spec: dict[str, Any], prompt: Prompt) -> MeasuredTokens | None:
    """The tokens as planned, with the new lines that really stayed; None if the plan was right.

    Which lines of an image keep a token depends on the image.
    """
    planned = cost(model, spec, prompt)
    stayed = receipt.separators / max(receipt.images, 1)
    if stayed == planned.separators:
        return None
    return MeasuredTokens(planned.available, planned.tokens_per_layer, stayed)


def specs_of(model: Any, names: list[str], keep: int = 6) -> Iterator[dict[str, Any]]:
    """A spec that keeps every token, and one for each pruner that runs on the model and whose cost is known there."""
    family = family_of(model)
    yield {"prune": {"method": "random", "keep": family.view_tokens or 20}}
    outlined = type(family).outline_downsampled is not Family.outline_downsampled
    for name in names:
        pruner = pruners.create(name)
        known = outlined or "downsampled" not in pruner.needs
        if known and not missing_fields(pruner, family) and drops_fit(family, pruner, keep):
            yield {"prune": {"method": name, "keep": keep}}


def drops_fit(family: Family, pruner: Pruner, keep: int) -> bool:
    """Whether the decoder of a tiny model allows the drops of a pruner; linear attention does not allow all.

    Args:
        family: the model.
        pruner: the pruner.
        keep: its budget.
    """
    if not isinstance(pruner, DecoderPruner):
        return True
    layers, count = family.decoder, family.view_tokens or 20
    try:
        check_drops(layers, pruner, stage_budgets(pruner, pruner.entering(count, keep), keep, len(layers)))
    except UserError:
        return False
    return True


def sampled(family: str) -> list[str]:
    """Names of the pruners that a sample tries on a family: over all families every pruner comes once."""
    names = sorted(PROMPTS)
    return [name for at, name in enumerate(pruners.names()) if at % len(names) == names.index(family)]


def main() -> None:
    """Compare every pair, print what is found, and exit with 1 if some do not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wide", action="store_true", help="models of about 100 million weights")
    parser.add_argument("--sample", action="store_true", help="every pruner on one family only")
    given, bad, pairs, worst = parser.parse_args(), 0, 0, 0.0
    for family, prompt in PROMPTS.items():
        model, inputs = tiny_model(families.create(family), given.wide)
        for spec in specs_of(model, sampled(family) if given.sample else pruners.names()):
            found = agreement(model, inputs, spec, prompt)
            pairs, bad = pairs + 1, bad + (not found.agrees)
            worst = max(worst, abs(found.prompt - 1), abs(found.decode - 1))
            if not found.agrees:
                print(family, spec, found)
        print(f"{family}: {sum(p.numel() for p in model.parameters()) / 1e6:.3g} million weights")
    print(f"{pairs - bad} of {pairs} pairs agree; FLOPs are off by at most {100 * worst:.3f} %")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
