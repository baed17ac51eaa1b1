"""Items made ahead: order, bounds, errors, and threads that end."""

import threading
import time

import pytest

from dpo_scale.data.prefetch import Prefetcher
from dpo_scale.errors import StoreError


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "batches ahead"]


def test_items_come_in_order_made_by_another_thread():
    def items():
        for number in range(200):
            yield number, threading.current_thread().name

    with Prefetcher(items(), 3) as ahead:
        assert list(ahead) == [(number, "batches ahead") for number in range(200)]
    assert not workers()


def test_no_more_than_depth_items_wait():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    with Prefetcher(items(), 4) as ahead:
        assert until(lambda: len(made) == 5)  # four wait, one is in the maker's hand
        time.sleep(0.05)
        assert len(made) == 5
        assert next(ahead) == 0
        assert until(lambda: len(made) == 6)
        time.sleep(0.05)
        assert len(made) == 6


def test_an_error_is_raised_as_itself_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise StoreError("gone")

    with Prefetcher(items(), 8) as ahead:
        assert next(ahead) == 1
        assert next(ahead) == 2
        with pytest.raises(StoreError, match="gone") as caught:
            next(ahead)
        assert caught.traceback[-1].name == "items"  # it says where it came from
        with pytest.raises(StopIteration):
            next(ahead)


def test_leaving_early_ends_the_thread_and_closes_the_generator():
    closed = []

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt), Prefetcher(items(), 2) as ahead:
        next(ahead)
        raise KeyboardInterrupt
    assert closed == [True] and not workers()


def test_the_thread_does_not_keep_the_process_from_ending():
    def items():
        while True:
            yield 0

    ahead = Prefetcher(items(), 1)
    assert all(thread.daemon for thread in workers())
    ahead.__exit__(None, None, None)
