"""Whole runs on a tiny target: pretrain, adapt by each method, interrupt, resume, merge."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import make_tiny_target, save_tiny_target
from rich.console import Console

from draft.data.prepare import prepare
from draft.errors import UserError
from draft.heads.checkpoint import load_head
from draft.training.config import resolve
from draft.training.merge import merge_run
from draft.training.model import learning_rate_at, parameter_groups
from draft.training.run import Interrupted, latest_snapshot
from draft.training.trainer import Trainer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny target on disk, data that it wrote, and a head pretrained on them for a few steps."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_target(root / "target")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {n} and {n * 7 % 11}"}) + "\n" for n in range(24)))
    from draft.target import load_target

    target = load_target(str(root / "target"), "float32")
    prepare(target, root / "data", prompts=[prompts], max_new_tokens=24, held_out_share=0.25, progress=False)
    run(root, "pretrain", "pretrained", draft_vocab_size=180, max_steps=12, save_every=5)
    run(root, "pretrain", "pretrained-eagle", architecture="eagle", max_steps=12, save_every=5)
    few = {"architecture": "medusa", "head_options": ["num_heads=3"], "draft_steps": None}
    run(root, "pretrain", "pretrained-medusa", draft_vocab_size=180, max_steps=12, save_every=5, **few)
    return root


def run(root, mode, name, overrides=(), **flags):
    flags = {"target": str(root / "target"), "dtype": "float32", "data": [str(root / "data")], "draft_steps": 3,
             "tokens_per_batch": 256, "eval_every": 6, "eval_rows": 3, **flags}  # fmt: skip
    if mode == "adapt":
        flags = {"head": str(root / "pretrained" / "head"), **flags}
    settings = resolve(mode, str(root / name), flags=flags, overrides=overrides)
    return Trainer(settings, QUIET).train()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "share"), [("pretrained", 0.9), ("pretrained-eagle", 0.99), ("pretrained-medusa", 0.99)]
)
def test_pretraining_lowers_the_loss_and_leaves_a_whole_run(world, name, share):
    folder = world / name
    losses = [line["loss"] for line in metrics(folder) if "loss" in line]
    assert len(losses) == 12 and sum(losses[-3:]) < share * sum(losses[:3])
    assert [line["step"] for line in metrics(folder) if "tau" in line] == [0, 6, 12]
    head, about = load_head(folder / "head")
    assert about["method"] == "full" and about["steps"] == 12 and about["trained_rows"]
    assert head.config.draft_vocab_size == (259 if name == "pretrained-eagle" else 180)
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "provenance.json", "metrics.jsonl", "training.png", "about.json"}
    assert files | {"checkpoints", "head"} <= names
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"step-0000010", "step-0000012", "latest.json"}


# architecture -> its pretrained run, a weight that an adapter changes, how many it changes
ADAPTED = {
    "eagle3": ("pretrained", "midlayer.self_attn.q_proj.weight", 7),
    "eagle": ("pretrained-eagle", "layers.0.self_attn.q_proj.weight", 7),
    "medusa": ("pretrained-medusa", "blocks.0.layers.0.weight", 3),
}


@pytest.mark.parametrize("method", ["afa-lora", "lora", "full"])
@pytest.mark.parametrize("architecture", ADAPTED)
def test_adapting_and_merging(world, architecture, method, tmp_path):
    start, weight, changed = ADAPTED[architecture]
    name = f"adapted-{architecture}-{method}"
    head = str(world / start / "head")
    result = run(world, "adapt", name, head=head, method=method, rank=4, alpha=8, max_steps=10)
    betas = [line["beta"] for line in metrics(world / name) if "loss" in line]
    if method == "afa-lora":
        assert betas == pytest.approx([2 / 3, 1 / 3] + [0.0] * 8)
    else:
        assert betas == [None] * 10
    assert result.name == ("head" if method == "full" else "adapter")
    merged = merge_run(world / name, tmp_path / "merged")
    base, _ = load_head(world / start / "head")
    head, about = load_head(tmp_path / "merged")
    assert set(head.state_dict()) == set(base.state_dict()) and head.dtype == base.dtype
    assert not torch.equal(head.state_dict()[weight], base.state_dict()[weight])
    assert torch.equal(head.d2t, base.d2t)
    assert about["method"] == method
    if method != "full":
        assert merged.layers == changed and merged.rounding < 1e-6
        assert not head.lm_head_modules or all(
            torch.equal(head.lm_head_modules[name].weight, lm_head.weight)
            for name, lm_head in base.lm_head_modules.items()
        )


@pytest.mark.parametrize("architecture", ADAPTED)
def test_a_merged_head_computes_what_the_adapter_computed(world, tmp_path, architecture):
    from draft.afa import load_afa_adapter

    start, name = ADAPTED[architecture][0], f"for-merging-{architecture}"
    run(world, "adapt", name, head=str(world / start / "head"), rank=4, max_steps=4)
    merge_run(world / name, tmp_path / "merged")
    base, _ = load_head(world / start / "head", dtype=torch.float64)
    load_afa_adapter(base, world / name / "adapter", is_trainable=False)
    merged, _ = load_head(tmp_path / "merged", dtype=torch.float64)
    target = make_tiny_target()
    embeds = torch.randn(1, 6, 32, dtype=torch.float64)
    auxiliary = torch.randn(1, 6, 32 * len(merged.auxiliary_layers(target)), dtype=torch.float64)
    logits = []
    for head in (merged, base.eval()):
        head.use_target_lm_head(target)
        with torch.no_grad():
            steps = enumerate(head.unroll(embeds, auxiliary, 3))
            logits.append(torch.stack([head.logits(hidden, step) for step, hidden in steps]))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_an_annealed_adapter_is_not_merged(world, tmp_path):
    run(world, "adapt", "early", rank=4, max_steps=10)
    folder = world / "early" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"peft_type": "AFA_LORA", "step": 1, "total_steps": 10, "decay_ratio": 0.3, "beta": 2 / 3}
    config |= {"activation": "silu", "placement": "A-s-B", "schedule": "linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="step 3"):
        merge_run(world / "early", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# of a Medusa head's four positions three are trained: the last one is no checkpoint's
STARTS = {
    "eagle3": {},
    "eagle": {"architecture": "eagle"},
    "medusa": {"architecture": "medusa", "head_options": ["num_heads=4"]},
}


@pytest.mark.parametrize(
    ("mode", "method", "architecture"),
    [
        ("pretrain", "full", "eagle3"),
        ("adapt", "full", "eagle3"),
        ("adapt", "afa-lora", "eagle3"),
        ("pretrain", "full", "eagle"),
        ("adapt", "afa-lora", "eagle"),
        ("pretrain", "full", "medusa"),
        ("adapt", "afa-lora", "medusa"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_weights(world, mode, method, architecture, monkeypatch):
    settings = {"method": method, "rank": 4, "max_steps": 8, "save_every": 3, "gradient_accumulation": 2}
    start = {"head": str(world / ADAPTED[architecture][0] / "head")} if mode == "adapt" else STARTS[architecture]
    settings |= {**start, "draft_steps": None if architecture == "eagle" else 3}
    kinds = [f"{mode}-{architecture}-{kind}-{method}" for kind in ("whole", "broken")]
    run(world, mode, kinds[0], **settings)

    class Interrupted(Exception):
        pass

    original = Trainer._optimise

    def stop(trainer, *arguments):
        if trainer.step == 5:
            raise Interrupted
        return original(trainer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "_optimise", stop)
        run(world, mode, kinds[1], **settings)
    run(world, mode, kinds[1], **settings)
    heads = [load_head(merge_run(world / kind, world / f"{kind}-head").head)[0].state_dict() for kind in kinds]
    for name, value in heads[0].items():
        assert torch.equal(value, heads[1][name]), name
    lines = [[(line["step"], line.get("loss")) for line in metrics(world / kind)] for kind in kinds]
    assert [line for line in lines[0] if line[1]] == [line for line in lines[1] if line[1]]


def test_accumulation_gives_the_gradient_of_the_larger_batch(world):
    small = run(world, "adapt", "accumulated", method="full", max_steps=1, gradient_accumulation=100)
    large = run(world, "adapt", "at-once", method="full", max_steps=1, tokens_per_batch=100_000)
    for name, value in load_head(small)[0].state_dict().items():
        torch.testing.assert_close(value, load_head(large)[0].state_dict()[name], atol=2e-5, rtol=0)
    losses = [metrics(world / name)[1]["loss"] for name in ("accumulated", "at-once")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


NEW_HEADS = {
    "EAGLE-3.1 of four layers": ["fc_norm=true", "norm_output=true", "auxiliary_layers=[1, 3, 6, 8]"],
    "a borrowed LM head": ["shared_lm_head=true"],
    "other norms": ["norm_before_fc=true", "norm_before_residual=true"],
    "medusa": ["shared_lm_head=true", "num_layers=2", "num_heads=4"],
    "eagle": ["fc_bias=true", "qkv_bias=true"],
}


@pytest.mark.parametrize("name", NEW_HEADS)
def test_a_new_head_has_the_options_that_were_asked_for(world, name):
    architecture = name if name in ("medusa", "eagle") else "eagle3"
    options = {"architecture": architecture, "head_options": NEW_HEADS[name], "max_steps": 2}
    head, _ = load_head(run(world, "pretrain", name, **options))
    for option in NEW_HEADS[name]:
        key, value = option.split("=")
        assert json.dumps(getattr(head.config, key)) == value
    assert bool(head.lm_head_modules) == (architecture != "eagle" and "shared_lm_head=true" not in NEW_HEADS[name])


def test_settings_that_an_architecture_has_no_use_for_are_refused(world):
    for flags, words in (
        ({"architecture": "medusa", "head_options": ["num_heads=2"]}, "draft_steps = 3: the head drafts 2 tokens"),
        ({"draft_vocab_size": 100_000}, "100000 tokens exceeds the target's 259; choose a smaller"),
        ({"feature_weight": 1.0}, "eagle3 does not guess the target's states"),
        ({"mode": "adapt", "architecture": "eagle"}, "is of architecture eagle3, not eagle"),
        ({"mode": "adapt", "head": str(world / "pretrained-eagle" / "head"), "method": "full",
          "rebuild_vocabulary": True}, "rebuild_vocabulary: a head of architecture eagle"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            run(world, **{"mode": "pretrain", "name": "refused", "max_steps": 1, **flags})


def test_other_settings_in_the_same_folder_are_refused(world):
    with pytest.raises(UserError, match="other settings"):
        run(world, "pretrain", "pretrained", draft_vocab_size=100, max_steps=12, save_every=5)


def test_data_of_another_target_is_refused(world, tmp_path):
    other = make_tiny_target(seed=3, dtype=torch.float32)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=other.fingerprint):
        run(world, "pretrain", "wrong", target=str(tmp_path / "other"), max_steps=1)


def test_the_learning_rate_rises_and_falls_to_a_tenth():
    settings = resolve("pretrain", "o", flags={"data": ["d"], "learning_rate": 1.0, "warmup_ratio": 0.1})
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1, abs=1e-3) and rates[10:] == sorted(rates[10:], reverse=True)


def test_small_weights_move_by_small_steps():
    parameters = [torch.nn.Parameter(torch.full((3,), size)) for size in (0.001, 0.02, 1.0)]
    assert [group["scale"] for group in parameter_groups(parameters, scaled=True)] == pytest.approx([0.05, 1.0, 1.0])
    assert [group["scale"] for group in parameter_groups(parameters, scaled=False)] == [1.0, 1.0, 1.0]


def test_a_rebuilt_vocabulary_keeps_what_the_head_knows(world):
    base, _ = load_head(world / "pretrained" / "head")
    flags = {"head": str(world / "pretrained" / "head"), "rebuild_vocabulary": True, "draft_vocab_size": 220}
    result = run(world, "pretrain", "rebuilt", max_steps=1, learning_rate=1e-9, **flags)
    rebuilt, _ = load_head(result)
    assert rebuilt.config.draft_vocab_size == 220
    shared = [(i, rebuilt.vocabulary.tolist().index(t)) for i, t in enumerate(base.vocabulary.tolist())]
    old, new = (torch.tensor(column) for column in zip(*shared, strict=True))
    torch.testing.assert_close(rebuilt.lm_head.weight[new], base.lm_head.weight[old], atol=1e-6, rtol=0)
    torch.testing.assert_close(rebuilt.fc.weight, base.fc.weight, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="rebuild_vocabulary"):
        run(world, "adapt", "refused", method="lora", rebuild_vocabulary=True)


@pytest.mark.parametrize(("mode", "method"), [("pretrain", "full"), ("adapt", "full"), ("adapt", "afa-lora")])
def test_half_precision(world, mode, method):
    """Masters and adapters stay in float32; what is saved has the target's stored dtype."""
    flags = {"method": method, "rank": 4, "dtype": "bfloat16", "max_steps": 4}
    flags |= {"draft_vocab_size": 180} if mode == "pretrain" else {}
    result = run(world, mode, f"half-{mode}-{method}", **flags)
    losses = [line["loss"] for line in metrics(world / f"half-{mode}-{method}") if "loss" in line]
    assert all(torch.isfinite(torch.tensor(losses)))
    if method == "full":
        assert load_head(result)[0].fc.weight.dtype == torch.float32
    reference = {**flags, "dtype": "float32"}
    run(world, mode, f"single-{mode}-{method}", **reference)
    single = [line["loss"] for line in metrics(world / f"single-{mode}-{method}") if "loss" in line]
    assert losses == pytest.approx(single, rel=0.05)


def test_a_base_head_that_changed_is_not_merged_into(world, tmp_path):
    shutil.copytree(world / "pretrained" / "head", tmp_path / "base")
    flags = {"target": str(world / "target"), "dtype": "float32", "data": [str(world / "data")], "eval_every": 0}
    settings = resolve("adapt", str(tmp_path / "run"), flags={**flags, "head": str(tmp_path / "base"), "max_steps": 2})
    Trainer(settings, QUIET).train()
    merge_run(tmp_path / "run", tmp_path / "base")
    with pytest.raises(UserError, match="changed since"):
        merge_run(tmp_path / "run", tmp_path / "base")


def test_ctrl_c_saves_and_other_data_are_then_refused(world, tmp_path, monkeypatch):
    """An interrupted run goes on from where it was, but not over other data in the same folder."""
    target = make_tiny_target(dtype=torch.float32)
    flags = {"target": str(world / "target"), "dtype": "float32", "draft_vocab_size": 180, "max_steps": 4}
    flags |= {"eval_every": 0, "data": [str(tmp_path / "data")]}

    def trainer(word):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"{word} {n}"}) + "\n" for n in range(8)))
        prepare(target, tmp_path / "data", prompts=[prompts], max_new_tokens=8, progress=False)
        return Trainer(resolve("pretrain", str(tmp_path / "run"), flags=flags), QUIET)

    original = Trainer._optimise

    def stop(self, *arguments):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 3"):
        patch.setattr(Trainer, "_optimise", stop)
        trainer("one").train()
    assert latest_snapshot(tmp_path / "run" / "checkpoints").name == "step-0000003"
    with pytest.raises(UserError, match="have changed"):
        trainer("two").train()
    again = trainer("one")
    again.train()
    assert again.step == 4 and [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
