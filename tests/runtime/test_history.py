"""What has changed the weights outlives the process; what a killed one has left half written does no harm."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from amalgam.config.placement import Rule
from amalgam.config.reading import load_settings
from amalgam.errors import CancelledError, ConfigError, ConflictError, PlanError
from amalgam.runtime import changes
from amalgam.runtime.changes import MAX_REMAPS, Asked, ChangeRequest, RemapLog, RemapRecord
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.history import HistoryFile, Kept
from amalgam.runtime.jobs import JobStatus, status_of_record
from amalgam.runtime.opening import open_deployment
from tests.conftest import DEMO
from tests.errors import raises

RULES = (Rule(pattern="a.*", source="int4"), Rule(pattern="名", source="fp8"))
START = RemapRecord(1.0, 1, 1, 0, 9, 0.5, fingerprint="f", rules=RULES, is_start=True)
CHANGE = RemapRecord(2.0, 2, 1, 3, 4, 0.5, fingerprint="g", rules=RULES[:1])
RELOAD = RemapRecord(3.0, 3, 2, 1, 4, 0.5, fingerprint="h", rules=RULES[:1])
REFUSED = RemapRecord(4.0, 3, 3, 0, 0, 0.1, "Pattern 'x' matches nothing.")
FAILED = RemapRecord(4.5, 1, 3, 0, 0, 0.0, "Version 3 computed NaN.", rules=RULES)  # and 1 is in use again
NAMED = RemapRecord(5.0, 4, 3, 2, 4, 0.5, name="wide", fingerprint="i", rules=())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "history.jsonl"


def written(path: Path, *records: RemapRecord) -> None:
    file = HistoryFile(path)
    for record in records:
        file.add(record)
    file.close()


def test_a_history_goes_on_where_it_ended(path: Path) -> None:
    written(path, START, CHANGE, RELOAD)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["since"], line["dropped"], line["added"]) for line in lines[1:]] == [(1, [1], []), (2, [], [])]
    written(path, REFUSED, NAMED)
    file = HistoryFile(path)
    assert list(file.records) == [START, CHANGE, RELOAD, REFUSED, NAMED]
    assert (file.last_version_id, file.last_rules) == (4, RULES[:1])  # new requests did not start on the named one
    file.close()


def test_a_change_that_was_cancelled_has_not_failed_after_a_restart(path: Path) -> None:
    file = HistoryFile(path)
    log = RemapLog((), file.add)
    for error in (CancelledError("Enough."), PlanError("Pattern 'x' matches nothing.")):
        log.add_failure(1, 0.1, error, Asked("mapping", "1 rule"))
    file.close()
    file = HistoryFile(path)
    assert [status_of_record(record).state for record in file.records] == ["cancelled", "failed"]
    assert [status_of_record(record).error_type for record in file.records] == ["conflict", "invalid_plan"]
    file.close()


def test_lines_without_what_was_asked_for_stay_readable(path: Path) -> None:
    written(path, START, CHANGE, replace(RELOAD, asked=Asked("reload", "the files as they are now", "abc")))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[2]["asked"] == {"kind": "reload", "what": "the files as they are now", "id": "abc"}
    for line in lines[:2]:
        del line["asked"], line["error_type"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    file = HistoryFile(path)
    told = [status_of_record(record) for record in file.records]
    assert [(status.kind, status.version) for status in told] == [("start", 1), ("earlier", 2), ("reload", 3)]
    assert told[2].id == "abc" and len({status.id for status in told}) == 3
    file.close()


def test_a_change_that_its_process_did_not_survive_is_told(path: Path) -> None:
    file = HistoryFile(path)
    log = RemapLog((), file.add)
    log.start(START)
    ended, killed = Asked("mapping", "1 rule"), Asked("rules", "the whole set of 2 rules")
    log.begin(1, ended)
    log.add_failure(1, 0.1, PlanError("Pattern 'x' matches nothing."), ended)
    log.begin(1, killed)
    file.close()
    file = HistoryFile(path)
    _, first, second = map(status_of_record, file.records)
    assert (first.id, first.error_type) == (ended.id, "invalid_plan")
    assert (second.id, second.what, second.state, second.version) == (killed.id, killed.what, "failed", 1)
    assert file.last_rules == RULES
    file.close()


def test_what_is_kept_outlives_any_number_of_changes(path: Path) -> None:
    file = HistoryFile(path)
    for record in (START, NAMED):
        file.add(record)
    file.note_kept(lambda: Kept({"wide": 4, "broad": 4}))
    file.note_kept(lambda: Kept({"wide": 4}, (1,)))
    for version_id in range(5, 5 + MAX_REMAPS):
        file.add(replace(REFUSED, version=version_id))
    file.close()
    for _ in range(2):
        file = HistoryFile(path)
        assert (file.last_kept, len(file.records)) == (Kept({"wide": 4}, (1,)), MAX_REMAPS + 2)
        assert [record.version for record in file.records[:2]] == [1, 4]
        file.close()


def test_what_is_kept_is_left_with_a_version_that_kills_every_process(path: Path) -> None:
    written(path, START, CHANGE)
    file = HistoryFile(path)
    file.note_kept(lambda: Kept({"wide": 1}))
    file.close()
    for version_id in (3, 4, 5):
        started(path, version_id)
        file = HistoryFile(path)
        file.close()
        assert file.last_kept == (Kept() if version_id == 5 else Kept({"wide": 1}))


def test_a_restart_does_not_begin_with_a_version_that_failed(path: Path) -> None:
    written(path, START, CHANGE, RELOAD, FAILED, REFUSED, NAMED)
    file = HistoryFile(path)
    assert (file.last_version_id, file.last_rules) == (4, RULES)
    file.close()


def started(path: Path, version_id: int) -> tuple[Rule, ...] | None:
    """A process that begins with the last rules and is killed; the rules that the next one finds."""
    file = HistoryFile(path)
    file.add(replace(START, version=version_id, rules=file.last_rules or ()))
    file.close()
    file = HistoryFile(path)
    file.close()
    return file.last_rules


def test_a_version_that_kills_every_process_is_left_for_the_last_sound_one(path: Path) -> None:
    file = HistoryFile(path)
    for record in (START, CHANGE):
        file.add(record)
        if record is START:
            file.note_sound(START.version)
    file.close()
    assert [started(path, 3), started(path, 4), started(path, 5)] == [CHANGE.rules, CHANGE.rules, RULES]
    assert [started(path, version) for version in range(6, 10)] == [RULES, RULES, RULES, RULES]


def test_one_answer_is_enough_to_begin_with_a_version_again(path: Path) -> None:
    written(path, START, CHANGE)
    started(path, 3)
    file = HistoryFile(path)
    file.note_sound(3)
    file.note_sound(3)
    file.close()
    assert path.read_bytes().count(b"sound") == 1
    assert [started(path, version) for version in (4, 5)] == [CHANGE.rules, CHANGE.rules]


def test_where_nothing_was_ever_sound_the_configuration_holds(path: Path) -> None:
    written(path, replace(START, is_start=False))
    assert [started(path, version) for version in (2, 3, 4)] == [RULES, RULES, None]


@pytest.mark.parametrize("num_bytes", [1, 40, 200])
def test_a_line_that_is_half_written_is_passed_over(path: Path, num_bytes: int) -> None:
    written(path, START, CHANGE)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:num_bytes])
    written(path, RELOAD)
    file = HistoryFile(path)
    assert list(file.records) == [START, CHANGE, RELOAD]
    file.close()


@pytest.mark.parametrize("num_bytes", [1, 4, 40, 200, -1])
def test_a_first_line_that_is_half_written_is_no_file_of_somebody_else(path: Path, num_bytes: int) -> None:
    written(path, START)
    path.write_bytes(path.read_bytes().strip()[:num_bytes])
    written(path, CHANGE)
    file = HistoryFile(path)
    assert list(file.records) == [CHANGE]
    file.close()


def test_a_file_without_a_record_is_ours_if_its_lines_are(path: Path) -> None:
    file = HistoryFile(path)
    file.note_sound(3)
    file.note_kept(lambda: Kept({"wide": 4}))
    file.close()
    file = HistoryFile(path)
    assert (list(file.records), file.kept, file.last_version_id) == ([], Kept({"wide": 4}), 4)
    file.close()


@pytest.mark.parametrize("content", ['{"at": 5}', '{"at": 5\nnotes', '{\n  "my": "file"\n}', "{}", "notes"])
def test_a_file_that_only_resembles_ours_is_left_alone(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    with raises(ConfigError, path):
        HistoryFile(path)
    assert path.read_text(encoding="utf-8") == content


def test_a_line_that_two_readers_would_read_differently_is_passed_over(path: Path) -> None:
    written(path, START, CHANGE)
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join((first, second[:-1] + b', "version": 7}', second[:-1] + b', "seconds": NaN}')))
    file = HistoryFile(path)
    assert list(file.records) == [START]
    file.close()


def test_a_full_disk_ends_nothing(path: Path) -> None:
    file = HistoryFile(path)
    file.add(START)
    path.rename(path.with_name("kept"))
    path.mkdir()
    file.add(CHANGE)
    path.rmdir()
    path.with_name("kept").rename(path)
    file.add(RELOAD)
    file.close()
    file = HistoryFile(path)
    assert list(file.records) == [START, RELOAD]
    file.close()


def test_rules_of_a_line_that_is_lost_are_not_made_up(path: Path) -> None:
    others = (Rule(pattern="c", source="base"), *RULES[1:])
    written(path, START, CHANGE, replace(RELOAD, rules=others), replace(RELOAD, version=4, rules=RULES))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2] + lines[3])
    file = HistoryFile(path)
    assert [(record.version, record.rules) for record in file.records] == [(1, RULES), (3, None), (4, None)]
    file.add(NAMED)
    file.close()
    file = HistoryFile(path)
    assert file.records[-1] == NAMED
    file.close()


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"at": NaN, "version": 9, "previous_version": 1, "num_changed": 0, "loaded_bytes": 0, "seconds": 0}',
        b'{"at": 1e999, "version": 9, "previous_version": 1, "num_changed": 0, "loaded_bytes": 0, "seconds": 0}',
        b'{"at": 1, "version": 1%s, "previous_version": 1, "num_changed": 0, "loaded_bytes": 0, "seconds": 0}'
        % (b"0" * 30),
        b'{"since": {}, "dropped": 3, "added": [], "version": 9}',
        b'{"kept": {"named": {"a": "x"}, "pinned": 3}}',
        b'{"kept": 3}',
        b'{"kept": {"named": {"current": 1}, "pinned": []}}',
        b'{"kept": {"named": {}, "pinned": [1%s]}}' % (b"0" * 30),
        b'{"at": 1, "version": 9, "previous_version": 1, "num_changed": 0, "loaded_bytes": 0, "seconds": 0, '
        b'"asked": 3}',
        b"\xff\x00\xfe",
    ],
)
def test_a_line_that_is_damaged_is_passed_over(path: Path, line: bytes) -> None:
    written(path, START, CHANGE)
    path.write_bytes(path.read_bytes() + line + b"\n")
    file = HistoryFile(path)
    assert list(file.records) == [START, CHANGE]
    file.close()


def test_records_of_several_threads_do_not_mix(path: Path) -> None:
    file = HistoryFile(path)
    writing = threading.Lock()

    def write(record: RemapRecord) -> None:
        assert writing.acquire(blocking=False), "two at once"
        file.add(record)
        writing.release()

    log = RemapLog((), write)
    log.start(START)
    others = [
        threading.Thread(
            target=lambda first=first: [
                log.add_failed_version(n, RULES[: n % 2], 1, "NaN") for n in range(first, first + 20)
            ]
        )
        for first in (100, 200, 300)
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    file.close()
    records = HistoryFile(path).records
    assert sorted(record.version for record in records) == [1, *range(100, 120), *range(200, 220), *range(300, 320)]
    assert all(record.rules == RULES[: record.version % 2] for record in records[1:])


def test_rules_are_kept_of_the_latest_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_RULES", 3)
    log = RemapLog([START])
    for version_id in range(2, 6):
        log.start(replace(CHANGE, version=version_id))
    assert [log.rules_of(version_id) is None for version_id in range(1, 6)] == [False] * 5  # all have the same
    log.start(replace(CHANGE, version=6, rules=(*RULES, *RULES)))
    assert [log.rules_of(version_id) is None for version_id in range(1, 7)] == [True] * 5 + [False]


def test_a_file_of_somebody_else_is_left_alone(path: Path) -> None:
    file = HistoryFile(path)
    with raises(ConflictError, path):
        HistoryFile(path)
    file.close()
    path.write_text('{"my": "file"}\n', encoding="utf-8")
    with raises(ConfigError, path):
        HistoryFile(path)
    assert path.read_text(encoding="utf-8") == '{"my": "file"}\n'
    with raises(ConfigError, "/proc/nowhere"):
        HistoryFile(Path("/proc/nowhere/history"))


@pytest.fixture
def config(tmp_path: Path, path: Path) -> Path:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{base_path: {DEMO}, mixed_precision: {{same_path: {DEMO}}}}}\n"
        f"inference: {{max_seq_length: 64}}\nweights: {{history: {path}, resume: true}}\n",
        encoding="utf-8",
    )
    return config


def opened(config: Path) -> Deployment:
    return open_deployment(load_settings(config, {}, {}))


def described(status: JobStatus) -> tuple[str, str, str, int | None]:
    return status.id, status.kind, status.what, status.version


def test_a_restart_begins_with_the_last_good_version(config: Path) -> None:
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    rule = Rule(pattern=name.format(1), source="same")
    deployment = opened(config)
    deployment.update_weight_mapping({rule.pattern: "same"})
    deployment.change(ChangeRequest({name.format(2): "same"}, name="other"))
    fingerprint, told = deployment.version.fingerprint, list(map(described, deployment.jobs.read()))
    deployment.close()

    deployment = opened(config)
    assert (deployment.rules, deployment.configured_rules) == ((rule,), ())
    assert (deployment.version.fingerprint, deployment.version_id) == (fingerprint, 4)
    assert [record.version for record in deployment.history] == [1, 2, 3, 4] and deployment.remaps == []
    assert [described(deployment.jobs.find(status_id)) for status_id, *_ in told] == told
    assert [kind for _, kind, _, _ in told] == ["mapping", "mapping"]
    assert (deployment.rollback().version, deployment.rules) == (5, ())
    with pytest.raises(ConflictError):
        deployment.rollback()
    assert (deployment.rollback(2).version, deployment.rules) == (6, (rule,))
    deployment.close()


def test_rules_that_cannot_be_fulfilled_any_more_are_not_resumed(config: Path, path: Path) -> None:
    written(path, START)
    deployment = opened(config)
    assert deployment.rules == () and deployment.version_id == 2
    deployment.close()
    written(path)  # and nobody holds the file


def test_resuming_needs_a_history(config: Path) -> None:
    settings = load_settings(config, {"weights.history": ""}, {})
    with raises(ConfigError, "weights.history"):
        open_deployment(settings)
