# SPDX-License-Identifier: Apache-2.0
"""Peak memory: each system alone in its own process, the same weights, counted from where loading has ended.

python -m bench.memory nemo checkpoint_folder '{"prompts": 8, "group": 8, "tokens": 32, "seconds": 20}'
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from nemo.collections.speechlm2.models import SALM

from bench.resident import highest_resident
from bench.systems import Load, answer_nemo, answer_ours, load_ours, noise_clips
from bench.training import updates

SYSTEMS = {
    "ours": "ours, answers",
    "nemo": "NeMo, answers",
    "grouped": "update, prompt once a group",
    "plain": "update, plain",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """MB of resident memory: after loading, and the highest afterwards."""

    system: str
    load: Load
    loaded: float
    peak: float


def measure_alone(system: str, folder: Path, load: Load) -> Peak:
    """``measure`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", system, str(folder), json.dumps(asdict(load))],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},  # what is freed is given back
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"bench.memory {system} failed:\n{done.stderr[-2000:]}")
    loaded, peak = json.loads(done.stdout.strip().splitlines()[-1])
    return Peak(system=system, load=load, loaded=loaded, peak=peak)


def measure(system: str, folder: Path, load: Load) -> tuple[float, float]:
    """MB resident after loading, and the highest while the system works."""
    return highest_resident(_work(system, folder, load))


def _work(system: str, folder: Path, load: Load) -> Callable[[], object]:
    if system == "nemo":
        salm = SALM.from_pretrained(str(folder)).eval()
        batch = noise_clips(load_ours(folder), load.prompts, load.seconds)
        return lambda: answer_nemo(salm, batch, load)
    if system == "ours":
        model = load_ours(folder)
        batch = noise_clips(model, load.prompts, load.seconds)
        return lambda: answer_ours(model, batch, load)
    return updates(folder, load)[1][system]


def peak_rows(found: Sequence[Peak]) -> list[dict[str, str]]:
    """Table 5."""
    return [
        {
            "system": SYSTEMS[one.system],
            "audio": f"{one.load.seconds:g} s",
            "after loading, MB": f"{one.loaded:.0f}",
            "peak, MB": f"{one.peak:.0f}",
            "peak - loaded, MB": f"**{one.peak - one.loaded:.0f}**",
        }
        for one in found
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Load(**json.loads(sys.argv[3])))))
