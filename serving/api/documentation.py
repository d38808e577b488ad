"""Parts of /openapi.json that FastAPI does not derive from the routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

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
    """Register these models, and drop FastAPI's own 422 from OpenAI's surface, which answers 400 instead."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generated()
        for path, methods in schema["paths"].items():
            for operation in methods.values() if is_openai(path) else ():
                operation["responses"].pop("422", None)
        _, found = models_json_schema([(model, "serialization") for model in models], ref_template=_REFERENCE)
        schema["components"]["schemas"] |= found["$defs"]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=name)}
