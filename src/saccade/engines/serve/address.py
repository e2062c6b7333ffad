"""Where the server listens: this machine alone, unless told otherwise."""

from __future__ import annotations

import importlib.util
import ipaddress
import re
import socket

from saccade.core.errors import BadOption, CannotRun


def check_extra() -> None:
    """Whether what the extra brings is here.

    Raises:
        CannotRun: Starlette or uvicorn is not installed.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        found = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed"
        raise CannotRun("serve over HTTP", found, "Install the extra: pip install 'saccade[serve]'.")


def check_key(host: str, key: str | None, without_key: bool) -> None:
    """A place that others can reach needs a key, unless the user says that it does not.

    Raises:
        CannotRun: others could use the model.
        BadOption: a key that no header can carry.
    """
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise BadOption("an API key", "it is empty, or holds what a header cannot carry", "Give printable ASCII.")
    if key is None and not without_key and not is_local(host):
        found = "others can reach that address, and no key is set"
        raise CannotRun(f"listen on {host}", found, "Give --api-key, or say --allow-no-key.")


def is_local(host: str) -> bool:
    """Whether only this machine reaches it.

    Raises:
        CannotRun: nobody knows that host.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        found, do = str(error.strerror or error), "Give an address such as 127.0.0.1."
        raise CannotRun(f"listen on {host!r}", found, do) from error
    return bool(host) and all(ipaddress.ip_address(str(x[4][0]).split("%")[0]).is_loopback for x in found)


def is_own_name(host: str) -> bool:
    """Whether the Host header of a request is a name that only this machine has for itself, with a port or without."""
    name = re.sub(r":\d+$", "", host).lower()
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A bound socket, and the address of the API behind it. Port 0 takes a free one.

    Raises:
        BadOption: that is no port.
        CannotRun: it cannot be had.
    """
    if not 0 <= port < 2**16:
        raise BadOption(f"port {port}", "ports are numbers below 65,536", "Give one; 0 takes a free one.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        found = error.strerror or str(error)
        raise CannotRun(f"listen on {host}:{port}", found, "Give another --port; 0 takes a free one.") from error
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return bound, f"http://{shown}:{bound.getsockname()[1]}/v1"
