"""The parity gate: the engine against an independent PyTorch reference; a failure is fatal."""

from eptc.examples_file import Example, read_examples
from eptc.parity_gate.answers import (
    Answers,
    Budget,
    answers,
    compare_answers,
    distance,
    right_answers,
)
from eptc.parity_gate.gate import make_probes, prove, refuse
from eptc.parity_gate.layers import LayerGate
from eptc.parity_gate.probes import builtin_examples
from eptc.parity_gate.reference import load_reference
from eptc.parity_gate.reference_answers import reference_answers
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.verifier import LocalVerifier, RemoteVerifier, Subject, Verifier

__all__ = [
    "Answers",
    "Budget",
    "Example",
    "LayerGate",
    "LocalVerifier",
    "ParityReport",
    "RemoteVerifier",
    "Subject",
    "Verifier",
    "answers",
    "builtin_examples",
    "compare_answers",
    "distance",
    "load_reference",
    "make_probes",
    "prove",
    "read_examples",
    "reference_answers",
    "refuse",
    "right_answers",
]
