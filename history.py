"""History Reference: what the model reads in place of the current embedding.

Equation 2 of "Multi-Turn Reflective Masking Elicits Reasoning in Mask Diffusion Models"
(Zhang et al., 2026, arXiv 2606.16700), followed by an RMSNorm without weight:

    a(t) = sum_{k=0..t}  gamma^(t-k) * R_(k-t) * wte(x(k))     the closed sum: history_embedding
    a(t) = wte(x(t)) + gamma * R_(-1) * a(t-1)                 the same, O(1): HistoryReference

R_delta (HER, History Embedding Rotation) rotates the pair (j, j + D/2) by delta * 10000^(-2j/D), so
R_a R_b = R_(a+b).  Variants: "rm", gamma = 0, no history; "hr", gamma = 1, and "decay", gamma < 1,
without rotation; "full", gamma < 1, with it.  A GPU runs kernels.py instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import check_history, check_ids, require, use_triton  # input checks; which path runs

ABSENT = -1  # a token id that stands for "no state yet": it adds nothing to the sum


def rotate_pairs(x: Tensor, delta: Tensor | float) -> Tensor:
    """R_delta x, which rotates the pair (j, j + D/2) by delta * 10000^(-2j/D) radians.

    x: float [..., D], D even (else ValueError).  delta: a number, or a tensor that broadcasts
    against x's [..., 1].  Returns the shape that both broadcast to, x's dtype.
    """
    width = x.shape[-1]
    require(width % 2 == 0, f"x must have an even last dimension, got shape {[*x.shape]}")
    # Angles in float64: at age 1,000 a float32 angle is off by 3e-5, at age 1 by 3e-8.
    pair = torch.arange(0, width, 2, dtype=torch.float64, device=x.device)
    frequency = 10000.0 ** (-pair / width)
    angle = torch.as_tensor(delta, dtype=torch.float64, device=x.device) * frequency
    return rotate_by(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its pairs (j, j + D/2) turned by the angles of these cosines and sines."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(a: Tensor) -> Tensor:
    """RMSNorm without learned weight over the last axis."""
    return F.rms_norm(a, a.shape[-1:], eps=1e-6)


def history_embedding(
    states: Tensor, embedding: Tensor, gamma: float = 0.9, rotate: bool = True,
    normalize: bool = True, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 2 as the closed sum; differentiable in the embedding; what training uses.

    states: int64 [t+1, B, N], oldest first, the current state last; ABSENT (-1) where a sequence
    has a shorter history.  embedding: float [V, D].  gamma in [0, 1] (the paper states none; 0.9
    misleads far beyond the turns trained on); 0 reads the current state alone.  rotate: HER.
    normalize: the RMSNorm (eps 1e-6).  impl: "torch", "triton" or None, triton on a GPU.  Returns
    [B, N, D] in the embedding's dtype, summed in float32 or more.
    ValueError: wrong shapes, gamma outside [0, 1], odd D with rotate, on CPU unknown ids.
    """
    require(states.ndim == 3 and len(states), f"states must be [t+1, B, N], got {[*states.shape]}")
    check_history(embedding, gamma, rotate)
    check_ids("states", states, None, embedding.device, ABSENT, len(embedding))
    if gamma == 0:
        states = states[-1:]
    if use_triton(impl, embedding):
        return kernels.history_sum(states, embedding, gamma, rotate, normalize)

    # Rotation and decay are linear: each token that occurs ages once, then positions look it up.
    tokens, lookup = states.unique(return_inverse=True)
    table = wide(F.embedding(tokens.clamp(min=0), embedding))
    table = table * (tokens != ABSENT).unsqueeze(-1)
    total = 0
    for age, rows in enumerate(lookup.flip(0)):  # age = t - k
        aged = rotate_pairs(table, -age) if rotate else table  # R_(k-t)
        total = total + F.embedding(rows, gamma**age * aged)  # Eq. 2
    return (rms_norm(total) if normalize else total).to(embedding.dtype)


class HistoryReference:
    """Eq. 2 by the recurrence: one [B, N, D] buffer and one addition a turn, at any length.

    embedding: float [V, D].  gamma, rotate, normalize, impl: as in history_embedding.  After x(0),
    ..., x(t) are pushed it has returned history_embedding([x(0), ..., x(t)]), without gradient.
    """

    def __init__(
        self, embedding: Tensor, gamma: float = 0.9, rotate: bool = True,
        normalize: bool = True, impl: str | None = None,
    ):  # fmt: skip
        check_history(embedding, gamma, rotate)
        self.embedding = embedding
        self.gamma = gamma
        self.rotate = rotate
        self.normalize = normalize
        self.impl = impl
        self.reset()

    @torch.no_grad()
    def push(self, tokens: Tensor) -> Tensor:
        """Adds tokens, int64 [B, N] as before; returns RMSNorm(a(t)), [B, N, D].  ValueError."""
        expected = tokens.shape if self.sum is None else self.sum.shape[:-1]
        check_ids("tokens", tokens, expected, self.embedding.device, 0, len(self.embedding))
        if use_triton(self.impl, self.embedding):
            how = (self.embedding, self.gamma, self.rotate, self.normalize)
            self.sum, read = kernels.history_step(self.sum, tokens, *how)
            return read

        a = wide(F.embedding(tokens, self.embedding))  # wte(x(t))
        if self.sum is not None and self.gamma:
            past = rotate_pairs(self.sum, -1) if self.rotate else self.sum
            a = a + self.gamma * past  # Eq. 2: a(t) = wte(x(t)) + gamma R_(-1) a(t-1)
        self.sum = a
        return (rms_norm(a) if self.normalize else a).to(self.embedding.dtype)

    def reset(self) -> None:
        """Forgets every state; the next push may have any shape."""
        self.sum: Tensor | None = None  # a(t-1) before the norm, at least float32

    def keep(self, rows: Tensor) -> None:
        """Keeps the sequences that rows names (int64 indices or bool [B]); the rest have ended."""
        if self.sum is not None:
            self.sum = self.sum[rows]
