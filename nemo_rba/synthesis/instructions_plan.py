# SPDX-License-Identifier: Apache-2.0
"""What all samplers of instructions share: how hot they sample, in which order they go through lists, how they ask.

Everything follows from a seed and from the batch's number, so that any batch can be sampled by itself.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nemo_rba.functional import user_prompt
from nemo_rba.protocols import Teacher
from nemo_rba.synthesis.augment import keyed_rng, keyed_seed
from nemo_rba.types import SamplingParams

Temperature = float | Callable[[int], float]  # the same for all batches, or by the batch's number
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")  # a JSON object in a template has a quotation mark or a blank there
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“"}


class LinearTemperature:
    """From ``start`` at the first batch in equal steps to ``end`` at batch number ``num_batches`` - 1, and on with it.

    Rising, it fills a data set with likely instructions first and then with rarer ones, as the likely ones run out.
    """

    def __init__(self, *, start: float, end: float, num_batches: int):
        if start <= 0 or end <= 0 or num_batches < 2:
            raise ValueError(f"temperature: start={start}, end={end}, num_batches={num_batches}; expected temperatures "
                             "above 0 and at least 2 batches")  # fmt: skip
        self._start, self._end, self._num_batches = start, end, num_batches

    def __call__(self, index: int) -> float:
        """The temperature of batch ``index``."""
        share = min(index / (self._num_batches - 1), 1.0)
        return self._start + (self._end - self._start) * share


class Requests:
    """Batches of prompts for a teacher, each batch with its own seed.

    Args:
        teacher: who writes.
        batch_size: prompts per batch.
        temperature: a number, or one for each batch (``LinearTemperature``).
        top_p, max_new_tokens: how to sample; what does not end in time comes out as "".
        seed: with the batch's number it decides what is written.

    Raises:
        ValueError: a batch size below 1, or greedy decoding, which writes the same over and over.
    """

    def __init__(self, *, teacher: Teacher, batch_size: int, temperature: Temperature, top_p: float,
                 max_new_tokens: int, seed: int):  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"sampler.batch_size is {batch_size}; expected at least 1")
        if not callable(temperature) and temperature <= 0:
            raise ValueError(
                f"sampler.temperature is {temperature}; expected above 0, as greedy sampling writes one instruction "
                "over and over"
            )
        self.batch_size, self.seed = batch_size, seed
        self._teacher, self._temperature = teacher, temperature
        self._params = SamplingParams(max_new_tokens=max_new_tokens, top_p=top_p)

    def numbers(self, index: int) -> range:
        """The numbers of the prompts of batch ``index`` among those of all batches."""
        return range(index * self.batch_size, (index + 1) * self.batch_size)

    def complete(self, rendered: Sequence[str], index: int) -> list[str]:
        """What the teacher writes on after the rendered prompts of batch ``index``."""
        temperature = self._temperature(index) if callable(self._temperature) else self._temperature
        seed = keyed_seed(self.seed, f"instructions/{index}")
        return self._teacher.generate(rendered, replace(self._params, temperature=temperature, seed=seed))

    def ask(self, messages: Sequence[str], index: int) -> list[str]:
        """The teacher's replies to users' messages, as batch ``index``."""
        return self.complete([user_prompt(self._teacher, message) for message in messages], index)


class Deck:
    """A list gone through in shuffled order: every item comes once before any comes again, each time in a new order.

    Args:
        items: what to deal; at least one.
        seed, name: decide the order; decks of different names are shuffled independently.
    """

    def __init__(self, items: Sequence, *, seed: int, name: str):
        self._items, self._seed, self._name = list(items), seed, name
        self._round, self._order = -1, []

    def __getitem__(self, number: int):
        """The ``number``-th item dealt, counted from 0."""
        turn, place = divmod(number, len(self._items))
        if turn != self._round:
            self._round = turn
            self._order = keyed_rng(self._seed, f"{self._name}/{turn}").permutation(len(self._items)).tolist()
        return self._items[self._order[place]]


class Template:
    """A text with ``{names}`` to fill in.

    Args:
        text: the template.
        key: how the config calls it, for messages.
        needs: names that must occur.
        allows: names that may.

    Raises:
        ValueError: an empty text, a name that is missing or unknown.
    """

    def __init__(self, text: str, *, key: str, needs: Sequence[str], allows: Sequence[str] = ()):
        found, known = set(_PLACEHOLDER.findall(text)), {*needs, *allows}
        if not text.strip() or not set(needs) <= found <= known:
            raise ValueError(
                f"sampler.{key} is {text!r}; expected a text with {_braced(needs) or 'words'}"
                + (f", which may also have {_braced(allows)}" if allows else "")
            )
        self._text, self.names = text, found

    def __call__(self, **values: str) -> str:
        """The text with every name replaced; braces inside the values stay as they are."""
        return _PLACEHOLDER.sub(lambda name: str(values[name[1]]), self._text)


def read_items(source: str | Sequence[str], *, key: str) -> list[str]:
    """The lines of a text file, or a list as it is; blank ones and repetitions left out.

    Raises:
        ValueError: no such file, something that is not text, or nothing in it.
    """
    if isinstance(source, str):
        if not Path(source).is_file():
            raise ValueError(f"sampler.{key} is {source!r}, which is no file; give a text file with one item a line, "
                             "or a list")  # fmt: skip
        lines = Path(source).read_text(encoding="utf-8").split("\n")
    else:
        lines = list(source)
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"sampler.{key} holds {next(line for line in lines if not isinstance(line, str))!r}; expected "
                         "texts (put quotation marks around it)")  # fmt: skip
    items = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not items:
        raise ValueError(f"sampler.{key} is empty; expected at least one item (a list, or a text file with one a line)")
    return items


def unquoted(text: str) -> str:
    """A text without the quotation marks that stand around the whole of it."""
    text = text.strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not set(text[1:-1]) & {text[0], text[-1]}:
        return text[1:-1].strip()
    return text


def _braced(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
