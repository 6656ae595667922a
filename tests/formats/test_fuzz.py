"""A few thousand of the mutants of experiments/benchmarks/fuzz_readers.py, and whether it would find anything."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from cpmjax.formats.safetensors_files import open_safetensors
from cpmjax.run.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import fuzz_readers
from fuzz_readers import READERS, Reader, fuzz

SAMPLES = READERS[0].samples


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_readers_accept_or_refuse(reader):
    report = fuzz(reader, mutants=2000, seed=1)
    assert [wrong for wrong, _ in report.findings] == []
    assert report.accepted + report.refused == 2000
    # Both happen, or the damage is too coarse or too fine to show anything.
    assert min(report.accepted, report.refused) > 20


def raises(path):
    raise KeyError("a traceback")


def says_too_much(path):
    raise UserError(f"{path}: two\nlines")


def names_no_file(path):
    raise UserError("something is wrong")


def allocates(path):
    bytearray(10 << 20)
    return open_safetensors(path)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (raises, "KeyError: 'a traceback'"),
        (says_too_much, "not one line"),
        (names_no_file, "not one line"),
        (allocates, "bytes of memory"),
    ],
)
def test_a_reader_with_a_fault_is_found_out(wrong, said):
    report = fuzz(Reader("faulty", SAMPLES, wrong), mutants=1, seed=0)
    [(finding, mutant)] = report.findings
    assert said in finding and mutant


def test_time_is_looked_at(monkeypatch):
    monkeypatch.setattr(fuzz_readers, "_SECONDS", 0.0)
    report = fuzz(Reader("slow", SAMPLES, open_safetensors), mutants=1, seed=0)
    assert report.findings[0][0].endswith(" s")


def test_the_same_seed_gives_the_same_mutants():
    sample = SAMPLES()[0]
    first, second = ([fuzz_readers.mutate(sample, draw) for _ in range(50)] for draw in map(random.Random, (3, 3)))
    assert first == second
    assert len(set(first)) > 40
