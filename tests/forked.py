# SPDX-License-Identifier: Apache-2.0
"""Processes that begin with NeMo imported: forked from a server that has done it once, 15 to 30 s each otherwise."""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")  # Lightning sets them
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nemo_rba.models.rba_speech_lm", "nemo_rba.algorithms.alignment", "nemo_rba.plan"])


def start(function: Callable, *arguments, log: Path, env: dict[str, str] | None = None) -> BaseProcess:
    """Call a function of a module in a process and a session of its own; what it prints goes to ``log``."""
    log.write_text("")
    process = _CONTEXT.Process(target=_run, args=(function, arguments, str(log), env or {}))
    process.start()
    return process


def start_script(script: Path, *arguments: str, log: Path, env: dict[str, str] | None = None) -> BaseProcess:
    """``python script arguments`` from the root of the repository."""
    return start(run_script, str(script), *arguments, log=log, env=env)


def run_script(script: str, *arguments: str) -> None:
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def by_torchrun(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def by_slurm(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What srun tells a process."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "rba", "SLURM_NTASKS": str(num_ranks), "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": str(num_ranks), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def run_ranks(
    function: Callable, *arguments, num_ranks: int, folder: Path, told: Callable = by_torchrun, timeout: float = 900
) -> None:
    """Call a function in the processes of one job; all end as soon as one has failed, as torchrun and srun do it.

    Args:
        folder: gets what each rank prints, ``rank<i>.log``.
        told: rank, number of ranks, free port -> what the launcher's environment says.

    Raises:
        RuntimeError: a rank has failed, or the time was over; with what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    ranks = [start(function, *arguments, log=log, env=told(i, num_ranks, port)) for i, log in enumerate(logs)]
    deadline = time.monotonic() + timeout
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        kill(rank)
    if any(codes) or None in codes:
        printed = "\n".join(f"rank {i}: {log.read_text()[-3000:]}" for i, log in enumerate(logs))
        raise RuntimeError(f"exit statuses {codes}; None was still running, at most {timeout:.0f} s\n{printed}")


def kill(process: BaseProcess) -> None:
    """End a process, and what it has started, as a machine that is switched off would."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # if it has no session of its own yet
    process.join()


def _run(function: Callable, arguments: tuple, log: str, env: dict[str, str]) -> None:
    os.setsid()
    gc.freeze()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(env)
    function(*arguments)
