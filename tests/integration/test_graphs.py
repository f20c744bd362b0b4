"""Graphs: recorded flagos work replays the same numbers, in training too."""

import pytest
import torch

import torch_fl

cuda = pytest.mark.cuda


@cuda
def test_capture_and_replay(device):
    x = torch.zeros(128, 128, device=device)
    w = torch.randn(128, 128, device=device)
    (x @ w).relu().sum()  # libraries come up outside the recording
    graph = torch.flagos.CUDAGraph()
    assert not torch.flagos.is_current_stream_capturing()
    with torch.flagos.graph(graph):
        assert torch.flagos.is_current_stream_capturing()
        y = (x @ w).relu()
        z = torch.cat([y, y], 1).sum(1)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(128, 128))
        graph.replay()
        assert y.is_flagos and torch.equal(y, (x @ w).relu()) and torch.equal(z, torch.cat([y, y], 1).sum(1))


@cuda
def test_capture_on_a_given_stream_and_pool(device):
    pool = torch.flagos.graph_pool_handle()
    side = torch.flagos.Stream()
    x = torch.ones(1024, device=device)
    graphs, results = [], []
    for factor in (2, 3):
        graph = torch.flagos.CUDAGraph()
        with torch.flagos.graph(graph, pool=pool, stream=side):
            assert torch.flagos.current_stream() == side
            results.append(x * factor)
        graphs.append(graph)
    assert graphs[0].pool() == graphs[1].pool() == pool
    x.fill_(5)
    for graph in graphs:
        graph.replay()
    assert [r[0].item() for r in results] == [10, 15]


@cuda
def test_memory_of_a_graph_is_not_given_out(device):
    """Small blocks too: whatever caches them must not hand a graph's memory to others, or theirs to the graph."""
    x = torch.ones(64, device=device)
    graph = torch.flagos.CUDAGraph()
    with torch.flagos.graph(graph):
        y = x * 2
        z = y + 1
    others = [torch.full((64,), -1.0, device=device) for _ in range(200)]
    graph.replay()
    assert y.eq(2).all() and z.eq(3).all()
    assert all(o.eq(-1).all() for o in others)
    addresses = {o.data_ptr() for o in others}
    assert y.data_ptr() not in addresses and z.data_ptr() not in addresses


@cuda
def test_random_numbers_advance_at_replay_and_follow_the_seed(device):
    torch.flagos.manual_seed(1)
    graph = torch.flagos.CUDAGraph()
    with torch.flagos.graph(graph):
        y = torch.rand(1000, device=device)
    draws = []
    for seed in (7, None, 7):
        if seed is not None:
            torch.flagos.manual_seed(seed)
        graph.replay()
        draws.append(y.clone())
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    torch.flagos.manual_seed(7)
    assert torch.equal(draws[0], torch.rand(1000, device=device))


@cuda
def test_a_forbidden_call_in_a_recording_is_an_error_and_the_device_survives(device):
    x = torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="capture"), torch.flagos.graph(torch.flagos.CUDAGraph()):
        x.sum().item()
    assert torch.flagos.current_stream() == torch.flagos.default_stream()
    torch.flagos.synchronize()
    assert (x + 1).sum().item() == 8


@cuda
def test_a_whole_training_step(device):
    """Forward, backward and optimizer in one graph; the weights equal those of eager steps."""

    def setting():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).to(device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True, foreach=True)

    data = [torch.randn(16, 32).to(device) for _ in range(8)]

    def step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    model, optimizer = setting()
    eager = [step(model, optimizer, x).item() for x in data]

    graphed, optimizer = setting()
    x = data[0].clone()
    side = torch.flagos.Stream()
    side.wait_stream(torch.flagos.current_stream())
    with torch.flagos.stream(side):
        losses = [step(graphed, optimizer, x.copy_(d)).item() for d in data[:3]]
    torch.flagos.current_stream().wait_stream(side)
    graph = torch.flagos.CUDAGraph()
    with torch.flagos.graph(graph):
        loss = step(graphed, optimizer, x)
    for d in data[3:]:
        x.copy_(d)
        graph.replay()
        losses.append(loss.item())
    torch.testing.assert_close(losses, eager, rtol=1e-5, atol=1e-6)
    for a, b in zip(model.parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@cuda
def test_make_graphed_callables(device):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(device)
    plain = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).to(device)
    plain.load_state_dict(module.state_dict())
    graphed = torch.flagos.make_graphed_callables(module, (torch.randn(8, 16, device=device, requires_grad=True),))
    for _ in range(3):
        # Gradients are the graph's own memory, which the next replay overwrites: they cannot be accumulated.
        module.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
        x = torch.randn(8, 16, device=device)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        graphed(a).square().sum().backward()
        plain(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_chips_without_graphs_say_so():
    if torch_fl.chip() == "cuda":
        pytest.skip("the chip cuda records graphs")
    assert not torch.flagos.is_current_stream_capturing()
    for use in (
        torch.flagos.CUDAGraph,
        lambda: torch.flagos.graph(None),
        torch.flagos.graph_pool_handle,
        lambda: torch.flagos.make_graphed_callables(None, ()),
    ):
        with pytest.raises(RuntimeError, match=f"the chip {torch_fl.chip()} records no graphs"):
            use()
