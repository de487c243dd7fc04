"""Addresses and interfaces of this machine, for traffic between nodes (Linux, IPv4)."""

import fcntl
import os
import socket
import struct

from llama_pretrain.config.problems import Problem, UserError

SIOCGIFADDR = 0x8915
"""The request for an interface's address (linux/sockios.h)."""


def list_addresses() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", os.fsencode(name))
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(query, SIOCGIFADDR, request)[20:24])
            except OSError:
                continue
    return found


def route_to(host: str) -> str:
    """The address of this machine from which packets to another host leave.

    Raises:
        OSError: if the name does not resolve, or no route leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packet:
        packet.connect((host, 9))  # sends nothing
        return str(packet.getsockname()[0])


def choose_address(*, interface: str | None, towards: str | None) -> tuple[str, str]:
    """The address and the interface of this machine for the other nodes.

    Args:
        interface: as `launch.interface` names it.
        towards: a host that the interface leads to.

    Raises:
        UserError: if there is no such interface, no route, or only one to this machine itself.
    """
    addresses = list_addresses()
    if interface is not None:
        if interface in addresses:
            return addresses[interface], interface
        known = ", ".join(f"{name} {address}" for name, address in addresses.items())
        message = f"is no interface with an IPv4 address (got {interface})"
        hint = f"This machine has {known}"
        raise UserError([Problem(path="launch.interface", message=message, hint=hint)])
    try:
        address = route_to(towards or "192.0.2.1")  # of documentation: the default route
    except OSError as error:
        message = f"no route leads to {towards or 'other hosts'}: {error.strerror or error}"
        hint = "Name node 0 with launch.master=HOST:PORT, or launch.interface"
        raise UserError([Problem(path="launch.master", message=message, hint=hint)]) from error
    names = [name for name, known in addresses.items() if known == address]
    if not names or address.startswith("127."):
        others = ", ".join(name for name in addresses if name != "lo") or "none"
        message = f"{towards} leads to this machine itself ({address}), which no other node reaches"
        hint = f"Set launch.master to another address, or launch.interface (there are {others})"
        raise UserError([Problem(path="launch.master", message=message, hint=hint)])
    return address, names[0]
