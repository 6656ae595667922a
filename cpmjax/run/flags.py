"""Values of flags: lists and positive numbers. Each raises what argparse expects of a type."""

from __future__ import annotations

import argparse


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text!r}") from error


def positive(text: str) -> int:
    (number,) = whole_numbers(text) or (0,)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return number


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number
