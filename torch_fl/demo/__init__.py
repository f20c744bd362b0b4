"""The demo, `python -m torch_fl.demo`, and the workload it shares with tests/integration/test_qwen3_*.py."""
