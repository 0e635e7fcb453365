"""JSON files are whole or not there."""

import json
import math

import pytest

from odeopt.files import write_json


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
