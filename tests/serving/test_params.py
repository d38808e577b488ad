"""Validation of sampling parameters."""

import math

import pytest

from draft.errors import UserError
from serving.engine.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", True),
        ("min_new_tokens", 129),
        ("logit_bias", {True: 1.0}),
        ("stop", ("a", "")),
        ("stop", "abc"),
        ("seed", 2**63),
        ("made_up", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{field} = {value!r}: ") and str(error.value).endswith(".")


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(max_new_tokens=1, temperature=0, top_p=1, top_k=0, seed=0)
    SamplingParams(min_p=1, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-9, logprobs=20)
    params = SamplingParams(seed=2**63 - 1, stop=["a", "b"], min_new_tokens=128, logprobs=0)
    assert params.stop == ("a", "b")


def test_parameters_are_values() -> None:
    bias = {7: 1, 3: -100.0}
    params = SamplingParams(logit_bias=bias, stop_ids=[4])
    bias[3] = 0.0
    same = SamplingParams(logit_bias={3: -100.0, 7: 1}, stop_ids=(4,))
    assert params == same and hash(params) == hash(same) and params.stop_ids == (4,)
    assert dict(params.logit_bias) == {3: -100.0, 7: 1}
    assert params != SamplingParams(stop_ids=[4])
