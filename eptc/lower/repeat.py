"""Long stacks from short ones: of alike blocks two are traced, the second is repeated."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from eptc.architectures import Architecture
from eptc.ir.prompts import PromptLayout
from eptc.lower.graph_spec import GraphSpec
from eptc.lower.naming import SCOPES, module_path

__all__ = ["Short", "Stack", "UnlikeBlocksError", "grow", "shortened"]

_PORT = re.compile(r"(past_key_values|present)\.(\d+)\.")
_PLAIN = (bool, int, float, str, type(None), tuple, torch.dtype)
# Which block it is: the one thing in which blocks may differ.
_POSITION = "layer_idx"


class UnlikeBlocksError(Exception):
    """The blocks of a stack are not repetitions of one another: all must be traced."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Which blocks of a stack are traced.

    Args:
        kept: their numbers, ascending. The first block is: it may differ from all others (T5's
            holds the position bias). Of each run of alike blocks behind it the first two are:
            they show what one takes from the one before it.
        count: how many blocks there are.
    """

    kept: tuple[int, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Short:
    """A model that has only some blocks of each stack.

    Args:
        model: it, on the meta device.
        stacks: which, by the path of their modules.
    """

    model: torch.nn.Module
    stacks: Mapping[str, Stack]


def shortened(
    model: torch.nn.Module,
    config: Any,
    arch: Architecture,
    make: Callable[..., torch.nn.Module],
    prompts: PromptLayout | None = None,
) -> Short | None:
    """Return a model with as few blocks as its graphs can be grown from.

    Args:
        model: the whole task model, on the meta device.
        config: its configuration.
        arch: names the stacks.
        make: builds a task model from a configuration and, by name, `prompts`.
        prompts: what the model was built with.

    Returns:
        None where no stack becomes shorter, or the blocks would become others.
    """
    short = copy.deepcopy(config)
    stacks = {}
    for path, setting in arch.stacks.items():
        blocks = [_description(block) for block in model.get_submodule(path).children()]
        if len(blocks) != getattr(config, setting):
            return None
        stacks[path] = Stack(_kept(blocks), len(blocks))
        setattr(short, setting, len(stacks[path].kept))
    if all(len(stack.kept) == stack.count for stack in stacks.values()):
        return None
    if prompts is not None:
        # Prompts are before the blocks of the first stack.
        prompts = prompts.of_blocks(next(iter(stacks.values())).kept)
    made = make(short, prompts=prompts)
    for path, stack in stacks.items():
        whole, fewer = (list(m.get_submodule(path).children()) for m in (model, made))
        wanted = [_description(whole[number]) for number in stack.kept]
        if [_description(block) for block in fewer] != wanted:
            return None
    return Short(made, stacks)


def _kept(blocks: list[tuple[object, ...]]) -> tuple[int, ...]:
    """Return the first block and the first two of each run of alike ones behind it."""
    kept = [0]
    for _, run in itertools.groupby(range(1, len(blocks)), key=blocks.__getitem__):
        kept += list(run)[:2]
    return tuple(kept)


def _description(block: torch.nn.Module) -> tuple[object, ...]:
    """Return what a block computes, as far as it shows: modules, plain settings, shapes."""
    found: list[object] = []
    for path, module in block.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, _PLAIN) and name != _POSITION
        }
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        found.append((path, type(module), repr(sorted(settings.items())), tuple(shapes)))
    return tuple(found)


def grow(graph: ir.Graph, stacks: Mapping[str, Stack], spec: GraphSpec) -> None:
    """Repeat blocks of each stack in a traced graph, in place.

    Before: b0 -> b1 -> b2 -> rest
    After:  b0 -> b1 -> b2 -> b2' -> b2'' -> rest

    A copy reads from the block before it what b2 reads from b1, shares what b1 and b2 share,
    and has weights and cache ports of its own number. What the rest is may be blocks of
    another kind, with runs of their own.

    Args:
        graph: traced with the blocks that are kept, unbound.
        stacks: the stacks, by the path of their modules.
        spec: the interface of the whole model.

    Raises:
        UnlikeBlocksError: b1 and b2 are not the same but for their number.
    """
    for path, stack in stacks.items():
        _renumber(graph, path, stack.kept)
        for at in range(2, len(stack.kept)):
            until = (*stack.kept, stack.count)[at + 1]
            _Run(graph, path, stack.kept[at - 2 : at + 1]).grow(until)
    _order_ports(graph, spec)


def _renumber(graph: ir.Graph, path: str, kept: tuple[int, ...]) -> None:
    """Give the blocks that were traced the numbers they have in the whole model.

    Raises:
        UnlikeBlocksError: a block with a cache has another number there.
    """
    for traced, number in reversed(list(enumerate(kept))):
        if traced == number:
            continue
        own = re.compile(rf"{re.escape(path)}\.{traced}(?=\.|'|$)")
        for node in graph:
            if not own.match(module_path(node)):
                continue
            if any(_PORT.match(str(v.name)) for v in (*node.inputs, *node.outputs) if v):
                raise UnlikeBlocksError(f"block {number} of {path} has a cache")
            scopes = node.metadata_props[SCOPES]
            node.metadata_props[SCOPES] = own.sub(f"{path}.{number}", scopes)
        for value in list(graph.initializers.values()):
            if value.name is not None and own.match(value.name):
                value.name = own.sub(f"{path}.{number}", value.name)


def _order_ports(graph: ir.Graph, spec: GraphSpec) -> None:
    for ports, values in ((spec.inputs, graph.inputs), (spec.outputs, graph.outputs)):
        by_name = {value.name: value for value in values}
        values[:] = [by_name[port.name] for port in ports]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an input of a node of the third block comes from, and what a copy reads instead."""

    kind: str
    value: ir.Value | None


# Of a run's blocks: the one before the alike ones, and those.
_FIRST, _SECOND, _THIRD = range(3)


class _Run:
    """Two alike blocks of a stack, and the one before them.

    Args:
        graph: where they are.
        path: of the stack.
        numbers: of the three.
    """

    def __init__(self, graph: ir.Graph, path: str, numbers: tuple[int, ...]) -> None:
        self.graph = graph
        self.path = path
        _, self.second, self.third = numbers
        blocks: dict[int, list[ir.Node]] = {number: [] for number in numbers}
        pattern = re.compile(rf"{re.escape(path)}\.(\d+)(\.|$)")
        for node in graph:
            if (found := pattern.match(module_path(node))) and int(found[1]) in blocks:
                blocks[int(found[1])].append(node)
        self.blocks = list(blocks.values())
        # A value of the second block and its twin in the third.
        self.twins: dict[ir.Value, ir.Value] = {}

    def grow(self, until: int) -> None:
        """Append blocks up to the number `until`, which is the next that is there."""
        third = self.blocks[_THIRD]
        if until == self.third + 1 or not third:
            return
        sources = self._compare()
        self._check_readers()
        outside = {
            value: [use for use in value.uses() if use.node not in set(third)]
            for node in third
            for value in node.outputs
        }
        previous = {value: value for value in outside}
        after = third[-1]
        for number in range(self.third + 1, until):
            previous = self._append(number, sources, previous, after)
            after = next(reversed(previous.values())).producer() or after
        for value, uses in outside.items():
            for use in uses:
                use.node.replace_input_with(use.idx, previous[value])

    def _compare(self) -> list[list[_Source]]:
        """Match the second block with the third; return the sources of the third's inputs."""
        second, third = self.blocks[_SECOND], self.blocks[_THIRD]
        if len(second) != len(third):
            raise UnlikeBlocksError(f"{len(second)} nodes and {len(third)} in {self.path}")
        for one, two in zip(second, third, strict=True):
            if _operation(one) != _operation(two):
                raise UnlikeBlocksError(f"{one.op_type} and {two.op_type} in {self.path}")
            self.twins.update(zip(one.outputs, two.outputs, strict=True))
        return [
            [self._source(a, b) for a, b in zip(one.inputs, two.inputs, strict=True)]
            for one, two in zip(second, third, strict=True)
        ]

    def _source(self, one: ir.Value | None, two: ir.Value | None) -> _Source:
        if one is None or two is None:
            if one is not two:
                raise UnlikeBlocksError(f"an input is missing in {self.path}")
            return _Source("shared", None)
        if one in self.twins:
            if self.twins[one] is not two:
                raise UnlikeBlocksError(f"{one.name} and {two.name} in {self.path}")
            return _Source("own", two)
        if two in self.twins:
            if one.producer() not in set(self.blocks[_FIRST]):
                raise UnlikeBlocksError(f"{one.name} and {two.name} in {self.path}")
            return _Source("previous", self.twins[two])
        if one is two:
            return _Source("shared", two)
        if two.name is not None and one.name == self._renumbered(two.name, self.second):
            return _Source("numbered", two)
        if _same_constant(one, two):
            return _Source("shared", two)
        raise UnlikeBlocksError(f"{one.name} and {two.name} in {self.path}")

    def _check_readers(self) -> None:
        """Check that nothing behind the stack reads from the second block."""
        known = {*self.blocks[_SECOND], *self.blocks[_THIRD]}
        for value in self.twins:
            if any(user not in known for user in value.consumers()):
                raise UnlikeBlocksError(f"{value.name} is read behind {self.path}")

    def _renumbered(self, name: str, number: int) -> str | None:
        """Return the third block's name of a weight or port with another number."""
        prefix = f"{self.path}.{self.third}."
        if name.startswith(prefix):
            return f"{self.path}.{number}.{name.removeprefix(prefix)}"
        port = _PORT.match(name)
        if port and int(port[2]) == self.third:
            return f"{port[1]}.{number}.{name[port.end() :]}"
        return None

    def _append(
        self,
        number: int,
        sources: list[list[_Source]],
        previous: Mapping[ir.Value, ir.Value],
        after: ir.Node,
    ) -> dict[ir.Value, ir.Value]:
        """Insert one more block; return its value for each of the third block's."""
        made: dict[ir.Value, ir.Value] = {}
        numbered: dict[ir.Value, ir.Value] = {}

        def read(source: _Source) -> ir.Value | None:
            if source.value is None or source.kind == "shared":
                return source.value
            if source.kind == "own":
                return made[source.value]
            if source.kind == "previous":
                return previous[source.value]
            if source.value not in numbered:
                numbered[source.value] = self._own(source.value, number)
            return numbered[source.value]

        nodes = []
        for node, inputs in zip(self.blocks[_THIRD], sources, strict=True):
            nodes.append(self._copy(node, [read(source) for source in inputs], number))
            made.update(zip(node.outputs, nodes[-1].outputs, strict=True))
        self.graph.insert_after(after, nodes)
        for value, twin in made.items():
            if value.is_graph_output():
                assert value.name is not None
                twin.name = self._renumbered(value.name, number)
                self.graph.outputs.append(twin)
        return made

    def _own(self, value: ir.Value, number: int) -> ir.Value:
        """Return a weight or an input of the graph with another block's number."""
        assert value.name is not None
        name = self._renumbered(value.name, number)
        own = ir.Value(name=name, shape=value.shape, type=value.type)
        if value.is_graph_input():
            self.graph.inputs.append(own)
        else:
            self.graph.initializers.add(own)
        return own

    def _copy(self, node: ir.Node, inputs: Iterable[ir.Value | None], number: int) -> ir.Node:
        """Return a copy of a node of the third block, its module that of another block."""
        copied = ir.Node(
            node.domain,
            node.op_type,
            list(inputs),
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            metadata_props={
                SCOPES: re.sub(
                    rf"{re.escape(self.path)}\.{self.third}\b",
                    f"{self.path}.{number}",
                    node.metadata_props[SCOPES],
                )
            },
        )
        for value, twin in zip(node.outputs, copied.outputs, strict=True):
            twin.shape, twin.type = value.shape, value.type
        return copied


def _operation(node: ir.Node) -> tuple[object, ...]:
    attributes = {name: repr(attribute.value) for name, attribute in node.attributes.items()}
    sizes = len(node.inputs), len(node.outputs)
    return (*node.op_identifier(), tuple(sorted(attributes.items())), *sizes)


def _same_constant(one: ir.Value, two: ir.Value) -> bool:
    a, b = one.const_value, two.const_value
    return (
        one.is_initializer()
        and two.is_initializer()
        and a is not None
        and b is not None
        and a.dtype == b.dtype
        and a.shape == b.shape
        and bool(np.array_equal(a.numpy(), b.numpy()))
    )
