"""The contract of artifact files, in a directory and in a bucket of a real S3 server over HTTP."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from forked_python import ForkedPython
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.samplers import RandomSampler

from storage.artifact_files import ArtifactFiles, DirectoryFiles, open_artifact_files
from storage.artifacts import ArtifactRecord
from storage.engine import connect
from storage.errors import StoreFullError, StoreUnreachableError, StoreUrlError
from storage.patience import Patience
from storage.store import StudyStore

URL = "postgresql+psycopg://ada@db.example.org/studies"


def new_id() -> str:
    return ArtifactRecord.new("a.csv").artifact_id


@pytest.fixture(params=["directory", "bucket"])
def files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactFiles:
    if request.param == "directory":
        monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "shared" / "artifacts"))
    else:
        monkeypatch.setenv("HPO_ARTIFACTS", f"s3://{request.getfixturevalue('bucket')}/studies/of/ada")
    return open_artifact_files(URL)


def read(files: ArtifactFiles, artifact_id: str) -> bytes:
    with files.open_reader(artifact_id) as body:
        return body.read()


def test_what_is_written_is_read(files: ArtifactFiles) -> None:
    contents = {new_id(): content for content in (b"", b"rate,accuracy\n", os.urandom(9 * 2**20))}
    for artifact_id, content in contents.items():
        files.write(artifact_id, io.BytesIO(content))
    assert {artifact_id: read(files, artifact_id) for artifact_id in contents} == contents
    stored = {file.artifact_id: file for file in files.stored()}
    assert {artifact_id: file.n_bytes for artifact_id, file in stored.items()} == {
        artifact_id: len(content) for artifact_id, content in contents.items()
    }
    for file in stored.values():
        assert file.upload is None
        assert abs(datetime.now(UTC) - file.written) < timedelta(minutes=1)


def test_what_is_removed_is_gone(files: ArtifactFiles) -> None:
    first, second, third = new_id(), new_id(), new_id()
    for artifact_id in (first, second, third):
        files.write_bytes(artifact_id, b"content")
    files.remove(first)
    files.discard(second)
    files.discard(second)
    [file] = files.stored()
    assert file.artifact_id == third
    files.delete(file)
    files.delete(file)
    assert list(files.stored()) == []
    with pytest.raises(ArtifactNotFound):
        files.open_reader(third)


def test_trying_to_write_leaves_nothing(files: ArtifactFiles, tmp_path: Path) -> None:
    files.try_writing()
    assert list(files.stored()) == []
    assert not (tmp_path / "shared").exists()
    files.write_bytes(new_id(), b"")
    files.try_writing()
    assert len(list(files.stored())) == 1


def test_location_is_shown(files: ArtifactFiles) -> None:
    assert files.location == os.environ["HPO_ARTIFACTS"]


# Directories


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryFiles:
    return DirectoryFiles(tmp_path / "artifacts")


class Breaking(io.BytesIO):
    """Content that ends in the midst, as a process that is interrupted does."""

    def read(self, *arguments: Any) -> bytes:
        if self.tell():
            raise KeyboardInterrupt
        return super().read(3)


def test_failed_write_leaves_no_file(directory: DirectoryFiles) -> None:
    with pytest.raises(KeyboardInterrupt):
        directory.write(new_id(), Breaking(b"content"))
    assert list(directory.directory.iterdir()) == []


def test_killed_write_leaves_no_artifact_but_a_leftover(
    directory: DirectoryFiles, start: Callable[..., ForkedPython]
) -> None:
    code = """
import io, os, signal, sys
from pathlib import Path
from storage.artifact_files import DirectoryFiles
class Dying(io.BytesIO):
    def read(self, *arguments):
        if self.tell():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(100_000)
DirectoryFiles(Path(sys.argv[1])).write(sys.argv[2], Dying(bytes(200_000)))
"""
    artifact_id = new_id()
    process = start(code, str(directory.directory), artifact_id)
    assert process.wait(timeout=60) < 0, process.communicate()[1]
    with pytest.raises(ArtifactNotFound):
        directory.open_reader(artifact_id)
    [leftover] = directory.stored()
    assert (leftover.artifact_id, leftover.upload) == (artifact_id, f".{artifact_id}.part")
    directory.delete(leftover)
    assert list(directory.directory.iterdir()) == []


def test_other_peoples_files_are_no_artifacts(directory: DirectoryFiles) -> None:
    directory.directory.mkdir()
    for name in ("thesis.pdf", f"{new_id()}.txt", new_id().upper(), ".profile", f"{new_id()}.part"):
        (directory.directory / name).touch()
    assert list(directory.stored()) == []


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files = DirectoryFiles(tmp_path / "file" / "artifacts")
    with pytest.raises(StoreUnreachableError, match="check its permissions, or set HPO_ARTIFACTS") as caught:
        files.try_writing()
    assert str(caught.value).startswith(f"Cannot create {tmp_path}/file/artifacts: {tmp_path}/file is not a directory")
    with pytest.raises(StoreUnreachableError, match="check the path and its permissions"):
        list(files.stored())
    with pytest.raises(StoreUnreachableError, match="Cannot write"):
        files.write_bytes(new_id(), b"")


@pytest.mark.parametrize("use", ["open_reader", "remove", "stored", "try_writing"])
def test_what_the_system_says_is_translated(directory: DirectoryFiles, use: str) -> None:
    # Rights don't stop root, but nothing is found inside a file.
    directory.directory.touch()
    inside = DirectoryFiles(directory.directory / "inside")
    arguments = [new_id()] if use in {"open_reader", "remove"} else []
    with pytest.raises(StoreUnreachableError, match=f"{inside.location}: "):
        list(getattr(inside, use)(*arguments) or ())


def test_artifacts_that_are_elsewhere_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "first"))
    with StudyStore.open(url) as store:
        assert store.check_artifacts() is None
        study = store.create_or_resume("s", sampler=RandomSampler(), identity={}, configuration={})
        store.add_artifact(study, "a.csv", b"1")
        assert store.check_artifacts() is None
    monkeypatch.setenv("HPO_ARTIFACTS", str(tmp_path / "second"))
    with StudyStore.open(url) as store:
        told = store.check_artifacts()
        assert told is not None
        assert told.startswith(f"The store has 1 artifacts, but they aren't in {tmp_path / 'second'}, ")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    with StudyStore.open(url) as store:
        assert store.check_artifacts() is None


def test_full_disk_is_said_of_the_directory(mount_disk: Callable[[int], Path]) -> None:
    files = DirectoryFiles(mount_disk(2**16))
    files.try_writing()
    with pytest.raises(StoreFullError, match="No space left for"):
        files.write_bytes(new_id(), bytes(2**17))
    assert list(files.stored()) == []


# Buckets


@pytest.fixture
def multipart(bucket: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[ArtifactFiles, str]:
    """A bucket in which an upload in parts was interrupted."""
    artifact_id = new_id()
    s3_client.create_multipart_upload(Bucket=bucket, Key=f"here/{artifact_id}")
    monkeypatch.setenv("HPO_ARTIFACTS", f"s3://{bucket}/here/")
    return open_artifact_files(URL), artifact_id


def test_interrupted_upload_is_a_leftover(multipart: tuple[ArtifactFiles, str], bucket: str, s3_client: Any) -> None:
    files, artifact_id = multipart
    with pytest.raises(ArtifactNotFound):
        files.open_reader(artifact_id)
    [leftover] = files.stored()
    assert leftover.artifact_id == artifact_id
    assert leftover.upload is not None
    assert leftover.written.utcoffset() == timedelta(0)  # moto dates every upload to 2010
    files.delete(leftover)
    files.delete(leftover)
    assert list(files.stored()) == []
    assert "Uploads" not in s3_client.list_multipart_uploads(Bucket=bucket)


def test_prefixes_keep_apart(bucket: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    for prefix in ("", "/ada", "/ada2"):
        monkeypatch.setenv("HPO_ARTIFACTS", f"s3://{bucket}{prefix}")
        opened.append(open_artifact_files(URL))
    ids = [new_id() for _ in opened]
    for files, artifact_id in zip(opened, ids, strict=True):
        files.write_bytes(artifact_id, b"")
    s3_client.put_object(Bucket=bucket, Key="ada/thesis.pdf", Body=b"")
    for files, artifact_id in zip(opened, ids, strict=True):
        assert [file.artifact_id for file in files.stored()] == [artifact_id]
    keys = {each["Key"] for each in s3_client.list_objects_v2(Bucket=bucket)["Contents"]}
    assert keys == {ids[0], f"ada/{ids[1]}", f"ada2/{ids[2]}", "ada/thesis.pdf"}


def test_every_page_of_a_bucket_is_read(bucket: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", f"s3://{bucket}")
    for _ in range(1001):  # a page has 1,000
        s3_client.put_object(Bucket=bucket, Key=new_id(), Body=b"")
    assert len({file.artifact_id for file in open_artifact_files(URL).stored()}) == 1001


def uses(files: ArtifactFiles) -> list[Callable[[], object]]:
    return [
        lambda: files.write_bytes(new_id(), b"content"),
        lambda: files.open_reader(new_id()),
        lambda: files.remove(new_id()),
        lambda: list(files.stored()),
        files.try_writing,
    ]


def refusals(location: str, monkeypatch: pytest.MonkeyPatch, **environment: str | None) -> set[str]:
    """What every use of a bucket ends with."""
    monkeypatch.setenv("HPO_ARTIFACTS", location)
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    texts = set()
    files = open_artifact_files(URL)
    for use in uses(files):
        with pytest.raises(StoreUnreachableError) as caught:
            use()
        texts.add(str(caught.value))
        assert "\n" not in str(caught.value)
        assert "s3cret" not in str(caught.value)
    files.discard(new_id())
    return texts


@pytest.mark.usefixtures("s3_server")
def test_missing_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "There is no bucket for s3://no-such-bucket/p; create it, or correct HPO_ARTIFACTS."
    assert refusals("s3://no-such-bucket/p", monkeypatch) == {expected}


def test_missing_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": "true"}
    [text] = refusals(f"s3://{bucket}", monkeypatch, HOME=str(tmp_path), **environment)
    assert text.startswith(f"Cannot reach s3://{bucket}: Unable to locate credentials")
    assert text.endswith("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")


def test_missing_rights(bucket: str, s3_server: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    # A user of the server's without any policy.
    iam = boto3.session.Session().client("iam", endpoint_url=s3_server)
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    _check_rights_after(s3_server, b"0")
    try:
        texts = refusals(
            f"s3://{bucket}",
            monkeypatch,
            AWS_ACCESS_KEY_ID=key["AccessKeyId"],
            AWS_SECRET_ACCESS_KEY=key["SecretAccessKey"],
        )
    finally:
        _check_rights_after(s3_server, b"inf")
    for text in texts:
        assert text.startswith(f"No access to s3://{bucket}: ")
        assert text.endswith("check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their rights.")
        assert key["SecretAccessKey"] not in text


def test_uploads_that_may_not_be_listed_are_left(
    multipart: tuple[ArtifactFiles, str],
    bucket: str,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import boto3

    # What artifacts take, and no more.
    iam = boto3.session.Session().client("iam", endpoint_url=s3_server)
    iam.create_user(UserName="writer")
    actions = ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName="writer", PolicyName="artifacts", PolicyDocument=policy)
    key = iam.create_access_key(UserName="writer")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    files = open_artifact_files(URL)
    files.write_bytes(artifact_id := new_id(), b"png")
    _check_rights_after(s3_server, b"0")
    try:
        with caplog.at_level("INFO", "hpo"):
            assert [file.artifact_id for file in files.stored()] == [artifact_id]
        assert [record.message[:70] for record in caplog.records] == [
            f"Interrupted uploads are not looked for: No access to s3://{bucket}/here: "[:70]
        ]
    finally:
        _check_rights_after(s3_server, b"inf")


def _check_rights_after(s3_server: str, n_requests: bytes) -> None:
    request = Request(f"{s3_server}/moto-api/reset-auth", data=n_requests, headers={"Content-Type": "text/plain"})
    with urlopen(request) as answer:
        assert answer.status == 200


def test_service_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
    }
    texts = refusals("s3://bucket", monkeypatch, **environment)
    for text in texts:
        assert text.startswith("Cannot reach s3://bucket: Could not connect to the endpoint URL")
        assert text.endswith("check AWS_ENDPOINT_URL and that the service runs.")


def test_password_of_an_endpoint_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    texts = refusals("s3://bucket", monkeypatch, AWS_ENDPOINT_URL="http://ada:s3cret@127.0.0.1:1", **keys)
    assert texts
    for text in texts:
        assert "http://ada:***@127.0.0.1:1" in text
        assert "s3cret" not in text


def test_bucket_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:1"), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("HPO_ARTIFACTS", "s3://bucket/p")
    files = open_artifact_files(URL)
    # Not marked as the store's own: that is not waited for.
    files.is_placed = False
    told: list[str] = []
    rdb = connect(f"sqlite:///{tmp_path}/studies.db", "create")
    patience = Patience(0.5, notify=told.append)
    with (
        StudyStore(rdb, files, "sqlite:///studies.db", tmp_path, patience) as store,
        pytest.raises(StoreUnreachableError) as caught,
    ):
        store.write_artifact("curve.csv", b"0,1")
    assert str(caught.value).startswith("The store s3://bucket/p has been away for longer than --store-timeout (0.5 s)")
    [begin] = told
    assert begin.startswith("Cannot reach s3://bucket/p: ")


@pytest.mark.parametrize("endpoint", ["minio:9000", "http://ho st"])
def test_endpoint_that_is_no_url(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", "s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreUnreachableError, match="check AWS_ENDPOINT_URL") as caught:
        open_artifact_files(URL)
    assert endpoint in str(caught.value)


def test_missing_boto3_is_said_with_what_to_install() -> None:
    # As where it is not installed; what is not there cannot be asked for in the process that has it.
    code = (
        "import sys; sys.modules['boto3'] = None\n"
        "from storage.artifact_files import open_artifact_files\n"
        "from storage.errors import StoreUnreachableError\n"
        "try: open_artifact_files('sqlite:///x.db')\n"
        "except StoreUnreachableError as error: print(error)"
    )
    environment = {**os.environ, "HPO_ARTIFACTS": "s3://bucket"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = "HPO_ARTIFACTS is 's3://bucket', but boto3 is not installed; install it with: "
    assert done.stdout == f"{expected}pip install 'pruning-hpo[s3]'\n"


@pytest.mark.parametrize(
    "location",
    [
        "s3://",
        "s3:/bucket",
        "s3://A_B/x",
        "s3://key:s3cret@bucket/x",
        "gs://bucket/x",
        "https://bucket.s3.example.org/",
    ],
)
def test_location_that_cannot_be_read(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_ARTIFACTS", location)
    with pytest.raises(StoreUrlError, match="write a directory, or 's3://BUCKET/PREFIX'") as caught:
        open_artifact_files(URL)
    assert "s3cret" not in str(caught.value)
