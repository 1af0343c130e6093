"""The compose files, read by docker-compose itself and checked against the Compose Specification's schema."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from compose_file import ROOT, SECRETS, Service, services

FILES = {"cpu": ["docker-compose.yml"], "gpu": ["docker-compose.yml", "docker-compose.gpu.yml"]}


@pytest.fixture
def read(tmp_path):
    """What docker-compose makes of the files, with these variables in its `.env`."""
    if shutil.which("docker-compose") is None:
        pytest.skip("needs docker-compose on PATH")

    def config(variables, kind="cpu"):
        env_file = tmp_path / "env"
        env_file.write_text("".join(f"{name}='{value}'\n" for name, value in variables.items()))
        files = [word for name in FILES[kind] for word in ("-f", str(ROOT / name))]
        command = ["docker-compose", "--env-file", str(env_file), *files, "config"]
        return subprocess.run(
            command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60
        )

    return config


@pytest.fixture(scope="module")
def described():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def each_service(described):
    return described["services"].items()


@pytest.mark.parametrize("kind", FILES)
def test_docker_compose_reads_what_we_read(read, kind):
    done = read(SECRETS, kind)
    assert done.returncode == 0, done.stderr
    # It writes its result as a compose file again, in which $ is $$.
    theirs = yaml.safe_load(done.stdout.replace("$$", "$"))["services"]
    assert {name: Service.of(service) for name, service in theirs.items()} == services(SECRETS)


@pytest.mark.parametrize("name", FILES["gpu"])
def test_files_follow_the_compose_specification(name):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("missing", SECRETS)
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_no_secret_has_a_default(read, missing, how):
    variables = {name: value for name, value in SECRETS.items() if name != missing}
    done = read(variables if how == "absent" else {**variables, missing: ""})
    assert done.returncode != 0
    assert f"{missing} is missing, set it in .env as .env.example shows" in done.stderr


def test_the_example_names_every_variable_and_no_secret():
    example = (ROOT / ".env.example").read_text()
    used = {name for file in FILES["gpu"] for name in re.findall(r"\$\{(\w+)", (ROOT / file).read_text())}
    handed_on = {
        name for service in services(SECRETS).values() for name, value in service.environment.items() if value is None
    }
    assert set(re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE)) == used | handed_on | {"COMPOSE_FILE"}
    assert set(re.findall(r"^([A-Z_]+)=$", example, re.MULTILINE)) == set(SECRETS)


def test_no_secret_is_an_argument():
    for service in services(SECRETS).values():
        words = json.dumps([service.command, service.healthcheck])
        assert not any(json.dumps(secret)[1:-1] in words for secret in SECRETS.values())
        assert not any(secret in (service.environment.get("HPO_STORAGE") or "") for secret in SECRETS.values())


def test_only_the_dashboard_is_published_and_on_this_machine(described):
    published = {name: service["ports"] for name, service in each_service(described) if "ports" in service}
    assert published == {"dashboard": ["127.0.0.1:${HPO_DASHBOARD_PORT:-8080}:8080"]}
    assert not any("network_mode" in service for _, service in each_service(described))


def test_workers_know_nothing_of_the_database(described):
    assert described["networks"]["store"] == {"internal": True}
    for name in ("ray-head", "ray-worker"):
        assert described["services"][name]["networks"] == ["compute"]
        assert not {"PGPASSWORD", "HPO_STORAGE"} & set(services(SECRETS)[name].environment)


def test_every_container_has_limits_and_no_privileges(described):
    for name, service in each_service(described):
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert {"mem_limit", "cpus", "pids_limit", "logging"} <= set(service), name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert "privileged" not in service, name


def test_every_order_of_starting_waits_for_what_is_needed():
    waits = {name: service.depends_on for name, service in services(SECRETS).items()}
    ready, done = "service_healthy", "service_completed_successfully"
    assert waits == {
        "postgres": {},
        "db-init": {"postgres": ready},
        "dashboard": {"db-init": done},
        "ray-head": {},
        "ray-worker": {"ray-head": ready},
        "launch": {"db-init": done, "ray-head": ready, "ray-worker": ready},
    }


def test_images_are_pinned_to_a_patch_release(described):
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    foreign = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages
    foreign |= {service["image"] for _, service in each_service(described) if "build" not in service}
    assert len(foreign) == 2
    for image in foreign:
        assert re.fullmatch(r"\w+:\d+\.\d+(\.\d+)?(-slim)?-bookworm", image)
    targets = {service["build"]["target"] for _, service in each_service(described) if "build" in service}
    assert targets == {"cpu"} <= stages


def test_gpus_are_asked_for_in_the_second_file_only(described):
    assert not any("deploy" in service for _, service in each_service(described))
    gpu = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
    assert gpu.keys() == {name for name, service in each_service(described) if "build" in service}
    assert {service["build"]["target"] for service in gpu.values()} == {"cuda"}
    (device,) = gpu["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "${HPO_GPUS:-all}", "capabilities": ["gpu"]}
    assert [name for name, service in gpu.items() if "deploy" in service] == ["ray-worker"]


def test_secrets_reach_neither_history_nor_image():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    packages = {"hpo", "objectives", "search_spaces", "storage"}
    assert {line[1:] for line in rules if line.startswith("!")} == {*packages, "LICENSE", "README.md", "pyproject.toml"}
