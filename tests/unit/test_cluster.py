"""Devices and clusters by name, and what is refused."""

import pytest

from dpo_scale.errors import ConfigError
from dpo_scale.forecast.cluster import (
    LINK_EFFICIENCY,
    cluster_of,
    find_device,
    parse_gpus,
    parse_interconnect,
    ring_latency,
)
from dpo_scale.observe.devices import BOARDS, board_of


@pytest.mark.parametrize(
    ("name", "expected", "memory"),
    [
        ("h100", "h100", 80e9),
        ("H100", "h100", 80e9),
        ("NVIDIA H100 80GB HBM3", "h100", 80e9),
        ("H100-SXM", "h100", 80e9),
        ("h100 nvl", "h100-nvl", 94e9),
        ("a100", "a100", 80e9),
        ("A100-40", "a100-40", 40e9),
        ("a100-40gb", "a100-40", 40e9),
        ("a100-80gb", "a100", 80e9),
        ("NVIDIA A100-SXM4-40GB", "a100-40", 40e9),
        ("NVIDIA A100-SXM4-80GB", "a100", 80e9),
        ("4090", "4090", 24e9),
        ("RTX 4090", "4090", 24e9),
        ("NVIDIA GeForce RTX 4090", "4090", 24e9),
        ("l40s", "l40s", 48e9),
        ("MI300X", "mi300x", 192e9),
        ("AMD Instinct MI300X", "mi300x", 192e9),
        ("gh200", "gh200", 96e9),
        ("GB200", "gb200", 186e9),
    ],
)
def test_devices_are_found_by_short_names_and_by_their_drivers(name, expected, memory):
    device = find_device(name, "bfloat16")
    assert (device.name, device.memory) == (expected, memory)


def test_every_board_is_found_by_its_own_name_and_has_a_source():
    for board in BOARDS:
        device = find_device(board.name, "bfloat16")
        assert device.name == board.name
        assert device.flops == board.bf16 * 1e12 > find_device(board.name, "float32").flops
        assert board.source in device.source and "assumed until measured" in device.source
        assert 0.2 < device.efficiency < 0.7


def test_special_boards_are_not_taken_for_plain_ones():
    assert board_of("NVIDIA GH200 480GB").name == "gh200"
    assert board_of("NVIDIA GB200").name == "gb200"
    assert board_of("NVIDIA H200").name == "h200"
    assert board_of("cpu") is None


def test_an_unknown_device_is_refused_and_near_ones_are_named():
    with pytest.raises(ConfigError, match=r"--device 'h10': not in the table of devices; did you mean .*h100"):
        find_device("h10", "bfloat16")
    with pytest.raises(ConfigError, match=r"--device 'h1000': not in the table of devices; did you mean .*h100"):
        find_device("h1000", "bfloat16")
    with pytest.raises(ConfigError, match="known are .*h100.* and cpu"):
        find_device("abacus!", "bfloat16")


def test_a_processor_says_that_it_is_assumed():
    assert "--calibrate" in find_device("cpu", "float32").source


def test_ranks_share_a_processor():
    alone, shared = (cluster_of(gpus, "cpu", "pcie", "float32").device for gpus in ("1", "2"))
    assert shared.memory == alone.memory // 2
    assert shared.flops == pytest.approx(alone.flops / 2)
    assert shared.bandwidth == pytest.approx(alone.bandwidth / 2)


@pytest.mark.parametrize(("text", "expected"), [("8", (1, 8)), ("4x8", (4, 8)), ("4X8", (4, 8)), (" 1 ", (1, 1))])
def test_gpus_are_a_number_or_machines_by_gpus(text, expected):
    assert parse_gpus(text) == expected


@pytest.mark.parametrize("text", ["0", "0x8", "4x0", "", "-1", "4x", "x8", "eight", "1.5", "2x2x2"])
def test_zero_gpus_and_nonsense_are_refused(text):
    with pytest.raises(ConfigError, match="--gpus"):
        parse_gpus(text)


def test_rates_of_links_by_hand():
    h100 = find_device("h100", "bfloat16")
    within, between = parse_interconnect("nvlink+ib400", h100, per_node=8)
    assert within == pytest.approx(450e9 * LINK_EFFICIENCY)
    assert between == pytest.approx(50e9 * LINK_EFFICIENCY)
    within, between = parse_interconnect("pcie+eth100", h100, per_node=8)
    assert within == pytest.approx(64e9 * LINK_EFFICIENCY)
    assert between == pytest.approx(100e9 / 8 / 8 * LINK_EFFICIENCY)  # of the machine, shared by 8 GPUs


@pytest.mark.parametrize("text", ["token-ring", "nvlink+pigeon", "nvlink+ib", "nvlink+ib0", "", "ib400"])
def test_unknown_links_are_refused_with_what_is_expected(text):
    with pytest.raises(ConfigError, match=r"--interconnect .*nvlink\+ib400"):
        parse_interconnect(text, find_device("h100", "bfloat16"), 8)


def test_a_board_without_nvlink_has_none():
    with pytest.raises(ConfigError, match="4090 has no NVLink; say pcie"):
        parse_interconnect("nvlink", find_device("4090", "bfloat16"), 8)


def test_several_machines_need_a_network():
    assert cluster_of("8", "h100", "nvlink", "bfloat16").world_size == 8
    with pytest.raises(ConfigError, match="2 machines need a network"):
        cluster_of("2x8", "h100", "nvlink", "bfloat16")


def test_without_a_named_interconnect_a_board_gets_what_it_has():
    assert cluster_of("2x8", "h100", None, "bfloat16").within == pytest.approx(450e9 * LINK_EFFICIENCY)
    assert cluster_of("2x8", "4090", None, "bfloat16").within == pytest.approx(32e9 * LINK_EFFICIENCY)


def test_a_ring_takes_a_step_to_each_next_rank():
    # 16 ranks on two machines: 14 steps within, 1 between
    assert ring_latency(2, 8) == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 14e-6)
    assert ring_latency(1, 8, by_peer_link=False) == pytest.approx(8.4e-6 + 7 * 5.7e-6)
