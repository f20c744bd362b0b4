"""report() and count_ops(): what ran, where, how often."""

import pytest
import torch

import torch_fl


@pytest.mark.anyplatform
def test_report_names_chip_devices_and_routes(device):
    held = torch.ones(1 << 18, device=device)
    report = torch_fl.report()
    assert report["chip"] == torch_fl.chip()
    assert len(report["devices"]) == torch_fl.flagos.device_count()
    assert report["devices"][0]["memory_allocated"] >= held.nbytes
    assert sum(report["routes"].values()) == len(torch_fl.get_registered_ops())
    text = str(report)
    assert torch.__version__ in text and "flagos:0" in text and len(text.splitlines()) < 25


@pytest.mark.anyplatform
def test_report_shows_fallbacks(device):
    torch_fl.fallbacks(reset=True)
    with torch_fl.route(tan="cpu"), pytest.warns(UserWarning, match="tan"):
        torch.tan(torch.ones(2, device=device))
    assert torch_fl.report()["fallbacks"] == {"tan": 1}
    assert "tan 1" in str(torch_fl.report())
    torch_fl.fallbacks(reset=True)
    assert str(torch_fl.report()).endswith("fallbacks none")


@pytest.mark.anyplatform
def test_count_ops_counts_only_inside(device):
    x = torch.ones(2, 2, device=device)
    torch.mm(x, x)
    with torch_fl.count_ops() as counts:
        for _ in range(3):
            torch.mm(x, x)
    torch.mm(x, x)
    calls = {op: number for op, _, number in counts.rows()}
    assert calls["mm"] == 3
    assert sum(counts.by_backend().values()) == sum(calls.values())


@pytest.mark.anyplatform
def test_count_ops_nests(device):
    x = torch.ones(2, device=device)
    with torch_fl.count_ops() as outer:
        torch.neg(x)
        with torch_fl.count_ops() as inner:
            torch.neg(x)
        torch.neg(x)
    assert dict((op, n) for op, _, n in inner.rows())["neg"] == 1
    assert dict((op, n) for op, _, n in outer.rows())["neg"] == 3
