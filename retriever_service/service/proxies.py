"""Which proxy of the environment stands before an address.

By the variables that HTTP clients know (`http_proxy`, `https_proxy`, `all_proxy`, `no_proxy`, also in capitals), but
- an address of this machine is never asked for through a proxy;
- `no_proxy` may name networks, such as 10.0.0.0/8 or fd00::/8, beside hosts and domains.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def proxy_before(url: str) -> str | None:
    """The proxy through which `url` is asked for; None for a direct connection."""
    proxies, parts = getproxies(), urlsplit(url)
    host = parts.hostname or ""
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _is_here(host):
        return None
    if proxy_bypass(host) or proxy_bypass(parts.netloc.rpartition("@")[2]):  # the second with its port
        return None
    if any(_is_in_network(host, entry.strip()) for entry in proxies.get("no", "").split(",")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def without_password(proxy: str) -> str:
    """Scheme, host and port of a proxy, for messages."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _is_here(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _is_in_network(host: str, network: str) -> bool:
    try:
        return "/" in network and ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False
