"""What the running server's own limits add to /openapi.json, so that it promises no more than this server takes."""

from __future__ import annotations

from typing import Any

from serving.api.service import Service
from serving.engine.sampling import SEED_LIMIT


def bound(schema: dict[str, Any], service: Service) -> None:
    """Write the limits of this model and server into a schema; what depends on a text's tokens no schema can say."""
    engine = service.engine
    most = engine.max_length - 1  # a prompt has a token at least, and so has an answer
    token, characters = engine.target.vocab_size - 1, engine.max_length * service.longest_token
    models = schema["components"]["schemas"]
    parameters, completion, chat = (
        models[name]["properties"] for name in ("GenerateParameters", "CompletionRequest", "ChatRequest")
    )
    _of_type(parameters["truncate"], "integer")["maximum"] = most
    limit = {"maximum": min(service.max_new_tokens, most)}
    for fields, name in (
        (parameters, "max_new_tokens"),
        (completion, "max_tokens"),
        (completion, "min_tokens"),
        (chat, "max_tokens"),
        (chat, "max_completion_tokens"),
        (chat, "min_tokens"),
    ):
        _of_type(fields[name], "integer").update(limit)
    for fields in (parameters, completion, chat):
        _of_type(fields["seed"], "integer")["exclusiveMaximum"] = SEED_LIMIT  # FastAPI has made a float of it
    for fields in (completion, chat):
        _of_type(fields["n"], "integer")["maximum"] = service.max_choices
        _of_type(fields["stop_token_ids"], "array")["items"]["maximum"] = token
        _of_type(fields["logit_bias"], "object")["propertyNames"]["pattern"] = up_to(token)
    text, texts, ids, lists = completion["prompt"]["anyOf"]
    texts["maxItems"] = lists["maxItems"] = service.max_choices
    for each in (text, texts["items"]):
        each["maxLength"] = characters
    for each in (ids, lists["items"]):
        each["maxItems"], each["items"]["maximum"] = most, token
    for parameter in schema["paths"]["/v1/models/{name}"]["get"]["parameters"]:
        parameter["example"] = service.model_name


def _of_type(field: dict[str, Any], kind: str) -> dict[str, Any]:
    """The alternative of a field that may also be null."""
    return next(each for each in field["anyOf"] if each.get("type") == kind)


def up_to(limit: int) -> str:
    """A regular expression of the whole numbers from 0 to a limit, without leading zeros."""
    digits = str(limit)
    found = ["0", *(f"[1-9]{_any(count)}" for count in range(len(digits) - 1))]  # those of fewer digits
    for place, digit in enumerate(digits):  # as the limit up to a place, less there, anything after it
        first, last = int(place == 0), int(digit) - 1
        if first <= last:
            found.append(f"{digits[:place]}[{first}-{last}]{_any(len(digits) - place - 1)}")
    return f"^({'|'.join([*found, digits])})$"


def _any(digits: int) -> str:
    return f"[0-9]{{{digits}}}" if digits else ""
