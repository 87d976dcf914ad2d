# ruff: noqa: E501  sentences in tables
"""Conversations with planted faults, to measure rules by: written from the papers' and the field's descriptions of faults.

It imports nothing of the curation it is used on and was committed before the rules were. Eagle 2 filters mismatched
questions and answers, repeated text and numeric formatting that cannot be read off the image; collections of web data
add languages, sizes and shapes of images, and media that records name wrongly. Clean conversations hold what looks like a
fault and is none: refrains, tables, boxes with decimals, alternatives asked with "is", translations, quoted apologies.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

KINDS = (
    "repeated_lines", "repeated_phrase", "decimals", "no_such_option", "yes_no_number", "count_in_words", "empty",
    "refusal", "leak", "role_order", "language", "small_image", "extreme_aspect", "unshown_image", "missing_image",
)  # fmt: skip

Turns = list[tuple[str, str]]  # (question, answer)

THINGS = (
    "car",
    "dog",
    "house",
    "tree",
    "boat",
    "bicycle",
    "lamp",
    "table",
    "bottle",
    "train",
    "horse",
    "clock",
    "bench",
)
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
PLACES = ("on the left", "on the right", "in the background", "near the river", "beside the road", "under the bridge")
PEOPLE = ("a woman", "a man", "two children", "an old sailor", "a cyclist", "a group of tourists")
DOING = ("walking", "waiting", "talking", "reading a newspaper", "eating lunch", "taking photographs")
COUNTRIES = ("France", "Kenya", "Brazil", "Japan", "Canada", "Norway", "India", "Peru", "Egypt", "Spain")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FOREIGN = {
    "de": (
        "Auf dem Bild sieht man eine belebte Straße mit vielen Menschen und bunten Geschäften.",
        "Der Hund liegt neben dem Tisch und wartet darauf, dass sein Herr nach Hause kommt.",
        "Welche Farbe hat das Auto, das vor dem großen Gebäude auf der rechten Seite steht?",
        "Im Hintergrund erheben sich schneebedeckte Berge über einem ruhigen See.",
    ),
    "fr": (
        "On voit sur cette image une rue animée avec beaucoup de gens et des boutiques colorées.",
        "Le chien est couché près de la table et attend que son maître rentre à la maison.",
        "De quelle couleur est la voiture qui se trouve devant le grand bâtiment à droite ?",
        "À l'arrière-plan, des montagnes enneigées se dressent au-dessus d'un lac tranquille.",
    ),
    "es": (
        "En la imagen se ve una calle llena de gente y de tiendas de muchos colores.",
        "El perro está acostado junto a la mesa y espera que su dueño vuelva a casa.",
        "¿De qué color es el coche que está delante del gran edificio de la derecha?",
        "Al fondo se levantan montañas nevadas sobre un lago muy tranquilo.",
    ),
    "it": (
        "Nell'immagine si vede una strada affollata con molte persone e negozi colorati.",
        "Il cane è sdraiato accanto al tavolo e aspetta che il suo padrone torni a casa.",
        "Di che colore è la macchina che si trova davanti al grande edificio sulla destra?",
    ),
    "ru": (
        "На картинке видна оживлённая улица со множеством людей и яркими магазинами.",
        "Собака лежит рядом со столом и ждёт, когда хозяин вернётся домой.",
        "Какого цвета машина, которая стоит перед большим зданием справа?",
    ),
    "zh": ("图片里可以看到一条热闹的街道，有很多行人和五颜六色的商店。", "狗躺在桌子旁边，等着主人回家。", "右边大楼前面的汽车是什么颜色的？"),
    "ja": ("写真にはたくさんの人とカラフルなお店がある賑やかな通りが写っています。", "犬はテーブルのそばに横たわって、飼い主の帰りを待っています。"),
    "ar": ("تظهر في الصورة شارع مزدحم فيه الكثير من الناس والمحلات الملونة.", "الكلب مستلق بجانب الطاولة وينتظر عودة صاحبه إلى المنزل."),
}  # fmt: skip


@dataclass
class Draft:
    """A conversation before it is written. turns: (role, text); images: names; shown: markers in the first question."""

    turns: list[tuple[str, str]]
    images: list[str]
    shown: int
    extra: dict[str, Any] = field(default_factory=dict)


def _sentence(rng: random.Random) -> str:
    thing, colour, place = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(PLACES)
    who, does = rng.choice(PEOPLE), rng.choice(DOING)
    be = "are" if who.startswith(("two", "a group")) else "is"
    return rng.choice((
        f"A {colour} {thing} can be seen {place}.",
        f"{who.capitalize()} {be} {does} {place}, next to a {thing}.",
        f"The scene is dominated by a {thing}, painted {colour}, which stands {place}.",
        f"There is also a small {thing} {place}; its {colour} surface reflects the light.",
        f"{place.capitalize()}, {who} {be} {does}.",
        f"The weather seems to be {rng.choice(('sunny', 'cloudy', 'rainy', 'foggy'))}, and the {thing} looks {colour}.",
        f"Behind the {thing}, a row of {colour} houses runs along the horizon.",
    ))  # fmt: skip


def _paragraph(rng: random.Random, least: int = 2, most: int = 6) -> str:
    found: list[str] = []
    while len(found) < rng.randint(least, most):
        sentence = _sentence(rng)
        if sentence not in found:
            found.append(sentence)
    return " ".join(found)


def _caption(rng: random.Random) -> Turns:
    asks = ("Describe the image.", "What do you see?", "Give a detailed description of the picture.", "Caption this.")
    return [(rng.choice(asks), _paragraph(rng))]


def _short(rng: random.Random) -> Turns:
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    ask = rng.choice(
        (f"What colour is the {thing}?", f"Which colour does the {thing} have?", f"Name the {thing}'s colour.")
    )
    how = rng.choice(("", " Answer with a single word.", "\nAnswer the question using a single word or phrase."))
    return [(ask + how, rng.choice((colour, colour.capitalize(), f"{colour}.", f"The {thing} is {colour}.")))]


def _options(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Question with options, their letters, their texts."""
    texts = rng.sample(THINGS if rng.random() < 0.5 else COUNTRIES, rng.choice((3, 4, 4, 5)))
    letters = list("ABCDE"[: len(texts)])
    ask = rng.choice((
        "Which of these is shown?", "What is the main subject of the picture?", "Pick what fits the diagram best.",
        "Based on the map, which one is highlighted?", f"Who or what is {rng.choice(PLACES)}?",
    ))  # fmt: skip
    style = rng.choice(("{}. {}\n", "({}) {}\n", "{}) {}\n", "{}: {}\n", "({}) {} "))
    lead = rng.choice(("\n", "\nOptions:\n", "\nChoices:\n"))
    tail = rng.choice(("", "Answer with the option's letter from the given choices directly.", "Choose one."))
    listed = "".join(style.format(letter, text) for letter, text in zip(letters, texts, strict=True))
    return (ask + lead + listed + tail).strip(), letters, texts


def _choice(rng: random.Random) -> Turns:
    ask, letters, texts = _options(rng)
    number = rng.randrange(len(texts))
    letter, text = letters[number], texts[number]
    return [(ask, rng.choice((
        letter, f"{letter}.", f"({letter})", f"{letter}. {text}", text, f"The answer is {letter}.",
        f"{_sentence(rng)} Therefore the correct option is {letter}.", f"Answer: ({letter}) {text}", f"{letter}) {text}",
        f"Option {letter} is right, because of what stands {rng.choice(PLACES)}.",
    )))]  # fmt: skip


def _yes_no_question(rng: random.Random) -> str:
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    return rng.choice((
        f"Is there a {thing} {place}?", f"Does the picture show a {thing}?", f"Are there any people {place}?",
        f"Is the {thing} {rng.choice(COLOURS)}?", f"Do you see a {thing} {place}?", f"Was this taken {place}?",
        f"Is {rng.choice(COUNTRIES)} larger than {rng.choice(COUNTRIES)} in the chart?", f"Can a {thing} be seen {place}?",
        f"Is there a {thing} {place}? Answer yes or no.", f"Has the {thing} been moved {place}?",
    ))  # fmt: skip


def _yes_no(rng: random.Random) -> Turns:
    value = rng.randint(10, 90)
    return [(_yes_no_question(rng), rng.choice((
        "Yes", "No", "yes", "no", "Yes.", "No.", f"Yes, {value} against {value - 7}.", "No, it is not.", f"No, {_sentence(rng)}",
        "There is none.", "It does.", f"Yes, there are {rng.randint(2, 9)}.",
    )))]  # fmt: skip


def _looks_like_yes_no(rng: random.Random) -> Turns:
    thing, number = rng.choice(THINGS), rng.randint(0, 30)
    first, second = rng.sample(COLOURS, 2)
    return [rng.choice((
        (f"Is the {thing} {first} or {second}?", rng.choice((first, second))),
        ("Are there more dots or more squares?", rng.choice(("squares", "dots"))),
        ("Can you tell me what is written on the sign?", f"ROUTE {number}"),
        (f"Could you count the {thing}s?", str(number)),
        (f"Would you please tell me the price of the {thing}?", f"${number}.50"),
        (f"Is the value for {rng.choice(COUNTRIES)} {number} or {number + 4}?", str(number)),
        (f"Do you know how many {thing}s there are?", str(number)),
    ))]  # fmt: skip


def _count_question(rng: random.Random) -> str:
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    return rng.choice((
        f"How many {thing}s are there?", f"How many {thing}s can you see {place}?", f"Count the {thing}s {place}.",
        f"What is the number of {thing}s in the picture?", f"How many {rng.choice(COLOURS)} {thing}s are {place}?",
        f"Tell me how many {thing}s there are. Answer with a number.", "How many people are in the photo?",
    ))  # fmt: skip


def _count(rng: random.Random) -> Turns:
    number = rng.randint(0, 30)
    return [(_count_question(rng), rng.choice((
        str(number), f"{number}.", f"There are {number}.", f"I count {number} of them, one of which is {rng.choice(PLACES)}.",
    )))]  # fmt: skip


def _value(rng: random.Random) -> Turns:
    country, year, value = rng.choice(COUNTRIES), rng.randint(1990, 2023), rng.uniform(0, 900)
    exact = f"{rng.random():.4f}"
    table = "\n".join(f"{name} | {rng.random():.3f}" for name in rng.sample(COUNTRIES, 4))
    given = rng.choice(table.splitlines()).split(" | ")
    return [rng.choice((
        (f"What is the value of {country} in {year}?", rng.choice((f"{value:.0f}", f"{value:.1f}", f"{value:.2f}", f"{value:.1f}%"))),
        (f"How much did {country} spend in {year}?", f"${value * 1000:,.2f}"),
        (f"What share does {country} have? Give the answer to four decimal places.", exact),
        (f"{table}\nWhat is the value of {given[0]} in this table?", given[1]),
        (f"By how much did {country} grow from {year} to {year + 3}?", f"It grew by {value / 10:.1f} percent."),
        (f"Convert {exact} to a percentage.", f"{float(exact) * 100:.2f}%"),
        ("What is pi, to 5 digits after the point?", "3.14159"),
        (f"What is the average of {country} and {rng.choice(COUNTRIES)}, rounded to 3 decimals?", f"{value:.3f}"),
    ))]  # fmt: skip


def _ocr(rng: random.Random) -> Turns:
    number = rng.random()
    text = rng.choice((
        "STOP", "Sorry, we are closed", "Version 3.10.12", "192.168.17.254", f"Lead: {number / 50:.5f} mg/l", "営業中",
        "Ausgang", "12.05.2023", "No parking at any time, no parking, no stopping", "FRESH FISH FRESH FISH", "Défense de fumer",
        f"Invoice {rng.randint(1000, 99999)}\nTotal {number * 90:.2f}", "I cannot live without books",
    ))  # fmt: skip
    ask = ("Read the text in the image.", "What does the sign say?", "Transcribe all text.", "OCR this image.")
    return [(rng.choice(ask), text)]


def _boxes(rng: random.Random) -> Turns:
    thing = rng.choice(THINGS)
    left, top = rng.randint(0, 300), rng.randint(0, 300)
    corners = (left, top, left + rng.randint(20, 200), top + rng.randint(20, 200))
    shares = ", ".join(f"{corner / 600:.3f}" for corner in corners)
    whole = ", ".join(map(str, corners))
    return [rng.choice((
        (f"Locate the {thing} and give its bounding box.", f"[{whole}]"),
        (f"Where is the {thing}? Answer with normalised coordinates.", f"[{shares}]"),
        (f"Detect every {thing}.", f"<box>[[{whole}]]</box>"),
        (f"Give the box of the {thing} {rng.choice(PLACES)}.", f"({shares})"),
    ))]  # fmt: skip


def _table(rng: random.Random) -> Turns:
    rows = [f"| {name} | {rng.choice((0, 0, 1, 5))} | 0 | n/a |" for name in rng.sample(COUNTRIES, 6)]
    ask = (
        "Turn the chart into a table.",
        "Extract the data of this chart as markdown.",
        "Convert the figure to a table.",
    )
    return [(rng.choice(ask), "| Country | 2019 | 2020 | 2021 |\n| --- | --- | --- | --- |\n" + "\n".join(rows))]


def _reasoning(rng: random.Random) -> Turns:
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    return [rng.choice((
        (f"The rectangle has sides of {a} and {b}. What is its area? Think step by step.",
         f"Step 1: the area of a rectangle is $A = a \\cdot b$.\nStep 2: here $a = {a}$ and $b = {b}$.\n"
         f"Step 3: $A = {a} \\cdot {b} = {a * b}$.\nThe area is {a * b}."),
        (f"Solve $x + {a} = {a + b}$.",
         f"\\begin{{align*}}\nx + {a} &= {a + b} \\\\\nx &= {a + b} - {a} \\\\\nx &= {b}\n\\end{{align*}}"),
        (f"A train covers {a * 10} km in {b} hours. How fast is it?",
         f"Speed is distance over time: {a * 10} km / {b} h = {a * 10 / b:.2f} km/h."),
    ))]  # fmt: skip


def _text(rng: random.Random) -> Turns:
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    refrain = f"Oh {thing}, my {colour} {thing},"
    code = f"for (int i = 0; i < {rng.randint(2, 99)}; i++) {{\n    if (a[i] > 0) {{\n        {thing}++;\n    }}\n    if (b[i] > 0) {{\n        {colour}++;\n    }}\n}}"
    return [rng.choice((
        (f"The {thing} is {colour}. The box is old. What colour is the {thing}?", colour),
        (f'Say the word "{thing}".', thing),
        (f"Write a short song about a {thing}.", f"{refrain}\nI saw you {rng.choice(PLACES)},\n{refrain}\nand never went away."),
        ("Translate into German: The dog lies beside the table and waits until its master comes home.", FOREIGN["de"][1]),
        ("How do you say this in French: A busy street with many people can be seen in this picture.", FOREIGN["fr"][0]),
        ("Correct the grammar: The dog lie beside the table and wait for it master.", "The dog lies beside the table and waits for its master."),
        (f"Write a C loop that counts {thing}s.", f"```c\n{code}\n```"),
        ("Write a one-line apology to a customer.", "I'm sorry that your parcel arrived late; a refund is on its way."),
        (f"Repeat exactly: {refrain} you are fine and strong and very old.", f"{refrain} you are fine and strong and very old."),
        ("Give me five synonyms of fast.", "1. quick\n2. rapid\n3. swift\n4. speedy\n5. brisk"),
        (f"What are the rules of a game where a {thing} moves first?", _paragraph(rng, 3, 7)),
    ))]  # fmt: skip


def _unanswerable(rng: random.Random) -> Turns:
    return [
        (
            f"What is the price of the {rng.choice(THINGS)}? If it cannot be told from the image, say unanswerable.",
            "unanswerable",
        )
    ]


WITH_IMAGE: tuple[Callable[[random.Random], Turns], ...] = (
    _caption, _short, _choice, _yes_no, _looks_like_yes_no, _count, _value, _ocr, _boxes, _table, _reasoning, _unanswerable,
)  # fmt: skip


def _clean(rng: random.Random, pool: list[str]) -> Draft:
    if rng.random() < 0.12:
        turns, images = _text(rng), []
    else:
        turns, images = rng.choice(WITH_IMAGE)(rng), [rng.choice(pool)]
        while rng.random() < 0.25:
            turns = turns + rng.choice(WITH_IMAGE)(rng)
        if rng.random() < 0.08:
            images.append(rng.choice(pool))
            turns = [("What differs between the first and the second image?", _paragraph(rng))] + turns[1:]
    draft = Draft([part for q, a in turns for part in (("human", q), ("gpt", a))], images, len(images))
    if rng.random() < 0.05:
        draft.turns.insert(0, ("system", "You are a helpful assistant."))
    return draft


def _asked(rng: random.Random, pool: list[str], question: str, answer: str) -> Draft:
    """One faulty exchange, now and then behind or before clean ones."""
    draft = Draft([("human", question), ("gpt", answer)], [rng.choice(pool)], 1)
    if rng.random() < 0.3:
        before = rng.choice(WITH_IMAGE)(rng)[0]
        draft.turns = [("human", before[0]), ("gpt", before[1]), *draft.turns]
    if rng.random() < 0.2:
        after = rng.choice(WITH_IMAGE)(rng)[0]
        draft.turns += [("human", after[0]), ("gpt", after[1])]
    return draft


def _repeated_lines(rng: random.Random) -> tuple[str, str]:
    lines = [_sentence(rng) for _ in range(rng.randint(1, 3))]
    again = rng.choice(lines)
    at = rng.randint(0, len(lines))
    return _caption(rng)[0][0], "\n".join([*lines[:at], *[again] * rng.randint(3, 12), *lines[at:]])


def _repeated_phrase(rng: random.Random) -> tuple[str, str]:
    phrase = rng.choice((
        f"the {rng.choice(COLOURS)} {rng.choice(THINGS)} and ", f"{rng.choice(THINGS)} ", f"a {rng.choice(THINGS)} {rng.choice(PLACES)}, ",
        f"{_sentence(rng)} ", f"{rng.choice(COUNTRIES)}, ", "very very ", "it is, and then ",
    ))  # fmt: skip
    start = _paragraph(rng, 1, 3)
    return _caption(rng)[0][0], f"{start} {phrase * rng.randint(6, 30)}".strip()


def _decimals(rng: random.Random) -> tuple[str, str]:
    country, year, value = rng.choice(COUNTRIES), rng.randint(1990, 2023), rng.uniform(0, 900)
    written = rng.choice(
        (
            repr(value),
            f"{value:.6f}",
            f"{value:.8f}",
            f"{value:.5f}",
            f"{round(value, 1)}00000000000{rng.randint(1, 9)}",
        )
    )
    return rng.choice((
        (f"What is the value of {country} in {year}?", rng.choice((written, f"The value is {written}.", f"{written}%"))),
        (f"What is the average of {country} and {rng.choice(COUNTRIES)}?", written),
        (f"How long is the {rng.choice(THINGS)} in the drawing?", f"It measures {written} cm."),
        (f"By how much did {country} grow in {year}?", f"{country} grew by {written} percent in {year}."),
    ))  # fmt: skip


def _no_such_option(rng: random.Random) -> tuple[str, str]:
    ask, letters, texts = _options(rng)
    letter = rng.choice([one for one in "DEFGH" if one not in letters])
    text = rng.choice([one for one in (*COUNTRIES, *THINGS) if one not in texts])
    return ask, rng.choice(
        (
            letter,
            f"{letter}.",
            f"({letter})",
            f"The answer is {letter}.",
            text,
            f"{letter}. {text}",
            f"Answer: {letter}",
            text.capitalize(),
        )
    )


def _yes_no_number(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(0, 500)
    return _yes_no_question(rng), rng.choice((str(number), f"{number}.", f"{number / 10}", f"{number}%", f"${number}"))


def _count_in_words(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return _count_question(rng), rng.choice((
        word, word.capitalize(), f"{word}.", f"There are {word}.", "many", "a few", "several of them", "A lot", rng.choice(COLOURS),
        f"There are {word} {rng.choice(THINGS)}s.", f"{word.capitalize()} {rng.choice(THINGS)}s",
    ))  # fmt: skip


def _empty(rng: random.Random) -> tuple[str, str]:
    return _caption(rng)[0][0], rng.choice(("", " ", "\n", ".", "N/A", "-", "...", "None", "null", "?"))


def _refusal(rng: random.Random) -> tuple[str, str]:
    ask = rng.choice((_caption, _short, _count, _value))(rng)[0][0]
    return ask, rng.choice((
        "I'm sorry, but I can't assist with that request.", "As an AI language model, I cannot view images.",
        "Sorry, I am unable to see the image you are referring to.", "I apologize, but I cannot identify people in pictures.",
        "I'm sorry, I can't help with identifying this.", "As an AI, I don't have the ability to view pictures.",
        "I cannot provide a description of this image.", "Unfortunately, I'm not able to process images.",
        "I do not have access to the image, so I can't answer.", "I'm afraid I can't see any image here. Please upload it again.",
        "Sorry, but as a text-based model I cannot see what is in the picture.", "It is not possible for me to view the attached file.",
    ))  # fmt: skip


def _leak(rng: random.Random) -> tuple[str, str]:
    thing, colour, number = rng.choice(THINGS), rng.choice(COLOURS), rng.randint(2, 99)
    ask, letters, texts = _options(rng)
    right = rng.randrange(len(texts))
    caption = _paragraph(rng, 2, 4)
    return rng.choice((
        (f"What colour is the {thing}? (Answer: {colour})", colour),
        (f"What colour is the {colour} {thing}?", colour),
        (f"How many {thing}s are there? Hint: the answer is {number}.", str(number)),
        (f"{ask}\nAnswer: {letters[right]}", letters[right]),
        (f"{ask}\nThe correct answer is {letters[right]}.", f"{letters[right]}. {texts[right]}"),
        (f"{caption} Describe the image.", caption),
        (f"Describe the image.\n{caption}", caption),
        (f"The correct answer is {thing}. What is shown {rng.choice(PLACES)}?", thing),
        (f"Which colour does the {colour} {thing} have?", f"The {thing} is {colour}."),
        (f"What is the value of {rng.choice(COUNTRIES)}? Answer: {number}.", f"{number}"),
    ))  # fmt: skip


def _language(rng: random.Random) -> tuple[str, str]:
    told = FOREIGN[rng.choice(list(FOREIGN))]
    first, second = rng.sample(told, 2)
    return (first, second) if rng.random() < 0.6 else (_caption(rng)[0][0], f"{first} {second}")


EXCHANGES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "repeated_lines": _repeated_lines, "repeated_phrase": _repeated_phrase, "decimals": _decimals,
    "no_such_option": _no_such_option, "yes_no_number": _yes_no_number, "count_in_words": _count_in_words,
    "empty": _empty, "refusal": _refusal, "leak": _leak, "language": _language,
}  # fmt: skip


def _faulty(kind: str, rng: random.Random, pools: dict[str, list[str]]) -> Draft:
    if kind in EXCHANGES:
        return _asked(rng, pools["clean"], *EXCHANGES[kind](rng))
    draft = _clean(rng, pools["clean"])
    while not draft.images:
        draft = _clean(rng, pools["clean"])
    if kind == "role_order":
        _spoil_order(draft, rng)
    elif kind in ("small_image", "extreme_aspect"):
        draft.images[rng.randrange(len(draft.images))] = rng.choice(pools[kind])
    elif kind == "unshown_image":
        draft.images += rng.choices(pools["clean"], k=rng.randint(1, 3))
    elif rng.random() < 0.6:
        draft.shown += rng.randint(1, 2)
    else:
        ask = rng.choice(
            ("Describe the image.", "What is shown in the picture?", "What colour is the car in this photo?")
        )
        draft = Draft([("human", ask), ("gpt", _paragraph(rng))], [], 0)
    return draft


def _spoil_order(draft: Draft, rng: random.Random) -> None:
    talk = [number for number, (role, _) in enumerate(draft.turns) if role != "system"]
    how = rng.randrange(4)
    if how == 0:  # two questions in a row
        draft.turns.insert(talk[0], ("human", "Please look closely."))
    elif how == 1:  # an answer comes first
        draft.turns.insert(talk[0], ("gpt", "Hello! What would you like to know?"))
    elif how == 2:  # a question without an answer at the end
        draft.turns.append(("human", "Thank you. What else is there?"))
    else:  # two answers in a row
        draft.turns.insert(talk[1], ("gpt", "Let me see."))


def _record(draft: Draft, name: str, rng: random.Random) -> dict[str, Any]:
    marked = "<image>\n" * draft.shown
    turns, first = [], True
    for role, text in draft.turns:
        if role == "human" and first:
            text, first = marked + text, False
        turns.append({"from": role, "value": text})
    record: dict[str, Any] = {"id": name, "conversations": turns, **draft.extra}
    if draft.images:
        record["image"] = draft.images if len(draft.images) > 1 or rng.random() < 0.3 else draft.images[0]
    return record


def _draw(path: Path, size: tuple[int, int], rng: random.Random) -> None:
    colours = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(9)]
    picture = Image.new("RGB", size, colours[0])
    pen = ImageDraw.Draw(picture)
    for colour in colours[1:]:
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        box = (x, y, x + rng.randint(2, max(3, size[0] // 2)), y + rng.randint(2, max(3, size[1] // 2)))
        rng.choice((pen.rectangle, pen.ellipse))(box, fill=colour)
    picture.save(path)


def _pools(folder: Path, rng: random.Random) -> dict[str, list[str]]:
    (folder / "pictures").mkdir(parents=True)
    pools: dict[str, list[str]] = {"clean": [], "small_image": [], "extreme_aspect": []}
    for kind, many in (("clean", 120), ("small_image", 30), ("extreme_aspect", 30)):
        for number in range(many):
            long, short = rng.randint(64, 640), rng.randint(64, 400)
            if kind == "small_image":
                long, short = rng.randint(4, 120), rng.randint(4, 48)
            elif kind == "extreme_aspect":
                short = rng.randint(64, 90)
                long = short * rng.randint(18, 40)
            size = (long, short) if rng.random() < 0.6 else (short, long)
            name = f"pictures/{kind}-{number}.png"
            _draw(folder / name, size, rng)
            pools[kind].append(name)
    return pools


def write_planted(folder: Path, samples: int, *, seed: int, faulty: float = 0.3) -> dict[str, str | None]:
    """Writes ``folder/samples.jsonl`` and its pictures; returns the kind of fault of every sample by id, None if clean."""
    rng = random.Random(seed)
    pools = _pools(folder, rng)
    planted: dict[str, str | None] = {}
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for number in range(samples):
            kind = rng.choice(KINDS) if rng.random() < faulty else None
            draft = _clean(rng, pools["clean"]) if kind is None else _faulty(kind, rng, pools)
            name = f"planted-{number:05d}"
            planted[name] = kind
            file.write(json.dumps(_record(draft, name, rng), ensure_ascii=False) + "\n")
    return planted


if __name__ == "__main__":
    write_planted(Path(sys.argv[1]), int(sys.argv[2]), seed=1)
