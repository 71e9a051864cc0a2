"""Run another project's test suite twice, with its models as they are and patched, and compare.

python tests/foreign/run.py transformers CHECKOUT [--only bert,roberta] [--jobs 2]

Exits 1 where a test's outcome differs and known.toml doesn't say why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import stand_ins

HERE = Path(__file__).parent
FAST = "fast"
# From better to worse.
OUTCOMES = ("passed", "skipped", "failed")


class Suite(NamedTuple):
    """Where a project has the tests that concern encoders."""

    place: str  # of a part, from the checkout's root
    parts: str  # those that --only chooses from
    source: str | None = None  # of the project's own package, to run instead of the installed one
    marks: str = ""  # pytest's -m


FAMILIES = (
    "albert,bert,camembert,deberta,deberta_v2,distilbert,electra,modernbert,mpnet,roberta,"
    "xlm_roberta,xlm_roberta_xl"
)
SUITES = {
    "transformers": Suite("tests/models/{0}/test_modeling_{0}.py", FAMILIES),
    "sentence-transformers": Suite(
        "tests/{0}",
        "base,cross_encoder,multi_vector_encoder,sentence_transformer,sparse_encoder,util",
        source=".",
        marks="not slow and not custom",
    ),
    "peft": Suite(
        "tests/test_{0}.py",
        "feature_extraction_models,seq_classifier,low_level_api,other",
        source="src",
    ),
}


@dataclass
class Outcomes:
    """What a run of a suite came to: the outcome of each test, and the calls of its encoders."""

    tests: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, path: Path) -> Outcomes:
        """A test's outcome is the worst of its reports: for setup, call and teardown."""
        outcomes = cls()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            report = json.loads(line)
            test, outcome = report["test"], report["outcome"]
            outcomes.tests[test] = max(
                outcome, outcomes.tests.get(test, outcome), key=OUTCOMES.index
            )
            outcomes.calls.update(report["calls"])
        return outcomes


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    suite = SUITES[options.suite]
    checkout = options.checkout.resolve()
    places = [suite.place.format(part) for part in (options.only or suite.parts).split(",")]
    missing = [place for place in places if not (checkout / place).exists()]
    if missing:
        sys.exit(f"{checkout} has no {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        runner = _Runner(suite, checkout, Path(folder), options.k, options.timeout)
        stand_ins.make(runner.hub, sentences=options.suite == "sentence-transformers")
        plain = runner.run(places, options.jobs, patched=False)
        fast = runner.run(places, options.jobs, patched=True)
        differing = _differing(plain, fast)
        # What also differs between two runs of the same kind is no difference of ours.
        if differing:
            again = [runner.run(differing, 0, patched=p, trace="short") for p in (False, True)]
            differing = [test for test in differing if _differ(*again, test)]
    known = tomllib.loads(options.known.read_text(encoding="utf-8")).get(options.suite, [])
    return _tell(known, plain, fast, differing)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("checkout", type=Path, help="the project's source, with its tests")
    parser.add_argument("--only", help="parts of the suite, with commas between them")
    parser.add_argument(
        "--known",
        type=Path,
        default=HERE / "known.toml",
        help="differences that docs/patching.md lists, with the reason",
    )
    parser.add_argument("-k", default="", help="of these parts, the tests that pytest's -k chooses")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest-xdist")
    parser.add_argument("--timeout", type=int, default=120, help="seconds that a test may take")
    return parser.parse_args(argv)


@dataclass
class _Runner:
    suite: Suite
    checkout: Path
    folder: Path
    keyword: str
    timeout: int
    runs: int = 0

    @property
    def hub(self) -> Path:
        return self.folder / "hub"

    def run(self, tests: Iterable[str], jobs: int, *, patched: bool, trace: str = "no") -> Outcomes:
        """Run tests, by place or by id."""
        self.runs += 1
        outcomes = self.folder / f"outcomes-{self.runs}"
        chosen = self.folder / f"tests-{self.runs}"
        chosen.write_text("\n".join(tests), encoding="utf-8")
        # The project's own options may need plugins that aren't here.
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-o", "log_cli=false"]
        command += ["-p", "plugin", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["--disable-warnings", "--no-header", f"--tb={trace}"]
        command += ["-k", self.keyword, "-m", self.suite.marks]
        command += ["-n", str(jobs), f"--timeout={self.timeout}"]
        command += [f"--outcomes={outcomes}", *(["--patched"] if patched else []), f"@{chosen}"]
        subprocess.run(command, cwd=self.checkout, env=self._environment(), check=False)
        return Outcomes.read(outcomes)

    def _environment(self) -> dict[str, str]:
        paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        if self.suite.source is not None:
            paths.insert(0, str(self.checkout / self.suite.source))
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(self.hub),
            # Some tests go online whatever the line above says: refused at once, they take no time.
            "HF_ENDPOINT": "http://127.0.0.1:9",
        }


def _differ(plain: Outcomes, fast: Outcomes, test: str) -> bool:
    return plain.tests.get(test) != fast.tests.get(test)


def _differing(plain: Outcomes, fast: Outcomes) -> list[str]:
    return sorted(t for t in plain.tests | fast.tests if _differ(plain, fast, t))


def _tell(
    known: list[dict[str, str]], plain: Outcomes, fast: Outcomes, differing: list[str]
) -> int:
    """Print how the runs compare; returns the exit status."""
    unknown = 0
    for test in differing:
        reason = next((k["reason"] for k in known if fnmatch(test, k["test"])), None)
        unknown += reason is None
        before, after = plain.tests.get(test, "not run"), fast.tests.get(test, "not run")
        print(f"{'DIFFERS' if reason is None else 'known'}: {test}")
        print(f"  {before}, patched {after}{'' if reason is None else f': {reason}'}")
    for name, outcomes in (("unpatched", plain), ("patched", fast)):
        counts = Counter(outcomes.tests.values())
        listed = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
        print(f"{name}: {len(outcomes.tests)} tests, {listed}")
    total, ran_fast = fast.calls.total(), fast.calls[FAST]
    print(f"fast: {ran_fast} of {total} calls ({ran_fast / max(total, 1):.0%}); the others:")
    for reason, count in fast.calls.most_common():
        if reason != FAST:
            print(f"  {count} x {reason}")
    print(f"{len(differing) - unknown} known differences, {unknown} others")
    # Where nothing passes, the suite didn't run.
    return 1 if unknown or "passed" not in plain.tests.values() else 0


if __name__ == "__main__":
    sys.exit(main())
