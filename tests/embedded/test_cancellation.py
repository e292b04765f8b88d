"""Giving up, hanging up and taking turns, without any model."""

import socket
import threading
from collections.abc import Callable
from functools import partial

import pytest

from edge_daemon.embedded.cancellation import Cancellation, Cancelled, HangupWatch
from edge_daemon.embedded.turns import Turns
from tests.waiting import wait_until

TIMEOUT_S = 10.0


def in_thread(work: Callable[[], None]) -> threading.Thread:
    """`work`, begun in a thread of its own."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_what_is_waited_for_is_stopped_when_the_request_is_given_up() -> None:
    """Setting a cancellation calls the stop of the block that runs, and the block ends in Cancelled."""
    cancellation, stopped = Cancellation(), threading.Event()

    def work() -> None:
        with cancellation.stopping(stopped.set):
            in_thread(cancellation.set)
            assert stopped.wait(TIMEOUT_S)

    with pytest.raises(Cancelled):
        work()


def test_a_request_given_up_before_does_not_begin() -> None:
    """A block is not entered any more once the request has been given up."""
    cancellation = Cancellation()
    cancellation.set()
    with pytest.raises(Cancelled), cancellation.stopping(lambda: None):
        pytest.fail("entered")


def test_a_client_that_hangs_up_is_noticed_while_nobody_reads() -> None:
    """Closing a connection sets the cancellation of the request that it carries, and only that."""
    watch = HangupWatch()
    ours, client = socket.socketpair()
    other, other_client = socket.socketpair()
    gone = threading.Event()

    def serve() -> None:
        with watch.watching(ours) as leaving, leaving.stopping(gone.set):
            client.close()
            assert gone.wait(TIMEOUT_S)

    with ours, other, other_client, watch.watching(other) as staying:
        with pytest.raises(Cancelled):
            serve()
        staying.check()


def test_turns_are_taken_one_at_a_time_in_the_order_of_arrival() -> None:
    """Whoever asked first goes first, and nobody goes while another does."""
    turns, order = Turns(), list[int]()
    threads = []
    with turns.turn(Cancellation()):
        for number in range(5):
            arrived = len(turns._queue)
            threads.append(in_thread(partial(take, turns, number, order)))
            wait_until(partial(has_arrived, turns, arrived + 1))
        assert order == []
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert order == [0, 1, 2, 3, 4]


def has_arrived(turns: Turns, number: int) -> bool:
    """Whether so many take or wait for a turn."""
    return len(turns._queue) == number


def take(turns: Turns, number: int, order: list[int]) -> None:
    """Wait for a turn and note it."""
    with turns.turn(Cancellation()):
        order.append(number)


def test_waiting_for_a_turn_can_be_given_up() -> None:
    """A client that has gone does not hold its place."""
    turns, cancellation = Turns(), Cancellation()
    with turns.turn(Cancellation()):
        in_thread(cancellation.set)
        with pytest.raises(Cancelled), turns.turn(cancellation):
            pytest.fail("it was not its turn")
    with turns.turn(Cancellation()):
        pass
