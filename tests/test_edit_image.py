"""Image editing: scenes, pairs, metrics, decoding against plain Python; the command lines."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edit_image as image
import reflective_masking as rm
from history import ABSENT, history_embedding

ROOT = Path(__file__).parent.parent
TRAIN = image.random_edits(1500, seed=5)
TEST = image.random_edits(400, seed=image.TEST_SEED, test=True)


# --- scenes


def paint_by_hand(scene):
    """Palette indices, row by row: one thing over the other, from the sky to the front."""
    picture = image.background(scene.sky, scene.ground).reshape(16, 16).tolist()
    depths, columns = ("top", "back", "front"), ("left", "middle", "right")
    for thing in sorted(scene.things, key=lambda t: (depths.index(t[3]), columns.index(t[4]))):
        art = image.SPRITES[thing.kind][["big", "small"].index(thing.size)].split("/")
        bottom = {"top": 5, "back": 10, "front": 14}[thing.depth]
        left = {"left": 3, "middle": 8, "right": 12}[thing.column] - (len(art[0]) - 1) // 2
        shade = 2 * (3 + 3 + image.COLOURS.index(thing.colour))  # after three skies and grounds
        for height, row in enumerate(reversed(art)):
            for x, letter in enumerate(row, left):
                if letter != ".":
                    colours = {"A": shade, "a": shade + 1}
                    picture[bottom - height][x] = colours.get(letter, 26 + "KLBSG".find(letter))
    return [[image.PALETTE[index] for index in row] for row in picture]


def test_pictures_are_the_scenes():
    assert len(set(map(tuple, image.PALETTE))) == 31  # equal token, equal colour
    assert image.PALETTE[12] == [214, 46, 46] and image.PALETTE[-1] == [24, 92, 44]  # red, stalk
    pairs = image.scene_pairs(40, seed=5)
    sources, targets = (pairs.codec.decode_image(t).tolist() for t in (pairs.source, pairs.target))
    for i, edit in enumerate(TRAIN[:40]):
        assert sources[i] == paint_by_hand(edit.source) != targets[i]
        assert targets[i] == paint_by_hand(edit.target)
        touched = set(edit.source.things) ^ set(edit.target.things)
        cells = {int(cell) for thing in touched for cell in image.stamp(thing)[0]}
        region = (pairs.source[i] != pairs.target[i]).nonzero().flatten().tolist()
        assert region and set(region) <= cells


def test_scenes_are_those_of_the_published_numbers():
    for seed, test, checksum in ((0, False, "f36069a3"), (image.TEST_SEED, True, "0621b3bc")):
        pairs = image.scene_pairs(200, seed, test)
        assert rm.fingerprint(*pairs[:4], *pairs.texts) == checksum


KIND, COLOUR, SIZE = ("|".join(words) for words in (image.SPRITES, image.COLOURS, ("big", "small")))
REMOVING = "remove|delete|away|erase|drop|disappear|picture|no more"
PLACE = r"(top|back|front) (left|middle|right)"


def understand(text, scene):
    """What an instruction asks for, by key words alone: (verb, the things afterwards)."""
    new = re.search(rf"\ba ({SIZE}) ({COLOUR}) ({KIND})", text)
    rest = text.replace(new.group(), "NEW") if new else text
    named = re.search(rf"\bthe (?:({SIZE}) |({COLOUR}) )?({KIND})\b", rest)
    places = re.findall(rf"\b(at|to) the {PLACE}", rest)
    if new:
        size, colour, kind = new.groups()
        made = {"size": size, "colour": colour, "kind": kind}
    if not named:  # nothing of the scene is named
        ((_, depth, column),) = places
        return "add", [*scene.things, image.Thing(**made, depth=depth, column=column)]
    colours = re.findall(rf"\b({COLOUR})\b", rest[: named.start()] + rest[named.end() :])
    if new:
        verb = "replace"
    elif re.search(rf"\b({REMOVING})\b|should go$", rest):
        verb, made = "remove", None
    elif colours:
        verb, made = "recolour", {"colour": colours[0]}
    else:
        goal = next((place for place in places if place[0] == "to"), places[-1])
        places.remove(goal)
        verb, made = "move", {"depth": goal[1], "column": goal[2]}
    size, colour, kind = named.groups()
    (thing,) = [
        thing for thing in scene.things
        if thing.kind == kind and colour in (None, thing.colour) and size in (None, thing.size)
        and (not places or (thing.depth, thing.column) == places[0][1:])
    ]  # fmt: skip
    after = [other for other in scene.things if other != thing]
    return verb, after + ([thing._replace(**made)] if made else [])


def test_instructions_parse_back_to_the_edit():
    for edit in TRAIN + TEST:
        verb, things = understand(edit.instruction, edit.source)
        assert (verb, sorted(things)) == (edit.verb, sorted(edit.target.things)), edit.instruction
        assert (edit.target.sky, edit.target.ground) == (edit.source.sky, edit.source.ground)
    assert {edit.verb for edit in TEST} == set(image.PATTERNS)


def test_training_leaves_words_out_of_instructions_but_never_a_name():
    rng = image.random.Random(0)
    words, kept = 0, 0
    for edit in TRAIN[:500]:
        full, short = edit.instruction.split(), image.leave_words_out(edit.instruction, rng).split()
        rest = iter(full)
        assert all(word in rest for word in short)  # the same words in the same order
        names = {"big", "small"}.union(*set(edit.source.things) ^ set(edit.target.things))
        assert [w for w in short if w in names] == [w for w in full if w in names] != []
        words += sum(word not in names for word in full)
        kept += sum(word not in names for word in short)
    assert abs(kept / words - 0.85) < 0.03


def test_captions_parse_back_to_the_scene():
    rng = image.random.Random(0)
    for edit in TRAIN[:300]:
        words = image.caption(edit.target, rng).split()
        named = [image.Thing(*words[i : i + 5]) for i in range(2, len(words), 5)]
        assert words[:2] == [edit.target.sky, edit.target.ground]
        assert len(set(named)) == len(named) == min(3, len(edit.target.things))
        assert set(named) <= set(edit.target.things)


def test_held_out_split_is_disjoint():
    def triples(things):
        return {(thing.kind, thing.colour, *thing[3:]) for thing in things}

    trained = triples(thing for edit in TRAIN for thing in edit.source.things + edit.target.things)
    for edit in TEST:
        added = set(edit.target.things) - set(edit.source.things)
        focus = added or set(edit.source.things) - set(edit.target.things)
        assert len(focus) == 1 and not trained & triples(focus)
    shapes = itertools.product(image.SPRITES, ["big"], image.COLOURS, image.PLACES)
    things = [image.Thing(*shape, *place) for *shape, place in shapes]
    things = [t for t in things if (t.kind in image.IN_THE_SKY) == (t.depth == "top")]
    kept = [thing for thing in things if not image.is_held_out(thing)]
    assert 0.08 < 1 - len(kept) / len(things) < 0.12
    for pair in (lambda t: (t.kind, t.colour), lambda t: (t.kind, t[3:]), lambda t: t[2:]):
        assert {pair(thing) for thing in kept} == {pair(thing) for thing in things}


def test_phrasings_kept_for_test_are_never_trained_on_but_their_words_are():
    assert image.phrasings("go/come to {it}; {it}") == ["go to {it}", "come to {it}", "{it}"]
    for verb, (train, test) in image.PHRASES.items():
        assert not set(train) & set(test)
        patterns = [re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(t)) + "$") for t in train]
        unseen = [edit for edit in TEST if edit.verb == verb and edit.unseen_phrase]
        known = [any(p.match(edit.instruction) for p in patterns) for edit in unseen]
        assert known and not all(known)
    assert {word for edit in TEST for word in edit.instruction.split()} <= set(image.WORDS)
    assert 0.4 < sum(edit.unseen_phrase for edit in TEST) / len(TEST) < 0.6
    assert not any(edit.unseen_phrase for edit in TRAIN)


def test_source_and_instruction_determine_the_target():
    outcome = {}
    for edit in TRAIN + TEST:
        source, target = (image.render(scene)[0].tobytes() for scene in (edit.source, edit.target))
        assert outcome.setdefault((source, edit.instruction), target) == target


# --- pairs from a folder


def write_pairs(folder, pairs):
    folder.mkdir(parents=True)
    lines = []
    for i, (text, *pictures) in enumerate(pairs):
        files = {"source": f"{i}_source.png", "target": f"{i}_target.png"}
        for file, picture in zip(files.values(), pictures):
            Image.fromarray(np.array(picture, np.uint8)).save(folder / file)
        lines.append(json.dumps({"instruction": text, **files}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flat(*rgb, size=8):
    return np.full((size, size, 3), rgb, np.uint8)


GOOD = ("make it red", flat(0, 0, 0), flat(200, 0, 0))


def test_palette_and_words_come_from_the_folder(tmp_path, capsys):
    black, red = flat(0, 0, 0), flat(200, 0, 0)
    texts = ["Make it red.", "make it black, please", "do nothing"]
    pictures = ((black, red), (red, black), (black, black))
    folder = write_pairs(tmp_path / "a", [(t, *p) for t, p in zip(texts, pictures)])
    pairs = image.read_pairs(folder, 10)
    codec = pairs.codec
    assert "3 pairs, 7 words, 2 colours (0 pixels" in capsys.readouterr().out
    assert codec.palette == [[0, 0, 0], [200, 0, 0]] and codec.length == 6
    assert codec.words == ["black", "do", "it", "make", "nothing", "please", "red"]
    assert pairs.texts == texts
    assert (pairs.source[0] == 1).all() and (pairs.target[0] == 2).all()
    assert (codec.decode_image(pairs.target)[0].numpy() == red).all()
    picture = black.copy()
    picture[0, 0], picture[0, 1] = (90, 30, 0), (110, 30, 0)  # nearer to black, nearer to red
    assert codec.encode_image(picture)[:3].tolist() == [1, 2, 1]
    spotted = red.copy()
    spotted[0, :5] = [(i, 0, 0) for i in range(1, 6)]  # five rare colours
    other = write_pairs(tmp_path / "b", [("go", black, spotted)])
    assert image.read_pairs(other, 10, colours=2).codec.palette == codec.palette
    assert "2 colours (5 pixels by the nearest)" in capsys.readouterr().out


PICTURES = '"source": "a.png", "target": "b.png"'


@pytest.mark.parametrize("content, message", [
    ("", "is empty"),
    ("[1]", "line 1 must be JSON"),
    ('{"instruction": "x", "source": "a.png"}', "line 1 must be JSON"),
    ('\n{"instruction": "x", "source": 5, "target": "b"}', "line 2 must be JSON"),
    (f'{{"instruction": 5, {PICTURES}}}', "line 1 must be JSON"),
    (f'{{"instruction": "a \\ud800", {PICTURES}}}', "line 1 must be JSON"),
    (f'{{"instruction": "x", {PICTURES}}}', "a.png cannot be read"),
    ([(" .", *GOOD[1:])], "' .' has 0 words"),
    ([GOOD, ("go", flat(0, 0, 0, size=9), GOOD[2])], "1_source.png is 9x9 pixels.*be 8x8"),
    ([("go", np.zeros((16, 64, 3)), np.ones((16, 64, 3)))], "64x16 pixels.*32x32 at most"),
])  # fmt: skip
def test_faulty_folders_are_named(content, message, tmp_path):
    folder = tmp_path / "a"
    if isinstance(content, list):
        write_pairs(folder, content)
    else:
        folder.mkdir()
        (folder / "pairs.jsonl").write_text(content)
    with pytest.raises(image.InputError, match=message):
        image.read_pairs(folder, 10)


def test_sixteen_bit_grey_is_scaled(tmp_path):
    levels = np.array([0, 257, 128 * 257, 200 * 256, 65535], np.uint16)
    Image.fromarray(levels.reshape(1, 5)).save(tmp_path / "grey.png")
    picture, original = image.read_picture(tmp_path / "grey.png")
    assert picture[0].tolist() == [[v] * 3 for v in (0, 1, 128, 200, 255)]
    assert (original[..., 3] == 255).all()


# --- network and training states


def small_editor(seed=0, variant="rm"):
    """An untrained editor of 4x4 images whose decisions vary: its weights are far from 0."""
    palette = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    codec = image.Codec(palette, ["make", "red", "green"], 3, 4, 4)
    torch.manual_seed(seed)
    editor = image.Editor(codec, variant).eval()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        editor.head.weight[image.MASK] *= 1.5
    return editor


def small_pairs(codec, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randint(1, 5, (2, n, codec.pixels), generator=generator)
    words = torch.tensor([codec.encode_text("make red")] * n)
    return image.Pairs(source, target, words, words, ["make red"] * n, [()] * n, codec)


def test_only_the_palette_and_mask_can_be_chosen_and_the_source_is_read():
    editor = small_editor()
    codec, pairs = editor.codec, small_pairs(editor.codec)
    tokens = torch.cat([pairs.instruction, pairs.source + 4, pairs.target], 1)
    logits = editor(editor.embedding[tokens])
    assert logits.shape == (6, 3 + 16 + 16, codec.vocabulary)
    possible = logits > -1e3
    assert possible[:, codec.prompt :, :5].all() and possible.sum() == 6 * 16 * 5
    assert (logits[~possible] == -1e4).all()
    for place, other in ((0, codec.no_word), (3, codec.no_image)):  # a word, a pixel of the source
        changed = tokens.clone()
        changed[:, place] = other
        assert (editor(editor.embedding[changed]) - logits).abs().max() > 1e-3
    ids = [codec.no_image, codec.no_word, *codec.encode_text("make red green")]
    assert sorted(ids) == list(range(9, 14)) and codec.vocabulary == 14


def test_the_model_reads_the_closed_sum_with_the_prompt_absent():
    editor = small_editor(variant="history")
    pairs, inputs = small_pairs(editor.codec), []
    editor.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    _, trace = image.edit(editor, pairs.source, pairs.instruction, "two-phase")
    prompt = torch.cat([pairs.instruction, pairs.source + 4], 1)
    for t, read in enumerate(inputs):
        states = torch.nn.functional.pad(trace[: t + 1], (19, 0), value=ABSENT)
        states[-1, :, :19] = prompt
        expected = history_embedding(states, editor.embedding, 0.9, True)
        assert torch.allclose(read, expected, atol=1e-5)
    assert len(inputs) > 4


def test_revision_states_hold_source_mask_or_target():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(1, 5, (2, 4000, 16), generator=generator)
    target = torch.where(torch.rand(target.shape, generator=generator) < 0.7, source, target)
    states, turn = image.revision_states(source, target, generator)
    region = source != target
    assert states.shape == (7, 4000, 16) and turn.min() == 0 and turn.max() == 5
    right, masked, wrong = states == target, states == image.MASK, (states == source) & region
    assert (right | masked | wrong).all() and right[6].all()
    assert not (right[:-1] & ~right[1:] & region).any()  # wrong, M, right: no way back
    assert not (masked[:-1] & wrong[1:]).any()
    now = states[turn, torch.arange(4000)]
    untouched = (now == source).all(-1)  # the state in which editing starts
    mixed = (masked[0] & region).any(-1) & wrong[0].any(-1)  # the start by the paper's law
    outside = ((now == image.MASK) & ~region).any(-1)
    shares = [rows.float().mean() for rows in (untouched, mixed, outside)]
    assert all(low < x < high for low, x, high in zip((0.3, 0.03, 0.03), shares, (0.5, 0.2, 0.3)))


@pytest.mark.parametrize("variant", image.VARIANTS)
def test_batches_of_every_variant(variant):
    codec, generator = small_editor().codec, torch.Generator().manual_seed(0)
    told = codec.no_word + 3
    pool = small_pairs(codec, 50)
    pool = pool._replace(caption=torch.full_like(pool.caption, told))
    states, clean, editable = image.sample_batch(600, generator, pool, variant)
    words, shown, now = states[-1].split([3, 16, 16], -1)
    assert (states[:-1, :, : codec.prompt] == ABSENT).all()
    assert (len(states) > 1) == (variant in ("rm", "history"))
    assert torch.equal(states[-1, :, : codec.prompt], clean[:, : codec.prompt])
    assert not editable[:, : codec.prompt].any()
    empty = (shown == codec.no_image).all(-1)
    if variant == "base":  # a tenth are edits, a tenth of everything is hidden
        captioned = (words == told).all(-1)
        assert 0.75 < captioned.float().mean() < 0.87 and empty[captioned].all()
        assert 0.87 < empty.float().mean() < 0.95
    else:  # the two words as they are, from the first slot or from the second
        make, red, none = codec.encode_text("make red")
        assert not empty.any()
        assert {tuple(row) for row in words.tolist()} == {(make, red, none), (none, make, red)}
        assert 0.4 < (words[:, 0] == make).float().mean() < 0.6
    sources = (pool.source + 4).tolist()
    rows = {(*target, *source) for source, target in zip(sources, pool.target.tolist())}
    seen = torch.cat([clean[:, codec.prompt :], shown], 1)[~empty].tolist()
    assert {tuple(row) for row in seen} <= rows
    if variant in ("base", "sft"):  # plain mask diffusion: the loss is at the masks
        assert torch.equal(editable[:, codec.prompt :], now == image.MASK)
    else:
        assert editable[:, codec.prompt :].all()


# --- decoding


def test_pixels_that_were_never_masked_equal_the_source():
    for variant, name in itertools.product(("rm", "history"), ("two-phase", "loop")):
        editor = small_editor(variant=variant)
        pairs = small_pairs(editor.codec, 40)
        trace = image.edit(editor, pairs.source, pairs.instruction, name)[1]
        masked = (trace == image.MASK).any(0)
        assert torch.equal(trace[-1][~masked], pairs.source[~masked])
        assert ((trace[-1] >= 1) & (trace[-1] <= 4)).all()
        assert torch.equal(trace[0], pairs.source)
        assert (trace[-1] != pairs.source).any() and not masked.all()  # something, not everything


def test_rows_do_not_depend_on_their_batch():
    rows = []
    for variant in ("rm", "history"):
        editor = small_editor(1, variant)
        pairs = small_pairs(editor.codec, 12)
        turns, trace = image.edit(editor, pairs.source, pairs.instruction, "two-phase")
        for i in range(12):
            row = (pairs.source[i : i + 1], pairs.instruction[i : i + 1])
            alone = image.edit(editor, *row, "two-phase")
            assert torch.equal(alone[1][-1, 0], trace[-1, i]) and alone[0][0] == turns[i]
            assert len(alone[1]) == turns[i] + 1
        rows += turns
    assert len(set(rows)) > 1


def test_two_phases_follow_the_schedule():
    """A denoiser that doubts 10 of 12 pixels, 7 at first and 3 one turn later, and reveals 2."""
    start = torch.full((1, 12), 3)
    start[0, 10:] = 2

    def decode(start, *settings):
        turns = itertools.count()

        def denoiser(_):
            logits = torch.zeros(1, 12, 4)
            logits[..., 0] = -5.0
            logits[0, : 7 if next(turns) == 0 else 10, 0] = 5.0
            logits[..., 1] = 1.0
            logits[..., 2] = torch.arange(12) / 10 + 2  # more confident from left to right
            return logits

        history = image.HistoryReference(torch.randn(4, 8), 0.0, False)
        trace = image.two_phase(denoiser, start, history, *settings)
        return trace, (trace == image.MASK).sum(-1).flatten().tolist()

    trace, masks = decode(start)
    expected = [0, 7, 10]
    for step in range(1, 9):
        left = math.floor(10 * math.cos(math.pi / 2 * step / 8))
        expected.append(min(left, expected[-1] - 1))
    assert masks == expected and masks[-1] == 0
    assert (trace[3, 0] != image.MASK).nonzero().flatten().tolist() == [9, 10, 11]  # the surest
    assert trace[-1, 0].tolist() == [2] * 12
    assert decode(torch.zeros_like(start), 0, 4)[1] == [12, 11, 8, 4, 0]
    assert decode(start, 1, 2)[1] == [0, 7, 4, 0]  # the mask phase is cut off


# --- metrics


def ssim_by_hand(a, b):
    """Window by window, in plain numpy, as the paper of 2004 has it."""
    result = np.zeros(a.shape)
    for y, x, channel in np.ndindex(*a.shape):
        cut = (slice(max(0, y - 3), y + 4), slice(max(0, x - 3), x + 4), channel)
        p, q = a[cut].ravel(), b[cut].ravel()
        m, n = p.mean(), q.mean()
        covariance = ((p - m) * (q - n)).mean()
        luminance = (2 * m * n + 6.5025) / (m**2 + n**2 + 6.5025)
        structure = (2 * covariance + 58.5225) / (p.var() + q.var() + 58.5225)
        result[y, x, channel] = luminance * structure
    return result.mean(-1)


def test_ssim_agrees_with_windows_by_hand():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 12, 9, 3)).astype(float)
    b = np.clip(a + rng.normal(0, 40, a.shape), 0, 255)
    got = image.structural_similarity(torch.tensor(a), torch.tensor(b))
    expected = np.stack([ssim_by_hand(*both) for both in zip(a, b)])
    assert np.abs(got.numpy() - expected).max() < 1e-9 and got.mean() < 0.95


def test_metrics_of_hand_made_images():
    source = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    target = source.clone()
    target[0, :2, :4] = 100  # the region: 8 of 64 pixels
    half, one = target.clone(), target.clone()
    half[0, 1] = 0
    one[0, 7, 7, 0] = 255  # a channel of one pixel of the 56 outside
    composite = one.clone()
    composite[0, :2, :4] = 0  # only what is outside the region counts
    ssim = ssim_by_hand(composite[0].double().numpy(), source[0].double().numpy())
    outside = (ssim.sum() - ssim[:2, :4].sum()) / 56
    for edited, expected in (  # precision, coverage, MAE, PSNR, SSIM
        (target, (1, 1, 0, math.inf, 1)),
        ((target > 0).byte() * 50, (1, 1, 0, math.inf, 1)),  # another colour
        (half, (1, 0.5, 0, math.inf, 1)),
        (source, (math.nan, 0, 0, math.inf, 1)),
        (one, (8 / 9, 1, 255 / 168, 10 * math.log10(168), outside)),
    ):
        found = [value.item() for value in image.measure(edited, source, target).values()]
        assert found == pytest.approx(expected, nan_ok=True)
    whole = image.measure(target, source, torch.full_like(source, 7))
    assert all(whole[name].isnan() for name in ("mae", "psnr", "ssim"))


def test_evaluation_counts_exact_edits_by_label():
    editor = small_editor()
    pairs = small_pairs(editor.codec, 8)
    edited = image.edit(editor, pairs.source, pairs.instruction, "two-phase")[1][-1]
    pairs = pairs._replace(
        target=torch.where(torch.arange(8).unsqueeze(1) < 3, edited, pairs.source),
        labels=[("make", "old")] * 2 + [("make", "new")] * 3 + [("do", "new")] * 3,
    )
    record = image.evaluate(editor, pairs, "two-phase", chunk=3)
    assert record["right"] == "11100000" and record["exact"] == 3 / 8
    shares = {label: (row["n"], row["exact"]) for label, row in record["groups"].items()}
    assert shares == {"make": (5, 3 / 5), "do": (3, 0), "old": (2, 1), "new": (6, 1 / 6)}
    metrics = image.measure(*map(editor.codec.decode_image, (edited, pairs.source, pairs.target)))
    assert record["mae"] == metrics["mae"].mean()
    assert record["psnr"] in metrics["psnr"].sort().values[3:5].tolist()  # the median
    record = image.evaluate(editor, pairs._replace(target=edited), "two-phase")
    assert record["psnr"] == "inf" and json.dumps(record, allow_nan=False)


# --- the command line


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["edit_image.py", *map(str, arguments)])
    image.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a training of every variant on pairs of 8x8, and its arguments.

    From here on the networks are tiny: Muon on full ones takes a second a step.
    """
    folder = tmp_path_factory.mktemp("trained")
    rng, pairs = np.random.default_rng(0), []
    for i in range(6):
        source, target = (rng.integers(0, 2, (8, 8, 1)) * np.array([[[200, 0, 0]]]) for _ in "ab")
        pairs.append((("make it red", "turn it black")[i % 2], source, target))
    data = write_pairs(folder / "pairs", pairs)
    arguments = ["--pairs", data, "--test", data, "--steps", 2]
    tiny = partial(rm.TransformerConfig, width=32, layers=1, feed_forward=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "TransformerConfig", tiny)
        out = ("--out", folder / "out", "--json", folder / "result.json")
        run(patch, *arguments, "--history", *out)
        yield folder, arguments


def test_training_writes_table_gallery_and_checkpoints(trained, monkeypatch, capsys):
    folder, arguments = trained
    result = json.loads((folder / "result.json").read_text())
    assert {row["n"] for row in result["rows"].values()} == {6}
    steps = {name: record["settings"]["steps"] for name, record in result["training"].items()}
    assert steps == {"base": 1, "sft": 2, "rm": 2, "history": 2}
    assert {"sft, regenerate", "rm, two-phase", "history, loop"} < set(result["rows"])
    assert Image.open(folder / "out/gallery.png").size[0] > 600
    again = [*arguments, "--out", folder / "out"]
    run(monkeypatch, *again)  # what is there is not trained again
    printed = capsys.readouterr().out
    assert "rm.json is there: done" in printed and "left" not in printed
    for other in ("--seed", 1), ("--base-steps", 2):  # not silently another base
        with pytest.raises(image.InputError, match="base.json was made with.*'(seed|steps)'"):
            run(monkeypatch, *again, *other)


def test_other_data_of_the_same_name_is_not_done(trained, monkeypatch):
    folder, arguments = trained
    red, blue, black = flat(200, 0, 0), flat(0, 0, 200), flat(0, 0, 0)
    for name, after in (("colour", blue), ("pictures", red)):  # another palette; the same one
        pairs = [("make it red", black, after)] * 5 + [("turn it black", red, black)]
        data = write_pairs(folder / name / "pairs", pairs)
        other = ["--pairs", data, "--test", data, *arguments[4:], "--out", folder / "out"]
        with pytest.raises(image.InputError, match="base.json was made with.*data"):
            run(monkeypatch, *other)


def test_a_stopped_training_goes_on_to_the_same_model(trained, monkeypatch):
    folder, arguments = trained
    show = rm.Run.show

    def stop(training, step, *rest, **scores):
        show(training, step, *rest, **scores)
        if training.path.name == "rm" and step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(rm.Run, "show", stop)
    stopped = [*arguments, "--out", folder / "stopped"]
    with pytest.raises(image.InputError, match="stopped after step 1.*goes on"):
        run(monkeypatch, *stopped)
    assert (folder / "stopped/rm.resume.pt").exists()
    run(monkeypatch, *stopped)
    networks = [image.load_editor(folder / f"{name}/rm.pt", "cpu") for name in ("out", "stopped")]
    assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in networks)))
    assert not list((folder / "stopped").glob("*.resume.pt"))


def test_a_file_is_edited_and_keeps_its_transparency(trained, monkeypatch, tmp_path):
    folder, _ = trained
    source = np.asarray(Image.open(folder / "pairs/0_source.png").convert("RGBA")).copy()
    source[:4, :, 3] = 250  # nearly opaque: the same tokens
    Image.fromarray(source).save(tmp_path / "in.png")
    for variant in ("rm", "sft"):
        out = tmp_path / f"new/{variant}.png"
        run(monkeypatch, "--checkpoint", folder / f"out/{variant}.pt", "--image",
            tmp_path / "in.png", "--instruction", "Make it black!", "--out", out,
            "--json", tmp_path / "out.json")  # fmt: skip
        edited = np.asarray(Image.open(out))
        record = json.loads((tmp_path / "out.json").read_text())
        same = (edited == source).all(-1)
        assert edited.shape == (8, 8, 4) and (edited[~same, 3] == 255).all()
        assert (~same).sum() <= record["changed_pixels"] <= record["remasked_pixels"]
        assert Image.open(out.with_name(f"{variant}_turns.png")).size[0] > 300
        assert same[:4].any() if variant == "rm" else record["remasked_pixels"] == 64


def test_a_checkpoint_is_scored_and_the_shipped_one_edits_as_published(trained, monkeypatch):
    folder, _ = trained
    out = folder / "scored.json"
    run(monkeypatch, "--checkpoint", folder / "out/history.pt", "--evaluate", "--test",
        folder / "pairs", "--decode", "loop", "--json", out)  # fmt: skip
    record = json.loads(out.read_text())
    assert (record["n"], record["decoding"]) == (6, "loop") and 1 <= record["mean_turns"] <= 16

    monkeypatch.setattr(image, "TransformerConfig", rm.TransformerConfig)
    run(monkeypatch, "--image", ROOT / "results/image_scene.png", "--instruction",
        "draw a small orange car at the back right", "--out", folder / "o.png",
        "--json", out)  # fmt: skip
    assert json.loads(out.read_text()) == {
        "turns": 9, "remasked_pixels": 10, "changed_pixels": 10
    }  # fmt: skip


def test_bad_input_is_one_line(trained, monkeypatch, tmp_path, capsys):
    folder, _ = trained
    good = folder / "pairs/0_source.png"
    Image.fromarray(flat(0, 0, 0, size=9)).save(tmp_path / "wide.png")
    checkpoint = ["--checkpoint", folder / "out/rm.pt"]
    edits = [*checkpoint, "--out", tmp_path / "o.png", "--image"]
    asks = [*edits, good, "--instruction"]
    sft = ["--checkpoint", folder / "out/sft.pt", "--evaluate", "--test", folder / "pairs"]
    for words, message in (
        ([*edits, tmp_path / "wide.png", "--instruction", "make it red"], "9x9 pixels.*be 8x8"),
        ([*asks, "make it purple"], "purple"),
        ([*asks, "make it red red red red"], "6 words"),
        ([*asks, " "], "0 words"),
        ([*checkpoint, "--evaluate", "--n", 1], "other pictures than our scenes"),
        ([*checkpoint, "--evaluate", "--test", tmp_path], "pairs.jsonl cannot be read"),
        (["--pairs", folder / "pairs"], "other pictures than our scenes"),
        (["--checkpoint", tmp_path / "none.pt", "--evaluate"], "none.pt"),
        ([*sft, "--decode", "loop"], "regenerates"),
    ):
        with pytest.raises(image.InputError, match=message) as caught:
            run(monkeypatch, *words)
        assert "\n" not in str(caught.value)
    for words in (
        ["--image", good, "--instruction", "make it red"], ["--image", good, "--out", "o.png"],
        ["--instruction", "make it red"], ["--decode", "loop"], ["--evaluate", "--decode", "best"],
        ["--evaluate", "--steps", 3], ["--evaluate", "--pairs", folder / "pairs"],
        ["--evaluate", "--out", tmp_path], [*asks, "make it red", "--evaluate"],
        ["--smoke", "--steps", 0], [*asks, "make it red", "--seed", 1],
        ["--evaluate", "--test", folder / "pairs", "--seed", 1],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, *words)
        assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1, words


def test_utf8_whatever_the_locale(tmp_path):
    """From a shell whose locale is ASCII, a word in UTF-8 is read, and the error names it."""
    data = write_pairs(tmp_path / "a", [("", flat(0, 0, 0, size=16), flat(200, 0, 0, size=16))])
    line = (data / "pairs.jsonl").read_text().replace('""', '"mach es gr\u00fcn"')
    (data / "pairs.jsonl").write_text(line, encoding="utf-8")
    command = [sys.executable, ROOT / "edit_image.py", "--evaluate", "--test", data]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "the word 'mach'" in done.stderr and "gr\\xfcn" in done.stderr


def test_smoke(trained, monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--smoke", "--out", tmp_path)
    assert (tmp_path / "gallery.png").exists() and "exact" in capsys.readouterr().out
    rows = list(json.loads((tmp_path / "table.json").read_text())["rows"])
    assert rows == ["base, regenerate", "sft, regenerate", "rm, two-phase", "rm, loop"]
