# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
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
