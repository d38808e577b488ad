"""The arithmetic of the speed figures, and a whole run on a tiny target."""

import json
from collections import Counter

import pytest
import torch
from conftest import make_tiny_target

from benchmarks import decode_figures, decode_speed, lookup_speed, shared, step_costs
from benchmarks.timing import Key, Timing
from cpu_kernels.ops import load_kernels
from draft.files import cache_folder
from serving.engine import Engine


def timing(tokens: int, seconds: float, verifications: int = 0, output: tuple[int, ...] = (1, 2)) -> Timing:
    return Timing(tokens, seconds, (output,), verifications, tokens, (("target", seconds),))


def test_ratios_are_taken_within_a_repeat():
    samples = {
        Key(1, 0.0, None, "plain"): [timing(10, 1.0, 10), timing(10, 10.0, 10)],
        Key(1, 0.0, None, "chain 2"): [timing(10, 0.5, 5), timing(10, 5.0, 5, (1, 3))],
    }
    plain, chain = decode_figures.summarise(samples)
    assert plain["tokens_per_second"]["median"] == pytest.approx(5.5)  # of 10 and 1
    assert chain["over_plain"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert chain["acceptance_length"] == 2.0 and plain["acceptance_length"] == 1.0
    assert plain["identical"] == 1.0 and chain["identical"] == 0.0


def results(tau: float) -> dict:  # type: ignore[type-arg]
    samples = {
        Key(1, 0.0, None, "plain"): [timing(100, 1.0, 100)],
        Key(1, 0.0, None, "chain 3"): [timing(200, 1.0, round(200 / tau))],
        Key(1, 0.0, None, "automatic"): [timing(180, 1.0, 90)],
    }
    return {
        "settings": {"dtype": "float32"},
        "floor": step_costs.floor(8_000_000, 1e9),
        "steps": {"target": {1: 0.010, 2: 0.010, 8: 0.012, 16: 0.020}, "draft": 0.0005, "re-read": 0.0005},
        "rates": decode_figures.summarise(samples),
        "llama_cpp": None,
    }


def test_the_prediction_and_the_bars():
    found = results(tau=2.0)
    found["predicted"] = decode_figures.predict(found)
    seconds = (0.010 + 0.002 / 3) + 3 * 0.0005 + 0.0005  # 4 tokens lie between 2 and 8
    assert found["predicted"]["tokens_per_second"] == pytest.approx(2.0 / seconds)
    bars = {bar["bar"]: bar for bar in decode_figures.judge(found)}
    assert bars["plain step / reading its weights"]["figure"] == pytest.approx(0.010 / 0.008)
    assert bars["verifying 8 tokens / plain step"]["met"] is True
    assert bars["verifying 16 tokens / plain step"]["met"] is False
    assert bars["plain / transformers generate"]["met"] is None
    owed = bars["automatic / plain, batch 1"]
    assert (owed["figure"], owed["limit"], owed["met"]) == (pytest.approx(1.8), "at least 1.1", True)
    better = results(tau=3.0)
    better["predicted"] = decode_figures.predict(better)
    owed = next(bar for bar in decode_figures.judge(better) if bar["bar"] == "automatic / plain, batch 1")
    assert owed["limit"] == "at least 1.6"


def test_a_whole_run(small, two_prompts, tmp_path, capsys):
    status = decode_speed.main(
        f"{small} {two_prompts} --out {tmp_path} --mode eager --batch 1 2 --speculation-length 2 --tree 4 "
        "--baseline none --repeats 1 --limit 2 --max-new-tokens 5".split()
    )
    assert status == 0
    written = json.loads((tmp_path / "decode_speed.json").read_text())
    names = [(row["batch"], row["name"]) for row in written["rates"]]
    assert names == [(batch, name) for batch in (1, 2) for name in ("plain", "chain 2", "tree 4", "automatic")]
    assert all(row["identical"] == 1.0 for row in written["rates"])  # float32, one machine, tiny: no rounding decides
    assert (tmp_path / "decode_speed.png").stat().st_size > 0
    assert "floor of a plain step" in capsys.readouterr().out


def test_lookup_is_compared_with_the_head_alone(small, two_prompts, tmp_path, capsys):
    options = f"{small} --out {tmp_path} --mode eager --repeats 2 --max-new-tokens 6 --workload".split()
    assert decode_speed.main([*options, "chat", *two_prompts.split()]) == 0
    written = json.loads((tmp_path / "decode_speed.json").read_text())
    assert written["identical"] == 1.0 and written["controller"]["why"]
    for seconds in written["seconds_per_token"].values():
        assert list(seconds) == ["plain", "head alone", "automatic"] and all(
            len(each) == 2 for each in seconds.values()
        )
    [bar] = written["bars"]
    others = written["lookup"][lookup_speed.OTHERS]["over_head"]["median"]
    assert bar["limit"] == "at least 0.98" and bar["figure"] == others and "do not copy" in bar["bar"]
    assert "lookup beside the head" in capsys.readouterr().out
    categories = Counter(prompt.category for prompt in shared.load_prompts(lookup_speed.COPYING).prompts)
    assert categories == {"summarising": 12, "extraction": 12, "code editing": 12}
    assert (
        lookup_speed.lookup_gains({"plain": [3.0], "head alone": [2.0], "automatic": [1.0]})["over_head"]["median"] == 2
    )


def test_prompts_that_copy_are_no_part_of_the_bar_of_chat(small, tmp_path):
    kinds = ["chat", "extraction", "writing", "summarising"]
    rows = [{"category": kind, "prompt": f"Say {index}."} for index, kind in enumerate(kinds)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = f"{small} --prompts {tmp_path / 'mixed.jsonl'} --out {tmp_path} --mode eager --repeats 1 --workload chat"
    assert decode_speed.main([*options.split(), "--max-new-tokens", "6"]) == 0
    written = json.loads((tmp_path / "decode_speed.json").read_text())
    # seconds per token of a group lie between those of its kinds
    seconds = {group: times["plain"][0] for group, times in written["seconds_per_token"].items()}
    assert seconds.keys() == {"all", lookup_speed.OTHERS, *kinds}
    assert min(seconds["chat"], seconds["writing"]) <= seconds[lookup_speed.OTHERS]
    assert seconds[lookup_speed.OTHERS] <= max(seconds["chat"], seconds["writing"])
    gains = {"all": {"over_head": {"median": 1.25}}, lookup_speed.OTHERS: {"over_head": {"median": 0.9}}}
    assert [lookup_speed.judge(gains, workload)["figure"] for workload in ("copy", "chat")] == [1.25, 0.9]
    assert lookup_speed.judge(gains, "chat")["met"] is False
    assert lookup_speed.judge({"all": gains["all"]}, "chat")["met"] is None


def test_a_tree_needs_more_nodes_than_it_is_deep(capsys):
    with pytest.raises(SystemExit) as stop:
        decode_speed.main(["--target", "t", "--head", "h", "--out", "o", "--speculation-length", "8", "--tree", "8"])
    assert stop.value.code == 2 and "--tree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("chat --batch 4 --temperature 1", "chat takes no --batch, --temperature"),
        ("chat --server-url http://localhost:1 --vs bf16 --tree", "chat takes no --tree, --vs, --server-url"),
        ("copy --limit 5", "copy takes no --limit"),
        ("copy --weights int8 --speculation-length 3", "copy takes no --speculation-length, --weights"),
    ],
)
def test_options_that_a_workload_does_not_look_at_are_refused(capsys, words, named):
    with pytest.raises(SystemExit) as stop:
        decode_speed.main(["--target", "t", "--head", "h", "--out", "o", "--workload", *words.split()])
    assert stop.value.code == 2 and f"error: --workload {named}: " in capsys.readouterr().err


def test_options_of_workloads_are_those_that_are_left():
    models = ["--target", "t", "--head", "h", "--out", "o"]
    taken = "--dtype float32 --mode eager --repeats 2 --limit 3"
    chat = decode_speed.parse([*models, "--workload", "chat", *taken.split()])
    assert (chat.limit, chat.repeats) == (3, 2)
    limits = [decode_speed.parse([*models, *words]).limit for words in ([], ["--workload", "copy"])]
    assert limits == [decode_speed.LIMIT, None]
    # a new option is listed here, or applies to workloads
    known = {"target", "head", "target_adapter", "prompts", "workload", "repeats", "limit", "max_new_tokens", "seed"}
    known |= {"dtype", "mode", "threads", "out", "check", *decode_speed.NOT_OF_WORKLOADS}
    assert vars(chat).keys() == known


@pytest.mark.parametrize("tied", [False, True])
def test_each_weight_is_counted_once(tied):
    target = make_tiny_target(dtype=torch.bfloat16, tie_word_embeddings=tied)
    linears = [module for module in target.decoder.modules() if isinstance(module, torch.nn.Linear)]
    norms = sum(module.weight.numel() for module in target.decoder.modules() if "Norm" in type(module).__name__)
    load_kernels(cache_folder())
    panel = torch.ops.draftsmith.panel_width()
    rotary = sum(buffer.nbytes for buffer in target.decoder.rotary_emb.buffers())
    for mode, (wide, deep) in {"eager": (1, 1), "compiled": (panel, 32)}.items():  # packed weights are padded
        numbers = sum(
            -(-each.out_features // wide) * wide * (-(-each.in_features // deep) * deep)
            for each in (*linears, target.lm_head)
        )
        counted = step_costs.weight_bytes(Engine(target, None, mode=mode))
        assert counted == 2 * (numbers + norms) + rotary, mode
