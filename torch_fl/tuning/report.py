"""What tune() has found out: a report that prints as a table, writes the conf file, and can be stored as JSON."""

import importlib.metadata
import json
import platform
from pathlib import Path

import torch

from torch_fl import flagos, integration, routing
from torch_fl.tuning import choose
from torch_fl.tuning.choose import Row


def where() -> dict:
    """What the measurements hold for."""
    data = {
        "device": flagos.get_device_name(),
        "chip": routing.chip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "flag_gems": integration.installed_version() or "none",
    }
    for name in ("torch_fl", "triton"):
        try:
            data[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        data["cuda"] = torch.version.cuda
    return data


class Tuned:
    """The outcome of tune(): prints as a table; `write()` makes the conf, `as_dict()` what --json prints."""

    def __init__(
        self,
        where: dict,
        clock: str,
        rows: list[Row],
        left_out: dict[str, str],
        unseen: list[str],
        seconds: float,
        trial: dict | None = None,
    ):
        self.where, self.clock, self.rows, self.seconds = where, clock, rows, seconds
        self.left_out, self.unseen = left_out, unseen  # operators: called and not measured, not called
        self.trial = trial  # what the workload's runs under each set of routes came to
        by_op: dict[str, list[Row]] = {}
        for row in rows:
            by_op.setdefault(row.op, []).append(row)
        self.decisions = {op: choose.decide(mine, clock) for op, mine in sorted(by_op.items())}

    def by(self, clock: str, trial: dict | None = None) -> "Tuned":
        """What another clock, or "native", makes of the same measurements."""
        return Tuned(self.where, clock, self.rows, self.left_out, self.unseen, self.seconds, trial)

    def routes(self) -> dict[str, list]:
        return {op: decision.lines for op, decision in self.decisions.items()}

    def as_dict(self) -> dict:
        decisions = {
            op: {"lines": [_line(op, *line) for line in d.lines], "host": d.host, "device": d.device, "why": d.why}
            for op, d in self.decisions.items()
        }
        return {
            "where": self.where,
            "clock": self.clock,
            "seconds": self.seconds,
            "gains": self.gains(),
            "trial": self.trial,
            "routes": decisions,
            "left_out": self.left_out,
            "unseen": self.unseen,
            "rows": [row.as_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: dict) -> "Tuned":
        """What as_dict() told of; the decisions are made anew from the measurements."""
        rows = [Row.from_dict(row) for row in data["rows"]]
        names = ("left_out", "unseen", "seconds", "trial")
        return cls(data["where"], data["clock"], rows, *(data[name] for name in names))

    def gains(self) -> dict[str, float]:
        """Time of all measured calls with the chosen routes relative to native, on each clock; 1 without calls."""
        totals = {}
        for name in ("host", "device"):
            native = chosen = 0.0
            for row in self.rows:
                seconds = row.calls * getattr(row, name)
                native += seconds
                chosen += seconds * getattr(self.decisions[row.op], name)
            totals[name] = chosen / native if native else 1.0
        return totals

    def conf(self) -> str:
        """The text of the conf file."""
        versions = ", ".join(f"{name} {value}" for name, value in self.where.items() if name not in ("device", "chip"))
        lines = [
            "# Routes chosen by `python -m torch_fl tune` or torch_fl.tune(); load them with FLAGOS_BACKEND_CONFIG.",
            f"# Measured on {self.where['device']} (chip {self.where['chip']}), {versions}.",
            "# They hold for that device and those versions. Below an operator: calls in the workload, microseconds of",
            "# one native call, then each backend's time relative to it +- the spread of native against itself.",
            *(f"# {line}" for line in self._trial_lines()),
        ]
        for op, decision in self.decisions.items():
            lines += ["", *(_line(op, *line) for line in decision.lines)]
            if not decision.lines:
                lines.append(f"# {op}: stays with the default; {decision.why or 'native'}")
            elif decision.why:
                lines.append(f"# {decision.why}")
            lines += [f"#   {text}" for row in self.rows if row.op == op for text in _figures(row)]
        routed = [op for op in self.left_out if op not in self.decisions]
        if routed:
            lines += ["", "# Called, and not measured: they stay native."]
            lines += [f"{_line(op, 'native', ''):<44} # {self.left_out[op]}" for op in sorted(routed)]
        if self.unseen:  # autograd calls some only when nobody watches: `add_` where an observer sees `add`
            lines += ["", "# Not called while tune was watching: nobody has timed another kernel for them."]
            lines += [_line(op, "native", "") for op in sorted(self.unseen)]
        return "\n".join(lines) + "\n"

    def _trial_lines(self):
        if not self.trial:
            return
        tried = self.trial
        yield f"tried on the workload, {tried['rounds']} rounds; taken: {tried['taken']}; of native's speed, by the"
        yield "clock that chose the routes, with the interval of the median (95 %):"
        for clock, parts in tried["speeds"].items():
            words = [f"part {n} {p['ratio']:.3f} ({p['low']:.3f} to {p['high']:.3f})" for n, p in enumerate(parts, 1)]
            yield f"  {clock}: " + ", ".join(words)

    def write(self, path: str | Path) -> None:
        Path(path).write_text(self.conf(), encoding="utf-8")

    def __str__(self):
        head = f"{'operator':<34} {'route':<40} {'calls':>8} {'device':>7} {'host':>7}"
        lines = [f"{self.where['device']}, {len(self.rows)} groups of calls in {self.seconds:.0f} s", head]
        for op, decision in self.decisions.items():
            calls = sum(row.calls for row in self.rows if row.op == op)
            route = "; ".join(f"{b} [{c}]" if c else b for b, c in decision.lines) or "default"
            figures = f"{calls:>8} {decision.device:>7.2f} {decision.host:>7.2f}"
            lines.append(f"{op:<34} {route:<40} {figures}  {decision.why}".rstrip())
        lines += [f"{op:<34} {'native, not measured':<40} {why}" for op, why in sorted(self.left_out.items())]
        gains = self.gains()
        lines.append(f"all measured calls: device {gains['device']:.3f}, host {gains['host']:.3f} of native's time")
        lines += self._trial_lines()
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)


def _line(op: str, backend: str, condition: str) -> str:
    return f"{op} = {backend}" + (f" [{condition}]" if condition else "")


def _figures(row: Row):
    name = row.condition or "every call"
    if row.why:
        yield f"{name}: {row.calls} calls, not measured: {row.why}"
        return
    timed = [
        f"{backend} device {d.ratio:.2f} +- {d.noise:.2f}, host {h.ratio:.2f} +- {h.noise:.2f}"
        for backend, (h, d) in row.clocks.items()
    ]
    yield f"{name}: {row.calls} calls, native device {1e6 * row.device:.1f} host {1e6 * row.host:.1f}" + "".join(
        f"; {text}" for text in timed
    )
    for backend, why in row.refused.items():
        yield f"{name}: {backend} not taken: {why}"
