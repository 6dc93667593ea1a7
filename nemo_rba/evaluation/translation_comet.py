# SPDX-License-Identifier: Apache-2.0
"""COMET (arXiv 2009.09025), a learned measure of translations, beside BLEU, chrF and TER.

It is a mean over items, in percent: 100 x what ``comet``'s own ``predict`` gives. It sees the words of the source, the
answer and the first reference; reference-free checkpoints (COMETKiwi) are reported as "COMET-QE" and see no reference.
Checkpoint and version are in its name, for only numbers of the same two compare (arXiv 2408.15366). That paper also
warns of empty answers, which COMET may score high, unlike BLEU: the number is left as comet gives it.

The package does not work beside NeMo 3, so it scores in another process (``comet_worker.py``), from an environment of
its own; docs/evaluation.md has the commands that make it and fetch a checkpoint. Here nothing is downloaded.
"""

import functools
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from nemo_rba.evaluation import comet_worker
from nemo_rba.evaluation.measures import Statistics
from nemo_rba.evaluation.translation import TranslationTask
from nemo_rba.memory import Memory, fingerprint
from nemo_rba.protocols import Metrics
from nemo_rba.types import Instruction, Rollout, SpeechBatch

HOW_TO_INSTALL = "pip install unbabel-comet==2.2.7 'setuptools<81'"
# Lightning in the other process must not take itself for a rank of this job.
LAUNCHER = (
    "SLURM",
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "NODE_RANK",
    "TORCHELASTIC_",
    "OMPI_",
)
SHOWN = 12  # digits of the checkpoint's digest in the signature


class Comet:
    """Scores of a COMET checkpoint, each paid for once.

    Args:
        python: of the environment that has comet, e.g. "comet/bin/python".
        checkpoint: a .ckpt file as comet publishes it, or the folder of hparams.yaml and ``checkpoints``, where it is.
        device: "cpu", "cuda" for the GPU that this process uses, or e.g. "cuda:1".
        batch_size: samples that are scored at once.
        memory: file that keeps scores by what was scored, or "" for none; it refuses those of another checkpoint or
            version of comet.

    Raises:
        ValueError: a file is missing, or the checkpoint cannot be loaded there.
        ImportError: that Python has no comet.
    """

    def __init__(self, *, python: str, checkpoint: str, device: str, batch_size: int, memory: str):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more: change task.comet.batch_size")
        path = _checkpoint_file(checkpoint)
        self._process = _shared_process(python, str(path), _device(device), batch_size)
        about = self._process.about
        self.takes_reference: bool = about["takes_reference"]
        what, references = ("COMET", 1) if self.takes_reference else ("COMET-QE", 0)
        digest, version = about["sha256"], about["version"]
        self.measure = f"{what}|model:{_model_name(path)}|sha256:{digest[:SHOWN]}|nrefs:{references}|version:{version}"
        self._memory = Memory(path=memory, owner={"comet": version, "sha256": digest})

    def __call__(self, answers: Sequence[tuple[Instruction, str]]) -> list[float]:
        """Score of each answer, around 0 to 1; what is not known yet is asked for at once."""
        samples = [self._sample(instruction, response) for instruction, response in answers]
        keys = [fingerprint(sample) for sample in samples]
        new = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in self._memory}
        if new:
            scores = self._process.scores(list(new.values()))
            for sample, score in zip(new.values(), scores, strict=True):
                if not math.isfinite(score):
                    raise ValueError(f"COMET gave {score} for {sample}, expected a number: check task.comet.checkpoint")
            self._memory.keep(dict(zip(new, scores, strict=True)))
        return [self._memory[key] for key in keys]

    def _sample(self, instruction: Instruction, response: str) -> dict[str, str]:
        sample = {"src": instruction.typed or instruction.text, "mt": response}
        return sample | ({"ref": instruction.response} if self.takes_reference else {})


class CometTranslationTask(TranslationTask):
    """``TranslationTask`` and COMET.

    Args:
        name, batches, target_language, tokenizer, word_order, num_references, kinds: as for ``TranslationTask``.
        comet: scores answers.
        own: by which systems are compared, "bleu", "chrf" or "comet".
    """

    OWN = (*TranslationTask.OWN, "comet")

    def __init__(
        self,
        *,
        name: str,
        batches: Callable[[], Iterable[SpeechBatch]],
        comet: Comet,
        target_language: str,
        tokenizer: str | None,
        word_order: int,
        num_references: int,
        own: str,
        kinds: Mapping[str, str],
    ):
        super().__init__(
            name=name,
            batches=batches,
            target_language=target_language,
            tokenizer=tokenizer,
            word_order=word_order,
            num_references=num_references,
            own=own,
            kinds=kinds,
        )
        self._comet = comet
        self._is_first = own == "comet"

    def prepare(self, answers: Sequence[tuple[Instruction, str]]) -> None:
        """Score many answers at once."""
        self._comet(answers)

    def statistics(self, instruction: Instruction, response: str) -> Statistics:
        others = super().statistics(instruction, response)
        own = {self._comet.measure: [100 * self._comet([(instruction, response)])[0], 1.0]}
        return own | others if self._is_first else others | own

    def score(self, rollouts: Sequence[Rollout]) -> Metrics:
        self.prepare([(rollout.instruction, rollout.response) for rollout in rollouts])
        return super().score(rollouts)


class _Process:
    """comet, loaded and waiting in its own environment; it ends with this process."""

    def __init__(self, python: str, checkpoint: str, device: str, batch_size: int):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - read when the process has ended
        try:
            self._process = subprocess.Popen(
                [python, comet_worker.__file__, checkpoint, device, str(batch_size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment | {"HF_HUB_OFFLINE": "1"},
            )
        except OSError as error:
            raise ValueError(
                f"task.comet.python is {python!r}, which does not start ({error}); expected the Python of an "
                f"environment where '{HOW_TO_INSTALL}' was run"
            ) from error
        self.about = self._reply()
        if "missing" in self.about:
            raise ImportError(
                f"{python} has no working comet ({self.about['missing']}): make an environment for it and run "
                f'"{HOW_TO_INSTALL}" there, then name its Python in task.comet.python'
            )
        if "error" in self.about:
            raise ValueError(
                f"comet in {python} cannot score with {checkpoint}: {self.about['error']}. It needs transformers "
                "below 5, and in the cache of Hugging Face the encoder's configuration and tokenizer, which "
                "comet.load_from_checkpoint fetches once, where there is a connection"
            )

    def scores(self, samples: Sequence[Mapping[str, str]]) -> list[float]:
        with suppress(BrokenPipeError):  # it has ended: the missing reply says so
            self._process.stdin.write(json.dumps(list(samples)) + "\n")
            self._process.stdin.flush()
        reply = self._reply()
        if "error" in reply:
            raise RuntimeError(f"COMET could not score {len(samples)} answers: {reply['error']}")
        return reply["scores"]

    def _reply(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = " ".join(self._log.read().split())[-500:]
            raise RuntimeError(f"COMET's process has ended with {self._process.wait()}; it last said: {last}")
        return json.loads(line)


_shared_process = functools.cache(_Process)  # several sets share one


def _checkpoint_file(checkpoint: str) -> Path:
    path = Path(checkpoint)
    files = [path] if path.is_file() else sorted(path.glob("checkpoints/*.ckpt"))
    if len(files) != 1 or not (files[0].parent.parent / "hparams.yaml").is_file():
        raise ValueError(
            f"task.comet.checkpoint is {checkpoint!r}, where there are {len(files)} checkpoints; expected a .ckpt file "
            "in a folder 'checkpoints' with hparams.yaml beside that folder, or the folder of both: it is what "
            "comet.download_model prints"
        )
    return files[0].absolute()  # links are kept: the cache of Hugging Face has hparams.yaml beside the link


def _model_name(path: Path) -> str:
    """The folder's name; in the cache of Hugging Face the model's, "models--Unbabel--x" -> "Unbabel/x"."""
    published = [part for part in path.parts if part.startswith("models--")]
    return "/".join(published[-1].split("--")[1:]) if published else path.parent.parent.name


def _device(device: str) -> str:
    """ "cpu", or the number of a GPU."""
    where = torch.device(device)
    if where.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(f"task.comet.device is {device!r}, but there is no GPU here; expected cpu")
    return str(torch.cuda.current_device() if where.index is None else where.index)
