"""report(): what this process runs on and what it did, as a dictionary that prints as one screen."""

import platform

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
            total = sum(row["calls"] for row in self["calls"])
            lines += ["", f"{'operator':<44} {'backend':<14} {'calls':>10}  share"]
            for row in self["calls"]:
                share = 100 * row["calls"] / total
                lines.append(f"{row['op']:<44} {row['backend']:<14} {row['calls']:>10} {share:5.1f}%")
        return "\n".join(lines)


def report(counts=None) -> Report:
    """Versions, chip, devices with their memory, how many operators each backend has, and CPU fallbacks so far.

    With what `count_ops()` gave, also the calls per operator and backend.
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
            {"op": op, "backend": backend, "calls": calls} for op, backend, calls in (counts.rows() if counts else [])
        ],
    )
