"""Parts of /openapi.json that FastAPI does not derive from the routes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.api.bounds import bound
from serving.api.errors import is_openai

Responses = dict[int | str, dict[str, Any]]
_REFERENCE = "#/components/schemas/{model}"


def documented(model: type[BaseModel], statuses: tuple[int, ...]) -> Responses:
    """These statuses' bodies are JSON of this model, one of those that `describe` registers."""
    schema = _reference(model.__name__)
    return {
        status: {"description": "refused or failed", "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }


def as_stream(model: type[BaseModel] | None = None) -> Responses:
    """A 200 that is, or may be, server-sent events; model: of each event's data, which is JSON."""
    data: dict[str, Any] = {"type": "string"}
    if model is not None:
        data |= {"contentMediaType": "application/json", "contentSchema": _reference(model.__name__)}
    schema = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {200: {"content": {"text/event-stream": {"schema": schema}}}}


def describe(app: FastAPI, models: Sequence[type[BaseModel]]) -> None:
    """Register these models, drop FastAPI's own 422 from OpenAI's surface, which answers 400 instead, and say what
    holds for every answer, and for the server that runs."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        schema = copy.deepcopy(generated())  # which is kept, also for when the model is there
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                if is_openai(path):
                    operation["responses"].pop("422", None)
                for status, response in operation["responses"].items():
                    response["headers"] = _headers(status)
        _, found = models_json_schema([(model, "serialization") for model in models], ref_template=_REFERENCE)
        schema["components"]["schemas"] |= found["$defs"]
        if app.state.service.loaded:
            bound(schema, app.state.service)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _headers(status: str) -> dict[str, Any]:
    headers: dict[str, Any] = {"x-request-id": {"required": True, "schema": {"type": "string"}}}
    if status in ("429", "503"):
        headers["retry-after"] = {"required": True, "description": "seconds", "schema": {"type": "string"}}
    return headers


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=name)}
