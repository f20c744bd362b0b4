"""Random numbers: seeds, states, generators of one's own, devices apart from each other."""

import copy
import pickle

import pytest
import torch

import torch_fl

flagos = torch_fl.flagos
on_host = pytest.mark.skipif(torch_fl.chip() != "host", reason="the host chip's numbers are the CPU's")


def draw(n=100, **kw):
    return torch.randn(n, device="flagos", **kw).cpu()


def test_seed_repeats():
    torch.manual_seed(3)
    first = draw()
    second = draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@on_host
def test_equal_seeds_give_the_cpus_numbers():
    torch.manual_seed(5)
    on_cpu = torch.randn(1000)
    torch.manual_seed(5)
    assert torch.equal(draw(1000), on_cpu)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "draws", [torch.randn, torch.rand, torch.randperm, lambda n, **kw: torch.nn.functional.dropout(torch.ones(n, **kw))]
)
def test_equal_seeds_give_torch_cuda_s_numbers(draws):
    flagos.manual_seed(5)
    ours = draws(1000, device="flagos")
    torch.cuda.manual_seed(5)
    assert torch.equal(ours.cpu(), draws(1000, device="cuda").cpu())


def test_drawing_here_does_not_move_the_cpus_generator():
    state = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), state)


def test_state_round_trip():
    state = flagos.get_rng_state()
    assert state.device.type == "cpu"
    first = draw()
    flagos.set_rng_state(state)
    assert torch.equal(draw(), first)


def test_fork_rng():
    torch.manual_seed(1)
    expected = draw()
    torch.manual_seed(1)
    with torch.random.fork_rng(devices=[0], device_type="flagos"):
        draw(7)
    assert torch.equal(draw(), expected)


def test_devices_have_their_own_state():
    if flagos.device_count() < 2:
        pytest.skip("needs two devices")
    torch.manual_seed(11)
    before = flagos.get_rng_state(0)
    torch.randn(10, device="flagos:1")
    assert torch.equal(flagos.get_rng_state(0), before)


def test_generator_of_ones_own():
    generator = torch.Generator(device="flagos")
    assert generator.device.type == "flagos"
    generator.manual_seed(42)
    assert generator.initial_seed() == 42
    before = flagos.get_rng_state()
    first = draw(generator=generator)
    assert torch.equal(flagos.get_rng_state(), before)
    generator.manual_seed(42)
    assert torch.equal(draw(generator=generator), first)
    other = torch.Generator(device="flagos").manual_seed(42)
    assert torch.equal(draw(generator=other), first)


def test_state_of_ones_own_generator():
    generator = torch.Generator(device="flagos").manual_seed(9)
    draw(generator=generator)
    state = generator.get_state()
    first = draw(generator=generator)
    generator.set_state(state)
    assert torch.equal(draw(generator=generator), first)


def test_clone_state():
    generator = torch.Generator(device="flagos").manual_seed(9)
    clone = generator.clone_state()
    assert clone.device.type == "flagos"
    assert torch.equal(draw(generator=generator), draw(generator=clone))
    draw(generator=generator)
    assert not torch.equal(draw(generator=generator), draw(generator=clone))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["deepcopy", "pickle"])
def test_copies_of_a_generator_go_on_where_it_is(copied):
    generator = torch.Generator("flagos").manual_seed(9)
    draw(generator=generator)
    again = copied(generator)
    assert again.device.type == "flagos" and again.initial_seed() == 9
    assert torch.equal(again.get_state(), generator.get_state())
    assert torch.equal(draw(generator=again), draw(generator=generator))


def test_offset():
    """Where the chip's generators count, it moves; on the simulated chip the state alone says where they are."""
    generator = torch.Generator("flagos").manual_seed(9)
    assert generator.get_offset() == 0
    draw(generator=generator)
    if torch_fl.chip() == "host":
        assert generator.get_offset() == 0
        with pytest.raises(RuntimeError, match="the chip host have no offset"):
            generator.set_offset(4)
    else:
        moved = generator.get_offset()
        assert moved > 0
        first = draw(generator=generator)
        generator.set_offset(moved)
        assert torch.equal(draw(generator=generator), first)


def test_default_generator():
    generator = flagos.default_generators[0]
    assert generator.device == torch.device("flagos:0")
    torch.manual_seed(77)
    assert generator.initial_seed() == 77
    first = draw()
    generator.manual_seed(77)
    assert torch.equal(draw(), first)


def test_seed_is_new_each_time():
    generator = torch.Generator(device="flagos")
    assert generator.seed() != generator.seed()


def test_cpu_generator_is_refused():
    with pytest.raises(RuntimeError, match="Expected a 'flagos' device type for generator but found 'cpu'"):
        torch.randn(3, device="flagos", generator=torch.Generator())
    assert draw(3).shape == (3,)


def test_flagos_generator_is_refused_by_the_cpu():
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(device="flagos"))


def test_bad_state_changes_nothing():
    generator = torch.Generator(device="flagos").manual_seed(4)
    state = generator.get_state()
    with pytest.raises((RuntimeError, TypeError)):
        generator.set_state(torch.zeros(3, dtype=torch.uint8))
    assert torch.equal(generator.get_state(), state)
    with pytest.raises(TypeError, match="ByteTensor, got 3"):
        torch.flagos.set_rng_state(3)


@pytest.mark.parametrize(
    "op", ["dropout", "bernoulli", "multinomial", "randint", "randperm", "normal_", "exponential_"]
)
def test_operators_repeat(op):
    def run():
        x = torch.full((64,), 0.5, device="flagos")
        if op == "dropout":
            return torch.nn.functional.dropout(x, 0.3)
        if op == "bernoulli":
            return torch.bernoulli(x)
        if op == "multinomial":
            return torch.multinomial(x, 20)
        if op == "randint":
            return torch.randint(1000, (64,), device="flagos")
        if op == "randperm":
            return torch.randperm(64, device="flagos")
        return getattr(x, op)()

    torch.manual_seed(8)
    first = run().cpu()
    second = run().cpu()
    torch.manual_seed(8)
    assert torch.equal(run().cpu(), first)
    assert not torch.equal(first, second)
