"""The HTTP application: its routes, error handlers and middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from draft.errors import UserError
from serving.api import generate, heads, openai, operations
from serving.api.errors import ApiError, on_error
from serving.api.metrics import PREFIX
from serving.api.middleware import ApiKey, BodyLimits, Guard
from serving.api.service import GENERATING, Limits, Service
from serving.backend import Backend, Unavailable
from serving.engine import EngineStopped, Overloaded

if TYPE_CHECKING:
    from serving.capture import CaptureWriter


def create_app(
    engine: Backend | None,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    loopback: bool = False,
    cors_origins: Sequence[str] = (),
    strict_model_name: bool = False,
    metrics_prefix: str = PREFIX,
    capture: CaptureWriter | None = None,
) -> FastAPI:
    """Return the application around an engine, or what stands for one, which it starts and closes.

    engine: None where it is loaded later; then `app.state.service.attach(engine)` makes the application ready.
    loopback: it is bound to an address that only this machine reaches, so that heads may be changed without a key.
    cors_origins: origins of pages that may use the API from a browser. capture: writes finished requests; it is started
    and closed with the engine.
    """
    limits = limits or Limits()
    service = Service(limits, strict_model_name, metrics_prefix)
    if capture is not None:
        from serving.api.captured import Capturing  # and pyarrow, which servers do without that capture nothing

        service.capture = Capturing(capture)
    if engine is not None:
        service.attach(engine)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop()

    # a redirect to a path without its slash would name whatever host the request named
    version = operations.package_version()
    app = FastAPI(title="Draftsmith", version=version, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    app.state.heads_are_guarded = api_key is not None  # by the middleware below
    app.state.loopback = loopback
    app.state.routes = []  # for the methods that a path allows
    for router in (generate.router, openai.router, operations.router, heads.router):
        app.include_router(router)
        app.state.routes += router.routes
    for error in (ApiError, UserError, Overloaded, EngineStopped, Unavailable, HTTPException, RequestValidationError):
        app.add_exception_handler(error, on_error)
    # the last one added is the first to see a request
    app.add_middleware(BodyLimits, limits=limits, paths=GENERATING | {"/tokenize", "/heads"})
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # OpenAI's client sends a dozen of its own
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Guard, service=service)
    return app
