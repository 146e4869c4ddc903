"""The speed table: ``python -m tests.benchmarks [NAMES...] --data PATH --out docs/performance.md``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from tests.benchmarks.measure import isolated
from tests.benchmarks.rows import Row, left_open, machine, to_frame, to_markdown

# Name: (function, seconds after which it is given up). Each runs in a process of its own.
BENCHMARKS = {
    "embed": ("embedding:embed", 600),
    "slide": ("slides:slide", 900),
    "preprocessing": ("preprocessing:preprocessing", 200),
    "graph": ("preprocessing:graphs", 300),
    "training": ("training:training", 900),
    "scaling": ("training:scaling", 300),
    "gpu": ("gpu:gpu", 400),
}

TITLES = {
    "embed": "A section: `tl.embed` against its network",
    "slide": "Many bins of a large image",
    "preprocessing": "Niches and their mean expression",
    "graph": "The niche graph of a million spots",
    "training": "Training: pairs of spot and niche per second",
    "scaling": "Training with two processes",
    "gpu": "On a GPU",
}

PREFACE = """# Speed and memory

What `stalign` costs, measured side by side with what it is compared with, each section of this page in one run:

```bash
{command}
```

{machine}.

Ratios are medians of repeats in turns, unless a line says otherwise. GB are 10⁹ bytes; memory is the largest resident
memory of a process that does nothing else. A target that was not reached says "no".
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAMES", help=f"any of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--data", type=Path, help="folder with crc_visium/; without it lines on real data stay open")
    parser.add_argument(
        "--out", type=Path, default=Path("performance.md"), help="Markdown table; a .csv is written beside it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: to see that everything runs, not for figures"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; all cores by default")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    return arguments


def run(name: str, arguments: argparse.Namespace) -> tuple[pd.DataFrame, bool]:
    """Run one benchmark; a failure becomes a line of the table."""
    target, timeout = BENCHMARKS[name]
    data = None if arguments.data is None else str(arguments.data.resolve())
    try:
        found = isolated(target, threads=arguments.threads, timeout=timeout, data=data, quick=arguments.quick)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return to_frame(name, [left_open("the whole benchmark", "", f"it failed ({error})")]), False
    return to_frame(name, [Row(*row) for row in found]), True


def merge(table: pd.DataFrame, before: Path) -> pd.DataFrame:
    """Keep the lines of benchmarks that did not run this time, in the usual order."""
    if before.is_file():
        kept = pd.read_csv(before)
        table = pd.concat([table, kept[~kept["benchmark"].isin(table["benchmark"])]], ignore_index=True)
    place = {name: number for number, name in enumerate(BENCHMARKS)}
    return table.sort_values("benchmark", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def main() -> int:
    arguments = parse()
    described = machine()
    print(described, flush=True)
    tables, fine = [], True
    for name in arguments.names or BENCHMARKS:
        print(f"\n{name} …", flush=True)
        start = time.perf_counter()
        table, succeeded = run(name, arguments)
        fine &= succeeded
        tables.append(table.assign(machine=described))
        for row in table.itertuples():
            print(f"  {row.what}: {row.measured}" + (f" (target {row.target})" if row.target else ""), flush=True)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    table = merge(pd.concat(tables, ignore_index=True), arguments.out.with_suffix(".csv"))
    command = f"python -m tests.benchmarks --data PATH --out {arguments.out}" + (" --quick" if arguments.quick else "")
    preface = PREFACE.format(command=command, machine=described)
    if arguments.quick:
        preface += "\n**Small sizes, to see that everything runs: no figures to go by.**\n"
    arguments.out.write_text(to_markdown(table, preface, TITLES), encoding="utf-8")
    table.to_csv(arguments.out.with_suffix(".csv"), index=False)
    print(f"\nWrote {arguments.out} and {arguments.out.with_suffix('.csv')}.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
