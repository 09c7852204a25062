"""Which weights of a graph can be integers, and who reads them how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import onnx_ir as ir

from eptc.lower.naming import CHOICE, chooses_experts
from eptc.lower.weights import PACKED, WeightTensor

__all__ = ["Product", "Quantizable", "quantizable", "quantized_inputs"]

# A table with fewer rows is small beside the model, and each row is read again and again:
# token types, buckets of relative positions.
_ROWS = 64
# Integer kernels compute 16 columns at once; a classifier with fewer labels gains nothing.
_SIDE = 16


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of an activation and a weight.

    Args:
        node: MatMul, or Gemm that scales nothing.
        transposed: whether it multiplies by the transposed weight.
    """

    node: ir.Node
    transposed: bool

    @property
    def x(self) -> ir.Value:
        """The activation; another one once the product that made it was replaced."""
        x = self.node.inputs[0]
        assert x is not None
        return x

    @property
    def bias(self) -> ir.Value | None:
        """What a Gemm adds."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


@dataclasses.dataclass(frozen=True)
class Quantizable:
    """A weight that can be integers, and everything that reads it.

    Args:
        weight: the initializer, float32 [rows, columns].
        axis: which of its axes are channels with a scale of their own: the outputs of a
            product, the rows of a table. A table that is also the head has both along axis 0.
        gathers: Gather nodes that read rows.
        products: products with it.
    """

    weight: ir.Value
    axis: int
    gathers: tuple[ir.Node, ...]
    products: tuple[Product, ...]


def quantizable(
    graph: ir.Graph,
    *,
    keep: Collection[str] = (),
    only: Collection[str] | None = None,
    left: Callable[[str, str], None] = lambda _weight, _reason: None,
) -> list[Quantizable]:
    """Return the weights of the main graph that can be integers, in the order of initializers.

    Args:
        graph: bound; nothing is read.
        keep: parameters that stay as they are; a packed weight stays with any of its parts.
        only: the parameters to return; None: all.
        left: called with the name of each other weight and why it is none.
    """
    found = []
    position = {node: number for number, node in enumerate(graph)}
    for weight in graph.initializers.values():
        if not isinstance(weight.const_value, WeightTensor):
            continue  # A constant of the graph.
        site = _named(weight, keep, only) or _readers(weight, position)
        if isinstance(site, str):
            left(str(weight.name), site)
        else:
            found.append(site)
    return found


def quantized_inputs(
    graph: ir.Graph, *, keep: Collection[str] = (), only: Collection[str] | None = None
) -> list[str]:
    """Return the names of the activations that are multiplied by such weights, in order.

    These are the values whose ranges `quantize-int8-static` needs with the same options.
    """
    sites = quantizable(graph, keep=keep, only=only)
    inputs = {product.node: product.x for site in sites for product in site.products}
    return list(dict.fromkeys(str(inputs[node].name) for node in graph if node in inputs))


def _named(weight: ir.Value, keep: Collection[str], only: Collection[str] | None) -> str | None:
    """Return why the options leave a weight out, or None where they do not."""
    name = str(weight.name)
    if chooses_experts(name):
        return CHOICE
    parts = name.split(PACKED)
    if name in keep or any(part in keep for part in parts):
        return "it is to be kept"
    if only is not None and name not in only and not all(part in only for part in parts):
        return "it is not to be quantized"
    return None


def _readers(weight: ir.Value, position: dict[ir.Node, int]) -> Quantizable | str:
    """Return a weight with its readers, or why it cannot be integers."""
    tensor = weight.const_value
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    if tensor.dtype != ir.DataType.FLOAT or len(shape) != 2:
        return "it is no matrix" if len(shape) != 2 else f"it is {tensor.dtype}, not float32"
    if weight.is_graph_input() or weight.is_graph_output():
        return "a caller can set or read it"
    gathers: list[ir.Node] = []
    products: list[Product] = []
    for node, index in weight.uses():
        if node not in position:
            return "a subgraph reads it"
        if index == 0 and _is(node, "Gather") and node.attributes.get_int("axis", 0) in (0, -2):
            gathers.append(node)
        elif index == 0 and _transposes(node):
            uses = node.outputs[0].uses()
            if not all(at == 1 and _is(user, "MatMul") for user, at in uses):
                return "something else than a product reads it transposed"
            products += [Product(user, transposed=True) for user, _ in uses]
        elif index == 1 and (_is(node, "MatMul") or _plain_gemm(node)):
            transposed = bool(node.attributes.get_int("transB", 0))
            products.append(Product(node, transposed))
        else:
            return f"{node.op_type} reads it"
    if reason := _too_small(shape, gathers, products) or _odd_input(products):
        return reason
    if len({product.transposed for product in products} | ({True} if gathers else set())) > 1:
        return "it is read by rows and by columns"
    rows = bool(gathers) or products[0].transposed
    gathers.sort(key=position.__getitem__)
    products.sort(key=lambda product: position[product.node])
    return Quantizable(weight, 0 if rows else 1, tuple(gathers), tuple(products))


def _too_small(
    shape: tuple[int, ...], gathers: list[ir.Node], products: list[Product]
) -> str | None:
    if not gathers and not products:
        return "nothing reads it"
    if gathers and shape[0] < _ROWS:
        return f"it is a table of {shape[0]} rows"
    if min(shape) < _SIDE:
        return f"it is small: {shape[0]} x {shape[1]}"
    return None


def _odd_input(products: list[Product]) -> str | None:
    for product in products:
        x = product.x
        if x.is_initializer():
            return "what it is multiplied by is no activation"
        if x.dtype not in (None, ir.DataType.FLOAT) or (x.shape is not None and len(x.shape) < 2):
            return "what it is multiplied by is no float32 matrix"
    return None


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_identifier() == ("", op_type, "")


def _transposes(node: ir.Node) -> bool:
    """Whether a node swaps rows and columns, for nodes alone."""
    swaps = tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)
    return _is(node, "Transpose") and swaps and not node.outputs[0].is_graph_output()


def _plain_gemm(node: ir.Node) -> bool:
    """Whether a node is a Gemm that transposes and scales no activation."""
    attributes = node.attributes
    return (
        _is(node, "Gemm")
        and not attributes.get_int("transA", 0)
        and attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    )
