"""Whole runs on a tiny target: pretrain, adapt by each method, interrupt, resume, merge."""

import io
import json
import shutil

import pytest
import torch
import yaml
from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from rich.console import Console
from safetensors.torch import load_file
from training_runs import logged

from draft.afa import load_afa_adapter
from draft.data.dataset import open_dataset, write_dataset
from draft.errors import UserError
from draft.files import read_json
from draft.heads.checkpoint import head_sha256, load_head, save_head
from draft.training.config import resolve
from draft.training.merge import merge_run
from draft.training.optimizer import learning_rate_at, share_of_rate
from draft.training.trainer import Trainer

QUIET = Console(quiet=True)


# of a Medusa head's four positions three are trained: the last one is no checkpoint's
STARTS = {
    "eagle3": {"draft_vocab_size": 180},
    "eagle": {"architecture": "eagle"},
    "medusa": {"architecture": "medusa", "head_options": ["num_heads=4"], "draft_vocab_size": 180},
}


@pytest.fixture(scope="module")
def world(made):
    """A tiny target on disk, data that it wrote, and a head of each kind pretrained on them for a few steps."""
    save_tiny_target(made / "other", seed=3)
    for architecture, flags in STARTS.items():
        run(made, "pretrain", architecture, max_steps=12, save_every=5, **flags)
    return made


def run(root, mode, name, **flags):
    flags = {"target": str(root / "target"), "dtype": "float32", "data": [str(root / "data")], "draft_steps": 3,
             "tokens_per_batch": 256, "eval_every": 6, "eval_rows": 3, "optimizer": "adamw", "weight_average": 0.0,
             **flags}  # fmt: skip
    if mode == "adapt":
        flags = {"head": str(root / "eagle3" / "head"), "method": "afa-lora", **flags}
    return Trainer(resolve(mode, str(root / name), flags=flags), QUIET).train()


@pytest.mark.parametrize(("name", "share"), [("eagle3", 0.95), ("eagle", 0.99), ("medusa", 1.0)])
def test_pretraining_lowers_the_loss_and_leaves_a_whole_run(world, name, share):
    folder = world / name
    losses = list(logged(folder).values())
    assert len(losses) == 12 and sum(losses[-3:]) < share * sum(losses[:3])
    assert list(logged(folder, "tau")) == [0, 6, 12]
    head, about = load_head(folder / "head")
    assert about["method"] == "full" and about["steps"] == 12 and about["trained_rows"]
    assert head.config.draft_vocab_size == (259 if name == "eagle" else 180)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"step-0000010", "step-0000012", "best.safetensors"}


def test_the_weights_of_the_best_replay_are_kept(world, tmp_path, monkeypatch):
    """Also where the run was interrupted after it, and where it ends early."""
    taus = {0: 1.6, 3: 1.2, 6: 1.5, 9: 1.4, 12: 1.3}
    trainers = []

    def replayed(trainer, head):
        trainers.append(trainer)
        return taus[trainer.done]

    monkeypatch.setattr(Trainer, "_replay", replayed)
    run(world, "pretrain", tmp_path / "six", max_steps=12, eval_every=0, save_every=6, keep_checkpoints=3)
    at_six = load_file(tmp_path / "six" / "checkpoints" / "step-0000006" / "state.safetensors")
    flags = {"eval_every": 3, "save_every": 4, "keep_checkpoints": 9, "max_steps": 12}
    for name, more, steps in (("best", {}, 12), ("patient", {"patience": 1}, 9)):
        result = run(world, "pretrain", tmp_path / name, **flags, **more)
        head, about = load_head(result)
        assert (about["kept_step"], about["kept_tau"], about["steps"]) == (6, 1.5, steps)
        assert about["kept_by"] == sorted({row.id for row in trainers[-1].held_out}) != []
        assert torch.equal(head.fc.weight, at_six["weight.fc.weight"])
    last = load_head(run(world, "pretrain", tmp_path / "last", **flags, keep_best=False))[0]
    assert not torch.equal(last.fc.weight, head.fc.weight)
    for step in (9, 12):
        shutil.rmtree(tmp_path / "best" / "checkpoints" / f"step-{step:07d}", ignore_errors=True)
    trainers.clear()
    resumed = load_head(run(world, "pretrain", tmp_path / "best", **flags))[0]
    assert min(trainer.done for trainer in trainers) > 6 and torch.equal(resumed.fc.weight, head.fc.weight)


def test_a_short_run_is_replayed_often_and_says_that_it_made_the_head_worse(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_replay", lambda trainer, head: 1.8 - trainer.done / 100)
    flags = {"data": [str(world / "data")], "target": str(world / "target"), "head": str(world / "eagle3" / "head")}
    for steps, replayed in ((13, [0, 2, 4, 6, 8, 10, 12, 13]), (3, [0, 1, 2, 3])):
        console = Console(record=True, width=200, file=io.StringIO())
        folder = tmp_path / str(steps)
        settings = resolve("adapt", str(folder), flags={**flags, "tokens_per_batch": 256, "max_steps": steps})
        Trainer(settings, console).train()
        assert list(logged(folder, "tau")) == replayed
        assert "Before training τ was 1.800 on these rows: the run has made the head worse." in console.export_text()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["training"]["eval_every"] is None and config["training"]["learning_rate"] == 2e-4


def test_a_best_replay_behind_the_checkpoint_ends_no_run(world, tmp_path, monkeypatch):
    """A run that goes on from before its best replay comes to it again."""
    taus = {0: 1.1, 3: 1.2, 6: 1.5, 9: 1.6, 12: 1.3}
    monkeypatch.setattr(Trainer, "_replay", lambda trainer, head: taus[trainer.done])
    flags = {"eval_every": 3, "save_every": 4, "keep_checkpoints": 9, "max_steps": 12, "patience": 1}
    for _ in range(2):
        run(world, "pretrain", tmp_path, **flags)
        about = read_json(tmp_path / "about.json")
        assert (about["kept_step"], about["steps"]) == (9, 12)
        for step in (8, 12):
            shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:07d}")


def test_a_best_replay_of_an_abandoned_run_is_not_kept(world, tmp_path, monkeypatch):
    def replayed(trainer, head):
        if trainer.done == 4:
            raise RuntimeError("out of memory")
        return 9.0

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(Trainer, "_replay", replayed)
        run(world, "pretrain", tmp_path, eval_every=2, max_steps=4)
    assert (tmp_path / "checkpoints" / "best.safetensors").is_file()
    flags = {"eval_every": 0, "max_steps": 2}
    first = load_head(run(world, "pretrain", tmp_path, **flags))[0]
    again, about = load_head(run(world, "pretrain", tmp_path, **flags))
    assert "kept_step" not in about and torch.equal(first.fc.weight, again.fc.weight)


def test_an_adapter_is_kept_once_its_activation_is_gone(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_replay", lambda trainer, head: 2.0 - trainer.done / 100)  # the earlier the better
    run(world, "adapt", tmp_path, max_steps=10, eval_every=1, rank=2, decay_ratio=0.5)
    assert read_json(tmp_path / "about.json")["kept_step"] == 5


def test_the_average_of_the_weights_is_kept(world, tmp_path):
    flags = {"max_steps": 6, "save_every": 1, "keep_checkpoints": 9, "eval_every": 0, "weight_average": 0.3}
    result, _ = load_head(run(world, "pretrain", tmp_path, **flags))
    states = [load_file(tmp_path / "checkpoints" / f"step-{n:07d}" / "state.safetensors") for n in range(1, 7)]
    average = None
    for step, state in enumerate(states, 1):
        share = 1 - min(0.3, step / (step + 9))
        if average is not None:
            average = average + share * (state["weight.fc.weight"] - average)
            torch.testing.assert_close(average, state["average.fc.weight"], rtol=1e-5, atol=1e-7)
        average = state["average.fc.weight"]
    assert torch.equal(result.fc.weight, average) and not torch.equal(average, states[-1]["weight.fc.weight"])


def test_muon_moves_the_matrices_of_the_layer(world, tmp_path):
    """An orthogonal step: the singular values of an update are about the same."""
    flags = {"max_steps": 2, "save_every": 1, "keep_checkpoints": 9, "eval_every": 0, "optimizer": "muon"}
    start = world / "eagle3" / "head"
    run(world, "pretrain", tmp_path, head=str(start), **flags)
    before, state = load_head(start)[0].state_dict(), tmp_path / "checkpoints" / "step-0000001" / "state.safetensors"
    after = load_file(state)
    name = "midlayer.mlp.down_proj.weight"
    update = after[f"weight.{name}"].double() - before[name].double()
    values = torch.linalg.svdvals(update)
    assert values.median() > 0.6 * values.max()
    assert f"momentum_buffer.{name}" in after and "exp_avg.lm_head.weight" in after


def test_a_frozen_lm_head_stays(world, tmp_path):
    start = world / "eagle3" / "head"
    result, _ = load_head(run(world, "pretrain", tmp_path, head=str(start), max_steps=2, freeze_lm_head=True))
    base, _ = load_head(start)
    assert torch.equal(result.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(result.fc.weight, base.fc.weight)


# architecture -> a weight that an adapter changes, how many it changes
ADAPTED = {
    "eagle3": ("midlayer.self_attn.q_proj.weight", 7),
    "eagle": ("layers.0.self_attn.q_proj.weight", 7),
    "medusa": ("blocks.0.layers.0.weight", 3),
}


@pytest.mark.parametrize(
    ("architecture", "method"), [*((each, "afa-lora") for each in ADAPTED), ("eagle3", "lora"), ("medusa", "full")]
)
def test_adapting_and_merging(world, architecture, method, tmp_path):
    weight, changed = ADAPTED[architecture]
    folder, start = tmp_path / "run", world / architecture / "head"
    result = run(world, "adapt", folder, head=str(start), method=method, rank=4, alpha=8, max_steps=10)
    betas = [2 / 3, 1 / 3] + [0.0] * 8 if method == "afa-lora" else [None] * 10
    assert [logged(folder, "beta")[step] for step in range(1, 11)] == pytest.approx(betas)
    assert result.name == ("head" if method == "full" else "adapter")
    merged = merge_run(folder, tmp_path / "merged")
    base, (head, about) = load_head(start)[0], load_head(tmp_path / "merged")
    assert set(head.state_dict()) == set(base.state_dict()) and head.dtype == base.dtype
    assert not torch.equal(head.state_dict()[weight], base.state_dict()[weight])
    assert torch.equal(head.d2t, base.d2t) and about["method"] == method
    if method == "full":
        return
    assert merged.layers == changed and merged.rounding < 1e-6
    for name, lm_head in base.lm_head_modules.items():
        assert torch.equal(head.lm_head_modules[name].weight, lm_head.weight)
    # the merged head computes what the adapter computed
    target, base = make_tiny_target(), base.double()
    load_afa_adapter(base, folder / "adapter", is_trainable=False)
    embeds = torch.randn(1, 6, 32, dtype=torch.float64)
    auxiliary = torch.randn(1, 6, 32 * len(head.auxiliary_layers(target)), dtype=torch.float64)
    logits = []
    for each in (head.double(), base.eval()):
        each.use_target_lm_head(target)
        with torch.no_grad():
            logits.append(torch.stack([each.logits(h, k) for k, h in enumerate(each.unroll(embeds, auxiliary, 3))]))
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


def test_accumulation_gives_the_gradient_of_the_larger_batch(world):
    small = run(world, "adapt", "accumulated", method="full", max_steps=1, gradient_accumulation=100)
    large = run(world, "adapt", "at-once", method="full", max_steps=1, tokens_per_batch=100_000)
    for name, value in load_head(small)[0].state_dict().items():
        torch.testing.assert_close(value, load_head(large)[0].state_dict()[name], atol=2e-5, rtol=0)
    assert logged(world / "accumulated") == pytest.approx(logged(world / "at-once"), rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("eagle3", ["fc_norm=true", "norm_output=true", "auxiliary_layers=[1, 3, 6, 8]"]),
        ("eagle3", ["shared_lm_head=true"]),
        ("medusa", ["shared_lm_head=true", "num_layers=2", "num_heads=4"]),
        ("eagle", ["fc_bias=true", "qkv_bias=true"]),
    ],
)
def test_a_new_head_has_the_requested_options(world, tmp_path, architecture, options):
    flags = {"architecture": architecture, "head_options": options, "max_steps": 2}
    head, _ = load_head(run(world, "pretrain", tmp_path / "run", **flags))
    for name, value in (option.split("=") for option in options):
        assert json.dumps(getattr(head.config, name)) == value
    assert bool(head.lm_head_modules) == (architecture != "eagle" and "shared_lm_head=true" not in options)


@pytest.mark.parametrize(
    ("mode", "flags", "words"),
    [
        ("pretrain", {"architecture": "medusa", "head_options": ["num_heads=2"]}, "draft_steps = 3: the head drafts 2"),
        ("pretrain", {"draft_vocab_size": 100_000}, "100000 tokens exceeds the target's 259; choose a smaller"),
        ("pretrain", {"feature_weight": 1.0}, "eagle3 does not predict the target's states"),
        ("adapt", {"architecture": "eagle"}, "is of architecture eagle3, not eagle"),
        ("adapt", {"method": "lora", "rebuild_vocabulary": True}, "rebuild_vocabulary needs method full"),
        ("adapt", {"head": "{world}/eagle/head", "method": "full", "rebuild_vocabulary": True}, "eagle heads have the"),
        ("adapt", {"optimizer": "muon"}, "optimizer muon is for the training of all weights"),
        ("adapt", {"freeze_lm_head": True}, "freeze_lm_head is for the training of all weights"),
        ("adapt", {"general": "rows"}, "general 'rows' is mixed in by mix_general, which is 0"),
        ("pretrain", {"method": "lora"}, "adapter.method lora is for `adapt`"),
        ("pretrain", {"patience": 2, "eval_every": 0}, "patience counts replays without a better one; it needs"),
        ("pretrain", {"name": "eagle3", "draft_vocab_size": 180, "eval_rows": 2}, "eval_rows was 3, is 2"),
        ("pretrain", {"name": "eagle3", "draft_vocab_size": 100}, "holds a run with other settings"),
        ("pretrain", {"target": "{world}/other"}, "prepared for target"),
    ],
)
def test_what_does_not_go_together_is_refused(world, mode, flags, words):
    flags = {key: value.format(world=world) if isinstance(value, str) else value for key, value in flags.items()}
    with pytest.raises(UserError, match=words):
        run(world, mode, flags.pop("name", "refused"), max_steps=12, **flags)


def test_the_learning_rate_rises_and_falls_to_a_tenth():
    settings = resolve("pretrain", "o", flags={"data": ["d"], "learning_rate": 1.0, "warmup_ratio": 0.1})
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1, abs=1e-3) and rates[10:] == sorted(rates[10:], reverse=True)


def test_small_weights_move_by_small_steps():
    shares = [share_of_rate(torch.full((3,), size)) for size in (0.0, 0.001, 0.02, 1.0)]
    assert shares == pytest.approx([1.0, 0.05, 1.0, 1.0])


def test_a_rebuilt_vocabulary_keeps_what_the_head_knows(world):
    base, _ = load_head(world / "eagle3" / "head")
    flags = {"head": str(world / "eagle3" / "head"), "rebuild_vocabulary": True}
    same = load_head(run(world, "pretrain", "same-size", max_steps=1, learning_rate=1e-9, **flags))[0]
    assert same.config.draft_vocab_size == base.config.draft_vocab_size  # its size, and those of its tokens that fit
    flags["draft_vocab_size"] = 220
    result = run(world, "pretrain", "rebuilt", max_steps=1, learning_rate=1e-9, **flags)
    rebuilt, _ = load_head(result)
    assert rebuilt.config.draft_vocab_size == 220
    shared = [(i, rebuilt.vocabulary.tolist().index(t)) for i, t in enumerate(base.vocabulary.tolist())]
    old, new = (torch.tensor(column) for column in zip(*shared, strict=True))
    torch.testing.assert_close(rebuilt.lm_head.weight[new], base.lm_head.weight[old], atol=1e-6, rtol=0)
    torch.testing.assert_close(rebuilt.fc.weight, base.fc.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_a_whole_vocabulary_is_reduced_only_to_a_size_that_is_given(world, tmp_path, shared):
    target = make_tiny_target()
    head = make_tiny_head(target, draft_vocab_size=target.vocab_size, shared_lm_head=shared)
    save_head(head, tmp_path / "head", dtype=torch.float32, about={"target": target.name})
    flags = {"head": str(tmp_path / "head"), "rebuild_vocabulary": True, "max_steps": 1}
    with pytest.raises(UserError, match="head' has the whole vocabulary; leave it out, or give --draft-vocab-size"):
        run(world, "pretrain", tmp_path / "refused", **flags)
    reduced, _ = load_head(run(world, "pretrain", tmp_path / "reduced", draft_vocab_size=180, **flags))
    assert len(reduced.vocabulary) == 180


@pytest.mark.parametrize(("mode", "method"), [("pretrain", "full"), ("adapt", "full"), ("adapt", "afa-lora")])
def test_half_precision(world, tmp_path, mode, method):
    """Masters and adapters stay in float32; what is saved has the target's stored dtype."""
    flags = {"method": method, "rank": 4, "max_steps": 4, **(STARTS["eagle3"] if mode == "pretrain" else {})}
    result = run(world, mode, tmp_path / "half", dtype="bfloat16", **flags)
    assert method != "full" or load_head(result)[0].fc.weight.dtype == torch.float32
    run(world, mode, tmp_path / "single", **flags)
    assert logged(tmp_path / "half") == pytest.approx(logged(tmp_path / "single"), rel=0.05)


def test_a_base_head_that_changed_is_not_merged_into(world, tmp_path):
    shutil.copytree(world / "eagle3" / "head", tmp_path / "base")
    run(world, "adapt", tmp_path / "run", head=str(tmp_path / "base"), max_steps=2)
    merge_run(tmp_path / "run", tmp_path / "base")
    with pytest.raises(UserError, match="changed since"):
        merge_run(tmp_path / "run", tmp_path / "base")


def test_a_run_does_not_go_on_over_other_data(world, tmp_path):
    dataset = open_dataset(world / "data")
    held_out, train = dataset.rows("held-out"), dataset.rows("train")
    settings = {"data": [str(tmp_path)], "draft_vocab_size": 180, "max_steps": 2}
    write_dataset(tmp_path, train + held_out, dataset.manifest)
    run(world, "pretrain", "other-data", **settings)
    write_dataset(tmp_path, train[1:] + held_out, dataset.manifest)
    with pytest.raises(UserError, match="have changed"):
        run(world, "pretrain", "other-data", **settings)


# ---- merging what is damaged ----


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("about.json", "[]", "about.json' holds a list"),
        ("about.json", "{}", "is not the one that"),
        ("config.yaml", "\0", "config.yaml' is missing or damaged"),
        ("config.yaml", "model: 3", "config.yaml' is missing or damaged"),
        ("config.yaml", None, "config.yaml' is missing or damaged"),
        ("config.yaml", "model: {head: null}", "names no base head"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, name, content, words):
    head, run = tmp_path / "head", tmp_path / "run"
    save_head(make_tiny_head(make_tiny_target()), head, dtype=torch.float64, about={})
    run.mkdir()
    (run / "about.json").write_text(json.dumps({"base_head_sha256": head_sha256(head)}))
    (run / "config.yaml").write_text(f"model: {{head: {head}}}")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(UserError, match=words):
        merge_run(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
