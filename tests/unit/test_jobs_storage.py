"""A place that cannot be written is one sentence, before anything starts."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.errors import UserError
from jobs.driver import reach, storage
from jobs.driver.attempt import submission_id, unsaved_sentence
from jobs.driver.storage import NotWritable
from jobs.run_notes import Saves
from jobs.spec import JobSpec
from tests.support.fault_runs import SPEC

ROOT = Path(__file__).parents[2]


def spec(**places: str) -> JobSpec:
    checkpoint = {"every_steps": 10, **({"directory": places["directory"]} if "directory" in places else {})}
    return JobSpec.model_validate({**SPEC, "storage": places.get("storage", "here"), "checkpoint": checkpoint})


def test_places_that_can_be_written_are_left_as_they_were(tmp_path: Path):
    storage.check(spec(directory="kept/there"), tmp_path)
    storage.check(spec(directory=f"file://{tmp_path}/uri"), tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "kept", "there", "uri"]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"storage": "file"}, r"storage: .*/file cannot be written: .*/file is a file; mend that"),
        ({"storage": "file/below"}, r"storage: .*/file/below cannot be written: .*/file is a file"),
        ({"directory": "file"}, r"checkpoint.directory: .*/file cannot be written: .*/file is a file"),
        ({"directory": "FOLDER/file/x"}, r"checkpoint.directory: file://.* cannot be written: Not a directory"),
        ({"directory": "/proc/tandem"}, r"checkpoint.directory: /proc/tandem cannot be written: No such file"),
        (
            {"storage": "/sys/tandem"},
            r"storage: /sys/tandem cannot be written: [A-Z][a-z]+ [a-z]",
        ),
        ({"directory": "nonsense://bucket/x"}, r"checkpoint.directory: nonsense://bucket/x cannot be written: Unrec"),
    ],
)
def test_a_place_that_cannot_is_named_with_its_key_and_the_reason(tmp_path: Path, places, said):
    (tmp_path / "file").write_text("")
    places = {key: value.replace("FOLDER", f"file://{tmp_path}") for key, value in places.items()}
    with pytest.raises(NotWritable, match=f"^{said}"):
        storage.check(spec(**places), tmp_path)


@pytest.mark.parametrize(("options", "reason"), [("ro", "Read-only file system"), ("size=4k", "No space left")])
def test_a_file_system_that_is_read_only_or_full(tmp_path: Path, options, reason):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        if options != "ro":
            with pytest.raises(OSError, match="No space"):
                (place / "ballast").write_bytes(bytes(1 << 16))
        with pytest.raises(NotWritable, match=f"^storage: {place} cannot be written: {reason}"):
            storage.check(spec(storage=str(place)), tmp_path)
        with pytest.raises(NotWritable, match=rf"^checkpoint.directory: file://{place} cannot be written: .*{reason}"):
            storage.check(spec(directory=f"file://{place}"), tmp_path)
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("saves", "model", "sentence"),
    [
        (Saves(), "m", None),
        (Saves(3, 2, None), "m", None),
        (Saves(0, 4, "full"), "m", "the model is in m, but no checkpoint could be saved: full"),
        (
            Saves(3, 2, "full"),
            "m",
            "the model is in m, but the last of 5 checkpoints could not be saved (2 failed in all): full",
        ),
        (Saves(0, 1, "full"), None, "stopped, but no checkpoint could be saved: full"),
    ],
)
def test_a_job_whose_last_save_failed_says_so(saves, model, sentence):
    assert unsaved_sentence(saves, model) == sentence


def test_the_driver_says_it_before_it_looks_for_a_cluster(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**SPEC, "storage": "file/below"}))
    command = [sys.executable, "-m", "jobs.driver", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"tandem: error: storage: {tmp_path}/file/below cannot be written: {tmp_path}/file is a file" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "job"), [('{"metadata": {"job_submission_id": "a-1"}}', "a-1"), ("{}", ""), ("{", ""), (None, "")]
)
def test_a_driver_knows_its_own_job(text, job):
    given = {} if text is None else {"RAY_JOB_CONFIG_JSON_ENV_VAR": text}
    assert submission_id(given) == job


def test_a_failing_disk_is_told_from_other_errors_and_named(tmp_path: Path):
    full = OSError(errno.ENOSPC, "No space left on device", "/a/file")
    assert str(storage.told(full, tmp_path)) == (
        "a file could not be written or read: No space left on device (/a/file); mend that, and submit the same spec "
        "again to go on"
    )
    nameless = storage.told(OSError(errno.EROFS, "x"), tmp_path)
    assert f"the job's files are in {tmp_path}" in str(nameless)
    assert nameless.exit_code == 1
    for other in (PermissionError(errno.EACCES, "Permission denied", "/data"), ValueError("No space left on device")):
        assert storage.told(other, tmp_path) is other


def test_the_storage_is_what_the_spec_names_or_the_environment_or_a_folder_of_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    none = JobSpec.model_validate({**SPEC, "storage": None})
    assert storage.located(none, tmp_path) == str(tmp_path / "home" / "storage")
    monkeypatch.setenv("TANDEM_STORAGE", "s3://bucket/of-all?region=us-east-1")
    assert storage.uri(none, tmp_path) == "s3://bucket/of-all?region=us-east-1"
    assert storage.located(spec(storage="here"), tmp_path) == str(tmp_path / "here")
    assert storage.uri(spec(storage="here"), tmp_path) is None
    monkeypatch.setenv("TANDEM_STORAGE", "/mnt/all")
    assert storage.located(none, tmp_path) == "/mnt/all"


def test_a_uri_that_may_hold_a_secret_is_no_storage(tmp_path: Path) -> None:
    for wrong in ("s3://key:secret@bucket/x", "s3://bucket/x?access_key=secret", "s3://bucket"):
        with pytest.raises(UserError, match=r"^storage: s3://bucket") as told:
            storage.check_named(spec(storage=wrong), tmp_path)
        assert "secret@" not in str(told.value)
        assert "=secret" not in str(told.value)


def test_what_a_node_has_of_a_store_is_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    one, other = (storage.root(spec(storage=f"s3://bucket/{name}"), tmp_path) for name in ("a", "b"))
    assert one != other
    assert one.parent == other.parent == tmp_path / "stores"
    assert one.name.startswith("bucket-a-")


def test_a_sentence_of_nodes_that_do_not_reach_a_place_names_them_why_and_what_to_do() -> None:
    said = reach.sentence("storage", "/data", {"10.0.0.2": "there is no such folder", "10.0.0.3": "it is read-only"})
    assert said.startswith(
        "storage: /data is not one folder that all nodes reach: node 10.0.0.2: there is no such folder; "
        "node 10.0.0.3: it is read-only. Have it on a file system"
    )
    many = reach.sentence("storage", "s3://user:secret@b/x", {f"10.0.0.{n}": "no way" for n in range(7)})
    assert "not all nodes reach s3://b/x: nodes 10.0.0.0, 10.0.0.1, 10.0.0.2, 10.0.0.3 and 3 more: no way" in many
    assert "secret" not in many


def test_a_node_finds_a_folder_of_the_same_name_that_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "APPEARS_S", 0.0)
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()
    probe = reach.Probe({}, "abc", 7)
    (shared / probe.written()).write_text("abc")
    assert reach.try_folder(shared, probe) is None
    assert (shared / probe.answer()).read_text() == "abc", "the driver sees that this node writes there"
    assert reach.try_folder(own, probe) == "it has another folder of that name"
    assert reach.try_folder(tmp_path / "none", probe) == "there is no such folder"
    (shared / probe.written()).write_text("of another")
    assert reach.try_folder(shared, probe) == "what was written is not what it reads"
