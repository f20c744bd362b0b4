"""Which backend served an operator, as a range in torch.profiler's output."""

import contextlib

from torch_fl import _C, _env


@contextlib.contextmanager
def profile_backends():
    """Gives each kernel a range `flagos::mm[backend]` in what torch.profiler records; FLAGOS_PROFILE_BACKENDS=1 always.

    `with torch.profiler.profile() as prof, torch_fl.profile_backends(): ...`. All threads; nothing is spent outside it.
    """
    _C._set_annotating(True)
    try:
        yield
    finally:
        _C._set_annotating(False)


def configure() -> None:
    """Reads the environment. Called once, at import."""
    if _env.flag("FLAGOS_PROFILE_BACKENDS"):
        _C._set_annotating(True)
