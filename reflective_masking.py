"""Reflective Masking (RM): a mask diffusion model that revises its own answer over several turns.

"Multi-Turn Reflective Masking Elicits Reasoning in Mask Diffusion Models", Zhang, Bian, Qi, Yao,
Huang, Zhou, 2026, arXiv 2606.16700.  Part II is training and files, Part I the method:

    1. decide                          Eq. 1: keep, re-mask or reveal, every position at once
    2. oracle_action, revision_loss    the right action, and the three losses
    3. sample_trajectory               synthetic revisions to learn from
    4. revise                          the multi-turn loop: Eq. 2, the network, Eq. 1
    5. MaskDiffusionTransformer        the network: input embeddings -> logits
    6. demo                            all of it on a toy:  python reflective_masking.py

Shapes: B sequences, N positions, V tokens with MASK, D width.  What differs from the paper: a
role's loss is divided by the number of all editable positions, so that the three add up to the
plain cross-entropy; Sudoku's attention has a bias for cells that share a row, column or box.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from history import ABSENT, HistoryReference, history_embedding, rotate_by, wide
from kernels import check_decision, check_loss, require, use_triton

# ------------------------------------------------------------------------------------------------
# 1. Eq. 1, the decision rule


@torch.no_grad()
def decide(
    logits: Tensor, tokens: Tensor, mask_id: int, editable: Tensor | None = None,
    reveal: int | Tensor | None = None, allow_remask: bool = True, allow_reveal: bool = True,
    head: Tensor | None = None, bias: Tensor | None = None, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 1: every position keeps its token, is re-masked or is revealed, all at once.

        x != M and p(M) >  p(x)     re-mask: M
        x != M and p(M) <= p(x)     keep:    x
        x  = M                      reveal:  argmax over V without M

    logits: float [B, N, V]; or, with head, the output weight [V, D], and bias [V] or None, hidden
    states [B, N, D]: only masked positions get logits.  tokens: int64 [B, N].  editable: bool
    [B, N] or [N]; elsewhere nothing changes.  reveal: at most that many reveals a sequence (int, or
    int64 [B]), the most confident first; None: all.  allow_remask, allow_reveal switch one kind
    off.  impl: "torch", "triton" or None, triton on a GPU.  Returns int64 [B, N]; ties reveal the
    lowest id.  ValueError: wrong shapes.
    """
    editable = check_decision(logits, tokens, mask_id, editable, head, bias)
    if not allow_reveal:  # then no masked row need be read
        editable = (tokens != mask_id) & (True if editable is None else editable)

    def logit(ids: Tensor) -> Tensor:  # of one token at every position, [B, N]
        if head is None:
            return logits.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
        product = (wide(logits) * wide(head[ids])).sum(-1)
        return product if bias is None else product + bias[ids]

    if use_triton(impl, logits) and head is None:
        best, confidence, remask, _ = kernels.decide_from_logits(logits, tokens, mask_id, editable)
    elif use_triton(impl, logits):
        how = (head, tokens, mask_id, editable, bias)
        best, confidence, remask, _ = kernels.decide_from_hidden(logits, *how)
    else:
        # Eq. 1 with logits for probabilities: a softmax keeps their order.
        editable = True if editable is None else editable
        remask = editable & (logit(torch.full_like(tokens, mask_id)) > logit(tokens))  # p(M) > p(x)
        masked = editable & (tokens == mask_id)
        rows = logits[masked] if head is None else F.linear(logits[masked], head, bias)
        revealed, sure = best_token(rows, mask_id)  # argmax over V without M
        best = tokens.masked_scatter(masked, revealed.to(tokens.dtype))
        confidence = sure.new_full(tokens.shape, -torch.inf).masked_scatter(masked, sure)

    if reveal is not None:
        most = torch.as_tensor(reveal, device=tokens.device).reshape(-1, 1)
        require(len(most) in (1, len(tokens)), f"reveal must be an int or [B], got {[*most.shape]}")
        rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        best = torch.where(rank < most, best, tokens)
    return best.masked_fill(remask, mask_id) if allow_remask else best


def best_token(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Without MASK: the likeliest token, int64 [...], and its log-probability.

    logits: float [..., V].  Log-probability as -log1p(sum of exp(logit - top) over the others): a
    float32 probability is 1 beyond a gap of 17 nats, and the most confident would tie.
    """
    allowed = wide(logits).clone()
    allowed[..., mask_id] = -torch.inf
    top, best = allowed.max(-1, keepdim=True)
    best = best.masked_fill(top == -torch.inf, int(mask_id == 0))  # nothing possible: the lowest id
    rest = (allowed - top).exp().scatter(-1, best, 0).sum(-1)
    return best.squeeze(-1), -torch.log1p(rest)


# ------------------------------------------------------------------------------------------------
# 2. The oracle action and the three losses

REVEAL, REMASK, KEEP, IGNORE = 0, 1, 2, -1  # roles; IGNORE: a position without a loss


def oracle_action(
    state: Tensor, clean: Tensor, mask_id: int, editable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The right action at every position: the labels of RM.

        M               reveal:  target x*
        wrong token     re-mask: target M
        right token     keep:    target itself

    state, clean: int64 [..., N]; clean is x*, without MASK.  editable: bool, broadcastable;
    elsewhere the role is IGNORE.  Returns (target, role), int64 of state's shape.
    """
    masked = state == mask_id
    right = state == clean
    target = torch.where(masked | right, clean, mask_id)
    role = torch.where(masked, REVEAL, torch.where(right, KEEP, REMASK))
    return target, (role if editable is None else torch.where(editable, role, IGNORE))


class RevisionLoss(NamedTuple):
    """Scalars in nats.  total has a gradient; the parts are there to be watched."""

    total: Tensor
    reveal: Tensor
    remask: Tensor
    keep: Tensor


def revision_loss(
    logits: Tensor, target: Tensor, role: Tensor, weights: tuple[float, float, float] = (1, 1, 1),
    head: Tensor | None = None, bias: Tensor | None = None, impl: str | None = None,
) -> RevisionLoss:  # fmt: skip
    """The cross-entropy to the oracle action over the editable positions, split by role.

    A part is the sum over its role's positions divided by the number of positions with any role:
    with weights (1, 1, 1) total is the plain mean.  At the minimum, on training states, a visible
    position has all its mass on {x, M}, and p(x) is the probability that x is right, so that Eq. 1
    re-masks what is more likely wrong; at a masked one p is the posterior of x*.  logits, head,
    bias: as in decide; a GPU forms the logits of hidden states a block of rows at a time.  target,
    role: int64 [B, N].  weights: of reveal, re-mask, keep; unequal last two move p(x).  ValueError.
    """
    arguments = (logits, target, role, weights, head, bias)
    if use_triton(impl, logits):
        return RevisionLoss(*kernels.revision_cross_entropy(*arguments))
    check_loss(*arguments)
    counted = role != IGNORE
    rows = logits[counted] if head is None else F.linear(logits[counted], head, bias)
    loss = F.cross_entropy(wide(rows), target[counted].long(), reduction="none")

    count = counted.sum().clamp(min=1)
    role = role[counted]
    reveal = torch.where(role == REVEAL, loss, 0).sum() / count  # -log p(x*)  where x = M
    remask = torch.where(role == REMASK, loss, 0).sum() / count  # -log p(M)   where x is wrong
    keep = torch.where(role == KEEP, loss, 0).sum() / count  # -log p(x)   where x is right
    total = weights[0] * reveal + weights[1] * remask + weights[2] * keep
    return RevisionLoss(total, reveal.detach(), remask.detach(), keep.detach())


# ------------------------------------------------------------------------------------------------
# 3. Synthetic revision trajectories


def sample_trajectory(
    clean: Tensor, editable: Tensor, wrong: Tensor, mask_id: int, T: int = 6,
    p_wrong: float | Tensor = 0.5, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Synthetic revisions x(0), ..., x(T): no rollouts, every position on its own clock.

    Each position that takes part starts wrong or masked; elsewhere the truth stands throughout.
        wrong (probability p_wrong)   wrong before turn beta, M before mu, then x*;
                                      beta ~ U{1..T-1}, mu ~ U{beta+1..T}
        mask                          M before mu, then x*;  mu ~ U{1..T}
    clean: int64 [B, N], x*.  editable: bool [B, N], the positions that take part: all that may
    change (the paper) or some, so that x(0) holds right tokens too.  wrong: int64 [B, N].  p_wrong
    (0.5 is ours): a number or a tensor.  Returns int64 [T+1, B, N].  ValueError: wrong shapes.
    """
    shapes = [[*x.shape] for x in (clean, editable, wrong)]
    require(shapes[0] == shapes[1] == shapes[2], f"clean, editable and wrong differ: {shapes}")
    require(T >= 2, f"T must be at least 2, got {T}")
    uniform = partial(torch.rand, clean.shape, generator=generator, device=clean.device)

    def time_from(low: Tensor | int, high: int) -> Tensor:  # ~ U{low..high}
        return low + (uniform() * (high + 1 - low)).long()

    starts_wrong = uniform() < p_wrong
    beta = torch.where(starts_wrong, time_from(1, T - 1), 0)
    mu = torch.where(starts_wrong, time_from(beta + 1, T), time_from(1, T))
    turn = torch.arange(T + 1, device=clean.device).view(-1, 1, 1)
    states = torch.where(turn < beta, wrong, torch.where(turn < mu, mask_id, clean))
    return torch.where(editable, states, clean)


def history_until(trajectory: Tensor, t: Tensor) -> Tensor:
    """Each sequence's states x(0), ..., x(t), the current one last: for history_embedding.

    trajectory: int64 [T+1, B, N].  t: int64 [B].  Returns [max(t)+1, B, N], ABSENT before x(0).
    """
    length = int(t.max()) + 1
    index = torch.arange(length, device=t.device).unsqueeze(1) - (length - 1) + t  # [length, B]
    states = trajectory[index.clamp(min=0), torch.arange(len(t), device=t.device)]
    return states.masked_fill((index < 0).unsqueeze(-1), ABSENT)


# ------------------------------------------------------------------------------------------------
# 4. Multi-turn revision

STATUS = FIXED_POINT, CYCLE, OUT_OF_TURNS = "fixed point", "cycle", "out of turns"


class Revision(NamedTuple):
    """tokens: int64 [B, N] without MASK.  turns (forward passes), status: B each.  trace: every
    state, int64 [max(turns) + 1, B, N], where a finished sequence keeps its last one; or None."""

    tokens: Tensor
    turns: list[int]
    status: list[str]
    trace: Tensor | None


@torch.no_grad()
def revise(
    denoiser: Callable[..., Tensor], tokens: Tensor, mask_id: int, history: HistoryReference,
    max_turns: int = 32, editable: Tensor | None = None, reveal: int | None = None,
    trace: bool = False, patience: int | None = None, rule: Callable[..., Tensor] | None = None,
    head: Tensor | None = None, bias: Tensor | None = None, impl: str | None = None,
    context: dict[str, Tensor] | None = None,
) -> Revision:  # fmt: skip
    """Every turn Eq. 2 (history), one forward pass, Eq. 1 (decide), until one of the ends below.

    denoiser: any callable from input embeddings [B, N, D] to logits [B, N, V], the transformer
    below or lambda e: hf_model(inputs_embeds=e).logits; with head to hidden states [B, N, D].
    tokens: int64 [B, N], MASK where nothing stands yet.  history: it is reset first.  editable,
    reveal, head, bias, impl: as in decide.  rule: in place of Eq. 1; rule(logits, tokens, mask_id,
    editable=, turn=, max_turns=) -> int64 [B, N], turn from 1.  context: the denoiser's keywords,
    tensors with a row a sequence (an attention mask), dropped as it ends.  A sequence ends with

      FIXED_POINT   the turn changed nothing.  With history, whose memory still changes, a later
                    one might; it counts as settled, as in the released code.
      CYCLE         the new state equals `patience` earlier ones.  None: 1 where Eq. 1 then loops
                    for ever, without history; 3 with history or a rule, which knows the turn.
      OUT_OF_TURNS  max_turns forward passes were made.

    In its last turn every mask is revealed and nothing is re-masked, so no MASK is left.
    ValueError: a MASK that may not be edited; an output of the denoiser of another shape, or NaN.
    """
    require(max_turns >= 1, f"max_turns must be at least 1, got {max_turns}")
    require(reveal is None or reveal >= 1, f"reveal must be None or at least 1, got {reveal}")
    compatible = rule is None or (head is None and reveal is None)
    require(compatible, "head and reveal belong to Eq. 1, which rule replaces")
    patience = patience or (3 if history.gamma or rule else 1)
    eq1 = partial(decide, head=head, bias=bias, impl=impl)
    rule = rule or (lambda *now, editable, **_: eq1(*now, editable, reveal))
    editable = torch.ones_like(tokens).bool() if editable is None else editable.expand_as(tokens)
    locked = (tokens == mask_id) & ~editable
    require(not locked.any(), "tokens has MASK at a position that editable locks")
    context = context or {}

    history.reset()
    states = [tokens]  # x(0), x(1), ... of all sequences
    turns = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    status = torch.zeros_like(turns)  # index in STATUS
    running = torch.arange(len(tokens), device=tokens.device)  # those in the batch, at work
    for turn in range(1, max_turns + 1):  # from x(turn - 1) to x(turn)
        logits = denoiser(history.push(tokens), **context)  # Eq. 2, then the network
        got = f"denoiser returned {[*logits.shape]} for tokens {[*tokens.shape]}: see context"
        require(logits.shape[:2] == tokens.shape, got)
        nan = logits.amax(-1).isnan() & editable  # reads every logit: cheap beside the network
        require(not nan.any(), f"denoiser returned NaN in turn {turn}")
        following = rule(logits, tokens, mask_id, editable=editable, turn=turn, max_turns=max_turns)

        settled = (following == tokens).all(-1)
        returned = sum((state[running] == following).all(-1).int() for state in states) >= patience
        turns[running] = turn
        status[running] = torch.where(settled, 0, torch.where(returned, 1, 2))  # of STATUS
        going = ~settled & ~returned & (turn < max_turns)
        unfilled = ~going.unsqueeze(-1) & (following == mask_id)  # a sequence ends without MASK
        if unfilled.any():
            revealed = eq1(logits, tokens, mask_id, unfilled, allow_remask=False)
            following = torch.where(unfilled, revealed, following)

        states.append(states[-1].index_copy(0, running, following))
        if not going.any():
            break
        history.keep(going)
        tokens, editable, running = following[going], editable[going], running[going]
        context = {name: value[going] for name, value in context.items()}
    named = [STATUS[index] for index in status.tolist()]
    return Revision(states[-1], turns.tolist(), named, torch.stack(states) if trace else None)


# ------------------------------------------------------------------------------------------------
# 5. The network


@dataclass
class TransformerConfig:
    """Size and position scheme; saved inside every checkpoint.

    coordinates: N rows of K small integers, a position's place along each axis; None: its index.
    With K >= 2 (ours) every head learns a bias for each set of coordinates that two places share.
    positions: "learned" embeds coordinates; "both" also rotates queries and keys by the first two.
    """

    vocabulary: int  # V, MASK included
    length: int  # N at most
    width: int = 128  # D
    layers: int = 4
    heads: int = 4
    feed_forward: int = 512
    positions: str = "learned"
    coordinates: list[list[int]] | None = None


class Block(nn.Module):
    """Pre-norm self-attention in both directions, then a feed-forward with squared ReLU."""

    def __init__(self, config: TransformerConfig, relations: int):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_in = nn.Linear(width, config.feed_forward, bias=False)
        self.feed_forward_out = nn.Linear(config.feed_forward, width, bias=False)
        self.relation_bias = nn.Parameter(torch.zeros(self.heads, relations)) if relations else None
        nn.init.zeros_(self.attention_out.weight)  # every block starts as the identity
        nn.init.zeros_(self.feed_forward_out.weight)

    def forward(self, x: Tensor, relation: Tensor, rotation: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        projected = self.query_key_value(self.attention_norm(x))
        projected = projected.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = projected  # [B, heads, N, D / heads] each
        if rotation is not None:
            cos, sin = rotation.to(query.dtype)
            query, key = rotate_by(query, cos, sin), rotate_by(key, cos, sin)
        # Written out: with a learned bias PyTorch's fused attention is slower on a CPU.
        score = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        if self.relation_bias is not None:
            score = score + self.relation_bias[:, relation]
        mixed = score.softmax(-1).to(value.dtype) @ value
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = self.feed_forward_in(self.feed_forward_norm(x))
        return x + self.feed_forward_out(hidden.relu().square())


class MaskDiffusionTransformer(nn.Module):
    """A small transformer that reads input embeddings, so that a(t) of Eq. 2 can stand for them.

    embedding: the weight [V, D].  Called on float [B, N, D] it returns logits, float [B, N, V].
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        coordinates = torch.tensor(config.coordinates or [[n] for n in range(config.length)])
        axes = coordinates.shape[1]
        width = config.width
        require(config.positions in ("learned", "both"), f"positions {config.positions!r} unknown")
        require(width % (2 * config.heads * min(axes, 2)) == 0, f"width {width} splits a pair")
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, width) * width**-0.5)
        shared = (coordinates[:, None] == coordinates[None, :]).long()  # [N, N, K]
        relation = (shared << torch.arange(axes)).sum(-1)  # bit k: they share coordinate k
        self.register_buffer("relation", relation, persistent=False)
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.position = nn.ParameterList(
            nn.Parameter(torch.randn(int(axis.max()) + 1, width) * 0.3) for axis in coordinates.T
        )
        rotation = None
        if config.positions == "both":  # once: torch.compile would redo the angles every time
            turned = coordinates[:, :2].double().unsqueeze(-1)  # [N, 1 or 2, 1]
            pairs = width // config.heads // 2 // turned.shape[1]  # of an axis
            base = 10000.0 if axes == 1 else 100.0  # a sequence is long, a grid is short
            frequency = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
            angle = (turned * frequency).flatten(1)
            rotation = torch.stack([angle.cos(), angle.sin()]).to(torch.get_default_dtype())
        self.register_buffer("rotation", rotation, persistent=False)
        relations = 2**axes if axes > 1 else 0
        self.blocks = nn.ModuleList(Block(config, relations) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, config.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x = x + sum(table[axis[:length]] for table, axis in zip(self.position, self.coordinates.T))
        rotation = None if self.rotation is None else self.rotation[:, :length]
        for block in self.blocks:
            x = block(x, self.relation[:length, :length], rotation)
        return self.head(self.norm(x))


# ------------------------------------------------------------------------------------------------
# 6. The method in a minute:  python reflective_masking.py


def demo(steps: int = 300) -> float:
    """Words of 6 letters, written four times, three letters wrong: trains, revises, scores 500."""
    torch.manual_seed(0)
    places = [[n // 6, n % 6] for n in range(24)]  # which copy, which letter
    config = TransformerConfig(27, 24, width=64, layers=2, feed_forward=256, coordinates=places)
    model = MaskDiffusionTransformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
        clean = torch.randint(1, 27, (count, 6)).repeat(1, 4)  # letters are 1 to 26, MASK is 0
        chosen = torch.rand(count, 24).argsort(-1) < 3  # where it starts wrong or masked
        return clean, chosen, (clean + torch.randint(25, clean.shape)) % 26 + 1  # another letter

    for step in range(1, steps + 1):
        clean, chosen, wrong = examples(64)
        trajectory = sample_trajectory(clean, chosen, wrong, mask_id=0)
        states = history_until(trajectory, torch.randint(6, (64,)))
        target, role = oracle_action(states[-1], clean, mask_id=0)
        loss = revision_loss(model(history_embedding(states, model.embedding)), target, role)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.total:.3f}")

    clean, chosen, wrong = examples(500)
    history = HistoryReference(model.embedding.detach())
    result = revise(model, torch.where(chosen, wrong, clean), 0, history, trace=True)
    for turn, state in enumerate(result.trace[: result.turns[0] + 1, 0].tolist()):
        print(f"turn {turn}  " + "".join(chr(96 + x) if x else "_" for x in state))
    right = (result.tokens == clean).all(-1).float().mean().item()
    print(f"{right:.1%} of 500 such texts are right after revision, none was before")
    return right


if __name__ == "__main__":
    demo()


# ================================================================================================
# Part II: training and files, once for the three scripts.  Nothing above uses a name from here on.

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

# ------------------------------------------------------------------------------------------------
# 7. Training

# states int64 [K, B, N] oldest first (history_until), clean int64 [B, N], editable bool [B, N]: the
# positions that have a loss (None: all).  With a fourth, float [B, N], the loss is mask_loss.
Batch = tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor]


def train(
    model: nn.Module, sample: Callable[[int, torch.Generator], Batch], steps: int, mask_id: int,
    batch_size: int = 64, gamma: float = 0.9, rotate: bool = True, learning_rate: float = 2.5e-3,
    muon_factor: float = 8, warmup: int = 200, compile: bool = False,
    checkpoint: Path | None = None, checkpoint_every: int = 500, notes: dict | None = None,
    seed: int = 0, oracle: Callable = oracle_action,
) -> Iterator[tuple[int, dict]]:  # fmt: skip
    """Trains in place; yields (step, stats) after every step: for step, stats in train(...).

    sample(batch_size, generator) returns a Batch on the model's device; the generator is seeded by
    (seed, step), so that a run can go on.  gamma, rotate: Eq. 2.  oracle: labels, for baselines.
    compile: torch.compile the network.  checkpoint: a file, written every checkpoint_every steps
    and at Ctrl-C, with notes; where it exists the run goes on from it, on the same CPU with the
    result of an unbroken run.  Under torchrun P processes share each batch, and train
    as one would.  stats: loss, reveal, remask, keep (nats, 0-d tensors), seconds of training.
    InputError: the loss or its gradient is not finite; the last checkpoint stays.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if batch_size % world:
        raise InputError(f"a batch of {batch_size} cannot be shared by {world} processes")
    device = model.embedding.device
    network = torch.compile(model) if compile else model
    if dist.is_initialized():
        network = nn.parallel.DistributedDataParallel(network)
    optimization = make_optimizers(model, learning_rate, muon_factor, warmup, steps)
    generator = torch.Generator(device)
    saved = {"step": 0, "seconds": 0.0}
    if checkpoint and checkpoint.exists():
        saved = read_torch(checkpoint, device)
        with naming(checkpoint, "does not fit"):
            model.load_state_dict(saved["model"])
            for part, state in zip(optimization, saved["optimization"], strict=True):
                part.load_state_dict(state)
    seconds = saved["seconds"]

    with signals_wait() as received:
        for step in range(saved["step"], steps):
            began = time.perf_counter()
            generator.manual_seed(seed * 1_000_003 + step)
            states, *rest = sample(batch_size, generator)
            states = states[:, rank::world]
            clean, editable, *weight = (x if x is None else x[rank::world] for x in rest)
            target, role = oracle(states[-1], clean, mask_id, editable)
            inputs = history_embedding(states, model.embedding, gamma, rotate)
            with mixed_precision(device):
                logits = network(inputs).float()
            if weight:
                loss = mask_loss(logits, target, role, *weight)
            else:
                loss = revision_loss(logits, target, role)
            update(model, loss.total, role, optimization, step + 1)
            seconds += time.perf_counter() - began

            parts = {"reveal": loss.reveal, "remask": loss.remask, "keep": loss.keep}
            yield step + 1, {"loss": loss.total.detach(), **parts, "seconds": seconds}
            if checkpoint and rank == 0 and (received or (step + 1) % checkpoint_every == 0):
                saved = {
                    "model": model.state_dict(),
                    "optimization": [part.state_dict() for part in optimization],
                    "step": step + 1,
                    "seconds": seconds,
                    "notes": notes,
                }
                replace_file(checkpoint, partial(torch.save, saved), tell=False)
            if received:
                how = "the same command goes on from here" if checkpoint else "nothing was saved"
                raise InputError(f"stopped after step {step + 1}: {how}")


def make_optimizers(
    model: nn.Module, learning_rate: float, muon_factor: float, warmup: int, steps: int
) -> list:
    """[AdamW, with bf16 Muon for the blocks' matrices], then a schedule each: warm-up, cosine."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) >= 16]
    if not has_bf16(model.embedding.device):  # Muon multiplies in it: emulated, AdamW is far faster
        matrices = []
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:  # Muon's update has about the spectral norm 1: it needs a higher rate
        rate = muon_factor * learning_rate
        optimizers.append(torch.optim.Muon(matrices, rate, weight_decay=0.01))

    def scale(step: int) -> float:
        return min((step + 1) / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizers + [torch.optim.lr_scheduler.LambdaLR(o, scale) for o in optimizers]


def update(model: nn.Module, loss: Tensor, role: Tensor, optimization: list, step: int) -> None:
    """One step of the optimisers and schedules; InputError before it: a gradient is not finite."""
    model.zero_grad()
    if dist.is_initialized():  # a process divides by its own positions, and DDP by the processes
        count = (role != IGNORE).sum()
        everyone = count.clone()
        dist.all_reduce(everyone)
        loss = loss * (count * dist.get_world_size() / everyone.clamp(min=1))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not norm.isfinite():
        raise InputError(f"step {step}: the loss is {loss.item()}, its gradient {norm.item()}")
    for part in optimization:
        part.step()


def mask_loss(logits: Tensor, target: Tensor, role: Tensor, weight: Tensor) -> RevisionLoss:
    """Plain mask diffusion: the mean over masked positions of weight times cross-entropy.

    weight: float, target's shape; LLaDA's is 1/t, t the share of masked positions.
    """
    masked = role == REVEAL
    loss = F.cross_entropy(wide(logits[masked]), target[masked], reduction="none")
    total = (loss * weight[masked]).sum() / max(loss.numel(), 1)
    return RevisionLoss(total, total.detach(), *total.new_zeros(2))


@contextlib.contextmanager
def signals_wait() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in a list, so that no step is cut in two; not under torchrun."""
    received: list[int] = []
    wanted = () if dist.is_initialized() else (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, lambda number, _: received.append(number)) for name in wanted]
    try:
        yield received
    finally:
        for name, handler in zip(wanted, before):
            signal.signal(name, handler)


class Run:
    """One training's files: PATH.resume.pt while it goes on, PATH.pt and PATH.json once it is done.

    settings: what a run must share to go on, or to count as done (else InputError).  record: the
    finished run's, or None.  notes: what the resume file keeps; a script may add to them.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.record = None
        self.notes = {"settings": settings, "curve": []}
        self.resume = path.with_name(f"{path.name}.resume.pt")
        done = path.with_name(f"{path.name}.json")
        file = done if done.exists() else self.resume
        with naming(file, "is of no run, delete it"):
            found = self.notes
            if done.exists():
                found = self.record = json.loads(done.read_text(encoding="utf-8"))
            elif self.resume.exists():
                found = self.notes = read_torch(self.resume)["notes"]
            found = dict(found["settings"])
            self.curve = self.notes["curve"]
        other = {key: found.get(key) for key in settings if found.get(key) != settings[key]}
        if other:
            raise InputError(f"{file} was made with {other}: use another --out, or delete it")
        if self.record:
            say(f"{done} is there: done")

    def files(self, every: int) -> dict:
        """Options of train: the resume file, written every so many steps."""
        return {"checkpoint": self.resume, "checkpoint_every": every, "notes": self.notes}

    def show(self, step: int, steps: int, stats: dict, scores: dict | None = None) -> None:
        """A line with losses, last scores and time left; given scores, a point of the curve too."""
        point = {"step": step, "minutes": stats["seconds"] / 60}
        point |= {name: float(stats[name]) for name in ("reveal", "remask", "keep")}
        if scores is not None:
            self.curve.append(point | scores)
        shown = (self.curve[-1] if self.curve else {}) | point
        text = " ".join(f"{name} {shown[name]:.3f}" for name in [*shown][2:])
        left = stats["seconds"] / step * (steps - step)
        say(f"{self.path.name} {step}/{steps} {text} {left // 60:.0f}:{left % 60:02.0f} left")

    def finish(self, model: nn.Module, task: str, **record) -> dict:
        """The record, completed; writes it beside the checkpoint, which holds it as its info."""
        record |= {
            "settings": self.notes["settings"],
            "curve": self.curve,
            "minutes": self.curve[-1]["minutes"] if self.curve else None,
            "params": sum(p.numel() for p in model.parameters()),
            "provenance": provenance(model.embedding.device),
        }
        if is_main_process():
            save_checkpoint(self.path.with_name(f"{self.path.name}.pt"), model, task, **record)
            write_json(self.path.with_name(f"{self.path.name}.json"), record)
            self.resume.unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()  # what comes next may read the files
        return record


# ------------------------------------------------------------------------------------------------
# 8. Devices, files, and how a script starts and ends


class InputError(ValueError):
    """Something the user gave is wrong.  run_script makes it one line on stderr, exit code 2."""


@contextlib.contextmanager
def naming(what: Path | str, verdict: str) -> Iterator[None]:
    """Whatever fails in this block becomes an InputError: WHAT VERDICT: the reason, in a line."""
    try:
        yield
    except InputError:  # says it already
        raise
    except Exception as error:  # torch.load alone raises half a dozen kinds
        reason = f"{type(error).__name__} {error}".splitlines()[0][:120]
        raise InputError(f"{what} {verdict}: {reason}") from None


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main; what the user gave wrong, or stopped, ends in one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character
    try:
        main()
        if dist.is_initialized():  # all is written; gloo's threads may abort an orderly end
            sys.stdout.flush()
            os._exit(0)
    except (InputError, OSError, KeyboardInterrupt) as error:
        what = f"error: {error}" if str(error) else "stopped"
        print(f"{Path(sys.argv[0]).name}: {what}", file=sys.stderr)
        sys.exit(2 if str(error) else 130)


def start_device(name: str = "auto") -> torch.device:
    """The device to work on; under torchrun also joins the process group (nccl or gloo).

    name: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".  InputError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with naming(f"device {name!r}", "is not there"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    if processes > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def is_main_process() -> bool:
    """Whether this process reports and writes: always, but under torchrun only the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(line: str) -> None:
    if is_main_process():
        print(line, flush=True)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is in hardware there: most GPUs, processors with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 autocast where bf16 is in hardware; nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def provenance(device: torch.device) -> dict:
    """Where a figure comes from: command, commit, device, threads, version, date."""
    describe = "git describe --always --dirty --abbrev=10"
    how = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(describe, **how).stdout.strip()
    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit or "unknown",  # no git, or no checkout
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def replace_file(path: Path, write: Callable[[Path], None], tell: bool = True) -> None:
    """write(a temporary file), then a rename: a killed run leaves the old file or the new one."""
    regular = path.is_file() or not path.exists()  # else, a pipe or a device, it is written into
    target = path.resolve()  # a link is followed
    with naming(path, "cannot be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        where = target.parent if regular else None
        with tempfile.TemporaryDirectory(suffix=".tmp", dir=where) as folder:
            temporary = Path(folder, path.name)
            write(temporary)
            if regular:
                os.replace(temporary, target)
            else:
                path.write_bytes(temporary.read_bytes())
    if tell:
        print(f"wrote {path}", flush=True)


def write_json(path: Path | None, contents: dict | list) -> None:
    """Writes JSON by rename, and says so; nothing without a path, or in torchrun's others."""
    if path and is_main_process():
        text = json.dumps(contents, indent=1) + "\n"
        replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank; UTF-8, BOM or not.  InputError: none."""
    with naming(path, "cannot be read"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
        require(len(numbered) > 0, "it is empty")
    return numbered


def fingerprint(*data: Tensor | str) -> str:
    """A checksum of what a model is trained and scored on, so that other data is noticed."""
    checksum = 0
    for part in data:
        raw = part.encode() if isinstance(part, str) else part.cpu().numpy().tobytes()
        size = len(raw) if isinstance(part, str) else [*part.shape]
        checksum = zlib.crc32(f"{size} ".encode() + raw, checksum)
    return f"{checksum:08x}"


def save_checkpoint(path: Path, model: MaskDiffusionTransformer, task: str, **info) -> None:
    """Weights, config, task and whatever else info holds (numbers, text, lists), by rename."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    contents = {"task": task, "config": asdict(model.config), "model": state, "info": info}
    replace_file(path, partial(torch.save, contents))


def load_checkpoint(
    path: Path, task: str, device: torch.device | str = "cpu", needs: tuple[str, ...] = (),
    build: Callable[[dict], MaskDiffusionTransformer] | None = None,
) -> tuple[MaskDiffusionTransformer, dict]:  # fmt: skip
    """The model, in evaluation mode, and the info saved with it; no code in the file is run.

    needs: what info must hold.  build: makes the model from info, in place of the config.
    InputError: the file is missing, no checkpoint or another task's, or its weights not finite.
    """
    saved = read_torch(path, device)
    found = saved.get("task", "none: a training state, not a model")
    with naming(path, "does not fit"):
        require(found == task, f"it is a checkpoint of task {found!r}, expected {task!r}")
        config = TransformerConfig(**saved["config"])
        model = build(saved["info"]) if build else MaskDiffusionTransformer(config)
        model.to(device).load_state_dict(saved["model"])
        missing = [name for name in needs if name not in saved["info"]]
        require(not missing, f"it does not say its {', '.join(missing)}")
        finite = all(bool(value.isfinite().all()) for value in model.state_dict().values())
        require(finite, "it has weights that are not finite")
    return model.eval(), saved["info"]


def read_torch(path: Path, device: torch.device | str = "cpu") -> dict:
    """A dict that torch.save wrote.  Raises InputError for anything else."""
    with naming(path, "cannot be read as a checkpoint"):
        saved = torch.load(path, map_location=device, weights_only=True)
        require(isinstance(saved, dict), f"it holds a {type(saved).__name__}")
    return saved


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score method; (0, 1) for no data."""
    if not count:
        return 0.0, 1.0
    z = 1.959964
    middle = (successes + z * z / 2) / (count + z * z)
    spread = math.sqrt(successes * (count - successes) / count + z * z / 4)
    half = z / (count + z * z) * spread
    return max(0.0, middle - half), min(1.0, middle + half)  # rounding may leave [0, 1]


def bootstrap_interval(values: list[int], draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of values, one a prompt or board, by resampling these."""
    values = torch.tensor(values, dtype=torch.float)
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(0, draws, 500):
        resampled = torch.randint(len(values), (500, len(values)), generator=generator)
        means.append(values[resampled].mean(-1))
    return tuple(torch.cat(means).quantile(torch.tensor([0.025, 0.975])).tolist())


def paired_bootstrap(ours: str, theirs: str) -> dict:
    """Share right, ours minus theirs ("0" and "1" a case): difference and its 95 % interval."""
    values = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    difference = sum(values) / len(values)
    return {"difference": difference, "ci95": bootstrap_interval(values), "n": len(values)}


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 3.6):
    """(figure, axes [rows, columns]) of matplotlib; without pyplot, so no screen is needed."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    """Writes the figure as PNG by rename, and says so."""
    replace_file(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def draw_lines(
    path: Path, lines: dict[str, list[tuple]], xlabel: str, ylabel: str, log: bool = False
) -> None:
    """Shares in % against x.  lines: label -> (x, share, (low, high) of 95 % or None) a point."""
    figure, ((axis,),) = new_figure(width=5.0, height=3.4)
    for label, points in lines.items():
        x, share, interval = zip(*points)
        (line,) = axis.plot(x, [100 * y for y in share], "o-", markersize=3, label=label)
        if None not in interval:
            low, high = ([100 * bound for bound in bounds] for bounds in zip(*interval))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if log:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------
# 9. The command line


class Options(argparse.ArgumentParser):
    """argparse with errors of one line, and groups that name the modes that read them.

    An option given in a mode that would ignore it is an error.  parse adds args.mode and
    args.given, the names of the options given.  small: what --smoke sets where it was not given.
    """

    def group(self, title: str, *modes: str) -> Callable[..., None]:
        group = self.add_argument_group(title)

        def add(*names: str, modes: tuple[str, ...] = modes, **keywords) -> None:
            group.add_argument(*names, **keywords).modes = modes

        return add

    def general(self, out: str, seed: str = "of training", out_modes=(), seed_modes=()) -> None:
        """The options that every script has; out, seed and their modes differ."""
        self.out = Path(__file__).parent / out
        add = self.group("general")
        add("--seed", type=number(int, 0, 999_999), default=0, modes=seed_modes, help=f"{seed} (0)")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
        where = f"default {out}, with --smoke runs/smoke"
        add("--out", type=Path, metavar="DIR", modes=out_modes, help=where)
        add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
        add("--smoke", action="store_true", help="everything tiny, in seconds, to see that it runs")

    def parse(self, mode_of: Callable[..., str], small: dict) -> argparse.Namespace:
        defaults = {action.dest: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        given = vars(self.parse_args())
        small = small if "smoke" in given else {}
        args = argparse.Namespace(**{**defaults, **small, **given}, given={*given})
        args.mode = mode_of(args)
        for action in self._actions:
            modes = getattr(action, "modes", ())
            if action.dest in given and modes and args.mode not in modes:
                self.error(f"{action.option_strings[0]} has no effect with {args.mode}")
        for path in (args.json, args.out):
            if path:  # --out may name a picture; without an ending, or where one is, a folder
                picture = path.suffix == ".png" and not path.is_dir()
                check_writable(path if picture or path == args.json else path / "file")
        args.out = args.out or (self.out.with_name("smoke") if args.smoke else self.out)
        return args

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: an int or a float in low..high; nan and inf are neither."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must lie in {low:g}..{high:g}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: invalid int value
    return parse


def check_writable(path: Path) -> None:
    """InputError before the first step, not after the last, where a file cannot be written."""
    with naming(path, "cannot be written"):
        require(not path.is_dir(), "it is a folder")
        if path.is_file() or not path.exists():
            there = next(folder for folder in path.resolve().parents if folder.exists())
            tempfile.TemporaryFile(dir=there).close()
