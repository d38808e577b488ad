"""All layers in one C++ call: which decoders that takes, and that it gives what their own code gives.

And the bits of bfloat16, where the width of a pass could decide how a sum is rounded.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head
from cpu_cases import relative
from exactness import margins
from families import LLAMA3_ROPE, model_of
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from cpu_kernels import PackedLinear, load_kernels
from draft.errors import UserError
from draft.files import cache_folder
from draft.heads.checkpoint import load_head
from draft.heads.layers import RMSNorm
from draft.target import Target, load_target
from serving.engine import Engine, SamplingParams, Speculation
from serving.engine.drafting import HeadProposer, Job
from serving.engine.fused import in_one_call
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.model import TargetRunner
from serving.engine.setup import Models, build_models
from serving.engine.verification import make_rule

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "head_dim": 16}
SCALED_QUERIES = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5,
                  "original_max_position_embeddings": 32}  # fmt: skip
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral, a window wider than trees are deep": ("mistral", {"sliding_window": 80}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "phi3, heads that turn in part": ("phi3", {"partial_rotary_factor": 0.5}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"sliding_window": 5}),  # other parts
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"residual_multiplier": 0.7, "attention_multiplier": 0.3}),  # other arithmetic
    "granite, slightly": ("granite", {"residual_multiplier": 0.95, "attention_multiplier": 0.25}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "ministral3": ("ministral3", {"rope_parameters": SCALED_QUERIES}),  # from some position on
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, odd width": ("llama", {"intermediate_size": 90}),
}
FAMILIES = {**FUSED, **OTHERS}


def make(family: str, dtype: torch.dtype = torch.float32) -> Target:
    kind, own = FAMILIES[family]
    model = model_of(kind, seed=3, **{"max_position_embeddings": 700, **WIDTHS, **own})
    with torch.no_grad():  # norms and biases that do nothing would hide their absence
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    return Target(family, model.to(dtype), byte_tokenizer())


def compiled(target: Target, head: Any = None, head_weights: str = "auto") -> tuple[Models, Any]:
    """The models, and the proposer of the head."""
    sizes: Any = {"slots": 4, "capacity": 64, "threads": 1}
    heads = [] if head is None else [head]
    models, proposers = build_models(
        target, heads, mode="compiled", pack_in_place=True, head_weights=head_weights, **sizes
    )
    models.runner.layers = proposers[0].layers if proposers else ()
    return models, next(iter(proposers), None)


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def passes(runner: TargetRunner) -> Tensor:
    """Prompts, a step of both, and a tree beside a chain: all that they compute, [tokens, features]."""
    slots = [runner.cache.acquire() for _ in range(2)]
    steps = [
        [Segment(slots[0], 0, 0, ids(11, 1)), Segment(slots[1], 0, 0, ids(4, 2))],
        [Segment(slots[1], 4, 4, ids(9, 3)), Segment(slots[0], 11, 11, ids(1, 4))],
        [Segment(slots[0], 12, 12, ids(6, 5), [-1, 0, 0, 1, 1, 3]), Segment(slots[1], 13, 13, ids(2, 6))],
    ]
    outputs = []
    for segments in steps:
        hidden, states = runner.forward(RaggedBatch.of(segments, runner.target.device))
        assert states is not None
        outputs.append(torch.cat([hidden, states], dim=-1))
    for slot in slots:
        runner.cache.release(slot)
    return torch.cat(outputs).double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("family", FUSED)
def test_a_pass_in_one_call_is_the_layers_one_by_one(family, dtype, tolerance):
    target = make(family, dtype)
    runner = compiled(target, make_tiny_head(target))[0].runner
    fused, runner.fused = runner.fused, None
    expected = passes(runner)
    runner.fused = fused
    assert fused is not None
    assert relative(passes(runner), expected) < tolerance


@pytest.mark.parametrize("family", OTHERS)
def test_other_decoders_keep_their_own_code(family):
    assert [compiled(make(family, dtype))[0].runner.fused for dtype in (torch.float32, torch.bfloat16)] == [None, None]


@torch.inference_mode()
def test_layers_share_the_memory_of_projections_that_are_joined():
    target = make("llama")
    runner = compiled(target)[0].runner
    assert runner.fused is not None
    linears = [module for module in target.model.modules() if isinstance(module, PackedLinear)]
    layers = [each.packed for each in linears if each is not target.lm_head]
    storages = {packed.untyped_storage().data_ptr(): packed.untyped_storage().nbytes() for packed in layers}
    assert list(storages.values()) == [sum(packed.nbytes for packed in layers)]  # one memory, and no more than it takes
    # and another engine of this target reads the same
    other = compiled(target)[0].runner
    assert other.fused is not None
    for one, again in zip(runner.fused.weights, other.fused.weights, strict=True):
        assert torch.equal(one, again) and (one.dim() != 3 or one.data_ptr() == again.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_one_call(dtype):
    load_kernels(cache_folder())
    torch.manual_seed(1)
    norm = RMSNorm(50, 1e-3).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 50).to(dtype) * 0.1
    fast = in_one_call(norm)
    assert fast is not None and fast(x).dtype == dtype
    expected = nn.functional.rms_norm(x.double(), (50,), norm.weight.double(), 1e-3)
    torch.testing.assert_close(fast(x).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for other in (nn.LayerNorm(50), nn.LayerNorm(50, bias=False), GemmaRMSNorm(50), nn.Dropout()):
        assert in_one_call(other) is None


REACHING = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
            "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "config", "fixed"),
    [
        ("llama", {}, True),
        ("phi3", {"rope_parameters": REACHING, "original_max_position_embeddings": 32}, False),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                   "max_position_embeddings": 32}, False),
    ],
)  # fmt: skip
def test_angles_that_depend_on_how_far_others_reach_are_not_kept(family, config, fixed):
    target = Target(
        family, model_of(family, seed=3, **{"max_position_embeddings": 700, **WIDTHS, **config}), byte_tokenizer()
    )
    runner = compiled(target)[0].runner
    assert runner.fused is not None and (runner.angles is not None) == fixed


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_targets_in_float32_run_in_one_call(weights):
    """As those from a GGUF file: a last bit of x decides between two levels."""
    engine = Engine(load_target("smollm2", torch.float32), weights=weights, pack_in_place=True, max_length=64)
    assert engine.models.runner.fused is not None
    with pytest.raises(UserError, match="packed before"):
        Engine(engine.target, weights="float", pack_in_place=True, max_length=64)


@pytest.mark.parametrize("option", [None, "norm_output", "norm_before_fc", "norm_before_residual"])
@torch.inference_mode()
def test_the_layer_of_a_head_in_one_call(option):
    target = make("llama")
    head = make_tiny_head(target, **({option: True} if option else {}))
    for norm in (each for each in head.parameters() if each.dim() == 1):
        norm.copy_(torch.randn_like(norm))
    runner = compiled(target, head, "float")[1].runner
    hidden, outputs, layer = torch.randn(9, 64), list[Tensor](), runner.fused
    assert (layer is None) == (option == "norm_before_residual")
    if layer is None:
        return
    for runner.fused in (None, layer):
        slot = runner.cache.acquire()
        first = runner.forward(RaggedBatch.of([Segment(slot, 0, 0, ids(5, 1))], target.device), hidden[:5])
        runner.cache.extend(slot, 5)
        tree = Segment(slot, 5, 5, ids(4, 2), [-1, 0, 0, 1])
        outputs.append(torch.cat([first, runner.forward(RaggedBatch.of([tree], target.device), hidden[5:])]))
        runner.cache.release(slot)
    assert relative(outputs[1], outputs[0].double()) < 1e-5


RISING = tuple((place + 0.5) / 16 for place in range(16))
FLOORS, CALIBRATIONS = (0.0, 0.3, 0.002, 0.0), (None, RISING[::-1], RISING, RISING)


@pytest.mark.parametrize("option", [None, "norm_output", "norm_before_fc", "shared_lm_head"])
@torch.inference_mode()
def test_chains_in_one_call_are_those_of_single_steps(option):
    """Tokens, distributions and states, for each rule, over steps in which sequences read and draft what they like."""
    target = make("llama")
    vocabulary = {"draft_vocab_size": target.vocab_size} if option == "shared_lm_head" else {}
    head = make_tiny_head(target, **vocabulary, **({option: True} if option else {}))
    for norm in (each for each in head.parameters() if each.dim() == 1):
        norm.copy_(torch.rand_like(norm) + 0.5)
    if option != "shared_lm_head":
        head.set_vocabulary(torch.randperm(target.vocab_size)[:200].sort().values)
    proposer = compiled(target, head, head_weights="float")[1]
    assert isinstance(proposer, HeadProposer) and proposer.runner.chains is not None
    rules = [
        make_rule("shared-noise", SamplingParams(), 0),
        make_rule("shared-noise", SamplingParams(temperature=0.7), 5),
        make_rule("rejection", SamplingParams(temperature=1.3), 6),
        make_rule("shared-noise", SamplingParams(temperature=1e-40), 7),
    ]
    auxiliary = 64 * len(proposer.layers)
    drafted = []
    for chains in (None, proposer.runner.chains):
        proposer.runner.chains = chains
        torch.manual_seed(2)
        states, trees = [proposer.join() for _ in rules], []
        for read, lengths in (([5, 2, 7, 1], [4, 2, 3, 3]), ([1, 3, 2, 1], [2, 5, 1, 4]), ([1, 0, 0, 2], [3, 3, 5, 2])):
            for state, count in zip(states, read, strict=True):
                if count:
                    proposer.observe(state, torch.randint(3, 259, (count,)).tolist(), torch.randn(count, auxiliary))
            asked = zip(states, lengths, rules, FLOORS, CALIBRATIONS, strict=True)
            jobs = [Job(state, length, 0, *each) for state, length, *each in asked]
            trees += proposer.propose(jobs)
            assert not any(state.backlog for state in states)
        drafted.append((trees, torch.cat([state.hidden for state in states])))
        for state in states:
            proposer.leave(state)
    (single, single_states), (fused, fused_states) = drafted
    assert [tree.tokens for tree in fused] == [tree.tokens for tree in single]
    assert relative(fused_states, single_states.double()) < 1e-5
    for one, other in zip(single, fused, strict=True):
        assert (one.q is None) == (other.q is None)
        assert one.q is None or other.q is None or torch.allclose(one.q, other.q, atol=1e-5)
        assert one.confidences == pytest.approx(other.confidences, abs=1e-5)
    assert len({len(tree) for tree in fused}) > 2


@torch.inference_mode()
def test_a_chain_in_one_call_ends_at_its_floor():
    target = make("llama")
    proposer = compiled(target, make_tiny_head(target))[1]
    assert isinstance(proposer, HeadProposer)
    rule, calibration = make_rule("shared-noise", SamplingParams(), 0), (0.5,) * 16
    lengths = []
    for floor in (0.0, 0.12, 0.13, 0.3, 0.9):
        state = proposer.join()
        proposer.observe(state, [5, 6, 7], torch.randn(3, 64 * len(proposer.layers)))
        lengths.append(len(proposer.propose([Job(state, 5, 0, rule, floor, calibration)])[0]))
        proposer.leave(state)
    assert lengths == [5, 3, 2, 1, 1]  # 0.5, 0.25, 0.125, ...; one at least


@pytest.mark.parametrize(
    ("family", "dtype", "weights"),  # in one call, and layer by layer; a head of another dtype
    [
        ("qwen3", torch.bfloat16, "float"),
        ("gemma2", torch.bfloat16, "float"),
        ("llama", torch.float32, "float"),
        ("llama", torch.bfloat16, "int8"),
        ("gemma2", torch.bfloat16, "int4"),
    ],
)
def test_texts_with_and_without_drafts_are_the_same_in_bfloat16(family, dtype, weights):
    target = make(family, torch.bfloat16)
    head = make_tiny_head(target).to(dtype)
    options: Any = {"mode": "compiled", "weights": weights, "threads": 1}
    engine = Engine(target, head, speculation="tree", tree_size=6, **options)
    params, prompts = SamplingParams(24, ignore_eos=True), [ids(5, 1), ids(30, 2), ids(1, 3), ids(2, 4)]
    drafted = engine.generate(prompts, params)
    plain = engine.generate(prompts, params, Speculation(enabled=False))
    single = engine.generate(prompts[:1], params, Speculation(num_tokens=1))
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    assert single[0].token_ids == plain[0].token_ids and sum(each.stats.drafted for each in drafted) > 0
    chained = Engine(target, head, speculation="chain", **options).generate(prompts, params)
    assert [each.token_ids for each in chained] == [each.token_ids for each in plain]


@pytest.mark.parametrize("family", ["llama", "mistral, a window wider than trees are deep", "gemma2"])
def test_float32_differs_only_where_two_tokens_are_as_good_as_equal(family):
    """With drafts or without, compiled or not; with trees beside parts of prompts, some longer than a window."""
    target, params = make(family, torch.float32), SamplingParams(24, ignore_eos=True, logprobs=2)
    prompts, head = [ids(5, 1), ids(200, 2), ids(9, 3), ids(120, 4)], make_tiny_head(target)
    options = {"tree_size": 8, "threads": 1, "prefill_chunk": 128, "max_batch": 2}
    plain, *others = (
        Engine(target, head, mode=mode, speculation=speculation, **options).generate(prompts, params)
        for mode, speculation in (("eager", "off"), ("eager", "chain"), ("eager", "tree"), ("compiled", "tree"))
    )
    for other in others:
        found = margins(other, plain)
        assert len(found) <= 1 and all(margin < 1e-4 for margin in found)


def test_an_engine_that_is_gone_leaves_nothing_on_its_target():
    target = make("gemma2", torch.float32)
    engine = Engine(target, make_tiny_head(target), mode="eager")
    engine.generate([ids(5, 1)], SamplingParams(4, ignore_eos=True))
    cache = weakref.ref(engine.models.runner.cache)
    del engine
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("in_place", [False, True])
def test_the_callers_target_is_packed_where_the_caller_says_so(in_place):
    target = make("llama", torch.bfloat16)
    head, plain = make_tiny_head(target), target.model
    before = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    options = {"mode": "compiled", "speculation": "chain", "threads": 1}
    engine = Engine(target, head, pack_in_place=in_place, **options)
    engine.warm_up()
    assert (engine.target is target) == in_place
    assert any(type(module) is nn.Linear for module in plain.modules()) != in_place
    if not in_place:
        assert all(torch.equal(parameter, before[name]) for name, parameter in plain.named_parameters())
        assert engine.target.embedding.weight is target.embedding.weight  # what is not packed is shared
        again = Engine(target, head, pack_in_place=True, **options)
        params = SamplingParams(12, ignore_eos=True)
        first, second = (each.generate([ids(9, 4)], params)[0] for each in (engine, again))
        assert first.token_ids == second.token_ids and first.stats.drafted > 0


# bfloat16

PROMPTS = ("Tell me a joke.", "Write a short poem about rain.")
ROUNDINGS = 8  # of the largest logit: every layer adds some


def near_tie(target: Target, ids: list[int], one: int, other: int) -> bool:
    """Test that rounding may decide between two next tokens, both of them among the first."""
    logits = target.logits(target.forward(torch.tensor([ids])).last_hidden[0, -1:]).float()[0]
    rounding = ROUNDINGS * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
    return float(logits.max() - min(logits[one], logits[other])) <= rounding


@torch.inference_mode()
def test_greedy_text_with_drafts_differs_at_near_ties_only():
    target = load_target("smollm2", torch.bfloat16)
    head = load_head("smollm2-eagle3", dtype=torch.bfloat16)[0]
    prompts = [target.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True) for text in PROMPTS]
    for mode in ("eager", "compiled"):
        texts = []
        for speculation in ("off", "tree"):
            engine = Engine(target, head, mode=mode, speculation=speculation, tree_size=6, speculation_length=4)
            answers = engine.generate(prompts, SamplingParams(max_new_tokens=16, ignore_eos=True))
            texts.append([answer.token_ids for answer in answers])
        assert sum(answer.stats.accepted for answer in answers) > 0
        assert mode == "eager" or texts[0] == texts[1]  # our kernels do not depend on a pass's width
        for prompt, plain, drafted in zip(prompts, *texts, strict=True):
            if plain != drafted:
                place = next(place for place, pair in enumerate(zip(plain, drafted, strict=True)) if len(set(pair)) > 1)
                assert near_tie(target, prompt + plain[:place], plain[place], drafted[place]), (mode, place)


@pytest.mark.parametrize(("name", "weights"), [("smollm2", "float"), ("smollm2", "int8"), ("qwen3", "int4")])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_passes_of_any_width(name, weights):
    """Passes of 1 to 600 tokens of several requests: prompts read at once and in pieces, beside others that decode."""
    target = load_target(name, torch.bfloat16) if name == "smollm2" else make(name, torch.bfloat16)
    runner = Engine(target, None, mode="compiled", weights=weights, max_batch=8, max_length=700).models.runner
    assert runner.fused is not None
    texts = torch.randint(3, target.vocab_size, (4, 600), generator=torch.Generator().manual_seed(5)).tolist()

    def states(pieces):
        """Read `texts` in passes, each of (text, tokens) pieces -> the states of each text [tokens, hidden]."""
        slots = [runner.cache.acquire() for _ in texts]
        read: list[list[Tensor]] = [[] for _ in texts]
        for piece in pieces:
            segments = []
            for text, tokens in piece:
                past = sum(map(len, read[text]))
                segments.append(Segment(slots[text], past, past, texts[text][past : past + tokens]))
            hidden = runner.forward(RaggedBatch.of(segments, target.device))[0]
            for (text, _), part in zip(piece, hidden.split([tokens for _, tokens in piece]), strict=True):
                read[text].append(part)
        for slot in slots:
            runner.cache.release(slot)
        return [torch.cat(parts) for parts in read]

    alone = states([[(0, 64)], *[[(0, 1)]] * 6, [(1, 30)], [(2, 190)], [(3, 310)]])
    together = states([[(1, 30), (2, 190), (3, 310), (0, 70)]])
    mixed = states([[(3, 64), (0, 1)], [(0, 63), (1, 2), (2, 65)], [(0, 6), (3, 246), (2, 125)], [(1, 28)]])
    for text, expected in enumerate(alone):
        assert torch.equal(expected, together[text]) and torch.equal(expected, mixed[text]), text
