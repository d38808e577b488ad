"""Settings of `draft-train prepare`: one field with a description is one flag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draft.errors import UserError


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """Return settings of these values; UserError naming the first one that is out of range."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            flag = str(first["loc"][0]).replace("_", "-")
            raise UserError(f"--{flag} is {first['input']!r}: {first['msg'].lower()}; correct it.") from error


class Settings(_Settings):
    """The numbers that decide the contents of a data set."""

    # given files: fewer than they hold are a random sample; prompts that the target writes: 500 by default
    num_prompts: int | None = Field(default=None, ge=1, description="Maximum number of conversations.")
    keep_responses: bool = Field(default=False, description="Use the responses in the files, not the target's.")
    skip_invalid: bool = Field(
        default=False, description="Leave out rows that cannot be used, and count them by reason."
    )
    # a response that reaches it stays, without an end of turn
    max_new_tokens: int = Field(default=256, ge=1, description="Tokens of the longest response.")
    max_length: int = Field(
        default=1024, ge=8, description="Tokens of the longest conversation; longer ones are dropped, and counted."
    )
    greedy_share: float = Field(
        default=0.5, ge=0, le=1, description="Share of responses written greedily; the rest at temperature 1."
    )
    held_out_share: float = Field(default=0.1, ge=0, le=1, description="Share of conversations kept for judging.")
    seed: int = Field(default=0, description="Seed of prompts, responses and split.")


class LocalServer(_Settings):
    """Options of a draft-serve that is started to answer, and ended afterwards."""

    batch_size: int | None = Field(
        default=None, ge=1, description="Responses written at once, without --endpoint [default: by device]."
    )
    dtype: str | None = None  # None: the dtype and the device of the target that is loaded here
    device: str | None = None
    weights: Literal["auto", "float", "int8", "int4"] = Field(
        default="auto",
        description="Matrices of the target that writes, without --endpoint, on a CPU: int8 and int4 are "
        "faster, and the responses are then those of the rounded target.",
    )
    head: str | None = Field(
        default=None,
        description="Draft head that makes the target write faster, without --endpoint: a folder [default: the bundled "
        "head for the bundled target].",
    )


class EndpointSettings(_Settings):
    """Address of a running server, and the limits of requests to it."""

    endpoint: str = Field(
        description="Address of an OpenAI-compatible server that writes the responses [default: a draft-serve that is "
        "started, and ended afterwards]. It must serve this very target under its own chat template: a server "
        "that returns only text cannot be checked for that.",
    )
    endpoint_model: str | None = Field(
        default=None, description="Name of the target at --endpoint [default: its one model]."
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable that holds the key of --endpoint."
    )
    concurrency: int = Field(default=16, ge=1, description="Requests that --endpoint has at once.")
    retries: int = Field(default=8, ge=0, description="Retries of a request that --endpoint cannot answer now.")
    timeout: float = 600.0  # seconds, of one answer
