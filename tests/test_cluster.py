# SPDX-License-Identifier: Apache-2.0
"""What runs on a cluster, as far as a machine without SLURM, docker and GPUs can tell: the scripts run here against
stand-ins for the cluster's commands, and what they would start composes."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe_checks
from test_configs import load

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "examples" / "cluster"
SBATCH, NGC, DOCKERFILE = CLUSTER / "rba_align.sbatch", CLUSTER / "ngc_base_command.sh", ROOT / "Dockerfile"
STAND_INS = {
    # the step: leaves its arguments, says what the test wants said, ends when and as the test wants
    "srun": """printf '%s\\n' "$@" > srun.txt
for argument in "$@"; do case $argument in --output=*) log=${argument#--output=};; esac; done
if [[ -n ${WAITS:-} ]]; then while [[ ! -e scancel.txt ]]; do sleep 0.05; done; fi
echo "${SAYS:-}" > "$log"
exit "${STATUS:-0}"
""",
    "scontrol": """case "$1 $2" in
"show hostnames") echo first-node;;
"show job") echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}";;
*) echo "$@" >> scontrol.txt;;
esac""",
    "scancel": """echo "$@" > scancel.txt""",
    "squeue": """date -d "+4 hours" +%Y-%m-%dT%H:%M:%S""",
}


@pytest.fixture
def job(tmp_path):
    """``start(*arguments, **environment)`` of the batch script as SLURM would run it, in ``tmp_path``."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    for name, body in STAND_INS.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (bin_folder / name).chmod(0o755)

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
                 "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "6"}  # fmt: skip
        path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
        return subprocess.Popen(
            ["bash", str(SBATCH), *arguments], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **slurm, "POLL": "0.05", "PATH": path, **environment},
        )  # fmt: skip

    return start


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """(exit status, what it printed)"""
    text, _ = process.communicate(timeout=60)
    return process.returncode, text


def requeued(folder: Path) -> list[str]:
    file = folder / "scontrol.txt"
    return file.read_text().splitlines() if file.exists() else []


def stop_message() -> str:
    """What rba_align says when it stopped for time, from its source."""
    (text,) = re.findall(r'= f"(\{arm\}: stopped [^"]+)"', (ROOT / "examples" / "recipe.py").read_text())
    return re.sub(r"\{[^}]*(arm|step|max_steps)\}", lambda found: "rba" if found[1] == "arm" else "50", text)


def end_message() -> str:
    """What rba_align says last, from its source."""
    (text,) = re.findall(r'logging\.info\(f"(model: .*)"\)', (ROOT / "examples" / "rba_align.py").read_text())
    return text.replace("{files[cfg.arm]}", "a/rba.nemo").replace("{report / 'report.html'}", "a/report/report.html")


# ---- the scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [SBATCH, NGC], ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(script)], check=True)


def test_a_finished_job_ends(job, tmp_path):
    status, text = ended(job(SAYS=end_message()))
    assert status == 0, text
    assert requeued(tmp_path) == []


def test_a_job_stopped_for_time_is_queued_again(job, tmp_path):
    status, text = ended(job(SAYS=stop_message(), STATUS="1"))
    assert status == 0, text
    assert requeued(tmp_path) == ["requeue 7"]


@pytest.mark.parametrize(("status", "expected"), [("1", 1), ("137", 137), ("0", 1)])
def test_an_error_is_not_queued_again(job, tmp_path, status, expected):
    found, text = ended(job(SAYS="CUDA out of memory", STATUS=status))
    assert (found, requeued(tmp_path)) == (expected, []), text
    assert "not queued again" in text


@pytest.mark.parametrize("status", ["1", "143"], ids=["saved in training", "ended in another stage"])
def test_a_job_whose_nodes_were_taken_is_queued_again(job, tmp_path, status):
    found, text = ended(job(SAYS="Received SIGTERM", STATUS=status, PREEMPTED="2099-01-01T08:30:00"))
    assert (found, requeued(tmp_path)) == (0, ["requeue 7"]), text


def test_nodes_taken_from_an_earlier_part_excuse_no_error(job, tmp_path):
    found, text = ended(job(SAYS="CUDA out of memory", STATUS="1", PREEMPTED="2020-01-01T08:30:00"))
    assert (found, requeued(tmp_path)) == (1, []), text


def test_restarts_have_an_end(job, tmp_path):
    status, text = ended(job(SAYS=stop_message(), STATUS="1", SLURM_RESTART_COUNT="30"))
    assert (status, requeued(tmp_path)) == (3, []), text
    assert "30 restarts" in text


@pytest.mark.parametrize("says", ["Received SIGTERM, saving checkpoint and exiting", ""])
def test_the_signal_before_the_limit_stops_the_tasks_and_queues_the_job_once(job, tmp_path, says):
    process = job(WAITS="1", SAYS=says)
    while not (tmp_path / "srun.txt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    status, text = ended(process)
    assert status == 0, text
    assert (tmp_path / "scancel.txt").read_text().split() == ["--signal=TERM", "7"]
    assert requeued(tmp_path) == ["requeue 7"]


def test_too_little_time_is_an_error(job, tmp_path):
    status, text = ended(job(SLURM_JOB_END_TIME=str(int(time.time()) + 60)))
    assert status == 2
    assert "MARGIN" in text
    assert not (tmp_path / "srun.txt").exists()


def test_directives_of_the_batch_script():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", SBATCH.read_text(), flags=re.MULTILINE))
    assert options["signal"].startswith("B:USR1@"), "a signal to the tasks would make Lightning queue the job too"
    assert options["job-name"] not in ("bash", "interactive"), "Lightning takes these for an interactive shell"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == str(load("rba_8b").trainer.devices)
    assert "requeue" in options
    assert "gpus-per-task" not in options
    assert int(options["signal"].partition("@")[2]) < int(re.search(r"MARGIN:-(\d+)", SBATCH.read_text())[1])


# ---- what they start -------------------------------------------------------------------------------------------------


def overrides(words: list[str]) -> tuple[str, list[str]]:
    """(recipe, overrides) of a command line with examples/rba_align.py."""
    position = words.index("examples/rba_align.py")
    assert (ROOT / words[position]).is_file()
    config, *rest = words[position + 1 :]
    return config.removeprefix("--config-name="), rest


def composed(words: list[str]):
    name, rest = overrides(words)
    cfg = load(name, *rest)
    assert recipe_checks.unfit(cfg) == []
    return cfg


@pytest.mark.parametrize(
    "arguments", [[], ["rba_8b_lora", "data.batch_size=8", "~baselines.sft"]], ids=["full", "lora"]
)
@pytest.mark.parametrize("hours", [4, 60])
def test_the_batch_script_starts_a_recipe_that_composes(job, tmp_path, arguments, hours):
    limit = {} if hours == 4 else {"SLURM_JOB_END_TIME": str(int(time.time()) + 3600 * hours)}  # else asks squeue
    ended(job(*arguments, SAYS=end_message(), **limit))
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=6"} <= set(words)
    cfg = composed(words)
    assert cfg.name == (arguments or ["rba_8b"])[0]
    assert (cfg.trainer.num_nodes, cfg.trainer.devices, cfg.num_threads) == (2, 8, 6)
    assert "sft" in cfg.baselines or arguments
    days, hrs, minutes, seconds = map(int, cfg.exp_manager.max_time_per_run.split(":"))
    planned = ((days * 24 + hrs) * 60 + minutes) * 60 + seconds
    assert 0 <= hours * 3600 - 1800 - planned < 30


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_base_command_script_starts_a_recipe_that_composes(nodes):
    printed = subprocess.run(
        [str(NGC), "rba_8b_lora", "seed=2"], env=os.environ | {"DRY_RUN": "1", "NODES": nodes}, check=True, text=True,
        capture_output=True,
    ).stdout  # fmt: skip
    words = shlex.split(printed)
    assert words[:3] == ["ngc", "batch", "run"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert ("--replicas" in options) == (nodes == "2")
    inner = shlex.split(options["--commandline"])
    if nodes == "2":
        assert inner[0] == "bcprun"
        inner = shlex.split(inner[inner.index("--cmd") + 1])
        assert f"--nnodes={nodes}" in inner
    cfg = composed(inner)
    assert (cfg.name, cfg.seed, cfg.trainer.num_nodes) == ("rba_8b_lora", 2, int(nodes))


def test_the_base_command_script_refuses_what_its_quotes_cannot_hold():
    done = subprocess.run([str(NGC), "rba_8b", "name='a b'"], env=os.environ | {"DRY_RUN": "1"}, capture_output=True)
    assert done.returncode == 2


def test_the_commands_of_the_document_compose():
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"```\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if "examples/rba_align.py" in line]
    assert len(commands) >= 3
    for words in commands:
        cfg = composed(words)
        if cfg.model._target_.endswith("restore_from"):
            assert not any("folder" in line for line in recipe_checks.missing(cfg))
    for path in re.findall(r"\b(?:examples|conf|tests|docs)/[\w/.]+\.\w+", text):
        assert (ROOT / path).exists(), path


# ---- the container ---------------------------------------------------------------------------------------------------


def test_the_dockerfile_names_what_is_there():
    text = DOCKERFILE.read_text()
    commands = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert re.findall(r"^FROM \S+ AS (\S+)$", commands, flags=re.MULTILINE) == ["speech", "nemo"]
    assert re.findall(r"=(nvcr\.io/\S+)", commands) == [
        "nvcr.io/nvidia/nemo:26.04",
        "nvcr.io/nvidia/nemo-speech:26.07.00",
    ]
    for path in re.findall(r"\S+\.(?:py|txt)\b", commands):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"--config-name=(\w+)", text):
        assert (ROOT / "conf" / f"{name}.yaml").is_file()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"conf", "examples", "nemo_rba", "setup.py", "constraints.txt", "*.txt"} & set(ignored)
    assert "pip install" not in commands, "container.py installs, and never with dependencies"


@pytest.fixture
def container(monkeypatch):
    monkeypatch.syspath_prepend(str(CLUSTER))
    import container

    return container


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-2.7.3.txt"])
def test_the_container_gets_small_packages_only_and_pinned(container, constraints):
    text = (ROOT / constraints).read_text()
    wanted = container.missing({f"no_such_{name}": package for name, package in container.SMALL.items()}, text)
    assert [line.partition("==")[0] for line in wanted] == list(container.SMALL.values())
    assert not {"torch", "megatron-core", "transformer-engine", "apex", "nemo-toolkit"} & set(container.SMALL.values())
    assert container.missing({"json": "json"}, text) == []
    assert "--no-deps" in container.installer()
    with pytest.raises(ValueError, match="no-such-package"):
        container.pinned("no-such-package", text)


def test_the_container_is_checked_by_imports(container, monkeypatch):
    assert "walk_packages(nemo_rba.__path__" in container.CHECK
    assert all(name in container.CHECK for name in container.SMALL)
    monkeypatch.setattr(container, "CHECK", "import no_such_module")
    with pytest.raises(subprocess.CalledProcessError):
        container.check()


def test_dry_run_of_the_container(capsys, container):
    container.main(["--constraints", "constraints.txt", "--megatron-core", "--dry-run"])
    assert capsys.readouterr().out == "lacking: nothing\n"
    assert sys.modules["container"] is container
