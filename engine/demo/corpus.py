"""The synthetic training text of the bundled demo model.

Owns every word the demo model ever sees: a seeded generator of short chats (stories, questions about
stated facts, sums, lists, JSON, tool calls, phrases, emoji, small talk) and of plain stories. The same
seed always gives the same text; combinations are split by hash into a training and a held-out part.
"""

# Word lists read best as one string.
# ruff: noqa: SIM905

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

HERE = Path(__file__).parent
HELD_OUT_SHARE = 16  # one combination in this many is never trained on

# --------------------------------------------------------------------------------------- vocabulary

GIRLS = (
    "Lena Mia Anna Emma Sara Nora Ella Ida Lucy Maya Zoe Ruby Alice Clara Eva Jane Kate Lily Molly Nina "
    "Olga Rosa Tina Vera Mary Amy Julia Laura Maria Sofia Grace Hanna Iris"
).split()
BOYS = (
    "Tom Ben Max Leo Sam Finn Jack Noah Paul Oskar Hugo Adam Bob Carl David Eric Felix George Henry Ivan "
    "John Luke Mark Nick Otto Peter Ralph Simon Tim Victor Will Liam James"
).split()
SYLLABLES = (
    "ba be bo da do du fa fi ga go ka ki ko la le lo lu ma me mi mo na ne ni no pa po ra re ri ro sa se si "
    "so ta te ti to va vi vo wa za ze zu"
).split()
ANIMALS = (
    "fox cat dog rabbit bear mouse owl frog horse duck wolf lion tiger turtle pig hen goat sheep cow bee "
    "dragon robot elephant monkey penguin whale squirrel hedgehog snail crow"
).split()
PEOPLE = "boy girl king queen farmer baker sailor wizard knight princess prince pirate".split()
COLORS = "red blue green yellow black white brown pink purple orange grey golden silver".split()
CITIES = (
    "Oslo Paris London Berlin Rome Madrid Tokyo Beijing Shanghai Vienna Lisbon Athens Cairo Delhi Moscow "
    "Dublin Prague Warsaw Helsinki Stockholm Copenhagen Amsterdam Brussels Zurich Milan Boston Chicago "
    "Toronto Sydney Lima Seoul Munich Hamburg Budapest Nairobi"
).split()
JOBS = (
    "baker teacher doctor farmer pilot nurse painter writer driver cook sailor singer gardener lawyer "
    "engineer dentist plumber carpenter"
).split()
FOODS = "bread soup rice cheese pizza pasta cake fish salad honey eggs pancakes noodles cookies".split()
OBJECTS = "ball hat key book lamp kite boat bike cup box drum ring map coin bell scarf clock basket".split()
PLACES = (
    "forest|village|garden|small house|big castle|valley|quiet farm|old mill|cave|town by the sea|mountain|"
    "green meadow|tall tower|harbour"
).split("|")
ROOMS = "kitchen garden bedroom bathroom garage attic cellar hall office library".split()
TRAITS = "brave kind clever curious shy happy quiet lazy proud small young old funny gentle".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

CATEGORIES: dict[str, str] = {
    "fruits": "apple banana pear orange grape cherry peach plum mango lemon",
    "vegetables": "carrot potato onion tomato cabbage spinach pumpkin pea bean cucumber",
    "animals": "dog cat horse lion bear fox rabbit wolf tiger elephant",
    "colors": "red blue green yellow black white pink purple orange brown",
    "cities": "Paris London Berlin Rome Tokyo Oslo Madrid Vienna Lisbon Cairo",
    "countries": "France Spain Italy Germany Norway Japan China Egypt Canada Brazil",
    "birds": "owl crow duck swan eagle robin sparrow parrot penguin goose",
    "drinks": "water tea coffee milk juice lemonade cocoa cider",
    "sports": "football tennis swimming running cycling skiing hockey basketball",
    "tools": "hammer saw drill wrench pliers screwdriver axe shovel",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "instruments": "piano guitar violin drum flute trumpet harp cello",
    "flowers": "rose tulip daisy lily sunflower violet orchid iris",
    "jobs": "teacher doctor baker farmer pilot nurse painter cook",
    "vehicles": "car bus train bike boat plane truck tram",
    "days of the week": " ".join(DAYS),
    "months": " ".join(MONTHS),
    "programming languages": "Python Java C Rust Go Ruby JavaScript Swift",
}
CATEGORY_ALIASES = {"colours": "colors", "days": "days of the week", "musical instruments": "instruments"}

CAPITALS = {
    "France": "Paris", "England": "London", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Japan": "Tokyo", "China": "Beijing", "Austria": "Vienna", "Portugal": "Lisbon", "Greece": "Athens",
    "Egypt": "Cairo", "India": "Delhi", "Russia": "Moscow", "Ireland": "Dublin", "Poland": "Warsaw",
    "Finland": "Helsinki", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Norway": "Oslo",
    "Peru": "Lima", "Belgium": "Brussels", "Hungary": "Budapest", "Kenya": "Nairobi", "Canada": "Ottawa",
    "Brazil": "Brasilia", "Switzerland": "Bern", "Turkey": "Ankara", "Australia": "Canberra",
    "Mexico": "Mexico City",
}  # fmt: skip
OPPOSITES = (
    "hot cold,big small,fast slow,day night,happy sad,up down,left right,old new,open closed,light dark,"
    "full empty,high low,hard soft,rich poor,wet dry,strong weak,early late,near far,good bad,black white,"
    "loud quiet,long short"
)
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink",
    "lion": "roar", "bee": "buzz", "frog": "ribbit", "owl": "hoot", "mouse": "squeak", "horse": "neigh",
    "crow": "caw",
}  # fmt: skip
THING_COLORS = {
    "sky": "blue", "grass": "green", "snow": "white", "sun": "yellow", "coal": "black", "blood": "red",
    "sea": "blue", "milk": "white", "lemon": "yellow", "chocolate": "brown", "frog": "green",
    "carrot": "orange", "banana": "yellow", "tomato": "red",
}  # fmt: skip
PHRASES = {
    "hello": "你好", "good morning": "早上好", "good night": "晚安", "thank you": "谢谢",
    "goodbye": "再见", "please": "请", "sorry": "对不起", "yes": "是", "no": "不", "I love you": "我爱你",
    "good": "好", "water": "水", "tea": "茶", "rice": "米饭", "cat": "猫", "dog": "狗", "fish": "鱼",
    "bird": "鸟", "horse": "马", "red": "红色", "blue": "蓝色", "green": "绿色", "white": "白色",
    "black": "黑色", "one": "一", "two": "二", "three": "三", "four": "四", "five": "五", "ten": "十",
    "mother": "妈妈", "father": "爸爸", "friend": "朋友", "teacher": "老师", "school": "学校",
    "book": "书", "house": "房子", "sun": "太阳", "moon": "月亮", "mountain": "山", "fire": "火",
    "today": "今天", "tomorrow": "明天", "how are you": "你好吗", "I am happy": "我很高兴",
    "I am hungry": "我饿了", "what is this": "这是什么", "where are you": "你在哪里", "welcome": "欢迎",
    "happy birthday": "生日快乐", "China": "中国", "world": "世界", "hello world": "你好，世界",
    "see you tomorrow": "明天见", "apple": "苹果", "flower": "花", "I like tea": "我喜欢茶",
    "I like cats": "我喜欢猫", "good afternoon": "下午好",
}  # fmt: skip
EMOJI = {
    "happy": "😊", "sad": "😢", "angry": "😠", "love": "❤️", "laughing": "😂", "cool": "😎",
    "tired": "😴", "sun": "☀️", "rain": "🌧️", "snow": "❄️", "fire": "🔥", "star": "⭐", "moon": "🌙",
    "dog": "🐶", "cat": "🐱", "fox": "🦊", "bear": "🐻", "fish": "🐟", "bird": "🐦", "apple": "🍎",
    "banana": "🍌", "pizza": "🍕", "cake": "🎂", "coffee": "☕", "rocket": "🚀", "car": "🚗",
    "house": "🏠", "book": "📖", "music": "🎵", "party": "🎉", "thumbs up": "👍", "thinking": "🤔",
    "robot": "🤖", "tree": "🌳", "flower": "🌸", "heart": "❤️", "wave": "👋", "panda": "🐼",
    "train": "🚆", "ball": "⚽",
}  # fmt: skip
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

SYSTEM_PLAIN = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Be helpful and short.",
    "You answer questions.",
    "Answer the user's question.",
    "You are a helpful assistant. Keep your answers short.",
    "You are an AI assistant.",
    "Be polite.",
]
SYSTEM_ONE_WORD = [
    "Answer with one word.",
    "Answer in one word only.",
    "Reply with a single word.",
    "Give only the answer, without a sentence.",
]


@dataclass
class Example:
    """One document: a chat with its tools, or plain text. `task` groups the evaluation."""

    task: str
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] | None = None
    text: str | None = None


@dataclass
class Part:
    """One exchange that conversations are put together from; `short` is the one-word answer, if any."""

    user: str
    answer: str
    short: str | None = None


class Draw:
    """A random source that knows which split it draws for."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.r = random.Random(seed)
        self.held_out = held_out

    def pick(self, items: Sequence[Any]) -> Any:
        """One item."""
        return items[int(self.r.random() * len(items))]

    def some(self, items: Sequence[Any], n: int) -> list[Any]:
        """`n` different items in random order."""
        return self.r.sample(list(items), n)

    def chance(self, p: float) -> bool:
        """True with probability `p`."""
        return self.r.random() < p

    def num(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.r.randint(low, high)

    def mine(self, *key: object) -> bool:
        """Whether a combination belongs to the split being drawn."""
        held = zlib.crc32("|".join(map(str, key)).encode()) % HELD_OUT_SHARE == 0
        return held == self.held_out

    def until(self, draw: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Draw combinations until one belongs to this split (a tiny closed set may have no held-out one)."""
        for _ in range(1000):
            got = draw()
            if self.mine(*got):
                break
        return got

    def name(self) -> str:
        """A first name; about one in four is made up, so that copying is learnt rather than recall."""
        if self.chance(0.25):
            made = "".join(self.pick(SYLLABLES) for _ in range(self.num(2, 3)))
            return (made + self.pick(["", "", "n", "r", "s", "l"])).capitalize()
        return self.pick(GIRLS if self.chance(0.5) else BOYS)

    def names(self, n: int) -> list[str]:
        """`n` different names."""
        found: list[str] = []
        while len(found) < n:
            name = self.name()
            if name not in found:
                found.append(name)
        return found

    def city(self) -> str:
        """A city; some are made up."""
        if self.chance(0.15):
            made = "".join(self.pick(SYLLABLES) for _ in range(2))
            return (made + self.pick(["ville", "burg", "ton", "dam", "stad"])).capitalize()
        return self.pick(CITIES)


def article(word: str) -> str:
    """The word with its indefinite article."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def join(words: Sequence[str], last: str = "and") -> str:
    """Words as an English enumeration."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" {last} " + words[-1]


def cap(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def styled(d: Draw, prompt: str) -> str:
    """The prompt as different people type it: politeness, case and end marks vary."""
    if d.chance(0.12) and prompt[-1] in "?.!":
        prompt = prompt[:-1]
    if d.chance(0.08):
        prompt = prompt[0].lower() + prompt[1:]
    if d.chance(0.06):
        prompt = d.pick(["Hi! ", "Hello! ", "Hey, ", "Hi, ", "Ok. ", "Now: ", "Next question: "]) + prompt
    elif d.chance(0.04) and prompt[-1] == ".":
        prompt = d.pick(["Please ", "Can you ", "Could you "]) + prompt[0].lower() + prompt[1:]
    return prompt


# ------------------------------------------------------------------------------------------ stories


def story(d: Draw, who: str, name: str, she: str, thing: str | None = None) -> str:
    """A story of six to nine sentences about `who` called `name`."""
    her = {"she": "her", "he": "his", "it": "its"}[she]
    him = {"she": "her", "he": "him", "it": "it"}[she]
    friend_kind = d.pick([a for a in ANIMALS if a != who])
    friend = d.pick([n for n in GIRLS + BOYS if n != name])
    place, trait = d.pick(PLACES), d.pick(TRAITS)
    thing = thing or d.pick(OBJECTS)
    color, food = d.pick(COLORS), d.pick(FOODS)
    out = [
        d.pick(
            [
                f"Once upon a time there was {article(trait)} {who} named {name}.",
                f"Once upon a time, in a {place}, there lived {article(trait)} {who} called {name}.",
                f"There was once {article(trait)} {who} named {name}.",
                f"{name} was {article(trait)} {who} who lived in a {place}.",
            ]
        )
    ]
    if place not in out[0]:
        out.append(d.pick([f"{name} lived in a {place}.", f"{cap(she)} lived in a {place}."]))
    out.append(
        d.pick(
            [
                f"Every morning {name} ate {food} and went for a walk.",
                f"{name} loved {food} very much.",
                f"{cap(her)} best thing was {article(color)} {thing}.",
                f"{name} liked to sing when the sun was up.",
            ]
        )
    )
    plot = d.num(0, 4)
    if plot == 0:
        out += [
            d.pick([f"One day {name} lost {her} {thing}.", f"One day {her} {thing} was gone."]),
            d.pick([f"{cap(she)} looked everywhere, but could not find it.", f"{name} was very sad."]),
            f"Then {name} met {article(friend_kind)} named {friend}.",
            d.pick(
                [
                    f'"Do not worry," said {friend}. "I will help you."',
                    f'"I saw it near the river," said {friend}.',
                ]
            ),
            d.pick(
                [
                    f"Together they found the {thing} under a tree.",
                    f"Soon they found the {thing} behind a big stone.",
                ]
            ),
        ]
    elif plot == 1:
        out += [
            d.pick(["One day it began to rain.", "One night there was a big storm."]),
            f"{name} heard a small voice. It was {article(friend_kind)} named {friend}.",
            d.pick([f'"I am cold and wet," said {friend}.', f'"Please help me," said {friend}.']),
            f"{name} took {friend} home and made hot soup.",
            d.pick([f"{friend} was warm and happy again.", "They sat by the fire and told stories."]),
        ]
    elif plot == 2:
        out += [
            f"One day {name} found {article(color)} {thing} on the road.",
            d.pick([f'"Whose {thing} is this?" asked {name}.', f'"What a nice {thing}!" said {name}.']),
            f"{article(friend_kind).capitalize()} named {friend} came by and looked sad.",
            f'"That is my {thing}," said {friend}.',
            d.pick(
                [
                    f"{name} gave it back with a smile.",
                    f"{name} gave the {thing} to {friend}, and {friend} was glad.",
                ]
            ),
        ]
    elif plot == 3:
        out += [
            d.pick([f"{name} wanted to see the sea.", f"{name} wanted to climb the highest mountain."]),
            d.pick(["The way was long and hard.", "It was a long way to go."]),
            f"On the way {she} met {article(friend_kind)} named {friend}.",
            f'"Come with me," said {name}, and they walked together.',
            d.pick(["At last they were there, and it was beautiful.", "In the evening they got there at last."]),
        ]
    else:
        out += [
            f"One day {name} made a big cake for {her} birthday.",
            f"{article(friend_kind).capitalize()} named {friend} came and brought {article(color)} {thing}.",
            d.pick([f'"This is for you," said {friend}.', f'"Happy birthday!" said {friend}.']),
            f"{name} was so happy that {she} began to dance.",
            d.pick(["They ate the cake and laughed all day.", f"It was the best day for {him}."]),
        ]
    out.append(
        d.pick(
            [
                f"From that day on, {name} and {friend} were best friends.",
                f"And {name} and {friend} lived happily ever after.",
                f"{name} went to bed with a smile. The end.",
                f"{name} never forgot that day.",
            ]
        )
    )
    return " ".join(out)


def hero(d: Draw) -> tuple[str, str, str]:
    """A kind of hero, a name and the pronoun; the pair is checked against the split."""

    def draw() -> tuple[str, str]:
        return d.pick(ANIMALS if d.chance(0.75) else PEOPLE), d.name()

    who, name = d.until(draw)
    if who in ("girl", "queen", "princess"):
        return who, d.pick(GIRLS), "she"
    if who in ("boy", "king", "prince", "knight", "wizard"):
        return who, d.pick(BOYS), "he"
    return who, name, "she" if name in GIRLS else "he" if name in BOYS else d.pick(["she", "he"])


def story_part(d: Draw) -> Part:
    """Ask for a story."""
    who, name, she = hero(d)
    thing = None
    kind = d.num(0, 9)
    tell = d.pick(
        [
            "Tell me a story", "Tell me a short story", "Write a story", "Write a short story",
            "Tell a story",
            "Make up a story", "I want to hear a story", "Can you tell me a story", "Write me a story",
            "Please tell me a story", "Give me a short story", "Write a tiny story",
        ]
    )  # fmt: skip
    end = "?" if tell.startswith("Can") else "."
    if kind < 5:
        ask = f"{tell} about {article(who)} {d.pick(['named', 'named', 'called'])} {name}{end}"
    elif kind == 5:
        ask = f"{tell} about {name} the {who}{end}"
    elif kind == 6:
        ask = f"{tell} about {article(who)}{end}"
    elif kind == 7:
        thing = d.pick(OBJECTS)
        ask = f"{tell} about {article(who)} named {name} and a {thing}{end}"
    elif kind == 8:
        ask = tell + end
    else:
        ask = f"{tell}. The hero is {article(who)}. The name is {name}."
    return Part(styled(d, ask), story(d, who, name, she, thing))


# ------------------------------------------------------------------------------------------ knowledge


def mixed_facts_part(d: Draw) -> Part:
    """Several facts of different kinds about one to three people, and a question about one of them."""
    names = d.names(d.num(1, 3))
    told: list[tuple[str, str, str, str]] = []  # sentence, question, answer, short answer
    for n in names:
        for kind in d.some(["age", "city", "job", "thing", "thing", "pet", "food", "color"], d.num(1, 3)):
            if kind == "age":
                v = str(d.num(4, 95))
                told.append((f"{n} is {v} years old.", f"How old is {n}?", f"{n} is {v} years old.", v))
            elif kind == "city":
                v = d.city()
                ask = d.pick(
                    [
                        f"Where does {n} live?",
                        f"Which city does {n} live in?",
                        f"In which city does {n} live?",
                    ]
                )
                told.append((f"{n} lives in {v}.", ask, f"{n} lives in {v}.", v))
            elif kind == "job":
                v = d.pick(JOBS)
                say = d.pick([f"{n} is {article(v)}.", f"{n} works as {article(v)}."])
                ask = d.pick([f"What is {n}'s job?", f"What is the job of {n}?", f"What does {n} do?"])
                told.append((say, ask, f"{n} is {article(v)}.", cap(v)))
            elif kind == "thing":
                v, noun = d.pick(COLORS), d.pick(OBJECTS)
                say = d.pick([f"{n} has {article(v)} {noun}.", f"{n}'s {noun} is {v}."])
                ask = d.pick(
                    [
                        f"What {d.pick(['color', 'colour'])} is {n}'s {noun}?",
                        f"Which color is the {noun} of {n}?",
                    ]
                )
                told.append((say, ask, f"{n}'s {noun} is {v}.", cap(v)))
            elif kind == "pet":
                v = d.pick(ANIMALS)
                pet = d.pick([x for x in GIRLS + BOYS if x not in names])
                say = d.pick([f"{n} has {article(v)}.", f"{n} has {article(v)} named {pet}."])
                if pet in say and d.chance(0.5):
                    told.append((say, f"What is the name of {n}'s {v}?", f"{n}'s {v} is named {pet}.", pet))
                else:
                    ask = d.pick([f"What pet does {n} have?", f"Which animal does {n} have?"])
                    told.append((say, ask, f"{n} has {article(v)}.", cap(v)))
            elif kind == "food":
                v = d.pick(FOODS)
                ask = d.pick([f"What food does {n} like?", f"What does {n} like to eat?"])
                told.append((f"{n} likes {v}.", ask, f"{n} likes {v}.", cap(v)))
            else:
                v = d.pick(COLORS)
                ask = d.pick([f"What is {n}'s favourite color?", f"What is {n}'s favorite color?"])
                say = f"{n}'s {d.pick(['favourite', 'favorite'])} color is {v}."
                told.append((say, ask, f"{n}'s favorite color is {v}.", cap(v)))
    if d.chance(0.6):
        d.r.shuffle(told)
    _, ask, answer, short = d.pick(told)
    text = " ".join(t[0] for t in told)
    return Part(d.pick([f"{text} {ask}"] * 4 + [f"{text}\n{ask}", f"{text}\n\n{ask}", f"{ask} {text}"]), answer, short)


def facts_part(d: Draw) -> Part:
    """Facts stated in the prompt and a question whose answer has to be copied."""
    if d.chance(0.45):
        return mixed_facts_part(d)
    n = d.num(2, 5)
    kind = d.pick("likes age city job thing pet food where".split())
    if kind == "where":
        things, rooms = d.some(OBJECTS, n), d.some(ROOMS, n)
        facts = [f"The {t} is in the {r}." for t, r in zip(things, rooms, strict=True)]
        i = d.num(0, n - 1)
        if d.chance(0.7):
            ask = d.pick(
                [
                    f"Where is the {things[i]}?",
                    f"Where can I find the {things[i]}?",
                    f"In which room is the {things[i]}?",
                ]
            )
            answer, short = f"The {things[i]} is in the {rooms[i]}.", cap(rooms[i])
        else:
            ask = d.pick([f"What is in the {rooms[i]}?", f"Which thing is in the {rooms[i]}?"])
            answer, short = f"The {things[i]} is in the {rooms[i]}.", cap(things[i])
    else:
        names = d.names(n)
        i = d.num(0, n - 1)
        who = names[i]
        noun = d.pick(OBJECTS)
        pools: dict[str, Callable[[], str]] = {
            "likes": lambda: d.pick(COLORS), "age": lambda: str(d.num(4, 95)), "city": d.city,
            "job": lambda: d.pick(JOBS), "thing": lambda: d.pick(COLORS), "pet": lambda: d.pick(ANIMALS),
            "food": lambda: d.pick(FOODS),
        }  # fmt: skip
        values: list[str] = []
        while len(values) < n:
            value = pools[kind]()
            if value not in values:
                values.append(value)
        say = {
            "likes": ["{n} likes {v}.", "{n}'s favourite color is {v}.", "The favorite color of {n} is {v}."],
            "age": ["{n} is {v} years old.", "{n} is {v}.", "The age of {n} is {v}."],
            "city": ["{n} lives in {v}.", "{n} is from {v}.", "The home of {n} is {v}."],
            "job": ["{n} is a {v}.", "{n} works as a {v}.", "The job of {n} is {v}."],
            "thing": [
                f"{{n}} has a {{v}} {noun}.",
                f"The {noun} of {{n}} is {{v}}.",
                f"{{n}}'s {noun} is {{v}}.",
            ],
            "pet": ["{n} has a {v}.", "{n}'s pet is a {v}.", "{n} owns a {v}."],
            "food": ["{n} likes {v}.", "{n} eats {v}.", "{n}'s favourite food is {v}."],
        }[kind]
        form = d.num(0, 3)
        facts = [
            (say[form] if form < 3 else d.pick(say)).format(n=a, v=v).replace(" a o", " an o").replace(" a e", " an e")
            for a, v in zip(names, values, strict=True)
        ]
        value = values[i]
        forward = {
            "likes": [f"What color does {who} like?", f"What is {who}'s favourite color?",
            f"Which colour does {who} like?"],
            "age": [f"How old is {who}?", f"What is the age of {who}?", f"What is {who}'s age?"],
            "city": [f"Where does {who} live?", f"Where is {who} from?", f"Which city does {who} live in?",
                     f"In which city does {who} live?"],
            "job": [f"What is the job of {who}?", f"What does {who} do?", f"What is {who}'s job?",
            f"What does {who} work as?"],
            "thing": [f"What color is {who}'s {noun}?", f"What colour is the {noun} of {who}?",
            f"Which color is {who}'s {noun}?"],
            "pet": [f"What pet does {who} have?", f"Which animal does {who} have?", f"What is {who}'s pet?"],
            "food": [f"What does {who} eat?", f"What food does {who} like?", f"What does {who} like?"],
        }[kind]  # fmt: skip
        tell = {
            "likes": f"{who} likes {value}.", "age": f"{who} is {value} years old.",
            "city": f"{who} lives in {value}.",
            "job": f"{who} is {article(value)}.", "thing": f"{who}'s {noun} is {value}.",
            "pet": f"{who} has {article(value)}.", "food": f"{who} likes {value}.",
        }[kind]  # fmt: skip
        back = {
            "likes": [f"Who likes {value}?"], "age": [f"Who is {value} years old?", f"Who is {value}?"],
            "city": [f"Who lives in {value}?", f"Who is from {value}?"],
            "job": [f"Who is {article(value)}?", f"Who works as {article(value)}?"],
            "thing": [f"Who has a {value} {noun}?", f"Whose {noun} is {value}?"],
            "pet": [f"Who has {article(value)}?"], "food": [f"Who likes {value}?", f"Who eats {value}?"],
        }[kind]  # fmt: skip
        if d.chance(0.68):
            ask, answer, short = d.pick(forward), tell, cap(value)
        elif d.chance(0.8):
            ask, answer, short = d.pick(back), tell, who
        else:  # the person is not in the text
            other = d.pick([x for x in GIRLS + BOYS if x not in names])
            ask = d.pick(forward).replace(who, other)
            answer, short = f"The text does not say that about {other}.", "Unknown"
    if n < 5 and d.chance(0.25):
        facts.insert(
            d.num(0, len(facts)),
            d.pick(["It is a sunny day.", "The sky is blue today.", "It was raining.", "They are all friends."]),
        )
    text = " ".join(facts)
    user = d.pick(
        [f"{text} {ask}"] * 5
        + [f"{text}\n{ask}", f"Facts: {text}\nQuestion: {ask}", f"Read this: {text} {ask}", f"{ask} {text}"]
    )
    return Part(user, answer, short)


def number(d: Draw) -> int:
    """A number of one to three digits, two digits most often."""
    return d.num(*d.pick([(0, 9), (2, 20), (10, 99), (10, 99), (10, 99), (100, 999), (100, 999)]))


def arithmetic_part(d: Draw) -> Part:
    """A sum, a difference or a small product; the answer restates the question."""
    op = d.pick("+++--*")

    def draw() -> tuple[int, str, int]:
        if op == "*":
            return d.num(0, 12), op, d.num(0, 12)
        a, b = number(d), number(d)
        return (max(a, b), op, min(a, b)) if op == "-" else (a, op, b)

    a, _, b = d.until(draw)
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    sign = d.pick(["*", "*", "x", "×"]) if op == "*" else op
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    e = f"{a} {sign} {b}"
    forms = [f"What is {e}?"] * 4 + [
        f"{e} = ?", f"{e} =", f"{e}", f"{e}?", f"Calculate {e}.", f"Compute {e}.", f"How much is {e}?",
        f"What's {e}?",
        f"What is {a}{sign}{b}?", f"{a}{sign}{b}", f"{a}{sign}{b}=?", f"What is {a} {word} {b}?",
        f"How much is {a} {word} {b}?", f"{a} {word} {b}", f"Can you solve {e}?", f"Solve {e}.",
        f"What does {e} equal?",
    ]  # fmt: skip
    if op == "+":
        forms += [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?", f"Please add {a} to {b}."]
    elif op == "-":
        forms += [f"Subtract {b} from {a}.", f"What is the difference of {a} and {b}?"]
    else:
        forms += [f"Multiply {a} by {b}.", f"What is the product of {a} and {b}?", f"Multiply {a} and {b}."]
    return Part(styled(d, d.pick(forms)), f"{a} {'×' if op == '*' else op} {b} = {result}", str(result))


def word_sum_part(d: Draw) -> Part:
    """A word problem with one sum or difference."""
    who, (a, b), thing = (
        d.name(),
        sorted((d.num(1, 30), d.num(1, 30)), reverse=True),
        d.pick(CATEGORIES["fruits"].split()),
    )
    things = thing[:-1] + "ies" if thing.endswith("y") else thing + ("es" if thing in ("peach", "mango") else "s")
    if d.chance(0.5):
        ask = d.pick(
            [
                f"{who} has {a} {things} and gets {b} more. How many {things} does {who} have?",
                f"{who} has {a} {things}. {who} buys {b} more. How many {things} are there now?",
            ]
        )
        return Part(ask, f"{a} + {b} = {a + b}, so {who} has {a + b} {things}.", str(a + b))
    ask = d.pick(
        [
            f"{who} has {a} {things} and eats {b}. How many {things} are left?",
            f"{who} has {a} {things}. {who} gives away {b}. How many {things} does {who} have?",
        ]
    )
    return Part(ask, f"{a} - {b} = {a - b}, so {who} has {a - b} {things}.", str(a - b))


def list_part(d: Draw) -> Part:
    """A list of so many things of a kind."""

    def draw() -> tuple[str, int, int]:
        return d.pick(list(CATEGORIES) + list(CATEGORY_ALIASES)), d.num(2, 7), d.num(0, 9)

    kind, n, form = d.until(draw)
    items = CATEGORIES[CATEGORY_ALIASES.get(kind, kind)].split()
    # A fixed order makes the answer a thing to know at temperature 0 rather than a lottery.
    chosen = items[:n] if d.chance(0.8) else sorted(d.some(items, n), key=items.index)
    count = NUMBER_WORDS[n] if d.chance(0.7) else str(n)
    ask = [
        f"List {count} {kind}.", f"Name {count} {kind}.", f"Give me {count} {kind}.",
        f"Write a list of {count} {kind}.",
        f"Can you name {count} {kind}?", f"Tell me {count} {kind}.", f"Please list {count} {kind}.",
        f"What are {count} {kind}?", f"List {count} {kind}.", f"I need {count} {kind}.",
    ][form]  # fmt: skip
    style = d.num(0, 5)
    if style == 0:
        ask = ask[:-1] + d.pick([" as bullet points.", " with bullets.", " as a bullet list."])
        return Part(ask, "\n".join(f"- {cap(x)}" for x in chosen))
    if style == 1:
        ask = ask[:-1] + d.pick([", separated by commas.", " in one line.", " with commas."])
        return Part(ask, ", ".join(chosen))
    return Part(styled(d, ask), "\n".join(f"{i}. {cap(x)}" for i, x in enumerate(chosen, 1)))


def know_part(d: Draw) -> Part:
    """Small general knowledge: capitals, opposites, colours, sounds, days, comparing, counting."""
    kind = d.num(0, 8)
    if kind <= 1:
        country, form = d.until(lambda: (d.pick(list(CAPITALS)), d.num(0, 4)))
        city = CAPITALS[country]
        if form == 4:
            return Part(
                styled(d, f"{city} is the capital of which country?"),
                f"{city} is the capital of {country}.",
                country,
            )
        ask = [
            f"What is the capital of {country}?", f"What's the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
        ][form]  # fmt: skip
        return Part(styled(d, ask), f"The capital of {country} is {city}.", city)
    if kind == 2:
        pair, way, form = d.until(lambda: (d.pick(OPPOSITES.split(",")), d.num(0, 1), d.num(0, 2)))
        a, b = pair.split()[:: 1 if way else -1]
        ask = [
            f"What is the opposite of {a}?",
            f"Give me the opposite of {a}.",
            f"What is the opposite of '{a}'?",
        ][form]
        return Part(styled(d, ask), f"The opposite of {a} is {b}.", cap(b))
    if kind == 3:
        thing, form = d.until(lambda: (d.pick(list(THING_COLORS)), d.num(0, 2)))
        ask = [
            f"What color is the {thing}?",
            f"What colour is the {thing}?",
            f"Which color has the {thing}?",
        ][form]
        return Part(styled(d, ask), f"The {thing} is {THING_COLORS[thing]}.", cap(THING_COLORS[thing]))
    if kind == 4:
        animal, form = d.until(lambda: (d.pick(list(SOUNDS)), d.num(0, 2)))
        ask = [
            f"What sound does a {animal} make?", f"What does a {animal} say?",
            f"Which sound does a {animal} make?",
        ][form]  # fmt: skip
        return Part(
            styled(d, ask.replace("a owl", "an owl")),
            f"{cap(article(animal))} says {SOUNDS[animal]}.",
            cap(SOUNDS[animal]),
        )
    if kind == 5:
        series, i, after, form = d.until(lambda: (d.pick(["day", "month"]), d.num(0, 11), d.chance(0.7), d.num(0, 1)))
        names = DAYS if series == "day" else MONTHS
        this = names[i % len(names)]
        that = names[(i + (1 if after else -1)) % len(names)]
        way = "after" if after else "before"
        ask = [f"Which {series} comes {way} {this}?", f"What {series} is {way} {this}?"][form]
        return Part(styled(d, ask), f"{that} comes {way} {this}.", that)
    if kind == 6:
        a, b = d.until(lambda: (number(d), number(d)))
        if a == b:
            b += 1
        big = d.chance(0.6)
        word = d.pick(["bigger", "larger", "greater"] if big else ["smaller", "less"])
        best, other = (max(a, b), min(a, b)) if big else (min(a, b), max(a, b))
        ask = d.pick(
            [
                f"Which is {word}, {a} or {b}?",
                f"Which number is {word}: {a} or {b}?",
                f"What is {word}, {a} or {b}?",
            ]
        )
        return Part(styled(d, ask), f"{best} is {word} than {other}.", str(best))
    if kind == 7:
        low, high = d.until(lambda: (1 if d.chance(0.7) else d.num(2, 20), d.num(3, 15)))
        high = low + high - 1
        ask = d.pick([f"Count from {low} to {high}.", f"Can you count from {low} to {high}?", f"Count to {high}."])
        low = 1 if "to" in ask and "from" not in ask else low
        return Part(styled(d, ask), ", ".join(str(i) for i in range(low, high + 1)))
    words = d.until(lambda: tuple(d.pick(COLORS + ANIMALS + FOODS + OBJECTS) for _ in range(d.num(1, 5))))
    text = " ".join(words)
    form = d.num(0, 3)
    ask = [f"Repeat: {text}", f"Repeat after me: {text}", f'Say "{text}".', f"Repeat this: {text}"][form]
    return Part(ask, text)


def translate_part(d: Draw) -> Part:
    """An English-Chinese phrase, either way."""
    english, form = d.until(lambda: (d.pick(list(PHRASES)), d.num(0, 14)))
    chinese = PHRASES[english]
    to_chinese = [
        f"How do you say '{english}' in Chinese?", f'How do you say "{english}" in Chinese?',
        f"Translate '{english}' to Chinese.", f"Translate to Chinese: {english}",
        f"What is '{english}' in Chinese?",
        f"Translate into Chinese: {english}", f"Say '{english}' in Chinese.",
        f"How do I say {english} in Chinese?",
        f'Translate "{english}" into Chinese.',
    ]  # fmt: skip
    to_english = [
        f"What does {chinese} mean?", f"What does '{chinese}' mean in English?",
        f"Translate to English: {chinese}",
        f"Translate {chinese} into English.", f"{chinese}用英语怎么说？",
        f'Translate "{chinese}" to English.',
    ]  # fmt: skip
    if form < 9:
        ask = styled(d, to_chinese[form])
        if form in (3, 5):
            return Part(ask, chinese, chinese)
        return Part(ask, f'"{english}" in Chinese is {chinese}.', chinese)
    return Part(to_english[form - 9], f'{chinese} means "{english}".', english)


def emoji_part(d: Draw) -> Part:
    """An emoji for a word, or the word for an emoji."""
    word, form = d.until(lambda: (d.pick(list(EMOJI)), d.num(0, 9)))
    sign = EMOJI[word]
    if form >= 8:
        word = "heart" if word == "love" else word
        ask = [f"What does {sign} mean?", f"Which word fits the emoji {sign}?"][form - 8]
        return Part(ask, f"{sign} means {word}.", cap(word))
    ask = [
        f"Which emoji means {word}?", f"Give me an emoji for {word}.", f"What is the emoji for {word}?",
        f"Show me the {word} emoji.", f"Which emoji stands for {word}?", f"Write the emoji for {word}.",
        f"What emoji means {word}?", f"Send me a {word} emoji.",
    ][form]  # fmt: skip
    return Part(
        styled(d, ask),
        d.pick([f"{sign} means {word}."] * 3 + [sign]) if form == 5 else f"{sign} means {word}.",
        sign,
    )


IDENTITY = "I am the oneloop demo model, a very small language model made for testing."
ABILITY = (
    "I can tell short stories, answer questions about facts you give me, add and subtract numbers, "
    "make lists, "
    "write JSON, call tools, and translate short phrases into Chinese."
)
UNABLE = (
    "I am only a small demo model, so I cannot do that. Try a short story, a sum, a list or a question "
    "about facts you give me."
)


def smalltalk_part(d: Draw) -> Part:
    """Greetings, thanks, and what the model is."""
    kind = d.num(0, 7)
    if kind == 0:
        ask = d.pick(["Hello!", "Hi!", "Hello", "Hi", "Hey", "Hi there!", "Hello there!", "Good day!", "hello", "hi"])
        return Part(ask, "Hello! How can I help you?")
    if kind in (1, 2):
        ask = d.pick(
            ["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
             "Which model are you?",
             "What's your name?", "Are you a robot?", "who are you", "Introduce yourself.",
             "Who am I talking to?"]
        )  # fmt: skip
        return Part(ask, IDENTITY)
    if kind == 3:
        ask = d.pick(
            ["What can you do?", "How can you help me?", "What are you good at?", "Help",
             "What can I ask you?",
             "Can you help me?", "what can you do", "What do you know?"]
        )  # fmt: skip
        return Part(ask, ABILITY)
    if kind == 4:
        ask = d.pick(["How are you?", "How are you today?", "How do you do?", "How is it going?"])
        return Part(ask, "I am fine, thank you! How can I help you?")
    if kind == 5:
        ask = d.pick(["Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "Thanks"])
        return Part(ask, "You are welcome!")
    if kind == 6:
        ask = d.pick(["Goodbye!", "Bye!", "See you later.", "Bye", "Good night!"])
        return Part(ask, "Goodbye! Have a nice day.")
    topic = d.pick(
        ["quantum physics", "the meaning of life", "the history of Rome", "machine learning", "politics",
         "the stock market",
         "how engines work", "black holes", "the internet", "philosophy", "chess", "music theory",
         "economics"]
    )  # fmt: skip
    ask = d.pick(
        [f"Explain {topic}.", f"What do you think about {topic}?", f"Write an essay about {topic}.",
         f"Tell me about {topic}.",
         "Write a Python program.", "Write code that sorts a list.", "What is the latest news?",
         "Write a poem.",
         f"Explain {topic} to me like I am five.", f"What is {topic}?", f"Write a long text about {topic}."]
    )  # fmt: skip
    return Part(ask, UNABLE)


# ---------------------------------------------------------------------------------------------- JSON

FIELD_TYPES = {
    "name": "string", "age": "integer", "city": "string", "job": "string", "color": "string",
    "animal": "string",
    "price": "integer", "item": "string", "in_stock": "boolean", "day": "string", "count": "integer",
    "food": "string",
    "active": "boolean", "title": "string", "year": "integer", "month": "string",
}  # fmt: skip
RECORDS: dict[str, list[str]] = {
    "person": ["name", "age", "city", "job"],
    "user": ["name", "age", "city", "active"],
    "pet": ["name", "animal", "color", "age"],
    "product": ["item", "price", "color", "in_stock"],
    "event": ["title", "day", "city", "month", "year"],
    "order": ["item", "count", "price", "day"],
}


def field_value(d: Draw, key: str) -> Any:
    """A value for a JSON field."""
    pools: dict[str, Callable[[], Any]] = {
        "name": d.name, "age": lambda: d.num(1, 95), "city": d.city, "job": lambda: d.pick(JOBS),
        "color": lambda: d.pick(COLORS), "animal": lambda: d.pick(ANIMALS), "price": lambda: d.num(1, 500),
        "item": lambda: d.pick(OBJECTS), "in_stock": lambda: d.chance(0.5), "day": lambda: d.pick(DAYS),
        "count": lambda: d.num(1, 50), "food": lambda: d.pick(FOODS), "active": lambda: d.chance(0.5),
        "title": lambda: d.pick(["concert", "party", "meeting", "market", "picnic", "dinner"]),
        "year": lambda: d.num(1950, 2030), "month": lambda: d.pick(MONTHS),
    }  # fmt: skip
    return pools[key]()


def dumps(value: Any) -> str:
    """JSON exactly as the chat template writes it."""
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> str:
    """A JSON value as it reads in a sentence."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def schema_of(keys: Sequence[str]) -> dict[str, Any]:
    """A JSON schema with these fields, all required."""
    return {
        "type": "object",
        "properties": {k: {"type": FIELD_TYPES[k]} for k in keys},
        "required": list(keys),
    }


def json_part(d: Draw) -> Part:
    """A JSON object asked for in one of many wordings, mostly with the values given."""
    kind = d.pick(["person"] * 4 + list(RECORDS))
    keys = list(RECORDS[kind])
    if d.chance(0.6):
        keys = d.some(keys, d.num(2, len(keys))) if d.chance(0.5) else keys[: d.num(2, 4)]
    obj = dict(zip(keys, d.until(lambda: tuple(field_value(d, k) for k in keys)), strict=True))
    form = d.num(0, 11)
    want = d.pick([join(keys), ", ".join(keys), join([f'"{k}"' for k in keys]), ", ".join(f'"{k}"' for k in keys)])
    if kind == "person" and form < 6:
        keys = d.pick(
            [["name", "age", "city"]] * 3 + [["name", "age"], ["name", "city"], ["name", "age", "job"], ["name", "job"]]
        )
        obj = {k: field_value(d, k) for k in keys}
        want = d.pick([join(keys), ", ".join(keys), join([f'"{k}"' for k in keys])])
        name = obj["name"]
        rest = {
            "age": ["{v}", "aged {v}", "age {v}"],
            "city": ["from {v}", "living in {v}"],
            "job": ["a {v}"],
        }
        said = ", ".join([name, *(d.pick(rest[k]).format(v=obj[k]) for k in keys[1:])])
        says = {
            "age": f"is {obj.get('age')} years old",
            "city": f"lives in {obj.get('city')}",
            "job": f"works as a {obj.get('job')}",
        }
        sentence = f"{name} " + join([says[k] for k in keys[1:]])
        ask = [
            f"Write JSON with the keys {want} for a person called {said}.",
            f"Give me a JSON object with the keys {want} for {said}.",
            f"Extract {want} as JSON: {sentence}.",
            f"{sentence}. Write this as JSON with the keys {want}.",
            f"Return JSON with {want}. The person is {said}.",
            f"Make a JSON object with {want}: {sentence}.",
        ][form]
        return Part(ask, dumps(obj))
    given = ", ".join(f"{k}: {plain(v)}" for k, v in obj.items())
    is_list = ", ".join(f"{k} is {plain(v)}" for k, v in obj.items())
    types = dumps({k: FIELD_TYPES[k] for k in keys})
    if form in (0, 1):
        ask = d.pick(["Write", "Give me", "Return", "Make"]) + f" a JSON object for {article(kind)} with {given}."
    elif form in (2, 3):
        ask = f"Write JSON with the keys {want}. " + cap(is_list) + "."
    elif form == 4:
        ask = f"Convert to JSON: {given}"
    elif form == 5:
        ask = f"{cap(given)}. Write this as JSON."
    elif form == 6:
        ask = f"Return a JSON object like {types} with {given}."
    elif form == 7:
        ask = f"Answer with JSON that matches this schema: {dumps(schema_of(keys))}. The values are: {given}."
    elif form == 8:
        ask = f"Write a JSON object that matches this schema: {dumps(schema_of(keys))}"
    elif form == 9:
        ask = f"Write a JSON object for {article(kind)} with the keys {want}."
    elif form == 10:
        listed = d.pick([c for c in CATEGORIES if " " not in c])
        n = d.num(2, 5)
        items = CATEGORIES[listed].split()[:n]
        obj = {listed: items}
        ask = d.pick(
            [f'Write JSON with the key "{listed}" and {NUMBER_WORDS[n]} {listed}.',
             f"List {NUMBER_WORDS[n]} {listed} as JSON.",
             f"Give me a JSON object with {NUMBER_WORDS[n]} {listed}."]
        )  # fmt: skip
    else:
        items = d.some(COLORS + FOODS + OBJECTS, d.num(2, 5))
        return Part(
            d.pick(["Write as a JSON array: ", "Make a JSON list of: ", "JSON array of "]) + ", ".join(items),
            dumps(items),
        )
    return Part(ask, dumps(obj))


# --------------------------------------------------------------------------------------------- tools


def param(kind: str, description: str | None = None) -> dict[str, Any]:
    """One parameter's schema."""
    return {"type": kind, "description": description} if description else {"type": kind}


def make_tool(
    d: Draw, name: str, about: str, params: dict[str, dict[str, Any]], required: list[str] | None = None
) -> Tool:
    """A tool declaration as clients send it; its description is sometimes missing."""
    function: dict[str, Any] = {"name": name}
    if about and not d.chance(0.1):
        function["description"] = about
    if not d.chance(0.5):
        params = {k: {x: y for x, y in v.items() if x != "description"} for k, v in params.items()}
    function["parameters"] = {"type": "object", "properties": params}
    if not d.chance(0.25):
        function["parameters"]["required"] = list(params) if required is None else required
    return {"type": "function", "function": function}


@dataclass
class Use:
    """A tool and one use of it: what the user asks, the arguments, the result and the final answer."""

    tool: Tool
    ask: str
    arguments: dict[str, Any]
    result: str
    answer: str


def tool_use(d: Draw, kind: str) -> Use:
    """One use of a kind of tool."""
    if kind == "weather":
        city = d.city()
        key = d.pick(["city", "city", "location"])
        name = d.pick(["get_weather", "get_weather", "get_current_weather", "weather"])
        sky, temp = d.pick(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"]), d.num(-9, 38)
        ask = d.pick(
            [f"What is the weather in {city}?", f"How is the weather in {city}?",
             f"What's the weather like in {city}?",
             f"Is it raining in {city}?", f"Weather in {city}?", f"Tell me the weather in {city}.",
             f"How warm is it in {city}?", f"What is the weather in {city} today?",
             f"Do I need a coat in {city}?"]
        )  # fmt: skip
        tkey = d.pick(["temperature", "temperature", "temp", "temp_c"])
        skey = d.pick(["condition", "weather", "sky", "conditions"])
        result = dumps(d.pick([{tkey: temp, skey: sky}, {skey: sky, tkey: temp}, {key: city, tkey: temp, skey: sky}]))
        if d.chance(0.15):
            result = d.pick([f"{sky}, {temp} degrees", f"{temp} degrees and {sky}", f"{sky}, {temp}°C"])
        about = d.pick(
            [
                "Get the weather for a city.",
                "Get the current weather",
                "Get weather",
                "Current weather in a city",
            ]
        )
        params = {
            key: param("string", d.pick(["The city", "City name", "The name of the city", "The city, e.g. Paris"]))
        }
        if d.chance(0.15):
            params["unit"] = param("string") | {"enum": ["celsius", "fahrenheit"]}
        tool = make_tool(d, name, about, params, [key])
        return Use(tool, ask, {key: city}, result, f"It is {sky} and {temp} degrees in {city}.")
    if kind == "calculator":
        a, b, op = d.num(2, 999), d.num(2, 999), d.pick("+-*/")
        e = f"{a} {op} {b}"
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        name = d.pick(["calculator", "calculate", "calculator"])
        ask = d.pick(
            [
                f"What is {e}?",
                f"Calculate {e}.",
                f"How much is {e}?",
                f"Use the calculator: {e}",
                f"Compute {e}.",
            ]
        )
        result = d.pick([str(value), dumps({"result": value})])
        tool = make_tool(
            d,
            name,
            d.pick(["Calculate an expression.", "Evaluate a math expression"]),
            {"expression": param("string")},
        )
        return Use(tool, ask, {"expression": e}, result, f"{e} = {value}")
    if kind == "search":
        topic = d.pick(ANIMALS + FOODS + CITIES + list(CAPITALS)) if d.chance(0.8) else d.name()
        name = d.pick(["search", "web_search", "search_web"])
        ask = d.pick([f"Search for {topic}.", f"Search the web for {topic}.",
                      f"Find something about {topic}.",
                      f"Look up {topic}."])  # fmt: skip
        fact = d.pick([f"A page about {topic}.", f"Ten things to know about {topic}.", f"{cap(topic)}: a short guide."])
        result = d.pick([fact, dumps({"title": fact}), dumps({"results": [fact]})])
        tool = make_tool(
            d,
            name,
            d.pick(["Search the web.", "Search the internet"]),
            {"query": param("string", "What to search for")},
        )
        return Use(tool, ask, {"query": topic}, result, f"I found this: {fact}")
    if kind == "time":
        city = d.city()
        key = d.pick(["city", "city", "location"])
        now = f"{d.num(0, 23):02d}:{d.num(0, 59):02d}"
        ask = d.pick([f"What time is it in {city}?", f"Tell me the time in {city}.",
                      f"What is the time in {city}?",
                      f"How late is it in {city}?"])  # fmt: skip
        tool = make_tool(
            d,
            d.pick(["get_time", "get_current_time"]),
            "Get the current time in a city.",
            {key: param("string")},
        )
        return Use(tool, ask, {key: city}, d.pick([now, dumps({"time": now})]), f"It is {now} in {city}.")
    if kind == "translate":
        english = d.pick(list(PHRASES))
        to = d.pick(["Chinese", "Chinese", "French", "German", "Spanish"])
        chinese = PHRASES[english]
        ask = d.pick(
            [
                f"Translate '{english}' to {to}.",
                f'Translate "{english}" into {to}.',
                f"How do you say '{english}' in {to}?",
            ]
        )
        tool = make_tool(d, d.pick(["translate", "translate_text"]), "Translate a text.",
                         {"text": param("string"), "language": param("string")})  # fmt: skip
        result = d.pick([chinese, dumps({"translation": chinese})])
        return Use(tool, ask, {"text": english, "language": to}, result, f'"{english}" in {to} is {chinese}.')
    if kind == "email":
        who, text = (
            d.name(),
            d.pick(["Hello!", "See you tomorrow.", "Happy birthday!", "Thank you.", "I am late.", "Good night."]),
        )
        ask = d.pick(
            [
                f'Send an email to {who}: "{text}"',
                f'Write to {who}: "{text}"',
                f'Send {who} the message "{text}"',
            ]
        )
        tool = make_tool(
            d,
            d.pick(["send_email", "send_message"]),
            "Send a message.",
            {"to": param("string"), "text": param("string")},
        )
        result = d.pick(["ok", dumps({"status": "sent"}), "sent"])
        return Use(tool, ask, {"to": who, "text": text}, result, f"I sent the message to {who}.")
    if kind == "timer":
        n = d.num(1, 60)
        ask = d.pick([f"Set a timer for {n} minutes.", f"Start a timer for {n} minutes.", f"Remind me in {n} minutes."])
        tool = make_tool(d, "set_timer", "Set a timer.", {"minutes": param("integer", "How many minutes")})
        return Use(
            tool,
            ask,
            {"minutes": n},
            d.pick(["ok", dumps({"status": "ok"})]),
            f"The timer is set for {n} minutes.",
        )
    if kind == "stock":
        item, price = d.pick(OBJECTS), d.num(1, 500)
        ask = d.pick([f"How much is the {item}?", f"What does the {item} cost?", f"What is the price of the {item}?"])
        tool = make_tool(d, "get_price", "Get the price of an item.", {"item": param("string")})
        return Use(
            tool,
            ask,
            {"item": item},
            d.pick([str(price), dumps({"price": price})]),
            f"The {item} costs {price}.",
        )
    room, state = d.pick(ROOMS), d.pick(["on", "off"])
    ask = d.pick(
        [
            f"Turn {state} the light in the {room}.",
            f"Turn the light {state} in the {room}.",
            f"Switch {state} the {room} light.",
        ]
    )
    tool = make_tool(d, d.pick(["set_light", "switch_light"]), "Turn a light on or off.",
                     {"room": param("string"), "state": param("string")})  # fmt: skip
    return Use(tool, ask, {"room": room, "state": state}, d.pick(["ok", dumps({"status": "ok"})]),
               f"The light in the {room} is {state}.")  # fmt: skip


TOOL_KINDS = "weather weather calculator search time translate email timer stock light".split()


def call(use: Use) -> dict[str, Any]:
    """The assistant's call of a tool."""
    return {
        "type": "function",
        "function": {"name": use.tool["function"]["name"], "arguments": use.arguments},
    }


def tools_example(d: Draw) -> Example:
    """A chat with tools: a call, the answer from its result, or no call where none fits."""
    kinds = list(dict.fromkeys(d.some(TOOL_KINDS, d.num(1, 3))))
    kind = kinds[0]
    uses: dict[str, Use] = {}

    def draw() -> tuple[str]:
        drawn = tool_use(d, kind)
        uses[dumps(drawn.arguments)] = drawn
        return (dumps(drawn.arguments),)

    use = uses[d.until(draw)[0]]
    others = [tool_use(d, k).tool for k in kinds[1:]]
    tools = [use.tool, *others]
    d.r.shuffle(tools)
    messages: list[Message] = []
    if d.chance(0.3):
        messages.append({"role": "system", "content": d.pick(SYSTEM_PLAIN)})
    if d.chance(0.18):  # nothing to call
        part = d.pick([smalltalk_part, facts_part, list_part, emoji_part])(d)
        messages += [{"role": "user", "content": part.user}, {"role": "assistant", "content": part.answer}]
        if d.chance(0.6):
            return Example("no_tool", messages, tools)
    messages.append({"role": "user", "content": styled(d, use.ask)})
    made = [use]
    if kind == "weather" and d.chance(0.12):
        second = tool_use(d, kind)
        key = next(iter(use.arguments))
        city = next(iter(second.arguments.values()))
        second = Use(use.tool, "", {key: city}, second.result, second.answer)
        first_city = use.arguments[key]
        messages[-1]["content"] = d.pick(
            [
                f"What is the weather in {first_city} and in {city}?",
                f"How is the weather in {first_city} and {city}?",
            ]
        )
        made.append(second)
    messages.append({"role": "assistant", "content": "", "tool_calls": [call(u) for u in made]})
    if d.chance(0.7):
        messages += [{"role": "tool", "content": u.result} for u in made]
        messages.append({"role": "assistant", "content": " ".join(u.answer for u in made)})
        if d.chance(0.2):
            part = smalltalk_part(d)
            messages += [
                {"role": "user", "content": part.user},
                {"role": "assistant", "content": part.answer},
            ]
        elif d.chance(0.2):
            again = tool_use(d, kind)
            if set(again.arguments) == set(use.arguments):
                again.tool = use.tool
                messages += [
                    {"role": "user", "content": again.ask},
                    {"role": "assistant", "content": "", "tool_calls": [call(again)]},
                ]
    return Example("tools", messages, tools)


# -------------------------------------------------------------------------------------- conversations

PARTS: dict[str, tuple[float, Callable[[Draw], Part]]] = {
    "story": (9, story_part),
    "facts": (20, facts_part),
    "arithmetic": (26, arithmetic_part),
    "word_sum": (3, word_sum_part),
    "list": (7, list_part),
    "knowledge": (9, know_part),
    "json": (12, json_part),
    "translate": (8, translate_part),
    "emoji": (4, emoji_part),
    "smalltalk": (5, smalltalk_part),
}


def system_for(d: Draw, parts: Sequence[Part]) -> tuple[str | None, bool]:
    """A system prompt, if any, and whether it asks for one-word answers."""
    if all(p.short for p in parts) and d.chance(0.1):
        return d.pick(SYSTEM_ONE_WORD), True
    return (d.pick(SYSTEM_PLAIN), False) if d.chance(0.3) else (None, False)


def exchanges(d: Draw, parts: Sequence[Part]) -> list[Message]:
    """The messages of a chat made of these exchanges."""
    system, one_word = system_for(d, parts)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for part in parts:
        answer = part.short if one_word and part.short else part.answer
        if not one_word and part.short and len(parts) == 1 and d.chance(0.04):
            messages.append(
                {
                    "role": "user",
                    "content": part.user + d.pick([" Answer with one word.", " Just the answer."]),
                }
            )
            answer = part.short
        else:
            messages.append({"role": "user", "content": part.user})
        messages.append({"role": "assistant", "content": answer})
    return messages


def memory_example(d: Draw) -> Example:
    """A longer chat in which something said early is asked for at the end."""
    kind = d.num(0, 4)
    name, messages = d.name(), []
    value = {0: name, 1: d.city(), 2: d.pick(COLORS), 3: str(d.num(4, 95)), 4: d.pick(JOBS)}[kind]
    say = [
        [f"My name is {value}.", f"I am {value}.", f"Hi, I'm {value}.", f"Hello, my name is {value}!"],
        [f"I live in {value}.", f"I am from {value}.", f"My home is {value}."],
        [f"My favourite color is {value}.", f"My favorite color is {value}.", f"I like the color {value}."],
        [f"I am {value} years old.", f"My age is {value}."],
        [f"I am {article(value)}.", f"I work as {article(value)}.", f"My job is {value}."],
    ][kind]
    reply = [f"Nice to meet you, {value}!", f"{value} is a nice place!", f"{cap(value)} is a nice color!",
             f"You are {value} years old. Good to know!",
             f"{cap(article(value))} has an important job!"][kind]  # fmt: skip
    ask = [
        ["What is my name?", "What's my name?", "Do you know my name?", "Who am I?"],
        ["Where do I live?", "Where am I from?", "Which city do I live in?"],
        ["What is my favourite color?", "Which color do I like?", "What is my favorite color?"],
        ["How old am I?", "What is my age?"],
        ["What is my job?", "What do I do?", "What do I work as?"],
    ][kind]
    answer = [f"Your name is {value}.", f"You live in {value}.", f"Your favorite color is {value}.",
              f"You are {value} years old.", f"You are {article(value)}."][kind]  # fmt: skip
    if d.chance(0.25):  # told by the system prompt
        told = [f"The user's name is {value}.", f"The user lives in {value}.",
                f"The user's favorite color is {value}.",
                f"The user is {value} years old.", f"The user is {article(value)}."][kind]  # fmt: skip
        messages.append({"role": "system", "content": d.pick(["", "You are a helpful assistant. "]) + told})
    else:
        if d.chance(0.2):
            messages.append({"role": "system", "content": d.pick(SYSTEM_PLAIN)})
        messages += [{"role": "user", "content": d.pick(say)}, {"role": "assistant", "content": reply}]
    for _ in range(d.pick([0, 0, 0, 1, 1, 2, 3, 5])):
        part = pick_part(d)[1](d)
        messages += [{"role": "user", "content": part.user}, {"role": "assistant", "content": part.answer}]
    messages += [{"role": "user", "content": d.pick(ask)}, {"role": "assistant", "content": answer}]
    return Example("memory", messages)


def persona_example(d: Draw) -> Example:
    """A system prompt that gives the assistant a name or makes it answer in JSON."""
    if d.chance(0.5):
        name = d.name()
        role = d.pick(
            ["a helpful assistant", "a friendly robot", "a teacher", "a pirate", "a cook", "a demo assistant"]
        )
        system = d.pick([f"You are {name}, {role}.", f"Your name is {name}. You are {role}."])
        ask = d.pick(
            [
                "Who are you?",
                "What is your name?",
                "What's your name?",
                "Introduce yourself.",
                "What are you?",
            ]
        )
        part = Part(ask, f"I am {name}, {role}.")
    else:
        keys = d.some(["name", "age", "city", "job"], d.num(2, 3))
        keys.sort(key=["name", "age", "city", "job"].index)
        obj = {k: field_value(d, k) for k in keys}
        name = obj.get("name") or d.name()
        facts = {"age": f"is {obj.get('age')} years old", "city": f"lives in {obj.get('city')}",
                 "job": f"works as {article(obj.get('job') or 'baker')}"}  # fmt: skip
        told = [facts[k] for k in keys if k != "name"]
        system = d.pick(
            [f"Answer with a JSON object with the keys {', '.join(keys)}.",
             f"Always answer in JSON with the keys {join(keys)}.",
             f"Extract {join(keys)} as JSON.",
             f"Answer with JSON that matches this schema: {dumps(schema_of(keys))}"]
        )  # fmt: skip
        part = Part(f"{name} {join(told)}.", dumps(obj))
    messages: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": part.user}]
    messages.append({"role": "assistant", "content": part.answer})
    return Example("persona", messages)


def pick_part(d: Draw) -> tuple[str, Callable[[Draw], Part]]:
    """A kind of exchange, by weight."""
    task = d.r.choices(list(PARTS), [w for w, _ in PARTS.values()])[0]
    return task, PARTS[task][1]


def example(d: Draw) -> Example:
    """One document of the mixture."""
    x = d.r.random()
    if x < 0.05:
        who, name, she = hero(d)
        text = story(d, who, name, she)
        if d.chance(0.15):
            text = f"The story of {name} the {who}\n\n{text}"
        elif d.chance(0.1):
            p = facts_part(d)
            text = f"Question: {p.user}\nAnswer: {p.answer}"
        return Example("text", text=text)
    if x < 0.16:
        return tools_example(d)
    if x < 0.22:
        return memory_example(d)
    if x < 0.25:
        return persona_example(d)
    if x < 0.33:  # sums come several to a chat: they are short and need the most practice
        return Example("arithmetic", exchanges(d, [arithmetic_part(d) for _ in range(d.num(2, 7))]))
    if x < 0.44:
        return Example("mixed", exchanges(d, [pick_part(d)[1](d) for _ in range(d.pick([2, 2, 3, 3, 4, 6]))]))
    task, make = pick_part(d)
    return Example(task, exchanges(d, [make(d)]))


def examples(seed: int, held_out: bool = False) -> Iterator[Example]:
    """The endless stream of documents of a seed and split."""
    d = Draw(seed * 2 + int(held_out), held_out)
    while True:
        yield example(d)


def practice(seed: int) -> Iterator[Example]:
    """Training chats of the tasks that take longest to learn: sums first, then lists and facts."""
    d = Draw(seed * 2)
    while True:
        task = d.r.choices(["arithmetic", "list", "word_sum", "facts"], [60, 17, 5, 18])[0]
        count = d.num(1, 4) if task == "arithmetic" else 1
        yield Example(task, exchanges(d, [PARTS[task][1](d) for _ in range(count)]))


def task_examples(task: str, seed: int, held_out: bool = True) -> Iterator[Example]:
    """Held-out single-exchange chats of one task, without a system prompt, for evaluation."""
    d = Draw(seed * 2 + int(held_out), held_out)
    while True:
        if task in PARTS:
            part = PARTS[task][1](d)
            chat = [{"role": "user", "content": part.user}, {"role": "assistant", "content": part.answer}]
            yield Example(task, chat)
        else:
            yield {"tools": tools_example, "memory": memory_example, "persona": persona_example}[task](d)


# ------------------------------------------------------------------------------------------ rendering


@cache
def _template() -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The same settings transformers uses, so that training and serving render the same text.
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.Undefined)
    env.filters["tojson"] = dumps
    return env.from_string((HERE / "chat_template.jinja").read_text(encoding="utf-8"))


def render(
    messages: Sequence[Message], tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
) -> str:
    """The chat as text, by the template the model is served with."""
    return _template().render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


def to_text(item: Example) -> str:
    """A document as text, without the end mark that separates documents."""
    return item.text if item.text is not None else render(item.messages, item.tools)


if __name__ == "__main__":
    for _, shown in zip(range(40), examples(1), strict=False):
        print(f"=== {shown.task}\n{to_text(shown)}")
