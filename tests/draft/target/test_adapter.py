"""A LoRA adapter on the target: its merged output, its identity, what is refused, and the whole way to an answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from written_data import prepared

from draft.data.dataset import open_dataset
from draft.errors import UserError
from draft.evaluation.replay import replay
from draft.files import file_sha256
from draft.heads.checkpoint import load_head, save_head
from draft.interop.importing import import_head
from draft.target import load_target
from draft.training.config import resolve
from draft.training.merge import merge_run
from draft.training.trainer import Trainer
from serving.cli import load_engine
from serving.engine import SamplingParams

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def save_adapter(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A LoRA adapter for the tiny target, with weights large enough to change what it writes."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    adapted = get_peft_model(make_tiny_target(dtype=torch.float32).model, LoraConfig(**settings))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_tiny_target(root / "target")
    save_adapter(root / "tuned")
    save_adapter(root / "other", seed=1)
    return root


def test_an_imported_head_names_the_adapter(world, tmp_path):
    target = load_target(str(world / "target"), "float32", "cpu", world / "tuned")
    save_head(make_tiny_head(target), tmp_path / "head", dtype=torch.float32, about={})
    import_head(tmp_path / "head", target, tmp_path / "imported")
    about = load_head(tmp_path / "imported")[1]
    assert about["target_adapter"] == str(world / "tuned") and about["target_fingerprint"] == target.fingerprint


# kinds of adapters that PEFT saves -> options of LoraConfig
MERGED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "layers_to_transform": [1, 5]},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lm_head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens", "norm"]},
    "tied saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "both, DoRA": {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    "tokens": {"trainable_token_indices": [5, 7]},
    "tokens of lm_head": {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [6]}},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "QA-LoRA": {"use_qalora": True, "qalora_group_size": 4},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens = .5, 6. cannot be merged"),
    "replication": ({"layer_replication": [[0, 4], [2, 8]]}, "layer_replication = .* cannot be merged"),
    "random PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = .pissa_niter_4. cannot be merged"),
    "biases": ({"lora_bias": True}, "cannot be merged .*lora_bias=True"),
    "two kinds on tied weights": (
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5, 6]},
        "cannot be merged .lm_head is adapted in several ways",
    ),
}


@pytest.mark.parametrize("options", MERGED.values(), ids=MERGED)
def test_the_output_is_that_of_peft_unmerged(world, tmp_path, options):
    adapter = save_adapter(tmp_path / "adapter", **options)
    files = sorted((world / "target").iterdir())
    before = file_sha256(*files)
    target = load_target(str(world / "target"), "float32", adapter=adapter)
    plain = load_target(str(world / "target"), "float32")
    logits, unadapted = (each.logits(each.forward(IDS).last_hidden) for each in (target, plain))
    kept = PeftModel.from_pretrained(plain.model, adapter).eval()
    torch.testing.assert_close(logits, kept(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, unadapted, atol=1e-2)
    assert file_sha256(*files) == before
    assert not [name for name, _ in target.model.named_modules() if "lora" in name]


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_merging_would_lose_is_refused_by_name(world, tmp_path, options, words):
    adapter = save_adapter(tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=words):
        load_target(str(world / "target"), "float32", adapter=adapter)


def test_warnings_of_peft_are_passed_on(world, tmp_path, caplog):
    adapter = save_adapter(tmp_path)
    change_config(invented_by_a_later_version=False)(adapter)
    load_target(str(world / "target"), "float32", adapter=adapter)
    assert "PEFT warns: Unexpected keyword arguments ['invented_by_a_later_version']" in caplog.text
    change_config(invented_by_a_later_version=True)(adapter)
    with pytest.raises(UserError, match="invented_by_a_later_version = true cannot be merged"):
        load_target(str(world / "target"), "float32", adapter=adapter)


def test_the_fingerprint_names_target_and_adapter(world):
    name = str(world / "target")
    tuned = {load_target(name, dtype, adapter=world / "tuned").fingerprint for dtype in ("float64", "bfloat16")}
    other = load_target(name, "float32", adapter=world / "other")
    plain = load_target(name, "float32")
    assert len(tuned) == 1 and len({*tuned, other.fingerprint, plain.fingerprint}) == 3
    assert other.base_fingerprint == plain.fingerprint == plain.base_fingerprint


def test_a_head_is_adapted_to_the_fine_tuned_target_and_served_with_it(world, tmp_path):
    name, adapter = str(world / "target"), str(world / "tuned")
    target = load_target(name, "float64", adapter=adapter)
    stock = make_tiny_head(make_tiny_target(dtype=torch.float32))
    about = {"target": name, "target_fingerprint": target.base_fingerprint}
    save_head(stock, tmp_path / "stock", dtype=torch.float32, about=about)  # made for the target without it
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(6)))
    data = prepared(target, tmp_path / "data", prompts=[questions], max_new_tokens=10, greedy_share=1.0)
    rows = data.rows("train") + data.rows("held-out")
    merged = PeftModel.from_pretrained(load_target(name, "float64").model, adapter).merge_and_unload()
    for row in rows:
        prompt = torch.tensor([row.ids[: row.prompt_length]])
        answer = merged.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, pad_token_id=2
        )
        assert answer[0].tolist() == row.ids
    assert data.manifest["target_adapter"] == adapter

    flags = {"target": name, "target_adapter": adapter, "data": [str(tmp_path / "data")], "dtype": "float64",
             "head": str(tmp_path / "stock"), "method": "afa-lora", "rank": 2,
             "max_steps": 2, "draft_steps": 2, "eval_every": 0}  # fmt: skip
    Trainer(resolve("adapt", str(tmp_path / "run"), flags=flags), Console(quiet=True)).train()
    merge_run(tmp_path / "run", tmp_path / "head")
    head, about = load_head(tmp_path / "head", dtype=torch.float64)
    assert (about["target_adapter"], about["target_fingerprint"]) == (adapter, target.fingerprint)

    options = {"speculation": "chain", "speculation_length": 3, "max_batch": 4, "mode": "eager", "threads": None}
    engine = load_engine(name, str(tmp_path / "head"), "float64", target_adapter=adapter, warm_up=False, **options)
    completions = engine.generate([row.ids[: row.prompt_length] for row in rows], SamplingParams(10))
    assert [completion.token_ids for completion in completions] == [row.ids[row.prompt_length :] for row in rows]
    emitted, verified = (sum(getattr(c.stats, field) for c in completions) for field in ("emitted", "verifications"))
    assert replay(target, {"head": head}, rows, 3)["head"].tau(3) == emitted / verified

    with pytest.raises(UserError, match=rf"made for target {target.fingerprint} and this target is"):
        load_engine(name, str(tmp_path / "head"), "float64", target_adapter=None, warm_up=False, **options)
    for wrong in (str(world / "other"), None):
        reader = load_target(name, "float32", adapter=wrong)
        with pytest.raises(UserError, match="prepared for target.*with adapter.*tuned.*and target"):
            open_dataset(tmp_path / "data").check_target(reader)


def change_config(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({name: value.clone() for name, value in change(load_file(file)).items()}, file)

    return write


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "no adapter_config.json"),
        (change_config(peft_type="PREFIX_TUNING"), "PREFIX_TUNING.*only LORA"),
        (change_tensors(lambda t: {name: value[..., :-1] for name, value in t.items()}), "does not fit.*size mismatch"),
        (change_tensors(lambda t: dict(list(t.items())[2:])), "does not fit target.*missing"),
        (
            change_tensors(lambda t: t | {name.replace(".7.", ".17."): value for name, value in t.items()}),
            "does not fit target.*layers.17",
        ),
        (change_config(target_modules=["Wqkv"]), "does not fit target.*Wqkv"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"damaged"), "is not a whole safetensors"),
        (change_tensors(lambda t: {name: value.to(torch.int8) for name, value in t.items()}), "is of dtype I8"),
        (change_tensors(lambda t: {name: value / 0 for name, value in t.items()}), "cannot be merged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not readable JSON"),
    ],
)
def test_an_adapter_that_is_not_of_this_target_is_refused_in_one_sentence(world, tmp_path, damage, words):
    damage(save_adapter(tmp_path / "adapter"))
    with pytest.raises(UserError, match=words) as error:
        load_target(str(world / "target"), "float32", adapter=tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_another_chat_template_beside_the_adapter_is_told(world, tmp_path, caplog):
    save_adapter(tmp_path)
    tokenizer = make_tiny_target().tokenizer
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    target = load_target(str(world / "target"), "float32", adapter=tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    load_target(str(world / "target"), "float32", adapter=tmp_path)
    assert caplog.text.count("another chat template") == 2 and target.tokenizer.chat_template != tokenizer.chat_template
