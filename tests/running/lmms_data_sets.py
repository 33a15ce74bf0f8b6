"""Small data sets of lmms-eval's tasks in the schema and the layout that they have on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Image, Value
from llava_checkpoints import picture

Row = dict[str, Any]
TEXT, WHOLE = Value("string"), Value("int64")


@dataclass(frozen=True)
class DataSet:
    """One configuration of a hub data set.

    Attributes:
        path: hub id.
        split: the split that is asked.
        features: columns that are not a text.
        rows: the documents; columns of pictures are added by `write`.
        config: name of the configuration; "" if there is only one.
    """

    path: str
    split: str
    features: dict[str, Any]
    rows: list[Row]
    config: str = ""

    def write(self, root: Path) -> None:
        """Write it below a folder as `hf download` lays it out."""
        columns = {name: self.features.get(name, TEXT) for name in self.rows[0]}
        folder = root / self.path / (self.config or "data")
        folder.mkdir(parents=True)
        table = datasets.Dataset.from_list(self.rows, features=Features(columns))
        table.to_parquet(str(folder / f"{self.split}-00000-of-00001.parquet"))


def write_all(sets: Sequence[DataSet], root: Path) -> Path:
    """Write the data sets of one task below a folder, with the README that names their configurations."""
    for one in sets:
        one.write(root)
    named = [one for one in sets if one.config]
    if named:
        lines = ["---", "configs:"]
        for one in named:
            lines += [f"- config_name: {one.config}", "  data_files:"]
            lines += [f"  - split: {one.split}", f"    path: {one.config}/{one.split}-*"]
        (root / named[0].path / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


def _vqa(answers: list[Any]) -> Row:
    return {"image": picture(0), "question": "what color is it?", "question_id": 7, "answers": answers}


PICTURE = {"image": Image()}
ANSWERS = ["red"] * 7 + ["dark red"] * 3
POPE = DataSet(
    "lmms-lab-encoder/POPE",
    "test",
    PICTURE,
    [
        {
            "id": str(at),
            "question_id": str(at),
            "question": f"Is there a {thing} in the image?",
            "answer": answer,
            "image_source": f"COCO_val2014_{at // 2:012}",
            "image": picture(at // 2),
            "category": category,
        }
        for at, (thing, answer, category) in enumerate(
            [
                ("cat", "yes", "random"),
                ("dog", "no", "popular"),
                ("tree", "yes", "random"),
                ("fox", "no", "popular"),
                ("fork", "no", "adversarial"),
            ]
        )
    ],
)
MME = DataSet(
    "lmms-lab-encoder/MME",
    "test",
    PICTURE,
    [
        {
            "question_id": f"{category}/{number}.png",
            "image": picture(number),
            "question": f"Is this a {thing}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category in ("existence", "code_reasoning")
        for number in (0, 1)
        for thing, answer in (("cat", "Yes"), ("dog", "No"))
    ],
)
TEXTVQA = DataSet(
    "lmms-lab-encoder/textvqa",
    "validation",
    {**PICTURE, "question_id": Value("int32"), "answers": [TEXT], "ocr_tokens": [TEXT], "image_width": Value("int32")},
    [
        {
            **_vqa(ANSWERS),
            "image_id": "003a8ae2ef43b901",
            "image_width": 32,
            "ocr_tokens": ["DAKOTA"],
            "set_name": "val",
        },
        {**_vqa(["two"] * 10), "image_id": "b", "image_width": 32, "ocr_tokens": [], "set_name": "val"},
    ],
)
GQA = [
    DataSet(
        "lmms-lab-encoder/GQA",
        "testdev",
        {"isBalanced": Value("bool")},
        [
            {
                "id": f"2{at}",
                "imageId": f"n{at % 2}",
                "question": question,
                "answer": answer,
                "fullAnswer": f"{answer}.",
                "isBalanced": True,
            }
            for at, (question, answer) in enumerate([("Is it overcast?", "no"), ("Who is wearing the dress?", "woman")])
        ],
        "testdev_balanced_instructions",
    ),
    DataSet(
        "lmms-lab-encoder/GQA",
        "testdev",
        PICTURE,
        [{"id": f"n{at}", "image": picture(at)} for at in range(2)],
        "testdev_balanced_images",
    ),
]
MMBENCH = DataSet(
    "lmms-lab-encoder/MMBench",
    "dev",
    {**PICTURE, "index": WHOLE},
    [
        {
            "index": index,
            "question": "Which one is shown?",
            "hint": hint,
            "answer": answer,
            "A": "a cat",
            "B": "a dog",
            "C": "nan",
            "D": "nan",
            "category": "object_localization",
            "image": picture(at),
            "source": "custom",
            "L2-category": "finegrained_perception (instance-level)",
            "comment": "nan",
            "split": "dev",
        }
        for at, (index, hint, answer) in enumerate(
            [(241, "nan", "A"), (252, "Look at the tail.", "B"), (253, "nan", "A")]
        )
    ],
    "en",
)
SCIENCEQA = DataSet(
    "lmms-lab-encoder/ScienceQA",
    "test",
    {**PICTURE, "choices": [TEXT], "answer": Value("int8")},
    [
        {
            "image": picture(at),
            "question": "Which is a mammal?",
            "choices": ["cat", "fly", "fern"],
            "answer": at,
            "hint": hint,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "biology",
            "category": "Animals",
            "skill": "Identify",
            "lecture": "",
            "solution": "",
        }
        for at, hint in enumerate(["", "Mammals have fur."])
    ],
    "ScienceQA-IMG",
)
VQAV2 = DataSet(
    "lmms-lab-encoder/VQAv2",
    "validation",
    {
        **PICTURE,
        "image_id": WHOLE,
        "question_id": WHOLE,
        "answers": [{"answer": TEXT, "answer_confidence": TEXT, "answer_id": WHOLE}],
    },
    [
        {
            **_vqa([{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)]),
            "question_type": "what color",
            "multiple_choice_answer": answers[0],
            "image_id": 262148,
            "answer_type": "other",
        }
        for answers in (ANSWERS, ["2"] * 10)
    ],
)
VIZWIZ = DataSet(
    "lmms-lab-encoder/VizWiz-VQA",
    "val",
    {**PICTURE, "answers": [TEXT]},
    [
        {**_vqa(answers), "question_id": f"VizWiz_val_{at:08}", "category": "other"}
        for at, answers in enumerate((ANSWERS, ["unanswerable"] * 10))
    ],
)
SEED = DataSet(
    "lmms-lab-encoder/SEED-Bench",
    "test",
    {"image": [Image()], "question_type_id": WHOLE, "segment": [WHOLE]},
    [
        {
            "answer": answer,
            "choice_a": "One",
            "choice_b": "Two",
            "choice_c": "Three",
            "choice_d": "Four",
            "data_id": f"{at}",
            "data_type": "image" if pictures == 1 else "video",
            "question": "How many cats are there?",
            "question_id": f"{at}",
            "question_type_id": 5,
            "image": [picture(at + frame) for frame in range(pictures)],
            "segment": [],
        }
        for at, (answer, pictures) in enumerate([("A", 1), ("C", 1), ("B", 3)])
    ],
)
MMSTAR = DataSet(
    "Lin-Chen/MMStar",
    "val",
    {**PICTURE, "index": WHOLE, "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT}},
    [
        {
            "index": at,
            "question": "Which option is shown? Options: A: cat, B: dog, C: fox, D: tree",
            "image": picture(at),
            "answer": answer,
            "category": category,
            "l2_category": l2,
            "meta_info": {"source": "MMBench", "split": "val", "image_path": f"images/{at}.jpg"},
        }
        for at, (answer, category, l2) in enumerate(
            [
                ("A", "coarse perception", "image emotion"),
                ("B", "coarse perception", "image scene and topic"),
                ("C", "math", "geometry"),
                ("D", "math", "geometry"),
            ]
        )
    ],
)
MMMU = DataSet(
    "lmms-lab-encoder/MMMU",
    "validation",
    {f"image_{n}": Image() for n in range(1, 8)},
    [
        {
            "id": f"validation_{subject}_{at}",
            "question": question,
            "options": options,
            "explanation": "",
            **{f"image_{n}": picture(n) if n <= pictures else None for n in range(1, 8)},
            "img_type": "['Tables']",
            "answer": answer,
            "topic_difficulty": "Medium",
            "question_type": kind,
            "subfield": "Managerial Accounting",
        }
        for at, (subject, question, options, pictures, answer, kind) in enumerate(
            [
                ("Accounting", "What is in <image 1>?", "['a cat', 'a dog']", 1, "A", "multiple-choice"),
                ("Accounting", "Is <image 1> like <image 2>?", "['yes', 'no']", 2, "B", "multiple-choice"),
                ("Art", "How many are in <image 1>?", "[]", 1, "12", "open"),
            ]
        )
    ],
)
