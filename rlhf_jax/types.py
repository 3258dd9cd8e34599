"""Every pytree that crosses a module border, with shapes on the fields.

Letters, used in every shape of the package:
    B batch rows    T tokens in a row   P prompt tokens       C completion tokens
    Q pairs         S keys, or score slots in a row           G samples per prompt
    L layers        D model width       F feed-forward width  V vocabulary
    N query heads   K key-value heads   H head width          M completions in a batch
    R prompts with up to K completions each (the only other use of K)
Masks are bool and True means "counts". Every [B T] array is aligned to tokens: there is
no array of length T-1. Host code fills these with NumPy arrays, device code with jax
arrays.
"""

from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Sequences:
    """Rows of tokens and who may read whom: padded, packed and shared-prefix alike.

    Key k is visible to query q iff all of
        k <= q in the row,
        segment[q] != 0,
        segment[k] == segment[q], or prefix[q] != 0 and segment[k] == prefix[q].
    A plain row has segment 1 on its tokens and 0 on padding (either side). A packed row
    numbers its sequences 1, 2, ... A shared-prefix row [prompt | chosen | rejected] has
    segments 1, 2, 3 with prefix 1 on segments 2 and 3, whose positions both continue
    the prompt's.
    """

    tokens: Int[Array, "B T"]
    """Token ids; any valid id on padding."""
    positions: Int[Array, "B T"]
    """Position of each token in its own sequence, from 0; decides RoPE."""
    segment: Int[Array, "B T"]
    """Sequence number in the row, 0 = padding."""
    completion_mask: Bool[Array, "B T"]
    """True on completion tokens, the end-of-sequence token included."""
    prefix: Int[Array, "B T"] | None = None
    """The segment a token may read besides its own, 0 = none; None = no row shares."""


@struct.dataclass
class PreferenceBatch:
    """Pairs, laid out in rows in any way `Sequences` can express.

    The reward model reads one token per completion, at `score_at`; pairs point into the
    flattened [B*S] rewards, so that the objective does not know the layout.
    """

    sequences: Sequences
    score_at: Int[Array, "B S"]
    """Column of the last real token of each completion; unused slots hold 0."""
    chosen: Int[Array, "Q"]
    """Index into the flattened [B*S] rewards."""
    rejected: Int[Array, "Q"]
    weight: Float[Array, "Q"]
    """Weight of the pair in the mean; 0 marks a filler pair."""
    margin: Float[Array, "Q"] | None = None
    """Subtracted from the reward difference; None = no margin."""
    soft_label: Float[Array, "Q"] | None = None
    """Probability that the chosen completion is the better one; None = 1."""
    gap_bound: Float[Array, "Q"] | None = None
    """Soft upper bound of the reward difference; None = no such column."""


PAIR_COLUMNS = ("margin", "soft_label", "gap_bound")
"""The columns of pairs that a loss or a regularizer takes by name."""


@struct.dataclass
class PairStates:
    """What a reward model makes of pairs, [chosen, rejected]."""

    rewards: Float[Array, "Q 2"]
    before: Float[Array, "Q 2 D"]
    """States at the scored tokens, before the final norm."""
    after: Float[Array, "Q 2 D"]
    """After it: what the head reads."""
    weight: Float[Array, "Q"]
    """Of the pair; 0 marks a filler pair."""


@struct.dataclass
class GroupBatch:
    """Prompts with up to K completions each, laid out like the pairs of a
    PreferenceBatch."""

    sequences: Sequences
    score_at: Int[Array, "B S"]
    """Column of the last real token of each completion; unused slots hold 0."""
    members: Int[Array, "R K"]
    """Index of each completion into the flattened [B*S] rewards."""
    mask: Bool[Array, "R K"]
    """True = a completion."""
    weight: Float[Array, "R"]
    """Weight of the prompt in the mean; 0 marks a filler prompt."""
    scores: Float[Array, "R K"] | None = None
    """Gold scores, higher is better; None = no labels."""


@struct.dataclass
class MetaBatch:
    """What one step of MetaRM reads."""

    pairs: PreferenceBatch
    shifted: GroupBatch


@struct.dataclass
class PromptBatch:
    """Prompts to be continued, padded to one length."""

    tokens: Int[Array, "B P"]
    """Token ids; any valid id on padding."""
    mask: Bool[Array, "B P"]
    """True on prompt tokens, which lie next to each other, at least one a row."""


@struct.dataclass
class Rollout:
    """Sampled completions: G of each prompt, completion m of prompt m // G; M = B G."""

    tokens: Int[Array, "M C"]
    """Token ids from column 0 on, the stop token included; 0 after it."""
    mask: Bool[Array, "M C"]
    """True on completion tokens, the stop token included."""
    stopped: Bool[Array, "M"]
    """Whether it ended with a stop token; False = cut at the maximum length."""
    logprobs: Float[Array, "M C"]
    """log p of the policy at the sampling temperature, before truncation (top-k, top-p,
    min-p) and penalties: what ratios and KL are made of. 0 outside the mask."""
    policy_logprobs: Float[Array, "M C"]
    """log p of the policy at temperature 1."""
    sampling_logprobs: Float[Array, "M C"]
    """log p of the distribution that was drawn from."""


@struct.dataclass
class Experience:
    """Completions to learn from, in rows of any layout that `Sequences` can express.

    Completions are numbered 0 .. M-1 in the batch; filler has weight 0.
    """

    sequences: Sequences
    """Prompts and completions; completion_mask marks the tokens that were sampled."""
    sample: Int[Array, "B T"]
    """Number of the completion that each sampled token belongs to; 0 elsewhere."""
    weight: Float[Array, "M"]
    """Weight of each completion in the loss; 0 = left out."""
    old_logprobs: Float[Array, "B T"]
    """log p under the policy that sampled, at the sampling temperature."""
    ref_logprobs: Float[Array, "B T"]
    """log p under the reference policy, at the sampling temperature."""
    advantages: Float[Array, "..."]
    """[M], one a completion (RLOO), or [B T], one a token (PPO)."""
    old_values: Float[Array, "B T"] | None = None
    """Values before the update; None without a critic."""
    returns: Float[Array, "B T"] | None = None
    """What the critic should have said; None without a critic."""


@struct.dataclass
class Mean:
    """A mean that can be added: across micro-batches and devices, divided once."""

    total: Float[Array, "..."]
    weight: Float[Array, "..."]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Float[Array, "..."]:
        """total / weight, and 0 where nothing was counted."""
        safe = self.weight + (self.weight == 0)
        return self.total / safe


@struct.dataclass
class TrainState:
    """All that training changes: pure data, no functions inside."""

    step: Int[Array, ""]
    params: Any
    """The trained leaves: a nested dict."""
    opt_state: Any
    frozen: Any = struct.field(default_factory=dict)
    """Leaves that are read but not trained (LoRA's base); disjoint from `params`."""
