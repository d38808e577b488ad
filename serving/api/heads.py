"""Routes that change the draft heads of a running server: load, list, remove, and choose the default."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from pydantic_core import to_jsonable_python

from draft.errors import UserError, file_trouble
from serving.api import schemas
from serving.api.errors import ApiError, unavailable
from serving.api.service import Service
from serving.api.streaming import finite
from serving.engine import Engine
from serving.engine.heads import HeadConflict, Heads, LoadedHead, UnknownHead

T = TypeVar("T")

router = APIRouter(prefix="/heads", tags=["heads"], responses=schemas.ERRORS)


class LoadRequest(schemas.Strict):
    """Body of POST /heads."""

    name: schemas.HeadName = Field(examples=["adapted"])
    path: schemas.Prompt = Field(
        max_length=4096, description="folder on the server's machine", examples=["runs/adapted"]
    )
    default: bool | None = schemas.optional("make it the default once it has checked itself")


def _engine(request: Request) -> Engine:
    """Return the engine of a server whose heads this request may change.

    Raises:
        ApiError: 403 without a key, unless only this machine reaches the server, and no page in a browser of it: pages
            may send requests without a body to any address. 503 while it is loaded or ends.
    """
    state = request.app.state
    if not state.heads_are_guarded:
        if not state.loopback:
            message = "heads are changed with an API key only, and this server has none; start it with --api-key"
            raise ApiError("permission", message)
        if "origin" in request.headers:
            raise ApiError("permission", "heads are not changed from a browser without an API key")
    service: Service = state.service
    if service.draining:
        raise unavailable("the server is shutting down")
    _heads(service)
    return cast(Engine, service.engine)


def _heads(service: Service) -> Heads:
    """Return the heads; ApiError 404 where another server drafts."""
    heads: Heads | None = getattr(service.engine, "heads", None)
    if heads is None:
        raise ApiError("not_found", "the draft heads of this server are not its own")
    return heads


Changeable = Annotated[Engine, Depends(_engine)]


@router.get("")
async def list_heads(request: Request) -> dict[str, Any]:
    """The loaded heads with their figures, and what happened to heads of late."""
    heads = _heads(request.app.state.service)
    entries = [_entry(head, default=head is heads.default) for head in heads]
    return {"default": heads.default_name, "route": heads.route, "heads": entries, "events": list(heads.events)}


@router.post("", status_code=201)
async def load_head(body: LoadRequest, request: Request, engine: Changeable) -> dict[str, Any]:
    """Load a head from a folder, beside those that are there, once it has checked itself on the target."""
    service: Service = request.app.state.service
    load = partial(engine.load_head, body.name, body.path, default=bool(body.default))
    head = await _answered(asyncio.get_running_loop().run_in_executor(service.loader, load))
    return _entry(head, default=head is engine.heads.default)


@router.delete("/{name}")
async def unload_head(name: str, engine: Changeable) -> dict[str, Any]:
    """Remove a head and free its memory; what it drafts for is decoded on without it."""
    await _answered(asyncio.to_thread(engine.unload_head, name))
    return {"unloaded": name}


@router.post("/{name}/default")
async def make_default(name: str, engine: Changeable) -> dict[str, Any]:
    """Let requests that name no head have this one from now on."""
    previous = await _answered(asyncio.to_thread(engine.make_default_head, name))
    return {"default": name, "previous": previous}


async def _answered(work: Awaitable[T]) -> T:
    """Return the result of some work, or raise the error for the client."""
    try:
        return await work
    except UnknownHead as error:
        raise ApiError("not_found", str(error), field="name") from error
    except HeadConflict as error:
        raise ApiError("conflict", str(error), field="name") from error
    except OSError as error:
        trouble = file_trouble(error)
        if trouble is None:
            raise
        raise UserError(trouble) from error


def _entry(head: LoadedHead, *, default: bool) -> dict[str, Any]:
    check = head.watch.check
    return {
        "name": head.name,
        "architecture": head.head.stored_as,
        "fingerprint": head.head.fingerprint,
        "default": default,
        "self_check": check and to_jsonable_python(check.figures(), inf_nan_mode="null"),
        "degraded": head.watch.degraded,
        "requests": head.requests,
        "verifications": head.verifications,
        "drafted": head.drafted,
        "accepted": head.accepted,
        "acceptance_length": finite(head.acceptance_length),
    }
