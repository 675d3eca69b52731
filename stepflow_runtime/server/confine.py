"""Keeps the server's port on loopback, whatever address it asks for (Linux, without root).

The server binds ``0.0.0.0``, and has no option for another address. So the kernel is told,
by a seccomp filter, to ask us whenever the server or a process of its calls ``bind(2)``; and
where it asks for the server's port, it gets a socket that we have bound to 127.0.0.1.

Contract: between :func:`confine`, in the thread that is to spawn the server, and
:meth:`Confinement.close` a TCP socket of these processes gets the port on loopback only,
from its first moment; every other ``bind`` is done as if nobody had asked. Nothing else is
changed for anybody: a filter belongs to a thread and to what that starts, and the thread
that spawned the server ends. Where it cannot be had, :class:`CannotConfineError` says why,
before the server is started.

The steps, each with its why:

1. :class:`Confinement` starts a thread that answers the kernel's questions. It comes
   first, since a thread that is started later would have the filter itself. It is a thread
   since processes wait for it: an event loop that is blocked must not make them wait.
2. :func:`_install` sets ``PR_SET_NO_NEW_PRIVS``, without which only root may install a
   filter (else a filter could fool a setuid program), and installs the filter. The kernel
   returns a descriptor, the listener, from which the questions are read.
3. The server is spawned, and inherits the filter, as its workers will.
4. For each question the thread reads the address that is asked for from the memory of the
   process that asks, and :func:`loopback_for` decides.
5. If it is the server's port, we make a socket in the place of the server's own and bind it to
   127.0.0.1; the kernel puts it where the server's was (``SECCOMP_IOCTL_NOTIF_ADDFD``), and
   ``bind`` returns 0. To bind the server's own would take ``pidfd_getfd(2)``, which
   containers forbid (Docker does, by default).
6. Everything else goes on as it was asked for (``SECCOMP_USER_NOTIF_FLAG_CONTINUE``).

The names are those of the kernel's headers: linux/seccomp.h, linux/filter.h, linux/audit.h,
linux/bpf_common.h; described in seccomp(2) and seccomp_unotify(2). It needs Linux 5.9.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import sys
import threading
from contextlib import suppress
from typing import Final, NamedTuple

if sys.platform != "win32":
    import fcntl

from ..forks import forget_in_child, no_forks
from ..logs.own import report
from .options import Exposure
from .port import LOOPBACK, HeldPort

__all__ = ["CannotConfineError", "Confinement", "Unconfined", "confine", "loopback_for"]

# -- the kernel's numbers --------------------------------------------------------------

_PR_SET_NO_NEW_PRIVS: Final = 38

_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
_SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5
_SECCOMP_RET_USER_NOTIF: Final = 0x7FC00000
_SECCOMP_RET_ALLOW: Final = 0x7FFF0000
_SECCOMP_USER_NOTIF_FLAG_CONTINUE: Final = 1 << 0
_SECCOMP_ADDFD_FLAG_SETFD: Final = 1 << 0

# struct seccomp_data { int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]; }
_OFFSET_NR: Final = 0
_OFFSET_ARCH: Final = 4
# struct seccomp_notif { __u64 id; __u32 pid; __u32 flags; struct seccomp_data data; }
_NOTIF: Final = struct.Struct("=QII iIQ6Q")
# struct seccomp_notif_resp { __u64 id; __s64 val; __s32 error; __u32 flags; }
_NOTIF_RESP: Final = struct.Struct("=QqiI")
# struct seccomp_notif_addfd { __u64 id; __u32 flags, srcfd, newfd, newfd_flags; }
_NOTIF_ADDFD: Final = struct.Struct("=QIIII")


def _ioc(direction: int, number: int, size: int) -> int:
    """A request of ioctl(2), as linux/ioctl.h makes them; ``'!'`` is seccomp's letter."""
    return direction << 30 | size << 16 | ord("!") << 8 | number


_WRITE: Final = 1
_READ_WRITE: Final = 3
_SECCOMP_IOCTL_NOTIF_RECV: Final = _ioc(_READ_WRITE, 0, _NOTIF.size)
_SECCOMP_IOCTL_NOTIF_SEND: Final = _ioc(_READ_WRITE, 1, _NOTIF_RESP.size)
_SECCOMP_IOCTL_NOTIF_ID_VALID: Final = _ioc(_WRITE, 2, struct.calcsize("=Q"))
_SECCOMP_IOCTL_NOTIF_ADDFD: Final = _ioc(_WRITE, 3, _NOTIF_ADDFD.size)

# struct sock_filter { __u16 code; __u8 jt; __u8 jf; __u32 k; }
_SOCK_FILTER: Final = struct.Struct("=HBBI")
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

# A signal that comes while we answer must not have bind ask again, where the answer is
# done already, nor fail with EINTR, which it never does otherwise. Known since Linux 5.19;
# before, it can happen.
_FLAGS: Final = (
    _SECCOMP_FILTER_FLAG_NEW_LISTENER | _SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
    _SECCOMP_FILTER_FLAG_NEW_LISTENER,
)

# The longest address of a socket: struct sockaddr_storage.
_SOCKADDR_STORAGE: Final = 128


class _Machine(NamedTuple):
    """What of the kernel's interface differs by processor.

    :ivar audit_arch: how a filter tells the processor's mode
    :ivar bind: the number of bind(2)
    :ivar seccomp: the number of seccomp(2)
    """

    audit_arch: int
    bind: int
    seccomp: int


_MACHINES: Final = {
    "x86_64": _Machine(audit_arch=0xC000003E, bind=49, seccomp=317),
    "aarch64": _Machine(audit_arch=0xC00000B7, bind=200, seccomp=277),
}


class CannotConfineError(OSError):
    """Why the port cannot be kept on loopback here."""


# -- the decision ----------------------------------------------------------------------


def loopback_for(sockaddr: bytes, port: int) -> tuple[socket.AddressFamily, str] | None:
    """Where the socket is to be bound instead; None to let it be bound where it asks.

    Who asks for the server's port is told to go to 127.0.0.1, which is where the client
    looks for it, also through an IPv6 socket; and who asks for just that, too, since the
    port is held there. Other addresses of loopback are nobody's but this machine's.

    :param sockaddr: the address that bind(2) was called with, as it is in memory
    :param port: the server's
    """
    if len(sockaddr) < 16:  # of a Unix socket, or nothing at all
        return None
    # struct sockaddr_in { sa_family_t family; in_port_t port; struct in_addr addr; ... }
    (family,) = struct.unpack_from("=H", sockaddr)
    (asked,) = struct.unpack_from("!H", sockaddr, 2)
    if asked != port:
        return None
    if family == socket.AF_INET:
        if _is_another_loopback(sockaddr[4:8]):
            return None
        return socket.AF_INET, LOOPBACK
    if family == socket.AF_INET6 and len(sockaddr) >= 24:
        # struct sockaddr_in6 { family; port; __be32 flowinfo; struct in6_addr addr; ... }
        address = sockaddr[8:24]
        mapped = address[:12] == b"\0" * 10 + b"\xff\xff"
        if (
            address == b"\0" * 15 + b"\1"
            or mapped
            and _is_another_loopback(address[12:])
        ):
            return None
        return socket.AF_INET6, f"::ffff:{LOOPBACK}"
    return None


def _is_another_loopback(address: bytes) -> bool:
    return address[0] == 127 and address != socket.inet_aton(LOOPBACK)


# -- the filter ------------------------------------------------------------------------


def filter_for(machine: _Machine) -> bytes:
    """The program that the kernel runs at each system call: ask about bind, allow the rest.

    Calls by another processor mode's numbers (32 bits) are allowed: the server makes none.
    """
    instructions = (
        (_LOAD, 0, 0, _OFFSET_ARCH),
        (_JUMP_IF_EQUAL, 0, 3, machine.audit_arch),  # or skip 3
        (_LOAD, 0, 0, _OFFSET_NR),
        (_JUMP_IF_EQUAL, 0, 1, machine.bind),  # or skip 1
        (_RETURN, 0, 0, _SECCOMP_RET_USER_NOTIF),
        (_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
    )
    return b"".join(_SOCK_FILTER.pack(*each) for each in instructions)


def _machine() -> _Machine:
    """This machine; for that of a 32-bit Python the numbers would be others."""
    name = os.uname().machine
    machine = _MACHINES.get(name)
    if machine is None or sys.maxsize < 2**32:
        raise CannotConfineError(
            f"that is known for x86_64 and aarch64 only, not for this {name}"
        )
    return machine


def _install() -> int:
    """Install the filter in this thread, for what it starts; return the listener.

    :raises CannotConfineError: if the kernel, or who confines us, does not let us
    :raises OSError: if there is no descriptor, or memory, for it
    """
    try:
        import ctypes  # takes 2 ms to come
    except ImportError as exc:  # built without libffi
        raise CannotConfineError(f"this Python has no ctypes ({exc})") from exc

    class SockFprog(ctypes.Structure):
        """struct sock_fprog { unsigned short len; struct sock_filter *filter; }"""

        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    machine = _machine()
    libc = ctypes.CDLL(None, use_errno=True)
    program = filter_for(machine)
    fprog = SockFprog(len(program) // _SOCK_FILTER.size, program)
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, one, zero, zero, zero) != 0:
        raise _refusal("PR_SET_NO_NEW_PRIVS", ctypes.get_errno())
    for flags in _FLAGS:
        listener: int = libc.syscall(
            ctypes.c_long(machine.seccomp),
            ctypes.c_uint(_SECCOMP_SET_MODE_FILTER),
            ctypes.c_uint(flags),
            ctypes.byref(fprog),
        )
        if listener >= 0:
            return listener
        if (number := ctypes.get_errno()) != errno.EINVAL:
            break
    raise _refusal("SECCOMP_FILTER_FLAG_NEW_LISTENER", number)


_REASONS: Final = {
    errno.EINVAL: "the kernel is older than Linux 5.9, or built without it",
    errno.ENOSYS: "the kernel is older than Linux 5.9, or built without it",
    errno.EBUSY: "this process runs under another filter that asks somebody, as a worker "
    "of another runtime's server does",
}


# What may be there in a moment says nothing of the machine: the start fails, as it does
# where there is none of it for the rest, and no port is opened for it.
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _refusal(what: str, number: int) -> OSError:
    if number in _EXHAUSTED:
        return OSError(number, os.strerror(number))
    reason = _REASONS.get(number, "a container's profile may forbid it")
    return CannotConfineError(
        f"seccomp's {what} is refused ({os.strerror(number)}): {reason}"
    )


# -- the answers -----------------------------------------------------------------------


def confine(port: HeldPort, exposure: Exposure) -> Confinement | Unconfined:
    """Confine what this thread starts from now on, as the option says.

    :param port: the server's
    :raises CannotConfineError: if that cannot be had, and is required
    """
    trouble = None
    if exposure != "any":
        is_required = exposure == "require-loopback"
        try:
            return Confinement(port, strict=is_required)
        except CannotConfineError as exc:
            if is_required:
                raise
            trouble = str(exc)
    port.lend()  # who binds it is the server itself, at some time in its start
    return Unconfined(trouble)


_OPEN: Final = (
    "the Stepflow server listens on all network interfaces, without authentication: whoever "
    "reaches port %d of this machine can run workflows and read files. It could not be kept "
    "on loopback: %s. Close the port by a firewall, or run the program in a container or a "
    'network namespace; exposure="any" says that it is meant, exposure="require-loopback" '
    "that nothing is to be started then."
)
_warned = False


def warn_of_exposure(port: int, trouble: str) -> None:
    """Say what is open, why, and what to do: once in the life of a program."""
    global _warned
    if not _warned:
        _warned = True
        report(logging.WARNING, _OPEN, port, trouble)


class Unconfined:
    """Stands for a confinement where there is none.

    :ivar trouble: why; None if nobody asked for one
    """

    def __init__(self, trouble: str | None) -> None:
        self.trouble = trouble

    def close(self) -> None:
        pass

    forget = close


class _Question(NamedTuple):
    """Somebody calls bind(2), and waits.

    :ivar id: the question's
    :ivar asker: the thread that calls, by its id
    :ivar fd: the number that its socket has there
    :ivar address: where in its memory the address is
    :ivar length: how long that is
    """

    id: int
    asker: int
    fd: int
    address: int
    length: int


class Confinement:
    """Answers the questions about one server and its workers.

    :param port: the server's
    :param strict: if the port cannot be kept on loopback after all, let the server have
        none, instead of one that is open
    :raises CannotConfineError: if it cannot be had
    :raises OSError: if there is no descriptor, or memory, for it
    :raises RuntimeError: if there is no thread
    """

    def __init__(self, port: HeldPort, *, strict: bool) -> None:
        if port.number == 0:
            raise CannotConfineError("which port the server takes, it alone knows")
        self._port = port
        self._strict = strict
        self._trouble = "whoever bound it was not asked about"
        self._is_kept = False
        self._listener: int | None = None
        self._is_installed = threading.Event()
        self._lock = threading.Lock()
        self._is_over = False
        self._bell, self._ringing = os.pipe()
        os.set_blocking(self._ringing, False)
        self._thread = threading.Thread(
            target=self._serve, daemon=True, name="stepflow-runtime loopback"
        )
        forget_in_child(self)
        self._start()

    @property
    def trouble(self) -> str | None:
        """Why the port may be open to others; None if it is kept on loopback."""
        return None if self._is_kept else self._trouble

    def close(self) -> None:
        """Answer no more: from now on a process that is left cannot bind (ENOSYS)."""
        with self._lock:
            if not self._is_over:
                os.write(self._ringing, b"!")

    def forget(self) -> None:
        """Close it where nobody is in here, like a forked child, which has no threads."""
        self._lock = threading.Lock()
        self._end()

    def _start(self) -> None:
        """Start the thread that answers, and install the filter in the calling one."""
        try:
            self._thread.start()
        except RuntimeError:
            self.forget()
            raise
        try:
            self._listener = _install()
        finally:
            self._is_installed.set()

    def _serve(self) -> None:
        try:
            self._is_installed.wait()
            if self._listener is not None:
                self._answer_all(self._listener)
        finally:
            # Whoever asks from now on must not wait, also if something went wrong here.
            with no_forks():  # a child would not know what is left to close
                self._end()

    def _answer_all(self, listener: int) -> None:
        waiting = select.poll()
        waiting.register(self._bell, select.POLLIN)
        waiting.register(listener, select.POLLIN)
        # The listener hangs up when the last process that has the filter is gone.
        while waiting.poll() == [(listener, select.POLLIN)]:
            if not self._answer_next(listener):
                break

    def _end(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            for fd in (self._listener, self._bell, self._ringing):
                if fd is not None:
                    os.close(fd)

    def _answer_next(self, listener: int) -> bool:
        """Answer a question; False if there will be no more."""
        received = bytearray(_NOTIF.size)  # the kernel wants zeros
        try:
            fcntl.ioctl(listener, _SECCOMP_IOCTL_NOTIF_RECV, received)
        except OSError as exc:
            # Who asked was killed meanwhile; anything else would come again and again.
            return exc.errno in (errno.ENOENT, errno.EINTR)
        id, asker, _, _, _, _, fd, address, length, *_ = _NOTIF.unpack(received)
        question = _Question(id, asker, fd & 0xFFFFFFFF, address, length & 0xFFFFFFFF)
        try:
            error = self._do_in_its_place(listener, question)
        except Exception as exc:  # noqa: BLE001 - nobody else answers who waits
            error = self._give_way(f"{exc}")
        flags = _SECCOMP_USER_NOTIF_FLAG_CONTINUE if error is None else 0
        answer = bytearray(_NOTIF_RESP.pack(id, 0, -(error or 0), flags))
        with suppress(OSError):  # who asked is gone
            fcntl.ioctl(listener, _SECCOMP_IOCTL_NOTIF_SEND, answer)
        return True

    def _do_in_its_place(self, listener: int, question: _Question) -> int | None:
        """Bind, if we have to; return the error that bind is to have, 0 for none.

        None: it is not our affair, and done as it was asked for.
        """
        there = loopback_for(_memory(question), self._port.number)
        if there is None or not _is_tcp(question):
            return None
        if not _is_in_our_network(question.asker):
            return self._give_way("its process has a network namespace of its own")
        blocking = _is_blocking(question)
        # A forked child would keep it, and so the port, when the server has ended.
        with no_forks():
            try:
                replacement = self._socket(*there, blocking=blocking)
            except OSError as exc:
                return exc.errno or errno.EINVAL  # what the server would have heard
            with replacement:
                _replace(listener, question, replacement)
        self._is_kept = True
        return 0

    def _socket(
        self, family: socket.AddressFamily, host: str, *, blocking: bool
    ) -> socket.socket:
        """What takes the place of the server's socket.

        It listens already, so that the port need not be lent for longer: from then on
        nobody else can. That the server has it do so again only changes its backlog.
        """
        replacement = socket.socket(family, socket.SOCK_STREAM)
        self._port.lend()
        try:
            # As the server's own: the connections of the server before it may linger.
            replacement.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            if family == socket.AF_INET6:
                replacement.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, False)
            replacement.setblocking(blocking)
            replacement.bind((host, self._port.number))
            replacement.listen()
        except BaseException:
            replacement.close()
            raise
        finally:
            self._port.keep()
        return replacement

    def _give_way(self, trouble: str) -> int | None:
        """What to answer where we cannot do it, though it may be the server's port."""
        if self._is_kept:
            return None  # then it is somebody else's
        self._trouble = trouble
        if self._strict:
            return errno.EACCES
        self._port.lend()  # until it is READY
        return None


def _memory(question: _Question) -> bytes:
    """The address that is asked for, from the memory of who asks."""
    if question.length > _SOCKADDR_STORAGE:
        return b""  # bind refuses it
    fd = os.open(f"/proc/{question.asker}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, question.length, question.address)
    finally:
        os.close(fd)


def _is_tcp(question: _Question) -> bool:
    """False for a socket of another kind, which may use the same number."""
    link = f"/proc/{question.asker}/fd/{question.fd}"
    return os.getxattr(link, "system.sockprotoname").startswith((b"TCP", b"MPTCP"))


def _is_blocking(question: _Question) -> bool:
    with open(f"/proc/{question.asker}/fdinfo/{question.fd}") as lines:
        flags = next(line for line in lines if line.startswith("flags:"))
    return not int(flags.split()[1], 8) & os.O_NONBLOCK


def _is_in_our_network(asker: int) -> bool:
    theirs, ours = os.stat(f"/proc/{asker}/ns/net"), os.stat("/proc/self/ns/net")
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def _replace(listener: int, question: _Question, replacement: socket.socket) -> None:
    """Put it in the place of the socket of who asks.

    :raises OSError: if nobody asks any more
    """
    _check_still_there(listener, question)
    addfd = _NOTIF_ADDFD.pack(
        question.id,
        _SECCOMP_ADDFD_FLAG_SETFD,
        replacement.fileno(),
        question.fd,
        os.O_CLOEXEC,
    )
    fcntl.ioctl(listener, _SECCOMP_IOCTL_NOTIF_ADDFD, addfd)


def _check_still_there(listener: int, question: _Question) -> None:
    """What we read of a process was that of who asked, if the question still stands.

    :raises OSError: if it does not; somebody else may have the process's number by now
    """
    fcntl.ioctl(listener, _SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("=Q", question.id))
