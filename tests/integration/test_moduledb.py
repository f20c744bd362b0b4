"""module_db (forward, backward) and optim_db on flagos against the CPU; a fixed part of sweep_modules.py, all with
--full."""

import pytest

from tests.common import moduledb

MODULES = [t for t in moduledb.module_tasks() if t["dtype"] == "float32" and t["training"]]
OPTIMIZERS = [t for t in moduledb.optimizer_tasks() if t["dtype"] == "float32"]
REST = [t for t in moduledb.module_tasks() + moduledb.optimizer_tasks() if t not in MODULES and t not in OPTIMIZERS]


def name_of(task):
    detail = task.get("implementation") or ("train" if task["training"] else "eval")
    return f"{task['name']}-{detail}-{task['dtype']}"


def check(task, device):
    results = moduledb.check_task(task, str(device))
    failed = [f"{mode} {case}: {detail}" for mode, case, kind, detail in results if kind == "failed"]
    counted = [r for r in results if r[2] in ("passed", "failed")]
    assert not failed, f"{len(failed)} of {len(counted)} cases differ from the CPU:\n" + "\n".join(failed[:8])
    assert counted or all(kind in ("cpu", "none") for _, _, kind, _ in results)


@pytest.mark.parametrize("task", MODULES, ids=name_of)
def test_module(task, device):
    check(task, device)


@pytest.mark.parametrize("task", OPTIMIZERS, ids=name_of)
def test_optimizer(task, device):
    check(task, device)


@pytest.mark.slow
@pytest.mark.parametrize("task", REST, ids=name_of)
def test_rest(task, device):
    check(task, device)
