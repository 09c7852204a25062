"""The runtime: loads a bundle and answers texts, with numpy, onnxruntime and tokenizers alone.

>>> from eptc.runtime import Engine
>>> engine = Engine.load("engine/")  # doctest: +SKIP
>>> engine.classify(["a fine film"])  # doctest: +SKIP
[Classification(label='positive', index=1, probabilities=(0.02, 0.98), value=None)]
"""

from eptc.runtime.chat import Conversation
from eptc.runtime.engine import Engine
from eptc.runtime.inputs import Example
from eptc.runtime.manifest import SCHEMA_VERSION, Manifest, load_manifest, read_manifest
from eptc.runtime.providers import Provider, probe_providers
from eptc.runtime.results import Classification, Generation
from eptc.runtime.spec import (
    INTERFACES,
    MANIFEST,
    FileRecord,
    GenerationSpec,
    GraphSpec,
    TensorSpec,
    TokenizerSpec,
)
from eptc.runtime.tokenizer import TextTooLongError
from eptc.runtime.verify import VerifyReport, verify

__all__ = [
    "INTERFACES",
    "MANIFEST",
    "SCHEMA_VERSION",
    "Classification",
    "Conversation",
    "Engine",
    "Example",
    "FileRecord",
    "Generation",
    "GenerationSpec",
    "GraphSpec",
    "Manifest",
    "Provider",
    "TensorSpec",
    "TextTooLongError",
    "TokenizerSpec",
    "VerifyReport",
    "load_manifest",
    "probe_providers",
    "read_manifest",
    "verify",
]
