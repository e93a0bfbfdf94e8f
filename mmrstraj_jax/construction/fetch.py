"""HTTP requests that cannot be turned against the machine or its network (server-side request forgery).

The host is resolved once per hop, every address must be public, and the connection goes to the address that
was checked: a name that resolves to another one a moment later (DNS rebinding) changes nothing. Redirects are
followed by hand under the same rules. Proxies of the environment are not used: they would resolve again.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from mmrstraj_jax.errors import UserError

_REDIRECTS = (301, 302, 303, 307, 308)


class FetchError(UserError):
    """A download that failed; names the host only, because paths and queries hold keys."""

    def __init__(
        self, message: str, retryable: bool = False, retry_after: float | None = None, status: int = 0
    ):
        super().__init__(message)
        self.retryable = retryable
        self.retry_after = retry_after  # seconds, as the server asked
        self.status = status  # of HTTP; 0 where the server did not answer so far


@dataclass(frozen=True)
class Limits:
    """Of one download, redirects included."""

    max_bytes: int = 16 * 2**20
    seconds: float = 30.0
    redirects: int = 3


LIMITS = Limits()


class Response(NamedTuple):
    """A complete body and its declared type, lower case without parameters."""

    body: bytes
    content_type: str
    total: int  # bytes of the whole, where a part was asked for


def is_public(address: str, allow_loopback: bool = False) -> bool:
    """Whether an IP address may be connected to; looks through IPv4 addresses wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner), allow_loopback)
    if ip.is_loopback:
        return allow_loopback
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def resolve(host: str, port: int, allow_loopback: bool = False) -> list[str]:
    """The addresses to try, in order. Raises FetchError: unknown host, or an address is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError(f"{host}: the name does not resolve; check it and the network", True) from None
    addresses = [str(entry[4][0]) for entry in found]
    blocked = [address for address in addresses if not is_public(address, allow_loopback)]
    if blocked or not addresses:
        raise FetchError(f"{host}: {blocked[:1]} is a private or local address; expected a public server")
    return addresses


def _connect(addresses: list[str], port: int, seconds: float) -> socket.socket:
    """The first of the checked addresses that takes the connection: many machines have no IPv6 route."""
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), timeout=seconds)
        except OSError:
            continue
    return socket.create_connection((addresses[-1], port), timeout=seconds)


class _Guard:
    """Closes the socket at the deadline: a server that drips never exceeds a timeout per read."""

    def __init__(self, seconds: float):
        self.expired = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> "_Guard":
        self._timer.start()
        return self

    def __exit__(self, *_) -> None:
        self._timer.cancel()

    def watch(self, connection: socket.socket) -> None:
        self._socket = connection
        if self.expired:
            self._expire()

    def _expire(self) -> None:
        self.expired = True
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # already closed: nothing is left to interrupt


def get(
    url: str,
    limits: Limits = LIMITS,
    *,
    allow_loopback: bool = False,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Response:
    """The body behind an http or https URL.

    Args:
      allow_loopback: for tests with a server on this machine only.
      headers: further ones, such as Authorization; with any, no redirect is followed (it would take them
        along).
      body: sent with POST; without one it is GET.
    Raises:
      FetchError: not http(s), user or password in the URL, a host that is not public (first or after a
        redirect), https to http, too many redirects, too large, too slow, compressed, or a status not 200.
        Of these 408, 425, 429, 5xx, timeouts and broken connections are `retryable`.
    """
    redirects = 0 if headers or body is not None else limits.redirects
    sent = {
        "User-Agent": "mmrstraj_jax",
        "Accept": "image/png, image/jpeg, application/json",
        **(headers or {}),
    }
    with _Guard(limits.seconds) as guard:
        for _ in range(redirects + 1):
            location, response = _hop(url, limits, guard, allow_loopback, sent, body)
            if response is not None:
                return response
            if urlsplit(url).scheme == "https" and urlsplit(location).scheme != "https":
                raise FetchError(f"{urlsplit(url).hostname}: redirected from https to http; refused")
            url = location
    raise FetchError(f"{urlsplit(url).hostname}: more than {redirects} redirects")


def _hop(url: str, limits: Limits, guard: _Guard, allow_loopback: bool, sent: Mapping, body: bytes | None):
    """("", Response), or (where to go next, None)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise FetchError("a malformed URL; expected http://HOST/PATH or https://HOST/PATH") from None
    if parts.scheme not in ("http", "https") or not host:
        raise FetchError(f"URL scheme {parts.scheme[:20]!r}: expected http or https and a host")
    if parts.username is not None or parts.password is not None:
        raise FetchError(f"{host}: user or password in the URL; keys come from the environment")
    port = port or (443 if parts.scheme == "https" else 80)
    addresses = resolve(host, port, allow_loopback)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = http.client.HTTPConnection(host, port, timeout=limits.seconds)
    try:
        # connected here, to the checked address: http.client would resolve the name again
        raw = _connect(addresses, port, limits.seconds)
        connection.sock = raw
        guard.watch(raw)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
            guard.watch(connection.sock)
        default = port == (443 if parts.scheme == "https" else 80)
        name = f"[{host}]" if ":" in host else host
        headers = {"Host": name if default else f"{name}:{port}", "Accept-Encoding": "identity", **sent}
        connection.request("GET" if body is None else "POST", target, body, headers)
        expected = 206 if "Range" in sent else 200  # a server without ranges would send the whole file
        return _answer(connection.getresponse(), url, host, limits, guard, expected)
    except ssl.SSLCertVerificationError:
        raise FetchError(f"{host}: its certificate is not valid") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, FetchError):
            raise
        why = f"no answer within {limits.seconds:g} s" if guard.expired else type(error).__name__
        raise FetchError(f"{host}: the download failed ({why})", retryable=True) from None
    finally:
        connection.close()


def _answer(
    response: http.client.HTTPResponse, url: str, host: str, limits: Limits, guard: _Guard, expected: int
):
    if response.status in _REDIRECTS:
        location = response.getheader("Location")
        if not location:
            raise FetchError(f"{host}: a redirect that leads nowhere")
        return urljoin(url, location), None
    if response.status != expected:
        after = response.getheader("Retry-After") or ""
        retryable = response.status in (408, 425, 429) or response.status >= 500
        wait = float(after) if after.isdecimal() else None
        raise FetchError(f"{host}: HTTP status {response.status}", retryable, wait, response.status)
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise FetchError(f"{host}: a compressed body, though none was asked for")
    declared = response.getheader("Content-Length") or ""
    if declared.isdecimal() and int(declared) > limits.max_bytes:
        raise FetchError(f"{host}: {declared} bytes announced, at most {limits.max_bytes} taken")
    body = response.read(limits.max_bytes + 1)
    if len(body) > limits.max_bytes:
        raise FetchError(f"{host}: more than {limits.max_bytes} bytes")
    # read(amount) does not report a body that ends early, and an interrupted one looks the same
    if guard.expired or (declared.isdecimal() and len(body) != int(declared)):
        why = f"no end within {limits.seconds:g} s" if guard.expired else "cut off"
        raise FetchError(f"{host}: the body was incomplete ({why})", retryable=True)
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    total = (response.getheader("Content-Range") or "").rpartition("/")[2]
    return "", Response(body, kind, int(total) if total.isdecimal() else len(body))
