"""Command line: `python -m torch_fl doctor` and `python -m torch_fl routes [OPERATOR ...]`."""

import argparse
import fnmatch
import json
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
    arguments = parser.parse_args()
    if arguments.command == "doctor":
        from torch_fl import doctor

        return doctor.main(arguments.json)
    return show_routes(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`
        sys.exit(1)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"torch_fl: {error}", file=sys.stderr)
        sys.exit(1)
