"""Prompts of five domains, put together from templates: for comparing how much adapting a head gains on each.

The same name, number and seed give the same prompts. `tickets` also has the records that a fine-tuned target is to
write. Two prompts of one call are never the same.
"""

from __future__ import annotations

import json
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import shared
from draft.errors import UserError
from draft.files import atomic_file

MODULE = "benchmarks.domains"
EXAMPLES = f"""
examples:
  the prompts of the demonstration (no system prompt: its target was fine-tuned):
    python -m {MODULE} tickets --no-system --count 200 --seed 1 --out tickets.jsonl
  pairs to fine-tune a target on:
    python -m {MODULE} tickets --no-system --answers --count 300 --seed 2 --out pairs.jsonl
"""
Texts = Sequence[str]

PEOPLE = (
    "Maria Lopez", "Tom Becker", "Aisha Khan", "Jan Novak", "Grace Adeyemi", "Paul Dubois", "Lena Fischer", "Omar Said",
    "Emily Carter", "Kenji Sato", "Nina Rossi", "David Cohen", "Sara Lind", "Raj Patel", "Olga Petrova", "Ben Murphy",
    "Chloe Martin", "Lucas Silva", "Hana Kim", "Peter Walsh", "Fatima Noor", "Erik Berg", "Julia Wagner", "Sam Turner",
)  # fmt: skip
PRODUCTS = (
    "AirPure 300 air filter", "BrewMaster coffee machine", "CloudCam 2 camera", "FitBand Pro watch", "HomeHub speaker",
    "LumiDesk lamp", "NovaPad 11 tablet", "PixelPrint 5 printer", "QuietBuds headphones", "RideOn e-scooter",
    "SteamJet iron", "TrailPack rucksack", "UltraVac 9 vacuum cleaner", "VoltBank charger", "ZenChair office chair",
    "ChefMix blender", "AquaTimer sprinkler", "SnapLock door lock", "ThermoSense thermostat", "GlowStrip light",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")

# ---- support tickets ----


@dataclass(frozen=True)
class Matter:
    """A kind of support ticket: the customer's wordings, and the record's fields."""

    category: str
    team: str
    actions: Texts
    summary: str
    wordings: Texts


MATTERS = (
    Matter("billing", "payments", ("check_invoice", "refund_second_charge"), "Charged twice for the {product}.", (
        "I was charged twice for my {product} in {month}.",
        "My bank statement of {month} shows two payments for one {product}.",
        "Why did you take the money for the {product} two times?")),
    Matter("billing", "payments", ("check_invoice", "send_corrected_invoice"), "Wrong amount on the invoice.", (
        "The invoice for my {product} says {amount} dollars more than your page.",
        "You billed {amount} dollars too much for the {product}.",
        "The price of the {product} was lower when I ordered it, by {amount} dollars.")),
    Matter("delivery", "logistics", ("trace_parcel", "inform_customer"), "The {product} has not arrived.", (
        "My {product} was to arrive on {day} and it is still not here.",
        "I have been waiting for the {product} since {day}, and the tracking page does not change.",
        "Where is my {product}? It was promised for {day}.")),
    Matter("delivery", "logistics", ("arrange_pickup", "send_replacement"), "Wrong item delivered.", (
        "I ordered a {product} and the box had something else in it.",
        "The parcel that came on {day} was not the {product} that I had ordered.",
        "You sent me the wrong article instead of the {product}.")),
    Matter("defect", "repairs", ("open_repair", "send_label"), "The {product} does not turn on.", (
        "My {product} does not turn on any more.",
        "Since {day} the {product} is dead, whatever I press.",
        "The {product} worked for a week, and now nothing happens when I switch it on.")),
    Matter("defect", "repairs", ("open_repair", "send_spare_part"), "A part of the {product} is broken.", (
        "A part of the {product} was broken when I opened the box.",
        "The cover of my {product} has a crack, although I never dropped it.",
        "One piece of the {product} came off on {day}.")),
    Matter("return", "returns", ("send_label", "refund_order"), "Wants to return the {product}.", (
        "I would like to send the {product} back, it is too large for me.",
        "How can I return the {product}? I have not used it.",
        "The {product} is not what I expected, and I want my money back.")),
    Matter("account", "accounts", ("reset_password", "inform_customer"), "Cannot log in.", (
        "I cannot log in to see the order of my {product}.",
        "Your page does not accept my password, and I need the receipt for the {product}.",
        "The link to reset my password never comes, and I want to register the {product}.")),
    Matter("account", "accounts", ("change_address", "inform_customer"), "New delivery address.", (
        "I have moved, please change the address for the {product}.",
        "Please send the {product} to my new flat, not to the old address.",
        "The address for the {product} is wrong: I moved in {month}.")),
    Matter("question", "advice", ("answer_question",), "Asks about the warranty of the {product}.", (
        "How long is the warranty of the {product}?",
        "Does the warranty of the {product} cover damage by water?",
        "I bought the {product} in {month}; is it still under warranty?")),
)  # fmt: skip
TONES = (  # sentiment, priority, sentences
    ("angry", "high", ("This is unacceptable.", "I am really angry.", "Solve this today, or I go to a lawyer.")),
    ("annoyed", "high", ("I need this solved by {day}.", "It is urgent, please hurry.", "I write the second time.")),
    ("neutral", "normal", ("Please tell me what to do.", "Thank you for looking into it.", "I wait for your answer.")),
    ("friendly", "low", ("There is no hurry.", "Otherwise I am very happy with your shop!", "Have a nice weekend!")),
)  # fmt: skip
GREETINGS = ("Hello,", "Hi there,", "Dear team,", "Good morning,", "Good evening,", "To whom it may concern,", "Hi,")


def ticket(pick: random.Random) -> tuple[str, str]:
    """Return a customer's message, and its record as JSON."""
    matter, (sentiment, priority, closings) = pick.choice(MATTERS), pick.choice(TONES)
    product, name = pick.choice(PRODUCTS), pick.choice(PEOPLE)
    order = f"{pick.choice('ABCDEF')}-{pick.randrange(10000, 99999)}"
    slots = {"product": product.split(" ")[0] if pick.random() < 0.3 else product}
    slots |= {"day": pick.choice(DAYS), "month": pick.choice(MONTHS), "amount": str(pick.randrange(5, 60))}
    text = " ".join(pick.choice(options).format(**slots) for options in (matter.wordings, closings))
    number = pick.choice(("Order {}.", "My order number is {}.", "It is about order {}.")).format(order)
    record = {
        "category": matter.category,
        "team": matter.team,
        "priority": priority,
        "sentiment": sentiment,
        "customer": {"name": name, "order": order},
        "product": slots["product"],
        "summary": matter.summary.format(**slots),
        "actions": matter.actions,
        "needs_human": sentiment == "angry",
    }
    return f"{pick.choice(GREETINGS)} {text} {number} {name}", json.dumps(record, indent=2)


TICKET_SYSTEM = f"""Turn the customer's message into a JSON record with these fields, and write nothing else. Example:
{ticket(random.Random(5))[1]}"""

# ---- SQL ----

SQL_SYSTEM = """Write one SQL query for the question, and nothing else. Tables:
customers(id, name, city, country, created_at)
orders(id, customer_id, status, total, created_at)
order_items(order_id, product_id, quantity, price)
products(id, name, category, stock, price)
Example: How many orders were cancelled in 2023?
SELECT COUNT(*) AS number
FROM orders
WHERE status = 'cancelled' AND created_at >= '2023-01-01' AND created_at < '2024-01-01';"""
CITIES = ("Berlin", "Paris", "Madrid", "Oslo", "Lagos", "Boston", "Lima", "Osaka", "Delhi", "Cairo", "Rome", "Sydney")
KINDS = ("books", "garden tools", "lamps", "toys", "shoes", "kitchenware", "headphones", "bicycles", "paint", "chairs")
STATES = ("open", "paid", "shipped", "cancelled", "returned")
QUESTIONS = (
    "How many {state} orders did customers from {city} place in {year}?",
    "List the names of the {n} customers from {city} who spent most in {year}.",
    "What is the average total of {state} orders since {month} {year}?",
    "Which products of the category {kind} have fewer than {n} in stock?",
    "Show the revenue of the category {kind} for each month of {year}.",
    "Which customers from {city} have no {state} order?",
    "How many pieces of each product of the category {kind} were sold in {year}?",
    "List the {n} most expensive products of the category {kind} and their prices.",
    "Which cities had more than {n} {state} orders in {year}?",
    "Show the newest {n} orders of customers from {city} with their totals.",
    "What share of the orders of {year} is {state}?",
    "Which customers bought {kind} more than {n} times since {month} {year}?",
)


def question(pick: random.Random) -> str:
    slots: dict[str, Any] = {"city": pick.choice(CITIES), "kind": pick.choice(KINDS), "state": pick.choice(STATES)}
    slots |= {"year": pick.randrange(2015, 2026), "month": pick.choice(MONTHS), "n": pick.randrange(2, 40)}
    return pick.choice(QUESTIONS).format(**slots)


# ---- log lines ----

LOG_SYSTEM = """Turn the log line into a record of these fields, and write nothing else. Example:
2024-05-02 08:14:55,120 WARN [cart-service] (host c17) slow query: took 2310 ms, user 4411
timestamp: 2024-05-02T08:14:55.120Z
severity: warning
component: cart-service
node: c17
event: slow_query
duration_ms: 2310
user_id: 4411
needs_attention: no
explanation: A database query took longer than expected."""
SERVICES = (
    "auth-service",
    "payment-gateway",
    "search-api",
    "mail-worker",
    "image-resizer",
    "billing-cron",
    "web-front",
)
EVENTS = (
    "connection to the database lost after {ms} ms, user {user}",
    "slow query: took {ms} ms, user {user}",
    "upload failed: file too large, {ms} ms, user {user}",
    "login refused: wrong password, user {user}, {ms} ms",
    "retry {n} of 5 after {ms} ms, user {user}",
    "request finished with status {status} in {ms} ms, user {user}",
    "cache miss for key profile:{user}, loaded in {ms} ms",
    "queue is full: {n} jobs wait, oldest {ms} ms, user {user}",
)


def log_line(pick: random.Random) -> str:
    date = f"20{pick.randrange(20, 26)}-{pick.randrange(1, 13):02}-{pick.randrange(1, 29):02}"
    clock = f"{pick.randrange(24):02}:{pick.randrange(60):02}:{pick.randrange(60):02},{pick.randrange(1000):03}"
    slots = {"ms": pick.randrange(3, 9000), "user": pick.randrange(1000, 9999), "n": pick.randrange(1, 6)}
    event = pick.choice(EVENTS).format(status=pick.choice((200, 404, 429, 500, 503)), **slots)
    level, service = pick.choice(("DEBUG", "INFO", "WARN", "ERROR", "FATAL")), pick.choice(SERVICES)
    return f"{date} {clock} {level} [{service}] (host {pick.choice('abcd')}{pick.randrange(1, 30)}) {event}"


# ---- unit tests ----

FUNCTIONS = (
    ("def {verb}_{noun}(values, limit={n}):\n    return [v for v in values if v {sign} limit]", ("keep", "pick")),
    ("def {verb}_{noun}(values):\n    return sum(values) {operator} {n}", ("total", "sum")),
    ("def {verb}_{noun}(text, width={n}):\n    return text.strip().{method}()[:width]", ("clean", "shorten")),
    ("def {verb}_{noun}(a, b):\n    return (a {operator} b) % {n}", ("mix", "combine")),
    ("def {verb}_{noun}(items):\n    return len(items) {sign} {n}", ("has", "check")),
    ("def {verb}_{noun}(value, low=0, high={n}):\n    return max(low, min(high, value))", ("bound", "clamp")),
    ("def {verb}_{noun}(words):\n    return sorted(words, key=len)[:{n}]", ("rank", "order")),
    ("def {verb}_{noun}(count, price):\n    return count * price if count {sign} {n} else 0", ("price", "cost_of")),
)  # fmt: skip
NOUNS = ("scores", "prices", "names", "ages", "lines", "orders", "points", "labels", "sizes", "codes", "steps", "rates")


def function(pick: random.Random) -> str:
    code, verbs = pick.choice(FUNCTIONS)
    code = code.format(
        verb=pick.choice(verbs),
        noun=pick.choice(NOUNS),
        n=pick.randrange(2, 90),
        sign=pick.choice((">", "<", ">=", "<=")),
        operator=pick.choice(("+", "-", "*")),
        method=pick.choice(("lower", "upper", "title")),
    )
    return f"Write unit tests with pytest for this function. Write only code.\n```python\n{code}\n```"


# ---- German mails ----

GERMAN_SYSTEM = "Du bist der Kundendienst eines Ladens. Antworte auf Deutsch, höflich und kurz."
ARTICLES = (
    "die Kaffeemaschine", "den Staubsauger", "die Lampe", "das Tablet", "den Drucker", "die Kopfhörer", "den Stuhl",
    "das Bügeleisen", "den Rucksack", "die Kamera", "das Ladegerät", "den Mixer", "das Türschloss", "die Uhr",
)  # fmt: skip
GERMAN_DAYS = ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag")
MAILS = (
    "ich habe am {day} {article} bestellt, und bis heute ist nichts angekommen.",
    "Sie haben mir für {article} {n} Euro zu viel berechnet.",
    "ich möchte {article} zurückgeben, weil ich etwas anderes erwartet habe.",
    "wie lange habe ich Garantie, wenn ich {article} bei Ihnen kaufe?",
    "ich habe {article} am {day} ausgepackt, und ein Teil war zerbrochen.",
    "können Sie mir {article} an eine andere Adresse schicken?",
    "seit {day} kann ich {article} nicht mehr einschalten.",
    "gibt es {article} auch in einer anderen Farbe, und was kostet das?",
)
ENDINGS = (
    "Was soll ich tun?", "Bitte antworten Sie bald.", "Es ist dringend.", "Vielen Dank im Voraus.", "Bitte helfen Sie.",
)  # fmt: skip


def mail(pick: random.Random) -> str:
    slots = {"day": pick.choice(GERMAN_DAYS), "article": pick.choice(ARTICLES), "n": pick.randrange(3, 80)}
    greeting = pick.choice(("Guten Tag,", "Hallo,", "Sehr geehrte Damen und Herren,", "Liebes Team,"))
    order = f"Meine Bestellnummer ist {pick.randrange(10000, 99999)}."
    return f"{greeting} {pick.choice(MAILS).format(**slots)} {order} {pick.choice(ENDINGS)} {pick.choice(PEOPLE)}"


# ---- all of them ----


@dataclass(frozen=True)
class Domain:
    """A domain: its title, its system prompt, and a maker of prompts, or of pairs of prompt and answer."""

    title: str
    system: str
    make: Callable[[random.Random], str | tuple[str, str]]


DOMAINS = {
    "tickets": Domain("support tickets to JSON", TICKET_SYSTEM, ticket),
    "sql": Domain("questions to SQL", SQL_SYSTEM, question),
    "logs": Domain("log lines to records", LOG_SYSTEM, log_line),
    "tests": Domain("unit tests for functions", "", function),
    "german": Domain("German customer mails", GERMAN_SYSTEM, mail),
}


def conversations(name: str, count: int, seed: int, *, system: bool = True) -> list[tuple[list[dict[str, str]], str]]:
    """Return `count` different conversations of a domain as messages, each with its answer ("" where there is none).

    Raises:
        UserError: where its templates do not give so many.
    """
    domain, pick = DOMAINS[name], random.Random(f"{name} {seed}")
    made: dict[str, str] = {}
    for _ in range(20 * count):
        if len(made) == count:
            break
        each = domain.make(pick)
        prompt, answer = each if isinstance(each, tuple) else (each, "")
        made[prompt] = answer
    else:
        raise UserError(f"--count {count}: the templates of {name} give {len(made)} different prompts; take fewer.")
    start = [{"role": "system", "content": domain.system}] if system and domain.system else []
    return [([*start, {"role": "user", "content": prompt}], answer) for prompt, answer in made.items()]


def write(path: Path, name: str, count: int, seed: int, *, system: bool = True, answers: bool = False) -> None:
    """Write conversations as JSONL that `draft-train prepare` reads; answers: with the answers as last messages."""
    lines = []
    for messages, answer in conversations(name, count, seed, system=system):
        if answers and not answer:
            raise UserError(f"--answers: {name} has prompts only; choose tickets.")
        if answers:
            messages = [*messages, {"role": "assistant", "content": answer}]
        plain = len(messages) == 1
        row: dict[str, Any] = {"prompt": messages[0]["content"]} if plain else {"messages": messages}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    parser.add_argument("name", choices=tuple(DOMAINS), help="domain")
    parser.add("--count", shared.whole(1), default=200, metavar="N", help="number of conversations")
    parser.add("--seed", shared.whole(0), default=0, metavar="N", help="of the choice")
    parser.add("--no-system", action="store_true", help="leave the system prompt out")
    parser.add("--answers", action="store_true", help="add the answers (tickets)")
    parser.add("--out", metavar="FILE", required=True, help="JSONL file to write")
    return parser.parse_args(arguments)


def run(arguments: Namespace, command: Sequence[str]) -> int:
    path, given = Path(arguments.out), arguments
    write(path, given.name, given.count, given.seed, system=not given.no_system, answers=given.answers)
    return 0


main = partial(shared.run_program, parse, run)

if __name__ == "__main__":
    sys.exit(main())
