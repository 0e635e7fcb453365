"""JSON files are whole or not there."""

import json
import math
import os

import pytest

from odeopt.files import locked, replaced, write_json


@pytest.mark.parametrize("is_by_row", [False, True])
def test_what_is_written_is_read_again(tmp_path, is_by_row):
    content = {"b": [[1, 2.5, None], [3, 4, 5]], "a": "text"}
    write_json(tmp_path / "x.json", content, is_by_row=is_by_row)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert ("[3, 4, 5]" in text) == is_by_row
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_keys_are_sorted_where_asked_for(tmp_path):
    for sort_keys, keys in ((False, ["b", "a"]), (True, ["a", "b"])):
        write_json(tmp_path / "x.json", {"b": 1, "a": 2}, sort_keys=sort_keys)
        assert list(json.loads((tmp_path / "x.json").read_text())) == keys


def test_a_number_that_json_lacks_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "x.json", [math.nan])
    assert json.loads((tmp_path / "x.json").read_text()) == [1]


def test_processes_that_write_one_file_write_beside_each_other(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    with replaced(path) as ours:
        ours.write_text("ours, ")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with replaced(path) as theirs:
                theirs.write_text("theirs")
        assert path.read_text() == "theirs"
        with ours.open("a") as file:
            file.write("whole")
    assert path.read_text() == "ours, whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_files_that_differ_in_their_suffix_are_written_beside_each_other(tmp_path):
    with replaced(tmp_path / "x.json") as one, replaced(tmp_path / "x.pt") as other:
        one.write_text("1")
        other.write_text("2")
    assert [(tmp_path / name).read_text() for name in ("x.json", "x.pt")] == ["1", "2"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(error), replaced(path) as temporary:  # noqa: PT012 -- it is while the file is written
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_lock_keeps_others_out_for_as_long_as_it_is_held(tmp_path):
    path = tmp_path / "lock"
    for _ in range(2):
        refused = pytest.raises(OSError, match=r"lock: not locked .* is locked")
        with locked(path, timeout=0), refused, locked(path, timeout=0):
            pass
