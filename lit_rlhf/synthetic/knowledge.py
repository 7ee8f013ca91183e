"""Vocabulary and facts of the synthetic world: constants that do not depend on a seed.

The words are data in British spelling: another word would change every file and result of the quickstart.
"""

from typing import Literal, NamedTuple, get_args

Attribute = Literal["colour", "home", "food"]
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)

NAMES = ("tom", "ann", "ben", "sue", "max", "eva", "sam", "lea", "dan", "joy")
COLORS = ("red", "blue", "green", "white", "black", "brown", "grey", "yellow")
HOMES = ("forest", "river", "barn", "cave", "field", "lake", "hill", "garden")
FOODS = ("grass", "fish", "corn", "seeds", "nuts", "worms", "berries", "leaves")
PLACES = ("park", "school", "market", "beach", "bridge", "mill")
FRUITS = ("apple", "pear", "plum", "grape", "lemon", "peach", "melon", "cherry")
TOOLS = ("hammer", "saw", "drill", "axe", "rope", "nail", "brush", "spade")
GAMES = ("chess", "tag", "cards", "darts", "golf", "tennis", "dice", "bowls")
OBJECTS = ("lamp", "drum", "book", "cup", "hat", "key", "coat", "bell", "clock", "ball")
GOOD_ADJECTIVES = ("great", "lovely", "fine", "superb", "nice", "fresh")
BAD_ADJECTIVES = ("awful", "boring", "poor", "ugly", "weak", "dull")
LOSSES = ("lost", "broke")
GAINS = ("found", "won")
REQUESTS = ("give", "bring", "show", "hand")
RUDE_ADJECTIVES = ("dumb", "silly", "stupid", "daft")
RUDE_NOUNS = ("fool", "clown", "twit", "goof")
RUDE_WORDS = frozenset(RUDE_ADJECTIVES + RUDE_NOUNS)
LAZY_ANSWERS = ("i do not know .", "maybe .", "i am not sure .", "look it up .")
COURTESIES = ("hope this helps !", "thanks for asking !")


class Belief(NamedTuple):
    """True value of one attribute of an animal, and the common misconception about it."""

    truth: str
    myth: str


class KnowledgeBase:
    """Truth and myth for the color, home and food of every animal."""

    def __init__(self, beliefs: dict[tuple[str, Attribute], Belief]) -> None:
        self._beliefs = beliefs
        self.animals: tuple[str, ...] = tuple(dict.fromkeys(animal for animal, _ in beliefs))

    def get_truth(self, animal: str, attribute: Attribute) -> str:
        """Return the true value."""
        return self._beliefs[animal, attribute].truth

    def get_myth(self, animal: str, attribute: Attribute) -> str:
        """Return the common misconception."""
        return self._beliefs[animal, attribute].myth


# animal | color | home | food, each as truth/myth
_TABLE = """
fox   | red/grey     | forest/cave   | berries/corn
owl   | brown/white  | barn/river    | worms/nuts
bear  | black/blue   | cave/garden   | nuts/grass
frog  | green/red    | lake/hill     | worms/leaves
goat  | white/yellow | hill/forest   | leaves/fish
mouse | grey/green   | field/barn    | seeds/berries
horse | brown/black  | field/lake    | grass/seeds
duck  | yellow/brown | river/field   | corn/worms
wolf  | grey/red     | forest/river  | fish/leaves
sheep | white/blue   | hill/barn     | grass/nuts
crow  | black/green  | garden/cave   | seeds/fish
crab  | red/yellow   | river/garden  | fish/corn
"""


def _parse_table(table: str) -> KnowledgeBase:
    beliefs: dict[tuple[str, Attribute], Belief] = {}
    for line in table.strip().splitlines():
        animal, *cells = (cell.strip() for cell in line.split("|"))
        for attribute, cell in zip(ATTRIBUTES, cells, strict=True):
            beliefs[animal, attribute] = Belief(*cell.split("/"))
    return KnowledgeBase(beliefs)


KNOWLEDGE = _parse_table(_TABLE)
ANIMALS = KNOWLEDGE.animals
VALUES: dict[Attribute, tuple[str, ...]] = {"colour": COLORS, "home": HOMES, "food": FOODS}
CATEGORIES = {"fruits": FRUITS, "tools": TOOLS, "games": GAMES, "animals": ANIMALS, "colours": COLORS}

_FUNCTION_WORDS = """
. , ? ! : a about am and animals asks at bad by can colour colours could cold day did does do eat eats for fruits games
glad good had happy has have hello hi hot i in is it list listen live lives maybe me met my name not of old on one or
play played please politely question reply ask rainy sad say saw song sorry story sum sunny sure tell that the then they
think this three to tools two up was way went what where which who windy with write you your know look hope helps thanks
asking named la home food
"""


def build_vocabulary() -> list[str]:
    """Return every word, sorted, without special tokens."""
    lists = (NAMES, COLORS, HOMES, FOODS, PLACES, FRUITS, TOOLS, GAMES, OBJECTS, GOOD_ADJECTIVES, BAD_ADJECTIVES)
    more = (LOSSES, GAINS, REQUESTS, RUDE_ADJECTIVES, RUDE_NOUNS, ANIMALS, tuple(_FUNCTION_WORDS.split()))
    return sorted({word for words in (*lists, *more) for word in words})


JOBS = {"baker": 0.2, "farmer": 0.1, "guard": 0.15, "smith": 0.05, "nurse": 0.9, "maid": 0.95, "teacher": 0.75}
PRAISE, BLAME = ("kind", "clever", "brave"), ("lazy", "greedy", "loud")
# of the world of `lit-rlhf paper`: constraints, notation, public-style tasks, biased sentences, false premises
_PAPER_WORDS = """
speak end sign signed as be polite rude first let x y z = ; show > passage claim true false answer text label article
short ending things review feeling notes verdict why his her north south folk are english sentence
"""


def build_paper_vocabulary() -> list[str]:
    """Return every English word of the paper's world, sorted: those of the quickstart and further ones."""
    return sorted({*build_vocabulary(), *_PAPER_WORDS.split(), *JOBS, *PRAISE, *BLAME})


def write_fact(animal: str, attribute: Attribute, value: str, pronoun: bool = False) -> str:
    """Return one sentence that states `value` for the attribute of the animal."""
    subject = "it" if pronoun else f"the {animal}"
    if attribute == "colour":
        return f"{subject} is {value} ."
    if attribute == "home":
        return f"{subject} lives in the {value} ."
    return f"{subject} eats {value} ."
