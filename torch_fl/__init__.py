"""torch_fl: PyTorch on the device "flagos", whatever chip is behind it.

Importing it, or only torch (entry point group torch.backends), takes the five steps of _start(). Nothing is printed.
"""

import sys

__version__ = "0.1.0"
_failure: Exception | None = None


def _autoload() -> None:
    """torch calls this at the end of `import torch`. By then the import below has run: nothing is left to do.

    When the start failed, torch must still import. torch_fl is taken out of sys.modules, so that an explicit
    `import torch_fl` starts again and raises the reason, and so does the first use of the device, if the name is free.
    """
    if _failure is not None:
        from torch_fl import _unavailable

        _unavailable.register(_failure)
        sys.modules.pop(__name__, None)


import torch  # noqa: E402  (_autoload must exist before: torch looks it up here when torch_fl is imported first)


def _start() -> None:
    # 1. Libraries: libflagos.so (chips), libtorch_fl.so (PyTorch registrations), the bindings.
    from torch_fl import _C, _build, _env

    # 2. The chip: FLAGOS_ACCELERATOR, else the build's ACCELERATOR, else what is found, else the simulated host.
    asked = _env.get("FLAGOS_ACCELERATOR") or _build.ACCELERATOR or None
    try:
        chip = _C._init(asked)
    except RuntimeError as error:
        from torch_fl import _cuda

        raise _cuda.explained(error, asked) from None
    if chip == "cuda":
        from torch_fl import _cuda

        _cuda.warn_of_version(torch.version.cuda)

    # 3. Routes: which backend serves which operator. An error here leaves the device unregistered.
    from torch_fl import _profiling, routing

    routing.configure(chip)
    _profiling.configure()

    # 4. The name, the module torch.flagos, and the methods Tensor.flagos(), Module.flagos(), storage.flagos().
    from torch_fl import flagos

    if torch._C._get_privateuse1_backend_name() != "flagos":
        torch.utils.rename_privateuse1_backend("flagos")
        torch._register_device_module("flagos", flagos)
        torch.utils.generate_methods_for_privateuse1_backend(
            for_tensor=True, for_module=True, for_packed_sequence=True, for_storage=True
        )

    # 5. What torch cannot be told in any other way: at most three assignments, listed with their reasons.
    from torch_fl import patches

    patches.apply()


try:
    _start()
except Exception as error:
    # While torch itself is being imported this is the autoload: see _autoload. The doctor says more than the error.
    asked_doctor = sys.orig_argv[1:4] == ["-m", "torch_fl", "doctor"]
    if not getattr(torch.__spec__, "_initializing", False) and not asked_doctor:
        from torch_fl import doctor

        doctor.explain_failure(error)
        raise
    _failure = error
else:
    from torch_fl import flagos
    from torch_fl._profiling import profile_backends
    from torch_fl._report import report
    from torch_fl.routing import (
        chip,
        count_ops,
        explain,
        fallbacks,
        get_registered_ops,
        is_flaggems_enabled,
        route,
        routes,
        set_route,
        strict,
    )


def __getattr__(name):
    if name == "debug":  # only who debugs, or tunes, pays for the import
        import importlib

        return importlib.import_module("torch_fl.debug")
    if name == "tune":
        from torch_fl.tuning import tune

        return tune
    raise AttributeError(f"module 'torch_fl' has no attribute {name!r}")


__all__ = [
    "chip",
    "count_ops",
    "explain",
    "fallbacks",
    "flagos",
    "get_registered_ops",
    "is_flaggems_enabled",
    "profile_backends",
    "report",
    "route",
    "routes",
    "set_route",
    "strict",
    "tune",
]
