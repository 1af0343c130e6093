"""The services of docker-compose.yml, as far as the tests start them: without containers, by their own commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
# With what .env files, URLs, shells and format strings find special.
SECRETS = {
    "POSTGRES_PASSWORD": 'own er"$HOME`id`%41@:/?#[]{}&=',
    "DASHBOARD_PASSWORD": "r3ad3r $$ @:/?#%20!",
    "RAY_AUTH_TOKEN": 'r4y t0k"en $x+/=' + 16 * "z",
}
_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?:(:[-?])([^}]*))?\})")


@dataclass(frozen=True)
class Service:
    """One service.

    Attributes:
        command: Entrypoint and command; the image's where the file names none.
        environment: What the file sets; variables that it merely hands on are None.
        depends_on: Service -> condition, such as `service_healthy`.
        healthcheck: The command that says whether it is healthy; None where there is none.
    """

    command: tuple[str, ...]
    environment: dict[str, str | None]
    depends_on: dict[str, str]
    healthcheck: tuple[str, ...] | None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Service:
        entrypoint = described.get("entrypoint") or (image_entrypoint() if "build" in described else [])
        test = described.get("healthcheck", {}).get("test")
        if test is not None:
            assert test[0] == "CMD", test
        return cls(
            command=(*entrypoint, *described.get("command", [])),
            environment=dict(described.get("environment", {})),
            depends_on={name: wanted["condition"] for name, wanted in described.get("depends_on", {}).items()},
            healthcheck=None if test is None else tuple(test[1:]),
        )


def services(variables: Mapping[str, str]) -> dict[str, Service]:
    """The services by name, with the variables put in."""
    text = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return {name: Service.of(_interpolated(described, variables)) for name, described in text["services"].items()}


def image_entrypoint() -> list[str]:
    """The entrypoint of our own images."""
    found = re.search(r"^ENTRYPOINT \[(.*)\]$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return shlex.split(found.group(1).replace(",", " "))


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [_interpolated(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def put_in(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if name is None:
            return "$"
        if kind == ":?" and not variables.get(name):
            raise KeyError(rest)
        return variables.get(name) or rest or ""

    return _VARIABLE.sub(put_in, value)
