"""Task 3: editing a small picture by a sentence, in place.

The model re-masks the pixels that the instruction changes, reveals new ones, leaves the rest alone.

    python edit_image.py                          trains base, baseline and RM; a table, a gallery
    python edit_image.py --pairs DIR --test DIR   the same on your own pairs (see read_pairs)
    python edit_image.py --evaluate               scores the shipped checkpoint on held-out scenes
    python edit_image.py --image IN.png --instruction "make the house red" --out OUT.png

A pixel is a token and so is a word.  One sequence is [instruction | source | target], and only the
target is editable; the network adds the source's embedding to the target's at the same pixel.  Ids:
MASK 0, colour c of C is 1 + c, in the source 1 + C + c, then "no image", "no word" and the words.

What differs from the paper: pixels of a palette in place of a VQ codebook; most of RM's
trajectories re-mask the whole edit at once (revision_states); Eq. 1 alone re-masks, where the paper
asks for p(M) > 0.9 too; instruction and source, which never change, have no history (edit).
"""

import json
import math
import random
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import count, islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import reflective_masking as rm
from history import ABSENT, HistoryReference, rms_norm
from reflective_masking import InputError, MaskDiffusionTransformer, TransformerConfig

HERE = Path(__file__).parent
MASK = 0
IN_PLACE = ("two-phase", "loop")  # decodings by Eq. 1, from the source; baselines begin empty
VARIANTS = {  # gamma, rotate of Eq. 2, decodings
    "base": (0.0, False, ("regenerate",)),  # mask diffusion on captions and images
    "sft": (0.0, False, ("regenerate",)),  # from base: the same, given instruction and source
    "rm": (0.0, False, IN_PLACE),  # from base: Reflective Masking
    "history": (0.9, True, IN_PLACE),  # the same with History Reference
}
TRAINING = {"batch_size": 16, "learning_rate": 2e-3, "muon_factor": 3}
BASE_EDITS = 0.1  # of the base's rows are edits: the paper's base has seen editing, too
BASE_HIDDEN = 0.1  # of the base's captions, instructions and sources are hidden, each on its own
TEST_SEED = 1_000_000  # of the held-out scenes
SIDE = 32  # a picture's pixels a side at most: attention costs the square of their product

# ------------------------------------------------------------------------------------------------
# Scenes: 16x16 pixel art, drawn so that source and instruction determine the target

SIZE = 16
SKIES = ("day", "dusk", "night")
GROUNDS = ("meadow", "sand", "stone")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
FIXED = {"K": 26, "L": 27, "B": 28, "S": 29, "G": 30}  # dark, light, brown, skin, stalk
HEX = (  # the palette: two shades of every sky, ground and colour, then FIXED
    "8cc8f0 a6d8f6 ec9682 f6b08c 1e224a 343868 7ec860 68b254 e8d096 d8bc7e 96969e 7a7a84 "
    "d62e2e 961824 f08c28 b85c14 fadc46 cea428 46b450 24783c 466ee6 2842a0 a050c8 6a2e92 "
    "f6f6fa c8ccd8 24202c fff0be 7a4e2e f0be96 185c2c"
)
PALETTE = [[*bytes.fromhex(colour)] for colour in HEX.split()]
# Big and small, rows from top to bottom: A and a are the two shades of the thing's colour.
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
BOTTOM = {"top": 5, "back": 10, "front": 14}  # the lowest row of a thing; drawn in this order
CENTRE = {"left": 3, "middle": 8, "right": 12}
PLACES = [(depth, column) for depth in BOTTOM for column in CENTRE]
VISIBLE = 0.6  # of every thing at least this share shows, so that the rest can be inferred
NAMES = {*SPRITES, *COLOURS, *BOTTOM, *CENTRE, "big", "small"}
PATTERNS = {  # "a/b" stands for one phrasing with a and one with b; after | those kept for test
    "recolour": "make/paint/turn/dye {it} {colour}; please make/paint/dye {it} {colour}; "
    "turn/set/dye {it} to {colour}; {it} should be/become/turn {colour}; "
    "change/set/turn the colour of {it} to {colour}; the colour of {it} should be {colour}; "
    "{colour} should be the colour of {it}; to {colour} turn/set {it} | "
    "colour {it} {colour}; change {it} to {colour}; to {colour} change the colour of {it}",
    "add": "add/put/draw/place {new} at the {place}; please add/put/draw {new} at the {place}; "
    "at the {place} put/draw/place {new}; there should be {new} at the {place}; "
    "{new} should be/appear at the {place}; at the {place} please put/draw {new}; "
    "at the {place} should appear {new} | at the {place} add {new}; "
    "at the {place} there should be {new}; {new} there should be at the {place}",
    "remove": "remove/delete/erase/drop {it}; please remove/delete/erase {it}; "
    "delete/erase/take/drop {it} from the picture; take/drop/put {it} away; put/drop away {it}; "
    "{it} should disappear/go; away with {it}; from the picture remove/delete/take {it}; "
    "there should be no more {it} | "
    "remove {it} from the picture; take away {it}; from the picture drop {it}",
    "move": "move/bring/shift/carry {it} to the {place}; "
    "please move/bring/shift {it} to the {place}; to the {place} bring/shift/carry {it}; "
    "put/place {it} at the {place}; {it} should be at the {place}; "
    "{it} should go/shift/come to the {place}; to the {place} please shift/bring {it}; "
    "to the {place} should go/come {it} | to the {place} move {it}; "
    "{it} should move to the {place}; please carry {it} to the {place}",
    "replace": "replace/exchange {it} by {new}; swap/exchange/trade {it} for {new}; "
    "turn/change/make {it} into {new}; instead of {it} draw/add/place {new}; "
    "put/draw {new} instead of {it}; please replace/exchange {it} by {new}; "
    "{it} should become/be {new}; instead of {it} there should be {new}; for {it} swap/draw {new}"
    " | instead of {it} put {new}; change {it} for {new}; draw {new} for {it}",
}


def phrasings(patterns: str) -> list[str]:
    """From "turn/set {it}; drop {it}": "turn {it}", "set {it}" and "drop {it}"."""
    slots = [[word.split("/") for word in pattern.split()] for pattern in patterns.split(";")]
    return [" ".join(words) for pattern in slots for words in product(*pattern)]


Thing = namedtuple("Thing", "kind size colour depth column")  # words, as in the tables above
Scene = namedtuple("Scene", "sky ground things")
Edit = namedtuple("Edit", "verb instruction source target unseen_phrase")  # source, target: Scene


@lru_cache(None)
def background(sky: str, ground: str) -> np.ndarray:
    """Palette indices, int16 [256]: each half in two shades, by a rule of row and column alone."""
    y, x = np.mgrid[:SIZE, :SIZE]
    dots = {"day": (x + 2 * y) % 8, "dusk": y % 3, "night": (3 * x + 5 * y) % 11}[sky] == 0
    grain = {
        "meadow": (x + 2 * y) % 4 == 0,
        "sand": (y % 2 == 0) & ((x + y) % 3 == 0),
        "stone": (y % 3 == 0) | ((x + y // 3 % 2 * 2) % 4 == 0),
    }[ground]
    above = 2 * SKIES.index(sky) + dots
    below = 2 * len(SKIES) + 2 * GROUNDS.index(ground) + grain
    return np.where(y < 9, above, below).astype(np.int16).ravel()


@lru_cache(None)
def stamp(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that a thing covers, int [k] in 0..255, and their palette indices, int16 [k]."""
    rows = SPRITES[thing.kind][thing.size == "small"].split("/")
    shade = 2 * (len(SKIES) + len(GROUNDS) + COLOURS.index(thing.colour))
    colours = {"A": shade, "a": shade + 1, **FIXED}
    top = BOTTOM[thing.depth] - len(rows) + 1
    left = CENTRE[thing.column] - len(rows[0]) // 2
    art = np.array([[*row] for row in rows])
    y, x = np.nonzero(art != ".")
    pixels = (top + y) * SIZE + left + x
    return pixels, np.array([colours[letter] for letter in art[y, x]], np.int16)


def render(scene: Scene) -> tuple[np.ndarray, float]:
    """Palette indices, int16 [256], and the share that shows of the thing that shows least."""
    image = background(scene.sky, scene.ground).copy()
    owner = np.full(SIZE * SIZE, -1)
    things = sorted(scene.things, key=lambda thing: PLACES.index(thing[3:]))
    for i, thing in enumerate(things):
        pixels, colours = stamp(thing)
        image[pixels] = colours
        owner[pixels] = i
    return image, min((owner == i).sum() / len(stamp(t)[0]) for i, t in enumerate(things))


def is_held_out(thing: Thing) -> bool:
    """One in ten triples of kind, colour and place is never trained on; every pair of them is."""
    kind, colour = list(SPRITES).index(thing.kind), COLOURS.index(thing.colour)
    return (kind + 3 * colour + 7 * PLACES.index(thing[3:])) % 10 == 0


def random_thing(rng: random.Random, depth: str, column: str) -> Thing:
    kind = rng.choice([kind for kind in SPRITES if (kind in IN_THE_SKY) == (depth == "top")])
    size = rng.choice(("big", "small"))
    colour = rng.choice(COLOURS)
    return Thing(kind, size, colour, depth, column)


def references(thing: Thing, scene: Scene) -> list[str]:
    """The ways to name a thing that fit no other of the scene."""
    kind, size, colour, *place = thing
    ways = [(kind,), (colour, kind), (size, kind), (kind, "at the", *place)]
    unique = [way for way in ways if sum({*way} <= {*t, "at the"} for t in scene.things) == 1]
    return [" ".join(["the", *way]) for way in unique]


def random_edit(rng: random.Random, test: bool = False) -> Edit | None:
    """One edit of a random scene, or None where it does not work out.

    Things are not held out; for test the one made or removed is, and half of the phrasings are.
    """
    places = PLACES.copy()
    rng.shuffle(places)
    number = rng.randint(2, 4)
    verb = rng.choice(list(PATTERNS))
    things = tuple(random_thing(rng, *place) for place in places[:number])
    source = Scene(rng.choice(SKIES), rng.choice(GROUNDS), things)

    old, new = things[0], None
    if verb == "add":
        old, new = None, random_thing(rng, *places[number])
    elif verb == "recolour":
        new = old._replace(colour=rng.choice([c for c in COLOURS if c != old.colour]))
    elif verb == "replace":
        new = random_thing(rng, old.depth, old.column)
    elif verb == "move":
        empty = [p for p in places[number:] if (p[0] == "top") == (old.depth == "top")]
        if not empty:
            return None
        new = Thing(*old[:3], *empty[0])
    target = source._replace(things=tuple(t for t in (*things, new) if t not in (old, None)))

    focus = new or old
    others = {*source.things, *target.things} - {focus}
    if verb == "replace" and new.kind == old.kind or is_held_out(focus) != test:
        return None
    if any(map(is_held_out, others)) or min(render(source)[1], render(target)[1]) < VISIBLE:
        return None

    unseen = test and rng.random() < 0.5
    pattern = rng.choice(PHRASES[verb][unseen])
    text = pattern.format(
        it=rng.choice(references(old, source)) if old else "",
        new=f"a {focus.size} {focus.colour} {focus.kind}",
        colour=focus.colour,
        place=" ".join(focus[3:]),
    )
    return Edit(verb, text, source, target, unseen)


def random_edits(number: int, seed: int, test: bool = False) -> list[Edit]:
    """So many edits, the same for the same seed; about 0.2 ms each, for test 4 ms."""
    rng = random.Random(seed)
    attempts = (random_edit(rng, test) for _ in count())
    return list(islice(filter(None, attempts), number))


def leave_words_out(text: str, rng: random.Random) -> str:
    """For training, so that what is to be done hangs on no single word ("change", "into")."""
    return " ".join(word for word in text.split() if word in NAMES or rng.random() >= 0.15)


def caption(scene: Scene, rng: random.Random) -> str:
    """Sky, ground and up to three of the things: "night sand house big red back left"."""
    named = rng.sample(scene.things, min(3, len(scene.things)))
    return " ".join([scene.sky, scene.ground, *(" ".join(thing) for thing in named)])


PHRASES = {verb: [*map(phrasings, text.split("|"))] for verb, text in PATTERNS.items()}
WORDS = {word for texts, _ in PHRASES.values() for text in texts for word in text.split()}
WORDS = sorted({word for word in WORDS if "{" not in word} | NAMES | {"a", *SKIES, *GROUNDS})

# ------------------------------------------------------------------------------------------------
# Pairs and their tokens


def split_words(text: str) -> list[str]:
    return text.lower().replace(",", " ").rstrip(".! ").split()


@dataclass
class Codec:
    """Between pictures and words on one side and token ids on the other; saved in checkpoints."""

    palette: list[list[int]]  # C colours, RGB in 0..255
    words: list[str]
    length: int  # words of an instruction at most
    height: int
    width: int

    def __post_init__(self):
        self.size = (self.height, self.width)
        self.pixels = self.height * self.width
        self.prompt = self.length + self.pixels  # positions before the target
        self.no_image = 1 + 2 * len(self.palette)
        self.no_word = self.no_image + 1
        self.word_ids = {word: i for i, word in enumerate(self.words, self.no_word + 1)}
        self.vocabulary = self.no_word + 1 + len(self.words)

    def encode_text(self, text: str, where: str = "the instruction") -> list[int]:
        """length ids, "no word" at the end.  InputError names an unknown word."""
        words = split_words(text)
        for word in words:
            if word not in self.word_ids:
                raise InputError(f"{where} has the word {word!r}, which the model does not know")
        if not 0 < len(words) <= self.length:
            raise InputError(f"{where} has {len(words)} words, 1 to {self.length} are possible")
        padding = [self.no_word] * (self.length - len(words))
        return [self.word_ids[word] for word in words] + padding

    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> int64 [H * W], 1 + the nearest palette entry (squared distance)."""
        colours, index = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
        distance = ((colours[:, None].astype(int) - np.array(self.palette)) ** 2).sum(-1)
        return 1 + distance.argmin(1)[index.ravel()]

    def decode_image(self, tokens: Tensor) -> Tensor:
        """int64 [..., H * W] -> uint8 [..., H, W, 3]; MASK is magenta."""
        table = torch.tensor([[255, 0, 255], *self.palette], dtype=torch.uint8)
        return table[tokens.cpu()].unflatten(-2, self.size)


class Pairs(NamedTuple):
    """n edits as tokens, int64: source, target [n, H * W]; instruction, caption [n, length]."""

    source: Tensor
    target: Tensor
    instruction: Tensor
    caption: Tensor  # of the target; all "no word" where there is none
    texts: list[str]
    labels: list[tuple[str, ...]]  # groups of which the share right is told, too
    codec: Codec


def scene_pairs(number: int, seed: int, test: bool = False) -> Pairs:
    """Pairs of our own scenes; of training instructions words are left out."""
    codec = Codec(PALETTE, WORDS, 17, SIZE, SIZE)
    edits = random_edits(number, seed, test)
    images = np.array([[render(edit.source)[0], render(edit.target)[0]] for edit in edits])
    source, target = (1 + torch.from_numpy(images.astype(np.int64))).unbind(1)

    rng = random.Random(seed)
    texts = [edit.instruction for edit in edits]
    told = texts if test else [leave_words_out(text, rng) for text in texts]
    instruction = torch.tensor([codec.encode_text(text) for text in told])
    captions = torch.tensor([codec.encode_text(caption(edit.target, rng)) for edit in edits])
    labels = [(edit.verb, ("seen", "unseen")[edit.unseen_phrase] + " phrasing") for edit in edits]
    return Pairs(source, target, instruction, captions, texts, labels, codec)


def read_picture(path: Path, size: tuple | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The picture laid on white, uint8 [H, W, 3], and as it is, uint8 [H, W, 4].

    size: the height and width that it must have; None: SIDE at most.  Raises InputError.
    """
    with rm.naming(path, "cannot be read as an image"):
        image = Image.open(path)
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would cut off at 255
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
    if image.size[::-1] != size if size else max(image.size) > SIDE:
        wanted = f"{size[1]}x{size[0]}" if size else f"{SIDE}x{SIDE} at most"
        raise InputError(f"{path} is {image.width}x{image.height} pixels, it must be {wanted}")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB")), np.array(image)


def read_pairs(folder: Path, most: int, codec: Codec | None = None, colours: int = 512) -> Pairs:
    """The first most pairs of folder/pairs.jsonl; prints what they are.

    A line: {"instruction": ..., "source": PNG, "target": PNG}; all pictures have one size.  codec:
    None learns the words and the most frequent colours of the folder.  InputError names the line.
    """
    path = folder / "pairs.jsonl"
    texts, images = [], []
    size = codec and codec.size
    for number, line in rm.read_lines(path)[:most]:
        keys = ("instruction", "source", "target")
        with rm.naming(f"{path} line {number}", f"must be JSON with {', '.join(keys)}"):
            pair = json.loads(line)
            text, *files = (pair[key] for key in keys)
            "".join([text, *files]).encode()  # all text, and no half of a surrogate pair
        source, _ = read_picture(folder / files[0], size)
        size = source.shape[:2]
        target, _ = read_picture(folder / files[1], size)
        texts.append(text)
        images.append((source, target))

    images = np.array(images)  # [n, 2, H, W, 3]
    if codec is None:
        palette, often = np.unique(images.reshape(-1, 3), axis=0, return_counts=True)
        frequent = np.sort(np.argsort(-often, kind="stable")[:colours])
        words = [split_words(text) for text in texts]
        length = max(map(len, words)) + 2
        codec = Codec(palette[frequent].tolist(), sorted(set().union(*words)), length, *size)
    tokens = np.array([[codec.encode_image(image) for image in both] for both in images])
    tokens = torch.from_numpy(tokens)
    source, target = tokens.unbind(1)
    instruction = torch.tensor([codec.encode_text(text, f"{path}: {text!r}") for text in texts])
    nothing = torch.full_like(instruction, codec.no_word)

    nearest = (codec.decode_image(tokens).numpy() != images).any(-1).sum()
    rm.say(f"{folder}: {len(texts)} pairs, {len(codec.words)} words, {len(codec.palette)} colours "
        f"({nearest} pixels by the nearest)")  # fmt: skip
    return Pairs(source, target, instruction, nothing, texts, [()] * len(texts), codec)


def load_pairs(folder: Path | None, most: int, seed: int, codec: Codec | None = None) -> Pairs:
    """Of a folder, else our own scenes; codec, a model's: to test it, so held-out ones."""
    if folder:
        return read_pairs(folder, most, codec)
    pairs = scene_pairs(most, seed, test=codec is not None)
    if codec not in (None, pairs.codec):
        raise InputError("the model knows other pictures than our scenes: give --test DIR")
    return pairs


# ------------------------------------------------------------------------------------------------
# The network and what it is trained on


class Editor(MaskDiffusionTransformer):
    """The project's transformer on [instruction | source | target], the source under the target.

    Its logits, [B, length + 2 * H * W, V], are real at the target for MASK and the palette, -10,000
    elsewhere.  A position's coordinates: row, column, block of 4x4 pixels, whether it is a word.
    """

    def __init__(self, codec: Codec, variant: str):
        words = [[codec.height, codec.width + i, 0, 1] for i in range(codec.length)]
        blocks = -(-codec.width // 4)
        grid = product(range(codec.height), range(codec.width))
        pixels = [[y, x, 1 + y // 4 * blocks + x // 4, 0] for y, x in grid]
        size = {"vocabulary": codec.vocabulary, "length": codec.prompt, "heads": 2}
        super().__init__(TransformerConfig(**size, positions="both", coordinates=words + pixels))
        self.codec = codec
        self.variant = variant
        self.gamma, self.rotate, self.decodings = VARIANTS[variant]

    def forward(self, x: Tensor) -> Tensor:
        words, pixels = self.codec.length, self.codec.pixels
        text, source, target = x.split([words, pixels, pixels], dim=1)
        logits = super().forward(torch.cat([text, source + target], dim=1))
        logits = logits[:, words:, : 1 + len(self.codec.palette)]
        rest = self.codec.vocabulary - logits.shape[-1]
        return F.pad(logits, (0, rest, words + pixels, 0), value=-1e4)


def load_editor(path: Path, device: torch.device) -> Editor:
    """The model of a checkpoint.  InputError: it is another task's, or does not fit its codec."""
    build = lambda info: Editor(Codec(**info["codec"]), info["variant"])
    return rm.load_checkpoint(path, "image", device, build=build)[0]


def revision_states(source: Tensor, target: Tensor, generator: torch.Generator) -> tuple:
    """Trajectories from source to target, int64 [7, B, P], and the turn to train on, int64 [B].

    The wrong token is the source's.  A fifth of the rows follow the paper's law, every pixel on its
    own clock.  The others are what decoding looks like: the whole edit is re-masked in turn 1 (a
    tenth of its pixels in turn 2), then revealed piece by piece; half of them stand at turn 0,
    where nothing tells yet where the edit will be, a third at turn 1.  In 40 % of all rows pixels
    outside the edit are masked, too, so that the model can put back what it masked without need.
    """
    rand = partial(torch.rand, generator=generator, device=source.device)
    batch = len(source)
    edit = source != target
    outside = rand(batch, 1).clamp(min=0.6).sub(0.6).mul(0.4)  # 0, or a share ~ U(0, 0.16)
    changed = edit | (rand(source.shape) < outside)
    p_wrong = torch.where(rand(batch, 1) < 0.5, 1.0, rand(batch, 1)) * edit  # 1, or ~ U(0, 1)
    law = rm.sample_trajectory(target, changed, source, MASK, 6, p_wrong, generator)

    step = torch.arange(7, device=source.device).view(-1, 1, 1)
    masked = torch.where(rand(source.shape) < 0.1, 2, 1)
    revealed = masked + 1 + (rand(source.shape) * (6 - masked)).long()  # ~ U{masked+1..6}
    states = torch.where(step < masked, source, torch.where(step < revealed, MASK, target))
    states = torch.where(changed, states, target)

    lawful = rand(batch, 1) < 0.2
    turn = (rand(batch) * 6).long()  # ~ U{0..5}
    choice = rand(batch)
    usual = torch.where(choice < 0.5, 0, torch.where(choice < 0.83, 1, turn))
    return torch.where(lawful, law, states), torch.where(lawful[:, 0], turn, usual)


def sample_batch(batch: int, generator: torch.Generator, pool: Pairs, variant: str) -> rm.Batch:
    """A batch for rm.train.  States [K, batch, N]; the prompt is ABSENT in all but the last."""
    codec, device = pool.codec, pool.source.device
    rand = partial(torch.rand, generator=generator, device=device)
    rows = torch.randint(len(pool.source), (batch,), generator=generator, device=device)
    source, target, words = pool.source[rows], pool.target[rows], pool.instruction[rows]
    edits, hidden = (BASE_EDITS, BASE_HIDDEN) if variant == "base" else (1.0, 0.0)
    is_edit = rand(batch, 1) < edits
    words = torch.where(is_edit & (rand(batch, 1) >= hidden), words, codec.no_word)
    shown = is_edit & (rand(batch, 1) >= hidden)
    shown = torch.where(shown, source + len(codec.palette), codec.no_image)
    if variant == "base":
        captioned = ~is_edit & (rand(batch, 1) >= hidden)
        words = torch.where(captioned, pool.caption[rows], words)

    if variant in ("base", "sft"):
        editable = rand(target.shape) < rand(batch, 1)  # masked: a share ~ U(0, 1)
        states = torch.where(editable, MASK, target).unsqueeze(0)
    else:
        editable = torch.ones_like(target, dtype=torch.bool)
        states = rm.history_until(*revision_states(source, target, generator))

    # The text begins at a random slot, so that no word is tied to one: phrasings differ in it.
    spare = (words == codec.no_word).sum(1, keepdim=True)
    shift = (rand(batch, 1) * (spare + 1)).long()  # ~ U{0..spare}
    slots = torch.arange(codec.length, device=device) - shift
    prompt = torch.cat([words.gather(1, slots % codec.length), shown], 1)
    states = F.pad(states, (codec.prompt, 0), value=ABSENT)
    states[-1, :, : codec.prompt] = prompt
    editable = F.pad(editable, (codec.prompt, 0), value=False)
    return states, torch.cat([prompt, target], 1), editable


# ------------------------------------------------------------------------------------------------
# Decoding


@torch.no_grad()
def two_phase(
    denoiser, tokens: Tensor, history: HistoryReference, mask_steps: int = 8, reveal_steps: int = 8
) -> Tensor:
    """The paper's image decoding: re-mask only, then reveal only by MaskGIT's cosine schedule.

    denoiser: input embeddings -> logits.  tokens: int64 [B, P].  Returns the trace, int64
    [turns + 1, B, P], the last without MASK.  Each row changes phase in the turn that finds nothing
    more to re-mask, or after mask_steps: its result does not depend on its batch.
    """
    reveals = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)  # in phase 2
    total = reveals  # masks at the start of phase 2
    trace = [tokens]
    history.reset()
    for turn in range(mask_steps + reveal_steps):
        logits = denoiser(history.push(tokens))
        masking = (reveals == 0) & (turn < mask_steps)
        remasked = rm.decide(logits, tokens, MASK, masking, allow_reveal=False)
        masking = (remasked != tokens).any(-1, keepdim=True)

        masks = (remasked == MASK).sum(-1, keepdim=True)
        total = total.maximum(masks)  # they grow in phase 1 alone
        reveals = reveals + ~masking
        # After step s of S a share cos(pi s / 2S) of the masks is left; one at least is revealed.
        left = total * torch.cos(math.pi / 2 * (reveals / reveal_steps))
        count = torch.where(masking, 0, (masks - left.floor().long()).clamp(min=1)).flatten()
        tokens = rm.decide(logits, remasked, MASK, reveal=count, allow_remask=False)
        trace.append(tokens)
        if not (tokens == MASK).any():
            break
    return torch.stack(trace)


@torch.no_grad()
def edit(
    model: Editor, source: Tensor, instruction: Tensor, decoding: str
) -> tuple[list[int], Tensor]:
    """Edits source, int64 [B, P], by instruction, int64 [B, length], with one of model.decodings.

    Returns the forward passes a row and the trace, int64 [turns + 1, B, P], on the CPU.
    """
    codec, embedding = model.codec, model.embedding.detach()
    source, instruction = source.to(embedding.device), instruction.to(embedding.device)
    prompt = torch.cat([instruction, source + len(codec.palette)], 1)
    prompt = rms_norm(embedding[prompt])  # as it never changes: without history
    history = HistoryReference(embedding, model.gamma, model.rotate)

    def denoiser(target: Tensor, prompt: Tensor = prompt) -> Tensor:
        with rm.mixed_precision(target.device):
            return model(torch.cat([prompt, target], 1))[:, codec.prompt :].float()

    if decoding == "loop":
        how = {"max_turns": 16, "trace": True, "context": {"prompt": prompt}}
        _, turns, _, trace = rm.revise(denoiser, source, MASK, history, **how)
        return turns, trace.cpu()
    if decoding == "two-phase":
        trace = two_phase(denoiser, source, history)
    else:  # the baselines: all is revealed anew
        trace = two_phase(denoiser, torch.full_like(source, MASK), history, reveal_steps=16)
    moved = (trace[1:] != trace[:-1]).any(-1)  # [turns, B]: every turn until a row is done
    return moved.sum(0).clamp(min=1).tolist(), trace.cpu()


# ------------------------------------------------------------------------------------------------
# Metrics, evaluation, pictures


def structural_similarity(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """SSIM at every pixel, float64 [n, H, W]: uniform window cut at the border, mean of channels.

    a, b: float64 [n, H, W, 3] in 0..255.  Wang, Bovik, Sheikh, Simoncelli, 2004; K1 0.01, K2 0.03.
    """
    a, b = a.movedim(-1, 1), b.movedim(-1, 1)
    mean = nn.AvgPool2d(window, stride=1, padding=window // 2, count_include_pad=False)
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean(1)


def measure(edited: Tensor, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The paper's metrics of uint8 images [n, H, W, 3]: float64 [n] each, NaN where undefined.

    The region is where source and target differ.  precision: share of the changed pixels that lie
    in it.  coverage: share of the region that changed.  mae, psnr, ssim: edited against source
    outside the region (inside ssim reads the source); psnr is infinite where they are equal.
    """
    region = (source != target).any(-1)
    changed = (edited != source).any(-1)
    hits = (changed & region).sum((1, 2)).double()
    pixels = (~region).sum((1, 2)).double()
    outside = torch.where(region.unsqueeze(-1), source, edited).double()
    error = outside - source.double()
    mse = error.square().sum((1, 2, 3)) / (3 * pixels)
    similarity = structural_similarity(outside, source.double())
    return {
        "precision": hits / changed.sum((1, 2)),
        "coverage": hits / region.sum((1, 2)),
        "mae": error.abs().sum((1, 2, 3)) / (3 * pixels),
        "psnr": 10 * torch.log10(255**2 / mse),
        "ssim": (similarity * ~region).sum((1, 2)) / pixels,
    }


def share_exact(right: list[bool]) -> dict:
    hits, n = sum(right), len(right)
    return {"n": n, "exact": hits / n, "ci95_exact": rm.wilson_interval(hits, n)}


def evaluate(model: Editor, pairs: Pairs, decoding: str, chunk: int = 100) -> dict:
    """Shares right, of all and by label; passes; mean metrics, psnr's median; inf, nan as text."""
    turns, edited = [], []
    for source, instruction in zip(pairs.source.split(chunk), pairs.instruction.split(chunk)):
        passes, trace = edit(model, source, instruction, decoding)
        turns += passes
        edited.append(trace[-1])
    edited = torch.cat(edited)

    right = (edited == pairs.target).all(-1).tolist()
    groups = {}  # label -> which of its pairs are right
    for label, hit in [(label, hit) for own, hit in zip(pairs.labels, right) for label in own]:
        groups.setdefault(label, []).append(hit)
    metrics = measure(*map(model.codec.decode_image, (edited, pairs.source, pairs.target)))
    average = {name: values.nanmean() for name, values in metrics.items()}
    average["psnr"] = metrics["psnr"].nanquantile(0.5, interpolation="nearest")
    return {
        **share_exact(right),
        **{name: x.item() if x.isfinite() else str(x.item()) for name, x in average.items()},
        "groups": {label: share_exact(hits) for label, hits in groups.items()},
        "mean_turns": sum(turns) / len(turns),
        "decoding": decoding,
        "right": "".join("01"[hit] for hit in right),
    }


def print_table(rows: dict[str, dict]) -> None:
    """Exactness and the paper's metrics.  rows: label -> record of evaluate."""
    shares, others = ("exact", "precision", "coverage"), ("mae", "psnr", "ssim", "mean_turns")
    print(f"\n{'':32}" + "".join(f"{name:>12}" for name in (*shares, *others)))
    for label, row in rows.items():
        cells = [100 * float(row[name]) for name in shares] + [float(row[name]) for name in others]
        print(f"{label:32}" + "".join(f"{cell:12.3f}" for cell in cells))


def draw_strips(path: Path, codec: Codec, texts: list[str], columns: dict[str, Tensor]) -> None:
    """A row of pictures for each of n texts.  columns: head -> tokens int64 [n, P]."""
    figure, axes = rm.new_figure(len(texts), 1, 1.4 * len(columns), 1.8 * len(texts))
    middles = [(codec.width + 1) * (i + 0.5) - 1 for i in range(len(columns))]
    images = codec.decode_image(torch.stack([*columns.values()], dim=1))  # [n, columns, H, W, 3]
    framed = F.pad(images, (0, 0, 0, 1), value=255)  # a white line after each
    for axis, text, row in zip(axes.flat, texts, framed):
        axis.imshow(torch.cat([*row], dim=1).numpy())
        axis.set_title(text, loc="left", fontsize=8)
        axis.set_xticks(middles, columns, fontsize=7)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    rm.save_figure(figure, path)


def edit_file(model: Editor, path: Path, instruction: str, out: Path, decoding: str) -> dict:
    """Edits a picture, or InputError; writes out, and all turns side by side, <out>_turns.png."""
    codec = model.codec
    opaque, picture = read_picture(path, codec.size)
    words = torch.tensor([codec.encode_text(instruction)])
    source = torch.from_numpy(codec.encode_image(opaque)).unsqueeze(0)
    (turns,), trace = edit(model, source, words, decoding)

    changed = (trace[-1] != source).view(codec.size).numpy()  # others keep their transparency
    picture[changed, :3] = codec.decode_image(trace[-1, 0]).numpy()[changed]
    picture[changed, 3] = 255
    rm.replace_file(out, lambda file: Image.fromarray(picture).save(file, "PNG"))
    columns = {f"turn {turn}": state for turn, state in enumerate(trace)}
    draw_strips(out.with_name(f"{out.stem}_turns.png"), codec, [instruction], columns)
    remasked = int((trace == MASK).any(0).sum())
    return {"turns": turns, "remasked_pixels": remasked, "changed_pixels": int(changed.sum())}


# ------------------------------------------------------------------------------------------------
# Training and the command line


def train_variant(
    variant: str, pool: Pairs, folder: Path, steps: int, device: torch.device,
    seed: int = 0, compile: bool = False,
) -> dict:  # fmt: skip
    """Trains a variant, goes on with it, or reads its record; writes <variant>.pt and .json."""
    codec = asdict(pool.codec)
    data = rm.fingerprint(json.dumps(codec), *pool[:4])
    torch.manual_seed(seed)
    model = Editor(pool.codec, variant).to(device)
    if variant != "base":  # all others start from it
        model.load_state_dict(load_editor(folder / "base.pt", device).state_dict())
    base = rm.fingerprint(*model.state_dict().values())
    run = rm.Run(folder / variant, {"seed": seed, "steps": steps, "data": data, "base": base})
    if run.record:
        return run.record

    sample = partial(sample_batch, pool=pool, variant=variant)
    how = {**TRAINING, "gamma": model.gamma, "rotate": model.rotate, "compile": compile}
    every = max(1, steps // 20)
    for step, stats in rm.train(model, sample, steps, MASK, seed=seed, **how, **run.files(every)):
        if step % every == 0 or step == steps:
            run.show(step, steps, stats, scores={})
    return run.finish(model, "image", codec=codec, variant=variant, **how)


def train_all(
    steps: dict[str, int], pool: Pairs, test: Pairs, folder: Path, device: torch.device,
    seed: int = 0, compile: bool = False,
) -> dict:  # fmt: skip
    """Trains what is not done yet, base first, scores all; a table, a gallery.  steps: of each."""
    pool = Pairs(*(part.to(device) for part in pool[:4]), *pool[4:])
    training = {}
    for variant, n in steps.items():
        training[variant] = train_variant(variant, pool, folder, n, device, seed, compile)
    if not rm.is_main_process():
        return {}

    rows = {}
    source = test.source[:10]
    columns = {"source": source}
    for variant in steps:
        model = load_editor(folder / f"{variant}.pt", device)
        for decoding in model.decodings:
            rows[f"{variant}, {decoding}"] = evaluate(model, test, decoding)
        _, trace = edit(model, source, test.instruction[:10], model.decodings[0])
        if model.decodings == IN_PLACE:
            remasked = (trace == MASK).any(0)
            columns[f"re-masked by {variant}"] = torch.where(remasked, MASK, source)
        columns[variant] = trace[-1]
    print_table(rows)
    columns["target"] = test.target[:10]
    draw_strips(folder / "gallery.png", test.codec, test.texts[:10], columns)
    result = {"rows": rows, "training": training, "provenance": rm.provenance(device)}
    rm.write_json(folder / "table.json", result)
    return result


def parse_arguments():
    options = rm.Options(description="Trains base, SFT and RM to edit pictures, scores and draws.")
    positive = rm.number(int, 1)
    add = options.group("what to do (default: train)", "image")
    add("--evaluate", action="store_true", modes=(), help="score --checkpoint on test pairs")
    add("--image", type=Path, metavar="IN.png", help="edit this file, write --out OUT.png")
    add("--instruction", metavar="TEXT", help="with --image: what to do with it")
    add = options.group("training", "train")
    add("--pairs", type=Path, metavar="DIR", help="train on DIR/pairs.jsonl, with --test")
    add("--pool", type=positive, default=40_000, help="training pairs at most (default 40000)")
    add("--steps", type=positive, default=2500, help="of each variant (default 2500)")
    add("--base-steps", type=positive, help="of the base (default: a fifth of them)")
    add("--history", action="store_true", help="also train RM + history (Eq. 2)")
    add("--compile", action="store_true", help="torch.compile (needs a C++ compiler on CPU)")
    add = options.group("test data", "train", "evaluate")
    add("--test", type=Path, metavar="DIR", help="test on DIR/pairs.jsonl (default: our scenes)")
    add("--n", type=positive, default=1000, help="test pairs at most (default 1000)")
    add = options.group("editing", "evaluate", "image")
    add("--checkpoint", type=Path, default=HERE / "checkpoints/image_rm.pt", help="default shipped")
    add("--decode", choices=IN_PLACE, help="the loop is Eq. 1's alone (default two-phase)")
    general = {"out_modes": ("train", "image"), "seed_modes": ("train", "evaluate")}
    options.general("runs/image", seed="of training, or of test scenes", **general)
    mode_of = lambda args: next((m for m in ("evaluate", "image") if m in args.given), "train")
    args = options.parse(mode_of, {"steps": 2, "pool": 12, "n": 6})

    if args.image and not (args.instruction and args.out.suffix.lower() == ".png"):
        options.error("--image needs --instruction TEXT and --out OUT.png")
    if args.mode == "evaluate" and args.test and "seed" in args.given:
        options.error("--seed has no effect with --evaluate --test: it draws our own scenes")
    return args


def main() -> None:
    args = parse_arguments()
    device = rm.start_device(args.device)
    if args.mode == "train":
        pool = load_pairs(args.pairs, args.pool, args.seed)
        test = load_pairs(args.test, args.n, TEST_SEED, pool.codec)
        steps = {"base": args.base_steps or math.ceil(args.steps / 5)}
        steps |= dict.fromkeys(["sft", "rm"] + ["history"] * args.history, args.steps)
        result = train_all(steps, pool, test, args.out, device, args.seed, args.compile)
    else:
        model = load_editor(args.checkpoint, device)
        decoding = args.decode or model.decodings[0]
        if decoding not in model.decodings:
            raise InputError(f"{args.checkpoint} regenerates: --decode is RM's")
    if args.mode == "image":
        result = edit_file(model, args.image, args.instruction, args.out, decoding)
    if args.mode == "evaluate":
        test = load_pairs(args.test, args.n, TEST_SEED + args.seed, model.codec)
        result = evaluate(model, test, decoding)
        print_table({f"{model.variant}, {decoding}": result})
        result |= {"seed": args.seed, "provenance": rm.provenance(device)}
    rm.write_json(args.json, result)


if __name__ == "__main__":
    rm.run_script(main)
