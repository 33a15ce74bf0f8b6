"""The model that the training of `smol-llava` starts from, and the export of the trained parts.

    python -m training.smol.model --out runs/smol-start

writes the initial model as a checkpoint folder: SmolLM2, joined to the vision tower of `diagram-llava` by an untrained
projector. On text-only questions this is SmolLM2 itself, so qapbench can measure it before any training.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from qapbench.checkpoints.assembly import IMAGE, RECIPE, Recipe, base_file, join
from qapbench.checkpoints.find import EMBEDDED
from qapbench.checkpoints.gguf import read_llama

NAME = "smol-llava"
BEGUN = Path(__file__).parent / "recipe"
"""The recipe and the card, which become an embedded model once the trained parts are beside them."""
TOWER = EMBEDDED / "diagram-llava" / "clip"
RANK, ALPHA = 16, 32
"""Defaults for LoRA on all linear layers of the decoder. A rank of 1 has 305 thousand weights (see sizing.py)."""


def find_base() -> Path:
    """Locate SmolLM2's GGUF file inside the installed package."""
    recipe = Recipe.model_validate_json((BEGUN / RECIPE).read_text(encoding="utf-8"))
    return base_file(recipe.base, NAME, "gguf")


def start(gguf: Path, tower: Path, seed: int) -> tuple[Any, Any, Any]:
    """Build the initial model in float32.

    Args:
        gguf: file of the language model.
        tower: checkpoint folder of a CLIP, with its tokenizer.
        seed: seed of the projector's initial weights.

    Returns:
        The LlavaForConditionalGeneration, its processor, and the companion CLIP, which shares the vision tower.
    """
    from transformers import CLIPModel

    torch.manual_seed(seed)
    clip: Any = CLIPModel.from_pretrained(tower, dtype=torch.float32)
    llava, processor = join(read_llama(gguf, extra=(IMAGE,)), clip.vision_model)
    calm(llava)
    return llava, processor, clip


@torch.no_grad()
def calm(llava: Any) -> None:
    """Scale the untrained projector so that its output is about as large as word embeddings.

    With its default initial weights, the output is twenty times larger, and nothing is learnt.
    """
    projector, words = llava.model.multi_modal_projector, llava.get_input_embeddings().weight
    width = projector.linear_2.in_features
    projector.linear_2.weight.normal_(0, float(words.std()) / width**0.5 * 2)
    projector.linear_2.bias.zero_()


def add_lora(llava: Any, rank: int = RANK, alpha: int = ALPHA) -> Any:
    """Add LoRA to all linear layers of the decoder, in place.

    Returns:
        The peft model of the decoder. All its weights except LoRA's are fixed.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", bias="none")
    return get_peft_model(llava.model.language_model, config)


def halve(llava: Any) -> None:
    """Convert the language model to bfloat16, in place, except for the weights of LoRA, which become float32."""
    llava.model.language_model.to(torch.bfloat16)
    for name, parameter in llava.model.language_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def lora_weights(adapted: nn.Module) -> nn.ParameterDict:
    """Collect the weights of LoRA in a module, so that a checkpoint does not contain the language model."""
    return nn.ParameterDict({n.replace(".", "/"): p for n, p in adapted.named_parameters() if "lora_" in n})


def export(llava: Any, clip: Any, adapted: Any, tower: Path, out: Path, status: str) -> int:
    """Write the trained parts in bfloat16, with the recipe and the card, as `qapbench.checkpoints.assembly` expects.

    A recipe and a card that the folder has already stay as they are.

    Args:
        llava: the LLaVA model.
        clip: the companion CLIP.
        adapted: the decoder with LoRA, from `add_lora`.
        tower: checkpoint folder of a CLIP, from which the tokenizer is copied.
        out: folder to write to.
        status: one line on what the model can do, for `status.txt`.

    Returns:
        Total size of the files in bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    made = out / ".parts"
    shutil.rmtree(made, ignore_errors=True)
    half = type(clip)(clip.config).to(torch.bfloat16)
    half.load_state_dict(clip.state_dict())
    half.save_pretrained(made / "clip")
    for file in tower.glob("tokenizer*.json"):
        shutil.copyfile(file, made / "clip" / file.name)
    projector = llava.model.multi_modal_projector.state_dict()
    save_file(
        {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in projector.items()},
        made / "projector.safetensors",
    )
    from peft import get_peft_model_state_dict

    state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in get_peft_model_state_dict(adapted).items()}
    adapted.save_pretrained(made / "lora", state_dict=state, save_embedding_layers=False)
    (made / "lora" / "README.md").unlink(missing_ok=True)
    (made / "status.txt").write_text(status + "\n", encoding="utf-8")
    for file in BEGUN.iterdir():
        if not (out / file.name).exists():
            shutil.copyfile(file, made / file.name)
    size = 0
    for path in sorted(file for file in made.rglob("*") if file.is_file()):
        size += path.stat().st_size
        target = out / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(made)
    return size


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="file of SmolLM2, if its package is not installed")
    args = parser.parse_args()
    llava, processor, _ = start(args.gguf or find_base(), TOWER, seed=0)
    llava.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    shutil.copytree(TOWER, args.out / "clip", dirs_exist_ok=True)
    print(json.dumps({"out": str(args.out), "parameters": sum(p.numel() for p in llava.parameters())}))


if __name__ == "__main__":
    main()
