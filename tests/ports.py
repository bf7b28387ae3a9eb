"""Ports of the loopback for servers that tests start."""

import random
import socket


def free_port() -> int:
    """A port that nobody has, and that the kernel, which hands out those from 32768 on, gives to nobody meanwhile."""
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")
