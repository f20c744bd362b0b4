"""After fork: the child may not use the device and is told so; the parent is not disturbed; spawn works."""

import multiprocessing

import torch

from tests.common.process import check_python


def test_child_gets_a_clear_error_and_parent_goes_on():
    check_python(
        """
        import os, sys
        import torch
        x = torch.arange(4.0, device="flagos")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                y = torch.ones(2)          # the CPU works in the child
                assert y.sum().item() == 2
                assert torch.flagos.device_count() >= 1
                assert torch.flagos._is_in_bad_fork()
                make = lambda: torch.ones(2, device="flagos")
                for use in (make, lambda: x + 1, lambda: x.cpu(), torch.flagos.synchronize):
                    try:
                        use()
                    except RuntimeError as error:
                        assert "fork" in str(error) and "spawn" in str(error), error
                    else:
                        raise AssertionError("the child used the device")
                del x
                code = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert not torch.flagos._is_in_bad_fork()
        assert x.tolist() == [0, 1, 2, 3] and (x + 1).sum().item() == 10
        """
    )


def test_fork_before_first_use_is_allowed_or_clear():
    """A child of a process that only imported torch: either it works or it says what to do."""
    check_python(
        """
        import os, sys
        import torch
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if torch.ones(2, device="flagos").sum().item() == 2 else 2
            except RuntimeError as error:
                code = 0 if "spawn" in str(error) else 3
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert torch.ones(2, device="flagos").sum().item() == 2
        """
    )


def test_child_exit_runs_destructors_without_harm():
    """A child that ends normally destroys tensors it inherited; that must neither crash nor free the parent's
    memory."""
    check_python(
        """
        import os, sys
        import torch
        held = [torch.full((1000,), float(k), device="flagos") for k in range(20)]
        stream = torch.flagos.Stream()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            del held
            sys.exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status == 0, status
        assert [t[0].item() for t in held] == list(range(20))
        """
    )


def _square(x):
    import torch

    return (torch.tensor(float(x), device="flagos") ** 2).item()


def test_spawn_works(device):
    torch.ones(1, device=device)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_square, [2, 3, 4]) == [4.0, 9.0, 16.0]


def test_fork_with_work_in_flight():
    """Streams with queued copies at the moment of the fork."""
    check_python(
        """
        import os
        import torch
        a = torch.ones(1 << 20).pin_memory()
        s = torch.flagos.Stream()
        with torch.flagos.stream(s):
            b = [a.to("flagos", non_blocking=True) for _ in range(8)]
        pid = os.fork()
        if pid == 0:
            os._exit(0 if torch.ones(3).sum().item() == 3 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        s.synchronize()
        assert all(t.sum().item() == 1 << 20 for t in b)
        """
    )
