"""Image editing: scenes, words, metrics and decoding against plain Python; the script's command lines end to end."""

import json
import math
import re
import subprocess
import sys
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
    """RGB rows of a scene, pixel by pixel from the front: the first thing that covers a pixel shows."""
    in_front = [(depth, column) for depth in ("front", "back", "top") for column in ("right", "middle", "left")]
    things = sorted(scene.things, key=lambda thing: in_front.index((thing.depth, thing.column)))
    empty = image.background(scene.sky, scene.ground)
    rows = []
    for y in range(16):
        row = []
        for x in range(16):
            colour = image.PALETTE[empty[16 * y + x]]
            for thing in things:
                art = image.SPRITES[thing.kind][["big", "small"].index(thing.size)].split("/")
                bottom = {"top": 5, "back": 10, "front": 14}[thing.depth]
                left = {"left": 3, "middle": 8, "right": 12}[thing.column] - (len(art[0]) - 1) // 2
                r, c = y - bottom + len(art) - 1, x - left
                if 0 <= r < len(art) and 0 <= c < len(art[0]) and art[r][c] != ".":
                    light, dark = image.COLOURS[thing.colour]
                    colour = {"A": light, "a": dark, **image.FIXED}[art[r][c]]
                    break
            row.append(tuple(colour))
        rows.append(row)
    return rows


def test_regions_are_the_difference_of_the_images():
    assert len(set(image.PALETTE)) == len(image.PALETTE)  # equal token, equal colour
    pairs, codec = image.scene_pairs(40, seed=5)
    pictures = [codec.decode_image(tokens).tolist() for tokens in (pairs.source, pairs.target)]
    for i, edit in enumerate(TRAIN[:40]):
        source, target = paint_by_hand(edit.source), paint_by_hand(edit.target)
        for mine, theirs in ((source, pictures[0][i]), (target, pictures[1][i])):
            assert [[tuple(pixel) for pixel in row] for row in theirs] == mine
        region = [source[y][x] != target[y][x] for y in range(16) for x in range(16)]
        assert (pairs.source[i] != pairs.target[i]).tolist() == region and any(region)
        touched = {int(cell) for thing in (edit.old, edit.new) if thing for cell in image.stamp(thing)[0]}
        assert {cell for cell in range(256) if region[cell]} <= touched


def test_scenes_vary_and_overlap():
    assert len(image.SPRITES) >= 10 and all(len({*"".join(art)} - {".", "/"}) >= 1 for art in image.SPRITES.values())
    used = {thing for edit in TRAIN for thing in edit.source.things}
    for values, attribute in (
        (image.SPRITES, "kind"), (image.COLOURS, "colour"), (("big", "small"), "size"), (image.CENTRE, "column")
    ):
        assert {getattr(thing, attribute) for thing in used} == set(values)
    overlaps = 0  # something hides a part of something else
    for edit in TRAIN:
        shown = (image.render(edit.source)[1] >= 0).sum()
        overlaps += sum(len(image.stamp(thing)[0]) for thing in edit.source.things) > shown
    assert 0.1 < overlaps / len(TRAIN) < 0.9
    for sky in image.SKIES:
        for ground in image.GROUNDS:
            picture = image.background(sky, ground).reshape(16, 16)
            assert len(set(picture[:9].ravel())) == 2 and len(set(picture[9:].ravel())) == 2  # texture in both halves
    assert image.random_edits(5, seed=9) == image.random_edits(5, seed=9) != image.random_edits(5, seed=10)


KIND, COLOUR, SIZE = ("|".join(words) for words in (image.SPRITES, image.COLOURS, ("big", "small")))
PLACE = r"(top|back|front) (left|middle|right)"


def understand(text, scene):
    """What an instruction asks for, by key words alone: (verb, the things afterwards)."""
    new = re.search(rf"\ba ({SIZE}) ({COLOUR}) ({KIND})", text)
    rest = text.replace(new.group(), "NEW") if new else text
    named = re.search(rf"\bthe (?:({SIZE}) |({COLOUR}) )?({KIND})\b", rest)
    places = [(m.group(1) == "to", m.group(2), m.group(3)) for m in re.finditer(rf"\b(at|to) the {PLACE}", rest)]
    if not named:  # nothing of the scene is named
        size, colour, kind = new.groups()
        assert len(places) == 1
        return "add", [*scene.things, image.Thing(kind, size, colour, *places[0][1:])]
    size, colour, kind = named.groups()
    around = rest[: named.start()] + rest[named.end() :]
    colours = re.findall(rf"\b({COLOUR})\b", around)
    if new:
        verb = "replace"
    elif re.search(r"\b(remove|delete|away|erase|drop|disappear|picture|no more)\b|should go$", rest):
        verb = "remove"
    elif colours:
        verb, new_colour = "recolour", colours[0]
    else:
        verb = "move"
        goal = next((place for place in places if place[0]), places[-1])
        places.remove(goal)
    fits = [
        thing for thing in scene.things
        if thing.kind == kind and colour in (None, thing.colour) and size in (None, thing.size)
        and (not places or (thing.depth, thing.column) == places[0][1:])
    ]
    assert len(fits) == 1, f"{text!r} names {len(fits)} things"
    thing = fits[0]
    after = [other for other in scene.things if other != thing]
    if verb == "replace":
        size, colour, kind = new.groups()
        after.append(thing._replace(kind=kind, size=size, colour=colour))
    elif verb == "recolour":
        after.append(thing._replace(colour=new_colour))
    elif verb == "move":
        after.append(thing._replace(depth=goal[1], column=goal[2]))
    return verb, after


def test_instructions_parse_back_to_the_edit():
    for edit in TRAIN + TEST:
        verb, things = understand(edit.instruction, edit.source)
        assert (verb, sorted(things)) == (edit.verb, sorted(edit.target.things)), edit.instruction
        assert (edit.target.sky, edit.target.ground) == (edit.source.sky, edit.source.ground)
    assert {edit.verb for edit in TEST} == set(image.VERBS)


def test_training_leaves_words_out_of_instructions_but_never_a_name():
    rng = image.random.Random(0)
    words, kept = 0, 0
    for edit in TRAIN[:500]:
        full, short = edit.instruction.split(), image.leave_words_out(edit.instruction, rng).split()
        rest = iter(full)
        assert all(word in rest for word in short)  # the same words in the same order
        things = [thing for thing in (edit.old, edit.new) if thing]
        named = [word for word in full if any(word in (*thing, "big", "small") for thing in things)]
        assert [word for word in short if word in named] == named and named
        words, kept = words + len(full) - len(named), kept + len(short) - len(named)
    assert abs(kept / words - 0.85) < 0.03

    def said(pairs, codec):
        first = 3 + 2 * len(codec.palette)
        return [" ".join(codec.words[i - first] for i in row if i >= first) for row in pairs.instruction.tolist()]

    train, test = image.scene_pairs(50, seed=1), image.scene_pairs(20, seed=1, test=True)
    assert said(*train) != train[0].texts and said(*test) == test[0].texts


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
        return {(thing.kind, thing.colour, thing.depth, thing.column) for thing in things}

    trained = triples(thing for edit in TRAIN for thing in edit.source.things + edit.target.things)
    focus = triples(edit.new or edit.old for edit in TEST)
    assert not trained & focus
    everything = [
        image.Thing(kind, "big", colour, depth, column)
        for kind in image.SPRITES for colour in image.COLOURS for depth in image.BOTTOM for column in image.CENTRE
        if (kind in image.IN_THE_SKY) == (depth == "top")
    ]
    kept = [thing for thing in everything if not image.is_held_out(thing)]
    assert 0.08 < 1 - len(kept) / len(everything) < 0.12
    for pair in (lambda t: (t.kind, t.colour), lambda t: (t.kind, t.place), lambda t: (t.colour, t.place)):
        assert {pair(thing) for thing in kept} == {pair(thing) for thing in everything}
    assert image.phrasings("go/come to {it}") == ["go to {it}", "come to {it}"] and image.phrasings("{it}") == ["{it}"]
    # Phrasings: nothing of the test templates is trained on, and no test word is new.
    for verb, (train, test) in image.PHRASES.items():
        assert not set(train) & set(test) and {edit.unseen_phrase for edit in TRAIN} == {False}
        patterns = [re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(t)) + "$") for t in train]
        unseen = [edit for edit in TEST if edit.verb == verb and edit.unseen_phrase]
        assert unseen and any(not any(p.match(edit.instruction) for p in patterns) for edit in unseen)
    known = set(image.scene_words())
    assert all(set(edit.instruction.split()) <= known for edit in TEST)
    assert 0.4 < sum(edit.unseen_phrase for edit in TEST) / len(TEST) < 0.6


def test_source_and_instruction_determine_the_target():
    outcome = {}
    for edit in TRAIN + TEST:
        source, target = (image.render(scene)[0].tobytes() for scene in (edit.source, edit.target))
        assert outcome.setdefault((source, edit.instruction), target) == target
    # Whatever neighbour stands before a thing, what shows of it (at least VISIBLE) is enough to know the rest.
    shapes = [(kind, size) for kind in image.SPRITES for size in ("big", "small")]
    places = [(depth, column) for depth in image.BOTTOM for column in image.CENTRE]

    def fitting(depth):
        return [shape for shape in shapes if (shape[0] in image.IN_THE_SKY) == (depth == "top")]

    for place in places:
        stamps = [
            image.stamp(image.Thing(*shape, colour, *place)) for shape in fitting(place[0]) for colour in image.COLOURS
        ]
        pictures = np.full((len(stamps), 256), -1)
        for picture, (cells, colours) in zip(pictures, stamps):
            picture[cells] = colours
        size = (pictures >= 0).sum(1)
        for other in places:
            first, second = (image.draw_order(image.Thing("", "", "", *where)) for where in (place, other))
            if second <= first or abs(image.BOTTOM[other[0]] - image.BOTTOM[place[0]]) > 7:
                continue
            for shape in fitting(other[0]):
                shown = pictures.copy()
                shown[:, image.stamp(image.Thing(*shape, "red", *other))[0]] = -1
                shown = shown[(shown >= 0).sum(1) >= image.VISIBLE * size]
                assert len(np.unique(shown, axis=0)) == len(shown), (place, other, shape)


# --- pairs from a folder


def write_pairs(folder, pairs, names=("source", "target")):
    folder.mkdir()
    lines = []
    for i, (text, *pictures) in enumerate(pairs):
        files = {name: f"{i}_{name}.png" for name in names}
        for name, picture in zip(names, pictures):
            Image.fromarray(np.array(picture, np.uint8)).save(folder / files[name])
        lines.append(json.dumps({"instruction": text, **files}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flat(*rgb, size=8):
    return np.full((size, size, 3), rgb, np.uint8)


def test_palette_and_words_come_from_the_folder(tmp_path):
    folder = write_pairs(tmp_path / "a", [
        ("Make it red.", flat(0, 0, 0), flat(200, 0, 0)),
        ("make it black", flat(200, 0, 0), flat(0, 0, 0)),
        ("do nothing", flat(0, 0, 0), flat(0, 0, 0)),
    ])
    pairs, codec, same = image.read_pairs(folder)
    assert codec.palette == [[0, 0, 0], [200, 0, 0]] and same == 1 and len(pairs.source) == 2
    assert codec.words == ["black", "do", "it", "make", "nothing", "red"] and pairs.verbs == ["make", "make"]
    assert (pairs.source[0] == 1).all() and (pairs.target[0] == 2).all()
    assert (codec.decode_image(pairs.target)[0].numpy() == flat(200, 0, 0)).all()
    picture = flat(0, 0, 0)
    picture[0, 0], picture[0, 1] = (90, 30, 0), (110, 30, 0)  # nearer to black, nearer to red
    assert codec.encode_image(picture)[:3].tolist() == [1, 2, 1]
    with pytest.raises(image.InputError, match="purple"):
        codec.encode_text("make it purple")
    with pytest.raises(image.InputError, match="no pair of images differs"):
        image.read_pairs(folder, colours=1)  # with one colour there is nothing to see


def test_faulty_folders_are_named(tmp_path):
    good = ("make it red", flat(0, 0, 0), flat(200, 0, 0))
    with pytest.raises(image.InputError, match="pairs.jsonl cannot be read"):
        image.read_pairs(tmp_path)
    for name, content, message in (
        ("empty", "", "has no pairs"), ("text", "hello\n", "line 1 must be JSON"),
        ("keys", '{"instruction": "x", "source": "a.png"}\n', "line 1 must be JSON"),
        ("number", '{"instruction": "x", "source": 5, "target": "b.png"}\n', "line 1 must be JSON"),
        ("verb", '{"instruction": 5, "source": "a.png", "target": "b.png", "verb": "x"}\n', "line 1 must be JSON"),
        ("lost", '{"instruction": "x", "source": "a.png", "target": "b.png"}\n', "a.png cannot be read"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.jsonl").write_text(content)
        with pytest.raises(image.InputError, match=message):
            image.read_pairs(tmp_path / name)
    mixed = write_pairs(tmp_path / "mixed", [good, ("make it red", flat(0, 0, 0, size=9), flat(9, 0, 0, size=9))])
    with pytest.raises(image.InputError, match="line 2: 1_source.png is 9x9 pixels, expected 8x8"):
        image.read_pairs(mixed)
    train = image.read_pairs(write_pairs(tmp_path / "train", [good]))[1]
    assert image.read_pairs(write_pairs(tmp_path / "comma", [("one,two,three,four", *good[1:])]))[1].length == 6
    other = write_pairs(tmp_path / "other", [("make it blue", flat(0, 0, 0), flat(200, 0, 0))])
    with pytest.raises(image.InputError, match="blue"):
        image.read_pairs(other, train)


# --- network and training states


def small_editor(seed=0):
    """An untrained editor of 4x4 images whose decisions vary: its weights are far from 0."""
    codec = image.Codec([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], ["make", "red", "green"], 3, 4, 4)
    torch.manual_seed(seed)
    editor = image.Editor(codec).eval()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        editor.network.head.weight[image.MASK] *= 1.5
    return editor


def small_pairs(codec, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randint(1, 1 + len(codec.palette), (2, n, codec.pixels), generator=generator)
    words = torch.tensor([codec.encode_text("make red")] * n)
    return image.Pairs(source, target, words, words, ["make red"] * n, ["make"] * n)


def test_only_the_palette_and_mask_can_be_chosen_and_the_source_is_read():
    editor = small_editor()
    codec, pairs = editor.codec, small_pairs(editor.codec)
    tokens = torch.cat([pairs.instruction, pairs.source + 4, pairs.target], 1)
    logits = editor(editor.embedding[tokens])
    assert logits.shape == (6, 3 + 16 + 16, codec.vocabulary) and (logits[..., 5:] == -1e4).all()
    assert (logits[:, : codec.prompt] == -1e4).all() and (logits[:, codec.prompt :, :5] > -1e3).all()
    for place in (0, 3):  # a word, a pixel of the source
        changed = tokens.clone()
        changed[:, place] = codec.no_word if place == 0 else codec.no_image
        assert (editor(editor.embedding[changed]) - logits).abs().max() > 1e-3
    ids = [codec.no_image, codec.no_word, *codec.encode_text("make red green")]
    assert sorted(ids) == list(range(9, 14)) and codec.vocabulary == 14


def test_prompt_history_is_the_closed_sum_with_the_prompt_absent():
    embedding = torch.randn(11, 8)
    states = torch.randint(11, (5, 2, 6))
    states[:, :, :2] = states[-1, :, :2]
    history = image.PromptHistory(embedding, 0.8, True, prompt=2)
    for t in range(5):
        seen = states[: t + 1].clone()
        seen[:-1, :, :2] = ABSENT
        assert torch.allclose(history.push(states[t]), history_embedding(seen, embedding, 0.8, True), atol=1e-5)


def test_revision_states_hold_source_mask_or_target():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(1, 5, (2, 4000, 16), generator=generator)
    target = torch.where(torch.rand(target.shape, generator=generator) < 0.7, source, target)
    states, turn = image.revision_states(source, target, generator)
    region = source != target
    assert states.shape == (7, 4000, 16) and turn.min() == 0 and turn.max() == 5
    right, masked, wrong = states == target, states == image.MASK, (states == source) & region
    assert (right | masked | wrong).all() and right[6].all()
    assert not (right[:-1] & ~right[1:] & region).any() and not (masked[:-1] & wrong[1:]).any()  # wrong, M, right
    now = states[turn, torch.arange(4000)]
    untouched = (now == source).all(-1)  # the state in which editing starts
    assert 0.3 < untouched.float().mean() < 0.5
    first = states[0]  # of the paper's law: at the start some of the edit is wrong, some masked
    mixed = ((first == image.MASK) & region).any(-1) & ((first == source) & region).any(-1)
    assert 0.03 < mixed.float().mean() < 0.2
    outside = (now == image.MASK) & ~region
    assert 0.03 < outside.any(-1).float().mean() < 0.3


@pytest.mark.parametrize("method", image.METHODS)
def test_batches_of_every_method(method):
    codec, generator = small_editor().codec, torch.Generator().manual_seed(0)
    pool = small_pairs(codec, 50)
    pool.caption = torch.full_like(pool.caption, codec.no_word + 3)
    states, clean, editable = image.sample_batch(600, generator, pool, codec, method, dropout=0.1)
    words, shown, now = states[-1].split([3, 16, 16], -1)
    assert (states[:-1, :, : codec.prompt] == ABSENT).all() and (len(states) > 1) == (method == "history")
    assert torch.equal(states[-1, :, : codec.prompt], clean[:, : codec.prompt])
    assert not editable[:, : codec.prompt].any()
    empty, told = (shown == codec.no_image).all(-1), (words != codec.no_word).any(-1)
    if method == "base":
        captioned = (words == codec.no_word + 3).all(-1)
        assert 0.7 < captioned.float().mean() < 0.9 and empty[captioned].all() and 0.8 < empty.float().mean() < 0.97
    else:
        assert 0.05 < empty.float().mean() < 0.16 and 0.84 < told.float().mean() < 0.95
        moved = words[told].tolist()  # the two words as they are, from the first slot or from the second
        make, red, _ = codec.encode_text("make red")
        assert sorted(map(list, set(map(tuple, moved)))) == sorted([[make, red, codec.no_word], [codec.no_word, make, red]])
        assert 0.4 < sum(row[0] == make for row in moved) / len(moved) < 0.6
    rows = {tuple(target) + tuple(source) for source, target in zip((pool.source + 4).tolist(), pool.target.tolist())}
    seen = torch.cat([clean[:, codec.prompt :], shown], 1)[~empty].tolist()
    assert {tuple(row) for row in seen} <= rows
    if method in ("base", "sft"):  # plain mask diffusion: the loss is at the masks
        assert torch.equal(editable[:, codec.prompt :], now == image.MASK)
    else:
        assert editable[:, codec.prompt :].all()


# --- decoding


def test_pixels_outside_the_predicted_mask_equal_the_source():
    editor = small_editor()
    pairs, some = small_pairs(editor.codec, 40), 0
    for gamma, name in ((0.0, "two-phase"), (0.0, "loop"), (0.9, "two-phase"), (0.9, "loop")):
        result = image.edit(editor, pairs.source, pairs.instruction, gamma, bool(gamma), image.Decoding(name))
        assert torch.equal(result.tokens[~result.masked], pairs.source[~result.masked])
        assert ((result.tokens >= 1) & (result.tokens <= 4)).all()
        assert torch.equal(result.trace[0], pairs.source) and torch.equal(result.trace[-1], result.tokens)
        some += bool((result.tokens != pairs.source).any() and not result.masked.all())
    assert some == 4  # it did change something, and not everything


def test_rows_do_not_depend_on_their_batch():
    editor, rows = small_editor(1), []
    pairs = small_pairs(editor.codec, 12)
    for gamma in (0.0, 0.9):
        together = image.edit(editor, pairs.source, pairs.instruction, gamma, True)
        for i in range(12):
            alone = image.edit(editor, pairs.source[i : i + 1], pairs.instruction[i : i + 1], gamma, True)
            assert torch.equal(alone.tokens[0], together.tokens[i]) and alone.turns[0] == together.turns[i]
        rows += together.turns
    assert len(set(rows)) > 1


def test_two_phases_follow_the_schedule():
    """A denoiser that doubts 10 of 12 pixels, 7 at first and 3 one turn later, and knows what to reveal."""
    turns = []

    def denoiser(inputs):
        turn = len(turns)
        turns.append(turn)
        logits = torch.zeros(1, 12, 4)
        logits[..., 1] = 1.0
        logits[..., 0] = -5.0
        logits[0, : 7 if turn == 0 else 10, 0] = 5.0
        logits[..., 2] = torch.arange(12) / 10 + 2  # the confidence of the reveal grows with the position
        return logits

    start = torch.full((1, 12), 3)
    start[0, 10:] = 2
    history = image.HistoryReference(torch.randn(4, 8), 0.0, False)
    trace = image.two_phase(denoiser, start, torch.ones_like(start, dtype=torch.bool), history, image.Decoding())
    masks = (trace == image.MASK).sum(-1).flatten().tolist()
    left = [math.floor(10 * math.cos(math.pi / 2 * step / 8)) for step in range(1, 9)]
    expected = [0, 7, 10]
    for count in left:
        expected.append(min(count, expected[-1] - 1))
    assert masks == expected and masks[-1] == 0
    assert (trace[3, 0] == image.MASK).nonzero().flatten().tolist() == list(range(9))  # the most confident came first
    assert trace[-1, 0].tolist() == [2] * 12

    turns.clear()
    plain = image.Decoding("regenerate", mask_steps=0, reveal_steps=4)
    trace = image.two_phase(denoiser, torch.zeros_like(start), torch.ones_like(start, dtype=torch.bool), history, plain)
    assert (trace == image.MASK).sum(-1).flatten().tolist() == [12, 11, 8, 4, 0]

    turns.clear()  # a mask phase that never ends is cut off
    limit = image.Decoding(mask_steps=1, reveal_steps=2)
    trace = image.two_phase(denoiser, start, torch.ones_like(start, dtype=torch.bool), history, limit)
    assert (trace == image.MASK).sum(-1).flatten().tolist() == [0, 7, 4, 0]


def test_threshold_on_the_probability_of_mask():
    logits = torch.log(torch.tensor([[[0.6, 0.3, 0.1], [0.95, 0.04, 0.01], [0.2, 0.7, 0.1]]]))
    tokens, free = torch.tensor([[1, 1, 1]]), torch.ones(1, 3, dtype=torch.bool)
    assert image.remask_above(0.0, logits, tokens, mask_id=0, editable=free).tolist() == [[0, 0, 1]]
    assert image.remask_above(0.9, logits, tokens, mask_id=0, editable=free).tolist() == [[1, 0, 1]]
    masked = torch.zeros_like(tokens)  # it holds nothing back from being revealed
    assert image.remask_above(0.9, logits, masked, mask_id=0, editable=free).tolist() == [[1, 1, 1]]


def test_guidance_combines_three_passes():
    editor = small_editor()
    codec, pairs = editor.codec, small_pairs(editor.codec)
    prompt = torch.cat([pairs.instruction, pairs.source + 4], 1)
    untold, alone = prompt.clone(), prompt.clone()
    untold[:, :3] = alone[:, :3] = codec.no_word
    alone[:, 3:] = codec.no_image

    def read(first):
        return history_embedding(torch.cat([first, pairs.source], 1).unsqueeze(0), editor.embedding, 0.0)

    with torch.no_grad():
        both, source, none = (editor(read(first)) for first in (prompt, untold, alone))
        guided = image.make_denoiser(editor, 2.0, 1.5)(read(prompt))
    expected = none + 1.5 * (source - none) + 2 * (both - source)
    assert torch.allclose(guided[:, codec.prompt :, :5], expected[:, codec.prompt :, :5], atol=1e-4)
    assert image.make_denoiser(editor, 1.0, 1.0) is editor


# --- metrics


def ssim_by_hand(a, b):
    """Window by window, in plain numpy, as the paper of 2004 has it."""
    height, width, _ = a.shape
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            values = []
            for channel in range(3):
                cut = (slice(max(0, y - 3), y + 4), slice(max(0, x - 3), x + 4), channel)
                p, q = a[cut].ravel(), b[cut].ravel()
                covariance = ((p - p.mean()) * (q - q.mean())).mean()
                luminance = (2 * p.mean() * q.mean() + 6.5025) / (p.mean() ** 2 + q.mean() ** 2 + 6.5025)
                values.append(luminance * (2 * covariance + 58.5225) / (p.var() + q.var() + 58.5225))
            result[y, x] = np.mean(values)
    return result


def test_ssim_agrees_with_windows_by_hand():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 12, 9, 3)).astype(float)
    b = np.clip(a + rng.normal(0, 40, a.shape), 0, 255)
    got = image.structural_similarity(torch.tensor(a), torch.tensor(b))
    expected = np.stack([ssim_by_hand(*both) for both in zip(a, b)])
    assert np.abs(got.numpy() - expected).max() < 1e-9 and got.mean() < 0.95
    assert torch.allclose(image.structural_similarity(torch.tensor(a), torch.tensor(a)), torch.ones(1).double())


def test_metrics_of_hand_made_images():
    source = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    target = source.clone()
    target[0, :2, :4] = 100  # the region: 8 of 64 pixels

    def metrics(edited):
        return {name: value.item() for name, value in image.measure(edited, source, target).items()}

    perfect = metrics(target)
    assert perfect == {"precision": 1, "coverage": 1, "mae": 0, "psnr": math.inf, "ssim": 1, "exact": 1}
    nothing = metrics(source)
    assert math.isnan(nothing.pop("precision"))
    assert nothing == {"coverage": 0, "mae": 0, "psnr": math.inf, "ssim": 1, "exact": 0}
    half = target.clone()
    half[0, 1] = 0
    assert metrics(half) == {"precision": 1, "coverage": 0.5, "mae": 0, "psnr": math.inf, "ssim": 1, "exact": 0}
    wrong_colour = (target > 0).byte() * 50
    assert metrics(wrong_colour) == perfect | {"exact": 0}
    everything = metrics(torch.full_like(source, 10))
    assert everything["precision"] == 8 / 64 and everything["coverage"] == 1 and everything["exact"] == 0
    assert everything["mae"] == 10 and everything["psnr"] == pytest.approx(20 * math.log10(255 / 10))
    one = target.clone()
    one[0, 7, 7, 0] = 255  # a channel of one pixel of the 56 outside
    found = metrics(one)
    assert found["precision"] == 8 / 9 and found["mae"] == pytest.approx(255 / 168)
    assert found["psnr"] == pytest.approx(10 * math.log10(168))
    composite = one.clone()
    composite[0, :2, :4] = 0  # only what is outside the region counts
    by_hand = ssim_by_hand(composite[0].double().numpy(), source[0].double().numpy())
    assert found["ssim"] == pytest.approx((by_hand.sum() - by_hand[:2, :4].sum()) / 56)
    whole = {name: value.item() for name, value in image.measure(target, source, torch.full_like(source, 7)).items()}
    assert math.isnan(whole["mae"]) and math.isnan(whole["psnr"]) and math.isnan(whole["ssim"])


def test_summaries_say_what_is_infinite_and_what_undefined():
    values = torch.tensor([1.0, 3.0, math.inf, math.inf, math.inf, math.nan]).double()
    found = image.summarize(values)
    assert found["mean"] == 2 and found["median"] == "inf" and (found["infinite"], found["undefined"]) == (3, 1)
    assert found["ci95"] == pytest.approx([2 - 1.96 * 2**0.5 / 2**0.5, 2 + 1.96])
    assert image.summarize(torch.tensor([math.nan]).double())["mean"] is None
    json.dumps(image.summarize(torch.tensor([math.inf]).double()), allow_nan=False)
    low, high = rm.wilson_interval(95, 100)  # 0.8882 to 0.9785 in the usual tables
    assert (round(low, 4), round(high, 4)) == (0.8882, 0.9785)


def test_evaluation_counts_exact_edits_by_verb():
    editor = small_editor()
    pairs = small_pairs(editor.codec, 8)
    pairs.verbs, pairs.unseen_phrase = ["make"] * 5 + ["do"] * 3, [True] * 2 + [False] * 6
    done = image.edit(editor, pairs.source, pairs.instruction, 0.0, False).tokens
    pairs.target = torch.where(torch.arange(8).unsqueeze(1) < 6, done, pairs.source.flip(1))
    record, tokens, _ = image.evaluate(editor, 0.0, False, pairs, image.Decoding(), "float32", chunk=3)
    assert torch.equal(tokens, done) and record["right"] == "11111100" and record["exact"] == 6 / 8
    assert record["by_verb"]["make"]["exact"] == 1 and record["by_verb"]["do"]["exact"] == 1 / 3
    assert (record["unseen_phrasing"]["n"], record["seen_phrasing"]["exact"]) == (2, 4 / 6)
    json.dumps(record, allow_nan=False)


# --- the command line


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["edit_image.py", *map(str, arguments)])
    image.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one tiny training on pairs of 8x8: base, sft, rm, history, guided."""
    folder = tmp_path_factory.mktemp("trained")
    rng, pairs = np.random.default_rng(0), []
    for i in range(6):
        source, target = (rng.integers(0, 2, (8, 8, 1)) * np.array([[[200, 0, 0]]]) for _ in range(2))
        pairs.append((("make it red", "turn it black")[i % 2], source, target))
    write_pairs(folder / "pairs", pairs)
    (folder / "words").mkdir()
    arguments = ["--pairs", folder / "pairs", "--test", folder / "pairs", "--out", folder / "out", "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        run(patch, *arguments, "--methods", "sft", "rm", "history", "guided", "--json", folder / "result.json")
    return folder, arguments


def test_training_writes_table_gallery_and_checkpoints(trained, monkeypatch, capsys):
    folder, arguments = trained
    result = json.loads((folder / "result.json").read_text())
    assert set(result["training"]) == set(image.METHODS)
    assert len({row["params"] for row in result["rows"].values()}) == 1
    assert {row["n"] for row in result["rows"].values()} == {6}
    steps = {method: record["steps"] for method, record in result["training"].items()}
    assert steps == dict.fromkeys(image.METHODS, 2) | {"base": 1}
    assert result["rows"]["sft"]["decoding"]["reveal_steps"] == 16
    assert Image.open(folder / "out/gallery.png").size[0] > 600
    assert all((folder / f"out/{method}.pt").stat().st_size < 4e6 for method in image.METHODS)
    run(monkeypatch, *arguments, "--methods", "rm")  # what is there is not trained again
    assert "rm is done" in capsys.readouterr().out
    with pytest.raises(image.InputError, match="was made with"):
        run(monkeypatch, *arguments, "--seed", "1")


def test_a_killed_training_goes_on_to_the_same_model(trained, monkeypatch):
    folder, arguments = trained
    train, left = rm.train, []

    def interrupted(*positional, **settings):
        for step, stats in train(*positional, **settings | {"checkpoint_every": 1}):
            yield step, stats
            if left and left.pop() == "kill":
                raise KeyboardInterrupt

    monkeypatch.setattr(rm, "train", interrupted)
    again = [*arguments[:-4], "--out", folder / "again", "--steps", "2", "--methods", "rm", "--base-steps", "1"]
    left += ["kill", "rm 1", "base 1"]  # in the second step of rm
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *again)
    assert (folder / "again/rm.resume.pt").exists() and (folder / "again/base.pt").exists()
    run(monkeypatch, *again)
    for method in ("base", "rm"):
        one, other = (rm.load_checkpoint(folder / name / f"{method}.pt", "image")[0] for name in ("out", "again"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert not list((folder / "again").glob("*.resume.pt"))


def test_the_base_may_have_steps_of_its_own(trained, monkeypatch):
    folder, arguments = trained
    own = [*arguments[:-4], "--out", folder / "own", "--steps", "1", "--methods", "rm", "--json", folder / "own.json"]
    run(monkeypatch, *own, "--base-steps", "3")
    training = json.loads((folder / "own.json").read_text())["training"]
    assert {method: record["steps"] for method, record in training.items()} == {"base": 3, "rm": 1}
    with pytest.raises(image.InputError, match="base.pt was made with"):  # not silently another base
        run(monkeypatch, *own, "--base-steps", "2")


def test_a_file_is_edited_with_pictures_and_animation(trained, monkeypatch, tmp_path, capsys):
    folder, _ = trained
    source = folder / "pairs/0_source.png"
    run(monkeypatch, "--checkpoint", folder / "out/rm.pt", "--image", source, "--instruction", "Make it black!",
        "--out", tmp_path / "new/out.png", "--gif", tmp_path / "turns.gif", "--json", tmp_path / "out.json")
    before, after = np.array(Image.open(source)), np.array(Image.open(tmp_path / "new/out.png"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert (before != after).any(-1).sum() == record["changed_pixels"] <= record["remasked_pixels"]
    assert Image.open(tmp_path / "new/out_steps.png").size[0] > 300
    assert getattr(Image.open(tmp_path / "turns.gif"), "n_frames", 1) >= 1
    run(monkeypatch, "--checkpoint", folder / "out/history.pt", "--evaluate", "--test", folder / "pairs", "--decode",
        "loop", "--threshold", "0.5", "--out", tmp_path / "ev", "--json", tmp_path / "ev.json")
    record = json.loads((tmp_path / "ev.json").read_text())
    assert record["n"] == 6 and 1 <= record["mean_turns"] <= 16 and (tmp_path / "ev/evaluate.png").exists()
    run(monkeypatch, "--checkpoint", folder / "out/sft.pt", "--image", source, "--instruction", "make it black",
        "--out", tmp_path / "sft.png", "--json", tmp_path / "sft.json")  # regenerates every pixel
    assert json.loads((tmp_path / "sft.json").read_text())["remasked_pixels"] == 64


def test_bad_input_is_one_line_and_exit_code_2(trained, monkeypatch, tmp_path, capsys):
    folder, arguments = trained
    checkpoint = ["--checkpoint", folder / "out/rm.pt"]
    good = folder / "pairs/0_source.png"
    Image.fromarray(flat(0, 0, 0, size=9)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no image")
    out = ["--out", tmp_path / "o.png"]
    (tmp_path / "moved").mkdir()
    recoloured = write_pairs(tmp_path / "moved/pairs", [("make it red", flat(0, 0, 0), flat(0, 0, 200))])
    for words, message in (
        ([*checkpoint, "--image", tmp_path / "wide.png", "--instruction", "make it red", *out], "9x9 pixels"),
        ([*checkpoint, "--image", tmp_path / "no.png", "--instruction", "make it red", *out], "cannot be read"),
        ([*checkpoint, "--image", tmp_path / "text.png", "--instruction", "make it red", *out], "cannot be read"),
        ([*checkpoint, "--image", good, "--instruction", "make it purple", *out], "purple"),
        ([*checkpoint, "--image", good, "--instruction", "make it red red red red", *out], "6 words"),
        ([*checkpoint, "--image", good, "--instruction", " ", *out], "0 words"),
        ([*checkpoint, "--evaluate"], "other images than our scenes"),
        ([*checkpoint, "--evaluate", "--test", folder / "words"], "pairs.jsonl cannot be read"),
        (["--checkpoint", tmp_path / "none.pt", "--evaluate"], "none.pt"),
        (["--pairs", folder / "words", "--test", folder / "pairs", "--out", tmp_path / "x"], "jsonl cannot be read"),
        (["--device", "cuda:7", "--smoke"], "cuda:7"),
        (["--checkpoint", folder / "out/sft.pt", "--evaluate", "--test", folder / "pairs", "--decode", "loop"],
         "is a sft model, which regenerates"),
        (["--pairs", recoloured, "--test", recoloured, *arguments[4:]], "other words or colours"),
    ):
        with pytest.raises(image.InputError, match=message) as caught:
            run(monkeypatch, *words)
        assert "\n" not in str(caught.value)
    for words in (
        ["--image", good, "--instruction", "make it red"], ["--image", good, *out], ["--pairs", folder / "pairs"],
        ["--instruction", "make it red"], ["--evaluate", "--steps", "3"], ["--steps", "0"], ["--threshold", "0.5"],
        ["--evaluate", "--decode", "loop", "--mask-steps", "3"], ["--evaluate", "--threshold", "1.5"],
        ["--evaluate", "--test", folder / "pairs", "--seed", "3"], ["--gif", "a.gif"], ["--smoke", "--seed", "1000000"], ["--methods", "best"],
        ["--base-steps", "3"], ["--base-steps", "0", "--steps", "1"],
    ):
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, *words)
        assert caught.value.code == 2
    capsys.readouterr()
    done = subprocess.run(
        [sys.executable, ROOT / "edit_image.py", *checkpoint, "--image", good, "--instruction", "go purple", *out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert "'go'" in done.stderr


def test_smoke(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "edit_image.py", "--smoke", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gallery.png").exists() and "exact" in done.stdout
    result = json.loads((tmp_path / "table.json").read_text())
    assert {"base", "sft", "rm, two phases", "rm, loop of Eq. 1", "history, two phases"} <= set(result["rows"])
