"""A container of what is installed here: the wheel on a root file system that nobody writes to, run by runc as a user
without any right, with the devices that a test names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from tests.agent.agents import Result
from tests.lacking import lacking
from tests.programs import outside, say

USER = 65532
DEVICE = Path("/dev/userfaultfd")
# What the profiles of container engines say of us: the system call is refused, the device's ioctl is not.
SECCOMP = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["userfaultfd"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
}


class Container:
    """A root file system of this host's Python, its packages, and the unpacked wheel before them."""

    def __init__(self, folder: Path, unpacked: Path) -> None:
        self._folder = folder
        self._bundle = folder / "bundle"
        self._binds = {"/usr": "/usr", "/opt/postcopy": str(unpacked)}
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        self._binds["/opt/packages"] = packages
        self._python = os.path.realpath(sys.executable)
        if not self._python.startswith("/usr/"):
            self._binds[sys.base_prefix] = sys.base_prefix
        root = self._bundle / "rootfs"
        for inside in (*self._binds, "/proc", "/dev", "/sys", "/tmp"):
            (root / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
        (root / "tmp").chmod(0o1777)
        for name in ("bin", "lib", "lib64", "sbin"):
            (root / name).symlink_to(f"usr/{name}")
        for path in (folder, *folder.parents):
            if Path(tempfile.gettempdir()) in path.parents and path.stat().st_uid == os.geteuid():
                path.chmod(0o755)

    def run(self, *arguments: str, device: bool = True) -> Result:
        """Run a command of postcopy in it."""
        if os.geteuid() != 0:
            lacking("containers without root are not tried here")
        specification = self._specification(arguments, device=device)
        (self._bundle / "config.json").write_text(json.dumps(specification))
        name = f"postcopy-{uuid.uuid4().hex[:12]}"
        done = say("runc", "--root", self._folder / "state", "run", "--bundle", self._bundle, name)
        return Result(done.returncode, done.stdout, done.stderr, 0.0)

    def _specification(self, arguments: tuple[str, ...], *, device: bool) -> dict[str, Any]:
        if not (self._bundle / "config.json").exists():
            subprocess.run([outside("runc"), "spec", "--bundle", str(self._bundle)], check=True)
            (self._bundle / "config.json").rename(self._bundle / "default.json")
        made: dict[str, Any] = json.loads((self._bundle / "default.json").read_text())
        made["process"] |= {
            "terminal": False,
            "user": {"uid": USER, "gid": USER},
            "args": [self._python, "-m", "agent", *arguments],
            "env": ["PYTHONPATH=/opt/postcopy:/opt/packages", "HOME=/tmp", "POSTCOPY_LOG_FORMAT=text"],
            "capabilities": {},
            "noNewPrivileges": True,
        }
        made["root"]["readonly"] = True
        made["mounts"] += [
            {"destination": inside, "source": source, "type": "bind", "options": ["rbind", "ro"]}
            for inside, source in self._binds.items()
        ]
        made["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
        linux = made["linux"]
        linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] != "network"]  # its loopback is down
        linux["seccomp"] = SECCOMP
        if device:
            number = DEVICE.stat().st_rdev
            known = {"type": "c", "major": os.major(number), "minor": os.minor(number)}
            linux["devices"] = [{"path": str(DEVICE), **known, "fileMode": 0o660, "uid": 0, "gid": USER}]
            linux["resources"]["devices"].append({"allow": True, **known, "access": "rw"})
        return made
