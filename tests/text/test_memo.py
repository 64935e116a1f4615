from __future__ import annotations

import pickle
import threading

import numpy as np

from bestiary.text.memo import EncodedMemo


def _text(length: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(length, dtype=np.int32), np.zeros(length, dtype=np.int32)


def test_a_text_is_taken_once() -> None:
    memo = EncodedMemo()
    memo.put("a", _text(3))
    found = memo.take("a")
    assert found is not None and found[0].tolist() == [0, 1, 2]
    assert memo.take("a") is None and memo.take("b") is None and not len(memo)


def test_the_memory_is_bounded_in_tokens_and_the_oldest_goes_first() -> None:
    memo = EncodedMemo(max_tokens=10)
    memo.put("huge", _text(11))
    for name in "abcd":
        memo.put(name, _text(4))
    assert [name for name in ("huge", *"abcd") if memo.take(name) is not None] == ["c", "d"]
    for _ in range(50):
        memo.put("a", _text(6))
        memo.put("b", _text(4))
    assert len(memo) == 2


def test_pickles_hold_no_texts() -> None:
    memo = EncodedMemo(max_tokens=7)
    memo.put("a", _text(3))
    again = pickle.loads(pickle.dumps(memo))
    assert (len(again), again.max_tokens) == (0, 7) and len(memo) == 1


def test_a_busy_memory_is_a_miss_not_a_wait() -> None:
    memo = EncodedMemo()
    memo.put("a", _text(3))
    with memo._lock:
        memo.put("b", _text(3))
        assert memo.take("a") is None
    assert memo.take("a") is not None and memo.take("b") is None


def test_threads_share_it_without_losing_count() -> None:
    memo = EncodedMemo(max_tokens=100)

    def work(number: int) -> None:
        for turn in range(300):
            memo.put((number, turn % 7), _text(1 + turn % 9))
            memo.take((turn % 4, turn % 5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [found for key in list(memo._texts) if (found := memo.take(key)) is not None]
    assert memo._num_tokens == 0 and len(memo) == 0 and sum(len(ids) for ids, _ in held) <= 100
