# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a report do not say by themselves: what intervals leave out, and what was cut off."""

from collections import Counter
from collections.abc import Sequence

from nemo_rba.evaluation.results import Condition, Roles
from nemo_rba.evaluation.runner import Prediction

NUM_SEEDS_FOR_A_CLAIM = 3


def _clusters(conditions: Sequence[Condition]) -> list[str]:
    several = [c.name for c in conditions if c.whole.num_clips > c.whole.num_items]
    if not several:
        return []
    return [
        f"{', '.join(several)}: an item is heard in several voices; resamples have all of its clips or none, and the "
        "score is the mean over clips."
    ]


def honest_notes(conditions: Sequence[Condition], roles: Roles, num_draws: int) -> list[str]:
    """What a reader of these very tables has to know."""
    notes = [
        f"Intervals: 95 %, percentile bootstrap over items, {num_draws} draws, paired across systems, of the mean over "
        "seeds. They do not contain the variation between training seeds, which the rings show.",
        *_clusters(conditions),
        "Bold marks the best arm on this very test set, where another one is behind it: a description, no claim.",
    ]
    parts = [part for c in conditions for part in (c.whole, *c.families.values(), *c.voices.values())]
    if any(score.low == score.high for part in parts for score in part.scores.values()):
        notes.append(
            "An interval without width, such as [0.0, 0.0], says that all items came out alike, not that the score is "
            "certain: after n alike, up to 3 / n of all others may be different (95 %)."
        )
    for arm in roles.arms:
        if len(roles.seeds(arm)) < NUM_SEEDS_FOR_A_CLAIM:
            notes.append(
                f"{arm}: {len(roles.seeds(arm))} training seed(s), {NUM_SEEDS_FOR_A_CLAIM} are needed for a claim."
            )
    if any(condition.quantity == "BLEU" for condition in conditions):
        notes.append(
            "BLEU counts runs of four words: it is 0 of a family whose answers are all shorter, right or wrong."
        )
    for condition in conditions:
        share = max((closed.undefined for closed in condition.whole.gap_closed.values()), default=0.0)
        if share > 0:
            notes.append(
                f"{condition.name}: in {100 * share:.1f} % of the resamples the teacher was not better than the start; "
                "the gap closed is undefined there, and its interval leaves them out."
            )
    return notes


def cut_off_notes(predictions: Sequence[Prediction], roles: Roles) -> list[str]:
    """Answers that were stopped before their end, by condition."""
    notes = []
    for task in dict.fromkeys(p.task for p in predictions):
        mine = [p for p in predictions if p.task == task]
        counts = Counter(roles.systems[p.system] for p in mine if p.truncated)
        asked = Counter(roles.systems[p.system] for p in mine)
        if counts:
            told = ", ".join(f"{label} {number} of {asked[label]}" for label, number in counts.items())
            notes.append(f"{task}: answers that had not ended after max_new_tokens: {told}.")
    return notes
