"""Data sets that a target in this process writes, through a server of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from http_testing import live

from draft.data.dataset import Dataset, Row
from draft.data.prepare import prepare
from draft.data.settings import EndpointSettings
from draft.target import Target
from serving.api.app import create_app
from serving.engine import Engine


@contextmanager
def served(target: Target, **options: Any) -> Iterator[EndpointSettings]:
    """A live server of the target; options: of its app."""
    engine = Engine(target, mode="eager", speculation="off", max_batch=8)
    with live(create_app(engine, **options)) as address:
        yield EndpointSettings(endpoint=address)


def prepared(target: Target, out: Path, **arguments: Any) -> Dataset:
    """A data set that the target writes through a server."""
    with served(target) as server:
        dataset = prepare(target, out, server=server, progress=False, **arguments)
    assert dataset is not None
    return dataset


def rows_of(dataset: Dataset | None) -> list[Row]:
    """The rows of both splits."""
    assert dataset is not None
    return [row for split in ("train", "held-out") for row in dataset.rows(split)]
