"""What this cube is to reach, by step."""

from __future__ import annotations

import math
from dataclasses import dataclass

CUBE = "this cube"
PUBLISHED = "4.1.0"
BOTO3 = "bare boto3"
DATABASE = "database only"
# The same with many values, to see whether a value costs the same then.
MANY = {name: f"{name}, many values" for name in (CUBE, BOTO3, DATABASE)}

MANY_FACTOR = 10  # times as many

VALUE_STEPS = (
    "create",
    "read",
    "read_again",
    "select",
    "length",
    "update",
    "roll_back",
    "delete",
)
LARGE_STEPS = ("write_large", "read_large", "stream_large")
MEMORY_STEPS = ("memory_write_large", "memory_read_large", "memory_stream_large")
MANY_STEPS = {f"{step}_many": step for step in ("create", "read", "update", "delete")}
STEPS = (*VALUE_STEPS, *LARGE_STEPS, *MEMORY_STEPS, *MANY_STEPS)

WRITES = {"create", "update", "roll_back"}

MIB = 1 << 20

Figures = dict[str, dict[str, dict]]  # by contender and step


@dataclass
class Target:
    """What a step is to reach.

    :param text: in words
    :param limit: in seconds or bytes, None when there is only a condition
    :param reached: whether it does
    """

    text: str
    limit: float | None
    reached: bool


def judge(step: str, figures: Figures, values: int, large: int) -> Target | None:
    """The target of a step and whether it is reached, None if it has no target.

    :param values: how many values there are
    :param large: size of the large value, in bytes
    """
    try:
        return _judge(step, figures, values, large)
    except KeyError:  # a contender has been left out
        return None


def floor(step: str, figures: Figures) -> float | None:
    """What the step takes with boto3 alone, in seconds, the database's part added."""
    try:
        seconds = figures[BOTO3][step]["seconds"]
        if step in WRITES | {"delete"}:
            seconds += figures[DATABASE][step]["seconds"]
    except KeyError:
        return None
    return seconds


def _judge(step: str, figures: Figures, values: int, large: int) -> Target | None:
    def seconds(contender: str) -> float:
        return figures[contender][step]["seconds"]

    def within(text: str, limit: float, condition: bool = True) -> Target:
        return Target(text, limit, condition and seconds(CUBE) <= limit)

    if step in MEMORY_STEPS:
        text, limit = {
            "memory_write_large": ("0.1 x the value", 0.1 * large),
            "memory_read_large": ("1.1 x the value", 1.1 * large),
            "memory_stream_large": ("32 MiB", 32 * MIB),
        }[step]
        return Target(text, limit, figures[CUBE][step]["bytes"] <= limit)
    if step in MANY_STEPS:
        one = MANY_STEPS[step]
        factor = MANY_FACTOR * 1.1
        limit = factor * figures[CUBE][one]["seconds"]
        text = f"{factor:g} x {values:,} values"
        return Target(text, limit, figures[MANY[CUBE]][one]["seconds"] <= limit)
    requests = figures[CUBE][step]["requests"]
    if step in WRITES:
        limit = 1.25 * (seconds(BOTO3) + seconds(DATABASE))
        return within("1.25 x (boto3 + database)", limit)
    if step == "read":
        return within("1.25 x boto3", 1.25 * seconds(BOTO3))
    if step == "read_again":
        text = "1/20 of 4.1.0, no request"
        return within(text, seconds(PUBLISHED) / 20, not requests)
    if step == "select":
        return Target("no request", None, not requests)
    if step == "length":
        text = "1.25 x HEADs by boto3, no GET"
        return within(text, 1.25 * seconds(BOTO3), "GetObject" not in requests)
    if step == "delete":
        allowed = math.ceil(values / 1000)
        text = "1.1 x database + 1 request per 1,000"
        limit = 1.1 * seconds(DATABASE) + seconds(BOTO3)
        return within(text, limit, sum(requests.values()) <= allowed)
    if step in ("write_large", "read_large"):
        return within("1/5 of 4.1.0", seconds(PUBLISHED) / 5)
    return None
