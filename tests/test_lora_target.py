"""`--target lora`: adapters that PEFT itself loads, beside the original and the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import eptc
from eptc.errors import (
    CheckpointError,
    EptcError,
    OptionError,
    OutputError,
    ParityError,
    TaskError,
)
from eptc.interop import lora
from eptc.interop.lora import serving_notes
from eptc.interop.lora_files import write_adapter
from eptc.nn import EptConfig, EptModel, load_base, load_reference
from eptc.tasks import Task

pytestmark = [
    # PEFT asks transformers by an older name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # It asks a T5 v1.1's configuration, which calls every model tied.
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]

WEIGHTS, CONFIG, PROVENANCE = "adapter_model.safetensors", "adapter_config.json", "eptc.json"
# Largest difference that the recorded logits allow; the gated T5's reach 39.
SETS = {"t5-tiny": 2e-5, "t5-topk1": 2e-5, "t5-gated-tiny": 5e-5, "llama-tiny": 2e-5}


def load(base: Path, **options: Any) -> Any:
    """Return a base as transformers loads it for its task."""
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(base)
    auto = {
        "t5": transformers.AutoModelForSeq2SeqLM, "llama": transformers.AutoModelForCausalLM,
    }.get(config.model_type, transformers.AutoModelForSequenceClassification)  # fmt: skip
    return auto.from_pretrained(base, dtype=torch.float32, **options).eval()


def ask(model: Any, seed: int = 0) -> Any:
    """Return a model's logits on seeded tokens, some of them padding."""
    drawn = np.random.default_rng(seed)
    ids = torch.from_numpy(drawn.integers(3, 30, (3, 11)))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.from_numpy(drawn.integers(3, 30, (3, 5)))
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def agree(found: Any, want: Any) -> None:
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max()))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- the authors' own checkpoints, whose outputs were recorded


@pytest.fixture(scope="module", params=SETS)
def recorded(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, eptc.Folder]:
    """A set, its folder, and every task of it as an adapter."""
    source = golden / "ept" / request.param
    meta = json.loads((source / "meta.json").read_text())
    folder = eptc.export(
        source / "adapter", base=source / "base", target="lora", task="all",
        tasks=meta["tasks"], top_k=meta["moe_top_k"], out=tmp_path_factory.mktemp("lora") / "out",
    )  # fmt: skip
    return request.param, source, folder


def original(model: Any, want: Any) -> tuple[Any, Any]:
    """Return a model's logits on recorded inputs, and the recorded ones, where they count."""
    given = {key: torch.from_numpy(want[key]) for key in ("input_ids", "attention_mask")}
    if "decoder_input_ids" in want:
        given["decoder_input_ids"] = torch.from_numpy(want["decoder_input_ids"])
        with torch.no_grad():
            return model(**given).logits.numpy(), want["logits"]
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    valid = want["attention_mask"].astype(bool)
    with torch.no_grad():
        return model(**given).logits.numpy()[valid], want["logits"][valid]


def test_adapters_on_one_base_equal_the_original(recorded: tuple[str, Path, eptc.Folder]) -> None:
    """Every task in one PeftModel, switched between, gives what the original code recorded."""
    name, source, folder = recorded
    first, *others = folder.tasks
    model = peft.PeftModel.from_pretrained(load(source / "base"), folder.path / first, first)
    for task in others:
        model.load_adapter(folder.path / task, adapter_name=task)
    for task in reversed(folder.tasks):
        model.set_adapter(task)
        want = np.load(source / "golden" / f"task{folder.tasks.index(task)}.npz")
        found, recorded_logits = original(model.eval(), want)
        np.testing.assert_allclose(found, recorded_logits, rtol=0, atol=SETS[name])


def test_merged_it_is_a_plain_model(
    recorded: tuple[str, Path, eptc.Folder],
) -> None:
    name, source, folder = recorded
    base = load(source / "base")
    names = set(base.state_dict())
    model = peft.PeftModel.from_pretrained(base, folder.path / "sst2").merge_and_unload().eval()
    assert set(model.state_dict()) == names
    found, want = original(model, np.load(source / "golden" / "task6.npz"))
    np.testing.assert_allclose(found, want, rtol=0, atol=SETS[name])


def test_ranks_are_no_larger_than_what_a_task_uses(
    recorded: tuple[str, Path, eptc.Folder],
) -> None:
    """top-k experts of rank 4, those of one size in one: at most 8, and 4 where there is one."""
    name, _, folder = recorded
    most = 4 if name == "t5-topk1" else 8
    for task in folder.tasks:
        assert 4 <= folder.details[task]["rank"] <= most
        assert folder.parity[task]["verified"]
        assert folder.parity[task]["text_probes"] > 0


@pytest.mark.parametrize(
    ("told", "written"), [("google/flan-t5-base", "google/flan-t5-base"), ("/home/ann/t5", None)]
)
def test_a_base_is_named_by_its_hub_s_name(
    copy_golden: Any, golden: Path, tmp_path: Path, told: str, written: str | None
) -> None:
    """Where it lay on the disk of who trained it is nobody's business."""
    copy = copy_golden("t5-tiny")
    path = copy.ckpt / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": told}))
    meta = json.loads((golden / "ept" / "t5-tiny" / "meta.json").read_text())
    folder = eptc.export(
        copy.ckpt, base=copy.base, task=1, tasks=meta["tasks"], top_k=meta["moe_top_k"],
        target="lora", out=tmp_path / "lora", verify=False,
    )  # fmt: skip
    config = json.loads((folder.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == written


# ---- native checkpoints on every kind of base


def shape(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 50, "max_position_embeddings": 64, "initializer_range": 0.3, **more,
    }  # fmt: skip


CLASSES = (
    Task("tone", "classification", labels=("bad", "good", "neither"), aliases=("mood",)),
    Task("topic", "classification", labels=("a", "b", "c")),
    Task("score", "regression"),
)
TEXTS = tuple(Task(name, "text-to-text", labels=("no", "yes")) for name in ("tone", "topic"))


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=10, d_ff=50, num_layers=2, num_heads=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


BASES: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[Task, ...], tuple[str, ...]]] = {
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**shape())),
        ("query", "value", "intermediate.dense", "output.dense"), CLASSES, ("bert.pooler",),
    ),
    "roberta": (
        lambda: transformers.RobertaModel(
            transformers.RobertaConfig(**shape(pad_token_id=1)), add_pooling_layer=False
        ),
        ("query", "output.dense"), CLASSES, (),
    ),
    "deberta": (
        lambda: transformers.DebertaV2Model(
            transformers.DebertaV2Config(
                **shape(), relative_attention=True, position_biased_input=False,
                pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
                position_buckets=8,
            )
        ),
        ("query_proj", "intermediate.dense"), CLASSES, ("pooler",),
    ),
    "t5": (_t5, ("q", "v", "wi", "wo"), TEXTS, ()),
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape(num_key_value_heads=1))
        ),
        ("q_proj", "down_proj"), TEXTS, ()
    ),
}  # fmt: skip


@pytest.fixture
def native(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that writes a native checkpoint and its base, and gives their folders."""

    def write(
        kind: str = "bert", variant: Any = "paper", change: Any = lambda _: None
    ) -> tuple[Path, Path]:
        build, targets, tasks, heads = BASES[kind]
        ckpt, base = tmp_path / "in" / "ckpt", tmp_path / "in" / "base"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build().save_pretrained(base)
            model = EptModel.attach(
                load_base(base, allow_missing=heads),
                EptConfig(
                    variant=variant, targets=targets, kernel_sizes=(2, 3, 4, 5), top_k=2, rank=3,
                    tasks=tasks,
                ),
                head_modules=heads,
            )  # fmt: skip
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            with torch.no_grad():
                change(model)
            model.save(ckpt, base_dir=base, base_name="small")
        return ckpt, base

    return write


def _zero(model: EptModel, path: str) -> None:
    model.layers[path].parts()["B"].data.zero_()


def answers(ckpt: Path, base: Path, task: str) -> Any:
    """Return the unfolded model's logits for a task."""
    reference = load_reference(ckpt, base)
    with reference.task(task):
        return ask(reference.hf)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("kind", BASES)
def test_peft_answers_like_the_unfolded_model(
    native: Any, tmp_path: Path, kind: str, variant: Any
) -> None:
    """Heads of its own included, on a base that has none; merged, too."""
    ckpt, base = native(kind, variant)
    folder = eptc.export(ckpt, base=base, target="lora", task="topic", out=tmp_path / "out")
    options = {"num_labels": 3} if kind not in ("t5", "llama") else {}
    model = peft.PeftModel.from_pretrained(load(base, **options), folder.path).eval()
    want = answers(ckpt, base, "topic")
    assert np.abs(want).max() > 0.1
    agree(ask(model), want)
    agree(ask(model.merge_and_unload()), want)
    assert folder.parity["topic"]["mode"] == "whole model"


def test_tasks_with_heads_switch_on_one_base(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    out = tmp_path / "out"
    eptc.export(ckpt, base=base, target="lora", task=["topic", "mood"], out=out)
    assert sorted(path.name for path in out.iterdir()) == [PROVENANCE, "tone", "topic"]
    model = peft.PeftModel.from_pretrained(load(base, num_labels=3), out / "tone", "tone")
    model.load_adapter(out / "topic", adapter_name="topic")
    for task in ("topic", "tone", "topic"):
        model.set_adapter(task)
        agree(ask(model.eval()), answers(ckpt, base, task))


def test_every_linear_has_one_rank(native: Any, tmp_path: Path) -> None:
    """Kernels of other sizes have other ranks: zeros fill what is less, and nothing is scaled."""
    ckpt, base = native("bert")
    folder = eptc.export(ckpt, base=base, target="lora", task="score", out=tmp_path / "out")
    config = json.loads((folder.path / CONFIG).read_text())
    tensors = safetensors.numpy.load_file(folder.path / WEIGHTS)
    ranks = {len(t) for name, t in tensors.items() if "lora_A" in name}
    assert ranks == {config["r"]} == {config["lora_alpha"]} == {folder.details["score"]["rank"]}
    assert len(folder.details["score"]["ranks"]) > 1
    # By its last name where every linear of that name is adapted: the pooler's `dense` is not.
    assert [name for name in config["target_modules"] if "." not in name] == ["query", "value"]
    assert len(config["target_modules"]) == 2 + 2 * 3
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]


def test_an_expert_that_says_nothing_is_no_rank(native: Any, tmp_path: Path) -> None:
    def silence(model: EptModel) -> None:
        _zero(model, "bert.encoder.layer.0.attention.self.query")

    ckpt, base = native("bert", "paper", silence)
    folder = eptc.export(ckpt, base=base, target="lora", task="tone", out=tmp_path / "out")
    assert folder.details["tone"]["ranks"]["0"] == 1
    model = peft.PeftModel.from_pretrained(load(base, num_labels=3), folder.path).eval()
    agree(ask(model), answers(ckpt, base, "tone"))


def test_an_adapter_that_says_nothing_is_the_base(native: Any, tmp_path: Path) -> None:
    def silence(model: EptModel) -> None:
        for path in model.layers:
            _zero(model, path)

    ckpt, base = native("llama", "released", silence)
    folder = eptc.export(ckpt, base=base, target="lora", task="tone", out=tmp_path / "out")
    assert folder.details["tone"]["rank"] == 0
    want = ask(load(base))
    model = peft.PeftModel.from_pretrained(load(base), folder.path).eval()
    np.testing.assert_array_equal(ask(model), want)


def test_a_lora_is_written_with_the_factor_in_it(tmp_path: Path) -> None:
    """A rank-stabilised one with an alpha of its own comes out as a plain LoRA."""
    torch.manual_seed(0)
    model = _t5().eval()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=9, use_rslora=True, target_modules=["q", "wo"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    want = ask(adapted)
    adapted.save_pretrained(str(tmp_path / "ckpt"))
    folder = eptc.export(
        tmp_path / "ckpt", base=tmp_path / "base", target="lora", out=tmp_path / "out"
    )
    found = peft.PeftModel.from_pretrained(load(tmp_path / "base"), folder.path).eval()
    agree(ask(found), want)


@pytest.mark.parametrize("max_rank", [None, 1])
def test_what_is_adapted_of_a_head_is_folded_into_it(tmp_path: Path, max_rank: int | None) -> None:
    """PEFT adapts nothing inside of a classification head, and replaces it whole."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**shape(num_labels=3))
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query", "classifier"])
    ).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            # Of the query there is rank 1: a cut leaves it as it is.
            parameter.data += 0.2 * torch.randn(parameter.shape)
            if "query.lora_A" in name:
                parameter.data[1] = parameter.data[0]
    want = ask(adapted)
    adapted.save_pretrained(str(tmp_path / "ckpt"))
    folder = eptc.export(
        tmp_path / "ckpt", base=tmp_path / "base", target="lora", out=tmp_path / "out",
        max_rank=max_rank,
    )  # fmt: skip
    assert folder.details["default"]["rank"] == 1  # the head's is no rank of the adapter
    found = peft.PeftModel.from_pretrained(load(tmp_path / "base"), folder.path).eval()
    agree(ask(found), want)


# ---- ranks that are cut


def test_a_cut_rank_loses_what_it_says(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    exact, cut = (
        eptc.export(
            ckpt, base=base, target="lora", task="tone", out=tmp_path / f"{rank}", max_rank=rank
        )
        for rank in (None, 2)
    )
    details, parity = cut.details["tone"], cut.parity["tone"]
    assert (details["rank"], details["lost"]["max_rank"]) == (2, 2)
    tensors = [safetensors.numpy.load_file(f.path / WEIGHTS) for f in (exact, cut)]
    lost = []
    for name in tensors[0]:
        if "lora_A" in name:
            whole, kept = (t[name.replace("_A", "_B")] @ t[name] for t in tensors)
            left_out = np.linalg.svd(whole.astype(np.float64), compute_uv=False)[2:]
            lost.append(np.linalg.norm(left_out) / np.linalg.norm(whole))
            assert np.linalg.norm(whole - kept) / np.linalg.norm(whole) == pytest.approx(
                lost[-1], rel=1e-4
            )
    for found in (details["lost"]["worst"], parity["lost_worst"]):
        assert found == pytest.approx(max(lost), rel=0.06)  # two digits
    for found in (details["lost"]["mean"], parity["lost_mean"]):
        assert found == pytest.approx(np.mean(lost), rel=0.06)
    assert parity["largest_error"] > 1e-3 > exact.parity["tone"]["largest_error"]
    assert [record.name for record in cut.passes][-1] == "truncate-rank"


def test_a_rank_that_is_large_enough_loses_nothing(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("llama")
    folder = eptc.export(
        ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", max_rank=64
    )
    assert folder.details["tone"]["lost"]["worst"] == 0.0
    model = peft.PeftModel.from_pretrained(load(base), folder.path).eval()
    agree(ask(model), answers(ckpt, base, "tone"))


# ---- the gate


def swap(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """The factors of two linears of one shape change places."""
    one, other = (f"base_model.model.bert.encoder.layer.{i}.attention.self.query" for i in (0, 1))
    for part in "AB":
        a, b = (f"{path}.lora_{part}.weight" for path in (one, other))
        tensors[a], tensors[b] = tensors[b], tensors[a]


def transpose(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """A and B of a square linear change places."""
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    a, b = (f"{path}.lora_{part}.weight" for part in "AB")
    tensors[a], tensors[b] = tensors[b].T.copy(), tensors[a].T.copy()


def crop(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """The last input of a linear is not read."""
    name = "base_model.model.bert.encoder.layer.1.output.dense.lora_A.weight"
    tensors[name][:, -1] = 0


def forget(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Half of the ranks are not written."""
    for name in tensors:
        if "lora_" in name:
            half = config["r"] // 2
            tensors[name] = tensors[name][:half] if "_A" in name else tensors[name][:, :half]
    config["r"] = config["lora_alpha"] = config["r"] // 2


def poison(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    name = "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"
    tensors[name][0, 0] = np.nan


def head(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    tensors["base_model.model.classifier.bias"] += 1e-3


def drop_head(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """The pooler is the base's."""
    for name in [name for name in tensors if "pooler" in name]:
        tensors[name] = tensors[name] * 0


def alpha(_: dict[str, Any], config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2


def target(_: dict[str, Any], config: dict[str, Any]) -> None:
    config["target_modules"] = config["target_modules"][1:]


def wide(_: dict[str, Any], config: dict[str, Any]) -> None:
    """PEFT would adapt a linear that has no factors."""
    config["target_modules"].append("key")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has every adapter spoiled after it was written."""

    def plant(fault: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        def spoiled(directory: Path, *arguments: Any) -> int:
            rank = write_adapter(directory, *arguments)
            tensors = dict(safetensors.numpy.load_file(directory / WEIGHTS))
            config = json.loads((directory / CONFIG).read_text())
            fault(tensors, config)
            tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
            safetensors.numpy.save_file(tensors, directory / WEIGHTS)
            (directory / CONFIG).write_text(json.dumps(config))
            return rank

        monkeypatch.setattr(lora, "write_adapter", spoiled)

    return plant


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (swap, "what bert.encoder.layer.0.attention.self.query adds"),
        (transpose, "what bert.encoder.layer.0.attention.self.query adds"),
        (crop, "what bert.encoder.layer.1.output.dense adds"),
        (forget, "output tensors differ"),
        (poison, "does not load.*NaN"),
        (head, "classifier.bias is not the reference's"),
        (drop_head, "pooler.dense.* is not the reference's"),
        (alpha, "the factor 2"),
        (target, "target_modules and the tensors"),
        (wide, "target_modules and the tensors"),
    ],
)
@pytest.mark.parametrize("memory", [None, 1], ids=["whole", "by linear"])
def test_what_is_off_is_never_published(
    native: Any, spoil: Any, tmp_path: Path, fault: Any, words: str, memory: int | None
) -> None:
    ckpt, base = native("bert")
    spoil(fault)
    with pytest.raises(ParityError, match=words):
        eptc.export(
            ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", max_memory=memory
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("fault", [swap, transpose, crop, poison, head, alpha, target])
def test_a_cut_rank_is_no_excuse(native: Any, spoil: Any, tmp_path: Path, fault: Any) -> None:
    """What was asked for may be lost; garbage is not what was asked for."""
    ckpt, base = native("bert")
    spoil(fault)
    with pytest.raises(ParityError):
        eptc.export(ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", max_rank=4)
    assert not (tmp_path / "out").exists()


def test_linear_by_linear_where_memory_is_short(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("roberta")
    small, large = (
        eptc.export(
            ckpt, base=base, target="lora", task="tone", out=tmp_path / f"{memory}",
            max_memory=memory,
        )
        for memory in (1, None)
    )  # fmt: skip
    parity = small.parity["tone"]
    assert (parity["mode"], parity["passed"]) == ("linear by linear", True)
    assert parity["tensors"] == parity["linears"]
    found = [contents(folder.path) for folder in (small, large)]
    for each in found:
        del each[PROVENANCE]  # it says how it was compared
    assert found[0] == found[1]


def test_nobody_is_asked_without_verification(native: Any, spoil: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    spoil(alpha)
    folder = eptc.export(
        ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", verify=False
    )
    assert folder.parity == {"tone": {"verified": False}}
    assert json.loads((folder.path / PROVENANCE).read_text())["parity"] == {"verified": False}


# ---- what is written


def test_two_exports_are_equal(native: Any, tmp_path: Path) -> None:
    ckpt, _ = native("deberta")
    found = []
    for name in ("one", "two"):
        moved = tmp_path / name / "in"
        shutil.copytree(ckpt.parent, moved)
        folder = eptc.export(
            moved / "ckpt", base=moved / "base", target="lora", task="all", max_rank=3,
            out=tmp_path / name / "out",
        )  # fmt: skip
        found.append(contents(folder.path))
    assert found[0] == found[1]
    assert len({path.stat().st_mode for path in folder.path.glob("score/*")}) == 1
    assert sorted(found[0])[:2] == [PROVENANCE, f"score/{CONFIG}"]
    assert not any(str(tmp_path).encode() in content for content in found[0].values())


def test_the_folder_says_what_it_was_made_from(native: Any, tmp_path: Path) -> None:
    import hashlib

    ckpt, base = native("t5")
    folder = eptc.export(ckpt, base=base, target="lora", task="all", out=tmp_path / "out")
    assert json.loads((folder.path / PROVENANCE).read_text()) == {
        "schema": 1, "target": "lora", "folders": ["tone", "topic"],
    }  # fmt: skip
    said = json.loads((folder.path / "topic" / PROVENANCE).read_text())
    assert (said["target"], said["tasks"]) == ("lora", [TEXTS[1].to_json()])
    assert (
        said["base"]["sha256"]
        == json.loads((ckpt / "ept_config.json").read_text())["base"]["sha256"]
    )
    assert [step["name"] for step in said["passes"]] == [
        "specialize-router", "drop-dead-experts", "factor-pyramid",
    ]  # fmt: skip
    factored = said["passes"][-1]
    assert 0 < factored["error"] <= 1
    assert 0 < factored["bound"] < 1e-5
    assert said["adapter"] == folder.details["topic"]
    assert said["adapter"]["lost"] is None
    assert 0 < said["adapter"]["rounding"] < 1e-6
    for name, record in said["files"].items():
        content = (folder.path / "topic" / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert sorted(said["files"]) == [CONFIG, WEIGHTS]


# ---- what is refused


def test_what_no_lora_says_is_refused(
    small_routed: Any, write_tucka: Any, small_mept: Any, tmp_path: Path
) -> None:
    for folders, words in (
        (small_routed, "chooses experts by the input.*: no LoRA does"),
        (write_tucka("bert"), "chooses experts by the input.*: no LoRA does"),
        (small_mept("t5"), "puts prompts before the text"),
    ):
        with pytest.raises(CheckpointError, match=words) as refused:
            eptc.export(
                folders.ckpt, base=folders.base, target="lora", task=0, out=tmp_path / "out"
            )
        assert "--target onnx" in str(refused.value)
        assert not (tmp_path / "out").exists()


def test_parameters_beside_the_low_ranks_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BASES["llama"][0]()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "ckpt"))
    with pytest.raises(CheckpointError, match=r"such as lm_head\.weight"):
        eptc.export(tmp_path / "ckpt", base=tmp_path / "base", target="lora", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": None}, TaskError, "3 tasks, and none was chosen"),
        ({"task": "tome"}, TaskError, "did you mean 'tone'"),
        ({"task": "tone,tome"}, TaskError, "did you mean 'tone'"),
        ({"task": "tone,mood"}, TaskError, "'tone' is chosen twice: as 'tone' and as 'mood'"),
        ({"task": ["topic", 1]}, TaskError, "'topic' is chosen twice"),
        ({"task": []}, TaskError, "tasks chosen are"),
        ({"task": "tone,"}, TaskError, "tasks chosen are"),
        ({"max_rank": 0}, OptionError, "--max-rank is 0"),
        ({"max_rank": -3}, OptionError, "--max-rank is -3"),
        ({"precision": "int8"}, OptionError, "--precision int8 was given together with"),
        ({"precision": "all"}, OptionError, "--precision all was given together with"),
        ({"calibration": "texts"}, OptionError, "--calibration texts was given"),
        ({"routing": "frozen"}, OptionError, "--routing frozen was given together with"),
        ({"optimize_for": "cuda"}, OptionError, "--optimize-for cuda was given together with"),
        ({"probe": "texts"}, OptionError, "--probe texts was given together with"),
        ({"data": "rows", "max_drop": 0.0}, OptionError, "--data rows was given"),
        ({"max_drop": 0.0}, OptionError, "--max-drop 0.0 was given"),
        ({"passes": ["x"]}, OptionError, "--pass was given together with"),
        ({"target": "onnx", "max_rank": 4}, OptionError, "it with --target lora"),
        ({"target": "lora2"}, OptionError, "or lora or"),
    ],
)  # fmt: skip
def test_bad_options(
    native: Any, tmp_path: Path, options: dict[str, Any], error: type[EptcError], words: str
) -> None:
    ckpt, base = native("bert")
    given: dict[str, Any] = {"target": "lora", "task": "tone", **options}
    with pytest.raises(error, match=words) as refused:
        eptc.export(ckpt, base=base, out=tmp_path / "out", **given)
    assert refused.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nothing_is_predicted_of_what_is_no_engine(native: Any) -> None:
    ckpt, base = native("bert")
    with pytest.raises(OptionError, match="--target lora writes none"):
        eptc.plan(ckpt, base=base, target="lora", task="tone")


def _rename_score(ckpt: Path, name: str) -> None:
    described = json.loads((ckpt / "ept_config.json").read_text())
    described["tasks"][2]["name"] = name
    (ckpt / "ept_config.json").write_text(json.dumps(described))
    tensors = safetensors.numpy.load_file(ckpt / "ept_model.safetensors")
    tensors = {n.replace("heads.score.", f"heads.{name}."): t for n, t in tensors.items()}
    safetensors.numpy.save_file(tensors, ckpt / "ept_model.safetensors")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("how good", "how%20good"), ("a/b", "a%2Fb"), ("gut für", "gut%20f%C3%BCr")],
)
def test_names_that_folders_have_in_other_letters(
    native: Any, tmp_path: Path, name: str, folder: str
) -> None:
    """PEFT loads what is there; the folder says whose it is, and is known again."""
    ckpt, base = native("bert")
    _rename_score(ckpt, name)
    out = tmp_path / "out"
    given: dict[str, Any] = {"base": base, "target": "lora", "task": "all", "out": out}
    built = eptc.export(ckpt, **given)
    assert built.tasks == ("tone", "topic", name)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [PROVENANCE, folder, "tone", "topic"]
    )
    said = json.loads((out / folder / PROVENANCE).read_text())
    assert [task["name"] for task in said["tasks"]] == [name]
    model = peft.PeftModel.from_pretrained(load(base, num_labels=1), out / folder).eval()
    agree(ask(model), answers(ckpt, base, name))
    eptc.export(ckpt, **given, verify=False, force=True)


@pytest.mark.parametrize("name", ["..", ".a", "~", "eptc.json", "Tone", 80 * "ü"])
def test_names_that_are_no_folders(native: Any, tmp_path: Path, name: str) -> None:
    ckpt, base = native("bert")
    _rename_score(ckpt, name)
    with pytest.raises(TaskError, match="export this task by itself"):
        eptc.export(ckpt, base=base, target="lora", task="all", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    eptc.export(ckpt, base=base, target="lora", task=2, out=tmp_path / "out", verify=False)


def test_what_lies_there(native: Any, tmp_path: Path) -> None:
    """Folders of eptc's own are replaced with force, others never."""
    ckpt, base = native("llama")
    given: dict[str, Any] = {"base": base, "target": "lora", "verify": False}
    out = tmp_path / "out"
    eptc.export(ckpt, task="all", out=out, **given)
    with pytest.raises(OutputError, match="is not empty"):
        eptc.export(ckpt, task="all", out=out, **given)
    eptc.export(ckpt, task="topic", out=out, force=True, **given)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS, PROVENANCE]
    eptc.export(ckpt, task="all", out=out, force=True, **given)
    (out / "mine").mkdir()
    before = contents(out)
    with pytest.raises(OutputError, match="holds folders that eptc did not write, such as mine"):
        eptc.export(ckpt, task="tone", out=out, force=True, **given)
    assert contents(out) == before


@pytest.mark.parametrize("when", ["task topic", "parity: linears of topic"])
def test_cut_short_it_leaves_nothing(native: Any, tmp_path: Path, when: str) -> None:
    ckpt, base = native("llama")

    def progress(event: Any) -> None:
        if event == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eptc.export(
            ckpt, base=base, target="lora", task="all", out=tmp_path / "out", progress=progress
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- the command line


def test_the_command_line(native: Any, cli: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    given = ("export", ckpt, "--base", base, "--target", "lora", "--task", "all")
    said = cli(*given, "-o", tmp_path / "out")
    assert said.code == 0, said.stderr
    for words in ("tone", "topic", "score", "rank", "flips", "largest error"):
        assert words in said.stdout
    assert "modules_to_save" in said.stderr
    found = cli(*given, "-o", tmp_path / "json", "--max-rank", "2", "--json").json
    assert (found["target"], found["tasks"]) == ("lora", ["tone", "topic", "score"])
    assert found["details"]["tone"]["rank"] == 2
    assert found["parity"]["tone"]["passed"]
    assert [record["name"] for record in found["passes"]][-1] == "truncate-rank"
    refused = cli(*given, "-o", tmp_path / "bad", "--precision", "int8", "--json")
    assert (refused.code, refused.json["exit_code"]) == (2, 2)
    assert cli(*given, "--dry-run").code == 2
    assert "not verified" in cli(*given, "-o", tmp_path / "no", "--no-verify").stdout


def test_the_gate_is_the_exit_code(native: Any, spoil: Any, cli: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    spoil(alpha)
    given = ("export", ckpt, "--base", base, "--target", "lora", "--task", "tone")
    assert cli(*given, "-o", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "heads", "words"),
    [
        (1, False, None),
        (16, False, None),
        (17, False, "--max-lora-rank 32"),
        (24, False, "--max-lora-rank 32"),
        (32, False, "--max-lora-rank 32"),
        (300, False, "--max-lora-rank 320"),
        (512, False, "--max-lora-rank 512"),
        (513, False, "cut it with --max-rank"),
        (4, True, "modules_to_save"),
    ],
)
def test_what_is_said_of_serving(rank: int, heads: bool, words: str | None) -> None:
    notes = serving_notes(rank, heads=heads)
    assert notes == () if words is None else words in notes[0]
