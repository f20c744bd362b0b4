"""torch.nn.utils, averaged models and torch.utils.benchmark on flagos: as on the CPU, and without hidden waits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence, unpad_sequence
from torch.optim import swa_utils

import torch_fl


def with_gradients(where):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(where)
    model(torch.linspace(-1, 1, 6, device=where).reshape(2, 3)).square().sum().backward()
    return model


def gradients(model):
    return [p.grad.cpu() for p in model.parameters()]


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_by_norm_stays_on_the_device(norm_type, foreach, device):
    """The norm is a tensor of the device, and nothing waits for its value."""
    here, there = with_gradients(device), with_gradients("cpu")
    torch_fl.flagos.set_sync_debug_mode("error")
    try:
        norm = nn.utils.clip_grad_norm_(here.parameters(), 0.1, norm_type, foreach=foreach)
        assert norm.is_flagos and norm.dim() == 0
    finally:
        torch_fl.flagos.set_sync_debug_mode("default")
    torch.testing.assert_close(norm.cpu(), nn.utils.clip_grad_norm_(there.parameters(), 0.1, norm_type))
    for actual, expected in zip(gradients(here), gradients(there), strict=True):
        torch.testing.assert_close(actual, expected)


def test_clipping_refuses_what_is_not_finite(device):
    model = with_gradients(device)
    next(model.parameters()).grad[0] = float("inf")
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


def test_clipping_by_value(device):
    here, there = with_gradients(device), with_gradients("cpu")
    for model in (here, there):
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
    assert all(g.abs().max() <= 0.05 for g in gradients(here))
    for actual, expected in zip(gradients(here), gradients(there), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["orthogonal", "spectral_norm", "weight_norm"])
def test_parametrizations(name, device):
    torch.manual_seed(0)
    there = getattr(parametrizations, name)(nn.Linear(4, 4)).eval()
    here = copy.deepcopy(there).to(device)
    x = torch.randn(2, 4)
    expected, actual = there(x), here(x.to(device))
    torch.testing.assert_close(actual.cpu(), expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for a, e in zip(gradients(here), gradients(there), strict=True):
        torch.testing.assert_close(a, e)
    weight = there.weight
    nn.utils.parametrize.remove_parametrizations(here, "weight")  # for the copy's class, which is the original's
    assert isinstance(here.weight, nn.Parameter) and here.weight.is_flagos
    torch.testing.assert_close(here.weight.cpu(), weight)


def test_parametrization_after_the_move(device):
    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).t()

    model = nn.Linear(3, 3).to(device)
    nn.utils.parametrize.register_parametrization(model, "weight", Symmetric())
    assert torch.equal(model.weight, model.weight.t())
    with nn.utils.parametrize.cached():
        assert model.weight is model.weight
    model.cpu()
    assert model.weight.device.type == "cpu"


def test_pruning(device):
    def pruned(where):
        torch.manual_seed(0)
        model = nn.Linear(6, 4).to(where)
        prune.l1_unstructured(model, "weight", 0.5)
        prune.ln_structured(model, "weight", 0.25, n=2, dim=0)
        kept = model.weight_mask.cpu()
        model(torch.ones(1, 6, device=where)).sum().backward()
        assert torch.equal(model.weight_orig.grad.cpu(), kept)
        prune.remove(model, "weight")
        return model.weight

    assert pruned(device).is_flagos
    torch.testing.assert_close(pruned(device).cpu(), pruned("cpu"))


def test_packed_sequences(device):
    x, lengths = torch.randn(3, 4, 2), torch.tensor([4, 1, 2])
    packed = pack_padded_sequence(x.to(device), lengths, batch_first=True, enforce_sorted=False)
    assert packed.is_flagos and packed.cpu().data.device.type == "cpu" and packed.cpu().to(device).data.is_flagos
    padded, again = pad_packed_sequence(packed, batch_first=True)
    assert padded.is_flagos and again.tolist() == [4, 1, 2]
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(padded[row, :length].cpu(), x[row, :length]) and not padded[row, length:].any()
    pieces = unpad_sequence(padded, again, batch_first=True)
    assert torch.equal(pad_sequence(pieces, batch_first=True), padded)


def test_fused_convolution_and_norm(device):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 3).to(device), nn.BatchNorm2d(3).to(device)
    norm(torch.randn(8, 3, 4, 4, device=device))  # running statistics other than 0 and 1
    fused = nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())
    x = torch.randn(2, 2, 5, 5, device=device)
    assert fused.weight.is_flagos
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_skip_init_and_memory_format(device):
    conv = nn.utils.skip_init(nn.Conv2d, 4, 4, 3, device=device)
    assert conv.weight.is_flagos
    conv = nn.utils.convert_conv2d_weight_memory_format(conv, torch.channels_last)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_models(ema, device):
    def averaged(where):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(where)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9) if ema else None)
        for step in range(3):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(step)
            average.update_parameters(model)
        batches = [torch.linspace(0, k, 12).reshape(4, 3) for k in range(1, 4)]
        swa_utils.update_bn(batches, average, device=where)
        return average.state_dict()

    here, there = averaged(device), averaged("cpu")
    assert here["module.0.weight"].is_flagos
    for name, expected in there.items():
        torch.testing.assert_close(here[name].cpu(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_benchmark_timers_and_their_table(device):
    from torch.utils.benchmark import Compare, Timer

    x = torch.ones(4, device=device)
    common = {"globals": {"x": x}, "label": "add", "description": "flagos"}
    timers = [Timer(code, sub_label=code, **common) for code in ("x + 1", "x + x")]
    measured = [timer.blocked_autorange(min_run_time=0.01) for timer in timers]
    assert all(m.median > 0 for m in measured)
    assert "x + 1" in str(Compare(measured)) and "x + x" in str(Compare(measured))


@pytest.mark.skipif(torch_fl.chip() != "host", reason="faults are injected into the simulated device")
def test_benchmark_timer_waits_for_the_device(device):
    """A fault put into the wait shows that there is one."""
    from torch.utils.benchmark import Timer

    timer = Timer("x + 1", globals={"x": torch.ones(4, device=device)})
    torch_fl._C._sim.set_fail("device_sync@1=INTERNAL")
    try:
        with pytest.raises(RuntimeError, match="synchronizing the device failed"):
            timer.timeit(1)
    finally:
        torch_fl._C._sim.set_fail("")
    assert timer.timeit(1).mean > 0
