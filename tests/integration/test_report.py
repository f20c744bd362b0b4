"""report() and count_ops(): what ran, where, how often."""

import time
from xml.etree import ElementTree

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
def test_host_time(device, tmp_path):
    x, y = torch.ones(2, 2, device=device), torch.ones(400, 400, device=device)
    with torch_fl.count_ops() as counts:
        for _ in range(20):
            torch.neg(x)
            torch.linalg.svdvals(y)
    torch.mm(x, x)
    report = torch_fl.report(counts)
    rows = {row["op"]: row for row in report["calls"]}
    assert rows["neg"]["calls"] == 20 and 0 < rows["neg"]["host_ms"] < rows["_linalg_svd"]["host_ms"]
    assert sum(row["host_share"] for row in report["calls"]) == pytest.approx(1)
    assert "host ms" in str(report) and "mm" not in rows
    report.plot(tmp_path / "plot.svg", most=1)
    drawing = ElementTree.parse(tmp_path / "plot.svg")
    texts = [t.text for t in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert "_linalg_svd (20x)" in texts and any("more" in text for text in texts)
    with pytest.raises(ValueError, match=r"plot.png.*svg"):
        report.plot(tmp_path / "plot.png")
    with pytest.raises(ValueError, match="count_ops"):
        torch_fl.report().plot(tmp_path / "plot.svg")


@pytest.mark.anyplatform
def test_nested_operators_are_timed_once(device):
    """A kernel that calls other operators is charged only with its own time."""
    x = torch.ones(300, 300, device=device)
    with torch_fl.count_ops() as counts:
        start = time.perf_counter()
        torch.nn.functional.dropout(x, 0.5)
        torch.linalg.svdvals(x)
        elapsed = time.perf_counter() - start
    assert 0 < sum(seconds for *_, seconds in counts.timed_rows()) <= elapsed


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
