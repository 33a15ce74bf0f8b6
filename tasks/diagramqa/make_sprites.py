"""Build `sprites.png` and `sprites.json` from the npm package emoji-datasource-google.

This is run once by hand, because the two resulting files are part of the repository:

    python make_sprites.py emoji-datasource-google-16.0.0.tgz

Only the icons listed below are used. Their names are plain English words, so that a model that is trained from scratch
can learn them. Near duplicates, such as dog face and dog or the several moons, are left out.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zlib
from pathlib import Path

from PIL import Image

CELL = 32
COLUMNS = 16
HELD_OUT_PERCENT = 15

# Icons by category. A word is the package's short name of an icon or, where our name differs, "short_name:our_name". An
# underscore in our name stands for a space.
ICONS: dict[str, str] = {
    "animal": (
        "dog cat cow pig horse lion_face:lion tiger rabbit fox_face:fox bear panda_face:panda "
        "monkey_face:monkey wolf mouse elephant koala giraffe_face:giraffe zebra_face:zebra hedgehog "
        "kangaroo llama hippopotamus:hippo raccoon sloth gorilla deer bat camel goat sheep "
        "rhinoceros:rhino chipmunk:squirrel skunk beaver whale dolphin seal rooster baby_chick:chick "
        "penguin eagle duck owl peacock parrot swan flamingo turkey crocodile snake turtle lizard "
        "t-rex:dinosaur frog octopus fish crab shark squid lobster jellyfish snail ant bee ladybug "
        "spider butterfly scorpion worm fly"
    ),
    "fruit": (
        "grapes:grape melon watermelon tangerine:orange lemon banana pineapple apple pear peach "
        "cherries:cherry strawberry kiwifruit:kiwi coconut mango blueberries:blueberry"
    ),
    "vegetable": (
        "corn eggplant cucumber potato carrot broccoli garlic onion bell_pepper:pepper tomato "
        "pea_pod:pea leafy_green:lettuce"
    ),
    "meal": (
        "hotdog:hot_dog taco hamburger:burger pizza bread fried_egg popcorn croissant bacon "
        "pancakes:pancake pretzel sandwich bagel cheese_wedge:cheese waffle butter rice spaghetti "
        "sushi icecream:ice_cream doughnut:donut cookie candy lollipop honey_pot:honey cake cupcake "
        "chocolate_bar:chocolate"
    ),
    "plant": (
        "evergreen_tree:pine_tree palm_tree deciduous_tree:tree cactus four_leaf_clover:clover "
        "maple_leaf tulip rose sunflower lotus seedling ear_of_rice:wheat hyacinth"
    ),
    "vehicle": (
        "car bus ambulance fire_engine:fire_truck police_car taxi truck tractor bike:bicycle "
        "motor_scooter:scooter racing_motorcycle:motorcycle racing_car:race_car rocket helicopter "
        "airplane ship boat:sailboat canoe speedboat steam_locomotive:train sled"
    ),
    "tool": (
        "hammer wrench screwdriver axe carpentry_saw:saw shovel pick ladder toolbox gear key "
        "broom bucket straight_ruler:ruler pencil2:pencil microscope telescope flashlight paperclip "
        "toothbrush"
    ),
    "clothing": (
        "shirt dress tophat:hat crown boot high_heel athletic_shoe:shoe "
        "socks:sock scarf gloves:glove coat billed_cap:cap ring"
    ),
    "building": "house hospital school factory european_castle:castle tent church stadium hotel",
    "instrument": (
        "saxophone guitar musical_keyboard:piano trumpet violin drum_with_drumsticks:drum maracas:maraca "
        "flute banjo accordion"
    ),
    "sky": "sunny:sun crescent_moon:moon cloud rainbow snowflake tornado zap:lightning rain_cloud:rain",
    "toy": (
        "soccer:soccer_ball basketball football tennis kite teddy_bear yo-yo bowling boomerang "
        "game_die:dice balloon jigsaw:puzzle skateboard"
    ),
    "household": (
        "chair bed door bathtub alarm_clock:clock candle bell book camera telephone_receiver:phone "
        "tv:television radio umbrella spoon teapot soap bulb:light_bulb"
    ),
}


def main(archive: Path, folder: Path) -> None:
    """Read the icons from the package and write the sprite sheet and its index.

    Args:
        archive: the package as a .tgz file.
        folder: folder that the two files are written to.

    Raises:
        FileNotFoundError: if a file is missing from the package.
        KeyError: if the package has no icon of a listed name.
        ValueError: if two icons have the same name.
    """
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/emoji.json")
        if member is None:
            raise FileNotFoundError("package/emoji.json is missing from the archive")
        known = {name: e["image"] for e in json.load(member) for name in e["short_names"]}
        cells: list[tuple[str, str, Image.Image]] = []
        for category, words in ICONS.items():
            for word in words.split():
                short, _, name = word.partition(":")
                if short not in known:
                    raise KeyError(f"no icon called {short} in the package")
                png = tar.extractfile(f"package/img/google/64/{known[short]}")
                if png is None:
                    raise FileNotFoundError(known[short])
                icon = Image.open(io.BytesIO(png.read())).convert("RGBA")
                icon = icon.crop(icon.getbbox())
                icon.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
                cells.append(((name or short).replace("_", " "), category, icon))
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    index: dict[str, dict[str, object]] = {}
    for i, (name, category, icon) in enumerate(cells):
        column, row = i % COLUMNS, i // COLUMNS
        corner = (column * CELL + (CELL - icon.width) // 2, row * CELL + (CELL - icon.height) // 2)
        sheet.paste(icon, corner)
        held_out = zlib.crc32(name.encode()) % 100 < HELD_OUT_PERCENT
        index[name] = {"cell": [column, row], "category": category, "held_out": held_out}
    if len(index) != len(cells):
        raise ValueError("two icons share a name")
    sheet.save(folder / "sprites.png", optimize=True)
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in index.items()]
    (folder / "sprites.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(len(index), "icons,", sum(bool(e["held_out"]) for e in index.values()), "held out")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: make_sprites.py emoji-datasource-google-16.0.0.tgz")
    main(Path(sys.argv[1]), Path(__file__).parent)
