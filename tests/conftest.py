"""Options that every test folder shares. pytest takes options only from a conftest this high up."""


def pytest_addoption(parser):
    group = parser.getgroup("torch_fl")
    group.addoption("--model", default=None, help="folder of a Qwen3 model; default: the architecture, random weights")
    group.addoption("--steps", type=int, default=20, help="training steps of test_qwen3_train.py (default 20)")
    group.addoption("--full", action="store_true", help="also run tests marked slow")
    group.addoption("--results", default=None, help="file for what came of each test (tests/common/result_file.py)")


def pytest_configure(config):
    if config.getoption("--results") and not hasattr(config, "workerinput"):  # of xdist's processes only the first
        from tests.common.result_file import ResultFile

        config.pluginmanager.register(ResultFile(config.getoption("--results")))
