# SPDX-License-Identifier: Apache-2.0
"""Training: an update that computes each prompt once for its answers, and where the time of one RL step goes."""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from random import Random

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from tiny import domain

from bench.systems import TINY, Load, Times, alternate, batch_of, load_ours, noise_clips, num_parameters
from nemo_rba.algorithms.alignment import RBAAlignment
from nemo_rba.algorithms.collate import collate, select_prompts
from nemo_rba.algorithms.controls import Controls
from nemo_rba.algorithms.rollout import PolicyRollouts
from nemo_rba.modules import generation
from nemo_rba.modules.attention import PrefixPlan
from nemo_rba.protocols import LikelihoodTeacher
from nemo_rba.types import Instruction, SpeechBatch

SHARES = {
    "encode": "encode", "prefill": "prefill", "decode": "decode: layers", "sample": "decode: sampling, bookkeeping",
    "score": "reward", "teacher": "teacher judgement", "reference": "start model's log-probs", "update": "update",
    "optimizer": "optimizer",
}  # fmt: skip


def recipe_config() -> DictConfig:
    """The tiny recipe's config, the student answering alone, with paths that work from anywhere."""
    own = ["rollouts=policy", "objective=rba"]
    with initialize_config_dir(str(TINY.parents[1] / "conf"), version_base=None):
        return compose("rba_tiny", [*own, f"model.folder={TINY / 'salm'}", f"teacher.path={TINY / 'teacher'}"])


# ---- the update ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The same rollouts as groups and as separate prompts."""

    llm: str
    load: Load
    grouped: Times
    plain: Times
    difference: float  # largest of the gradients' differences, relative to the largest gradient


def compare_updates(folder: Path, load: Load, *, repeats: int) -> Update:
    """Forward and backward of one microbatch of ``prompts * group`` answers, both ways, without the encoder."""
    model, run = updates(folder, load)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = {}
    for name, update in run.items():
        update()
        gradients[name] = [parameter.main_grad.clone() for parameter in trained]
        for parameter in trained:
            parameter.main_grad.zero_()
    pairs = list(zip(gradients["grouped"], gradients["plain"], strict=True))
    difference = max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)
    return Update(llm=num_parameters(model), load=load, **alternate(run, repeats), difference=float(difference))


def updates(folder: Path, load: Load) -> tuple[torch.nn.Module, dict[str, Callable[[], None]]]:
    """A model and its update on the same rollouts, as groups of a prompt and as prompts with one answer each."""
    cfg = recipe_config()
    model = load_ours(folder)
    policy = instantiate(cfg.policy)(model=model, keep_start=False)
    objective = instantiate(cfg.objective, dense_weight=0.0, kl_coefficient=0.0)
    prompts = noise_clips(model, load.prompts, load.seconds)
    source = PolicyRollouts(group_size=load.group, max_new_tokens=load.tokens, temperature=1.0, top_p=1.0)
    rollouts = source(policy, prompts, seed=0)
    (groups,) = collate(
        prompts, rollouts, torch.linspace(-1, 1, len(rollouts)), policy=policy, objective=objective, teacher=None,
        num_minibatches=1,
    )  # fmt: skip
    plain = dataclasses.replace(
        groups, prompts=select_prompts(prompts, groups.prompt_index), prompt_index=torch.arange(len(groups))
    )
    policy.micro_batch_size = len(groups)
    heard = {id(batch.prompts): model.encode(batch.prompts) for batch in (groups, plain)}
    model.encode = lambda batch: heard[id(batch)]  # frozen: it would run once a batch in either way
    return model, {
        "grouped": lambda: policy.forward_backward(groups, objective),
        "plain": lambda: policy.forward_backward(plain, objective),
    }


def update_rows(found: Sequence[Update]) -> list[dict[str, str]]:
    """Table 3."""
    rows = []
    for one in found:
        ratio, low, high = one.plain.over(one.grouped)
        answers = one.load.prompts * one.load.group
        rows.append(
            {
                "LLM": one.llm,
                "audio": f"{one.load.seconds:g} s",
                "G": str(one.load.group),
                "once a group, ms/answer": one.grouped.per(answers),
                "plain, ms/answer": one.plain.per(answers),
                "plain / once a group": f"**{ratio:.2f}** [{low:.2f}, {high:.2f}]",
                "largest gradient difference, relative": f"{one.difference:.1e}",
            }
        )
    return rows


# ---- one step of RBA -----------------------------------------------------------------------------------------------


class Stopwatch:
    """CPU seconds by label, of functions that it wraps from outside; of nested ones the inner does not count twice."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._inside = [0.0]

    def wrap(self, owner: object, name: str, label: str | Callable[..., str]) -> None:
        """Replace ``owner.name`` by itself with a clock; ``label`` may depend on its arguments."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args, **kwargs):
            begin = time.process_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - begin
                self.seconds[label if isinstance(label, str) else label(*args, **kwargs)] += spent - self._inside.pop()
                self._inside[-1] += spent

        setattr(owner, name, timed)


def step_shares(*, prompts: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each part of one RL step of the tiny recipe: label -> one number a step, ``rest`` included."""
    cfg = recipe_config()
    module, teacher, batch = tiny_alignment(cfg, prompts)
    policy, model = module.policy, module.model
    watch, run = Stopwatch(), generation.run
    watch.wrap(model, "encode", "encode")
    watch.wrap(model, "generate", "sample")
    watch.wrap(generation, "run", lambda gpt, words, plan: "prefill" if isinstance(plan, PrefixPlan) else "decode")
    watch.wrap(module.reward, "score", "score")
    watch.wrap(teacher, "logprobs", "teacher")
    watch.wrap(policy, "logprobs", "reference")
    watch.wrap(policy, "forward_backward", "update")
    watch.wrap(policy, "step", "optimizer")
    found: dict[str, list[float]] = {label: [] for label in (*SHARES, "rest")}
    try:
        for _ in range(repeats + 1):  # the first step warms up
            watch.seconds.clear()
            begin = time.process_time()
            module.align(dataclasses.replace(batch), lambda: policy.step(1e-5))  # a new batch, to be heard anew
            total = time.process_time() - begin
            for label in SHARES:
                found[label].append(watch.seconds[label])
            found["rest"].append(total - sum(watch.seconds.values()))
    finally:
        generation.run = run
    return {label: values[1:] for label, values in found.items()}


def tiny_alignment(cfg: DictConfig, prompts: int) -> tuple[RBAAlignment, LikelihoodTeacher, SpeechBatch]:
    """The recipe's own loop, without Lightning around it, and spoken prompts of its world."""
    teacher = instantiate(cfg.teacher)
    module = RBAAlignment(
        build_model=lambda: instantiate(cfg.model), build_policy=instantiate(cfg.policy),
        source=instantiate(cfg.rollouts), reward=instantiate(cfg.reward), advantage=instantiate(cfg.advantage),
        objective=instantiate(cfg.objective), teacher=teacher,
        controls=Controls(schedule=instantiate(cfg.schedule)), build_loader=None, build_validation_loader=None,
        validation_params=instantiate(cfg.validation),
        num_minibatches=cfg.num_minibatches, ppo_epochs=cfg.ppo_epochs, seed=cfg.seed,
    )  # fmt: skip
    module.configure_model()
    return module, teacher, spoken_requests(cfg, module.model, prompts)


def spoken_requests(cfg: DictConfig, model: torch.nn.Module, count: int) -> SpeechBatch:
    """Requests of the tiny world, in the recipe's training voices."""
    random, voices = Random(0), instantiate(cfg.train_voices)
    items = [domain.sample_split(random, "train") for _ in range(count)]
    clips = voices.synthesize(
        [item.instruction for item in items], [random.choice(voices.speakers) for _ in range(count)]
    )
    instructions = [
        Instruction(id=str(row), text=item.instruction, response=item.reference, task=item.task)
        for row, item in enumerate(items)
    ]
    return batch_of(model, instructions, clips)


def share_rows(found: dict[str, list[float]]) -> list[dict[str, str]]:
    """Table 4: medians over steps; the shares are of their sum."""
    medians = {label: 1000 * statistics.median(values) for label, values in found.items()}
    total = sum(medians.values())
    rows = [
        {"part": SHARES.get(label, label), "ms": f"{value:.0f}", "share": f"{value / total:.1%}"}
        for label, value in medians.items()
    ]
    return [*rows, {"part": "one step", "ms": f"{total:.0f}", "share": f"{sum(medians.values()) / total:.0%}"}]
