"""What a request may ask for."""

import math
from dataclasses import replace

import pytest

from draft.errors import UserError
from serving.engine.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", True),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("temperature", True),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.01),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", False),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", [1, 2]),
        ("stop_ids", (3, -1)),
        ("stop_ids", (True,)),
        ("stop_ids", 3),
        ("keep_stop", 1),
        ("ignore_eos", None),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", 1.0),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("a", "")),
        ("stop", "abc"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert field in str(error.value) and repr(value) in str(error.value)


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(max_new_tokens=1, temperature=0, top_p=1, top_k=0, seed=0)
    SamplingParams(min_p=1, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-9, logprobs=20)
    params = SamplingParams(seed=2**63 - 1, stop=["a", "b"], min_new_tokens=128, logprobs=0)  # type: ignore[arg-type]
    assert params.stop == ("a", "b")


def test_parameters_are_values() -> None:
    bias = {7: 1, 3: -100.0}
    params = SamplingParams(logit_bias=bias, stop_ids=[4])  # type: ignore[arg-type]
    bias[3] = 0.0
    assert params == SamplingParams(logit_bias={3: -100.0, 7: 1}, stop_ids=(4,)) and params.stop_ids == (4,)
    assert hash(params) == hash(replace(params)) and dict(params.logit_bias) == {3: -100.0, 7: 1}
    assert params != replace(params, logit_bias={})
