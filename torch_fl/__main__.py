"""Command line: `python -m torch_fl doctor`, `python -m torch_fl routes [OPERATOR ...]`, `python -m torch_fl tune`."""

import argparse
import contextlib
import fnmatch
import json
import os
import runpy
import sys


def show_routes(arguments) -> int:
    import torch_fl

    if arguments.operators:
        explained = {op: torch_fl.explain(op) for op in arguments.operators}
        if arguments.json:
            print(json.dumps({op: [step._asdict() for step in steps] for op, steps in explained.items()}, indent=1))
        else:
            print("\n".join(map(str, explained.values())))
        return 0
    rows = [
        row
        for row in torch_fl.routes()
        if fnmatch.fnmatchcase(row.op, arguments.filter) and arguments.backend in (None, row.backend)
    ]
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return 0
    for row in rows:
        print(f"{row.op:<44} {row.backend:<14} {row.origin:<10} {row.reason}")
    totals: dict[str, int] = {}
    for row in rows:
        totals[row.backend] = totals.get(row.backend, 0) + 1
    print(f"{len(rows)} operators: " + ", ".join(f"{name} {count}" for name, count in sorted(totals.items())))
    return 0


def tune_script(arguments) -> int:
    """Runs the script as `python script.py` would, then measures what it called."""
    import torch_fl

    stdout = sys.stderr if arguments.json else sys.stdout
    tuning = torch_fl.tune(
        budget=arguments.budget, clock=arguments.clock, memory=arguments.memory, progress=True
    )  # fmt: skip
    argv, path = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [arguments.script, *arguments.arguments], os.path.dirname(os.path.abspath(arguments.script))

    def script():
        try:
            runpy.run_path(arguments.script, run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise

    try:
        with contextlib.redirect_stdout(stdout), tuning:
            script()
        if arguments.trial:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                tuning.trial(script, budget=arguments.trial)
    finally:
        sys.argv, sys.path[0] = argv, path
    tuning.report.write(arguments.out)
    print(tuning.report.json() if arguments.json else tuning.report)
    print(f"tune: wrote {arguments.out}; use it with FLAGOS_BACKEND_CONFIG={arguments.out}", file=sys.stderr)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_fl", description="PyTorch on the device flagos.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="one screen: what works, what does not, and why")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    routes = commands.add_parser("routes", help="which backend serves which operator")
    routes.add_argument("operators", nargs="*", help="explain these operators instead of listing all")
    routes.add_argument("--filter", default="*", metavar="PATTERN", help="only operators like 'add*' or '*.out'")
    routes.add_argument("--backend", help="only operators that this backend serves")
    routes.add_argument("--json", action="store_true", help="as JSON")
    tune = commands.add_parser(
        "tune", help="runs a script and writes a conf with the fastest right backend per operator"
    )
    tune.add_argument("--out", default="tuned.conf", help="the conf file to write (tuned.conf)")
    tune.add_argument("--budget", type=float, default=120.0, help="seconds for the measurements after the script (120)")
    tune.add_argument("--clock", choices=("both", "host", "device"), default="both", help="whose time counts (both)")
    tune.add_argument(
        "--trial",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="then run the script under several sets of routes, twice each and in turns for so long; native routes "
        "stay unless others are faster (0)",
    )
    tune.add_argument("--memory", type=int, help="bytes for copies of arguments (a quarter of what is free)")
    tune.add_argument("--json", action="store_true", help="the report as JSON on stdout; the script's goes to stderr")
    tune.add_argument("script", help="a Python file that runs the workload once")
    tune.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    arguments = parser.parse_args()
    if arguments.command == "doctor":
        from torch_fl import doctor

        return doctor.main(arguments.json)
    if arguments.command == "tune":
        return tune_script(arguments)
    return show_routes(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`
        sys.exit(1)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"torch_fl: {error}", file=sys.stderr)
        sys.exit(1)
