"""Folders of MEPT and SMoP: what is read, what is recovered, what is refused and how."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eptc import checkpoint
from eptc.errors import BaseModelError, CheckpointError, OptionError
from eptc.ir import PromptLayout
from eptc.nn.mept import MeptModel

Make = Callable[..., Any]


def read(folders: Any, **options: Any) -> checkpoint.Checkpoint:
    return checkpoint.read(folders.ckpt, folders.base, **options)


def write_setting(file: Path, key: str, value: Any) -> None:
    """Set a setting of one file; None removes it."""
    settings = {**json.loads(file.read_text()), key: value}
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


@dataclasses.dataclass(frozen=True)
class Case:
    """What is done to a sound folder, and what the refusal says."""

    says: str
    backbone: str = "t5"
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Callable[[dict[str, torch.Tensor]], None] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: type[Exception] = CheckpointError


BLOCK = "base_model.encoder.block"


def drop(*endings: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(endings)]:
            del tensors[name]

    return change


def only(*marks: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Keep what training unfroze, by the marks in its names."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if not any(mark in n for mark in marks)]:
            del tensors[name]

    return change


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


def cut(name: str, rows: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:, :rows].clone()

    return change


def move(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name] + 1e-3

    return change


TRAINED = ("router", "prompt_embedding", "shared_embedding", "score")
CASES = {
    "gumbel": Case("draws noise for every answer", settings={"gumbel": True}),
    "no-topk": Case("how many experts are mixed", settings={"topk": None}),
    "no-stochastic": Case("does not say whether training was stochastic",
                          settings={"stochastic": None}),
    "no-gumbel": Case("does not say whether training was gumbel", settings={"gumbel": None}),
    "topk-too-large": Case("mixes 5 experts of 4", settings={"topk": 5}),
    "topk-0": Case("mixes 0 experts of 4", settings={"topk": 0}),
    "topk-text": Case("topk in", settings={"topk": "2"}),
    "no-multiple": Case("no multiple of", settings={"num_virtual_tokens": 5}),
    "other-size": Case("12 prompts for 4 experts", settings={"num_virtual_tokens_full": 24}),
    "other-layers": Case("adapts the blocks [0, 1], its tensors are of [0, 1, 2]",
                         settings={"layers": [0, 1]}),
    "odd-layers": Case("layers in", settings={"layers": "0,1,2"}),
    "two-methods": Case("has the methods", settings={"method": "prompt-routing"}),
    "stochastic-t5": Case("itself fails to answer", made={"stochastic": True}),
    "frozen": Case("--routing frozen", options={"routing": "frozen"}, error=OptionError),
    "nothing-coupled": Case("do not depend on one another", options={"routing": "batch"},
                            error=OptionError),
    "one-prompt": Case("fails for more than one row", options={"routing": "batch"},
                       made={"num_virtual_tokens": 1}, error=OptionError),
    "other-topk": Case("--top-k is 3", options={"top_k": 3}, error=OptionError),
    "uninitialised": Case("never initialised",
                          tensors=fill(f"{BLOCK}.1.prompt_embedding.weight", math.nan)),
    "infinite": Case("never initialised",
                     tensors=fill(f"{BLOCK}.2.prompt_embedding.weight", math.inf)),
    "no-router": Case("lacks the router of block 1",
                      tensors=drop("block.1.prompt_router.0.weight")),
    "no-shared": Case("has no shared prompts of block 2",
                      tensors=drop("block.2.shared_embedding")),
    "half": Case("an expert has 3", tensors=cut(f"{BLOCK}.0.shared_embedding", 2)),
    "frozen-experts": Case("froze at random numbers", made={"layers": [1]},
                           tensors=drop("prompt_encoder.embedding.weight")),
    "trained-smop": Case("froze at random numbers", made={"method": "prompt-routing"},
                         tensors=only("router.0")),
    "another-base": Case("training froze it",
                         tensors=move(f"{BLOCK}.0.layer.0.layer_norm.weight")),
    "foreign": Case("more [2], which is neither a tensor of prompts nor one of",
                    tensors=lambda t: t.update(more=torch.ones(2))),
    "foreign-in-a-block": Case("remove it if no forward pass", tensors=lambda t: t.update(
        {f"{BLOCK}.0.foo": torch.ones(2)})),
    "deeper-base": Case("give the base the prompts were trained on", tensors=lambda t: t.update(
        {f"{BLOCK}.3.layer.0.layer_norm.weight": torch.ones(32)})),
    "shared-by-some": Case("has no shared prompts of block 1\n"
                           "expected: shared_embedding at every prompt site",
                           settings={"shared_expert": None},
                           tensors=drop("block.1.shared_embedding")),
    "overflowing": Case("cannot add up in float32",
                        tensors=fill(f"{BLOCK}.1.prompt_embedding.weight", 1e26)),
    "overflowing-shared": Case("cannot add up in float32",
                               tensors=fill(f"{BLOCK}.2.shared_embedding", -2e19)),
    "no-score": Case("no score.weight", "llama", tensors=drop("score.weight")),
    "causal": Case("LlamaForCausalLM", "llama", tensors=lambda t: t.update(
        {"lm_head.weight": t.pop("score.weight")})),
    "trained-llama": Case("what it added is random", "llama", tensors=only(*TRAINED),
                          settings={"tokenizer_length": 17}),
    "unknown-vocabulary": Case("which nothing says", "llama", tensors=only(*TRAINED),
                               settings={"tokenizer_length": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(small_mept: Make, name: str) -> None:
    case = CASES[name]
    folders = small_mept(case.backbone, **case.made)
    if case.settings:
        folders.settings(**case.settings)
    if case.tensors is not None:
        folders.tensors(case.tensors)
    with pytest.raises(case.error) as caught:
        read(folders, **case.options)
    assert case.says in str(caught.value)


def test_prompt_embeddings_alone_are_refused(small_mept: Make) -> None:
    folders = small_mept()
    (folders.ckpt / "model.safetensors").unlink()
    file = folders.ckpt / "adapter_model.bin"
    torch.save({"prompt_embeddings": torch.ones(12, 32)}, file)
    with pytest.raises(CheckpointError, match="prompt_embeddings alone"):
        read(folders, allow_pickle=True)


def test_a_pickle_is_read_only_where_it_is_allowed(small_mept: Make) -> None:
    import safetensors.torch

    folders = small_mept()
    path = folders.ckpt / "model.safetensors"
    torch.save(safetensors.torch.load_file(path), folders.ckpt / "pytorch_model.bin")
    whole = read(folders).sha256
    path.unlink()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        read(folders)
    assert read(folders, allow_pickle=True).sha256 == whole


def test_a_folder_without_a_state_dict_is_refused(small_mept: Make) -> None:
    folders = small_mept()
    (folders.ckpt / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read(folders)


def test_another_backbone_is_refused(small_mept: Make, small_native: Any) -> None:
    with pytest.raises(BaseModelError, match="bert model, to which the training code adds no"):
        checkpoint.read(small_mept().ckpt, small_native.base)


WRONG_TYPES = [
    ("stochastic", "false"), ("stochastic", 0), ("gumbel", "false"), ("shared_expert", "false"),
    ("topk", "2"), ("topk", True), ("num_virtual_tokens", 3.0), ("num_virtual_tokens_full", "12"),
    ("tokenizer_length", "17"), ("layers", "0,1,2"), ("method", ["prompt-expert"]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
@pytest.mark.parametrize("file", ["train_args.json", "adapter_config.json"])
def test_settings_of_another_type_are_refused(
    small_mept: Make, file: str, key: str, value: Any
) -> None:
    """By the reader and by the reference: to Python the text "false" is true."""
    folders = small_mept()
    write_setting(folders.ckpt / file, key, value)
    with pytest.raises(CheckpointError, match=f"{key} in .*{file}") as caught:
        read(folders)
    assert caught.value.fix
    with pytest.raises(CheckpointError, match=f"{file}: {key} is"):
        MeptModel.load(folders.ckpt, folders.base)


@pytest.mark.parametrize(("key", "value"), [("layers", [0, True]), ("shared_expert_ratio", "all"),
                                            ("tokenizer_pad_token_id", "0"),
                                            ("method", "prompt-tuning")])  # fmt: skip
def test_settings_that_only_the_reader_uses(small_mept: Make, key: str, value: Any) -> None:
    folders = small_mept()
    write_setting(folders.ckpt / "train_args.json", key, value)
    with pytest.raises(CheckpointError, match=f"{key} in .*train_args.json is"):
        read(folders)


@pytest.mark.parametrize("layers", [[0, 1], [0, 1, 2, -1], "0,1,2"], ids=str)
def test_layers_that_contradict_the_tensors_say_what_to_do(small_mept: Make, layers: Any) -> None:
    folders = small_mept()
    folders.settings(layers=layers)
    with pytest.raises(CheckpointError, match="to fix: "):
        read(folders)


def test_prompts_far_larger_than_the_embedding_are_noted(small_mept: Make) -> None:
    folders = small_mept()
    name = f"{BLOCK}.1.prompt_embedding.weight"
    folders.tensors(fill(name, 100.0))
    assert not read(folders).contents.notes
    folders.tensors(fill(name, -1e15))
    (note,) = read(folders).contents.notes
    assert name in note
    assert "1e+15" in note


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_layers_and_method_are_recovered_from_the_keys(small_mept: Make, backbone: str) -> None:
    folders = small_mept(backbone, layers=[0, 2])
    wanted = read(folders).contents.prompts
    folders.settings(layers=None, method=None, num_virtual_tokens=None)
    settings = json.loads((folders.ckpt / "adapter_config.json").read_text())
    (folders.ckpt / "adapter_config.json").write_text(json.dumps({**settings, "layers": None}))
    found = read(folders).contents
    assert (
        found.prompts
        == wanted
        == PromptLayout(
            length=3, experts=4, top_k=2, layers=(0, 2), shared=True, constant=False, coupled=False
        )
    )
    assert found.variant == "mept"
    assert found.notes == (
        "no file says method: 'prompt-expert' is taken from the peft_type in adapter_config.json",
        "no file says num_virtual_tokens: 3 is taken from the tensors",
        "no file says layers: [0, 2] is taken from the tensors",
    )


@pytest.mark.parametrize(
    ("gone", "other", "recovered"),
    [
        ("train_args.json", "adapter_config.json", ["method", "shared_expert", "layers"]),
        ("adapter_config.json", "train_args.json", []),
    ],
)
def test_a_file_that_is_missing_is_noted(
    small_mept: Make, gone: str, other: str, recovered: list[str]
) -> None:
    folders = small_mept()
    wanted = read(folders).contents
    write_setting(folders.ckpt / "adapter_config.json", "gumbel", False)
    (folders.ckpt / gone).unlink()
    found = read(folders).contents
    assert found.prompts == wanted.prompts
    assert found.notes[0].startswith(
        f"there is no {gone}: what it would say is taken from {other}"
    )
    names = [note.split(":")[0].removeprefix("no file says ") for note in found.notes[1:]]
    assert names == recovered


def test_a_folder_that_names_no_method_is_told_what_is_missing(small_mept: Make) -> None:
    folders = small_mept()
    (folders.ckpt / "adapter_config.json").unlink()
    write_setting(folders.ckpt / "train_args.json", "method", None)
    with pytest.raises(CheckpointError) as caught:
        read(folders)
    for word in ("train_args.json", "method", "PROMPT_EXPERT", "--format mept"):
        assert word in str(caught.value)
    found = read(folders, format="mept").contents
    assert found.variant == "mept"
    assert "no file says method: 'prompt-expert' is taken from the tensors' names" in found.notes
    (folders.ckpt / "train_args.json").unlink()
    with pytest.raises(CheckpointError, match="--format mept"):
        read(folders)
    with pytest.raises(CheckpointError, match='write "stochastic": false'):
        read(folders, format="mept")


def test_train_args_alone_are_enough(small_mept: Make) -> None:
    """A Llama has no PEFT wrapper that would write an adapter_config.json."""
    folders = small_mept("llama")
    wanted = read(folders).contents.prompts
    (folders.ckpt / "adapter_config.json").unlink()
    assert read(folders).contents.prompts == wanted


def test_indices_beyond_the_depth_are_ignored(small_mept: Make) -> None:
    contents = read(small_mept(layers=list(range(12)))).contents
    assert contents.prompts is not None
    assert contents.prompts.layers == (0, 1, 2)


def test_what_the_caller_says_of_topk(small_mept: Make) -> None:
    folders = small_mept()
    folders.settings(topk=None)
    contents = read(folders, top_k=3).contents
    assert contents.prompts is not None
    assert contents.prompts.top_k == 3


ROUTING = [
    # backbone, settings, --routing, mode, padding
    ("t5", {}, "exact", "per-sample", True),
    ("t5", {"topk": 1}, "exact", "batch", True),
    ("t5", {"topk": 1}, "per-sample", "per-sample", True),
    ("t5", {"layers": [1]}, "exact", "batch", True),
    ("t5", {"layers": [1]}, "batch", "batch", True),
    ("t5", {"method": "prompt-routing"}, "exact", "batch", False),
    ("t5", {"method": "prompt-routing"}, "per-sample", "per-sample", False),
    ("t5", {"method": "prompt-routing", "stochastic": True}, "exact", "batch", False),
    ("t5", {"method": "prompt-routing", "stochastic": True}, "per-sample", "constant", False),
    ("t5", {"num_virtual_tokens_full": 3, "topk": 1}, "exact", "batch", False),
    ("t5", {"num_virtual_tokens_full": 3, "topk": 1}, "per-sample", "constant", False),
    ("t5", {"num_virtual_tokens": 1}, "exact", "per-sample", True),
    ("llama", {}, "exact", "per-sample", True),
    ("llama", {"topk": 1}, "exact", "batch", True),
    ("llama", {"stochastic": True}, "exact", "constant", True),
]


@pytest.mark.parametrize(("backbone", "settings", "asked", "mode", "padding"), ROUTING)
def test_what_an_answer_depends_on(
    small_mept: Make, backbone: str, settings: dict[str, Any], asked: Any, mode: str, padding: bool
) -> None:
    contents = read(small_mept(backbone, **settings), routing=asked).contents
    assert (contents.routing.mode, contents.routing.reads_padding) == (mode, padding)
    assert bool(contents.notes) is (settings.get("num_virtual_tokens") == 1)


@pytest.mark.parametrize("backbone", ["t5", "llama"])
def test_what_was_trained_needs_the_base_alone(small_mept: Make, backbone: str) -> None:
    folders = small_mept(backbone)
    whole = {name: tensor.numpy() for name, tensor in read(folders).weights.items()}
    folders.tensors(only(*TRAINED))
    found = read(folders)
    assert found.weights.keys() == whole.keys()
    for name, tensor in found.weights.items():
        np.testing.assert_array_equal(tensor.numpy(), whole[name], err_msg=name)
    assert found.contents.details["prompts"]["state_dict"] == "trained"


def test_a_vocabulary_that_training_cut_is_cut(small_mept: Make) -> None:
    folders = small_mept()
    folders.settings(tokenizer_length=14)
    folders.tensors(only(*TRAINED))
    found = read(folders)
    assert found.weights["shared.weight"].shape == (14, 32)
    np.testing.assert_array_equal(
        found.weights["shared.weight"].numpy(), found.base.weights["shared.weight"].numpy()[:14]
    )
    assert found.model.config["vocab_size"] == 14
    folders.settings(tokenizer_length=None)
    assert "nothing says how many tokens" in read(folders).contents.notes[0]


def test_a_row_that_training_added_is_taken_from_the_state_dict(small_mept: Make) -> None:
    folders = small_mept("llama")
    name = "model.embed_tokens.weight"

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name], torch.full((1, 32), 7.0)])

    folders.tensors(grow)
    found = read(folders)
    assert found.model.config["vocab_size"] == found.base.weights[name].shape[0] + 1
    assert found.weights[name].numpy()[-1].tolist() == [7.0] * 32


def test_a_llama_is_a_classifier(small_mept: Make) -> None:
    found = read(small_mept("llama"))
    assert found.base.architecture.kind == "encoder-classifier"
    assert "lm_head.weight" in found.base.unused
    assert found.contents.tasks[0].labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert found.contents.heads["default"]["score.weight"].shape == (3, 32)


def test_recorded_folders(golden: Path) -> None:
    for folder in sorted((golden / "mept").iterdir()):
        meta = json.loads((folder / "manifest.json").read_text())
        found = checkpoint.read(folder / "checkpoint", folder / "base", allow_pickle=True)
        found.check_base()
        layout, args = found.contents.prompts, meta["args"]
        assert layout is not None
        assert layout.layers == tuple(meta["adapted_blocks"])
        assert (layout.length, layout.experts) == (args["num_virtual_tokens"], meta["n_routes"])
        assert found.contents.details["prompts"]["method"] == args["method"]
