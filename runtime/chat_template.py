"""Chat templates: from messages to the text that a model was trained on.

A template is code that comes with the model, so it runs in Jinja's immutable sandbox. The environment is the one that
templates on the Hugging Face hub are written for: `raise_exception`, `strftime_now`, a `tojson` that escapes no HTML,
`{% break %}`, and `{% generation %}`, whose block is rendered as if the tag were not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtx.converters.errors import InputError, RequestError

Message = Mapping[str, Any]
"""One turn: 'role', 'content' and whatever else the template reads."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: the template's text.
        variables: what it can read besides the messages: `bos_token`, `eos_token`, …
        where: the file it comes from, for messages.

    Raises:
        InputError: the text is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, str], where: str) -> None:
        self._variables = dict(variables)
        try:
            self._template = _compile(source)
        except TemplateSyntaxError as error:
            raise InputError(
                f"{where}: the chat template has a syntax error on line {error.lineno} ({error.message}).",
                "Correct the template, or run prompts without --chat.",
            ) from error

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        """The text of a conversation.

        Args:
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            RequestError: the messages are malformed, or the template refuses them.
        """
        _check(messages)
        try:
            return self._template.render(
                **self._variables, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # the template is foreign code: it can fail in any way
            reason = error.message if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise RequestError(
                f"The model's chat template refuses the messages: {reason}",
                "Change the roles, their order or the content as the model expects them.",
            ) from error


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's words for training, means nothing here."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _check(messages: Sequence[Message]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("The chat has no messages.", 'Give a list such as [{"role": "user", "content": "Hello"}].')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"Message {number} of the chat has no role.",
                'Give each message as {"role": "user", "content": "…"}.',
            )
