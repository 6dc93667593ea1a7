# SPDX-License-Identifier: Apache-2.0
"""A signal that ends a job, raised where it is heard.

libsndfile and espeak-ng call back into Python, and what is raised in such a callback is printed and dropped: the job
would go on, with a clip that lacks a piece. So the handler looks where the signal has hit, and waits until it is over.
"""

import signal
from collections.abc import Callable
from types import FrameType

SECONDS_TO_WAIT = 0.01
CALLBACKS = {"soundfile.py": "vio_", "tts.py": "_collect"}  # file -> what its callbacks' names begin with


def raise_on(sig: signal.Signals, error: Callable[[], BaseException]) -> None:
    """Have ``sig`` raise ``error()`` in the main thread, from which this must be called; uses SIGALRM to wait."""

    def stop(_signum: int, frame: FrameType | None) -> None:
        if _in_callback(frame):
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_WAIT)
            return
        raise error()

    signal.signal(sig, stop)


def _in_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        file, name = frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name
        if file in CALLBACKS and name.startswith(CALLBACKS[file]):
            return True
        frame = frame.f_back
    return False
