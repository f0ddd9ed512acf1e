"""Reflective Masking (RM): a mask diffusion model that revises its own answer over several turns.

"Multi-Turn Reflective Masking Elicits Reasoning in Mask Diffusion Models", Zhang, Bian, Qi, Yao, Huang, Zhou,
2026, arXiv 2606.16700.  In reading order:

    1. MaskDiffusionTransformer   the network: input embeddings [B, N, D] -> logits [B, N, V]
    2. decide                     Eq. 1: keep, re-mask or reveal, every position at once
    3. oracle_action, revision_loss          what the right action is, and the three losses
    4. sample_trajectory          synthetic revisions to learn from; uniform_wrong, topk_wrong make the mistakes
    5. revise                     the multi-turn loop: Eq. 2, the network, Eq. 1, until nothing changes
    6. train                      a generator that trains on batches of revision states

Shapes: B sequences, N positions, V vocabulary with MASK, D width, T trajectory length.

What differs from the paper: a role's loss is divided by the number of all editable positions, so that the three add
up to the plain cross-entropy; train uses Muon; and, optional and off by default, second guesses (sample_trajectory),
training on the model's own revision states (train: own_states, accept) and a bias for positions that share a
coordinate (TransformerConfig.coordinates).
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from history import ABSENT, HistoryReference, history_embedding
from kernels import IGNORE, KEEP, REMASK, REVEAL, Decision  # IGNORE: the role of a position without a loss
from kernels import decide_from_hidden, decide_from_logits, revision_cross_entropy

# ---------------------------------------------------------------------------------------------------------------
# 1. The network


@dataclass
class TransformerConfig:
    """Size and position scheme; saved inside every checkpoint.

    positions: "learned" adds an embedding for each coordinate of a position; "rotary" turns queries and keys by the
    index, on a grid half of each head by the first coordinate and half by the second; "both" does both.
    coordinates: N rows of K small integers, the same length each: where position n is along each axis, for
    instance row and column of a pixel; None: the index alone.  With K >= 2, every head also learns one bias for
    each combination of coordinates that two positions share (same row, same row and column, ...).
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
        self.heads, self.rotary = config.heads, config.positions != "learned"
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_in = nn.Linear(width, config.feed_forward, bias=False)
        self.feed_forward_out = nn.Linear(config.feed_forward, width, bias=False)
        self.relation_bias = nn.Parameter(torch.zeros(config.heads, relations)) if relations else None
        nn.init.zeros_(self.attention_out.weight)  # every block starts as the identity
        nn.init.zeros_(self.feed_forward_out.weight)

    def forward(self, x: Tensor, relation: Tensor | None, rotation: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, D / heads] each
        if self.rotary:
            query, key = _rotate(query, rotation), _rotate(key, rotation)
        if self.relation_bias is None and x.is_cuda:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            # Written out: a bias that is learned keeps PyTorch from its fused attention, and on a CPU the backward
            # pass of that is far slower: 170 against 62 ms for a compiled bf16 step of 32 rows of 83 (4 layers).
            score = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
            if self.relation_bias is not None:
                score = score + self.relation_bias[:, relation]
            mixed = score.softmax(-1).to(value.dtype) @ value
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_forward_out(self.feed_forward_in(self.feed_forward_norm(x)).relu().square())


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """history.rotate_pairs by cosines and sines at hand: float [2, N, width / 2] of x's last two axes."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class MaskDiffusionTransformer(nn.Module):
    """A small transformer that reads input embeddings, so that History Reference can replace them.

    config: TransformerConfig.  embedding: the weight [V, D].  Called on float [B, N, D] (a(t) of Eq. 2) it
    returns logits, float [B, N, V], over the vocabulary with MASK.  Raises ValueError on an impossible config
    or input.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.positions not in ("learned", "rotary", "both"):
            raise ValueError(f"positions must be 'learned', 'rotary' or 'both', got {config.positions!r}")
        coordinates = torch.tensor(config.coordinates or [[n] for n in range(config.length)])
        axes = coordinates.shape[1]
        parts = config.heads * (2 if axes == 1 else 4)
        if config.width % parts:
            raise ValueError(f"width {config.width} must be a multiple of {parts}, heads {config.heads}")
        if config.coordinates and len(config.coordinates) != config.length:
            raise ValueError(f"coordinates has {len(config.coordinates)} rows, length is {config.length}")
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, config.width) * config.width**-0.5)
        shared = (coordinates[:, None] == coordinates[None, :]).long()  # [N, N, K]
        self.register_buffer("relation", (shared << torch.arange(axes)).sum(-1), persistent=False)
        self.register_buffer("coordinates", coordinates, persistent=False)
        if config.positions != "rotary":
            self.position = nn.ParameterList(
                nn.Parameter(torch.randn(int(column.max()) + 1, config.width) * 0.3) for column in coordinates.T
            )
        if config.positions != "learned":  # a table: torch.compile would work the angles out for every element
            turned = coordinates[:, :2].double().unsqueeze(-1)  # [N, 1 or 2, 1]
            pairs = config.width // config.heads // 2 // turned.shape[1]  # of an axis
            base = 10000.0 if axes == 1 else 100.0  # a sequence is long, a grid is short
            angle = (turned * base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)).flatten(1)
            table = torch.stack([angle.cos(), angle.sin()])
            self.register_buffer("rotation", table.to(torch.get_default_dtype()), persistent=False)
        self.blocks = nn.ModuleList(Block(config, 2**axes if axes > 1 else 0) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if x.shape[-1] != self.config.width or length > self.config.length:
            raise ValueError(
                f"input must be [B, N <= {self.config.length}, {self.config.width}], got {tuple(x.shape)}"
            )
        if self.config.positions != "rotary":
            x = x + sum(table[axis[:length]] for table, axis in zip(self.position, self.coordinates.T))
        rotation = self.rotation[:, :length] if self.config.positions != "learned" else None
        for block in self.blocks:
            x = block(x, self.relation[:length, :length], rotation)
        return self.head(self.norm(x))


# ---------------------------------------------------------------------------------------------------------------
# 2. Eq. 1, the decision rule


def reveal_confidence(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The best token (MASK excluded; ties go to the lowest id) and its log-probability among the tokens.

    logits: float [..., V].  Returns int64 [...] and float [...].  NaN and infinities: kernels.decide_from_logits.
    """
    tokens = torch.full(logits.shape[:-1], mask_id, device=logits.device)
    best, confidence, _, _ = decide_from_logits(logits, tokens, mask_id)
    return best, confidence


def decide(
    logits: Tensor,
    tokens: Tensor,
    mask_id: int,
    editable: Tensor | None = None,
    reveal: int | Tensor | None = None,
    allow_remask: bool = True,
    allow_reveal: bool = True,
    head: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Eq. 1: every position keeps its token, is re-masked, or is revealed, all at once.

        x != M and p(M) >  p(x): M            x != M and p(M) <= p(x): x            x = M: argmax over V without M

    Two probabilities of one softmax compare as their logits do, so no softmax is taken; the comparison itself is
    kernels.decide_from_logits.
    logits: float [B, N, V]; or, with head, the output weight [V, D], hidden states [B, N, D]: their logits are formed
    at masked positions only, a piece at a time (kernels.decide_from_hidden).
    tokens: int64 [B, N].  editable: bool [B, N] or [N]; elsewhere nothing changes.
    reveal: at most that many reveals a sequence (an int, or int64 [B]), the most confident first; None: all.
    allow_remask, allow_reveal: switch one kind off (the two phases of image editing).
    impl: "torch", "triton" or None, which is triton on a GPU.
    Returns the next tokens, int64 [B, N]; the input is not changed.  A NaN logit never re-masks (a comparison
    with NaN is false) and propagates into the argmax as in torch.  Raises ValueError on wrong shapes.
    """
    if isinstance(reveal, Tensor) and reveal.numel() not in (1, len(tokens)):
        raise ValueError(f"decide: reveal must be a number or [{len(tokens)}], got {tuple(reveal.shape)}")
    if not allow_reveal:  # then the masked rows need not even be read
        visible = tokens != mask_id
        editable = visible if editable is None else visible & editable
    if head is None:
        decision = decide_from_logits(logits, tokens, mask_id, editable, impl)
    else:
        decision = decide_from_hidden(logits, head, tokens, mask_id, editable, impl)
    return act(decision, tokens, mask_id, reveal, allow_remask)


def act(
    decision: Decision, tokens: Tensor, mask_id: int, reveal: int | Tensor | None = None, allow_remask: bool = True
) -> Tensor:
    """The next tokens when only the `reveal` most confident reveals of a sequence happen, or no re-masking."""
    if reveal is None and allow_remask:
        return decision.following
    following = decision.best
    if reveal is not None:
        rank = decision.confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # -inf: no reveal
        following = torch.where(rank < torch.as_tensor(reveal, device=tokens.device).reshape(-1, 1), following, tokens)
    return following.masked_fill(decision.remask, mask_id) if allow_remask else following


# ---------------------------------------------------------------------------------------------------------------
# 3. The oracle action and the three losses

def oracle_action(
    state: Tensor, clean: Tensor, mask_id: int, editable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The right action at every position: (target, role).  The only place that derives labels.

        M             -> reveal: target x*          wrong token -> re-mask: target M          right token -> keep it

    state, clean: int64 [..., N]; clean holds no MASK.  editable: bool, broadcastable; elsewhere the role is IGNORE,
    no loss.
    Returns target, int64, and role, int64 in {REVEAL, REMASK, KEEP, IGNORE}, of state's shape.
    """
    masked, right = state == mask_id, state == clean
    target = torch.where(masked | right, clean, mask_id)
    role = torch.where(masked, REVEAL, torch.where(right, KEEP, REMASK))
    if editable is not None:
        role = torch.where(editable, role, IGNORE)
    return target, role


def revision_loss(
    logits: Tensor,
    target: Tensor,
    role: Tensor,
    weights: tuple[float, float, float] = (1, 1, 1),
    head: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy to the oracle action, split by role: (total, reveal, remask, keep), scalars in nats.

    A part is the sum over its role's positions divided by the number of positions with any role, so that with
    weights (1, 1, 1) total is the mean cross-entropy over the editable positions, and an empty role counts 0.
    Its minimiser puts all mass of a visible position on {x_i, M}, with p(x_i) the probability that x_i is right.
    The total alone has a gradient; the parts are there to be watched.
    logits: float [..., V]; or, with head, the output weight [V, D], hidden states [..., D], whose logits are formed a
    chunk of rows at a time.  target, role: int64 [...], as oracle_action returns them.  weights: of the parts, in
    the order reveal, remask, keep; unequal weights of remask and keep move that probability.
    impl: "torch", "triton" or None, which is triton on a GPU.  Raises ValueError when the shapes differ.
    """
    return revision_cross_entropy(logits, target, role, weights, head, impl)


def weighted_reveal_loss(
    logits: Tensor, target: Tensor, role: Tensor, position_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of plain mask diffusion: the mean over the masked positions of weight times cross-entropy.

    position_weight: float, target's shape; LLaDA's is 1/t, t the share of masked positions.  Everything else, and what
    is returned, as for revision_loss, with zeros for re-mask and keep.
    """
    masked = role == REVEAL
    rows = logits[masked].to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(rows, target[masked], reduction="none")
    total = (loss * position_weight[masked]).sum() / max(loss.numel(), 1)
    return total, total.detach(), total.new_zeros(()), total.new_zeros(())


# ---------------------------------------------------------------------------------------------------------------
# 4. Synthetic revision trajectories


def uniform_wrong(clean: Tensor, choices: Tensor, count: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """A fixed corruption law: tokens drawn uniformly from choices, never the clean one.

    clean: int64 [B, N].  choices: int64 [C], C >= 2, without MASK.  Returns int64 [count, B, N], each draw
    independent.  Raises ValueError when there is nothing to choose from.
    """
    if choices.numel() < 2:
        raise ValueError(f"uniform_wrong: choices must name at least 2 tokens, got shape {tuple(choices.shape)}")
    shape = (count, *clean.shape)
    # One of the first C - 1; a draw that hits the clean token becomes the last: uniform over the C - 1 others
    # (C tokens where the clean one is not among the choices lose their last only there).
    drawn = choices[torch.randint(len(choices) - 1, shape, generator=generator, device=clean.device)]
    return torch.where(drawn == clean, choices[-1], drawn)


def topk_wrong(
    logits: Tensor, clean: Tensor, mask_id: int, k: int = 8, count: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Plausible mistakes: uniform over the k likeliest tokens of a frozen model, the truth and MASK excluded.

    logits: float [B, N, V] of the base model at masked positions (one forward pass).  clean: int64 [B, N].
    Returns int64 [count, B, N].  Raises ValueError when V < 3 leaves no wrong token.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"topk_wrong: logits must have V >= 3, got shape {tuple(logits.shape)}")
    allowed = logits.scatter(-1, clean.unsqueeze(-1), -torch.inf)
    allowed[..., mask_id] = -torch.inf
    ranked = allowed.topk(min(k, logits.shape[-1] - 2), dim=-1).indices
    pick = torch.randint(ranked.shape[-1], (*clean.shape, count), generator=generator, device=clean.device)
    return ranked.gather(-1, pick).movedim(-1, 0)


def sample_trajectory(
    clean: Tensor,
    editable: Tensor,
    wrong: Tensor,
    mask_id: int,
    T: int = 6,
    p_wrong: float | Tensor = 0.5,
    second_guess: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Synthetic revisions x(0), ..., x(T) of the paper: no rollouts, every position on its own clock.

    Each editable position draws a rule.  "Wrong", with probability p_wrong: its wrong token until beta, MASK until
    mu, then the truth; beta ~ U{1..T-1}, mu ~ U{beta+1..T}.  "Mask": MASK until mu ~ U{1..T}, then the truth.
    Elsewhere the truth throughout.
    second_guess (ours; the paper's law at 0) is the probability that what comes at mu is another wrong token
    instead, re-masked at a time ~ U{mu+1..T+1} and made right at a time ~ U{that+1..T+2}; times past T do not show.
    clean: int64 [B, N].  editable: bool [B, N]; where all of a sequence is editable x(0) has no right token at all, and
    a model learns to re-mask everything there: choose some positions, and compute the loss on all.
    wrong: int64 [B, N], or [2, B, N] with the second guesses last.
    p_wrong: a number, or float [B, 1] a sequence.  Returns int64 [T+1, B, N].  Raises ValueError on wrong shapes.
    """
    if wrong.ndim == clean.ndim:
        wrong = wrong.unsqueeze(0)
    if wrong.shape[1:] != clean.shape or editable.shape != clean.shape:
        raise ValueError(
            f"sample_trajectory: editable {tuple(editable.shape)} and wrong {tuple(wrong.shape)} must fit "
            f"clean {tuple(clean.shape)}"
        )
    if T < 2 or (second_guess and len(wrong) < 2):
        raise ValueError("sample_trajectory: T must be at least 2, and second_guess needs wrong of shape [2, B, N]")

    def uniform() -> Tensor:
        return torch.rand(clean.shape, generator=generator, device=clean.device)

    def time_from(low: Tensor | int, high: int) -> Tensor:  # U{low..high}; low > high gives high + 1: never
        return low + (uniform() * (high + 1 - low)).long()

    starts_wrong = uniform() < p_wrong
    beta = torch.where(starts_wrong, time_from(1, T - 1), 0)
    mu = torch.where(starts_wrong, time_from(beta + 1, T), time_from(1, T))
    step = torch.arange(T + 1, device=clean.device).view(-1, 1, 1)
    states = torch.where(step < beta, wrong[0], torch.where(step < mu, mask_id, clean))
    if second_guess:
        again = uniform() < second_guess
        beta = time_from(mu + 1, T + 1)
        mu2 = time_from(beta + 1, T + 2)
        guess = torch.where(step < beta, wrong[1], torch.where(step < mu2, mask_id, clean))
        states = torch.where(again & (step >= mu), guess, states)
    return torch.where(editable, states, clean)


def history_until(trajectory: Tensor, t: Tensor) -> Tensor:
    """Each sequence's states x(0), ..., x(t), the current one last: the input of history_embedding.

    trajectory: int64 [T+1, B, N].  t: int64 [B] in 0..T.  Returns int64 [max(t)+1, B, N]; a sequence with a
    smaller t has ABSENT in its oldest states.
    """
    length = int(t.max()) + 1
    index = torch.arange(length, device=t.device).unsqueeze(1) - (length - 1) + t  # [length, B]
    states = trajectory[index.clamp(min=0), torch.arange(len(t), device=t.device)]
    return states.masked_fill((index < 0).unsqueeze(-1), ABSENT)


# ---------------------------------------------------------------------------------------------------------------
# 5. Multi-turn revision

FIXED_POINT, CYCLE, OUT_OF_TURNS = "fixed point", "cycle", "out of turns"


@dataclass
class Revision:
    """What revise returns: tokens int64 [B, N] without MASK; turns (forward passes) and status, B each; with
    trace=True every state, int64 [turns + 1, B, N], where a finished sequence keeps its last one."""

    tokens: Tensor
    turns: list[int]
    status: list[str]
    trace: Tensor | None = None


@torch.no_grad()
def revise(
    denoiser: Callable[[Tensor], Tensor],
    tokens: Tensor,
    mask_id: int,
    history: HistoryReference,
    max_turns: int = 32,
    editable: Tensor | None = None,
    reveal: int | None = None,
    trace: bool = False,
    patience: int | None = None,
    rule: Callable[..., Tensor] | None = None,
    head: Tensor | None = None,
    impl: str | None = None,
    remask_limit: int | None = None,
) -> Revision:
    """Revises until nothing changes: at every turn Eq. 2 (history), one forward pass (denoiser), Eq. 1 (decide).

    denoiser: any callable from input embeddings [B, N, D] to logits [B, N, V], say the transformer above or
    lambda e: hf_model(inputs_embeds=e).logits.  tokens: int64 [B, N], MASK where nothing stands yet.
    history: HistoryReference on the model's embedding; it is reset first.  editable: as for decide.  reveal: an int.
    Finished sequences leave the batch, so a denoiser that holds something a sequence (a padding mask, say) must
    not count on B: revise such sequences one by one, or let it read what it needs from its input.
    rule: a baseline's rule in the place of Eq. 1, with decide's first parameters.
    head: the output weight [V, D]; denoiser then returns hidden states [B, N, D], and the logits of all positions are
    never formed.  impl: of decide; history has its own.
    remask_limit: re-masks of one position at most (6 in the released text code); None: no limit.

    A sequence ends, leaves the batch and gets its status when
      FIXED_POINT   the turn changed nothing.  With history the memory still changes after that, so a later
                    turn might differ; an unchanged state counts as settled all the same, as in the released code.
      CYCLE         a state came back `patience` times.  None: once without history (gamma 0), where the loop is
                    then certain; three times with history, where the memory differs at each return.
      OUT_OF_TURNS  max_turns forward passes were made.
    In the last turn, and at a cycle, masked positions are revealed and none is re-masked, so no MASK is left.
    Raises ValueError for a MASK that may not be edited, for max_turns < 1, and for a rule together with head or impl.
    """
    if max_turns < 1:
        raise ValueError(f"revise: max_turns must be at least 1, got {max_turns}")
    eq1 = partial(decide, head=head, impl=impl)
    rule = None if rule is decide else rule
    if rule is not None and (head is not None or impl is not None):
        raise ValueError("revise: head and impl belong to Eq. 1; rule replaces it")
    batch = len(tokens)
    free = torch.ones_like(tokens, dtype=torch.bool) if editable is None else editable.expand_as(tokens)
    if ((tokens == mask_id) & ~free).any():
        raise ValueError("revise: tokens has MASK at a position that editable locks")
    history.reset()
    returns_allowed = patience or (3 if history.gamma else 1)
    result, turns, status = tokens.clone(), [0] * batch, [OUT_OF_TURNS] * batch
    states = [result.clone()]
    running = torch.arange(batch, device=tokens.device)  # the rows of the batch still at work
    remasked = torch.zeros_like(tokens)  # how often each position was, for remask_limit
    returns: list[dict[bytes, int]] = [{key: 0} for key in _row_keys(tokens)]  # how often each state came back
    for turn in range(1, max_turns + 1):
        logits = denoiser(history.push(tokens))  # Eq. 2 and the network; with head, these are hidden states
        following = (rule or eq1)(logits, tokens, mask_id, editable=free, reveal=reveal)  # Eq. 1
        if remask_limit is not None:
            doubted = (tokens != mask_id) & (following == mask_id)
            following = torch.where(doubted & (remasked >= remask_limit), tokens, following)
            remasked = remasked + doubted
        settled = (following == tokens).all(-1).tolist()
        ends = torch.zeros(len(running), dtype=torch.bool)
        for i, (row, key) in enumerate(zip(running.tolist(), _row_keys(following))):
            returns[row][key] = returns[row].get(key, -1) + 1
            if settled[i]:
                status[row] = FIXED_POINT
            elif returns[row][key] >= returns_allowed:
                status[row] = CYCLE
            ends[i] = status[row] != OUT_OF_TURNS or turn == max_turns
            turns[row] = turn
        if ends.any():
            ends = ends.to(tokens.device)
            last = ends & (following == mask_id).any(-1)  # these would end with a MASK
            if last.any():
                complete = eq1(logits[last], tokens[last], mask_id, editable=free[last], allow_remask=False)
                following[last] = torch.where(following[last] == mask_id, complete, following[last])
        result[running] = following
        if trace:
            states.append(result.clone())
        if ends.all():
            break
        if ends.any():
            history.keep(~ends)
            following, free, running = following[~ends], free[~ends], running[~ends]
            remasked = remasked[~ends]
        tokens = following
    return Revision(result, turns, status, torch.stack(states) if trace else None)


def _row_keys(tokens: Tensor) -> list[bytes]:
    """Each row's state as bytes, exact, so that equal keys mean equal states."""
    return [row.tobytes() for row in tokens.cpu().numpy()]


# ---------------------------------------------------------------------------------------------------------------
# 6. Training

# A batch: states int64 [K, B, N] oldest first with ABSENT where a history is shorter (history_until), clean int64
# [B, N], editable bool [B, N] or None: the positions that have a loss.  With a fourth element, float [B, N], the masked
# positions alone have a loss, weighted by it (weighted_reveal_loss).
Batch = tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor]


def train(
    model: MaskDiffusionTransformer,
    sample: Callable[[int, torch.Generator], Batch],
    steps: int,
    mask_id: int,
    batch_size: int = 64,
    gamma: float = 0.9,
    rotate: bool = True,
    learning_rate: float = 2.5e-3,
    muon_factor: float = 8,
    warmup: int = 200,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    weights: tuple[float, float, float] = (1, 1, 1),
    own_states: float = 0.0,
    window: int = 12,
    accept: Callable[[Tensor], Tensor] | None = None,
    precision: str = "float32",
    compile: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    notes: dict | None = None,
    seed: int = 0,
    oracle: Callable[..., tuple[Tensor, Tensor]] = oracle_action,
    rule: Callable[..., Tensor] = decide,
) -> Iterator[tuple[int, dict]]:
    """Trains in place; yields (step, stats) after every step: for step, stats in train(...).

    sample(batch_size, generator) returns a Batch on the model's device; the generator is seeded by (seed, step),
    so a run can be resumed anywhere.  Optimiser: Muon for the matrices of the blocks, AdamW for the rest;
    learning_rate is AdamW's, Muon's is muon_factor times that (an update of Muon has about the spectral norm 1); linear
    warm-up over warmup steps, cosine to 0.
    clip: largest gradient norm.  gamma, rotate: Eq. 2.  weights: revision_loss.
    own_states: the share of the batch that goes on from the model's own decision of the step before (Eq. 1 on the
    logits of the training step, so it costs no forward pass) until it settles or has window states.  The oracle
    labels any state, so these need no other loss.  Ours; the paper trains on synthetic trajectories alone (0).
    accept: a check that needs no truth, int64 [B, N] -> bool [B], such as the rules of a puzzle or the tests of a
    program; a state it accepts ends its row too.  Meant for inputs with several equally likely answers, where the
    oracle calls a good answer wrong as often as not; alone it has shown no gain yet.
    precision: "float32" or "bf16" (autocast).  compile: torch.compile the network.
    checkpoint: a file, written by rename after every checkpoint_every steps, when the caller asks for the next; when
    it exists the run goes on from it, on CPU with the same result as an unbroken run.  notes: saved in it as it is.
    oracle, rule: the labels and the decision rule, for baselines that are trained otherwise.
    Under torchrun every process draws the same batch and takes its own rows, so P processes train as one would.
    stats: loss, reveal, remask, keep (nats, 0-d tensors, this process's rows), learning_rate, seconds (of training
    so far, without what the caller does between steps).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if batch_size % world:
        raise ValueError(f"train: batch_size {batch_size} must be a multiple of the {world} processes")
    if precision not in ("float32", "bf16"):
        raise ValueError(f"train: precision must be 'float32' or 'bf16', got {precision!r}")
    device = model.embedding.device
    network = torch.compile(model) if compile else model

    class Step(nn.Module):  # everything that has a gradient, so that DDP sees it
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, states: Tensor) -> Tensor:
            inputs = history_embedding(states, self.model.embedding, gamma, rotate)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                return network(inputs).float()

    forward = Step()
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(forward)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) >= 16]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, muon_factor * learning_rate, weight_decay=weight_decay))

    def scale(step: int) -> float:
        return min((step + 1) / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]

    start, seconds, carried = 0, 0.0, None
    if checkpoint and Path(checkpoint).exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for part, state in zip(optimizers + schedules, saved["optimization"]):
            part.load_state_dict(state)
        start, seconds = saved["step"], saved["seconds"]
        carried = saved["carried"][rank] if len(saved["carried"]) == world else None
    generator = torch.Generator(device)
    own = torch.arange(batch_size, device=device) < round(own_states * batch_size)
    own = own[rank::world].view(-1, 1)
    for step in range(start, steps):
        began = time.perf_counter()
        generator.manual_seed(seed * 1_000_003 + step)
        states, clean, editable, *more = sample(batch_size, generator)
        states, clean = states[:, rank::world], clean[rank::world]
        position_weight = more[0][rank::world] if more else None
        editable = None if editable is None else editable[rank::world]
        if own_states:
            if position_weight is not None:
                raise ValueError("train: a batch with weights of positions cannot be combined with own_states")
            if len(states) > window:
                raise ValueError(f"train: window {window} is shorter than the history of {len(states)} states")
            absent = states.new_full((window - len(states), *clean.shape), ABSENT)
            states = torch.cat([absent, states])
            editable = torch.ones_like(clean, dtype=torch.bool) if editable is None else editable
            if carried:
                goes_on = carried["goes_on"]
                states = torch.where(goes_on, carried["states"], states)
                clean = torch.where(goes_on, carried["clean"], clean)
                editable = torch.where(goes_on, carried["editable"], editable)
        target, role = oracle(states[-1], clean, mask_id, editable)
        logits = forward(states)
        if position_weight is None:
            total, reveal, remask, keep = revision_loss(logits, target, role, weights)
        else:
            total, reveal, remask, keep = weighted_reveal_loss(logits, target, role, position_weight)
        for optimizer in optimizers:
            optimizer.zero_grad()
        objective = total
        if world > 1:  # every process divided by its own editable positions; DDP's mean needs everyone's
            count = (role != IGNORE).sum()
            everyone = count.clone()
            dist.all_reduce(everyone)
            objective = total * (count * world / everyone.clamp(min=1))
        objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for part in optimizers + schedules:
            part.step()
        if own_states:  # the model's own next state, from the logits at hand
            following = rule(logits.detach(), states[-1], mask_id, editable)
            changed = (following != states[-1]).any(-1, keepdim=True)
            if accept is not None:
                changed &= ~accept(following).unsqueeze(-1)
            carried = {
                "states": torch.cat([states[1:], following.unsqueeze(0)]),
                "clean": clean,
                "editable": editable,
                "goes_on": own & changed & (states[0, :, :1] == ABSENT),
            }
        seconds += time.perf_counter() - began
        yield step + 1, {
            "loss": total.detach(),
            "reveal": reveal.detach(),
            "remask": remask.detach(),
            "keep": keep.detach(),
            "learning_rate": schedules[0].get_last_lr()[0],
            "seconds": seconds,
        }
        if checkpoint and (step + 1) % checkpoint_every == 0:
            everyones = [carried]
            if world > 1:  # every process carries its own rows
                everyones = [None] * world
                dist.all_gather_object(everyones, carried)
            saved = {"model": model.state_dict(), "step": step + 1, "seconds": seconds, "notes": notes}
            saved |= {"optimization": [part.state_dict() for part in optimizers + schedules], "carried": everyones}
            if rank == 0:
                _write(saved, checkpoint)


# ---------------------------------------------------------------------------------------------------------------
# 7. Devices, checkpoints, records, and how a script ends


class InputError(ValueError):
    """Something the user gave is wrong.  run_script makes it one line on stderr and exit code 2."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main; what the user gave wrong, or a file that cannot be read or written, ends in one line."""
    try:
        main()
        if dist.is_initialized():  # all is written; gloo's threads now and then abort an orderly end of the process
            sys.stdout.flush()
            os._exit(0)
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def start_device(name: str = "auto") -> torch.device:
    """The device to work on; under torchrun also joins the process group (nccl on GPU, gloo on CPU).

    name: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".  Raises InputError when it is not there.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from None
    if processes > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def best_precision(device: torch.device) -> str:
    """"bf16" on a GPU and on a processor with bf16 instructions, where autocast is faster; else "float32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def is_main_process() -> bool:
    """Whether this process reports and writes: always, but under torchrun only the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def provenance() -> dict:
    """Where a figure comes from: command, commit, device, threads, versions."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.check_output(describe, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = "unknown"
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor_name()
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit.strip(),
        "device": processor,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _write(contents: dict, path: Path) -> None:
    """Writes to a temporary file and renames, so that a killed run leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(contents, temporary)
    os.replace(temporary, path)


def save_checkpoint(path: Path, model: MaskDiffusionTransformer, task: str, **info) -> None:
    """Weights, config, task and whatever else info holds (numbers, text, lists), by rename."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    _write({"task": task, "config": asdict(model.config), "model": state, "info": info}, path)


def load_checkpoint(
    path: Path, task: str, device: torch.device | str = "cpu", needs: tuple[str, ...] = ()
) -> tuple[MaskDiffusionTransformer, dict]:
    """The model, in evaluation mode, and the info saved with it; weights_only, so no code in the file is run.

    needs: what info must hold, too.
    Raises InputError when the file is missing, is no checkpoint of this project or belongs to another task.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found = saved.get("task", "none: a training state, not a model")
        if found == task:
            model = MaskDiffusionTransformer(TransformerConfig(**saved["config"])).to(device)
            model.load_state_dict(saved["model"])
            missing = [name for name in needs if name not in saved["info"]]
            if missing:
                raise ValueError(f"it does not say its {', '.join(missing)}")
            return model.eval(), saved["info"]
    except Exception as error:  # torch.load alone raises half a dozen kinds on a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a checkpoint: {reason[:120]}") from None
    raise InputError(f"{path} is a checkpoint of task {found!r}, expected {task!r}")


def write_json(path: Path, contents: dict) -> None:
    """Writes JSON by rename, and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(contents, indent=1) + "\n")
    temporary.replace(path)
    print(f"wrote {path}")


def require_same(settings: dict, found: dict, path: Path) -> None:
    """A run goes on, or counts as done, only under the settings it was started with.  Raises InputError."""
    other = {key: found.get(key) for key in settings if found.get(key) != settings[key]}
    if other:
        raise InputError(f"{path} was made with {other}: use another --out, or delete it")


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score method; (0, 1) for no data."""
    if not count:
        return 0.0, 1.0
    z, share = 1.959964, successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)  # rounding may leave [0, 1]
