"""Where the processes of one machine meet: on a port that is nobody else's until they do."""

import socket

import pytest
import torch.distributed as dist

from megatron_eagle.parallel.launch import reserved_port


def test_a_reserved_port_is_given_to_nobody_else_and_can_be_listened_on() -> None:
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("who", "rank 0")
        assert store.get("who") == b"rank 0" and store.port == port
