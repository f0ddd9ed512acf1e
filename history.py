"""History Reference: what the model reads in place of the current embedding.

Equation 2 of "Multi-Turn Reflective Masking Elicits Reasoning in Mask Diffusion Models"
(Zhang et al., 2026, arXiv 2606.16700), followed by an RMSNorm without weight:

    a(t) = sum_{k=0..t}  gamma^(t-k) * R_(k-t) * wte(x(k))          the closed sum: history_embedding
    a(t) = wte(x(t)) + gamma * R_(-1) * a(t-1)                      the same, O(1) a turn: HistoryReference

R_delta turns the pair of coordinates (j, j + D/2) by delta * 10000^(-2j/D) (History Embedding Rotation),
so R_a R_b = R_(a+b) and a state's age stays readable from the sum.  Four variants, one formula:

    plain RM, no history       gamma = 0
    + HR                       gamma = 1,  rotate=False
    + HR + decay               gamma < 1,  rotate=False
    + HR + decay + HER         gamma < 1,  rotate=True       (the paper's full method)

Differences from the paper's released code are listed in the README.  This file needs kernels.py and no other: copy
the two out together.
"""

import torch
from torch import Tensor

from kernels import check_history, check_ids, history_step, history_sum, rms_norm

ABSENT = -1  # a token id that stands for "no state yet": it adds nothing to the sum


def rotate_pairs(x: Tensor, delta: Tensor | float) -> Tensor:
    """R_delta x: the pair (j, j + D/2) of the last axis turns by delta * 10000^(-2j/D) radians (HER).

    x: float [..., D], D even.  delta: a number, or float of a shape that broadcasts against x's [..., 1].
    Returns x's shape and dtype.  Raises ValueError when D is odd.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"rotate_pairs: x must have an even last dimension, got shape {tuple(x.shape)}")
    # Angles in float64: at age 1,000 a float32 angle has already lost four digits.
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angle = torch.as_tensor(delta, dtype=torch.float64, device=x.device) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def history_embedding(
    states: Tensor,
    embedding: Tensor,
    gamma: float = 0.9,
    rotate: bool = True,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Eq. 2 as the closed sum; differentiable in the embedding; what training uses.

    states: int64 [T+1, B, N], oldest first; the last is the current state.  A sequence with a shorter
    history has ABSENT (-1) in its oldest states.  embedding: float [V, D].  gamma in [0, 1]; 0 reads the
    current state alone.  rotate: History Embedding Rotation.  normalize: the RMSNorm after the sum.
    impl: "torch", "triton" or None, which takes the fastest there is: for a small vocabulary a matrix product, else
    kernels.history_sum, whose Triton kernel runs on a GPU.
    Returns [B, N, D] in the embedding's dtype; sums in at least float32.  Raises ValueError on wrong shapes, a gamma
    outside [0, 1] and, on CPU, ids that the embedding lacks.
    """
    if states.ndim != 3 or not len(states):
        raise ValueError(f"history_embedding: states must be [T+1, B, N] with T >= 0, got {tuple(states.shape)}")
    states = states if gamma else states[-1:]
    turns, vocabulary = len(states), len(embedding)
    if impl == "triton" or vocabulary * turns > min(states[0].numel(), 512):
        return history_sum(states, embedding, gamma, rotate, normalize, impl)

    # Rotation and decay are linear: with a small vocabulary, age the V embeddings once a turn; the sum over turns is
    # then one product of 0/1 indicators [B*N, (T+1)*V] with that table, ten times faster on a CPU than T+1 lookups
    # and their scattered gradients.  On a GPU too, where those gradients would queue for the same V rows.
    check_history(embedding, gamma, rotate)
    check_ids("states", states, None, embedding.device, ABSENT, vocabulary)
    ages = torch.arange(turns - 1, -1, -1, device=states.device).view(-1, 1, 1)
    table = embedding if embedding.dtype == torch.float64 else embedding.float()
    table = rotate_pairs(table, -ages) if rotate else table.expand(turns, -1, -1)
    table = (table * (gamma ** ages.double()).to(table.dtype)).flatten(0, 1)  # row k*V + v: token v at turn k, aged
    columns = torch.where(states == ABSENT, len(table), states + vocabulary * ages.flip(0)).flatten(1).T
    indicator = table.new_zeros(len(columns), len(table) + 1).scatter_(1, columns, 1)  # ABSENT: the last
    with torch.autocast(table.device.type, enabled=False):  # not in bf16, whatever the caller's autocast says
        total = (indicator[:, :-1] @ table).view(*states.shape[1:], -1)
    return (rms_norm(total) if normalize else total).to(embedding.dtype)


class HistoryReference:
    """Eq. 2 by the recurrence: one [B, N, D] buffer and one addition a turn, however long the history.

    embedding: float [V, D] (not copied).  gamma, rotate, normalize: as for history_embedding.  impl: "torch",
    "triton" or None, which is triton on a GPU.
    After pushes of x(0), ..., x(t) the value returned equals history_embedding([x(0), ..., x(t)]).  No gradient.
    """

    def __init__(
        self,
        embedding: Tensor,
        gamma: float = 0.9,
        rotate: bool = True,
        normalize: bool = True,
        impl: str | None = None,
    ):
        check_history(embedding, gamma, rotate)
        self.embedding, self.gamma, self.rotate, self.normalize = embedding, gamma, rotate, normalize
        self.impl = impl
        self.sum: Tensor | None = None  # a(t-1) before the norm, at least float32

    def push(self, tokens: Tensor) -> Tensor:
        """Adds the state tokens, int64 [B, N]; returns a(t), [B, N, D] in the embedding's dtype.

        Raises ValueError when B or N differ from the last push (use keep or reset first).
        """
        if self.sum is not None and self.sum.shape[:-1] != tokens.shape:
            raise ValueError(f"push: tokens must be {tuple(self.sum.shape[:-1])}, got {tuple(tokens.shape)}")
        # a(t) = wte(x(t)) + gamma R_(-1) a(t-1), and its norm
        self.sum, read = history_step(
            self.sum, tokens, self.embedding, self.gamma, self.rotate, self.normalize, self.impl
        )
        return read

    def reset(self) -> None:
        """Forgets every state; the next push may have any shape."""
        self.sum = None

    def keep(self, rows: Tensor) -> None:
        """Keeps the sequences that rows names (int64 indices or bool [B]); the others have finished."""
        if self.sum is not None:
            self.sum = self.sum[rows]
