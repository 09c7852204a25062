"""Long stacks from short ones: three blocks are traced, the third is repeated in the graph."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from eptc.architectures import Architecture
from eptc.lower.graph_spec import GraphSpec
from eptc.lower.naming import SCOPES, module_path

__all__ = ["TRACED", "UnlikeBlocksError", "grow", "shortened"]

# Blocks that are traced: the first may differ from all others (T5's holds the position bias),
# the second and the third show what one block takes from the one before it.
TRACED = 3
_SECOND, _THIRD = 1, 2
_PORT = re.compile(r"(past_key_values|present)\.(\d+)\.")
_PLAIN = (bool, int, float, str, type(None), tuple, torch.dtype)
# Which block it is: the one thing in which blocks may differ.
_POSITION = "layer_idx"


class UnlikeBlocksError(Exception):
    """The blocks of a stack are not repetitions of one another: all must be traced."""


def shortened(model: torch.nn.Module, config: Any, arch: Architecture) -> Any | None:
    """Return the configuration with `TRACED` blocks a stack.

    Args:
        model: the whole task model, on the meta device.
        config: its configuration.
        arch: names the stacks.

    Returns:
        None where no stack is longer, or the blocks from the second on are not alike.
    """
    if all(getattr(config, setting) <= TRACED for setting in arch.stacks.values()):
        return None
    short = copy.deepcopy(config)
    for path, setting in arch.stacks.items():
        blocks = list(model.get_submodule(path).children())
        if len(blocks) != getattr(config, setting):
            return None
        if len({_description(block) for block in blocks[1:]}) > 1:
            return None
        setattr(short, setting, min(TRACED, len(blocks)))
    return short


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


def grow(graph: ir.Graph, stacks: Mapping[str, int], spec: GraphSpec) -> None:
    """Repeat the third block of each stack in a traced graph, in place.

    Before: b0 -> b1 -> b2 -> rest
    After:  b0 -> b1 -> b2 -> b2' -> b2'' -> rest

    A copy reads from the block before it what b2 reads from b1, shares what b1 and b2 share,
    and has weights and cache ports of its own number.

    Args:
        graph: traced with `TRACED` blocks, unbound.
        stacks: how many blocks each stack has, by the path of its modules.
        spec: the interface of the whole model.

    Raises:
        UnlikeBlocksError: b1 and b2 are not the same but for their number.
    """
    for path, count in stacks.items():
        _Stack(graph, path).grow(count)
    _order_ports(graph, spec)


def _order_ports(graph: ir.Graph, spec: GraphSpec) -> None:
    for ports, values in ((spec.inputs, graph.inputs), (spec.outputs, graph.outputs)):
        by_name = {value.name: value for value in values}
        values[:] = [by_name[port.name] for port in ports]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where an input of a node of the third block comes from, and what a copy reads instead."""

    kind: str
    value: ir.Value | None


class _Stack:
    """The blocks of one stack in a graph."""

    def __init__(self, graph: ir.Graph, path: str) -> None:
        self.graph = graph
        self.path = path
        self.blocks: list[list[ir.Node]] = [[] for _ in range(TRACED)]
        number = re.compile(rf"{re.escape(path)}\.(\d+)(\.|$)")
        for node in graph:
            if found := number.match(module_path(node)):
                self.blocks[int(found[1])].append(node)
        # A value of the second block and its twin in the third.
        self.twins: dict[ir.Value, ir.Value] = {}

    def grow(self, count: int) -> None:
        """Append blocks until there are `count`."""
        third = self.blocks[_THIRD]
        if count <= TRACED or not third:
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
        for number in range(TRACED, count):
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
            if one.producer() not in set(self.blocks[0]):
                raise UnlikeBlocksError(f"{one.name} and {two.name} in {self.path}")
            return _Source("previous", self.twins[two])
        if one is two:
            return _Source("shared", two)
        if two.name is not None and one.name == self._renumbered(two.name, _SECOND):
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
        prefix = f"{self.path}.{_THIRD}."
        if name.startswith(prefix):
            return f"{self.path}.{number}.{name.removeprefix(prefix)}"
        port = _PORT.match(name)
        if port and int(port[2]) == _THIRD:
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
                    rf"{re.escape(self.path)}\.{_THIRD}\b",
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
