"""Task 3: editing a small image by a sentence, in place.  The model re-masks the pixels that the instruction changes,
reveals new ones, and leaves the rest alone.

    python edit_image.py                            train base, baselines and RM, print the table, draw a gallery
    python edit_image.py --pairs DIR --test DIR     the same on your own pairs (pairs.jsonl and PNG files)
    python edit_image.py --evaluate                 score the shipped checkpoint on 1,000 held-out scenes
    python edit_image.py --image IN.png --instruction "make the house red" --out OUT.png

Reading order: scenes, pairs, network, training states, decoding, metrics, evaluation, training, figures, command line.
A pixel is a token and so is a word.  One sequence is [instruction | source | target], and only the target is editable;
the network adds the source's embedding to the target's at the same pixel, so that its length is words + pixels.
Ids: MASK 0, colour c of the palette 1 + c, the same colour in the source 1 + C + c, then "no image", "no word", words.
Differences from the paper: pixels of a palette instead of a VQ codebook; most of RM's trajectories re-mask the
whole edit at once (revision_states); instruction and source, which never change, have no history (PromptHistory).
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reflective_masking as rm
from history import ABSENT, HistoryReference, rms_norm
from reflective_masking import InputError, MaskDiffusionTransformer, TransformerConfig

HERE = Path(__file__).parent
MASK = 0
PAPER = {  # precision %, coverage %, MAE-RGB, PSNR, SSIM of arXiv 2606.16700: photographs, not comparable with ours
    "base": (65.81, 41.68, 12.497, 23.092, 0.6256),
    "+ SFT": (71.84, 48.42, 11.035, 23.900, 0.6570),
    "RM": (99.73, 73.02, 3.613, 34.759, 0.9744),
}
METHODS = {  # gamma, rotate of Eq. 2, and the share of instructions and of sources dropped for guidance
    "base": (0.0, False, 0.1),  # mask diffusion on captions and images; BASE_EDITS of its rows are edits
    "sft": (0.0, False, 0.0),  # base, then mask diffusion of the whole target given instruction and source
    "rm": (0.0, False, 0.0),  # base, then Reflective Masking in place
    "history": (0.9, True, 0.0),  # the same with History Reference
    "guided": (0.0, False, 0.1),  # the same as rm with dropout, for classifier-free guidance
}
BASE_EDITS = 0.1  # the paper's base model has seen some editing before its post-training, too
BASE_SHARE = 0.2  # the base model's steps over those of each method that starts from it
LAWFUL = 0.2  # share of RM's rows that follow the paper's law of trajectories (revision_states)
TRAINING = dict(batch_size=16, learning_rate=2e-3, muon_factor=3)
TEST_SEED = 1_000_000  # of the held-out scenes
NEEDS = ("codec", "method", "gamma", "rotate")  # what a checkpoint must say

# ---------------------------------------------------------------------------------------------------------------
# Scenes: 16x16 pixel art, drawn so that source and instruction determine the target

SIZE = 16
COLOURS = {  # name -> light and dark shade
    "red": ((214, 46, 46), (150, 24, 36)),
    "orange": ((240, 140, 40), (184, 92, 20)),
    "yellow": ((250, 220, 70), (206, 164, 40)),
    "green": ((70, 180, 80), (36, 120, 60)),
    "blue": ((70, 110, 230), (40, 66, 160)),
    "purple": ((160, 80, 200), (106, 46, 146)),
    "white": ((246, 246, 250), (200, 204, 216)),
}
FIXED = {"K": (36, 32, 44), "L": (255, 240, 190), "B": (122, 78, 46), "S": (240, 190, 150), "G": (24, 92, 44)}
SKIES = {
    "day": ((140, 200, 240), (166, 216, 246)),
    "dusk": ((236, 150, 130), (246, 176, 140)),
    "night": ((30, 34, 74), (52, 56, 104)),
}
GROUNDS = {
    "meadow": ((126, 200, 96), (104, 178, 84)),
    "sand": ((232, 208, 150), (216, 188, 126)),
    "stone": ((150, 150, 158), (122, 122, 132)),
}
SHADES = [*SKIES.values(), *GROUNDS.values(), *COLOURS.values()]
PALETTE = [rgb for pair in SHADES for rgb in pair] + list(FIXED.values())
# Big and small, rows from top to bottom: A and a are the two shades of the object's colour, the others are FIXED.
SPRITES = {
    "house": ("...A.../..AAA../.AAAAA./.LLLLL./.LKLBL./.LLLBL.", "..A../.AAA./.LBL."),
    "tree": (".AAA./AAaAA/AaAAA/.AAA./..B../..B..", ".A./AaA/.B."),
    "car": ("..AAA../.ALKLA./AAAAAAA/.K...K.", ".AAA./AALAA/.K.K."),
    "flower": (".A.A./AALAA/.AAA./..G../.GG../..G..", "A.A/.L./.G."),
    "mushroom": (".AAA./ALAAA/AAALA/..L../..L..", "AAA/ALA/.L."),
    "person": (".BBB./.SSS./AAAAA/SAAAS/.K.K./.K.K.", "B/S/A/K"),
    "cat": ("A...A/AAAAA/AKAKA/.AAA./aAAAa", "A.A/AAA/aKa"),
    "lamp": (".AAA./.ALA./..K../..K../..K../.KKK.", "AAA/.K./KKK"),
    "cloud": ("..AAA../.AAAAAa/AAAAaa.", ".AAA./AAaaA"),
    "balloon": (".AAA./ALAAA/AAAAa/.AAa./..B..", "ALA/AAA/.B."),
    "bird": ("K...K/AK.KA/.AAA./..L..", "K.K/AAA"),
    "star": ("..A../AAAAA/.AAA./.A.A.", ".A./ALA/A.A"),
    "kite": ("..A../.AaA./AaaaA/.AaA./..A..", "AaA/.A./.B."),
}
IN_THE_SKY = ("cloud", "balloon", "bird", "star", "kite")
BOTTOM = {"top": 5, "back": 10, "front": 14}  # the lowest row of an object; drawn in this order
CENTRE = {"left": 3, "middle": 8, "right": 12}
VISIBLE = 0.6  # of every object at least this share shows, so that what is hidden can be inferred
NAMES = {*SPRITES, *COLOURS, *BOTTOM, *CENTRE, "big", "small"}  # the words that name kind, colour, size and place
VERBS = ("recolour", "add", "remove", "move", "replace")
LEFT_OUT = 0.15  # of the words of a training instruction that are not NAMES
UNSEEN = {  # the phrasings kept for test, of words that training knows; the third of each was chosen before any result
    "recolour": ["colour {it} {colour}", "change {it} to {colour}", "to {colour} change the colour of {it}"],
    "add": ["at the {place} add {new}", "at the {place} there should be {new}", "{new} there should be at the {place}"],
    "remove": ["remove {it} from the picture", "take away {it}", "from the picture drop {it}"],
    "move": ["to the {place} move {it}", "{it} should move to the {place}", "please carry {it} to the {place}"],
    "replace": ["instead of {it} put {new}", "change {it} for {new}", "draw {new} for {it}"],
}
SEEN = {  # for training, and half of the test; "a/b" stands for one phrasing with a and one with b
    "recolour": [
        "make/paint/turn/dye {it} {colour}", "please make/paint/dye {it} {colour}", "turn/set/dye {it} to {colour}",
        "{it} should be/become/turn {colour}", "change/set/turn the colour of {it} to {colour}",
        "the colour of {it} should be {colour}", "{colour} should be the colour of {it}", "to {colour} turn/set {it}",
    ],
    "add": [
        "add/put/draw/place {new} at the {place}", "please add/put/draw {new} at the {place}",
        "at the {place} put/draw/place {new}", "there should be {new} at the {place}",
        "{new} should be/appear at the {place}", "at the {place} please put/draw {new}",
        "at the {place} should appear {new}",
    ],
    "remove": [
        "remove/delete/erase/drop {it}", "please remove/delete/erase {it}",
        "delete/erase/take/drop {it} from the picture", "take/drop/put {it} away",
        "put/drop away {it}", "{it} should disappear/go", "away with {it}",
        "from the picture remove/delete/take {it}", "there should be no more {it}",
    ],
    "move": [
        "move/bring/shift/carry {it} to the {place}", "please move/bring/shift {it} to the {place}",
        "to the {place} bring/shift/carry {it}", "put/place {it} at the {place}", "{it} should be at the {place}",
        "{it} should go/shift/come to the {place}", "to the {place} please shift/bring {it}",
        "to the {place} should go/come {it}",
    ],
    "replace": [
        "replace/exchange {it} by {new}", "swap/exchange/trade {it} for {new}", "turn/change/make {it} into {new}",
        "instead of {it} draw/add/place {new}", "put/draw {new} instead of {it}",
        "please replace/exchange {it} by {new}", "{it} should become/be {new}",
        "instead of {it} there should be {new}", "for {it} swap/draw {new}",
    ],
}


def phrasings(pattern: str) -> list[str]:
    """From "turn/set {it}": "turn {it}" and "set {it}"."""
    return [" ".join(words) for words in product(*(word.split("/") for word in pattern.split()))]


PHRASES = {verb: ([text for pattern in SEEN[verb] for text in phrasings(pattern)], UNSEEN[verb]) for verb in VERBS}


class Thing(NamedTuple):
    kind: str
    size: str  # "big" or "small"
    colour: str
    depth: str  # "top", "back" or "front"
    column: str  # "left", "middle" or "right"

    @property
    def place(self) -> str:
        return f"{self.depth} {self.column}"


class Scene(NamedTuple):
    sky: str
    ground: str
    things: tuple[Thing, ...]


class Edit(NamedTuple):
    verb: str
    old: Thing | None  # None: add
    new: Thing | None  # None: remove
    instruction: str
    source: Scene
    target: Scene
    unseen_phrase: bool


@lru_cache(None)
def background(sky: str, ground: str) -> np.ndarray:
    """Palette indices, int16 [256]: each half in two shades, by a rule of row and column alone."""
    y, x = np.mgrid[:SIZE, :SIZE]
    dots = {"day": (x + 2 * y) % 8 == 0, "dusk": y % 3 == 0, "night": (3 * x + 5 * y) % 11 == 0}[sky]
    grain = {
        "meadow": (x + 2 * y) % 4 == 0,
        "sand": (y % 2 == 0) & ((x + y) % 3 == 0),
        "stone": (y % 3 == 0) | ((x + y // 3 % 2 * 2) % 4 == 0),
    }[ground]
    above, below = 2 * list(SKIES).index(sky), 2 * len(SKIES) + 2 * list(GROUNDS).index(ground)
    return np.where(y < 9, above + dots, below + grain).astype(np.int16).ravel()


@lru_cache(None)
def stamp(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that a thing covers, int [k] in 0..255, and their palette indices, int16 [k]."""
    rows = SPRITES[thing.kind][thing.size == "small"].split("/")
    shade = 2 * (len(SKIES) + len(GROUNDS) + list(COLOURS).index(thing.colour))
    key = {"A": shade, "a": shade + 1} | {c: 2 * len(SHADES) + i for i, c in enumerate(FIXED)}
    top, left = BOTTOM[thing.depth] - len(rows) + 1, CENTRE[thing.column] - len(rows[0]) // 2
    cells = [
        ((top + y) * SIZE + left + x, key[c]) for y, row in enumerate(rows) for x, c in enumerate(row) if c != "."
    ]
    place, colour = zip(*cells)
    return np.array(place), np.array(colour, np.int16)


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Palette indices, int16 [256], and which thing shows at each pixel, int8 [256] (-1: the background)."""
    image, owner = background(scene.sky, scene.ground).copy(), np.full(SIZE * SIZE, -1, np.int8)
    for i, thing in sorted(enumerate(scene.things), key=lambda pair: draw_order(pair[1])):
        place, colour = stamp(thing)
        image[place], owner[place] = colour, i
    return image, owner


def draw_order(thing: Thing) -> tuple[int, int]:
    return list(BOTTOM).index(thing.depth), CENTRE[thing.column]


def all_show(scene: Scene, owner: np.ndarray) -> bool:
    seen = np.bincount(owner + 1, minlength=len(scene.things) + 1)[1:]
    return all(count >= VISIBLE * len(stamp(thing)[0]) for count, thing in zip(seen, scene.things))


def is_held_out(thing: Thing) -> bool:
    """One in ten triples of kind, colour and place is never trained on; every two of the three are."""
    place = 3 * list(BOTTOM).index(thing.depth) + list(CENTRE).index(thing.column)
    return (list(SPRITES).index(thing.kind) + 3 * list(COLOURS).index(thing.colour) + 7 * place) % 10 == 0


def random_thing(rng: random.Random, depth: str, column: str) -> Thing:
    kind = rng.choice([kind for kind in SPRITES if (kind in IN_THE_SKY) == (depth == "top")])
    return Thing(kind, rng.choice(("big", "small")), rng.choice(list(COLOURS)), depth, column)


def references(thing: Thing, scene: Scene) -> list[str]:
    """The ways to name a thing that fit no other of the scene."""
    ways = [("kind",), ("colour", "kind"), ("size", "kind"), ("kind", "place")]
    alone = []
    for way in ways:
        same = [other for other in scene.things if all(getattr(other, a) == getattr(thing, a) for a in way)]
        if len(same) == 1:
            words = [getattr(thing, attribute) for attribute in way if attribute != "place"]
            alone.append(" ".join(["the", *words] + [f"at the {thing.place}"] * ("place" in way)))
    return alone


def random_edit(rng: random.Random, test: bool = False) -> Edit | None:
    """One edit of a random scene, or None where the draw does not work out.

    For training no thing is held out.  For test the thing that the edit makes, or removes, is held out and no other,
    and half of the phrasings are those kept for test.
    """
    places = [(depth, column) for depth in BOTTOM for column in CENTRE]
    rng.shuffle(places)
    count, verb = rng.randint(2, 4), rng.choice(VERBS)
    things = tuple(random_thing(rng, *place) for place in places[:count])
    source = Scene(rng.choice(list(SKIES)), rng.choice(list(GROUNDS)), things)
    old = None if verb == "add" else things[0]
    if verb == "add":
        new = random_thing(rng, *places[count])
    elif verb == "remove":
        new = None
    elif verb == "recolour":
        new = old._replace(colour=rng.choice([c for c in COLOURS if c != old.colour]))
    elif verb == "replace":
        new = random_thing(rng, old.depth, old.column)
    else:
        free = [p for p in places[count:] if (p[0] == "top") == (old.depth == "top")]
        if not free:
            return None
        new = old._replace(depth=free[0][0], column=free[0][1])
    target = source._replace(things=things[old is not None :] + ((new,) if new else ()))
    focus = new or old
    if verb == "replace" and new.kind == old.kind or is_held_out(focus) != test:
        return None
    if any(is_held_out(thing) for thing in source.things + target.things if thing != focus):
        return None
    if not all(all_show(scene, render(scene)[1]) for scene in (source, target)):
        return None
    unseen = test and rng.random() < 0.5
    text = rng.choice(PHRASES[verb][unseen]).format(
        it=rng.choice(references(old, source)) if old else "",
        new=f"a {new.size} {new.colour} {new.kind}" if new else "",
        colour=new.colour if new else "",
        place=new.place if new else "",
    )
    return Edit(verb, old, new, text, source, target, unseen)


def leave_words_out(text: str, rng: random.Random) -> str:
    """The instruction with each word but NAMES left out with probability LEFT_OUT.

    For training, so that the model does not hang what is to be done on a single word ("change", "into").
    """
    return " ".join(word for word in text.split() if word in NAMES or rng.random() >= LEFT_OUT)


def caption(scene: Scene, rng: random.Random) -> str:
    """Sky, ground and up to three of the things: "night sand big red house back left"."""
    named = rng.sample(scene.things, min(3, len(scene.things)))
    return " ".join([scene.sky, scene.ground, *(" ".join(thing) for thing in named)])


def random_edits(count: int, seed: int, test: bool = False) -> list[Edit]:
    """count edits, the same for the same seed; about 0.2 ms each, for test 4 ms."""
    rng, edits = random.Random(seed), []
    while len(edits) < count:
        edit = random_edit(rng, test)
        if edit:
            edits.append(edit)
    return edits


def scene_words() -> list[str]:
    """Every word of captions and instructions."""
    texts = [text for phrases in PHRASES.values() for text in phrases[0]]
    words = {word for text in texts for word in text.split() if "{" not in word} | {"a"}
    return sorted(words | NAMES | set(SKIES) | set(GROUNDS))


# ---------------------------------------------------------------------------------------------------------------
# Pairs and their tokens


def split_words(text: str) -> list[str]:
    return text.lower().replace(",", " ").rstrip(".! ").split()


@dataclass
class Codec:
    """Between images and words on one side and token ids on the other; saved inside the checkpoint."""

    palette: list[list[int]]  # C colours, RGB in 0..255
    words: list[str]
    length: int  # words of an instruction at most
    height: int
    width: int

    @property
    def no_image(self) -> int:
        return 1 + 2 * len(self.palette)

    @property
    def no_word(self) -> int:
        return 2 + 2 * len(self.palette)

    @property
    def vocabulary(self) -> int:
        return 3 + 2 * len(self.palette) + len(self.words)

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def prompt(self) -> int:
        """Positions before the target: instruction and source."""
        return self.length + self.pixels

    def encode_text(self, text: str, where: str = "the instruction") -> list[int]:
        """length ids, "no word" at the end.  Raises InputError that names an unknown word."""
        words = split_words(text)
        known = {word: 3 + 2 * len(self.palette) + i for i, word in enumerate(self.words)}
        for word in words:
            if word not in known:
                raise InputError(f"{where} has the word {word!r}, which the model does not know")
        if not 0 < len(words) <= self.length:
            raise InputError(f"{where} has {len(words)} words, between 1 and {self.length} are possible")
        return [known[word] for word in words] + [self.no_word] * (self.length - len(words))

    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> int16 [H * W], 1 + the nearest palette entry (squared RGB distance)."""
        colours, index = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
        distance = ((colours[:, None].astype(int) - np.array(self.palette)) ** 2).sum(-1)
        return (1 + distance.argmin(1)[index.ravel()]).astype(np.int16)

    def decode_image(self, tokens: Tensor) -> Tensor:
        """int64 [..., H * W] -> uint8 [..., H, W, 3]; MASK is magenta."""
        table = torch.tensor([[255, 0, 255], *self.palette], dtype=torch.uint8)
        return table[tokens.cpu()].unflatten(-2, (self.height, self.width))


@dataclass
class Pairs:
    """n edits as tokens: source, target int64 [n, H * W]; instruction, caption (of the target) int64 [n, length]."""

    source: Tensor
    target: Tensor
    instruction: Tensor
    caption: Tensor
    texts: list[str]
    verbs: list[str]
    unseen_phrase: list[bool] | None = None

    def to(self, device: torch.device) -> "Pairs":
        moved = {name: getattr(self, name).to(device) for name in ("source", "target", "instruction", "caption")}
        return Pairs(**moved, texts=self.texts, verbs=self.verbs, unseen_phrase=self.unseen_phrase)


def scene_pairs(count: int, seed: int, test: bool = False) -> tuple[Pairs, Codec]:
    """Pairs of our own scenes, and their codec; of training instructions some words are left out."""
    codec = Codec([list(rgb) for rgb in PALETTE], scene_words(), 17, SIZE, SIZE)
    edits, rng = random_edits(count, seed, test), random.Random(seed)
    images = [[render(scene)[0] for scene in (edit.source, edit.target)] for edit in edits]
    source, target = torch.from_numpy(np.array(images).astype(np.int64) + 1).unbind(1)
    phrased = [edit.instruction if test else leave_words_out(edit.instruction, rng) for edit in edits]
    instruction = torch.tensor([codec.encode_text(text) for text in phrased])
    captions = torch.tensor([codec.encode_text(caption(edit.target, rng)) for edit in edits])
    texts, verbs = [edit.instruction for edit in edits], [edit.verb for edit in edits]
    return Pairs(source, target, instruction, captions, texts, verbs, [edit.unseen_phrase for edit in edits]), codec


def read_png(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]; transparency is laid on white.  Raises InputError."""
    from PIL import Image

    try:
        image = Image.open(path).convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None


def read_pairs(folder: Path, codec: Codec | None = None, most: int | None = None, colours: int = 512):
    """The pairs of folder/pairs.jsonl: (Pairs, Codec, how many were left out since nothing changes in the palette).

    A line: {"instruction": ..., "source": PNG, "target": PNG} and optionally "verb" (else the first word).
    codec: None learns words and palette from the folder, the most frequent colours if there are more than colours.
    Raises InputError that names the file and line.
    """
    try:
        lines = (folder / "pairs.jsonl").read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'pairs.jsonl'} cannot be read: {error}") from None
    texts, verbs, images = [], [], []
    for number, line in enumerate(lines[:most], 1):
        where = f"{folder / 'pairs.jsonl'} line {number}"
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            text, names = pair["instruction"], [pair["source"], pair["target"]]
            verb = pair.get("verb") or text.lower().split()[0]
            if not all(isinstance(part, str) for part in (text, verb, *names)):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise InputError(f'{where} must be JSON with "instruction", "source" and "target"') from None
        both = [read_png(folder / name) for name in names]
        size = (codec.height, codec.width) if codec else (images[0] if images else both)[0].shape[:2]
        for image, name in zip(both, names):
            if image.shape[:2] != size:
                wrong = f"{image.shape[1]}x{image.shape[0]}"
                raise InputError(f"{where}: {name} is {wrong} pixels, expected {size[1]}x{size[0]}")
        texts.append(text)
        verbs.append(verb)
        images.append(both)
    if not images:
        raise InputError(f"{folder / 'pairs.jsonl'} has no pairs")
    if codec is None:
        count = Counter(map(tuple, np.array(images).reshape(-1, 3).tolist()))
        palette = sorted(list(rgb) for rgb, _ in count.most_common(colours))
        split = [split_words(text) for text in texts]
        codec = Codec(palette, sorted(set().union(*split)), max(map(len, split)) + 2, *size)
        if codec.pixels > 1024:
            raise InputError(f"{folder} has images of {size[1]}x{size[0]} pixels, 32x32 are possible")
    tokens = torch.from_numpy(np.array([[codec.encode_image(i) for i in both] for both in images]).astype(np.int64))
    instruction = torch.tensor(
        [codec.encode_text(text, f"{folder / 'pairs.jsonl'}: {text!r}") for text in texts]
    )
    keep = (tokens[:, 0] != tokens[:, 1]).any(-1)
    if not keep.any():
        raise InputError(f"{folder}: no pair of images differs")
    kept = keep.nonzero().flatten().tolist()
    pairs = Pairs(
        tokens[keep, 0], tokens[keep, 1], instruction[keep], torch.full_like(instruction[keep], codec.no_word),
        [texts[i] for i in kept], [verbs[i] for i in kept],
    )
    return pairs, codec, len(images) - len(kept)


# ---------------------------------------------------------------------------------------------------------------
# The network


class Editor(nn.Module):
    """The project's transformer on [instruction | source | target], with the source laid under the target.

    Called on float [B, length + 2 * H * W, D] it returns logits [B, length + 2 * H * W, V], real at the target for
    MASK and the palette and -10,000 elsewhere: nothing else can be revealed.  The network inside sees length + H * W
    positions.  A position's coordinates: row, column, block of 4x4 pixels, and whether it is a word.
    """

    def __init__(self, codec: Codec, network: MaskDiffusionTransformer | None = None):
        super().__init__()
        words = [[codec.height, codec.width + i, 0, 1] for i in range(codec.length)]
        blocks = -(-codec.width // 4)
        grid = [[y, x, 1 + y // 4 * blocks + x // 4, 0] for y in range(codec.height) for x in range(codec.width)]
        config = TransformerConfig(codec.vocabulary, codec.prompt, heads=2, positions="both", coordinates=words + grid)
        self.codec, self.network = codec, network or MaskDiffusionTransformer(config)

    @property
    def embedding(self) -> Tensor:
        return self.network.embedding

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.blocks

    def forward(self, x: Tensor) -> Tensor:
        words, pixels = self.codec.length, self.codec.pixels
        text, source, target = x.split([words, pixels, pixels], dim=1)
        logits = self.network(torch.cat([text, source + target], dim=1))[:, words:, : 1 + len(self.codec.palette)]
        rest = self.codec.vocabulary - logits.shape[-1]
        return F.pad(logits, (0, rest, words + pixels, 0), value=-1e4)  # finite, so that guidance may subtract


class PromptHistory(HistoryReference):
    """Eq. 2 for the target; the prompt, the first positions, never changes and is read as it is."""

    def __init__(self, embedding: Tensor, gamma: float, rotate: bool, prompt: int):
        super().__init__(embedding, gamma, rotate)
        self.prompt = prompt

    def push(self, tokens: Tensor) -> Tensor:
        if self.sum is not None:
            self.sum[:, : self.prompt] = 0
        return super().push(tokens)


# ---------------------------------------------------------------------------------------------------------------
# Training states


def revision_states(source: Tensor, target: Tensor, generator: torch.Generator, T: int = 6) -> tuple[Tensor, Tensor]:
    """Trajectories from source to target, int64 [T+1, B, P], and the turn to train on, int64 [B].

    The wrong token is the source's wherever it differs from the target's.  A fifth of the rows follow the paper's law,
    every pixel on its own clock.  The others are what decoding looks like: the whole edit is re-masked in turn 1
    (a tenth of its pixels later), then revealed piece by piece; of these, half stand at turn 0, where nothing tells
    yet where the edit will be, and a third at turn 1, where nothing of it is revealed.  In some rows a few pixels
    outside the edit are masked, too, so that the model can put back what it masked without need.
    """
    rand = partial(torch.rand, generator=generator, device=source.device)
    batch, region = len(source), source != target
    more = rand(batch, 1).clamp(min=0.6).sub(0.6).mul(0.4)  # 0 in 60 % of the rows, else up to 16 % of the pixels
    changed = region | (rand(source.shape) < more)
    p_wrong = torch.where(rand(batch, 1) < 0.5, 1.0, rand(batch, 1)) * region
    law = rm.sample_trajectory(target, changed, source, MASK, T, p_wrong, generator=generator)
    step = torch.arange(T + 1, device=source.device).view(-1, 1, 1)
    masked = torch.where(rand(source.shape) < 0.1, 2, 1)
    revealed = masked + 1 + (rand(source.shape) * (T - masked)).long()
    together = torch.where(step < masked, source, torch.where(step < revealed, MASK, target))
    together = torch.where(changed, together, target)
    lawful, turn, draw = rand(batch, 1) < LAWFUL, (rand(batch) * T).long(), rand(batch)
    early = torch.where(draw < 0.5, 0, torch.where(draw < 0.83, 1, turn))
    return torch.where(lawful, law, together), torch.where(lawful[:, 0], turn, early)


def sample_batch(
    batch: int, generator: torch.Generator, pool: Pairs, codec: Codec, method: str, dropout: float
) -> rm.Batch:
    """A batch for rm.train: see METHODS.  States [K, batch, N]; the prompt is ABSENT in all but the last."""
    device = pool.source.device
    rand = partial(torch.rand, generator=generator, device=device)
    rows = torch.randint(len(pool.source), (batch,), generator=generator, device=device)
    source, target, words = pool.source[rows], pool.target[rows], pool.instruction[rows]
    edits = rand(batch, 1) < (BASE_EDITS if method == "base" else 1.0)
    words = torch.where(edits & (rand(batch, 1) >= dropout), words, codec.no_word)
    shown = torch.where(edits & (rand(batch, 1) >= dropout), source + len(codec.palette), codec.no_image)
    if method in ("base", "sft"):
        if method == "base":
            captioned = ~edits & (rand(batch, 1) >= dropout)
            words = torch.where(captioned, pool.caption[rows], words)
        states = torch.where(rand(target.shape) < rand(batch, 1), MASK, target).unsqueeze(0)
        editable = states[0] == MASK  # plain mask diffusion has no loss at visible tokens
    else:
        trajectory, turn = revision_states(source, target, generator)
        states, editable = rm.history_until(trajectory, turn), torch.ones_like(target, dtype=torch.bool)
        if not METHODS[method][0]:
            states = states[-1:]  # without history only the current state is read
    # The text begins at a random slot, so that no word is tied to one: other phrasings put it elsewhere.
    free = (words == codec.no_word).sum(1, keepdim=True)
    slots = torch.arange(codec.length, device=device) - (rand(batch, 1) * (free + 1)).long()
    words = words.gather(1, slots % codec.length)
    prompt = torch.cat([words, shown], 1)
    older = prompt.new_full((len(states) - 1, *prompt.shape), ABSENT)
    states = torch.cat([torch.cat([older, prompt.unsqueeze(0)]), states], -1)
    clean = torch.cat([prompt, target], 1)
    return states, clean, torch.cat([torch.zeros_like(prompt, dtype=torch.bool), editable], 1)


# ---------------------------------------------------------------------------------------------------------------
# Decoding


@dataclass
class Decoding:
    """How to edit.  name: "two-phase", "loop" (Eq. 1 until nothing changes) or "regenerate" (the baselines)."""

    name: str = "two-phase"
    mask_steps: int = 8  # at most; a row goes on to the second phase when it re-masks nothing more
    reveal_steps: int = 8
    threshold: float = 0.0  # re-mask only where p(M) is above this, too
    guidance: float = 1.0  # of the instruction; 1: none
    image_guidance: float = 1.0
    max_turns: int = 16  # of the loop


def make_denoiser(model: Editor, guidance: float, image_guidance: float):
    """Embeddings -> logits, with classifier-free guidance (three passes instead of one) where a scale is not 1.

    logits = f(none) + image_guidance * (f(source) - f(none)) + guidance * (f(source, instruction) - f(source))
    """
    if guidance == image_guidance == 1:
        return model
    codec = model.codec

    def denoiser(inputs: Tensor) -> Tensor:
        blank = rms_norm(model.embedding[[codec.no_word, codec.no_image]]).detach()
        untold, alone = inputs.clone(), inputs.clone()
        untold[:, : codec.length] = alone[:, : codec.length] = blank[0]
        alone[:, codec.length : codec.prompt] = blank[1]
        told, untold, alone = model(inputs), model(untold), model(alone)
        return alone + image_guidance * (untold - alone) + guidance * (told - untold)

    return denoiser


def remask_above(threshold: float, logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor, **options) -> Tensor:
    """Eq. 1 with a condition more: a visible token is re-masked only where p(M) > threshold."""
    if threshold:
        sure = logits.softmax(-1)[..., mask_id] > threshold
        editable = editable & (sure | (tokens == mask_id))
    return rm.decide(logits, tokens, mask_id, editable=editable, **options)


@torch.no_grad()
def two_phase(denoiser, tokens: Tensor, editable: Tensor, history: HistoryReference, decoding: Decoding) -> Tensor:
    """The paper's image decoding: re-mask only, then reveal only by MaskGIT's cosine schedule.

    tokens: int64 [B, N].  Returns the trace, int64 [turns + 1, B, N], the last without MASK.  Each row changes phase
    on its own, in the turn that finds nothing more to re-mask, so that its result does not depend on its batch.
    """
    rule = partial(remask_above, decoding.threshold, mask_id=MASK)
    masking = torch.full((len(tokens), 1), decoding.mask_steps > 0, device=tokens.device)
    revealed, total = torch.zeros_like(masking, dtype=torch.long), torch.ones_like(masking, dtype=torch.long)
    trace = [tokens]
    history.reset()
    for turn in range(decoding.mask_steps + decoding.reveal_steps):
        logits = denoiser(history.push(tokens))
        masking = masking & (turn < decoding.mask_steps)
        remasked = rule(logits, tokens, editable=editable & masking, allow_reveal=False)
        masking = masking & (remasked != tokens).any(-1, keepdim=True)
        masks = (remasked == MASK).sum(-1, keepdim=True)
        total = torch.where(revealed == 0, masks.clamp(min=1), total)
        revealed = revealed + ~masking
        # After step s of S a share cos(pi s / 2S) of the masks is left; every step reveals one at least.
        left = (total * torch.cos(math.pi / 2 * (revealed / decoding.reveal_steps).clamp(max=1))).floor().long()
        left = torch.where(revealed >= decoding.reveal_steps, 0, left)
        count = torch.where(masking, 0, (masks - left).clamp(min=1)).flatten()
        tokens = rm.decide(logits, remasked, MASK, editable=editable, reveal=count, allow_remask=False)
        trace.append(tokens)
        if not masking.any() and not (tokens == MASK).any():
            break
    return torch.stack(trace)


class Edited(NamedTuple):
    tokens: Tensor  # int64 [B, P], no MASK
    masked: Tensor  # bool [B, P]: masked in some turn; elsewhere tokens equal the start
    turns: list[int]  # forward passes a row
    trace: Tensor  # int64 [turns + 1, B, P]


@torch.no_grad()
def edit(
    model: Editor,
    source: Tensor,
    instruction: Tensor,
    gamma: float,
    rotate: bool,
    decoding: Decoding = Decoding(),
    precision: str = "float32",
) -> Edited:
    """Edits source, int64 [B, P], by instruction, int64 [B, length], on the model's device.

    precision: "bf16" (autocast) is faster where the processor has it; results may then differ in rare pixels.
    """
    codec, guided = model.codec, make_denoiser(model, decoding.guidance, decoding.image_guidance)

    def denoiser(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return guided(inputs).float()

    start = torch.full_like(source, MASK) if decoding.name == "regenerate" else source
    tokens = torch.cat([instruction, source + len(codec.palette), start], 1)
    editable = torch.arange(tokens.shape[1], device=tokens.device) >= codec.prompt
    history = PromptHistory(model.embedding.detach(), gamma, rotate, codec.prompt)
    if decoding.name == "loop":
        rule = partial(remask_above, decoding.threshold)
        result = rm.revise(
            denoiser, tokens, MASK, history, decoding.max_turns, editable.expand_as(tokens), trace=True, rule=rule
        )
        trace, turns = result.trace, result.turns
    else:
        trace = two_phase(denoiser, tokens, editable.expand_as(tokens), history, decoding)
        moving = (trace[1:] != trace[:-1]).any(-1)  # a row is done with its last change, or after the first turn
        number = torch.arange(1, len(moving) + 1, device=moving.device).unsqueeze(1)
        turns = (moving * number).amax(0).clamp(min=1).tolist()
    trace = trace[..., codec.prompt :]
    return Edited(trace[-1], (trace == MASK).any(0), turns, trace)


# ---------------------------------------------------------------------------------------------------------------
# Metrics, on uint8 images [n, H, W, 3]; the region is where source and target differ


def structural_similarity(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """SSIM at every pixel, float64 [n, H, W]: uniform window cut at the border, K1 0.01, K2 0.03, mean of channels.

    a, b: float64 [n, H, W, 3] in 0..255.  Wang, Bovik, Sheikh, Simoncelli, 2004.
    """

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.movedim(-1, 1), window, 1, window // 2, count_include_pad=False)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean(1)


def measure(edited: Tensor, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The paper's metrics, and exact, a value an image: float64 [n], NaN where one is undefined.

    precision: share of the changed pixels that lie in the region (NaN: nothing changed).  coverage: share of the
    region that changed.  mae, psnr, ssim: edited against source outside the region, psnr infinite where they are equal,
    ssim with the region itself set to the source.  All three are NaN where the region is the whole image.
    """
    region, changed = (source != target).any(-1), (edited != source).any(-1)
    outside = ~region
    pixels = outside.sum((1, 2)).double()
    hits = (changed & region).sum((1, 2)).double()
    error = (edited.double() - source.double()) * outside.unsqueeze(-1)
    mse = error.square().sum((1, 2, 3)) / (3 * pixels)
    kept = torch.where(region.unsqueeze(-1), source, edited)
    ssim = (structural_similarity(kept.double(), source.double()) * outside).sum((1, 2)) / pixels
    return {
        "precision": hits / changed.sum((1, 2)),
        "coverage": hits / region.sum((1, 2)),
        "mae": error.abs().sum((1, 2, 3)) / (3 * pixels),
        "psnr": 10 * torch.log10(255**2 / mse),
        "ssim": ssim,
        "exact": (edited == target).flatten(1).all(-1).double(),
    }


def summarize(values: Tensor) -> dict:
    """Mean with a 95 % interval over the finite values, median over all but NaN, and how many are not finite.

    JSON has no infinity: an infinite median reads "inf".
    """
    defined = values[~values.isnan()]
    finite = defined[defined.isfinite()]
    mean = finite.mean().item() if len(finite) else None
    half = 1.96 * finite.std().item() / math.sqrt(len(finite)) if len(finite) > 1 else 0.0
    median = defined.quantile(0.5, interpolation="nearest").item() if len(defined) else None
    return {
        "mean": mean,
        "ci95": [mean - half, mean + half] if len(finite) else None,
        "median": "inf" if median == math.inf else median,
        "infinite": len(defined) - len(finite),
        "undefined": len(values) - len(defined),
    }


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    model: Editor, gamma: float, rotate: bool, pairs: Pairs, decoding: Decoding, precision: str, chunk: int = 100
) -> tuple[dict, Tensor, Tensor]:
    """Every metric on pairs: (record, edited tokens int64 [n, P], predicted mask bool [n, P])."""
    began, device, codec, parts = time.perf_counter(), model.embedding.device, model.codec, []
    model.eval()
    for rows in torch.arange(len(pairs.source)).split(chunk):
        source, words = pairs.source[rows].to(device), pairs.instruction[rows].to(device)
        parts.append(edit(model, source, words, gamma, rotate, decoding, precision))
    seconds = time.perf_counter() - began
    tokens, masked = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("tokens", "masked"))
    values = measure(*(codec.decode_image(t) for t in (tokens, pairs.source, pairs.target)))
    right, n = values.pop("exact").bool(), len(tokens)
    turns = [turn for part in parts for turn in part.turns]

    def exact(rows: Tensor) -> dict:
        count, hits = int(rows.sum()), int(right[rows].sum())
        return {"n": count, "exact": hits / max(count, 1), "ci95_exact": rm.wilson_interval(hits, count)}

    groups = {verb: torch.tensor([v == verb for v in pairs.verbs]) for verb in dict.fromkeys(pairs.verbs)}
    record = exact(torch.ones(n, dtype=torch.bool)) | {name: summarize(value) for name, value in values.items()}
    record["by_verb"] = {verb: exact(rows) for verb, rows in sorted(groups.items())}
    if pairs.unseen_phrase:
        unseen = torch.tensor(pairs.unseen_phrase)
        record |= {"unseen_phrasing": exact(unseen), "seen_phrasing": exact(~unseen)}
    record |= {"mean_turns": sum(turns) / n, "decoding": asdict(decoding), "seconds": seconds}
    record |= {"params": sum(p.numel() for p in model.parameters()), "right": "".join("01"[int(r)] for r in right)}
    return record, tokens, masked


def decodings_of(method: str) -> dict[str, Decoding]:
    """The rows of a method in the table; the first one counts."""
    if method in ("base", "sft"):
        return {"": Decoding("regenerate", mask_steps=0, reveal_steps=16)}
    rows = {"two phases": Decoding()}
    if method == "guided":
        more = {f"guidance {scale}": Decoding(guidance=scale) for scale in (1.5, 2.0)}
        return rows | more | {"image guidance 1.5": Decoding(image_guidance=1.5)}
    return rows | {"two phases, p(M) > 0.9": Decoding(threshold=0.9), "loop of Eq. 1": Decoding("loop")}


def print_table(rows: dict[str, dict]) -> None:
    """The paper's table beside ours: label -> record."""
    heads = ("prec. %", "cover. %", "MAE", "PSNR med.", "mean", "inf. %", "SSIM", "passes")
    print(f"\n{'':36}{'exact % (95 %)':>22}" + "".join(f"{head:>10}" for head in heads))
    for label, (precision, coverage, mae, psnr, ssim) in PAPER.items():
        cells = (f"{precision:.2f}", f"{coverage:.2f}", f"{mae:.3f}", "", f"{psnr:.2f}", "", f"{ssim:.4f}")
        print(f"{'paper (photographs), ' + label:36}{'':22}" + "".join(f"{cell:>10}" for cell in cells))

    def text(value: float | str | None, form: str) -> str:
        return "-" if value is None else value if isinstance(value, str) else f"{value:{form}}"

    for label, row in rows.items():
        low, high = (100 * bound for bound in row["ci95_exact"])
        mean = {key: row[key]["mean"] for key in ("precision", "coverage", "mae", "psnr", "ssim")}
        cells = [text(None if mean[key] is None else 100 * mean[key], ".2f") for key in ("precision", "coverage")]
        cells += [text(mean["mae"], ".3f"), text(row["psnr"]["median"], ".1f"), text(mean["psnr"], ".2f")]
        cells += [f"{100 * row['psnr']['infinite'] / row['n']:.1f}", text(mean["ssim"], ".4f")]
        cells += [f"{row['mean_turns']:.1f}"]
        exact = f"{100 * row['exact']:>7.1f}{f'({low:.1f} to {high:.1f})':>15}"
        print(f"{label:36}{exact}" + "".join(f"{cell:>10}" for cell in cells))
    for label, row in rows.items():
        print(f"{label:36}exact % by verb: " +
              ", ".join(f"{verb} {100 * part['exact']:.1f}" for verb, part in row["by_verb"].items()) +
              "".join(f"; {kind} phrasing {100 * row[f'{kind}_phrasing']['exact']:.1f}"
                      for kind in ("seen", "unseen") if f"{kind}_phrasing" in row))
    print(f"n = {next(iter(rows.values()))['n']} pairs; the mean PSNR is over finite values, its median over all; "
          "the paper's images are photographs: not comparable in the absolute")


# ---------------------------------------------------------------------------------------------------------------
# Training


def training_run(model: Editor, method: str, pool: Pairs, args, steps: int, **changes):
    """rm.train with the settings of a method."""
    gamma, rotate, dropout = METHODS[method]
    dropout = dropout if args.dropout is None or method == "base" else args.dropout
    sample = partial(sample_batch, pool=pool, codec=model.codec, method=method, dropout=dropout)
    settings = TRAINING | dict(gamma=gamma, rotate=rotate, seed=args.seed)
    settings |= dict(precision=args.precision, compile=args.compile)
    return rm.train(model, sample, steps, MASK, **(settings | changes))


def measured_steps(minutes: float, codec: Codec, pool: Pairs, args) -> int:
    """How many steps of RM fit the time here, a multiple of 5: times 20 steps of a throw-away model after 5."""
    run = training_run(Editor(codec).to(args.device), "rm", pool, args, 25)
    seconds = [stats["seconds"] for _, stats in run]
    steps = max(5, 5 * int(minutes * 60 * 4 / (seconds[-1] - seconds[4])))  # so that base's are whole, too
    steps = torch.tensor(steps, device=args.device)
    if rm.dist.is_initialized():  # every process has to make the same number
        rm.dist.broadcast(steps, 0)
    return int(steps)


def train_method(method: str, steps: int, pool: Pairs, codec: Codec, args) -> tuple[Editor, dict]:
    """Trains, resumes or reads back one method; all but base start from OUT/base.pt.  Writes OUT/<method>.pt.

    Returns the model and its record: settings, losses, minutes, provenance.
    """
    path, main = args.out / f"{method}.pt", rm.is_main_process()
    keys = ("seed", "pool", "precision", "dropout")
    settings = {key: getattr(args, key) for key in keys} | {"pairs": args.pairs.name if args.pairs else None}
    if method == "base":
        steps = args.base_steps or math.ceil(BASE_SHARE * steps)
    if args.steps:
        settings["steps"] = steps
    if path.exists():
        network, record = rm.load_checkpoint(path, "image", args.device, NEEDS)
        rm.require_same(settings, record["settings"], path)
        if record["codec"] != asdict(codec):
            raise InputError(f"{path} was made with other words or colours: use another --out, or delete it")
        if main:
            print(f"{path} is there, {method} is done")
        return Editor(codec, network), record
    torch.manual_seed(args.seed)
    model = Editor(codec).to(args.device)
    if method != "base":
        model = Editor(codec, rm.load_checkpoint(args.out / "base.pt", "image", args.device, NEEDS)[0]).train()
    resume, curve, seconds = path.with_suffix(".resume.pt"), [], 0.0
    if resume.exists():
        saved = torch.load(resume, map_location="cpu", weights_only=True)
        notes, seconds = saved["notes"], saved["seconds"]
        rm.require_same(settings, notes["settings"], resume)
        steps, curve = notes["steps"], notes["curve"]
    notes = {"steps": steps, "curve": curve, "settings": settings}
    if main:
        print(f"{method}: {steps} steps of {TRAINING['batch_size']} pairs on {args.device}", flush=True)
    run = training_run(model, method, pool, args, steps, checkpoint=resume, notes=notes)
    every, mean = max(1, steps // 20), dict.fromkeys(("reveal", "remask", "keep"), 0.0)
    for step, stats in run:
        seconds = stats["seconds"]
        mean = {key: value + stats[key] / every for key, value in mean.items()}  # on the device: no wait
        if step % every == 0:  # the mean loss since the last point
            mean = {key: value.item() for key, value in mean.items()}
            curve.append({"step": step, "minutes": seconds / 60, **mean})
            left = seconds / step * (steps - step)
            losses = f"reveal {mean['reveal']:.4f} re-mask {mean['remask']:.4f} keep {mean['keep']:.4f}"
            losses += f" {left // 60:.0f}:{left % 60:02.0f} left"
            if main:
                print(f"{method} step {step}/{steps} loss: {losses}", flush=True)
            mean = dict.fromkeys(mean, 0.0)
    gamma, rotate, dropout = METHODS[method]
    record = {"method": method, "gamma": gamma, "rotate": rotate, "steps": steps, "minutes": seconds / 60}
    record |= {"settings": settings, "training": TRAINING, "compiled": args.compile, "curve": curve}
    record |= {"codec": asdict(codec), "provenance": rm.provenance()}
    if main:
        rm.save_checkpoint(path, model.network, task="image", **record)
        print(f"wrote {path}", flush=True)
        resume.unlink(missing_ok=True)
    if rm.dist.is_initialized():
        rm.dist.barrier()  # the next method reads base.pt
    return model, record


def load_pairs(args) -> tuple[Pairs, Pairs, Codec]:
    """Training pairs, test pairs and the codec: our own scenes, or --pairs and --test."""
    if not args.pairs:
        pool, codec = scene_pairs(args.pool, args.seed)
        return pool, scene_pairs(args.n, TEST_SEED, test=True)[0], codec
    pool, codec, same = read_pairs(args.pairs, most=args.pool)
    test, _, same_test = read_pairs(args.test, codec, most=args.n)
    print(
        f"{len(pool.source)} training and {len(test.source)} test pairs ({same} and {same_test} left out, no change); "
        f"{len(codec.palette)} colours, {len(codec.words)} words, {codec.height}x{codec.width} pixels"
    )
    return pool, test, codec


def train_all(args) -> dict:
    """The bare command: trains what is not done yet, evaluates every row, writes the table and the gallery."""
    pool, test, codec = load_pairs(args)
    pool = pool.to(args.device)
    if args.steps:
        steps = args.steps
    elif (args.out / "base.pt").exists():  # a run that goes on
        steps = round(rm.load_checkpoint(args.out / "base.pt", "image", args.device, NEEDS)[1]["steps"] / BASE_SHARE)
    elif (args.out / "base.resume.pt").exists():
        saved = torch.load(args.out / "base.resume.pt", map_location="cpu", weights_only=True)
        steps = round(saved["notes"]["steps"] / BASE_SHARE)
    else:
        steps = measured_steps(args.minutes / (len(args.methods) - 1 + BASE_SHARE), codec, pool, args)
    trained = {method: train_method(method, steps, pool, codec, args) for method in args.methods}
    if not rm.is_main_process():
        return {}
    rows, training, shown = {}, {}, {}
    for method, (model, record) in trained.items():
        training[method] = {key: record[key] for key in ("steps", "minutes", "curve", "settings", "provenance")}
        for label, decoding in decodings_of(method).items():
            score, tokens, masked = evaluate(model, record["gamma"], record["rotate"], test, decoding, args.precision)
            rows[", ".join(filter(None, (method, label)))] = score
            shown.setdefault(method, (tokens, masked))
            print(f"{method} {label}: exact {100 * score['exact']:.1f} %, {score['seconds']:.0f} s", flush=True)
    print_table(rows)
    draw_gallery(args.out / "gallery.png", codec, test, shown)
    result = {"rows": rows, "paper": PAPER, "training": training, "training_pairs": len(pool.source)}
    result |= {"seed": args.seed, "provenance": rm.provenance()}
    rm.write_json(args.out / "table.json", result)
    return result


# ---------------------------------------------------------------------------------------------------------------
# Figures


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    print(f"wrote {path}")


def show_mask(codec: Codec, source: Tensor, masked: Tensor) -> np.ndarray:
    """The source in grey, the pixels that were masked in some turn in magenta: uint8 [H, W, 3]."""
    grey = codec.decode_image(source).float().mean(-1, keepdim=True).mul(0.5).add(100).expand(-1, -1, 3)
    chosen = masked.cpu().view(codec.height, codec.width, 1)
    return torch.where(chosen, torch.tensor([255.0, 0, 255]), grey).byte().numpy()


def draw_gallery(path: Path, codec: Codec, pairs: Pairs, shown: dict, most: int = 10) -> None:
    """A row an edit: instruction, source, predicted mask, each method's result, target, our error as heat.

    Two edits a verb, in the order of the test set; ours is rm, or else the last method shown.
    """
    plt, ours = pyplot(), "rm" if "rm" in shown else list(shown)[-1]
    seen, picks = Counter(), []
    for i, verb in enumerate(pairs.verbs):
        seen[verb] += 1
        if seen[verb] <= 2 and len(picks) < most:
            picks.append(i)
    picks.sort(key=lambda i: pairs.verbs[i])
    tokens, masked = shown[ours]
    heads = ["source", f"re-masked by {ours}", *shown, "target", f"error of {ours}"]
    size = (1.5 * len(heads), 1.75 * len(picks))
    fig, axes = plt.subplots(len(picks), len(heads), figsize=size, squeeze=False, layout="constrained")
    fig.get_layout_engine().set(hspace=0.12, rect=(0, 0, 1, 1 - 0.15 / len(picks)))
    for row, i in zip(axes, picks):
        states = (pairs.source[i], *(edited[i] for edited, _ in shown.values()), pairs.target[i])
        images = [codec.decode_image(state).numpy() for state in states]
        images.insert(1, show_mask(codec, pairs.source[i], masked[i]))
        wrong = codec.decode_image(tokens[i]).float() - codec.decode_image(pairs.target[i]).float()
        for axis, image in zip(row, images):
            axis.imshow(image)
        row[-1].imshow(wrong.norm(dim=-1).numpy(), cmap="inferno", vmin=0, vmax=255)
        for axis in row:
            axis.set(xticks=[], yticks=[])
        title = row[0].text(0, 1.05, pairs.texts[i], fontsize=8, transform=row[0].transAxes)
        title.set_in_layout(False)  # else it would widen the first column
    for axis, head in zip(axes[-1], heads):
        axis.set_xlabel(head, fontsize=8)
    save_figure(fig, path)
    plt.close(fig)


def animate(path: Path, codec: Codec, trace: Tensor) -> None:
    """A GIF, a frame a turn, MASK in magenta.  trace: int64 [turns + 1, P]."""
    from PIL import Image

    scale = max(1, 256 // max(codec.height, codec.width))
    frames = [Image.fromarray(image.numpy()) for image in codec.decode_image(trace)]
    size = (codec.width * scale, codec.height * scale)
    frames = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [500] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(f"wrote {path}")


def edit_file(args, model: Editor, record: dict) -> dict:
    """--image: edits one file; writes OUT.png, side by side OUT_steps.png and, when asked, the animation."""
    from PIL import Image

    codec, image = model.codec, read_png(args.image)
    if image.shape[:2] != (codec.height, codec.width):
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise InputError(f"{args.image} is {size} pixels, the model edits {codec.width}x{codec.height}")
    words = torch.tensor([codec.encode_text(args.instruction)], device=args.device)
    source = torch.from_numpy(codec.encode_image(image).astype(np.int64)).unsqueeze(0).to(args.device)
    result = edit(model, source, words, record["gamma"], record["rotate"], args.decoding)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    output = codec.decode_image(result.tokens[0]).numpy()
    Image.fromarray(output).save(args.out)
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(7, 2.8), layout="constrained")
    images = (image, show_mask(codec, source[0], result.masked[0]), output)
    for axis, picture, title in zip(axes, images, ("source", "re-masked", f"after {result.turns[0]} turns")):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[], title=title)
    fig.suptitle(args.instruction)
    print(f"wrote {args.out}")
    save_figure(fig, args.out.with_name(args.out.stem + "_steps.png"))
    if args.gif:
        animate(args.gif, codec, result.trace[:, 0])
    return {"instruction": args.instruction, "turns": result.turns[0], "remasked_pixels": int(result.masked.sum()),
            "changed_pixels": int((result.tokens != source).sum())}


# ---------------------------------------------------------------------------------------------------------------
# The command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reflective Masking on images: edit small palette images by instructions, in place. Without "
        "arguments: train the base model, the baseline and RM on our own scenes, evaluate on held-out ones, draw.",
    )
    add = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group().add_argument
    add("--evaluate", action="store_true", help="score --checkpoint on held-out scenes, or on --test")
    add("--image", type=Path, metavar="IN.png", help="edit this file by --instruction, write it to --out OUT.png")
    add = parser.add_argument_group("data").add_argument
    add("--pairs", type=Path, metavar="DIR", help="train on DIR/pairs.jsonl; palette and words come from it")
    add("--test", type=Path, metavar="DIR", help="test on DIR/pairs.jsonl; an unknown word is an error")
    add("--pool", type=int, default=40_000, help="training pairs at most (default 40000)")
    add("--n", type=int, default=1000, help="test pairs at most (default 1000)")
    add = parser.add_argument_group("training").add_argument
    add("--methods", nargs="+", choices=METHODS, default=["base", "sft", "rm", "history"], metavar="M",
        help=f"which of {', '.join(METHODS)} (default: all but guided); base is always first")
    add("--minutes", type=float, default=20, help="training of all methods together (default 20), without evaluation")
    add("--steps", type=int, help="train each method exactly this many steps instead, base 0.2 of them")
    add("--base-steps", type=int, help="with --steps: train the base exactly this many steps")
    add("--dropout", type=float, help="share of instructions and sources dropped, of all but base")
    add("--precision", choices=["bf16", "float32"], help="default bf16 where the processor has it")
    add("--compile", action="store_true", help="torch.compile the network (needs a C++ compiler on CPU)")
    add = parser.add_argument_group("editing (--evaluate, --image)").add_argument
    add("--checkpoint", type=Path, default=HERE / "checkpoints/image_rm.pt", help="default: the shipped one")
    add("--instruction", metavar="TEXT", help="what to do with --image")
    add("--decode", choices=["two-phase", "loop"], default="two-phase", help="two phases, or Eq. 1 until it rests")
    add("--mask-steps", type=int, default=8, help="first phase, at most (default 8)")
    add("--reveal-steps", type=int, default=8, help="second phase (default 8)")
    add("--max-turns", type=int, default=16, help="of the loop (default 16)")
    add("--threshold", type=float, default=0.0, help="re-mask only where p(M) > this, too (paper 0.9; default 0)")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance of the instruction (default 1: none)")
    add("--image-guidance", type=float, default=1.0, help="the same of the source")
    add("--gif", type=Path, metavar="FILE", help="with --image: write the turns as an animation")
    add = parser.add_argument_group("general").add_argument
    add("--seed", type=int, default=0, help="of training data, first weights and batches; --evaluate: of the scenes")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--out", type=Path, help="with --image the PNG; else a folder (default runs/image, with --smoke runs/smoke)")
    add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    add("--smoke", action="store_true", help="everything tiny, in seconds, to see that it runs")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, no usage
    args = parser.parse_args()
    training = ["pool", "methods", "minutes", "steps", "base_steps", "dropout", "precision", "compile", "pairs"]
    editing = ["checkpoint", "decode", "mask_steps", "reveal_steps", "max_turns", "threshold"]
    editing += ["guidance", "image_guidance"]
    mode = "--image" if args.image else "--evaluate" if args.evaluate else "training"
    if args.evaluate and args.test and args.seed:
        parser.error("--seed has no effect with --test, which has no scenes to draw")
    unused = {
        "--image": training + ["test", "n", "seed", "smoke"],
        "--evaluate": training + ["instruction", "gif", "smoke"],
        "training": editing + ["instruction", "gif"],
    }[mode]
    unused += ["mask_steps", "reveal_steps"] if args.decode == "loop" else ["max_turns"]
    for name in unused:  # an option that would be ignored is an error
        if getattr(args, name) != parser.get_default(name):
            loop = " --decode loop" * (args.decode == "loop")
            parser.error(f"--{name.replace('_', '-')} has no effect with {mode}{loop}")
    if args.image and (not args.instruction or not args.out or args.out.suffix.lower() != ".png"):
        parser.error("--image needs --instruction TEXT and --out OUT.png")
    if mode == "training" and bool(args.pairs) != bool(args.test):
        parser.error("--pairs and --test go together")
    if args.gif and args.gif.suffix != ".gif":
        parser.error("--gif must end in .gif")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json} is a folder")
    if args.smoke:
        args.steps, args.pool, args.n = 2, 12, 6
    args.out = args.out or HERE / ("runs/smoke" if args.smoke else "runs/image")
    args.methods = sorted({"base", *args.methods}, key=list(METHODS).index)
    for name in ("pool", "n", "mask_steps", "reveal_steps", "max_turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.base_steps is not None and not args.steps:
        parser.error("--base-steps goes with --steps")
    if not 0 < args.minutes < 1e5 or any(steps is not None and steps < 1 for steps in (args.steps, args.base_steps)):
        parser.error("--minutes, --steps and --base-steps must be positive")
    if not 0 <= args.threshold < 1 or not 0 <= (args.dropout or 0) < 1:
        parser.error("--threshold and --dropout must lie in [0, 1)")
    if not 0 <= args.seed < TEST_SEED:
        parser.error(f"--seed must lie in 0..{TEST_SEED - 1}: the seeds above make the test scenes")
    names = ("mask_steps", "reveal_steps", "threshold", "guidance", "image_guidance", "max_turns")
    args.decoding = Decoding(args.decode, **{name: getattr(args, name) for name in names})
    return args


def check_decoding(args, method: str) -> None:
    """A base or SFT model regenerates: sets args.decoding, and raises InputError where RM's was asked for."""
    if method in ("base", "sft"):
        if args.decoding != Decoding():
            raise InputError(f"{args.checkpoint} is a {method} model, which regenerates: options of editing are RM's")
        args.decoding = decodings_of(method)[""]


def main() -> None:
    args = parse_arguments()
    args.device = rm.start_device(args.device)
    args.precision = args.precision or rm.best_precision(args.device)
    if rm.dist.is_initialized() and (args.evaluate or args.image):
        raise InputError("torchrun is for training; run this with one process")
    if args.image:
        network, record = rm.load_checkpoint(args.checkpoint, "image", args.device, NEEDS)
        check_decoding(args, record["method"])
        result = edit_file(args, Editor(Codec(**record["codec"]), network).eval(), record)
    elif args.evaluate:
        network, record = rm.load_checkpoint(args.checkpoint, "image", args.device, NEEDS)
        model = Editor(Codec(**record["codec"]), network).eval()
        if args.test:
            pairs = read_pairs(args.test, model.codec, args.n)[0]
        else:
            pairs, codec = scene_pairs(args.n, TEST_SEED + args.seed, test=True)
            if asdict(codec) != record["codec"]:
                raise InputError(f"{args.checkpoint} was trained on other images than our scenes: give --test DIR")
        method = record["method"]
        check_decoding(args, method)
        score, tokens, masked = evaluate(model, record["gamma"], record["rotate"], pairs, args.decoding, args.precision)
        print_table({method: score})
        draw_gallery(args.out / "evaluate.png", model.codec, pairs, {method: (tokens, masked)})
        result = score | {"seed": args.seed, "checkpoint": args.checkpoint.name, "provenance": rm.provenance()}
    else:
        result = train_all(args)
    if args.json and rm.is_main_process():
        rm.write_json(args.json, result)


if __name__ == "__main__":
    rm.run_script(main)
