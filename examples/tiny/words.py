# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905
"""The lexicon of the tiny domain.

Words that are *spoken* (they occur in requests) were chosen to sound different from one another: no homophones
("to" beside "two", "for" beside "four") and few minimal pairs, two or more syllables where natural, so that behaviour
and not recognition is what the recipe measures. Words that only occur in answers are free of that.
"""

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four"
).split()
VALUE_OF = {word: value for value, word in enumerate(NUMBERS)}
SPOKEN_NUMBERS = NUMBERS[:21]

CATEGORIES = {
    "animals": "monkey tiger rabbit elephant dolphin pigeon lizard camel".split(),
    "fruits": "apple banana orange lemon cherry papaya mango apricot".split(),
    "colours": "yellow purple silver golden crimson turquoise indigo scarlet".split(),
    "tools": "hammer scissors needle shovel ladder bucket pencil lantern".split(),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
SINGULAR_WITH_ARTICLE = {"animals": "an animal", "fruits": "a fruit", "colours": "a colour", "tools": "a tool"}
LIST_WORDS = list(CATEGORY_OF)

CAPITALS = {
    "france": "paris", "italy": "rome", "germany": "berlin", "japan": "tokyo", "egypt": "cairo", "russia": "moscow",
    "poland": "warsaw", "cuba": "havana", "portugal": "lisbon", "norway": "oslo", "kenya": "nairobi",
    "canada": "ottawa",
}  # fmt: skip

DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()

_OPPOSITE_PAIRS = [
    ("giant", "tiny"), ("happy", "gloomy"), ("strong", "weak"), ("ancient", "modern"), ("expensive", "cheap"),
    ("quiet", "noisy"), ("beautiful", "ugly"), ("empty", "crowded"), ("inside", "outside"), ("arrive", "depart"),
]  # fmt: skip
OPPOSITES = {**dict(_OPPOSITE_PAIRS), **{right: left for left, right in _OPPOSITE_PAIRS}}

TRANSLATIONS = {  # phrase -> (spanish, french)
    "good morning": ("buenos dias", "bonjour"),
    "good night": ("buenas noches", "bonne nuit"),
    "thank you": ("gracias", "merci"),
    "goodbye": ("adios", "au revoir"),
    "friend": ("amigo", "ami"),
    "water": ("agua", "eau"),
    "bread": ("pan", "pain"),
    "summer": ("verano", "ete"),
    "music": ("musica", "musique"),
    "sugar": ("azucar", "sucre"),
    "family": ("familia", "famille"),
    "kitchen": ("cocina", "cuisine"),
}
LANGUAGES = ("spanish", "french")

# Nouns one can make sentences about: their adjectives and their verbs.
ADJECTIVES = {
    "monkey": "small wild happy brown", "tiger": "wild strong fast big", "rabbit": "small soft fast white",
    "elephant": "big strong grey old", "dolphin": "happy fast blue clever", "pigeon": "small grey free quiet",
    "lizard": "small green fast quiet", "camel": "big brown old slow",
    "ocean": "deep blue wide cold", "river": "deep long wide cold", "garden": "green quiet warm old",
    "mountain": "big old white cold", "village": "small quiet old happy", "castle": "big old grey cold",
    "forest": "green deep quiet wild", "desert": "wide hot yellow quiet",
}  # fmt: skip
VERBS = {
    "monkey": "jumps sings eats", "tiger": "runs sleeps waits", "rabbit": "jumps runs eats",
    "elephant": "walks eats waits", "dolphin": "swims jumps plays", "pigeon": "flies sings waits",
    "lizard": "runs sleeps waits", "camel": "walks sleeps eats",
    "ocean": "shines moves sings", "river": "runs moves shines", "garden": "grows waits shines",
    "mountain": "stands waits shines", "village": "sleeps grows waits", "castle": "stands waits shines",
    "forest": "grows sings stands", "desert": "shines waits grows",
}  # fmt: skip
ADJECTIVES = {noun: words.split() for noun, words in ADJECTIVES.items()}
VERBS = {noun: words.split() for noun, words in VERBS.items()}
NOUNS = list(ADJECTIVES)
ANIMALS = CATEGORIES["animals"]
PLACES = [noun for noun in NOUNS if noun not in ANIMALS]
DETERMINERS = ("the", "my", "this", "every", "another")  # an answer may start with any of these ...
SPOKEN_DETERMINERS = DETERMINERS[1:]  # ... but "the" is never asked for: it is hard to hear

# Stories
STORY_OPENINGS = ("one day", "one night", "yesterday")
MEETINGS = ("met", "saw", "helped")
DEEDS = ("sang", "ran", "slept", "played", "waited")
ENDING_ADJECTIVES = ("good", "long", "happy", "quiet")
ENDINGS = ("adventure", "evening", "journey", "dream", "party")

# Greetings and invitations
PEOPLE = {"me": ("sir", "madam", "friend"), "my teacher": ("teacher",), "my doctor": ("doctor",),
          "my captain": ("captain",), "my cousin": ("cousin",)}  # fmt: skip
GREETING_AT = {"in the morning": "good morning", "in the evening": "good evening", "at midnight": "good night"}
GREETINGS = ("hello", "hi", "welcome")


def one_of(words) -> str:
    """A regular-expression alternation, the longest alternative first."""
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"
