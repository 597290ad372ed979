"""A task that a general model fails: shipping orders in plain English to the one-line records of a made-up system.

The format is told to nobody; it has to be learned from the answers. There are thousands of millions of possible orders,
so that held-out ones are new. The same seed gives the same orders.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

CITIES = (
    "Aarhus", "Bilbao", "Cardiff", "Dresden", "Espoo", "Florence", "Graz", "Haifa", "Izmir", "Jena", "Krakow", "Lyon",
    "Malmo", "Nantes", "Odessa", "Porto", "Riga", "Seville", "Turin", "Utrecht", "Vilnius", "Warsaw", "York", "Zagreb",
)  # fmt: skip
GOODS = (
    "copper wire", "green tea", "roof tiles", "bicycle pumps", "printing paper", "olive oil", "steel bolts", "wool",
    "table lamps", "dry beans", "window glass", "paint", "garden chairs", "cotton", "hand soap", "cable reels",
)  # fmt: skip
UNITS = {"crates": "CR", "pallets": "PL", "barrels": "BA", "boxes": "BX", "drums": "DR"}
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
PRIORITIES = {"This is urgent.": "A", "Normal priority.": "B", "There is no hurry.": "C"}
WORDINGS = (
    "Please ship {count} {unit} of {goods} from {start} to {end} by {day} {month}. {priority}",
    "We need {count} {unit} of {goods} in {end} on {month} {day}; they leave from {start}. {priority}",
    "{priority} {count} {unit} of {goods}, {start} to {end}, due {day} {month}.",
    "Book a transport to {end}: {count} {unit} of {goods}, loaded in {start}, before {day} {month}. {priority}",
    "Our {start} depot sends {goods}, {count} {unit}, to {end}. Arrival {month} {day}. {priority}",
)


def orders(number: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Pairs of an order and its record."""
    source = random.Random(seed)
    for _ in range(number):
        start, end = source.sample(CITIES, 2)
        goods, (unit, unit_code) = source.choice(GOODS), source.choice(list(UNITS.items()))
        month, day, count = source.randrange(12), source.randint(1, 28), source.randint(2, 99)
        said, priority = source.choice(list(PRIORITIES.items()))
        text = source.choice(WORDINGS).format(
            count=count, unit=unit, goods=goods, start=start, end=end, day=day, month=MONTHS[month], priority=said
        )
        where = f"{start[:3].upper()}>{end[:3].upper()}"
        yield text, f"#{priority} {where} {count:03d}{unit_code} [{goods}] {month + 1:02d}/{day:02d}"


def write(path: Path, number: int) -> None:
    """Conversations of one question and one answer, in OpenAI's layout."""
    lines = [
        {"messages": [{"role": "user", "content": order}, {"role": "assistant", "content": record}]}
        for order, record in orders(number)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
