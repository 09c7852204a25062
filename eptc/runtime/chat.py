"""A model's chat template: messages to the text it was trained to continue."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eptc.errors import BundleError, InputError, MissingExtraError, OptionError
from eptc.runtime.manifest import bundle_file

if TYPE_CHECKING:
    from pathlib import Path

    from eptc.runtime.manifest import Manifest

__all__ = ["ChatTemplate", "Conversation", "chat_template", "rendered"]

# One user message, or {"role": ..., "content": ...} in order.
Conversation = str | Sequence[Mapping[str, str]]

_KEYS = ("role", "content")


class ChatTemplate:
    """Renders conversations as transformers' `apply_chat_template` does.

    The template is a program that came with the model. It runs in jinja2's sandbox and sees
    nothing but strings.

    Args:
        path: the template's file.
        special_tokens: what it knows by name, `bos_token` and such.
    """

    def __init__(self, path: Path, special_tokens: Mapping[str, str]) -> None:
        self._path = path
        self._special_tokens = dict(special_tokens)

    def render(self, conversations: Iterable[Conversation]) -> list[str]:
        """Return the text of each conversation up to where the model's answer begins.

        Raises:
            InputError: no such conversation, or one that the template refuses.
            BundleError: the template is none.
            MissingExtraError: jinja2 is not installed.
        """
        if isinstance(conversations, str | bytes | Mapping) or not isinstance(
            conversations, Iterable
        ):
            raise InputError(
                f"the conversations are a {type(conversations).__name__}",
                expected="a list, each a string or a list of messages",
                fix="for one conversation, give a list of one",
            )
        checked = [_messages(i, given) for i, given in enumerate(conversations)]
        return [self._render(i, messages) for i, messages in enumerate(checked)]

    def _render(self, position: int, messages: list[dict[str, str]]) -> str:
        template, errors = self._compiled
        try:
            text = template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True,
                **self._special_tokens,
            )  # fmt: skip
        except errors as error:
            raise InputError(
                f"the model's chat template refuses conversation {position}: {error}"
            ) from error
        return str(text)

    @functools.cached_property
    def _compiled(self) -> tuple[Any, tuple[type[Exception], ...]]:
        """The template, and what rendering it may raise."""
        try:
            from eptc.runtime import chat_environment
        except ImportError as error:
            raise MissingExtraError(
                "a chat template needs jinja2, which is not installed",
                fix="pip install 'ept-compiler[chat]'",
            ) from error
        errors = chat_environment.RENDER_ERRORS
        try:
            return chat_environment.compiled(self._path.read_bytes().decode("utf-8")), errors
        except (OSError, UnicodeDecodeError, *errors) as error:
            raise BundleError(f"{self._path} is not a chat template: {error}") from error


def chat_template(directory: Path, manifest: Manifest) -> ChatTemplate | None:
    """Return a bundle's chat template; None where it has none."""
    spec = manifest.tokenizer
    if spec is None or spec.chat_template is None:
        return None
    return ChatTemplate(bundle_file(directory, spec.chat_template), spec.special_tokens)


def rendered(
    given: Iterable[Conversation], template: ChatTemplate | None, *, truncate: bool
) -> list[tuple[str]]:
    """Return the text of each conversation, ready to be answered, special tokens written out.

    Raises:
        InputError: no template, or what `ChatTemplate.render` refuses.
        OptionError: truncate, which would cut the end.
    """
    if template is None:
        raise InputError("the engine's tokenizer has no chat template", fix="leave chat out")
    if truncate:
        raise OptionError(
            "truncate would cut the end of a conversation, which asks for the answer",
            fix="leave truncate out, and the oldest messages where they are too long",
        )
    return [(text,) for text in template.render(given)]


def _messages(position: int, given: object) -> list[dict[str, str]]:
    """Return a conversation as messages of plain strings."""
    where = f"conversation {position}"
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list | tuple):
        raise InputError(
            f"{where} is a {type(given).__name__}",
            expected='a string, or a list of {"role": ..., "content": ...}',
        )
    if not given:
        raise InputError(f"{where} has no messages", expected="one or more")
    for i, message in enumerate(given):
        if (
            not isinstance(message, Mapping)
            or set(message) != set(_KEYS)
            or not all(isinstance(message[key], str) for key in _KEYS)
        ):
            raise InputError(
                f"message {i} of {where} is {message!r:.80}",
                expected='{"role": ..., "content": ...}, both strings',
            )
        for key in _KEYS:
            try:
                message[key].encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"message {i} of {where} is not valid Unicode: {error.reason}"
                ) from error
    return [{key: str(message[key]) for key in _KEYS} for message in given]
