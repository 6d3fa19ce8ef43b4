"""What a row of the family table is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trtx.converters.families.gguf import Gguf
from trtx.converters.hf_config import Config
from trtx.converters.spec import ModelSpec

Rule = Callable[[Config], Any]
"""How a field of `ModelSpec` follows from a config."""

HARMLESS = {
    "identity of the checkpoint": (
        "architectures", "model_type", "_name_or_path", "_commit_hash", "transformers_version", "is_llama_config",
        "transformers.js_config", "unsloth_fixed", "unsloth_version", "auto_map",
    ),
    "training only": (
        "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
        "resid_dropout", "embd_dropout", "embedding_dropout", "residual_dropout", "classifier_dropout", "layerdrop",
        "gradient_checkpointing", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha",
    ),
    "the stored tensors decide": ("torch_dtype", "dtype"),
    "the runtime decides": (
        "use_cache", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "output_attentions",
        "output_hidden_states", "return_dict", "torchscript", "max_sequence_length", "cache_implementation",
        "use_flash_attn", "_flash_attn_2_enabled", "experts_implementation", "_experts_implementation",
    ),
    "tokens: read from generation_config.json": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "do_sample", "temperature", "top_k", "top_p",
        "max_length", "repetition_penalty", "task_specific_params",
    ),
    "classification heads": ("id2label", "label2id", "problem_type", "finetuning_task", "num_labels"),
}  # fmt: skip
"""Keys that never change what the decoder computes, by the reason why."""

INERT: dict[str, Any] = {
    "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False, "pruned_heads": {}, "chunk_size_feed_forward": 0, "rope_interleaved": False,
    "partial_rotary_factor": 1.0, "quantization_config": None, "attention_bias": False,
    "mlp_bias": False, "use_sliding_window": False, "sliding_window": None, "use_mrope": False,
}  # fmt: skip
"""Keys that change nothing as long as they have this value."""


@dataclass(frozen=True)
class Packed:
    """A stored tensor that holds one or several of ours; each stands along the rows (output features).

    Attributes:
        targets: canonical names, in the order of the rows. `*` stands for the number in the source's name, `#` for the
            expert.
        transposed: stored as [in, out].
        interleave: 'none': all rows of the first target, then all of the next; 'heads': so for each key/value head
            (group) in turn; 'rows': a row of each in turn.
        experts: the first dimension counts the experts.
        skip: rows in front that are not used.
    """

    targets: tuple[str, ...]
    transposed: bool = False
    interleave: Literal["none", "heads", "rows"] = "none"
    experts: bool = False
    skip: int = 0

    @classmethod
    def of(cls, row: Target) -> Packed:
        """A row of `Family.tensors` as it is written for short."""
        if isinstance(row, Packed):
            return row
        return cls((row,) if isinstance(row, str) else row)


Target = str | tuple[str, ...] | Packed
"""A canonical name; several, stacked along the rows; or more than that."""


def _never(config: Config) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: transformers' `model_type`.
        models: what people call the models it covers; for reports.
        features: what it has beyond Llama; for reports.
        real: real weights that were compared with transformers, beside tiny random models; for reports.
        architectures: transformers' class names (`architectures` of config.json).
        model_types: `model_type` of config.json.
        fields: field of `ModelSpec` → rule.
        tensors: name in the checkpoint → canonical. Names of modules; of tensors where the canonical name ends in
            '.weight' or '.bias'. `*` stands for a number.
        renames: beginnings of names that some checkpoints have, and what `tensors` has instead; the first that fits.
        ignored: tensor names that are stored and not needed; `**` stands for anything.
        extra_layers: layers behind the last are stored too (for multi-token prediction), and not needed.
        aliases: key of config.json → the usual name of it, which is what rules read.
        harmless: keys that, in this family, never change what is computed; `HARMLESS` are those of every family.
        inert: keys that, in this family, may have only this value; `INERT` are those of every family.
        interleaved_rope: whether features are rotated with their neighbour; see `converters.spec.Rope`.
        section: the key of config.json that holds the language model's config, where it is part of something larger.
        beside: keys beside that section that say nothing about the language model.
        tied_outside: whether embeddings are tied where the config says nothing beside that section.
        gguf: how llama.cpp's files store it, in one way or several; see `converters.families.gguf`.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    fields: Mapping[str, Rule]
    tensors: Mapping[str, Target]
    models: str = ""
    features: str = ""
    real: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    extra_layers: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    inert: Mapping[str, Any] = field(default_factory=dict)
    interleaved_rope: Rule = _never
    section: str | None = None
    beside: tuple[str, ...] = ()
    tied_outside: bool = False
    gguf: tuple[Gguf, ...] | None = None

    @property
    def kv_cache_in_fp8(self) -> bool:
        """Whether the KV cache can be quantized: latents, from which keys and values are made, are not."""
        return "latent" not in self.fields

    def but(
        self,
        name: str,
        architecture: str,
        *,
        fields: Mapping[str, Rule],
        tensors: Mapping[str, Target] | None = None,
        without: tuple[str, ...] = (),
        **changes: Any,
    ) -> Family:
        """A family like this one but for what is given; its `model_type` is its name.

        Args:
            fields, tensors: added to this family's.
            without: rows of this family's tensors that it does not have.
            changes: other attributes. Those that describe the models or llama.cpp's files are not taken over.
        """
        own: dict[str, Any] = {
            "models": "", "features": "", "real": "", "harmless": (), "inert": {}, "gguf": None,
        }  # fmt: skip
        kept = {source: target for source, target in self.tensors.items() if source not in without}
        return replace(
            self,
            name=name,
            fields={**self.fields, **fields},
            tensors={**kept, **(tensors or {})},
            **{"architectures": (architecture,), "model_types": (name,), **own, **changes},
        )

    def part_of(
        self,
        name: str,
        architecture: str,
        *,
        beside: tuple[str, ...],
        renames: tuple[tuple[str, str], ...],
        **more: Any,
    ) -> Family:
        """This family as the language model of a larger one, whose other parts are left out."""
        changes = {"section": "text_config", "harmless": self.harmless, "inert": self.inert, **more}
        return self.but(name, architecture, fields={}, beside=beside, renames=renames, **changes)

    def interleaves(self, content: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json has its query and key rows in pairs."""
        return bool(self.interleaved_rope(Config(content, "config.json", self.name)))

    def spec(self, content: Mapping[str, Any], where: str) -> ModelSpec:
        """The `ModelSpec` of a config of this family.

        Args:
            content: a config.json, parsed.
            where: what to call it in errors.

        Raises:
            InputError: a key is missing or has an impossible value.
            UnsupportedError: a key or value is not modelled.
        """
        harmless = {key for keys in HARMLESS.values() for key in keys}
        inert = {**INERT, **self.inert}
        if self.section is not None:
            whole = Config(content, where, self.name)
            tied = whole.boolean("tie_word_embeddings", self.tied_outside)
            content = {**whole.raw(self.section, {}), "tie_word_embeddings": tied}
            where = f"{where}: {self.section}"
            whole.finish(harmless.union(self.beside), inert)
        config = Config({self.aliases.get(key, key): value for key, value in content.items()}, where, self.name)
        fields = {field: rule(config) for field, rule in self.fields.items()}
        self.interleaved_rope(config)
        config.finish(harmless.union(self.harmless), inert)
        return ModelSpec(family=self.name, **fields)
