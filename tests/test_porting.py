"""What people who copy the method out rely on: the files alone, and networks of other libraries."""

import builtins
import math
import os
import subprocess
import symtable
import sys
from pathlib import Path

import pytest
import torch

import reflective_masking as rm
from history import HistoryReference, history_embedding
from train_text import topk_wrong

ROOT = Path(__file__).resolve().parents[1]
RULE = "# " + "=" * 96 + "\n"
PART_1 = (ROOT / "reflective_masking.py").read_text().split(RULE + "# Part II")[0]

# ------------------------------------------------------------------------- Part I without Part II


def global_names(table):
    """The global names that a scope and the scopes in it read."""
    outermost = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (outermost or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from global_names(inner)


def test_part_1_uses_no_name_of_part_2():
    table = symtable.symtable(PART_1, "part_1", "exec")
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    bound |= {inner.get_name() for inner in table.get_children()}  # functions and classes
    known = bound | set(dir(builtins)) | {"__name__", "__file__"}
    assert {"decide", "revise", "Tensor"} <= bound and "train" not in bound
    assert set(global_names(table)) <= known


TEN_LINES = """
import torch
from history import *
from reflective_masking import *
torch.manual_seed(0)
words = torch.tensor([[int(x) for x in w] for w in ("12345123", "54321543")])
config = TransformerConfig(6, 8, width=32, layers=1, heads=2, feed_forward=64)
model = MaskDiffusionTransformer(config)

optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for step in range(100):
    clean = words[torch.randint(2, (64,))]
    editable = torch.rand(clean.shape) < torch.rand(64, 1)
    wrong = (clean + torch.randint(4, clean.shape)) % 5 + 1  # any other letter
    trajectory = sample_trajectory(clean, editable, wrong, mask_id=0, T=4)
    states = history_until(trajectory, torch.randint(4, (64,)))
    target, role = oracle_action(states[-1], clean, mask_id=0)
    loss = revision_loss(model(history_embedding(states, model.embedding)), target, role)
    optimizer.zero_grad(), loss.total.backward(), optimizer.step()

clean = words.repeat(8, 1)
row, place = torch.arange(16), torch.arange(16) // 2  # every letter of both is wrong once
start = clean.clone()
start[row, place] = start[row, place] % 5 + 1
result = revise(model, start, 0, HistoryReference(model.embedding.detach()))
print((result.tokens == clean).all(-1).sum().item(), set(globals()) & {"train", "Options"})
"""


def test_history_and_part_1_copied_out_with_the_kernels_train_and_revise(tmp_path):
    assert PART_1.rstrip().endswith("demo()") and "Part II" in PART_1.split('"""')[1]
    (tmp_path / "reflective_masking.py").write_text(PART_1)
    for name in ("history.py", "kernels.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "loop.py").write_text(TEN_LINES)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "loop.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    right, part_2 = done.stdout.split(" ", 1)
    assert int(right) >= 14 and part_2.strip() == "set()"


def test_the_demo_runs_and_returns_a_share(capsys):
    share = rm.demo(steps=2)
    assert 0 <= share <= 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("turn 0") and f"{share:.1%}" in lines[-1]


# ------------------------------------------------- networks of Hugging Face, with random weights

MASK, PAD, V = 15, 0, 16  # words are 1 to 6
PROMPT, LENGTH = 4, 8  # a prompt, padded on the left, and an answer
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=2, intermediate_size=64, pad_token_id=PAD, initializer_range=0.1)


def bert(transformers):
    """Its head has a bias and layers of its own below."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    torch.nn.init.normal_(model.cls.predictions.decoder.bias)  # as after pretraining
    return model


def llama(transformers):
    """Causal twice: in its layers, and in the mask that it makes of a padding mask."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def gemma(transformers):
    """Scales embeddings inside the module that looks them up."""
    sizes = dict(num_key_value_heads=1, head_dim=16, use_bidirectional_attention=True)
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, **sizes))


def esm(transformers):
    """Given ids it drops MASK's embedding and rescales the others: switched off.  (ESM-2: rotary;
    given embeddings, transformers 5 leaves the absolute positions of ESM-1 out.)"""
    sizes = dict(mask_token_id=MASK, token_dropout=True, position_embedding_type="rotary")
    config = transformers.EsmConfig(**SIZES, **sizes)
    model = transformers.EsmForMaskedLM(config)
    model.esm.embeddings.token_dropout = False
    return model


def network(make, model):
    """(the embeddings [V, D] as the network reads them, a denoiser, the weights of its head)."""

    def embedding():  # through the module, which may scale
        return model.get_input_embeddings()(torch.arange(V))

    def logits(embedded, mask):
        return model(inputs_embeds=embedded, attention_mask=mask).logits

    def hidden(embedded, mask):
        last = model.bert(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return model.cls.predictions.transform(last)

    if make is not bert:
        return embedding, logits, {}
    decoder = model.cls.predictions.decoder
    return embedding, hidden, dict(head=decoder.weight, bias=decoder.bias)


def batch(make, count, generator):
    """(clean, editable, attention mask): an answer that says the prompt's last two words twice."""
    lengths = torch.randint(2, PROMPT + 1, (count, 1), generator=generator)
    prompt = torch.randint(1, 7, (count, PROMPT), generator=generator)
    real = torch.arange(LENGTH) >= PROMPT - lengths
    prompt = prompt.masked_fill(~real[:, :PROMPT], PAD)
    clean = torch.cat([prompt, prompt[:, -2:], prompt[:, -2:]], 1)
    editable = (torch.arange(LENGTH) >= PROMPT).expand_as(clean)
    if make in (llama, gemma):  # of four axes it is taken as it is; of two it becomes causal
        real = real[:, None, None, :].expand(count, 1, LENGTH, LENGTH)
    return clean, editable, real


@pytest.mark.parametrize("make", [bert, llama, gemma, esm])
def test_a_network_of_hugging_face_trains_and_revises(make):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = make(transformers).eval().double()  # no dropout; rounds far below any decision
    embedding, denoiser, weights = network(make, model)

    # What the recipe asserts first: the network reads E[x] where it would read x.
    ids = torch.randint(1, V, (3, LENGTH), generator=generator)
    ids[:, -2:] = MASK
    by_ids = model(input_ids=ids).logits
    by_embeddings = model(inputs_embeds=embedding()[ids]).logits
    torch.testing.assert_close(by_ids, by_embeddings)

    # Every position reads every other one.
    clean, editable, mask = batch(make, 24, generator)
    answers = torch.stack([clean, clean.masked_fill(editable, MASK)])
    read = [denoiser(embedding()[x], mask)[:, PROMPT - 1] for x in answers]
    assert ((read[0] - read[1]).abs().amax(-1) > 1e-9).all()

    wrong = clean % 6 + 1
    spoilt = editable & (torch.rand(clean.shape, generator=generator) < 0.5)
    start = torch.where(spoilt, wrong, clean)

    def revise(network, rows=slice(None), **weights):
        history = HistoryReference(embedding().detach(), normalize=False)
        asked = (start[rows], MASK, history, 12, editable[rows], 1)
        return rm.revise(network, *asked, context={"mask": mask[rows]}, **weights)

    def answers():
        """They depend neither on the batch nor on whether logits exist."""
        got = revise(denoiser, **weights)
        logits = lambda embedded, mask: model(inputs_embeds=embedded, attention_mask=mask).logits
        assert torch.equal(got.tokens, revise(logits).tokens)
        assert torch.equal(got.tokens[~editable], start[~editable])
        for b in range(24):
            one = revise(denoiser, slice(b, b + 1), **weights)
            assert (one.turns[0], one.status[0]) == (got.turns[b], got.status[b])
            assert torch.equal(one.tokens[0], got.tokens[b])
        return got

    answers()  # random weights decide closely
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(100):
        target_words, free, real = batch(make, 32, generator)
        loss = training_loss(embedding, denoiser, weights, target_words, free, real, generator)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    trained = answers()
    assert len(set(trained.turns)) > 1  # some left the batch before others
    assert (trained.tokens == clean).sum() > (start == clean).sum()


def training_loss(embedding, denoiser, weights, clean, editable, mask, generator):
    """The recipe's: plausible mistakes of the network itself, a synthetic revision, the oracle."""
    with torch.no_grad():
        probe = denoiser(embedding()[clean.masked_fill(editable, MASK)], mask)
        probe = torch.nn.functional.linear(probe, *weights.values()) if weights else probe
        probe[..., [PAD, *range(7, V)]] = -math.inf  # no words
    wrong = topk_wrong(probe, clean, MASK, k=50, generator=generator)
    revised = editable & (torch.rand(clean.shape, generator=generator) < 0.7)
    trajectory = rm.sample_trajectory(clean, revised, wrong, MASK, T=3, generator=generator)
    t = torch.randint(3, (len(clean),), generator=generator)
    states = rm.history_until(trajectory, t)
    target, role = rm.oracle_action(states[-1], clean, MASK, editable)
    output = denoiser(history_embedding(states, embedding(), normalize=False), mask)
    return rm.revision_loss(output, target, role, **weights)
