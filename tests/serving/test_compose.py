"""compose.yaml: no container runs here, but each service's command has to be one that its program takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import draft.cli
import serving.cli

ROOT = Path(__file__).parents[2]
SERVICES = yaml.safe_load(
    re.sub(r"\$\{(\w+)[^}]*\}", lambda found: f"my/{found[1].lower()}", (ROOT / "compose.yaml").read_text())
)["services"]


def parsed(service: dict[str, Any]) -> dict[str, Any]:
    """The options of a service of our image; click refuses unknown ones, and missing ones that it knows of."""
    entrypoint = service.get("entrypoint", ["draft-serve"])
    command: Any = typer.main.get_command(serving.cli.cli if entrypoint == ["draft-serve"] else draft.cli.app)
    for word in entrypoint[1:]:
        command = command.commands[word]
    return command.make_context(entrypoint[-1], [str(word) for word in service["command"]]).params


@pytest.mark.parametrize("name", ["gateway", "learner"])
def test_commands_are_taken_and_their_folders_are_mounted(name):
    service = SERVICES[name]
    options = parsed(service)
    mounts = {words[1]: words[2:] for words in (mount.split(":") for mount in service["volumes"])}
    for option in ("capture", "out"):  # written to, the learner's lock in the first
        if option in options:
            assert mounts[str(options[option])] == []
    made = re.search(r"install --directory --owner=draftsmith (.+)", (ROOT / "Dockerfile").read_text())
    volumes = {place for mount, place in (each.split(":")[:2] for each in service["volumes"]) if mount[0] != "."}
    assert made and volumes <= set(made[1].split())  # or the user of the image could not write there


def test_the_learner_has_all_that_it_needs_and_vllm_sees_what_it_exports():
    learner, gateway = parsed(SERVICES["learner"]), parsed(SERVICES["gateway"])
    for option in ("server", "capture", "target", "head", "out"):
        assert learner[option] is not None
    assert learner["target"] == gateway["target"] and str(learner["capture"]) == str(gateway["capture"])
    assert [learner["head"]] == gateway["head"]
    assert f"learned:{learner['out']}:ro" in SERVICES["vllm"]["volumes"]
    assert SERVICES["learner"]["healthcheck"] == {"disable": True}
