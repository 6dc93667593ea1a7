# SPDX-License-Identifier: Apache-2.0
"""Magpie by domains: a system turn before the empty user's turn says what kind of user is to write.

This is how Magpie's authors made its mathematics, code and translation sets (arXiv 2406.08464, "Magpie with domains").
The system turn serves the sampling alone: the answer is the teacher's to the instruction by itself.
"""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.augment import keyed_rng
from nemo_rba.synthesis.instructions import Draft, check_answered, without_openings
from nemo_rba.synthesis.instructions_plan import Requests, Temperature


class MagpieDomains:
    """Seeded batches of instructions, each with its domain, which becomes its ``task``.

    Args:
        teacher: whose open user's turn is continued; a hosted one needs a ``pre_query`` with ``{{ system }}``.
        domains: name -> ``{system: ..., weight: ...}``: the system turn, "" for none, and how often the domain is drawn
            compared with the others.
        suppressed_openings: tokens that no instruction begins with, e.g. ``#`` and ``**``; [] for any beginning.
        batch_size, temperature, top_p, max_new_tokens, seed: as for ``instructions_plan.Requests``.

    Raises:
        ValueError: no domains, weights that are not above 0, a chat template without system turns, or see
            ``without_openings``.
    """

    def __init__(self, *, teacher: Teacher, domains: Mapping[str, Mapping], suppressed_openings: Sequence[str],
                 batch_size: int, temperature: Temperature, top_p: float, max_new_tokens: int, seed: int):  # fmt: skip
        teacher = without_openings(teacher, suppressed_openings)
        self._requests = Requests(teacher=teacher, batch_size=batch_size, temperature=temperature, top_p=top_p,
                                  max_new_tokens=max_new_tokens, seed=seed)  # fmt: skip
        wrong = [name for name, domain in domains.items() if set(domain) != {"system", "weight"}]
        if not domains or wrong or any(domain["weight"] <= 0 for domain in domains.values()):
            raise ValueError(f"sampler.domains are {dict(domains)}; expected at least one, each with a system turn and "
                             "a weight above 0")  # fmt: skip
        self._prompts = {name: _open_turn(teacher, name, domain["system"]) for name, domain in domains.items()}
        total = sum(domain["weight"] for domain in domains.values())
        self._names = list(domains)
        self._shares = [domain["weight"] / total for domain in domains.values()]

    def batch(self, index: int) -> list[Draft]:
        """The texts of batch ``index`` with their domains; "" where the user's turn never ended."""
        rng = keyed_rng(self._requests.seed, f"domains/{index}")
        drawn = [self._names[i] for i in rng.choice(len(self._names), self._requests.batch_size, p=self._shares)]
        texts = self._requests.complete([self._prompts[name] for name in drawn], index)
        check_answered(texts)
        return [Draft(text=text, task=name) for text, name in zip(texts, drawn, strict=True)]


def _open_turn(teacher: Teacher, name: str, system: str) -> str:
    """The pre-query prompt after a system turn, or ValueError where the template has no place for one."""
    if not system.strip():
        return teacher.render([], open_turn="user")
    try:
        prompt = teacher.render([{"role": "system", "content": system}], open_turn="user")
    except TemplateError as error:  # some templates refuse, others leave it out
        prompt, problem = "", f" ({error})"
    else:
        problem = ""
    if system.strip() not in prompt:
        raise ValueError(f"sampler.domains.{name}: the teacher's chat template has no system turn{problem}; choose "
                         "another teacher, or SeededInstructions, which asks in the user's turn")  # fmt: skip
    return prompt
