"""What the commands that look after a store do and print."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from hpo.config import parse_seconds
from hpo.errors import ConfigurationError
from hpo.report import plain_table
from storage.engine import prepare
from storage.errors import StudyInUseError, StudyNotFoundError
from storage.leftovers import release_orphans, remove_files
from storage.roles import check_reader, create_reader
from storage.schema import Versions
from storage.urls import mask_password

if TYPE_CHECKING:
    from storage.artifact_files import StoredFile
    from storage.health import StoreHealth, StudyHealth
    from storage.leftovers import Leftovers
    from storage.store import StudyStore

__all__ = [
    "Initialization",
    "clear",
    "health_json",
    "health_parts",
    "initialization_json",
    "initialization_lines",
    "initialize",
    "leftovers_lines",
    "parse_age",
]

_PASSWORD = "HPO_DASHBOARD_PASSWORD"


@dataclass(frozen=True, slots=True)
class Initialization:
    """What has been set up.

    Attributes:
        url_masked: Of which store.
        before: The versions of the tables that were there, None where there were none.
        after: Their versions now.
        role: The role that may only read, if one was asked for.
        role_is_new: Whether it has been created.
    """

    url_masked: str
    before: Versions | None
    after: Versions
    role: str | None
    role_is_new: bool


def initialize(url: str, role: str | None) -> Initialization:
    """Create or upgrade the tables of a store, and its dashboard's role if one is named.

    Raises:
        ConfigurationError: The role's password is not in the environment; nothing has been done.
        StorageError: The store or the role cannot be set up.
    """
    password = os.environ.get(_PASSWORD, "")
    if role is not None and not password:
        raise ConfigurationError(f"`--dashboard-role {role}` takes its password from {_PASSWORD}, which is not set.")
    if role is not None:
        check_reader(url, role, password)
    before, after = prepare(url)
    is_new = create_reader(url, role, password) if role is not None else False
    return Initialization(mask_password(url), before, after, role, is_new)


def initialization_json(done: Initialization) -> dict[str, Any]:
    """What has been set up, as `hpo db init --json` prints it."""
    return {
        "storage": done.url_masked,
        "before": None if done.before is None else asdict(done.before),
        "after": asdict(done.after),
        "role": None if done.role is None else {"name": done.role, "created": done.role_is_new},
    }


def initialization_lines(done: Initialization) -> Iterator[str]:
    """What has been set up, in sentences."""
    if done.before is None:
        yield f"Created the tables of {done.url_masked}: {done.after}."
    elif done.before == done.after:
        yield f"All tables of {done.url_masked} were there: {done.after}."
    else:
        yield f"Upgraded the tables of {done.url_masked}: {done.before} -> {done.after}."
    if done.role is not None and done.role_is_new:
        yield f"Created the role {done.role!r}, which may read every table and write nothing."
    elif done.role is not None:
        yield f"The role {done.role!r} was there; its password and its rights to read are set anew."


def health_json(health: "StoreHealth") -> dict[str, Any]:
    """A store's health, as `hpo db check --json` prints it."""
    return {
        "healthy": not health.problems,
        "problems": list(health.problems),
        "storage": health.url_masked,
        "server": health.server,
        "versions": asdict(health.versions),
        "latency_s": health.latency_s,
        "time_zone": health.time_zone,
        "user": health.user,
        "may_write": health.may_write,
        "studies": [
            {
                "study": study.name,
                "holder": None if study.holder is None else asdict(study.holder),
                "n_trials": {state.name.lower(): count for state, count in study.n_trials.items()},
                "n_orphans": study.n_orphans,
            }
            for study in health.studies
        ],
        "artifacts": asdict(health.artifacts),
        "measurements": asdict(health.measurements),
    }


def health_parts(health: "StoreHealth") -> Iterator[Any]:
    """A store's health on one screen; problems come last, where they are seen."""
    facts = plain_table("store", health.url_masked)
    facts.add_row("server", f"{health.server}, answers in {health.latency_s * 1000:.1f} ms")
    facts.add_row("tables", f"{health.versions}{'' if health.versions == health.newest else ', outdated'}")
    facts.add_row("time zone", "UTC" if health.time_zone is None else f"UTC (the server's own: {health.time_zone})")
    access = "may read and write" if health.may_write else "may only read"
    facts.add_row("access", access if health.user is None else f"{health.user} {access}")
    artifacts = health.artifacts
    facts.add_row("artifacts", artifacts.location)
    facts.add_row("", f"{artifacts.n_files} files, {_size(artifacts.n_bytes)}, {len(artifacts.missing)} missing")
    facts.add_row("measurements", f"{health.measurements.n:,} of pruned networks, {_size(health.measurements.n_bytes)}")
    yield facts
    if health.studies:
        yield _studies_table(health.studies)
    else:
        yield "No studies yet."
    yield "\n".join(f"Problem: {problem}" for problem in health.problems) or "All is well."


def _studies_table(studies: "tuple[StudyHealth, ...]") -> Any:
    table = plain_table("study", "driven by", "trials", numbers=("orphans",))
    for study in studies:
        states = ", ".join(f"{count} {state.name.lower()}" for state, count in study.n_trials.items())
        holder = "-" if study.holder is None else str(study.holder)
        table.add_row(study.name, holder, states or "-", str(study.n_orphans))
    return table


def parse_age(text: str, option: str = "--older-than") -> timedelta:
    """The duration in an option; 0 is one.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        age = timedelta(seconds=0 if text == "0" else parse_seconds(text))
        datetime.now(UTC) - age  # no calendar reaches further back
        return age
    except (ValueError, OverflowError):
        wanted = "must be a duration such as 0, 90, 90s, 30m or 24h"
        raise ConfigurationError(f"`{option}` {wanted}, but got {text!r}.") from None


def leftovers_lines(leftovers: "Leftovers", store: "StudyStore") -> Iterator[str]:
    """What is about to be done about leftovers."""
    yield f"In {store.url_masked}:"
    for orphans in leftovers.orphans:
        numbers = ", ".join(map(str, orphans.numbers))
        yield f"  release {_count(orphans.numbers, 'trial')} of study {orphans.study!r} that nobody drives: {numbers}"
    location = store.artifacts.location
    if leftovers.files:
        files = f"{_count(leftovers.files, 'file')} ({_total(leftovers.files)})"
        yield f"  remove {files} that nothing refers to from {location}"
    if leftovers.uploads:
        yield f"  remove what {_count(leftovers.uploads, 'interrupted write')} left in {location}"
    if leftovers.measurements:
        size = _size(leftovers.measurements.n_bytes)
        yield f"  forget {_measurements(leftovers.measurements.n, leftovers)} ({size})"


def _measurements(n: int, leftovers: "Leftovers") -> str:
    return f"{n:,} measurement{'' if n == 1 else 's'} written before {leftovers.measured_before:%Y-%m-%d %H:%M} UTC"


def clear(store: "StudyStore", leftovers: "Leftovers") -> Iterator[str]:
    """Clear leftovers away, and say what has been done.

    Raises:
        StorageError: The store or its artifacts cannot be written; what was said before is done.
    """
    for orphans in leftovers.orphans:
        try:
            released = release_orphans(store, orphans)
        except (StudyInUseError, StudyNotFoundError) as error:
            yield f"Left alone: {error}"
        else:
            yield f"Released {_count(released, 'trial')} of study {orphans.study!r}; a launch goes on with them."
    if leftovers.files or leftovers.uploads:
        removed = remove_files(store, leftovers.files + leftovers.uploads)
        yield f"Removed {_count(removed, 'file')} ({_total(removed)}) from {store.artifacts.location}."
    if leftovers.measurements and leftovers.measured_before is not None:
        yield f"Forgot {_measurements(store.forget_measurements(leftovers.measured_before), leftovers)}."


def _count(things: "tuple[Any, ...]", name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _total(files: "tuple[StoredFile, ...]") -> str:
    return _size(sum(file.n_bytes for file in files))


def _size(n_bytes: float) -> str:
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} GB"
