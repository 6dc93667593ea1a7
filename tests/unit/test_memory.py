# SPDX-License-Identifier: Apache-2.0
"""Nothing is paid for twice, and nothing of somebody else's is taken."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_rba.memory import Memory, fingerprint

OWNER = {"model": "m", "votes": (1, 2)}


def test_values_outlive_the_process_and_a_cut_in_the_file(tmp_path):
    path = tmp_path / "deep" / "memory.jsonl"
    first = Memory(path=path, owner=OWNER)
    assert "a" not in first
    assert not path.exists(), "nothing kept, nothing written"
    first.keep({"a": 1.5, "b": ["ü", None]})
    first.keep({})
    path.write_bytes(path.read_bytes() + b'{"key": "c", "val')
    again = Memory(path=path, owner=OWNER)
    assert (again["a"], again["b"], len(again), "c" in again) == (1.5, ["ü", None], 2, False)
    again.keep({"c": 3})
    assert Memory(path=path, owner=OWNER)["c"] == 3
    assert path.read_text().count("owner") == 1


def test_other_owners_and_damage_are_refused(tmp_path):
    path = tmp_path / "memory.jsonl"
    Memory(path=path, owner=OWNER).keep({"a": 1})
    with pytest.raises(ValueError, match=r"belongs to .*'votes': \[1, 2\].*expected .*'votes': 3.*name another file"):
        Memory(path=path, owner=OWNER | {"votes": 3})["a"]
    path.write_text(path.read_text().replace("key", "kex") + '{"key": "b", "value": 2}\n')
    with pytest.raises(ValueError, match="line 2 is damaged; delete the file"):
        Memory(path=path, owner=OWNER)["b"]


def test_two_processes_may_begin_and_fill_one_file(tmp_path):
    path = tmp_path / "shared.jsonl"
    path.touch()
    one, other = Memory(path=path, owner=OWNER), Memory(path=path, owner=OWNER)
    assert len(one) == len(other) == 0, "both have found nothing"
    one.keep({"a": 1})
    begun = path.read_text()
    path.write_text("")
    other.keep({"b": 2})
    path.write_text(begun + path.read_text())
    assert path.read_text().count("owner") == 2
    both = Memory(path=path, owner=OWNER)
    assert (both["a"], both["b"], len(both)) == (1, 2, 2)


def test_without_a_path_and_with_many_threads(tmp_path):
    for path in ("", tmp_path / "many.jsonl"):
        memory = Memory(path=path, owner={})
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n, memory=memory: memory.keep({str(n): n}), range(200)))
        assert len(memory) == 200
    assert len(Memory(path=tmp_path / "many.jsonl", owner={})) == 200


def test_fingerprints_tell_apart_what_differs():
    assert fingerprint("a", {"x": 1, "y": 2}) == fingerprint("a", {"y": 2, "x": 1})
    assert len({fingerprint("a", "b"), fingerprint("ab"), fingerprint(["a", "b"]), fingerprint("b", "a")}) == 4
