# SPDX-License-Identifier: Apache-2.0
"""Which answers, advantage, loss and reward go together: what cannot is refused before anything is built."""

from nemo_rba.algorithms.advantage import NoAdvantage
from nemo_rba.algorithms.gkd import GKDRollouts
from nemo_rba.algorithms.importance import Importance
from nemo_rba.algorithms.kl_reward import check_priced, is_priced
from nemo_rba.algorithms.loss_terms import PolicyGradientLoss
from nemo_rba.algorithms.objectives import DistillationLoss
from nemo_rba.algorithms.policy_losses import ReinforceLoss
from nemo_rba.algorithms.representation import RepresentationLoss, RepresentationReward
from nemo_rba.algorithms.rollout import FreshTeacherRollouts, MixedRollouts, TeacherRollouts
from nemo_rba.protocols import AdvantageEstimator, Objective, RolloutSource

Representation = RepresentationReward | RepresentationLoss


def check_choices(
    source: RolloutSource, advantage: AdvantageEstimator, objective: Objective, importance: Importance | None = None,
    representation: Representation | None = None,
) -> None:  # fmt: skip
    """Refuse at setup what could only fail, or silently learn nothing, at the first batch.

    Raises:
        ValueError: the advantage or the loss compares more answers to a prompt than the source gives, or the advantage
            asks for greedy answers of a source that samples none, or the loss has no place for importance weights,
            for a reward, for answers of the teacher or for the student's own, or nothing is left to learn from.
    """
    if isinstance(source, GKDRollouts):
        source.check(objective)
    if importance is not None and not (isinstance(objective, PolicyGradientLoss) and source.on_policy):
        raise ValueError(
            f"{type(importance).__name__} weighs the tokens of a policy gradient on own answers, but the loss is "
            f"{type(objective).__name__} on {type(source).__name__}; leave importance out"
        )
    if isinstance(representation, RepresentationReward):
        representation.check(source, advantage, objective)
    if isinstance(objective, DistillationLoss) and (source.on_policy or isinstance(source, MixedRollouts)):
        raise ValueError(
            f"DistillationLoss makes answers likelier whatever they say, and {type(source).__name__} has the student's "
            "own: nothing but noise would be learned from these; set rollouts=teacher or rollouts=fresh_teacher, or "
            "another objective"
        )
    if objective.needs_advantages:
        _check_comparison(source, advantage, objective)
        _check_signal(source, advantage, objective, representation)
        if is_priced(objective):
            check_priced(source, advantage, objective)


def check_passes(objective: Objective, ppo_epochs: int) -> None:
    """Refuse, with a ``ValueError``, to learn again from answers that the loss takes for the policy's own by now."""
    if ppo_epochs < 1:
        raise ValueError(f"ppo_epochs is {ppo_epochs}; expected 1 or more passes over a batch of answers")
    if ppo_epochs > 1 and isinstance(objective, ReinforceLoss):
        raise ValueError(
            f"ReinforceLoss has no ratio to the policy that answered, but ppo_epochs is {ppo_epochs}: set it to 1, or "
            "choose objective=rba or another loss with a ratio"
        )


def _is_judged(objective: Objective) -> bool:
    """Whether it learns from the teacher's opinion of tokens, the sampled ones or its likeliest."""
    return objective.needs_teacher or objective.teacher_topk > 0


def _check_comparison(source: RolloutSource, advantage: AdvantageEstimator, objective: Objective) -> None:
    """There are as many answers to a prompt, and of those kinds, as advantage and loss compare."""
    for choice in (advantage, objective):
        least = getattr(choice, "min_group_size", 1)
        taught = getattr(source, "num_taught", 0) if getattr(choice, "needs_own", False) else 0
        if source.group_size - taught < least:
            others = "choose another objective"
            if choice is advantage:
                others = "set advantage=greedy_baseline" + (", or none" if _is_judged(objective) else "")
            size = f"{source.group_size}{f', {taught} of them taught' if taught else ''}"
            raise ValueError(
                f"{type(choice).__name__} compares {least} or more answers to the same prompt, but "
                f"rollouts.group_size is {size}; raise it, or {others}"
            )
    if getattr(advantage, "needs_greedy", False) and not source.on_policy:
        raise ValueError(
            f"{type(advantage).__name__} compares with the student's greedy answer, but {type(source).__name__} lets "
            "it write none; set rollouts=policy, or another advantage"
        )


def _check_signal(
    source: RolloutSource, advantage: AdvantageEstimator, objective: Objective, representation: Representation | None
) -> None:  # fmt: skip
    """There is a signal: a reward, the teacher's judgement or hidden states; and, for a policy, answers of its own."""
    judged = _is_judged(objective) or isinstance(representation, RepresentationLoss)
    if isinstance(advantage, NoAdvantage) and not judged:
        raise ValueError(
            f"NoAdvantage takes no reward, and {type(objective).__name__} learns from nothing else; choose another "
            "advantage, or set objective.dense_weight above 0 where there is one"
        )
    if isinstance(objective, PolicyGradientLoss) and isinstance(source, TeacherRollouts | FreshTeacherRollouts):
        raise ValueError(
            f"{type(objective).__name__} is a policy gradient, and {type(source).__name__} has none of its answers; "
            "set rollouts=policy, or rollouts=mixed for a teacher's answer in each group; or objective=distillation, "
            "forward_kl or jsd"
        )
