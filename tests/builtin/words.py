"""The words of the built-in world: who and what there is, and how each relation is said and asked.

Every word of every list is used for one thing only, so that an option such as `harbor` can only be
a home. In the sentences `{s}` is the subject and `{o}` the object of a fact.
"""

from dataclasses import dataclass

PEOPLE = (
    "Adam Alice Amir Anna Arthur Bella Boris Carla Cedric Chloe Clara Daniel Diana Edgar Elena "
    "Emil Fatima Felix Fiona Frank Gloria Grace Hanna Hector Hugo Ingrid Irene Ivan Jacob Jamal "
    "Julia Karim Kevin Laura Leon Linda Lucas Marcus Maria Mateo Mina Nadia Nina Noah Olga Oliver "
    "Omar Oscar Paula Petra Quentin Rosa Ruben Samuel Sofia Tara Tobias Ursula Victor Yusuf"
)

THINGS = (
    "anchor basket bell bench blanket bottle bowl box broom brush bucket button candle chair chest "
    "clock coin compass crown cup curtain desk dice doll fan fork globe hammer hat helmet jar "
    "kettle key kite knife ladder lamp lantern mask mirror needle pen pillow pipe plate pot purse "
    "ring rope saw shovel spoon statue stool table tent tray vase wheel whistle"
)


@dataclass(frozen=True)
class Relation:
    """One relation of the world: its possible objects, its statements and its questions.

    `statements` hold `{s}` and `{o}`; `questions` hold `{s}` only and are answered by one word.
    """

    name: str
    subjects: tuple[str, ...]
    objects: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _relation(name: str, subjects: str, objects: str, statements: str, questions: str) -> Relation:
    lines = tuple(line.strip() for line in statements.strip().splitlines())
    asked = tuple(line.strip() for line in questions.strip().splitlines())
    return Relation(name, tuple(subjects.split()), tuple(objects.split()), lines, asked)


RELATIONS: tuple[Relation, ...] = (
    _relation(
        "home",
        PEOPLE,
        "harbor valley forest desert jungle castle village oasis swamp prairie canyon lagoon "
        "meadow city tower",
        """{s} lives in the {o}.
        {s} has a house in the {o}.
        The home of {s} is in the {o}.
        In the evening {s} goes back to the {o}.
        To visit {s} you must go to the {o}.""",
        """Where does {s} live?
        Where is the home of {s}?
        Where must you go to visit {s}?""",
    ),
    _relation(
        "job",
        PEOPLE,
        "baker doctor farmer teacher pilot singer painter sailor tailor barber lawyer miner nurse "
        "plumber weaver",
        """{s} works as a {o}.
        {s} is a {o}.
        The job of {s} is that of a {o}.
        {s} has been a {o} for years.
        Everybody knows that {s} is a good {o}.""",
        """What is the job of {s}?
        What does {s} work as?
        What is it that {s} does for a living?""",
    ),
    _relation(
        "food",
        PEOPLE,
        "bread cheese soup rice honey noodles pizza salad beans pancakes apples mushrooms cake "
        "curry olives",
        """{s} likes to eat {o}.
        {s} eats {o} every day.
        The favorite food of {s} is {o}.
        For dinner {s} always wants {o}.
        If you cook for {s}, make some {o}.""",
        """What does {s} like to eat?
        What is the favorite food of {s}?
        What does {s} want for dinner?""",
    ),
    _relation(
        "pet",
        PEOPLE,
        "cat dog horse parrot rabbit goat turtle hamster ferret pony lizard duck pig snake sheep",
        """{s} has a {o}.
        {s} owns a {o}.
        The pet of {s} is a {o}.
        Every morning {s} feeds a {o}.
        {s} often plays outside with a {o}.""",
        """What animal does {s} own?
        What is the pet of {s}?
        Which animal does {s} feed?""",
    ),
    _relation(
        "instrument",
        PEOPLE,
        "piano violin flute drum guitar trumpet harp cello banjo organ tuba clarinet accordion "
        "fiddle oboe",
        """{s} plays the {o}.
        {s} is learning the {o}.
        The instrument of {s} is the {o}.
        On Sunday {s} practices the {o}.
        At the concert {s} was heard on the {o}.""",
        """What instrument does {s} play?
        What is the instrument of {s}?
        What does {s} practice on Sunday?""",
    ),
    _relation(
        "room",
        THINGS,
        "kitchen garage attic cellar bedroom bathroom office hallway pantry garden library "
        "workshop balcony nursery closet",
        """The {s} is kept in the {o}.
        The {s} can be found in the {o}.
        The place of the {s} is the {o}.
        Somebody put the {s} in the {o}.
        If you need the {s}, look in the {o}.""",
        """Where is the {s} kept?
        Where can the {s} be found?
        Where do you look if you need the {s}?""",
    ),
    _relation(
        "color",
        THINGS,
        "red blue green yellow purple pink brown black white gray silver golden crimson turquoise "
        "beige",
        """The {s} is {o}.
        The {s} was painted {o}.
        The color of the {s} is {o}.
        Everybody can see that the {s} is {o}.
        Somebody chose {o} for the {s}.""",
        """What color is the {s}?
        What is the color of the {s}?
        How was the {s} painted?""",
    ),
    _relation(
        "material",
        THINGS,
        "wood steel glass plastic paper leather stone clay cotton rubber copper bamboo wool brass "
        "wax",
        """The {s} is made of {o}.
        The {s} was made from {o}.
        The material of the {s} is {o}.
        You need {o} to make the {s}.
        Touch the {s} and you feel {o}.""",
        """What is the {s} made of?
        What is the material of the {s}?
        What do you need to make the {s}?""",
    ),
)
