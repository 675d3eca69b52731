"""Which files may be looked at in an event loop: those whose look waits for nobody."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepflow_runtime import nearby
from stepflow_runtime.nearby import _is_local, is_nearby

MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw
31 27 0:40 / /home rw - nfs4 server:/home rw
32 31 0:41 / /home/me/scratch rw - tmpfs tmpfs rw
33 27 0:42 / /mnt/with\040space rw - fuse.sshfs me@there: rw
34 27 0:43 / /var rw - ext4 /dev/vdb rw
35 34 0:44 / /var rw - cifs //there/var rw
broken
36 27
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", True),
        ("/flow.yaml", True),
        ("/home", False),
        ("/home/me/flow.yaml", False),
        ("/homework/flow.yaml", True),
        ("/home/me/scratch/flow.yaml", True),
        ("/home/me/scratches/flow.yaml", False),
        ("/mnt/with space/flow.yaml", False),
        ("/mnt/without/flow.yaml", True),
        ("/var/flow.yaml", False),  # of two at one point, the upper one
        ("/proc/self/fd/3", False),
    ],
)
def test_the_innermost_mount_decides(path: str, expected: bool) -> None:
    assert _is_local(path, MOUNTS) is expected


def test_nothing_is_nearby_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _is_local("/flow.yaml", "")
    monkeypatch.setattr(nearby, "_MOUNTS", str(tmp_path / "nothing"))
    assert not is_nearby(str(tmp_path / "flow.yaml"))
    assert not is_nearby("a\0b")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    link = tmp_path / "flow.yaml"
    link.symlink_to("/proc/self/status")
    assert not is_nearby(str(link))
