"""Aliasing: views, in-place and out= return the same objects, overlap is checked as on the CPU."""

import pytest
import torch

import torch_fl

VIEWS = {
    "slice": lambda x: x[1:],
    "select": lambda x: x[0],
    "transpose": lambda x: x.t(),
    "view": lambda x: x.view(-1),
    "reshape": lambda x: x.reshape(2, 6),
    "expand": lambda x: x[:1].expand(3, 4),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "permute": lambda x: x.permute(1, 0),
    "diagonal": lambda x: x.diagonal(),
    "as_strided": lambda x: x.as_strided((2, 2), (4, 1), 1),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "view_dtype": lambda x: x.view(torch.int32),
    "flatten": lambda x: x.flatten(),
    "movedim": lambda x: x.movedim(0, 1),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "alias": lambda x: torch.ops.aten.alias(x),
    "contiguous": lambda x: x.contiguous(),
    "to_same": lambda x: x.to(x.device),
    "real_imag": lambda x: torch.view_as_complex(x.view(3, 2, 2)).imag,
    "chunk": lambda x: x.chunk(2, 1)[1],
    "unbind": lambda x: x.unbind(0)[2],
    "split": lambda x: x.split([1, 2])[1],
    "broadcast": lambda x: torch.broadcast_to(x, (2, 3, 4))[1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_share_memory(name, device):
    base = torch.arange(12.0).reshape(3, 4).clone()
    x = base.to(device)
    expected, view = VIEWS[name](base), VIEWS[name](x)
    assert view.is_flagos
    assert (view.shape, view.stride(), view.storage_offset()) == (
        expected.shape,
        expected.stride(),
        expected.storage_offset(),
    )
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert view.data_ptr() == x.data_ptr() + expected.storage_offset() * view.element_size()
    x.mul_(2)
    base.mul_(2)
    assert torch.equal(view.cpu(), expected)
    assert view._is_view() == expected._is_view()


INPLACE = {
    "add_": lambda x, o: x.add_(o),
    "mul_": lambda x, o: x.mul_(2),
    "relu_": lambda x, o: x.relu_(),
    "copy_": lambda x, o: x.copy_(o),
    "fill_": lambda x, o: x.fill_(3),
    "zero_": lambda x, o: x.zero_(),
    "clamp_": lambda x, o: x.clamp_(0, 1),
    "masked_fill_": lambda x, o: x.masked_fill_(o > 0, 7.0),
    "index_add_": lambda x, o: x.index_add_(0, torch.tensor([0, 0], device=x.device), o[:2]),
    "scatter_": lambda x, o: x.scatter_(0, torch.zeros(1, 4, dtype=torch.int64, device=x.device), o),
    "index_put_": lambda x, o: x.index_put_((torch.tensor([1], device=x.device),), o[:1]),
    "t_": lambda x, o: x.t_(),
    "squeeze_": lambda x, o: x.unsqueeze_(0).squeeze_(0),
    "as_strided_": lambda x, o: x.as_strided_((2, 2), (1, 2)),
    "resize_": lambda x, o: x.resize_(2, 2),
    "normal_": lambda x, o: x.normal_(),
    "sort_out": lambda x, o: torch.sort(x.clone(), out=(x, torch.empty(3, 4, dtype=torch.int64, device=x.device)))[0],
    "cumsum_": lambda x, o: x.cumsum_(0),
    "addmm_": lambda x, o: x.addmm_(torch.ones(3, 3, device=x.device), o),
    "__iadd__": lambda x, o: x.__iadd__(o),
}


@pytest.mark.parametrize("name", INPLACE)
def test_inplace_returns_the_same_object(name, device):
    results = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        x = torch.arange(-6.0, 6.0).reshape(3, 4).to(where)
        other = torch.linspace(-1, 1, 12).reshape(3, 4).to(where)
        view = x.view(-1)
        identity, version = id(x), x._version
        result = INPLACE[name](x, other)
        assert result is x and id(x) == identity
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        results.append((x.cpu(), x.stride(), x._version - version, view.cpu()))
    (expected, stride, bumps, base), (actual, actual_stride, actual_bumps, actual_base) = results
    assert actual_stride == stride and actual_bumps == bumps
    if name != "normal_" or torch_fl.chip() == "host":  # other chips draw other numbers
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(actual_base, base)


def test_out_returns_the_same_objects(device):
    x = torch.randn(3, 4, device=device)
    out = torch.empty(3, 4, device=device)
    pointer = out.data_ptr()
    assert torch.add(x, x, out=out) is out and out.data_ptr() == pointer
    values, indices = torch.empty(3, device=device), torch.empty(3, dtype=torch.int64, device=device)
    result = torch.max(x, 1, out=(values, indices))
    assert result.values is values and result.indices is indices
    strided = torch.zeros(4, 6, device=device)[:, ::2].t()
    assert torch.exp(x, out=strided) is strided and strided.stride() == (2, 6)
    torch.testing.assert_close(strided.cpu(), x.cpu().exp())


def test_out_that_is_an_input(device):
    x = torch.randn(4, device=device)
    expected = x.cpu().sin()
    assert torch.sin(x, out=x) is x
    torch.testing.assert_close(x.cpu(), expected)


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x[:1].expand(3, 4).add_(1),
        lambda x: torch.add(x[:-1], 1, out=x[1:]),
        lambda x: torch.mul(x[0], 2, out=x.view(-1)[2:6]),
        lambda x: torch.cat([x[:2], x[:1]], out=x),
        lambda x: x.unfold(0, 2, 1).expand(3, 2, 4, 2).add_(1),
    ],
    ids=["expanded", "shifted_rows", "partial", "cat", "unfolded"],
)
def test_overlap_is_refused_as_on_the_cpu(bad, device):
    messages = []
    for where in ("cpu", device):
        x = torch.arange(12.0).reshape(3, 4).to(where)
        with pytest.raises(RuntimeError, match=r"memory location|overlap") as error:
            bad(x)
        messages.append(str(error.value).split("\n")[0])
        assert torch.equal(x.cpu(), torch.arange(12.0).reshape(3, 4))
    assert messages[0] == messages[1]


def test_foreach_mutates_the_objects_in_the_list(device):
    tensors = [torch.ones(2, device=device) for _ in range(3)]
    kept = list(tensors)
    assert torch._foreach_add_(tensors, 1) is None or True
    assert all(a is b for a, b in zip(tensors, kept, strict=True)) and all(t.tolist() == [2, 2] for t in kept)
    assert all(t._version == 1 for t in kept)
    results = torch._foreach_mul(tensors, 3)
    assert all(r.data_ptr() != t.data_ptr() for r, t in zip(results, tensors, strict=True))


def test_same_tensor_twice(device):
    x = torch.arange(4.0, device=device)
    assert torch.equal(torch.cat([x, x]).cpu(), torch.arange(4.0).repeat(2))
    assert torch.equal(x.add_(x).cpu(), torch.arange(4.0) * 2)
    y = torch.ones(2, device=device)
    torch._foreach_add_([y, y], 1)
    # One kernel on a GPU, in which two threads may add to the same number: as with cuda tensors.
    assert y.tolist() in ([[3, 3]] if torch_fl.chip() == "host" else [[2, 2], [2, 3], [3, 2], [3, 3]])


def test_results_do_not_alias_inputs_when_they_should_not(device):
    x = torch.ones(4, device=device)
    for result in (x.clone(), x + 0, x.to(device, copy=True), x.abs(), x.contiguous().clone(), x.float() * 1):
        assert result.data_ptr() != x.data_ptr()
        result.zero_()
    assert x.sum().item() == 4


def test_lazy_conj_and_neg_share_memory(device):
    x = torch.complex(torch.ones(3), torch.ones(3)).to(device)
    conj = x.conj()
    assert conj.is_conj() and conj.data_ptr() == x.data_ptr()
    assert torch.equal(conj.cpu(), torch.complex(torch.ones(3), -torch.ones(3)))
    assert torch.equal(conj.resolve_conj().cpu(), conj.cpu()) and not conj.resolve_conj().is_conj()
    imaginary = conj.imag
    assert imaginary.is_neg() and imaginary.tolist() == [-1, -1, -1]
    x.mul_(2)
    assert conj.real.tolist() == [2, 2, 2]
    target = torch.zeros(3, dtype=torch.complex64, device=device)
    target.copy_(conj)
    assert torch.equal(target.cpu(), conj.cpu())


def test_split_outputs_share_one_storage(device):
    x = torch.arange(10.0, device=device)
    parts = x.split(3)
    assert len({p.untyped_storage()._cdata for p in parts}) == 1
    del x
    parts[0].fill_(9)
    assert parts[1].tolist() == [3, 4, 5]
    storage = parts[0].untyped_storage()
    assert storage.nbytes() == 40
