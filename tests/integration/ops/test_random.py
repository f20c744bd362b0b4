"""Random operators: every one follows its device's generator, seeds repeat, generators are independent."""

import pytest
import torch

import torch_fl

pytestmark = pytest.mark.anyplatform

DRAWS = {
    "rand": lambda d, g: torch.rand(20, device=d, generator=g),
    "randn": lambda d, g: torch.randn(20, device=d, generator=g),
    "randint": lambda d, g: torch.randint(1000, (20,), device=d, generator=g),
    "randperm": lambda d, g: torch.randperm(50, device=d, generator=g),
    "normal": lambda d, g: torch.normal(0.0, 1.0, (20,), device=d, generator=g),
    "normal_tensors": lambda d, g: torch.normal(torch.zeros(20, device=d), torch.ones(20, device=d), generator=g),
    "bernoulli": lambda d, g: torch.bernoulli(torch.full((100,), 0.5, device=d), generator=g),
    "multinomial": lambda d, g: torch.multinomial(torch.ones(50, device=d), 20, generator=g),
    "uniform_": lambda d, g: torch.empty(20, device=d).uniform_(generator=g),
    "normal_": lambda d, g: torch.empty(20, device=d).normal_(generator=g),
    "exponential_": lambda d, g: torch.empty(20, device=d).exponential_(generator=g),
    "cauchy_": lambda d, g: torch.empty(20, device=d).cauchy_(generator=g),
    "geometric_": lambda d, g: torch.empty(20, device=d).geometric_(0.1, generator=g),
    "log_normal_": lambda d, g: torch.empty(20, device=d).log_normal_(generator=g),
    "random_": lambda d, g: torch.empty(20, device=d).random_(0, 1000, generator=g),
    "poisson": lambda d, g: torch.poisson(torch.full((20,), 50.0, device=d), generator=g),
}
# These take no generator: only the device's own serves them.
DEFAULT_ONLY = {
    "dropout": lambda d: torch.nn.functional.dropout(torch.ones(100, device=d), 0.5),
    "rand_like": lambda d: torch.rand_like(torch.ones(20, device=d)),
    "randn_like": lambda d: torch.randn_like(torch.ones(20, device=d)),
    "randint_like": lambda d: torch.randint_like(torch.ones(20, device=d), 1000),
    "binomial": lambda d: torch.binomial(torch.full((20,), 100.0, device=d), torch.full((20,), 0.5, device=d)),
    "rrelu": lambda d: torch.nn.functional.rrelu(-torch.ones(20, device=d), training=True),
    "alpha_dropout": lambda d: torch.nn.functional.alpha_dropout(torch.ones(100, device=d), 0.5, training=True),
    "gamma": lambda d: torch.distributions.Gamma(torch.ones(20, device=d), torch.ones(20, device=d)).sample(),
    "dirichlet": lambda d: torch._sample_dirichlet(torch.ones(20, device=d)),
    "gumbel_softmax": lambda d: torch.nn.functional.gumbel_softmax(torch.ones(20, device=d)),
    "trunc_normal_": lambda d: torch.nn.init.trunc_normal_(torch.empty(20, device=d)),
    "fractional_pool": lambda d: torch.nn.functional.fractional_max_pool2d(
        torch.arange(400.0, device=d).view(1, 1, 20, 20), 2, output_size=9
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_seed_repeats_and_moves_on(name, device):
    draw = DRAWS[name]
    for generator in (None, torch.Generator(device=device)):
        seed = generator.manual_seed if generator is not None else torch.manual_seed
        seed(7)
        first, second = draw(device, generator), draw(device, generator)
        seed(7)
        again = draw(device, generator)
        assert torch.equal(first, again), "the seed does not repeat"
        assert not torch.equal(first, second), "the state did not move on"


@pytest.mark.parametrize("name", DRAWS)
def test_equals_the_cpu_s_numbers_on_the_host_chip(name, device):
    if torch_fl.chip() != "host":
        pytest.skip("only the simulated host uses the CPU's generator")
    torch.manual_seed(3)
    expected = DRAWS[name]("cpu", None)
    torch.manual_seed(3)
    assert torch.equal(DRAWS[name](device, None).cpu(), expected)


@pytest.mark.parametrize("name", DEFAULT_ONLY)
def test_default_generator_serves_all(name, device):
    results = []
    for seed in (5, 5, 6, 7, 8, 9):  # of few possible results two seeds may give the same
        torch.manual_seed(seed)
        results.append(DEFAULT_ONLY[name](device))
    assert torch.equal(results[0], results[1]), "does not follow torch.manual_seed"
    assert not all(torch.equal(results[0], result) for result in results[2:]), "does not depend on the seed"
    if torch_fl.chip() == "host":
        torch.manual_seed(5)
        torch.testing.assert_close(results[0].cpu(), DEFAULT_ONLY[name]("cpu"))


def test_device_draws_leave_the_cpu_generator_alone(device):
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    torch.rand(100, device=device)
    torch.nn.functional.dropout(torch.ones(100, device=device))
    assert torch.equal(torch.rand(5), expected)


def test_generators_are_independent(device):
    a, b = (torch.Generator(device=device).manual_seed(2) for _ in range(2))
    first = torch.rand(5, device=device, generator=a)
    torch.rand(50, device=device, generator=a)
    torch.rand(50, device=device)
    assert torch.equal(torch.rand(5, device=device, generator=b), first)


def test_devices_have_their_own_state():
    if torch.flagos.device_count() < 2:
        pytest.skip("needs two devices")
    torch.manual_seed(4)
    torch.rand(10, device="flagos:0")
    second = torch.rand(5, device="flagos:1")
    torch.manual_seed(4)
    assert torch.equal(torch.rand(5, device="flagos:1"), second)
