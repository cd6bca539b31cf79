"""OpenStack Swift in one process: proxy, account, container and object server. Run by the Python that has Swift.

`swift_node.py FOLDER PORT KEY SECRET` serves the S3 API on PORT. Every server speaks HTTP with the others as on a
cluster. In front of the proxy stands a cache in this process, where a cluster has memcached.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ACCOUNT, CONTAINER, OBJECT = "account", "container", "object"


class Cache:
    """What Swift asks of memcached, as far as a proxy with temporary users does: values that end after some time."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, Any]] = {}

    def set(self, key: str, value: Any, *_: Any, time: float = 0, **__: Any) -> None:
        """Keep a value for `time` seconds, or for ever."""
        self._entries[key] = (now() + time if time else float("inf"), value)

    def get(self, key: str, **_: Any) -> Any:
        """The value; None where there is none any more."""
        end, value = self._entries.get(key, (0, None))
        return value if now() < end else None

    def delete(self, key: str, **_: Any) -> None:
        """Forget a value."""
        self._entries.pop(key, None)


def now() -> float:
    """Seconds on a clock that only goes forwards."""
    return time.monotonic()


def cache(_: Mapping[str, str], **__: str) -> Callable[[Any], Any]:
    """Filter factory: puts one cache into the environment of every request."""
    shared = Cache()

    def around(app: Any) -> Any:
        def serve(environ: dict[str, Any], start_response: Any) -> Any:
            environ["swift.cache"] = shared
            return app(environ, start_response)

        return serve

    return around


def write_configuration(folder: Path, key: str, secret: str) -> None:
    """One file for each server, and the cluster's secret salt of names."""
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n[storage-policy:0]\nname = test\n")
    common = f"swift_dir = {folder}\ndevices = {folder / 'devices'}\nmount_check = false\nlog_level = ERROR\n"
    for kind in (ACCOUNT, CONTAINER, OBJECT):
        (folder / f"{kind}.conf").write_text(
            f"[DEFAULT]\n{common}"
            f"[pipeline:main]\npipeline = {kind}-server\n"
            f"[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        )
    user, _, group = key.partition(":")
    (folder / "proxy.conf").write_text(
        f"[DEFAULT]\n{common}"
        "[pipeline:main]\npipeline = cache s3api tempauth slo proxy-server\n"
        "[filter:cache]\npaste.filter_factory = __main__:cache\n"
        "[filter:s3api]\nuse = egg:swift#s3api\nlocation = us-east-1\ns3_acl = false\n"
        f"[filter:tempauth]\nuse = egg:swift#tempauth\nuser_{user}_{group} = {secret} .admin\n"
        "[filter:slo]\nuse = egg:swift#slo\n"
        "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nnode_timeout = 60\n"
    )


def write_rings(folder: Path, ports: Mapping[str, int]) -> None:
    """Where each kind of data lies: on the one device that there is."""
    from swift.common.ring import RingBuilder

    for kind, port in ports.items():
        builder = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
        device = {"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d", "weight": 1.0}
        builder.add_dev(device | {"replication_ip": "127.0.0.1", "replication_port": port, "meta": ""})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))


def main(folder: Path, port: int, key: str, secret: str) -> None:
    """Serve until killed."""
    import eventlet
    import eventlet.wsgi
    from swift.common import utils

    utils.monkey_patch()
    listeners = {kind: eventlet.listen(("127.0.0.1", 0)) for kind in (ACCOUNT, CONTAINER, OBJECT)}
    ports = {kind: listener.getsockname()[1] for kind, listener in listeners.items()}
    (folder / "devices" / "d").mkdir(parents=True)
    write_configuration(folder, key, secret)
    # The path is fixed to /etc/swift, and is read when modules are imported.
    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    utils.validate_hash_conf()
    write_rings(folder, ports)

    from swift.common.wsgi import SwiftHttpProtocol, loadapp

    listeners["proxy"] = eventlet.listen(("127.0.0.1", port), backlog=128)
    serving = []
    for kind, listener in listeners.items():
        app = loadapp(str(folder / f"{kind}.conf"), global_conf={"log_name": kind})
        options = {"protocol": SwiftHttpProtocol, "capitalize_response_headers": False, "log_output": False}
        serving.append(eventlet.spawn(eventlet.wsgi.server, listener, app, **options))
    for server in serving:
        server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
