"""The model of the network: its times, by hand, and the choice that follows from them."""

import pytest

from jaxnorm.core.network import MACHINES, gather_is_faster

GPUS, TPUS = MACHINES.values()
NUMBERS = 12, 16  # bytes for each feature: three statistics in float32; with a mask four

# Sums of a few terms in float64; the numbers below are exact.
almost = lambda right: pytest.approx(right, rel=1e-12)


def test_times_within_a_node():
    # 7 steps of 0.6 us around a ring of 8, twice as many for a sum, which then has two starts.
    assert GPUS.gather(8, 141e3) == almost(6.6 + 7 * 0.6 + 7)
    assert GPUS.sum(8, 141e3) == almost(6.6 + 14 * 0.6 + 2 * 7 / 8)
    assert GPUS.two_sums(8, 141e3) == almost(2 * (6.6 + 14 * 0.6) + 2 * 7 / 8)


def test_times_between_nodes():
    # 32 nodes: 224 steps of 1 us within and 31 of 2.7 us between them; trees of depth 5.
    assert GPUS.gather(256, 2040) == almost(6.6 + 224 * 1.0 + 31 * 2.7 + 255 / 10)
    assert GPUS.sum(256, 2040) == almost(6.8 + 2 * (7 * 0.6 + 5 * 5.0) + 2 * 255 / 256 / 10)


def test_times_on_a_torus():
    # 4096 chips: half around each of three rings of 16.
    assert TPUS.gather(4096, 6000) == almost(5 + 3 * 8 + 4095 / 100)
    assert TPUS.sum(4096, 6000) == almost(5 + 2 * 3 * 8 + 2 * 4095 / 4096 / 100)


@pytest.mark.parametrize("size", [numbers * c for c in (1, 64, 256, 2048) for numbers in NUMBERS])
def test_the_choice_loses_the_least_time(size):
    for devices in range(2, 4097):
        saved = [m.two_sums(devices, size) - m.gather(devices, size) for m in MACHINES.values()]
        gather, sums = max(0, *(-time for time in saved)), max(0, *saved)  # the largest losses
        assert gather_is_faster(devices, size) == (gather <= sums)


@pytest.mark.parametrize("features", [1, 64, 256, 2048])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_more_devices_change_the_choice_once(numbers, features):
    choices = [gather_is_faster(devices, numbers * features) for devices in range(2, 4097)]
    assert choices == sorted(choices, reverse=True)
    # One node gathers. At 128 devices the steps of the ring of GPUs alone take too long.
    assert choices[8 - 2]
    assert not choices[128 - 2]


@pytest.mark.parametrize("devices", [3, 8, 9, 64])
def test_more_bytes_change_the_choice_once(devices):
    choices = [gather_is_faster(devices, 2**k) for k in range(40)]
    assert choices == sorted(choices, reverse=True)
    assert len(set(choices)) == 2


def test_two_devices_always_gather():
    # Each sends as much for a sum as for a table, so the latency decides.
    assert all(gather_is_faster(2, 2**k) for k in range(40))
