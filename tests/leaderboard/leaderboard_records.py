"""Synthetic run records: a small ablation, hostile texts, and any number of rows."""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import Any

IMG = "<img src=x onerror=alert(1)>"
SCRIPT_END = "</script><script>alert(2)</script><!-- \u2028\u2029 ]]>"
NAN = float("nan")
SIZES = {"NAT": 500, "SOC": 300, "LAN": 200, "TXT": 450, "IMG": 420, "NO": 350, "Avg": 1000}
NOTE = "Embedded stand-in: diagram-llava is a toy of 3 M parameters, trained on drawn diagrams."
METHODS: list[tuple[Any, Any, Any]] = [
    ("cdpruner", None, None),
    ("cdpruner", "combined", {"convex": {"semantic": 0.7}}),
    ({"cdpruner": {"theta": 0.5}}, "group_error", {"convex": {"semantic": 0.7}}),
    ("visionzip", None, None),
    ("random", "outlier_intensity", "rank"),
]


Data = dict[str, Any]


def record(index: int, prune: Data | None, model: str = "diagram-llava", bits: int = 4) -> Data:
    """One whole record, the same for the same arguments."""
    draw = random.Random(f"{index} {model} {bits}")
    keep = prune["keep"] if prune else 144
    share = 0.5 + 0.05 * min(keep, 144) ** 0.33 + 0.02 * draw.random()
    columns: list[Data] = []
    for name, n in SIZES.items():
        k = sum(draw.random() < share for _ in range(n))
        columns.append({"name": name, "k": k, "n": n, "accuracy": k / n})
    grades = [{"name": name, "unavailable": "grade unknown for all questions"} for name in ("G1-6", "G7-12")]
    merged = 5.0 if prune and prune["method"] == "visionzip" else 0.0
    quantize = {
        "method": "rtn",
        "weights": {"bits": bits, "group_size": 128, "symmetric": False},
        "activations": {"bits": bits, "group_size": 128},
        "scope": ["language"],
    }
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    linears = [
        {
            "name": f"model.language_model.layers.{layer}.{module}",
            "part": "language",
            "weight_bits": bits,
            "activation_bits": bits,
            "calls": 1000,
        }
        for layer in range(6)
        for module in modules
    ]
    method = prune["method"] if prune else "all tokens"
    label = method if isinstance(method, str) else next(iter(method))
    return {
        "schema": 2,
        "run_id": hashlib.sha256(f"{index} {model}".encode()).hexdigest()[:16],
        "name": f"{label}-{keep}-{index}",
        "created": f"2026-11-{1 + index % 28:02}T19:00:00Z",
        "spec": {
            "model": model,
            "dtype": "auto",
            "task": {"name": "diagramqa", "data": None, "limit": None, "answers": "letter"},
            "quantize": quantize if bits < 16 else None,
            "prune": prune,
            "plugins": [],
            "seed": 0,
        },
        "scores": {
            "columns": [*columns[:-1], *grades, columns[-1]],
            "unparsed": {"k": index % 3, "n": 1000, "rate": index % 3 / 1000},
        },
        "tokens": {
            "available": 144,
            "mean": float(keep),
            "min": keep,
            "max": keep,
            "kept": keep - merged,
            "merged": merged,
        },
        "cost": cost(keep, bits),
        "receipt": {
            "summary": f"rtn W{bits}A{bits} on 30 linears (language); keeps {keep} of 144",
            "linears": linears,
            "fallbacks": ["lm_head: left in 16 bits, tied to the embedding"] if index % 5 == 0 else [],
        },
        "environment": {"python": "3.11.7", "torch": "2.13.0+cpu", "device": "cpu", "threads": 2},
        "fingerprints": {"model": "a" * 64, "data": "b" * 64},
        "timing": {"seconds": 12.3, "questions": 1000, "peak_memory_mb": 900},
        "notes": [NOTE],
    }


def cost(keep: int, bits: int) -> Data:
    """The cost of a record; its numbers are round ones."""
    flops = {"tower": 1e8, "projector": 1e7, "selection": 1e6 * (keep < 144), "prefill": 6e6 * keep, "decode": 6e6}
    return {
        "text": 64,
        "image": [96, 96],
        "available": 144.0,
        "layer_mean": float(keep),
        "tokens_share": keep / 144,
        "flops": flops,
        "bops": {stage: n * bits**2 / 256 for stage, n in flops.items()},
        "flops_share": sum(n for stage, n in flops.items() if stage != "decode") / 9.74e8,
        "weight_bytes": 6_000_000 * bits // 16,
        "kv_bytes": 2000.0 * (keep + 64),
        "activation_bytes": 1e6,
    }


def pruned(method: Any, sensitivity: Any, fusion: Any, keep: int) -> Data:
    """A `prune` block."""
    chosen = {"method": method, "keep": keep, "sensitivity": sensitivity, "fusion": fusion}
    return {**chosen, "positions": "compact"}


def ablation(rows: int) -> list[Data]:
    """That many records: an unpruned one, then methods by budgets by models."""
    grid = itertools.product(("diagram-llava", "diagram-llava-wide"), (4, 8, 16), (64, 32, 16, 8), METHODS)
    cells = itertools.cycle(grid)
    found = [record(0, None)]
    for index in range(1, rows):
        model, bits, keep, method = next(cells)
        found.append(record(index, pruned(*method, keep), model, bits))
    return found


def hostile() -> list[Data]:
    """Valid records that attack the page: markup, formulas, and values where nobody expects them."""
    attack = record(900, pruned(f"cdpruner{SCRIPT_END}", {f"{IMG}": {IMG: SCRIPT_END}}, "'\"><b>x", 32), IMG)
    attack["name"] = f"{SCRIPT_END}{IMG}"
    attack["run_id"] = f'"{IMG}'
    attack["spec"]["task"]["data"] = f"a: b # {SCRIPT_END}\n- 'x'\t\x00\x85{IMG}"
    attack["receipt"]["summary"] = IMG
    attack["receipt"]["fallbacks"] = [IMG]
    attack["receipt"]["linears"][0]["name"] = IMG
    attack["environment"][IMG] = {"deep": [SCRIPT_END]}
    attack["scores"]["columns"].insert(0, {"name": IMG, "k": 1, "n": 2})
    attack["scores"]["columns"].insert(1, {"name": "__proto__", "unavailable": IMG})
    attack["notes"] = [f"stand-in {IMG}", SCRIPT_END]
    formula = record(901, None, "=HYPERLINK(1)")
    formula["name"] = "=1+1"
    odd = record(902, None)
    odd["name"] = "lone \ud800 surrogate"
    odd["spec"] = {"quantize": 4, "prune": ["x"], "task": "no mapping", "deep": {"nan": NAN, "none": None}}
    odd["scores"]["columns"] = [{"name": "Avg", "accuracy": NAN}, {"name": "NAT", "mean": 7.0}, {"name": "NO", "k": 0}]
    odd["environment"] = {"python": None, "torch": NAN}
    return [attack, formula, odd]


def damaged() -> dict[str, Data]:
    """What is no valid record, by the name under which a page's builder says that it leaves it out."""
    nan = record(903, None)
    nan["timing"] = {"seconds": NAN}
    more = record(904, None)
    more["scores"]["columns"] = [{"name": "Avg", "k": 9, "n": 3, "accuracy": 7}]
    newer = record(905, None)
    newer["schema"] = 99
    wrong = record(906, None)
    wrong["run_id"] = IMG
    wrong["scores"]["columns"] = [None, {"name": "Avg", "accuracy": "high"}]
    return {
        "without a name": {},
        "7": {
            "schema": 2,
            "spec": "no mapping",
            "scores": [1],
            "tokens": 3,
            "receipt": None,
            "notes": "text",
            "name": 7,
        },
        "lone ? surrogate": {"name": "lone \ud800 surrogate", "scores": {"columns": []}},
        nan["run_id"]: nan,
        more["run_id"]: more,
        newer["run_id"]: newer,
        IMG: wrong,
    }
