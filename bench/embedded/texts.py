"""Seeded text from grammars, and text that the Python standard library ships. Knows nothing of tokens.

Every generator takes a `random.Random` and returns one document, so a seed names a text for good.
"""

# ruff: noqa: SIM905 - word lists are easier to read and to extend as prose

import ast
import functools
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina "
    "Victor Alice Bruno Cora Dylan Elena Frank Hanna Ivan Julia Karl Lena Max Nina Oscar Petra Quinn Ruth "
    "Simon Tara Uma"
).split()
ANIMALS = (
    "cat dog fox owl bear horse rabbit mouse duck goat sheep crow wolf deer frog swan tiger lion otter falcon"
).split()
THINGS = (
    "lamp key book map rope coin ring drum kite boat clock mirror basket bottle hammer ladder candle "
    "blanket whistle apple bread cheese letter box wheel flute needle marble button pencil bucket saddle "
    "feather anchor helmet compass lantern scarf violin carpet kettle spoon bell brush chair table paper "
    "stone shell"
).split()
PLACES = (
    "garden forest river village market harbor castle school kitchen library mountain valley bridge "
    "island meadow station tower farm beach cave museum bakery mill temple field lake desert theater "
    "square cellar"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Oslo Lisbon Athens Cairo Delhi Tokyo Lima Quito Havana "
    "Boston Denver Dublin Warsaw"
).split()
JOBS = (
    "baker teacher doctor farmer painter sailor singer miller tailor pilot guard writer gardener "
    "carpenter nurse fisher cook judge smith clerk"
).split()
COLORS = "red blue green yellow black white brown gray orange purple pink silver golden".split()
MOODS = "happy sad tired angry proud calm afraid curious hungry lonely brave quiet".split()
SIZES = "small big old new heavy light round broken shiny strange simple little".split()
WEATHER = "sunny rainy windy cloudy snowy stormy foggy cold warm".split()
TIMES = (
    "One morning|One evening|Last summer|In the winter|Long ago|Yesterday|On Sunday|After dinner|At midnight|"
    "Before dawn|On a quiet day|Early in spring"
).split("|")

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "The wind moves the tall trees.",
    "Rain falls on the roof at night.",
    "The road goes on and on.",
    "Birds sing in the early morning.",
    "The river runs down to the sea.",
    "Snow covers the hills in winter.",
    "The clock on the wall ticks slowly.",
    "Leaves turn brown in the fall.",
    "The moon is bright tonight.",
    "Bread is baked every morning.",
    "The train leaves from the old station.",
    "Boats wait in the quiet harbor.",
    "Children play in the square.",
    "Stars fill the sky above the hills.",
    "The market opens early.",
)


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def noise_sentence(rng: random.Random) -> str:
    return rng.choice(NOISE)


def story_sentence(rng: random.Random) -> str:
    """A sentence that could stand in any story: the haystack of the retrieval tasks."""
    name, other = rng.sample(NAMES, 2)
    thing, second = rng.sample(THINGS, 2)
    place, animal, job = rng.choice(PLACES), rng.choice(ANIMALS), rng.choice(JOBS)
    color, size, mood = rng.choice(COLORS), rng.choice(SIZES), rng.choice(MOODS)
    return rng.choice(
        (
            f"{name} walked to the {place} with {article(color)} {thing}.",
            f"{name} gave the {thing} to {other} near the {place}.",
            f"The {animal} slept under the {size} {thing}.",
            f"{name} felt {mood} and sat down by the {place}.",
            f"The {job} bought {article(size)} {thing} and {article(color)} {second}.",
            f"{other} asked the {job} about the {thing}.",
            f"It was {rng.choice(WEATHER)}, so {name} stayed in the {place}.",
            f"{article(size).capitalize()} {animal} ran across the {place}.",
            f"{name} and {other} looked for the {color} {thing} in the {place}.",
            f"The {thing} in the {place} was {size} and {color}.",
            f"Nobody in the {place} had seen such {article(size)} {animal}.",
            f"{name} put the {thing} next to the {second}.",
        )
    )


def story(rng: random.Random) -> str:
    """A short story whose later sentences depend on its earlier ones."""
    hero, friend = rng.sample(NAMES, 2)
    thing, gift = rng.sample(THINGS, 2)
    place, hiding = rng.sample(PLACES, 2)
    color, size, animal, job = rng.choice(COLORS), rng.choice(SIZES), rng.choice(ANIMALS), rng.choice(JOBS)
    start, end = rng.choice(MOODS), rng.choice(("happy", "proud", "calm", "brave"))
    opening = rng.choice(
        (
            f"{rng.choice(TIMES)}, {hero} went to the {place} with {friend}.",
            f"Once upon a time there was {article(job)} named {hero} who lived near the {place}.",
            f"{hero} had {article(color)} {thing} and loved it very much.",
        )
    )
    problem = rng.choice(
        (
            f"{hero} could not find the {color} {thing} and felt {start}.",
            f"A {rng.choice(WEATHER)} day came, and the {color} {thing} was lost in the {hiding}.",
            f"{article(size).capitalize()} {animal} took the {color} {thing} and ran to the {hiding}.",
        )
    )
    helping = rng.choice(
        (
            f'"Do not worry," said {friend}. "We will look in the {hiding}."',
            f"{friend} heard about it and came to help {hero}.",
            f'"I saw {article(animal)} near the {hiding}," said {friend}.',
        )
    )
    search = rng.choice(
        (
            f"They walked to the {hiding} and looked behind every stone.",
            f"Together {hero} and {friend} went to the {hiding}.",
            f"In the {hiding} they met {article(size)} {animal}.",
        )
    )
    found = rng.choice(
        (
            f"There, next to {article(gift)}, was the {color} {thing}.",
            f"The {animal} gave the {color} {thing} back to {hero}.",
            f"{friend} found the {color} {thing} under {article(gift)}.",
        )
    )
    ending = rng.choice(
        (
            f"{hero} was {end} and gave {friend} the {gift}.",
            f'"Thank you, {friend}," said {hero}, and they went home together.',
            f"From that day on {hero} and {friend} were the best of friends.",
        )
    )
    return " ".join((opening, problem, helping, search, found, ending))


# One world of facts, the same for every seed: what the model can learn by heart.
_WORLD = random.Random("world")
CITY_FACTS = {
    city: (_WORLD.choice(COLORS), _WORLD.choice(PLACES), _WORLD.choice(THINGS), _WORLD.choice(WEATHER))
    for city in CITIES
}
ANIMAL_FACTS = {
    animal: (_WORLD.choice(COLORS), _WORLD.choice(PLACES), _WORLD.choice(SIZES)) for animal in ANIMALS
}


def facts(rng: random.Random) -> str:
    """A paragraph on one city or one animal of the fixed world."""
    if rng.random() < 0.5:
        city = rng.choice(CITIES)
        color, place, thing, weather = CITY_FACTS[city]
        sentences = [
            f"The city of {city} is known for its {place}.",
            f"The flag of {city} is {color}.",
            f"People in {city} like to carry {article(thing)}.",
            f"The weather in {city} is mostly {weather}.",
        ]
    else:
        animal = rng.choice(ANIMALS)
        color, place, size = ANIMAL_FACTS[animal]
        sentences = [
            f"The {animal} is {article(size)} animal.",
            f"The {animal} lives near the {place}.",
            f"Most often the {animal} is {color}.",
        ]
    rng.shuffle(sentences)
    return " ".join(sentences)


Turn = tuple[str, str]  # role, content


def chat(rng: random.Random) -> list[Turn]:
    """A conversation of one to three questions, with or without a system turn."""
    turns: list[Turn] = []
    if rng.random() < 0.4:
        turns.append(
            ("system", rng.choice(("You are a helpful assistant.", "Answer in one short sentence.")))
        )
    for _ in range(rng.choice((1, 1, 2, 3))):
        turns.extend(_exchange(rng))
    return turns


def _exchange(rng: random.Random) -> list[Turn]:
    question, answer = rng.choice(_EXCHANGES)(rng)
    return [("user", question), ("assistant", answer)]


def _hello(rng: random.Random) -> tuple[str, str]:
    return rng.choice(
        (
            ("Hello!", "Hello! How can I help you today?"),
            ("Hi", "Hello! How can I help you today?"),
            ("Good morning!", "Good morning! What can I do for you?"),
            ("How are you?", "I am fine, thank you. How can I help you?"),
            ("Thank you!", "You are welcome."),
            ("Thanks", "You are welcome."),
            ("Who are you?", "I am the small demo model of HybridGen."),
            ("What is your name?", "I am the small demo model of HybridGen."),
            (
                "What can you do?",
                "I can tell short stories, answer simple questions and find facts in a long text.",
            ),
            ("Goodbye", "Goodbye! Have a nice day."),
        )
    )


def _ask_story(rng: random.Random) -> tuple[str, str]:
    request = (
        "Tell me a story.",
        "Write a short story.",
        "Tell me a short story, please.",
        "Please write a story.",
    )
    return rng.choice(request), story(rng)


def _ask_world(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.6:
        city = rng.choice(CITIES)
        color, place, thing, weather = CITY_FACTS[city]
        return rng.choice(
            (
                (f"What is {city} known for?", f"The city of {city} is known for its {place}."),
                (f"What color is the flag of {city}?", f"The flag of {city} is {color}."),
                (f"What do people in {city} carry?", f"People in {city} like to carry {article(thing)}."),
                (f"How is the weather in {city}?", f"The weather in {city} is mostly {weather}."),
                (f"Tell me about {city}.", facts_of_city(city)),
            )
        )
    animal = rng.choice(ANIMALS)
    color, place, size = ANIMAL_FACTS[animal]
    return rng.choice(
        (
            (f"Where does the {animal} live?", f"The {animal} lives near the {place}."),
            (f"What color is the {animal}?", f"Most often the {animal} is {color}."),
            (f"How big is the {animal}?", f"The {animal} is {article(size)} animal."),
        )
    )


def facts_of_city(city: str) -> str:
    color, place, _, weather = CITY_FACTS[city]
    return (
        f"The city of {city} is known for its {place}. Its flag is {color}. The weather is mostly {weather}."
    )


def _ask_context(rng: random.Random) -> tuple[str, str]:
    """A question whose answer stands in the same turn."""
    people = rng.sample(NAMES, rng.randint(2, 5))
    things, places = rng.sample(THINGS, len(people)), rng.sample(PLACES, len(people))
    i = rng.randrange(len(people))
    if rng.random() < 0.5:
        context = " ".join(f"{name} has the {thing}." for name, thing in zip(people, things, strict=True))
        ask, answer = rng.choice(
            (
                (f"What does {people[i]} have?", f"{people[i]} has the {things[i]}."),
                (f"Who has the {things[i]}?", f"{people[i]} has the {things[i]}."),
            )
        )
    else:
        context = " ".join(f"{name} is in the {place}." for name, place in zip(people, places, strict=True))
        ask, answer = f"Where is {people[i]}?", f"{people[i]} is in the {places[i]}."
    return f"{context} {ask}", answer


def _ask_sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.5:
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    a, b = max(a, b), min(a, b)
    return f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}."


def _ask_next(rng: random.Random) -> tuple[str, str]:
    begin = rng.randint(0, 80)
    count = rng.randint(3, 8)
    numbers = ", ".join(str(n) for n in range(begin, begin + count))
    return f"Count from {begin} to {begin + count - 1}.", f"{numbers}."


def _ask_repeat(rng: random.Random) -> tuple[str, str]:
    text = story_sentence(rng)
    return f"Repeat this: {text}", text


_EXCHANGES = (
    _hello, _ask_story, _ask_story, _ask_world, _ask_world, _ask_context, _ask_context, _ask_context, _ask_sum,
    _ask_sum, _ask_next,
    _ask_repeat,
)  # fmt: skip


def render_chat(turns: list[Turn], *, generation_prompt: bool = False) -> str:
    """What the chat template of the checkpoint makes of these turns."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n" if generation_prompt else text


TOKENIZER_MODULES = tuple(
    (
        "argparse ast asyncio/events base64 bisect calendar cmd codecs collections/__init__ configparser "
        "contextlib copy csv dataclasses datetime decimal difflib dis doctest email/message enum fileinput "
        "fnmatch fractions functools gettext glob gzip hashlib heapq html/parser http/client http/server "
        "imaplib inspect io json/__init__ json/decoder json/encoder keyword linecache locale logging/__init__ "
        "mailbox math numbers operator optparse os pathlib pdb pickle pickletools platform plistlib poplib "
        "pprint profile queue random re/__init__ reprlib sched shelve shlex shutil smtplib socket "
        "socketserver ssl statistics string subprocess tarfile tempfile textwrap this threading timeit "
        "tokenize trace traceback turtle types typing unittest/case unittest/mock urllib/parse urllib/request "
        "uuid warnings wave weakref xml/dom/minidom zipfile/__init__"
    ).split()
)
"""Whose text the tokenizer was made from. More modules here would be another tokenizer, and another model."""

HELD_OUT_MODULES = tuple(
    (
        "asyncio/streams asyncio/tasks bdb codeop concurrent/futures/_base email/header filecmp ftplib getopt "
        "graphlib http/cookies mimetypes netrc pkgutil pyclbr runpy selectors site symtable tabnanny tkinter/ttk "
        "tomllib/_parser urllib/robotparser wsgiref/handlers xmlrpc/client zipapp zoneinfo/_zoneinfo"
    ).split()
)
"""Never trained on. Whole modules, since the docstrings of one stand in the openings of its source as well."""


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one module, outermost first."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


SKIPPED_FOLDERS = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"))
"""No text of the library's own, tests, and tables of code points."""
SETTINGS = "_sysconfigdata"  # opens the name of a table of how this Python was built
TOPICS = "pydoc_data/topics"


@functools.cache
def library_modules() -> tuple[str, ...]:
    """Every pure Python module that trains, by name: the library's, less what is held out."""
    root = library_root()
    paths = (path.relative_to(root).with_suffix("") for path in root.rglob("*.py"))
    kept = (path.as_posix() for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts))
    left_out = (*HELD_OUT_MODULES, TOPICS)
    return tuple(sorted(name for name in kept if name not in left_out and not name.startswith(SETTINGS)))


PIECE = 2000  # characters of source in a document


@functools.cache
def library_documents(modules: tuple[str, ...], source_chars: int | None = 16_000) -> tuple[str, ...]:
    """Docstrings and source of standard library modules, in their order.

    Args:
        modules: names with slashes; those that this version of Python lacks are skipped.
        source_chars: how much of a module's source is taken, from its beginning; None is all of it.
    """
    documents: list[str] = []
    for name in modules:
        path = library_root() / f"{name}.py"
        if not path.exists():
            continue
        documents.extend(docstrings(path))
        source = path.read_text(encoding="utf-8")[:source_chars]
        documents.extend(source[i : i + PIECE] for i in range(0, len(source), PIECE))
    return tuple(documents)


@functools.cache
def training_library() -> tuple[str, ...]:
    """All library text that trains: the modules, and the pages that `help()` shows on the language."""
    documents = library_documents(library_modules(), None)
    topics = library_root() / f"{TOPICS}.py"
    if not topics.exists():
        return documents
    tree = ast.parse(topics.read_text(encoding="utf-8"))
    pages = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    return documents + tuple(
        page[i : i + PIECE] for page in pages.values() for i in range(0, len(page), PIECE)
    )
