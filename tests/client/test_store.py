"""The encrypted store: atomic, durable, tamper-evident."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whispr.client.failures import StoreCorrupted, StoreInUse, WrongPassphrase
from whispr.client.store import MAGIC, KdfCost, Store

CHEAP = KdfCost(passes=1, memory=64, lanes=1)


def open_store(path: Path, passphrase: str = "open sesame") -> Store:
    return Store.open(path, passphrase, CHEAP)


def header_end(raw: bytes) -> int:
    start = len(MAGIC)
    return start + 4 + int.from_bytes(raw[start : start + 4], "big")


def frames(raw: bytes) -> list[tuple[int, int]]:
    """(start, end) of each frame in a store file."""
    found, at = [], header_end(raw)
    while at < len(raw):
        end = at + 4 + 24 + int.from_bytes(raw[at : at + 4], "big")
        found.append((at, end))
        at = end
    return found


def test_records_survive_reopening_and_secrets_are_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "device.store"
    store = open_store(path)
    with store.transaction():
        store.put("keys", "identity", b"very secret bytes")
        store.put("keys", "gone", b"x")
    with store.transaction():
        store.delete("keys", "gone")
    store.close()
    assert b"very secret" not in path.read_bytes()
    assert b"identity" not in path.read_bytes()
    reopened = open_store(path)
    assert reopened.get("keys", "identity") == b"very secret bytes"
    assert reopened.keys("keys") == ["identity"]
    reopened.close()


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    with store.transaction():
        store.put("a", "1", b"kept")
    with pytest.raises(ZeroDivisionError), store.transaction():  # noqa: PT012
        store.put("a", "1", b"changed")
        store.put("a", "2", b"new")
        assert store.get("a", "1") == b"changed"
        assert store.keys("a") == ["1", "2"]
        raise ZeroDivisionError
    assert store.get("a", "1") == b"kept"
    assert store.keys("a") == ["1"]
    store.close()


def test_a_write_outside_a_transaction_is_a_programming_error() -> None:
    with pytest.raises(RuntimeError):
        Store().put("a", "1", b"x")


def test_the_wrong_passphrase_opens_nothing(tmp_path: Path) -> None:
    open_store(tmp_path / "s").close()
    with pytest.raises(WrongPassphrase):
        open_store(tmp_path / "s", "open barley")


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    with pytest.raises(StoreInUse):
        open_store(tmp_path / "s")
    store.close()
    open_store(tmp_path / "s").close()


def three_frames(path: Path) -> bytes:
    store = open_store(path)
    for number in range(3):
        with store.transaction():
            store.put("n", str(number), b"value %d" % number)
    store.close()
    return path.read_bytes()


def test_a_crash_anywhere_inside_an_append_loses_only_that_transaction(tmp_path: Path) -> None:
    path = tmp_path / "s"
    raw = three_frames(path)
    start, end = frames(raw)[-1]
    for cut in range(start, end):
        path.write_bytes(raw[:cut])
        store = open_store(path)
        assert store.keys("n") == ["0", "1"]
        with store.transaction():
            store.put("n", "after", b"x")
        store.close()
        store = open_store(path)
        assert store.keys("n") == ["0", "1", "after"]
        store.close()


def test_a_power_cut_that_leaves_zeros_for_data_loses_only_that_transaction(tmp_path: Path) -> None:
    path = tmp_path / "s"
    raw = three_frames(path)
    start, end = frames(raw)[-1]
    for keep in (0, 4, 20, end - start - 1):
        path.write_bytes(raw[: start + keep] + bytes(end - start - keep))
        store = open_store(path)
        assert store.keys("n") == ["0", "1"]
        store.close()


def test_changed_swapped_repeated_and_removed_frames_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    raw = three_frames(path)
    cuts = [raw[start:end] for start, end in frames(raw)]
    head = raw[: header_end(raw)]
    flipped = bytearray(cuts[0])
    flipped[-1] ^= 1
    for forged in (
        [bytes(flipped), cuts[1], cuts[2]],
        [cuts[1], cuts[0], cuts[2]],
        [cuts[0], cuts[0], cuts[1]],
        [cuts[1], cuts[2]],
    ):
        path.write_bytes(head + b"".join(forged))
        with pytest.raises(StoreCorrupted):
            open_store(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(StoreCorrupted):
        open_store(path)


def test_a_journal_of_outdated_records_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = open_store(path)
    for number in range(40):
        with store.transaction():
            store.put("big", "same", bytes([number]) * 100_000)
            store.put("small", str(number), b"kept")
    assert path.stat().st_size < 2_000_000
    store.close()
    store = open_store(path)
    assert store.get("big", "same") == bytes([39]) * 100_000
    assert len(store.keys("small")) == 40
    with store.transaction():
        store.put("small", "after", b"x")
    store.close()
    store = open_store(path)
    assert len(store.keys("small")) == 41
    store.close()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_compacting_leaves_nothing_of_what_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = open_store(path)
    with store.transaction():
        store.put("a", "kept", b"x")
        store.put("a", "gone", bytes(5000))
    with store.transaction():
        store.delete("a", "gone")
    assert path.stat().st_size > 5000
    store.compact()
    assert path.stat().st_size < 1000
    with store.transaction():
        store.put("a", "after", b"y")
    store.close()
    store = open_store(path)
    assert store.keys("a") == ["after", "kept"]
    store.close()
    Store().compact()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.none() | st.binary(max_size=9))),
        max_size=8,
    ),
    st.integers(0, 7),
)
def test_a_reopened_store_is_what_a_dictionary_would_be(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[list[tuple[str, str, bytes | None]]],
    reopen_at: int,
) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    model: dict[tuple[str, str], bytes] = {}
    store = open_store(path)
    for number, batch in enumerate(batches):
        with store.transaction():
            for space, key, value in batch:
                if value is None:
                    store.delete(space, key)
                    model.pop((space, key), None)
                else:
                    store.put(space, key, value)
                    model[space, key] = value
        if number == reopen_at:
            store.close()
            store = open_store(path)
    store.close()
    store = open_store(path)
    assert {(s, k): store.get(s, k) for s in "ab" for k in store.keys(s)} == model
    store.close()
