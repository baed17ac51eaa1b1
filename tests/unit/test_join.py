"""Which network gloo is told to take. Real machines: tests/nodes/test_start.py."""

import os
import socket

import pytest

from dpo_scale.distributed.join import name_network


@pytest.fixture(autouse=True)
def debian(monkeypatch):
    """A host whose own name means 127.0.1.1, as rank 0 of two."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node-a")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_WORLD_SIZE": "2"},
        {"LOCAL_SIZE": "2"},
        {"MASTER_ADDR": "127.0.0.1"},
        {"MASTER_ADDR": "localhost"},
        {"GLOO_SOCKET_IFNAME": "ib0"},
    ],
)
def test_ranks_of_one_machine_need_no_network_and_what_is_set_stays(monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name_network("gloo")
    assert os.environ.get("GLOO_SOCKET_IFNAME") == variables.get("GLOO_SOCKET_IFNAME")
    assert capsys.readouterr().out == ""


def test_nccl_looks_for_a_network_itself(monkeypatch, capsys):
    name_network("nccl")
    assert capsys.readouterr().out == ""
