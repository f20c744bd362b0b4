"""report(): what this process runs on and what it did, as a dictionary that prints as one screen."""

import platform
from html import escape
from pathlib import Path

import torch

from torch_fl import _C, flagos, routing


class Report(dict):
    """A dictionary whose text is meant to be read."""

    def __str__(self):
        lines = [
            f"torch_fl {self['torch_fl']}, torch {self['torch']}, Python {self['python']}",
            f"chip      {self['chip']}, {len(self['devices'])} device(s)",
        ]
        for device in self["devices"]:
            held = device["memory_reserved"] / 2**20
            used = device["memory_allocated"] / 2**20
            lines.append(f"  {device['device']:<9} {device['name']}: {used:.1f} MiB in tensors, {held:.1f} MiB held")
        backends = ", ".join(f"{name} {count}" for name, count in sorted(self["routes"].items()))
        lines.append(f"routes    {backends}")
        if self["fallbacks"]:
            lines.append("fallbacks " + ", ".join(f"{op} {count}" for op, count in sorted(self["fallbacks"].items())))
        else:
            lines.append("fallbacks none")
        if self["outside_limits"]:
            passed = sorted(self["outside_limits"].items())
            lines.append("outside the limits of flagos_python: " + ", ".join(f"{op} {count}" for op, count in passed))
        if self["calls"]:
            lines += ["", f"{'operator':<44} {'backend':<14} {'calls':>10} {'host ms':>10} {'us/call':>8}  host time"]
            for row in self["calls"]:
                each = 1000 * row["host_ms"] / row["calls"]
                lines.append(
                    f"{row['op']:<44} {row['backend']:<14} {row['calls']:>10} {row['host_ms']:>10.2f} {each:>8.1f} "
                    f"{row['host_share']:>9.1%}"
                )
        return "\n".join(lines)

    def plot(self, path: str | Path, most: int = 30) -> None:
        """Writes a bar chart of the host time per operator and backend as an SVG file; `most` rows, the rest as one."""
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise ValueError(f"torch_fl: report().plot({str(path)!r}): only .svg files are written")
        if not self["calls"]:
            raise ValueError("torch_fl: nothing to plot: pass what torch_fl.count_ops() gave to report()")
        rows = sorted(self["calls"], key=lambda row: -row["host_ms"])
        bars = [(f"{row['op']} ({row['calls']}x)", row["backend"], row["host_share"]) for row in rows[:most]]
        if rest := rows[most:]:
            bars.append((f"{len(rest)} more", "", sum(row["host_share"] for row in rest)))
        path.write_text(_svg(bars, f"Host time per operator, chip {self['chip']}, torch {self['torch']}"))


_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def _svg(bars: list[tuple[str, str, float]], title: str) -> str:
    """Horizontal bars (label, backend, share), one colour per backend."""
    backends = sorted({backend for _, backend, _ in bars if backend})
    colour = {backend: _COLOURS[i % len(_COLOURS)] for i, backend in enumerate(backends)}
    step, left, width = 20, 330, 460
    longest = max(share for *_, share in bars) or 1.0
    height = 60 + step * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for i, backend in enumerate(backends):
        x = left + 120 * i
        parts.append(f'<rect x="{x}" y="32" width="10" height="10" fill="{colour[backend]}"/>')
        parts.append(f'<text x="{x + 15}" y="41">{escape(backend)}</text>')
    for i, (label, backend, share) in enumerate(bars):
        y, length = 52 + step * i, width * share / longest
        parts.append(f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        fill = colour.get(backend, "#bbbbbb")
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{step - 5}" fill="{fill}"/>')
        parts.append(f'<text x="{left + length + 5:.1f}" y="{y + 12}">{share:.1%}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def report(counts=None) -> Report:
    """Versions, chip, devices with their memory, how many operators each backend has, and CPU fallbacks so far.

    With what `count_ops()` gave, also the calls per operator and backend with their host time; `.plot("file.svg")`
    draws that.
    """
    from torch_fl import __version__

    by_backend: dict[str, int] = {}
    for row in routing.routes():
        by_backend[row.backend] = by_backend.get(row.backend, 0) + 1
    devices = []
    for index in range(flagos.device_count()):
        free, total = flagos.mem_get_info(index)
        devices.append(
            {
                "device": f"flagos:{index}",
                "name": flagos.get_device_name(index),
                "memory_allocated": flagos.memory_allocated(index),
                "memory_reserved": flagos.memory_reserved(index),
                "memory_free": free,
                "memory_total": total,
            }
        )
    timed = counts.timed_rows() if counts else []
    total = sum(seconds for *_, seconds in timed) or 1.0
    return Report(
        torch_fl=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        chip=routing.chip(),
        devices=devices,
        routes=by_backend,
        fallbacks=routing.fallbacks(),
        outside_limits=dict(_C._python_kernels_passed_on()),
        calls=[
            {"op": op, "backend": backend, "calls": calls, "host_ms": 1000 * seconds, "host_share": seconds / total}
            for op, backend, calls, seconds in timed
        ],
    )
