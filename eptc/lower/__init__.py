"""Lowering: a configuration becomes ONNX graphs, lazy weights are bound and streamed out.

::

    graphs = trace(config)         # no weights: once per architecture and size
    bind(graphs, weights)          # lazy: nothing is read
    insert_branches(graph, adapters)  # what could not be folded
    ...                            # graph passes
    write(graphs, directory)       # one tensor in memory at a time
"""

from eptc.lower.bind import bind
from eptc.lower.branches import insert_branches, merged_gates, routed_by
from eptc.lower.task_rows import insert_tasks
from eptc.lower.trace import expected_parameters, trace
from eptc.lower.write import IN_FLIGHT, WEIGHTS, WeightsFile, write

__all__ = [
    "IN_FLIGHT",
    "WEIGHTS",
    "WeightsFile",
    "bind",
    "expected_parameters",
    "insert_branches",
    "insert_tasks",
    "merged_gates",
    "routed_by",
    "trace",
    "write",
]
