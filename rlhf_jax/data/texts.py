"""`Texts`: completions on their way to the models that score them.

Whoever reads them, reward model or policy, asks for their ids here. Those with the same
tokenizer and template share them, so that a text is encoded once by each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """M completions, with the prompt and the data row of each."""

    prompts: Sequence[Any]
    """As text or messages; the same object for all completions of a prompt."""
    completions: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    """Columns that reward functions ask for; `tools` reaches the chat template."""
    _ids: dict[str, list[EncodedCompletion | ValueError]] = dataclasses.field(
        default_factory=dict, repr=False
    )
    """By the fingerprint of the Encoder."""

    @property
    def tools(self) -> list[list | None]:
        """What the chat template is told of tools, one entry a completion."""
        return [row.get("tools") or None for row in self.rows]

    def encoded(self, encoder: Encoder) -> list[EncodedCompletion | ValueError]:
        """Ids of each, or why it has none; see `Encoder.encode_all`."""
        if encoder.fingerprint not in self._ids:
            found = encoder.encode_all(self.prompts, self.completions, self.tools)
            self._ids[encoder.fingerprint] = found
        return self._ids[encoder.fingerprint]

    def take(self, indices: Sequence[int]) -> "Texts":
        """Some of the texts, in this order, with the ids that are there."""

        def some(values: Sequence[Any]) -> list[Any]:
            return [values[n] for n in indices]

        ids = {key: some(found) for key, found in self._ids.items()}
        return Texts(some(self.prompts), some(self.completions), some(self.rows), ids)
