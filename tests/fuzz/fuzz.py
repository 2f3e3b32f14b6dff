"""Reads altered files by the thousand, and tells what came of them.

    python -m tests.fuzz.fuzz --cases 10000
    python -m tests.fuzz.fuzz --cases 10000 --atheris    guided by coverage, if atheris is installed

A case is a seed: what fails is made again by ``--first SEED --cases 1``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.fuzz.targets import TARGETS

CASE_S = 20
MOST_MB = 600


def fuzz(target: str, first: int, cases: int) -> dict[str, Any]:
    """Runs cases of one target in this process.

    Returns:
        ``target, cases, refused, read, accepted, faults, seconds, grown_mb``; ``faults`` are other exceptions, hangs
        and altered bytes that were accepted, with their seeds, and ``grown_mb`` is by how much memory peaked above
        what was there at the start.
    """
    signal.signal(signal.SIGALRM, _too_long)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = TARGETS[target](Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(first, first + cases):
            signal.alarm(CASE_S)
            try:
                outcome = made(random.Random(seed))
            except BaseException:
                outcome = "failed"
                faults.append(f"seed {seed}: " + traceback.format_exc().strip())
            finally:
                signal.alarm(0)
            if outcome == "accepted":
                faults.append(f"seed {seed}: altered bytes were accepted")
            counts[outcome] += 1
            if len(faults) >= 5:
                break
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "target": target, "cases": sum(counts.values()), **{k: counts[k] for k in ("refused", "read", "accepted")},
        "faults": faults, "seconds": time.monotonic() - began, "grown_mb": grown,
    }  # fmt: skip


def fuzz_apart(target: str, first: int, cases: int) -> dict[str, Any]:
    """The same in a process of its own, so that its memory can be told."""
    words = [sys.executable, "-m", "tests.fuzz.fuzz", "--target", target, "--first", str(first), "--cases", str(cases)]
    done = subprocess.run([*words, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _guided(target: str, cases: int) -> None:
    """Lets atheris choose the seeds' bytes by what of the readers they reach."""
    import atheris

    with atheris.instrument_imports(include=["metadist"]):
        import metadist.checkpoint  # noqa: F401
        import metadist.config  # noqa: F401
        import metadist.data  # noqa: F401
    folder = tempfile.mkdtemp()
    made = TARGETS[target](Path(folder))

    def one(data: bytes) -> None:
        assert made(random.Random(data)) != "accepted"

    atheris.Setup([sys.argv[0], f"-runs={cases}", "-max_len=64"], one)
    atheris.Fuzz()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--atheris", action="store_true")
    options = parser.parse_args()
    failed = False
    for target in options.target or sorted(TARGETS):
        if options.atheris:
            _guided(target, options.cases)
            continue
        told = fuzz(target, options.first, options.cases)
        failed |= bool(told["faults"])
        if options.json:
            print(json.dumps(told))
        else:
            print(
                f"{target}: {told['cases']} cases in {told['seconds']:.0f} s: {told['refused']} refused, "
                f"{told['read']} read, {told['accepted']} accepted though altered, {len(told['faults'])} faults; "
                f"memory grew by {told['grown_mb']:.0f} MB"
            )
            print("\n".join(told["faults"]))
    sys.exit(failed and not options.json)


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"a case took more than {CASE_S} s")


if __name__ == "__main__":
    main()
