"""Text to token ids and back, with the files that came with the model.

tokenizer.json           the tokenizer itself, for the `tokenizers` library
tokenizer_config.json    special tokens and, in older models, the chat template
special_tokens_map.json  special tokens, where tokenizer_config.json has none
chat_template.jinja      the chat template
generation_config.json   end-of-sequence ids and sampling defaults
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from trtx.converters.errors import InputError, RequestError
from trtx.converters.hf_config import read_json_object
from trtx.converters.tokenizer_files import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from trtx.runtime.chat_template import ChatTemplate, Message
from trtx.runtime.text_stream import TextStream

SPECIAL_TOKENS_MAP = "special_tokens_map.json"

_SAMPLING_DEFAULTS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
"""The keys of generation_config.json that set sampling parameters of the same name, with their types."""


class Tokenizer:
    """The tokenizer of one model. Make it with `load`.

    Attributes:
        eos_ids: tokens that end a sequence: the ids of generation_config.json (one or a list) and the `eos_token` of
            tokenizer_config.json. Fine-tuned models often correct only one of the two, so both count.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        templates: Mapping[str, _TemplateSource],
        generation: Mapping[str, Any],
        where: Path,
    ) -> None:
        self._backend = backend
        self._special_tokens = special_tokens
        self._templates = templates
        self._generation = generation
        self._where = where
        self.eos_ids = self._read_eos_ids()

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer files of a checkpoint or engine.

        Raises:
            InputError: there is no tokenizer.json, or one of the files is damaged.
        """
        config = _read_optional(directory / TOKENIZER_CONFIG)
        backend = _read_backend(directory / TOKENIZER)
        special = _special_tokens(_read_optional(directory / SPECIAL_TOKENS_MAP) | config, backend)
        backend.add_special_tokens(list(special.values()))  # some tokenizer.json files hold them as ordinary tokens
        return cls(
            backend,
            {role: token.content for role, token in special.items()},
            _templates(directory, config),
            _read_optional(directory / GENERATION_CONFIG),
            directory,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model's tokenizer adds (BOS, never twice).

        Raises:
            RequestError: the text is not valid Unicode.
        """
        ids = self._encode(text, add_special_tokens=True)
        bos = self._special_tokens.get("bos_token")
        if bos and text.startswith(bos) and ids[:2] == [self._backend.token_to_id(bos)] * 2:
            return ids[1:]
        return ids

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat format.

        No special tokens are added: a template writes all that the model wants, BOS included.

        Args:
            messages: {'role': …, 'content': …} each.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            InputError: the model has no chat template, or a damaged one.
            RequestError: the template refuses the messages.
        """
        template = self._tool_template if tools else self._chat_template
        return self._encode(template.render(messages, tools, add_generation_prompt), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids. Special tokens and ids outside the vocabulary have none."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, stop: Sequence[str] = (), min_tokens: int = 0) -> TextStream:
        """A stream that turns the tokens of one sequence into text as they come."""
        return TextStream(self.decode, self._has_text, self._byte_tokens, stop, min_tokens)

    def defaults(self) -> dict[str, Any]:
        """The model's own sampling parameters, as fields of `SamplingParams`.

        As in `transformers`, generation_config.json has to say `do_sample` for its temperature, top_k, top_p and min_p
        to count; a model that doesn't is run greedily. Its repetition penalty counts either way.

        Raises:
            InputError: a value has the wrong type.
        """
        found = {name: self._default(name) for name in _SAMPLING_DEFAULTS if self._generation.get(name) is not None}
        if self._generation.get("do_sample"):
            return {"temperature": 1.0, **found}
        return {"temperature": 0.0, **{name: found[name] for name in found if name == "repetition_penalty"}}

    def _has_text(self, id: int) -> bool:
        return id not in self._special_ids and self._backend.id_to_token(id) is not None

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _byte_tokens(self) -> frozenset[int]:
        """Ids of '<0x00>' to '<0xFF>', where the decoder joins them into characters."""
        if "ByteFallback" not in str(self._backend.decoder):
            return frozenset()
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(id for id in ids if id is not None)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return self._compile("default")

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        return self._compile("tool_use") if "tool_use" in self._templates else self._chat_template

    def _compile(self, name: str) -> ChatTemplate:
        if name not in self._templates:
            named = f" (it has templates named {', '.join(self._templates)})" if self._templates else ""
            raise InputError(
                f"{self._where}: the model has no chat template{named}.",
                f"Run plain prompts without --chat, or put a {CHAT_TEMPLATE} beside the source and convert again.",
            )
        source, where = self._templates[name]
        return ChatTemplate(source, self._special_tokens, where)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The prompt is not valid Unicode: {text[error.start]!a} at character {error.start}.",
                "Give the prompt as UTF-8 text without lone surrogates.",
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _read_eos_ids(self) -> frozenset[int]:
        listed = self._generation.get("eos_token_id")
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(id) is int for id in ids):
            raise InputError(
                f"{self._where / GENERATION_CONFIG}: eos_token_id is {listed!r}.",
                "Make it a token id or a list of them.",
            )
        eos = self._special_tokens.get("eos_token")
        known = self._backend.token_to_id(eos) if eos is not None else None
        return frozenset(ids if known is None else [*ids, known])

    def _default(self, name: str) -> int | float:
        value = self._generation[name]
        kind = _SAMPLING_DEFAULTS[name]
        if type(value) not in (int, kind):
            raise InputError(
                f"{self._where / GENERATION_CONFIG}: {name} is {value!r}.", f"Make it a number ({kind.__name__})."
            )
        return kind(value)


class _TemplateSource(NamedTuple):
    text: str
    where: str


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise InputError(
            f"{path.parent}: has no {TOKENIZER}, so prompts in text can't be run.",
            "Give prompts as token ids (input_ids), or convert a model that has one and build again.",
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise InputError(f"{path}: not a tokenizer ({error}).", "Download it again and convert again.") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _special_tokens(config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, AddedToken]:
    """The entries 'bos_token', 'eos_token', … that are in the vocabulary.

    Each is a string, or an object with 'content' and how it matches.
    """
    entries = {
        role: {"content": token} if isinstance(token, str) else token
        for role, token in config.items()
        if role.endswith("_token") and isinstance(token, (str, dict))
    }
    return {
        role: AddedToken(
            entry["content"],
            special=True,
            normalized=False,
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
        )
        for role, entry in entries.items()
        if backend.token_to_id(entry.get("content", "")) is not None
    }


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, _TemplateSource]:
    """Chat templates by name; the file of its own counts before tokenizer_config.json."""
    listed = config.get("chat_template") or []
    where = str(directory / TOKENIZER_CONFIG)
    if isinstance(listed, str):
        listed = [{"name": "default", "template": listed}]
    try:
        found = {item["name"]: _TemplateSource(item["template"], where) for item in listed}
    except (TypeError, KeyError) as error:
        raise InputError(
            f"{where}: chat_template is neither a text nor a list of named ones.", "Correct the file."
        ) from error
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        try:
            found["default"] = _TemplateSource(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason}).", "Download it again and convert again.") from error
    return found
