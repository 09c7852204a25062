"""Fixtures every folder of tests may use."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from eptc.nn import GateConfig

# No test may ask a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" not in os.environ:
    # One cache for this run alone; its workers inherit it.
    _cache = tempfile.TemporaryDirectory(prefix="eptc-tests-")
    os.environ["EPTC_CACHE_DIR"] = _cache.name
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # A processor for each worker: torch and ONNX Runtime spin while they wait for each other.
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})

# The same examples in every run, and as much time as they take: a machine at work is no failure.
hypothesis.settings.register_profile(
    "eptc", deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.load_profile("eptc")

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"

# The small native checkpoint's.
WORDS = (
    "a", "and", "bad", "dull", "film", "good", "long", "not", "quiet", "short", "the", "very",
    "was",
)  # fmt: skip


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of recorded checkpoints and outputs, beside the checkout."""
    if not GOLDEN.is_dir():
        pytest.skip("needs ../shared/golden (checkpoints and outputs recorded from the originals)")
    return GOLDEN


@pytest.fixture(scope="session")
def cuda() -> str:
    """The CUDA provider, where it starts: tests marked gpu run by themselves on such a machine."""
    from eptc.runtime import probe_providers

    name = "CUDAExecutionProvider"
    if (reason := probe_providers().get(name, "this ONNX Runtime was built without it")) is None:
        return name
    pytest.skip(f"needs CUDA: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marks that only some tests have."""
    config.addinivalue_line("markers", "slow: takes long, in an environment of its own")


@pytest.fixture(scope="session")
def genai_python() -> Path:
    """An interpreter that has onnxruntime-genai."""
    return _interpreter("genai", "EPTC_GENAI_PYTHON")


@pytest.fixture(scope="session")
def optimum_python() -> Path:
    """An interpreter that has optimum-onnx, with the older transformers it needs."""
    return _interpreter("optimum", "EPTC_OPTIMUM_PYTHON")


def _interpreter(name: str, variable: str) -> Path:
    if named := os.environ.get(variable):
        return Path(named)
    made = Path(__file__).resolve().parents[1] / ".cache" / "tests" / name
    if not (made / ".ready").is_file():
        pytest.skip(f"needs {name} apart: `make test` sets it up, or {variable} names a python")
    return made / "bin" / "python"


@dataclasses.dataclass(frozen=True)
class Folders:
    """A checkpoint that a test may damage, its base, and a place for what is made of them."""

    root: Path

    @property
    def ckpt(self) -> Path:
        return self.root / "in" / "ckpt"

    @property
    def base(self) -> Path:
        return self.root / "in" / "base"

    @property
    def out(self) -> Path:
        return self.root / "out"


@pytest.fixture
def copy_golden(golden: Path, tmp_path: Path) -> Callable[..., Folders]:
    """Return a function that copies a recorded EPT checkpoint and its base, writable."""

    def copy(name: str = "t5-tiny", adapter: str = "adapter") -> Folders:
        folders = Folders(tmp_path)
        _copy(golden / "ept" / name / adapter, folders.ckpt)
        _copy(golden / "ept" / name / "base", folders.base)
        return folders

    return copy


@pytest.fixture(scope="session")
def small_native(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A native checkpoint of the paper's variant on a BERT of one layer: seconds to compile.

    Two classifications, one of them of text pairs, and a regression, with a tokenizer of words.
    """
    folders = Folders(tmp_path_factory.mktemp("small-native"))
    _write_small_native(folders)
    return folders


@pytest.fixture(scope="session")
def small_routed(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The same with routers that read each token and the task; one expert's kernel is large."""
    from eptc.nn import GateConfig

    folders = Folders(tmp_path_factory.mktemp("small-routed"))
    _write_small_native(folders, (2, 3, 3, 24), GateConfig("token+task", 1.0))
    return folders


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts an empty disk of some KiB; skips where it may not."""
    disk, mount = tmp_path / "disk", shutil.which("mount")
    mounted = []

    def make(size: int) -> Path:
        disk.mkdir()
        command = [str(mount), "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("may not mount a small disk here")
        mounted.append(disk)
        return disk

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def copy_native(small_native: Folders, tmp_path: Path) -> Folders:
    """A copy of the small native checkpoint, for a test to damage."""
    _copy(small_native.root / "in", tmp_path / "in")
    return Folders(tmp_path)


@pytest.fixture
def write_tucka(tmp_path: Path) -> Callable[..., Folders]:
    """Return a function that writes a TuckA adapter as its authors' code does, and its base.

    On a `bert` or `deberta-v2` classifier or a `llama`, of two layers; `deberta-v2-positions` has
    linears of their own for positions. Further arguments are entries of its configuration.
    """

    def write(kind: str = "bert", **settings: Any) -> Folders:
        folders = Folders(tmp_path)
        _write_tucka(folders, kind, settings)
        return folders

    return write


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts for the small native checkpoint.

    Args:
        texts: 120 rows without labels.
        values: the same, for the task `score`, labelled with what float32 answers.
    """

    texts: Path
    values: Path


@pytest.fixture(scope="session")
def small_rows(small_native: Folders, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Texts for the small native checkpoint; a regression loses a little with every bit."""
    import random

    import eptc

    folder = tmp_path_factory.mktemp("rows")
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(3, 12))) for _ in range(120)]
    eptc.export(
        small_native.ckpt, base=small_native.base, task="score", out=folder / "exact", verify=False
    )
    with eptc.Engine.load(folder / "exact", providers=["cpu"]) as engine:
        answers = [answer.value for answer in engine.classify(texts)]
    rows = Rows(folder / "texts.jsonl", folder / "values.jsonl")
    rows.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows.values.write_text(
        "".join(
            json.dumps({"text": text, "label": answer}) + "\n"
            for text, answer in zip(texts, answers, strict=True)
        )
    )
    return rows


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, as a checkout on another machine has them."""
    if any(importlib.util.find_spec(name) is None for name in ("setuptools", "pip")):
        pytest.skip("needs setuptools and pip in this environment")
    root = tmp_path_factory.mktemp("wheel")
    checkout = root / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info")
    for name in ("eptc", "passes"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", root / "out", checkout],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = (root / "out").glob("*.whl")
    return path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.stdout)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """Return a function that runs the command line in this process, its output captured."""
    from click.testing import CliRunner

    from eptc.cli import main

    def run(*arguments: object) -> Outcome:
        before = signal.getsignal(signal.SIGTERM)
        try:
            result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def _copy(source: Path, target: Path) -> None:
    """Copy a folder file by file: the recorded ones are read-only, and links stay behind."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _write_small_native(
    folders: Folders, kernel_sizes: tuple[int, ...] = (2, 3, 4, 7), gate: GateConfig | None = None
) -> None:
    import tokenizers
    import torch
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    from eptc.nn import EptConfig, EptModel, load_base
    from eptc.tasks import Task

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    shape = transformers.BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=34,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=51,
        max_position_embeddings=200,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]), _no_progress_bars():
        torch.manual_seed(0)
        transformers.BertModel(shape).save_pretrained(folders.base)
        tokenizer = tokenizers.Tokenizer(
            models.WordLevel({w: i for i, w in enumerate((*special, *WORDS))}, unk_token="[UNK]")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
        ).save_pretrained(folders.base)
        model = EptModel.attach(
            load_base(folders.base),
            EptConfig(
                variant="paper",
                targets=("query", "value", "intermediate.dense", "output.dense"),
                kernel_sizes=kernel_sizes,
                top_k=2,
                rank=3,
                tasks=(
                    Task("tone", "classification", labels=("bad", "good"), aliases=("sentiment",)),
                    Task("same", "classification", ("first", "second"), labels=("no", "yes")),
                    Task("score", "regression"),
                ),
                gate=gate,
            ),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save(folders.ckpt, base_dir=folders.base, base_name="small-bert")


_TUCKA_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 64,
}


def _tucka_base(kind: str) -> Any:
    import transformers

    if kind == "llama":
        config = transformers.LlamaConfig(**_TUCKA_SHAPE, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(config)
    if kind.startswith("deberta-v2"):
        config = transformers.DebertaV2Config(
            **_TUCKA_SHAPE,
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=kind == "deberta-v2",
            position_buckets=4,
            max_relative_positions=12,
        )
        return transformers.DebertaV2ForSequenceClassification(config)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_TUCKA_SHAPE))


def _write_tucka(folders: Folders, kind: str, settings: dict[str, Any]) -> None:
    import safetensors.torch
    import torch

    config = {
        "peft_type": "TUCKA",
        "task_type": "CAUSAL_LM" if kind == "llama" else "SEQ_CLS",
        "r": 4, "k": 3, "t": 2, "p": 2, "alpha": 6, "use_alb": False, **settings,
    }  # fmt: skip
    r, k, t, p = (config[key] for key in "rktp")
    names = (
        "q_proj", "v_proj", "query", "value", "query_proj", "value_proj", "pos_query_proj",
        "dense",
    )  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]), _no_progress_bars():
        torch.manual_seed(1)
        model = _tucka_base(kind)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folders.base)
        for path, module in model.named_modules():
            if path.rpartition(".")[2] not in names:
                continue
            prefix = f"base_model.model.{path}.tucka_"
            if not tensors:
                tensors[f"{prefix}ec"] = torch.randn(k * t, module.in_features)
            tensors[f"{prefix}g"] = torch.randn(k, p, r, r)
            tensors[f"{prefix}c"] = torch.randn(t, p)
            tensors[f"{prefix}u"] = torch.randn(module.in_features, r)
        if kind != "llama":
            tensors["base_model.model.classifier.weight"] = torch.randn(3, 24)
            tensors["base_model.model.classifier.bias"] = torch.randn(3)
    folders.ckpt.mkdir(parents=True, exist_ok=True)
    (folders.ckpt / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folders.ckpt / "adapter_model.safetensors")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@dataclasses.dataclass(frozen=True)
class PromptedFolders(Folders):
    """A small MEPT or SMoP checkpoint, random, and its base with a tokenizer of words."""

    def settings(self, **changes: Any) -> None:
        """Change settings of training, in whichever file has them; None removes one."""
        for name in ("adapter_config.json", "train_args.json"):
            path = self.ckpt / name
            found = json.loads(path.read_text())
            for key, value in changes.items():
                if value is None:
                    found.pop(key, None)
                elif key in found:
                    found[key] = value
            path.write_text(json.dumps(found))

    def tensors(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the state dict."""
        import safetensors.torch

        path = self.ckpt / "model.safetensors"
        found = safetensors.torch.load_file(path)
        change(found)
        path.unlink()
        safetensors.torch.save_file(found, path)


@pytest.fixture
def small_mept(tmp_path: Path) -> Callable[..., PromptedFolders]:
    """Return a function that writes a small checkpoint with prompts.

    Its arguments: the backbone, `t5` or `llama`, and settings of training as `train_args.json`
    has them.
    """
    count = 0

    def make(backbone: str = "t5", **settings: Any) -> PromptedFolders:
        nonlocal count
        folders = PromptedFolders(tmp_path / f"mept-{count}")
        count += 1
        _write_small_mept(folders, backbone, settings)
        return folders

    return make


def _write_small_mept(folders: PromptedFolders, backbone: str, given: dict[str, Any]) -> None:
    import safetensors.torch
    import torch

    settings: dict[str, Any] = {
        "method": "prompt-expert", "num_virtual_tokens": 3, "num_virtual_tokens_full": 12,
        "topk": 2, "layers": [0, 1, 2], "shared_expert": True, "shared_expert_ratio": "one",
        "stochastic": False, "gumbel": False, "tokenizer_pad_token_id": 0, **given,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]), _no_progress_bars():
        torch.manual_seed(0)
        model = _prompted_base(folders.base, backbone)
        width = int(model.config.hidden_size)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        if backbone == "t5":
            state = {f"base_model.{name}": tensor for name, tensor in state.items()}
            state["word_embeddings.weight"] = model.shared.weight.clone()
            stack, site, where = "base_model.encoder.block", "", "prompt_encoder."
        else:
            state["score.weight"] = torch.randn(3, width)
            stack, site, where = "model.layers", "prompt_", ""
            state["layer_norm.weight"] = torch.ones(width)
        rows, length = settings["num_virtual_tokens_full"], settings["num_virtual_tokens"]
        experts = settings["method"] == "prompt-expert"
        blocks = [b for b in settings["layers"] if b < 3] if experts else []
        names = [(f"{stack}.{b}.prompt_", f"{stack}.{b}.") for b in blocks]
        for prefix, shared in [*names, (f"{where}{site}", where)]:
            state[f"{prefix}embedding.weight"] = torch.randn(rows, width)
            state[f"{prefix}router.0.weight"] = torch.randn(rows // length, width)
            if settings["shared_expert"] and experts:
                state[f"{shared}shared_embedding"] = torch.randn(1, length, width)
        for number in range(3):
            state[f"{stack}.{number}.layer_norm.weight"] = torch.ones(width)
        settings["tokenizer_length"] = model.config.vocab_size
        folders.ckpt.mkdir(parents=True)
        safetensors.torch.save_file(state, folders.ckpt / "model.safetensors")
    adapter = {
        key: settings[key]
        for key in ("num_virtual_tokens", "num_virtual_tokens_full", "topk", "stochastic")
    }
    adapter["peft_type"] = "PROMPT_EXPERT" if experts else "PROMPT_ROUTING"
    adapter["base_model_name_or_path"] = "small-base"
    (folders.ckpt / "adapter_config.json").write_text(json.dumps(adapter))
    (folders.ckpt / "train_args.json").write_text(json.dumps(settings))


def _prompted_base(directory: Path, backbone: str) -> Any:
    """Save a random base of three blocks and a tokenizer of words; return the task model."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    special = ("<pad>", "</s>", "<unk>")
    words = {word: i for i, word in enumerate((*special, *WORDS))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    model: Any
    if backbone == "t5":
        config = transformers.T5Config(
            vocab_size=len(words), d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=3,
            num_decoder_layers=1, decoder_start_token_id=0, relative_attention_num_buckets=8,
            relative_attention_max_distance=20, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    if backbone != "t5":
        # The classifier's head is another.
        del model.lm_head
    return model.eval()
