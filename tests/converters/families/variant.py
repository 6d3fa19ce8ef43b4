"""What a tiny random model of a family is made of: data, read by `tests.converters.tiny`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A configuration of one family.

    Attributes:
        family: the row of the table.
        config: transformers' config class, 'MODULE:CLASS' below transformers.models.
        model: its model class.
        settings: arguments of the config class.
    """

    family: str
    config: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
