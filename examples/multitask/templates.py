"""Sentence templates: `(a|b)`, `[optional]`, `(any;order)`, `<rule>` and `{slot}`."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Node", "parse", "sample"]

_TOKEN = re.compile(r"[()\[\]|;]|\{[^{}]*\}|<[^<>]*>|[^()\[\]{}<>|;]+")
_CLOSES = {"(": ")", "[": "]"}


@dataclasses.dataclass(frozen=True)
class Node:
    """A part of a template.

    Args:
        kind: `text`, `slot`, `rule` (leaves), `sequence`, `choice` or `any-order`.
        value: a leaf's text or name.
        parts: what the others consist of; an optional is a choice with an empty text.
    """

    kind: str
    value: str = ""
    parts: tuple[Node, ...] = ()


def parse(template: str) -> Node:
    """Parse a template.

    >>> parse("turn (on|off)").parts[1].kind
    'choice'

    Raises:
        ValueError: brackets that do not match.
    """
    tokens = iter([*_TOKEN.findall(template), ""])
    return _alternatives(tokens, end="", template=template)


def _alternatives(tokens: Iterator[str], end: str, template: str) -> Node:
    options: list[Node] = []
    current: list[Node] = []
    separators: set[str] = set()
    for token in tokens:
        if token == end or token in ("|", ";"):
            options.append(Node("sequence", parts=tuple(current)))
            current = []
            if token == end:
                break
            separators.add(token)
        elif token in _CLOSES:
            inner = _alternatives(tokens, _CLOSES[token], template)
            if token == "[":
                inner = Node("choice", parts=(inner, Node("text")))
            current.append(inner)
        elif token in ("", ")", "]"):
            break
        else:
            current.append(_leaf(token))
    else:
        token = ""
    if token != end or len(separators) > 1:
        raise ValueError(f"brackets do not match in {template!r}")
    if len(options) == 1:
        return options[0]
    return Node("any-order" if ";" in separators else "choice", parts=tuple(options))


def _leaf(token: str) -> Node:
    if token.startswith("{"):
        return Node("slot", token[1:-1].partition(":")[0])
    return Node("rule", token[1:-1]) if token.startswith("<") else Node("text", token)


def sample(
    node: Node,
    rng: random.Random,
    rules: Mapping[str, Node],
    slot: Callable[[str, random.Random], str],
) -> str:
    """Return one sentence of a template, its spaces in order.

    Args:
        node: a parsed template.
        rng: the only source of chance.
        rules: what `<rule>` stands for.
        slot: gives a slot's value, by the slot's name.
    """

    def walk(part: Node) -> str:
        if part.kind == "text":
            return part.value
        if part.kind == "slot":
            return slot(part.value, rng)
        if part.kind == "rule":
            return walk(rules[part.value])
        if part.kind == "choice":
            return walk(rng.choice(part.parts))
        if part.kind == "any-order":
            return " ".join(map(walk, rng.sample(part.parts, len(part.parts))))
        return "".join(map(walk, part.parts))

    return " ".join(walk(node).split())
