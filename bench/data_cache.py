"""CollA's cache, measured: loading and distributing an image set for the first and for the second time.

    python bench/data_cache.py --data ../shared/data/cifar10

Both times run in this process and on one fresh cache folder, from `cifar10(...)` to the last site's images; the
first decodes and deals, the second finds both done.  Prints one JSON line: seconds, and first / second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import koinon.data as data


def load_and_distribute(folder: Path, sites: int) -> float:
    """Seconds until every site's training images can be taken, and one site's have been."""
    begin = time.perf_counter()
    split = data.cifar10(folder).split(data.dirichlet(0.3), sites=sites)
    split.describe()
    split.site(sites - 1)
    return time.perf_counter() - begin


def main() -> None:
    """Measure once cold and `--repeats` times warm."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    arguments.add_argument("--sites", type=int, default=100)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KOINON_CACHE"] = folder
        first = load_and_distribute(given.data, given.sites)
        second = statistics.median(load_and_distribute(given.data, given.sites) for _ in range(given.repeats))
    print(
        json.dumps(
            {
                "bench": "data_cache",
                "first": round(first, 3),
                "second": round(second, 4),
                "ratio": round(first / second, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
