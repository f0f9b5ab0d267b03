"""Ranks that watch over each other, in the threads of one process: who is named, and how all end."""

import contextlib
import json
import socket
import threading
import time

import pytest

from trtllm_cli.errors import INTERNAL, RankError
from trtllm_cli.run import watch
from trtllm_cli.run.communicator import Activity
from trtllm_cli.run.watch import Failure, Hub, Spoke

TIMEOUT = 0.6  # seconds that a rank may be silent
SOON = 5.0  # seconds within which anything here is done


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "TICK", 0.01)
    monkeypatch.setattr(watch, "GRACE", 0.1)


class Ends:
    """What a rank's watch prints, and the code that it ends its process with."""

    def __init__(self):
        self.reports, self.code, self.ended, self.at = [], None, threading.Event(), None
        self.watch, self._has_watch = None, threading.Event()

    def of(self, watch):
        self.watch = watch
        self._has_watch.set()
        return watch

    def end(self, code):
        """In the process's place the thread ends."""
        self.code, self.at = code, time.monotonic()
        self.ended.set()
        assert self._has_watch.wait(SOON)
        self.watch._closing.set()

    def told(self):
        """The one report, once it has ended."""
        assert self.ended.wait(SOON)
        [report] = self.reports
        return report


class Peer:
    """Another rank as the hub sees it, that says what a test wants."""

    def __init__(self, hub, rank, stage="decode", waits=True):
        self.socket = socket.create_connection(hub.addresses[0])
        self.state = {"progress": 0, "waits": waits, "stage": stage}
        self.say(token=hub.token, rank=rank)
        self.say(**self.state)
        self._alive = threading.Event()
        self._thread = None

    def say(self, **message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def beat(self):
        """Says that it lives, from now on, and its state."""

        def run():
            with contextlib.suppress(OSError):
                while not self._alive.wait(0.05):
                    self.say(**self.state)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        return self

    def close(self):
        self._alive.set()
        if self._thread is not None:
            self._thread.join()
        self.socket.close()


def close(hub):
    """Closes strangers' connections as well, as the end of the process would."""
    hub._closing.set()
    hub._thread.join()
    for key in list((hub._selector.get_map() or {}).values()):  # None: closed already
        if key.data is not None:
            key.data.close()
    hub.close()


@pytest.fixture
def world():
    """Makes hubs, spokes and peers, and closes them."""
    with contextlib.ExitStack() as stack:

        class World:
            def hub(self, world_size=3, *, idle=True):
                self.activity, self.ends = Activity(), Ends()
                self.activity.idle = idle
                ends = self.ends
                hub = Hub(world_size, self.activity, TIMEOUT, ends.reports.append, ends.end, local=True)
                self.hub = ends.of(hub)
                stack.callback(close, hub)
                return hub

            def peer(self, rank, **kwargs):
                peer = Peer(self.hub, rank, **kwargs)
                stack.callback(peer.close)
                return peer

            def spoke(self, rank, activity=None):
                ends, activity, hub = Ends(), activity or Activity(), self.hub
                spoke = Spoke(rank, hub.addresses, hub.token, activity, TIMEOUT, ends.reports.append, ends.end)
                stack.callback(spoke.close)
                return ends.of(spoke), ends

            def connect(self):
                connection = stack.enter_context(socket.create_connection(self.hub.addresses[0]))
                connection.settimeout(SOON)
                return connection

        yield World()


def wait_until(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stays_well(ends, seconds=1.7 * TIMEOUT):
    return not ends.ended.wait(seconds)


# Rank 0's


def test_ranks_that_work_or_wait_are_left_alone(world):
    world.hub(3)
    worker = Activity()
    _, waiting = world.spoke(1)
    _, working = world.spoke(2, worker)
    deadline = time.monotonic() + 2.5 * TIMEOUT
    with worker.working("decode"):
        while time.monotonic() < deadline:
            time.sleep(0.1)
            worker.progress += 1
    for ends in (world.ends, waiting, working):
        assert ends.reports == []
        assert not ends.ended.is_set()


def test_a_rank_whose_connection_ends_was_killed(world):
    world.hub(3)
    peer, other = world.peer(2, stage="prefill").beat(), world.spoke(1)[1]
    wait_until(lambda: world.hub._ranks[2].stage == "prefill")
    started = time.monotonic()
    peer.close()
    told = world.ends.told()
    assert time.monotonic() - started < TIMEOUT
    assert told == "rank 2: its process ended without a word: it was killed, or crashed (stage: prefill)"
    assert world.ends.code == RankError.exit_code
    assert other.ended.wait(SOON)
    assert (other.code, other.reports) == (RankError.exit_code, [])  # rank 0 has told it


def test_a_rank_that_is_not_heard_of_is_frozen(world):
    world.hub(3)
    world.peer(1).beat()
    world.peer(2)
    assert world.ends.told().startswith("rank 2: not heard of for 1 s: its process is frozen")
    assert "--rank-timeout" in world.ends.reports[0]
    assert world.ends.code == RankError.exit_code


def test_a_rank_that_never_connects_is_not_heard_of(world):
    world.hub(3)
    world.peer(2).beat()
    assert world.ends.told().startswith("rank 1: not heard of")


def test_a_rank_that_gets_nothing_done_hangs(world):
    world.hub(2)
    world.peer(1, waits=False, stage="load").beat()
    assert world.ends.told().startswith("rank 1: it hangs: nothing got done for 1 s (stage: load)")


def test_rank_0_is_watched_as_well(world):
    world.hub(2)
    world.peer(1).beat()
    with world.activity.working("prefill"):
        assert world.ends.told().startswith("rank 0: it hangs: nothing got done for 1 s (stage: prefill)")


def test_kernels_that_run_are_something_that_gets_done(world):
    world.hub(2)
    world.peer(1).beat()
    world.activity.kernels = lambda: int(time.monotonic() * 20)
    with world.activity.working("prefill"):
        assert stays_well(world.ends)


def test_ranks_that_all_wait_for_another_wait_for_ever(world):
    world.hub(2, idle=False)
    world.peer(1, stage="decode").beat()
    told = world.ends.told()
    assert "every rank waits for another since 1 s (rank 0 in start, rank 1 in decode)" in told
    assert world.ends.code == RankError.exit_code


def test_ranks_may_all_wait_while_there_is_nothing_to_do(world):
    world.hub(2, idle=True)
    world.peer(1).beat()
    assert stays_well(world.ends)


def test_a_failure_is_told_in_the_rank_s_words_and_with_its_code(world):
    world.hub(3)
    (failing, _), (_, other) = world.spoke(1), world.spoke(2)
    wait_until(lambda: all(seen.connection for seen in world.hub._ranks[1:]))
    failing.fail(Failure(1, "the disk is full", 6))
    assert world.ends.told() == "rank 1: the disk is full"
    assert world.ends.code == 6
    assert other.ended.wait(SOON)
    assert (other.code, other.reports) == (6, [])


def test_a_rank_that_has_failed_says_no_more_when_rank_0_ends(world):
    world.hub(2)
    spoke, ends = world.spoke(1)
    spoke.fail(Failure(1, "the disk is full", 6))
    world.ends.told()
    world.hub._thread.join()
    world.hub._ranks[1].connection.socket.shutdown(socket.SHUT_RDWR)  # as the end of its process does
    assert ends.ended.wait(SOON)
    assert (ends.code, ends.reports) == (6, [])


def test_the_first_failure_is_named_and_not_what_came_of_it(world):
    world.hub(4)
    first, second = world.peer(3).beat(), world.peer(1).beat()
    world.peer(2).beat()
    wait_until(lambda: all(seen.connection for seen in world.hub._ranks[1:]))
    first.say(failed="no memory", code=6)
    wait_until(lambda: world.hub._failures)
    second.say(failed="rank 3 is gone", code=INTERNAL)
    first.close()
    second.close()
    assert world.ends.told() == "rank 3: no memory"
    assert world.ends.code == 6


def test_a_rank_that_has_failed_may_go(world):
    world.hub(2)
    peer = world.peer(1)
    peer.say(failed="no memory", code=6)
    peer.close()
    assert world.ends.told() == "rank 1: no memory"


@pytest.mark.parametrize("rank_0_first", [True, False])
def test_what_is_wrong_for_every_rank_is_no_rank_s_own(world, rank_0_first):
    hub = world.hub(2)
    peer = world.peer(1).beat()
    if rank_0_first:
        hub.fail(Failure(0, "no such engine", 3))
        peer.say(failed="no such engine", code=3)
    else:
        peer.say(failed="no such engine", code=3)
        wait_until(lambda: hub._failures)
        hub.fail(Failure(0, "no such engine", 3))
    assert world.ends.told() == "no such engine"
    assert world.ends.code == 3


def test_a_rank_is_named_with_its_host_where_there_are_several():
    failure = Failure(1, "no memory", 6)
    assert failure.told(["node1", "node2"]) == "rank 1 on node2: no memory"
    assert failure.told(["node1", "node1"]) == failure.told() == "rank 1: no memory"


def test_a_rank_that_says_good_bye_has_not_failed(world):
    world.hub(2)
    peer = world.peer(1)
    peer.say(bye=True)
    peer.close()
    assert stays_well(world.ends)


def test_rank_0_waits_for_a_word_of_every_rank(world):
    hub = world.hub(3)
    spokes = [world.spoke(rank)[0] for rank in (1, 2)]
    done = threading.Event()
    waiter = threading.Thread(target=lambda: (hub.wait_for("verified"), done.set()))
    waiter.start()
    hub.say("verified")
    spokes[0].say("verified")
    spokes[1].say("something else")
    assert not done.wait(0.3)
    spokes[1].say("verified")
    assert done.wait(SOON)
    waiter.join()


# Strangers


STRANGE = {
    "garbage": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bytes": b"\xff\xfe\x00\n",
    "a wrong token": b'{"token": "0123456789abcdef0123456789abcdef", "rank": 1}\n',
    "no token": b'{"rank": 1, "failed": "all is lost", "code": 1}\n',
    "no text": b'{"token": 5, "rank": 1}\n{"token": ["\\u00e9"]}\n',
    "an accent": '{"token": "\u00e9", "rank": 1}\n'.encode(),
    "no object": b"[]\n",
    "a number": b"1" * 5000 + b"\n",
    "a line without an end": b"x" * (watch._MAX_LINE + (1 << 18)),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_stranger_is_turned_away_and_changes_nothing(world, kind):
    world.hub(2)
    world.peer(1).beat()
    stranger = world.connect()
    with contextlib.suppress(ConnectionError):  # it may be turned away before it has said all
        stranger.sendall(STRANGE[kind])
        assert stranger.recv(100) == b""
    assert stays_well(world.ends, 3 * watch.GRACE)
    assert world.hub._thread.is_alive()


def test_deeply_nested_words_of_a_stranger_do_not_end_the_watch(world):
    world.hub(2)
    stranger = world.connect()
    stranger.sendall(b"[" * 200_000 + b"\n")
    stranger.settimeout(0.5)
    with contextlib.suppress(ConnectionError):
        assert stranger.recv(100) == b""
    assert world.hub._thread.is_alive()


def test_a_stranger_s_silence_is_nobody_s(world):
    world.hub(2)
    world.peer(1).beat()
    world.connect()
    assert stays_well(world.ends)


def test_a_stranger_learns_nothing(world):
    world.hub(2)
    world.peer(1).beat()
    stranger = world.connect()
    stranger.settimeout(0.3)
    with pytest.raises(TimeoutError):
        stranger.recv(100)


def test_ranks_of_one_host_are_watched_over_on_that_host_alone(world):
    hub = world.hub(2)
    assert [host for host, _ in hub.addresses] == ["127.0.0.1"]
    assert hub._listener.getsockname()[0] == "127.0.0.1"
    world.peer(1)


# The others'


def test_rank_0_s_end_is_told_by_the_lowest_other_rank(world):
    """The hub's process is gone: what it had open is closed, and nothing was said."""
    hub = world.hub(3)
    (_, lowest), (_, other) = world.spoke(1), world.spoke(2)
    wait_until(lambda: all(seen.connection for seen in hub._ranks[1:]))
    hub._closing.set()
    hub._thread.join()
    for seen in hub._ranks[1:]:
        seen.connection.socket.shutdown(socket.SHUT_RDWR)
    assert lowest.told() == "rank 0: its process ended without a word: it was killed, or crashed (stage: start)"
    assert lowest.code == RankError.exit_code
    assert other.ended.wait(SOON)
    assert other.code == RankError.exit_code
    assert other.at - lowest.at > watch.GRACE / 2  # time enough for the launcher to end it before it speaks


def test_a_rank_0_that_is_not_heard_of_is_frozen(world):
    hub = world.hub(2)
    _, ends = world.spoke(1)
    wait_until(lambda: hub._ranks[1].connection)
    hub._closing.set()  # its thread no longer runs, its sockets stay
    hub._thread.join()
    assert ends.told().startswith("rank 0: not heard of for 1 s: its process is frozen")
    assert ends.code == RankError.exit_code


def test_nobody_ends_when_all_are_done(world):
    hub = world.hub(2)
    spoke, ends = world.spoke(1)
    wait_until(lambda: hub._ranks[1].connection)
    hub.close()
    spoke.close()
    assert not ends.ended.is_set()
    assert not world.ends.ended.is_set()


def test_a_rank_that_cannot_reach_rank_0_says_where_it_tried():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    ends = Ends()
    with pytest.raises(RankError, match=f"cannot reach rank 0 at 127.0.0.1:{address[1]}") as raised:
        Spoke(1, [address], "token", Activity(), TIMEOUT, ends.reports.append, ends.end)
    assert "TCP" in raised.value.fix


def test_a_rank_tries_each_address_of_rank_0(world):
    hub = world.hub(2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    hub.addresses.insert(0, address)
    world.spoke(1)
    wait_until(lambda: hub._ranks[1].connection)
    hub.addresses.pop(0)


# What a rank says of itself


def test_a_rank_s_activity_is_what_it_was_once_something_is_done():
    activity = Activity()
    with activity.working("prefill"):
        assert (activity.stage, activity.idle, activity.waits) == ("prefill", False, False)
        with activity.waiting():
            assert (activity.stage, activity.idle, activity.waits) == ("prefill", False, True)
        assert (activity.stage, activity.idle, activity.waits) == ("prefill", False, False)
    assert (activity.stage, activity.idle, activity.waits) == ("start", True, True)
    with activity.waiting(idle=True):
        assert (activity.stage, activity.idle, activity.waits) == ("idle", True, True)
    assert activity.done() == 3
