"""The option --results FILE of pytest: what came of each test, as JSON.

The file is renewed while the run goes on, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import collections
import json
import time
from pathlib import Path

WORST = ("failed", "error", "passed", "xfailed", "skipped")  # what a test with several reports counts as, worst first
INTERVAL = 5.0


class ResultFile:
    def __init__(self, path: str):
        from tests.common.devices import versions

        self.path = Path(path)
        self.data = {"what": "tests of this tree; see tests/common/result_file.py", "versions": versions("flagos")}
        self.start = self.written = time.monotonic()
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.reasons: collections.Counter = collections.Counter()

    def pytest_runtest_logreport(self, report):
        outcome = report.outcome
        if outcome == "passed" and report.when != "call":
            return
        if outcome == "failed" and report.when != "call":
            outcome = "error"
        if outcome == "skipped":
            if hasattr(report, "wasxfail"):
                outcome = "xfailed"
            else:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                self.reasons[reason.removeprefix("Skipped: ")] += 1
        if outcome in ("failed", "error"):
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures[report.nodeid] = (crash.message if crash else str(report.longrepr)).strip()[:500]
        before = self.outcomes.get(report.nodeid, outcome)
        self.outcomes[report.nodeid] = min(before, outcome, key=WORST.index)
        if time.monotonic() - self.written > INTERVAL:
            self.write(finished=False)

    def pytest_sessionfinish(self, session, exitstatus):
        self.write(finished=int(exitstatus) in (0, 1))

    def write(self, finished: bool) -> None:
        self.written = time.monotonic()
        files: dict[str, collections.Counter] = {}
        for name, outcome in self.outcomes.items():
            files.setdefault(name.split("::")[0], collections.Counter())[outcome] += 1
        totals = sum(files.values(), collections.Counter())
        self.data |= {"finished": finished, "seconds": round(self.written - self.start), "totals": dict(totals)}
        self.data |= {"failures": self.failures, "skipped": dict(self.reasons.most_common())}
        self.data["files"] = {name: dict(files[name]) for name in sorted(files)}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        part.rename(self.path)
