"""The runtime: loads a bundle and answers texts, with numpy, onnxruntime and tokenizers alone.

>>> from eptc.runtime import Engine
>>> engine = Engine.load("engine/")  # doctest: +SKIP
>>> engine.classify(["a fine film"])  # doctest: +SKIP
[Classification(label='positive', index=1, probabilities=(0.02, 0.98), value=None)]
"""

from eptc.runtime.chat import Conversation
from eptc.runtime.device_arrays import DeviceArray
from eptc.runtime.engine import Engine
from eptc.runtime.fixed_shape import FixedShape
from eptc.runtime.inputs import Example
from eptc.runtime.manifest import SCHEMA_VERSION, Manifest, load_manifest, read_manifest
from eptc.runtime.pack import Pack
from eptc.runtime.pack_manifest import PackManifest, read_pack
from eptc.runtime.pack_spec import HeadSpec, LinearSpec, PackTask
from eptc.runtime.providers import Provider, probe_providers
from eptc.runtime.results import Classification, Generation
from eptc.runtime.spec import (
    INTERFACES,
    MANIFEST,
    PACK,
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
    "PACK",
    "SCHEMA_VERSION",
    "Classification",
    "Conversation",
    "DeviceArray",
    "Engine",
    "Example",
    "FileRecord",
    "FixedShape",
    "Generation",
    "GenerationSpec",
    "GraphSpec",
    "HeadSpec",
    "LinearSpec",
    "Manifest",
    "Pack",
    "PackManifest",
    "PackTask",
    "Provider",
    "TensorSpec",
    "TextTooLongError",
    "TokenizerSpec",
    "VerifyReport",
    "load_manifest",
    "probe_providers",
    "read_manifest",
    "read_pack",
    "verify",
]
