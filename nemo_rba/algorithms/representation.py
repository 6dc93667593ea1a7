# SPDX-License-Identifier: Apache-2.0
"""Thinking alike, as a reward or as a loss: hidden states over an answer, the prompt heard, against a reader's.

    r = mean over layers l and tokens t of cos(h_l,t(answer | speech; today's weights), h_l,t(answer | words; start))

After TARS (2601.05543). There, the states of a spoken prompt's answer are compared with those of another answer, a
correct one that today's model gave to the typed prompt, each averaged over its tokens first, and the reward has the
weight of the task's own. Here both passes are over the same answer, so every token has its counterpart and nobody has
to know what is correct; and the reader is the start model, which does not move towards the listener. Whether an answer
is any good is not asked: this is a reward beside others. It differs little between answers, so that an advantage that
divides by the standard deviation makes much of it where all other rewards of a group are equal.

As a loss, weight * (1 - r), it has a gradient of its own, through the student's pass over the speech; the reader's
states are constants. That works on every answer that is learned from, the teacher's too, and beside every loss. There
r is the mean over all tokens of a batch, not first over those of an answer.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from nemo_rba.algorithms.advantage import NoAdvantage
from nemo_rba.algorithms.collate import prompt_index
from nemo_rba.algorithms.rollout import Answers
from nemo_rba.functional import pad_sequences
from nemo_rba.modules.states import chosen_layers
from nemo_rba.protocols import AdvantageEstimator, Metrics, Objective, Policy, PromptEncoder, RolloutSource
from nemo_rba.types import RolloutBatch, SpeechBatch

NAME = "representation"


class RepresentationReward:
    """Agreement of hidden states as one more part of the reward, named ``representation``.

    It is given after the others, to the answers that are learned from: prompts are asked again (``ResampledRollouts``)
    for the others' sake only, and the dev set is scored by the others alone, so that arms can be compared. It costs two
    forward passes a batch.

    Args:
        weight: of this part in the sum; 0 watches it without training on it. ``PerRewardNormalized`` takes its own
            weight in place of this one.
        layers: numbers from 1; [] for all.
    """

    def __init__(self, *, weight: float, layers: Sequence[int]):
        if not math.isfinite(weight):
            raise ValueError(f"weight must be finite, got {weight}: change representation.weight")
        self.weight, self.layers = weight, tuple(layers)

    def check(self, source: RolloutSource, advantage: AdvantageEstimator, objective: Objective) -> None:
        """Refuse at setup what this reward could not change.

        A teacher's answers, alone or among the student's (``MixedRollouts``), could be scored by the same formula, but
        are refused: it would say which text is easy to agree on, not what the student made of the speech.

        Raises:
            ValueError: the loss or the advantage takes no rewards, or not this one, or answers are not the student's.
        """
        if not objective.needs_advantages or isinstance(advantage, NoAdvantage):
            deaf = advantage if objective.needs_advantages else objective
            raise ValueError(
                f"representation is a reward, and {type(deaf).__name__} takes none; choose another objective and "
                "advantage, or set representation=null"
            )
        if not source.on_policy:
            raise ValueError(
                f"representation rewards the student's own answers, but {type(source).__name__} gives others as well; "
                "set rollouts=policy or rollouts=resampled, or representation=null"
            )
        if getattr(advantage, "needs_parts", False) and NAME not in advantage.weights:
            raise ValueError(
                f"{type(advantage).__name__} has weights for {sorted(advantage.weights)}, expected one for {NAME!r} as "
                f"well: give all of them in advantage.weights, e.g. 'advantage.weights={{..., {NAME}: {self.weight}}}'"
            )

    def check_layers(self, num_layers: int) -> None:
        """Refuse, with a ``ValueError``, layers that a model of ``num_layers`` does not have."""
        chosen_layers(self.layers, num_layers)

    def __call__(self, policy: Policy, batch: SpeechBatch, answers: Answers, prompt: PromptEncoder) -> Answers:
        """The answers to ``batch`` with this part in their rewards; ``prompt`` types what was said. Collective.

        Raises:
            ValueError: another reward has this name.
        """
        from nemo_rba.data.prompt import typed_batch  # NeMo's tokenizers: slow to import, and only needed here

        if NAME in answers.parts:
            raise ValueError(f"the reward has a part named {NAME!r} already: rename it in reward.parts")
        heard = _judged(batch, answers)
        read = dataclasses.replace(heard, prompts=typed_batch(batch, prompt))
        agreement = policy.agreement(heard, read, self.layers)
        return dataclasses.replace(
            answers, rewards=answers.rewards + self.weight * agreement, parts=answers.parts | {NAME: agreement}
        )


class RepresentationLoss:
    """Agreement of hidden states as one more term of the loss, on the answers that the objective learns from.

    It costs a forward pass a minibatch, without gradient, and memory for the compared states, see
    ``modules.states.Attraction``. Told as ``loss/representation`` and ``representation/cosine``.

    Args:
        weight: of this term, above 0.
        layers: numbers from 1; [] for all.
    """

    def __init__(self, *, weight: float, layers: Sequence[int]):
        if not 0 < weight < math.inf:
            raise ValueError(
                f"weight must be finite and above 0, got {weight}: change representation.weight, or set "
                "representation=null"
            )
        self.weight, self.layers = weight, tuple(layers)

    def check_layers(self, num_layers: int) -> None:
        """Refuse, with a ``ValueError``, layers that a model of ``num_layers`` does not have."""
        chosen_layers(self.layers, num_layers)

    def __call__(self, policy: Policy, batch: RolloutBatch, objective: Objective, prompt: PromptEncoder) -> Metrics:
        """``policy.forward_backward`` with this term; ``prompt`` types what was said. Collective."""
        from nemo_rba.data.prompt import typed_batch  # see above

        read = typed_batch(batch.prompts, prompt)
        return policy.forward_backward(batch, objective, read=read, layers=self.layers, weight=self.weight)


def _judged(batch: SpeechBatch, answers: Answers) -> RolloutBatch:
    """The answers as a batch to run, not to learn from."""
    response_ids, mask = pad_sequences([rollout.token_ids for rollout in answers.rollouts], pad_value=0)
    return RolloutBatch(
        prompts=batch,
        prompt_index=prompt_index(answers.rollouts),
        response_ids=response_ids,
        response_mask=mask,
        advantages=torch.zeros(len(mask)),
        num_loss_tokens=0,
        num_loss_rollouts=0,
    )
