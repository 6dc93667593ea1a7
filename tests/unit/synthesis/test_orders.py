# SPDX-License-Identifier: Apache-2.0
import json
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest

from nemo_rba.synthesis import orders as orders_module
from nemo_rba.synthesis.orders import Closed, Orders

FORK = multiprocessing.get_context("fork")  # a new interpreter would import everything again


@pytest.fixture
def foreman(tmp_path):
    orders = Orders(tmp_path / "orders", rank=0, identity="me")
    orders.open()
    yield orders
    orders.close(None)


def another(foreman: Orders, rank: int = 1, identity: str = "me") -> Orders:
    return Orders(foreman._folder, rank=rank, identity=identity)


def write(folder, order):
    """A handler: the number squared, in a file of its own, with who wrote it."""
    text = f"{order['number'] ** 2} {os.getpid()}"
    return partial((folder / f"{order['number']}.txt").write_text, text)


def all_gone(foreman):
    """``done`` for orders whose results are not looked at."""
    return lambda: not list(foreman._folder.glob("s*.json*"))


def results(folder) -> dict[int, int]:
    return {int(path.stem): int(path.read_text().split()[0]) for path in folder.glob("*.txt")}


def test_a_job_of_one_does_everything_itself(foreman, tmp_path):
    for number in range(5):
        foreman.place("square", f"{number}", {"number": number})
    foreman.wait(lambda: len(results(tmp_path)) == 5, {"square": partial(write, tmp_path)})
    assert results(tmp_path) == {number: number**2 for number in range(5)}
    assert [path.name for path in (tmp_path / "orders").iterdir()] == ["open.json"]


def test_every_order_is_taken_once_and_kinds_in_their_order(foreman, tmp_path):
    for number in range(40):
        foreman.place("square", f"{number:02d}", {"number": number})
        foreman.place("sooner", f"{number:02d}", {"number": number + 100})
    done, lock = [], threading.Lock()

    def note(order):
        time.sleep(0.001)
        with lock:
            done.append(order["number"])
        return lambda: None

    helpers = [another(foreman, rank) for rank in (1, 2)]
    assert all(helper.join() for helper in helpers)
    threads = [threading.Thread(target=helper.work, args=({"sooner": note, "square": note},)) for helper in helpers]
    for thread in threads:
        thread.start()
    foreman.wait(all_gone(foreman), {"sooner": note, "square": note})
    assert sorted(done) == [*range(40), *range(100, 140)]
    assert {number >= 100 for number in done[:30]} == {True}
    foreman.close(None)
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_one_that_is_killed_costs_its_order_only(foreman, tmp_path, monkeypatch):
    monkeypatch.setattr(orders_module, "LOST_SECONDS", 0.5)
    for number in range(4):
        foreman.place("square", f"{number}", {"number": number})

    def hang(order):
        if order["number"] == 0:
            (tmp_path / "began").write_text("")
            time.sleep(60)
        return write(tmp_path, order)

    def help_out():
        helper = another(foreman)
        helper.join()
        helper.work({"square": hang})

    child = FORK.Process(target=help_out)
    child.start()
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    foreman.wait(all_gone(foreman), {"square": partial(write, tmp_path)})
    assert results(tmp_path) == {number: number**2 for number in range(4)}


def test_one_that_works_long_is_not_taken_for_lost(foreman, tmp_path, monkeypatch):
    monkeypatch.setattr(orders_module, "LOST_SECONDS", 0.4)
    monkeypatch.setattr(orders_module, "ALIVE_SECONDS", 0.1)
    foreman.place("square", "0", {"number": 3})
    began = threading.Event()

    def slow(order):
        began.set()
        time.sleep(1.2)
        return write(tmp_path, order)

    helper = another(foreman)
    helper.join()
    thread = threading.Thread(target=helper.work, args=({"square": slow},))
    thread.start()
    began.wait()
    foreman.wait(all_gone(foreman), {"square": lambda order: pytest.fail("done twice")})
    assert results(tmp_path) == {3: 9}
    foreman.close(None)
    thread.join()


def test_what_goes_wrong_elsewhere_is_told_with_its_rank(foreman):
    foreman.place("square", "0", {"number": 3})

    def fail(order):
        raise ValueError(f"cannot square {order['number']}")

    helper = another(foreman, rank=7)
    helper.join()
    with pytest.raises(ValueError, match="cannot square 3"):
        helper.work({"square": fail})
    with pytest.raises(ValueError, match=r"rank 7: cannot square 3\nTraceback"):
        foreman.wait(all_gone(foreman), {})


def test_what_goes_wrong_in_the_thread_beside_is_raised_as_it_was(foreman):
    def fail(order):
        raise KeyboardInterrupt

    foreman.place("square", "0", {})
    thread = foreman.work_beside({"square": fail})
    with pytest.raises(KeyboardInterrupt):
        foreman.wait(all_gone(foreman), {})
    thread.join()


def test_one_that_is_called_away_leaves_its_order_to_others(foreman, tmp_path):
    foreman.place("square", "0", {"number": 3})

    def called_away(order):
        raise KeyboardInterrupt

    helper = another(foreman)
    helper.join()
    with pytest.raises(KeyboardInterrupt):
        helper.work({"square": called_away})
    foreman.wait(all_gone(foreman), {"square": partial(write, tmp_path)})
    assert results(tmp_path) == {3: 9}


def test_a_foreman_who_is_killed_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(orders_module, "FOREMAN_LOST_SECONDS", 0.5)
    monkeypatch.setattr(orders_module, "ALIVE_SECONDS", 0.1)
    foreman = FORK.Process(target=lambda: (Orders(tmp_path / "orders", rank=0, identity="me").open(), time.sleep(60)))
    foreman.start()
    helper = Orders(tmp_path / "orders", rank=1, identity="me")
    helper.join()
    threading.Timer(1.0, foreman.kill).start()
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"no sign of life for 0.5 s; start the job again"):
        helper.work({})
    assert time.monotonic() - begin > 1.0, "not while it lived"
    foreman.join()


def test_a_foreman_who_gives_up_says_why(foreman):
    helper = another(foreman)
    helper.join()
    foreman.close(ValueError("the disk is full"))
    with pytest.raises(ValueError, match="the first rank has given up: the disk is full"):
        helper.work({})


def test_results_for_a_foreman_who_began_anew_are_void(foreman, tmp_path):
    foreman.place("square", "0", {"number": 3})
    helper = another(foreman)
    helper.join()

    def begin_anew(order):
        again = Orders(tmp_path / "orders", rank=0, identity="me")
        again.open()
        again.close(None)
        return write(tmp_path, order)

    helper.work({"square": begin_anew})
    assert results(tmp_path) == {}
    assert not helper.join(), "all is done"


def test_an_order_that_is_broken_off_is_not_put_in_place(foreman, tmp_path):
    def broken_off(order):
        raise Closed

    foreman.place("square", "0", {"number": 3})
    foreman.wait(all_gone(foreman), {"square": broken_off})
    assert results(tmp_path) == {}


def test_one_who_still_works_for_a_foreman_that_was_killed_is_no_hindrance(foreman, tmp_path, monkeypatch):
    again = Orders(tmp_path / "orders", rank=0, identity="me")
    late = tmp_path / "orders" / orders_module.SCRATCH / "train.000000.1"
    monkeypatch.setattr(orders_module.shutil, "rmtree", lambda *arguments, **keywords: late.mkdir(parents=True))
    again.open()
    assert late.exists()
    assert another(foreman).join()
    monkeypatch.undo()
    again.close(None)
    assert not late.exists()


def test_other_settings_do_not_work_together(foreman):
    with pytest.raises(ValueError, match="rank 1 was started with other settings than the first rank"):
        another(foreman, identity="you").join()


def test_one_that_comes_early_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(orders_module, "WARN_SECONDS", 0.2)
    warned = []
    monkeypatch.setattr(orders_module.logging, "warning", warned.append)
    helper = Orders(tmp_path / "orders", rank=1, identity="me")
    (tmp_path / "orders").mkdir()  # of a job that failed
    (tmp_path / "orders" / "open.json").write_text(json.dumps({"identity": "me"}))
    (tmp_path / "orders" / "closed.json").write_text(json.dumps({"identity": "me", "problem": "a full disk"}))
    foreman = Orders(tmp_path / "orders", rank=0, identity="me")
    threading.Timer(0.5, foreman.open).start()
    assert helper.join()
    assert "rank 1 waits for the first rank" in warned[0]
