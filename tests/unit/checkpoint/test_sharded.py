# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import sys
open(sys.argv[1], "a").write("imported\\n")
from nemo_rba.checkpoint.sharded import start_writer
from megatron.core.dist_checkpointing.strategies.filesystem_async import _get_write_results_queue
start_writer()
_get_write_results_queue().put("a result")
print(_get_write_results_queue().get(), __file__ == sys.argv[0])
"""


def test_the_writers_process_does_not_import_the_main_module(tmp_path):
    """Without a guard, too: a script of a user may have none."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(script), str(log)], env=os.environ | {"PYTHONPATH": root}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "a result True"
    assert log.read_text() == "imported\n"


KILLED = """
import multiprocessing, os, signal
from nemo_rba.checkpoint.sharded import start_writer
if __name__ == "__main__":
    start_writer()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_writers_process_ends_with_one_that_was_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    root = str(Path(__file__).parents[3])
    # to a file: whoever waits for the end of a pipe waits for the writer as well, and would not see it stay
    with open(tmp_path / "out", "w") as out:
        ended = subprocess.run([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": root}, stdout=out)
    assert ended.returncode == -signal.SIGKILL
    writer = int((tmp_path / "out").read_text().split("\n")[-2])
    until = time.monotonic() + 20
    while _is_alive(writer) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _is_alive(writer)


def _is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()
