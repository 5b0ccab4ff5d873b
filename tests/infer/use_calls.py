"""Calls of the commands that work through files, and the rows that they leave."""

import csv

import pyarrow.parquet as pq
from click.testing import CliRunner

from spcxr.cli import use

OUT = {"predict": "out.csv", "embed": "out.parquet", "explain": "out"}
DID = {"predict": "predicted", "embed": "embedded", "explain": "explained"}
COMMANDS = tuple(OUT)


def call(command, model, inputs, out, *flags):
    arguments = [command, str(model), *map(str, inputs), "--out", str(out)]
    return CliRunner().invoke(use, [*arguments, "--device", "cpu", "--precision", "fp32", *flags])


def rows(out):
    if out.suffix == ".parquet":
        return pq.read_table(out).to_pylist()
    with (out / "explain.csv" if out.is_dir() else out).open() as file:
        return list(csv.DictReader(file))
