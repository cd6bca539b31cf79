"""Ceph: a store that people keep their data in, with its S3 gateway (RGW). Checks secrets and signatures.

One monitor, one storage daemon (OSD) and one gateway, no manager and nothing that needs root. What differs from a
cluster is the number of machines, not the code that answers a request.
"""

import shutil
import uuid
from pathlib import Path
from typing import Literal

from tests.support.servers.processes import free_port
from tests.support.servers.s3 import S3Server

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"


class CephServer(S3Server):
    """Ceph RGW over `memstore` (quick, gone with the OSD) or `bluestore` (on disk, survives a kill of the OSD).

    Args:
        store: One of them.
        host: Where clients find it; it answers on loopback too.
    """

    name = "ceph"
    real = True

    def __init__(self, store: Literal["memstore", "bluestore"] = "memstore", host: str = "127.0.0.1") -> None:
        self._store, self.host = store, host
        super().__init__()

    @classmethod
    def missing(cls) -> str | None:
        """Debian's packages."""
        absent = [program for program in PROGRAMS if shutil.which(program) is None]
        if not absent:
            return None
        return f"Ceph is not installed, no {absent[0]} here (as root: make servers; its packages: {PACKAGES})"

    def start(self) -> None:
        """A new, empty cluster."""
        cluster, osd = uuid.uuid4(), uuid.uuid4()
        monitor = f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]"
        folder = self.processes.folder
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        (folder / "ceph.conf").write_text(self._configuration(folder, str(cluster), monitor))
        (folder / "keyring").touch()
        run, conf = self.processes.run, ("--conf", "ceph.conf")
        run("monmaptool", "--create", "--fsid", str(cluster), "--addv", "a", monitor, "monmap")
        run("ceph-mon", *conf, "--mkfs", "--id", "a", "--monmap", "monmap", "--keyring", "keyring")
        self.processes.start("mon", "ceph-mon", *conf, "--foreground", "--id", "a")
        run("ceph", *conf, "--connect-timeout", "30", "osd", "new", str(osd))
        run("ceph-osd", *conf, "--id", "0", "--mkfs", "--osd-uuid", str(osd))
        self.start_osd()
        # Before the gateway, which else would first look for users that are not there yet, and cache that.
        names = ("--uid", "kilobasis", "--display-name", "kilobasis", "--access-key", self.key, "--secret", self.secret)
        run("radosgw-admin", *conf, "--name", "client.rgw", "user", "create", *names)
        self.start_gateway()

    def start_osd(self) -> None:
        """Start the storage daemon; requests that it left waiting go on when it has joined."""
        self.processes.start("osd", "ceph-osd", "--conf", "ceph.conf", "--foreground", "--id", "0")

    def kill_osd(self) -> None:
        """SIGKILL to the storage daemon. Requests wait until it is started again; a memstore has lost everything."""
        self.processes.kill("osd")

    def start_gateway(self) -> None:
        """Start the gateway and return when it answers."""
        self.processes.start("rgw", "radosgw", "--conf", "ceph.conf", "--foreground", "--name", "client.rgw")
        self.processes.wait_for(self.port)

    def kill_gateway(self) -> None:
        """SIGKILL to the gateway: connections break, and what it has acknowledged is with the OSD."""
        self.processes.kill("rgw")

    def _configuration(self, folder: Path, cluster: str, monitor: str) -> str:
        doors = " ".join(f"endpoint={host}:{self.port}" for host in sorted({"127.0.0.1", self.host}))
        sections: dict[str, dict[str, str | int | float]] = {
            "global": {
                "fsid": cluster,
                "mon host": monitor,
                "public addr": "127.0.0.1",
                "cluster addr": "127.0.0.1",
                "ms bind ipv6": "false",
                # Between the daemons. What clients sign is checked by the gateway.
                "auth cluster required": "none",
                "auth service required": "none",
                "auth client required": "none",
                # A gateway wants its monitors to encrypt; without keys it would then wait for ever.
                "ms mon client mode": "crc",
                "ms client mode": "crc",
                # How often who waits for the OSD looks whether it is there; 5 s would dominate every start.
                "objecter tick interval": 0.5,
                "admin socket": "",
                "pid file": "",
                "log to stderr": "true",
                "log file": "",
                "mon cluster log file": "",
                "run dir": folder.as_posix(),
                "crash dir": folder.as_posix(),
                "keyring": (folder / "keyring").as_posix(),
                "mon allow pool size one": "true",
                "mon max pg per osd": 2000,
                "mon data avail crit": 0,
                "osd pool default size": 1,
                "osd pool default min size": 1,
                "osd pool default pg num": 8,
                "osd pool default pg autoscale mode": "off",
                "osd crush chooseleaf type": 0,
            },
            "mon": {
                "mon data": (folder / "mon").as_posix(),
                # A start is a chain of changes to the cluster's maps, which each would wait a second.
                "paxos propose interval": 0.05,
                "paxos min wait": 0.02,
                "mon tick interval": 1,
            },
            "osd": {
                "osd data": (folder / "osd").as_posix(),
                "osd objectstore": self._store,
                "osd op num shards": 2,
                "osd memory target": 1 << 30,
                "memstore device bytes": 8 << 30,
                "bluestore block size": 20 << 30,  # a sparse file
                "bluestore fsck on mkfs": "false",
            },
            "client.rgw": {
                # Without nodelay, small answers wait 40 ms.
                "rgw frontends": f"beast {doors} tcp_nodelay=1",
                "rgw thread pool size": 32,
                "rgw enable usage log": "false",
                "rgw enable ops log": "false",
                "rgw dynamic resharding": "false",
                "rgw override bucket index max shards": 1,
                "rgw run sync thread": "false",
            },
        }
        lines = []
        for section, options in sections.items():
            lines += [f"[{section}]", *(f"{name} = {value}" for name, value in options.items())]
        return "\n".join(lines) + "\n"
