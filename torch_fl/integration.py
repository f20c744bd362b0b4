"""FlagGems as two backends: flagos_python (its Python kernels) and flagos (its C++ library). Both are optional.

Nothing of it is imported before the first call of an operator that is routed to flagos_python; `flag_gems.enable()` is
never called. The functions of FlagGems' registration table get tensors with the native label: what they do inside runs
on torch's own kernels. A FlagGems that is absent or cannot be imported is a reason in `torch_fl.explain`, not an error,
unless it was asked for by name.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import torch

from torch_fl import _C, _build, _env, flaggems, plans
from torch_fl.flaggems import interpreter

# FlagGems' name for the maker of each chip.
VENDORS = {"cuda": "nvidia", "metax": "metax", "ascend": "ascend"}

# Switches for a chip that does not exist here yet.
METAX_ONLY = ("FLAGOS_METAX_COMPAT", "FLAGOS_METAX_CUDART_SHIM")

CPP_VERSION = "5.0.2"  # the one whose C++ signatures csrc/aten/backends/flagos knows

_kernels: dict[str, tuple[str, str, dict]] = {}
_functions: dict | None = None  # op -> function, once flag_gems is imported
_interpreted = False  # its kernels run in Triton's interpreter


def installed_version() -> str | None:
    """The installed FlagGems' version, without importing it."""
    for name in ("flag_gems", "flag-gems"):
        try:
            return importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def install(chip: str) -> None:
    """Tells the backends what there is. Called once, before the routes are configured."""
    for name in METAX_ONLY:
        if _env.flag(name):
            raise RuntimeError(
                f"{name}=1 is for MetaX GPUs, and this torch_fl has no MetaX chip yet (the chip is {chip}); unset it"
            )
    spec = importlib.util.find_spec("flag_gems")
    package = Path(spec.origin).parent if spec and spec.origin else None
    version = installed_version() if package else None
    if package:
        _env.set_default("FLAGGEMS_SOURCE_DIR", os.fspath(package))
    _install_library(package, version)
    _install_python(chip, package, version)


# ---- flagos: the C++ library ---------------------------------------------------------------------------------------


def _install_library(package: Path | None, version: str | None) -> None:
    name = "liboperators.so"
    paths = []
    build = _env.get("FLAGGEMS_DIR")
    if build:
        paths += [Path(build, folder, name) for folder in ("lib", "lib64", "")]
    if package:
        paths += [package / "lib" / name, package / name, package.parent / "lib" / name]
    reason = ""
    if not _build.FLAGGEMS_KERNEL:
        reason = "left out of this build (FLAGGEMS_KERNEL=OFF)"
    elif not paths:
        reason = "FlagGems is not installed, and FLAGGEMS_DIR does not name its build tree"
    elif version and version != CPP_VERSION:
        reason = f"FlagGems {version} is installed, and the C++ signatures of {CPP_VERSION} are those that are known"
    _C._use_flaggems_library([os.fspath(path) for path in paths], reason)


# ---- flagos_python: the Python kernels -----------------------------------------------------------------------------


def _triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter: Triton's own variable, with the values that Triton takes."""
    return (_env.get("TRITON_INTERPRET") or "").lower() in ("1", "true", "yes", "on", "y")


def _install_python(chip: str, package: Path | None, version: str | None) -> None:
    global _interpreted
    _interpreted = chip == "host" and _triton_interprets()
    vendor = _env.get("GEMS_VENDOR") or VENDORS.get(chip) or (interpreter.VENDOR if _interpreted else None)
    reason = ""
    if not _build.FLAGGEMS_PYTHON:
        reason = "left out of this build (FLAGGEMS_PYTHON=OFF)"
    elif _env.flag("FLAGOS_DISABLE_FLAGGEMS_PY"):
        reason = "switched off by FLAGOS_DISABLE_FLAGGEMS_PY=1"
    elif package is None:
        reason = "FlagGems is not installed (no module named flag_gems)"
    elif vendor is None:
        reason = f"FlagGems knows no vendor for the chip {chip} (GEMS_VENDOR names one)"
        if chip == "host":
            reason += "; TRITON_INTERPRET=1 runs its kernels in Triton's interpreter, slowly"
    elif unknown := _unknown_vendor(package, vendor):
        reason = unknown
    if vendor and not reason:
        _env.set_default("GEMS_VENDOR", vendor)
        if chip != "cuda":  # its tuning database asks for the GPU's name when it lies in a file
            _env.set_default("FLAGGEMS_DB_URL", flaggems.PRIVATE_TUNING)
    _kernels.clear()
    if not reason:
        _kernels.update(table(chip, version))
    _C._set_python_kernels(reason, _kernels, _load)


def _unknown_vendor(package: Path, vendor: str) -> str:
    """Why FlagGems cannot have that vendor; it would say nothing and guess another one."""
    known = sorted(
        path.name[1:] for path in package.glob("runtime/backend/_*") if path.is_dir() and path.name[1] != "_"
    )
    if not known or vendor in known:
        return ""
    return f"FlagGems knows no vendor {vendor} (GEMS_VENDOR); it knows {', '.join(known)}"


def table(chip: str, version: str | None) -> dict[str, tuple[str, str, dict]]:
    """op -> (verdict, why, limits) for every operator of FlagGems."""
    judged = flaggems.judgements(version, chip, _env.get("FLAGOS_FLAGGEMS_VERDICTS"))
    named = f"FlagGems {version or 'of unknown version'}"
    rows = {}
    for op in sorted({*flaggems.operators(version), *judged}):
        if not exists(op):
            rows[op] = ("unusable", f"torch {torch.__version__} has no operator of that name", {})
        elif op in flaggems.NO_ROUTE:
            rows[op] = ("unusable", flaggems.NO_ROUTE[op], {})
        elif _composite(op):
            rows[op] = ("unusable", "torch composes it of other operators; served whole it would lose its gradient", {})
        elif op not in judged:
            rows[op] = ("unjudged", f"not judged yet for {named} on {chip}; only when asked for by name", {})
        elif judged[op].verdict in ("unjudged", "unusable"):
            only = "; only when asked for by name" if judged[op].verdict == "unjudged" else ""
            rows[op] = (judged[op].verdict, f"{judged[op].why}{only}", {})
        elif judged[op].verdict == "wrong":
            rows[op] = ("wrong", f"known to be wrong in {named} on {chip}: {judged[op].why}", {})
        else:
            limits = _limits(judged[op].limits)
            shown = "; within " + ", ".join(f"{name} {value}" for name, value in judged[op].limits.items())
            text = f"judged right for {named} on {chip}{shown if limits else ''}"
            if _interpreted:  # far too slow to serve by default
                rows[op] = ("unjudged", f"{text}; in Triton's interpreter, so only when asked for by name", limits)
            else:
                rows[op] = ("right", text, limits)
    return rows


def kernels() -> dict[str, tuple[str, str, dict]]:
    """op -> (verdict, why, limits) for every operator of FlagGems; empty where its Python kernels cannot be used."""
    return dict(_kernels)


def interpreted() -> bool:
    """Whether FlagGems' kernels run in Triton's interpreter, on CPU tensors."""
    return _interpreted


def exists(op: str) -> bool:
    """Whether torch has an operator of that name."""
    name, _, overload = op.partition(".")
    try:
        torch._C._dispatch_find_schema_or_throw(f"aten::{name}", overload)
    except RuntimeError:
        return False
    return True


def _composite(op: str) -> bool:
    """Whether it has no derivative but that of the operators it is composed of, as in csrc/aten/register.cc."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(f"aten::{op}", "CompositeImplicitAutograd") and not has_kernel(f"aten::{op}", "Autograd")


def _limits(limits: dict) -> dict:
    limits = dict(limits)
    if "dtypes" in limits:
        limits["dtypes"] = [getattr(torch, name) for name in limits["dtypes"]]
    return limits


def _load(op: str):
    """The function for an operator, at its first call. None when FlagGems cannot be imported."""
    global _functions
    if _functions is None:
        try:
            module = interpreter.load() if _interpreted else importlib.import_module("flag_gems")
            _functions = {flaggems.RENAMED.get(row[0], row[0]): row[1] for row in module._FULL_CONFIG}
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = f"FlagGems cannot be imported: {type(error).__name__}: {text[0] if text else ''}"
            _C._set_python_kernels(reason, _kernels, _load)
            _C._reconfigure()
            return None
        if _C._plans_on():
            plans.hook()
    function = _functions.get(op)
    if function is None:
        raise RuntimeError(
            f"flagos: backend not registered: {op} -> flagos_python: the installed FlagGems registers none; "
            f"torch_fl.explain({op!r}) shows what there is"
        )
    return function
