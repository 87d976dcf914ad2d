"""A throw-away Slurm: a controller and several slurmd on this host, own ports and folders, no systemd.

    with ThrowawaySlurm.start(nodes=2) as slurm: slurm.run("srun", "-N2", "hostname")

Everything it starts is ended with it: daemons by their recorded process ids, jobs before them. Several may run on one
host: each has a block of ports of its own, for its daemons and for what its jobs open, and takes for its own only the
processes that were given its slurm.conf.
"""

import contextlib
import ctypes
import fcntl
import getpass
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun")
GPUS = 2  # of a node
KILL_WAIT = 5  # seconds Slurm gives processes between SIGTERM and SIGKILL
SLURMD_TIMEOUT = 10  # seconds without a word from a slurmd before its node is down
BLOCKS = [range(first, first + 1000) for first in range(20000, 30000, 1000)]  # below the ports the kernel hands out
DAEMON_PORTS = 100  # of a block, the rest is for jobs

CONFIG = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={slurmd_timeout}
KillWait={kill_wait}
MinJobAge=3600
GresTypes=gpu
InactiveLimit=0
Waittime=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
"""


@dataclass
class ThrowawaySlurm:
    """ports: no other cluster on this host has them.

    gpus: of a node; character devices that Slurm hands out and nobody opens, 0 where this user may not make them.
    """

    folder: Path
    nodes: list[str]
    ports: range
    gpus: int = 0
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    waiting_since: dict[str, float] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def start(cls, nodes: int = 2, cpus: int = 4) -> Iterator["ThrowawaySlurm"]:
        """Up to the end of the block; the test is skipped, with the reason, where slurm-wlm is not installed."""
        absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        if absent:
            pytest.skip(f"slurm-wlm is not installed ({', '.join(absent)} missing)")
        folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: a Unix socket's path has 107 bytes
        with _own_ports() as ports:
            slurm = cls(folder, [f"n{number}" for number in range(1, nodes + 1)], ports)
            try:
                slurm._configure(cpus)
                slurm.start_controller()
                for node in slurm.nodes:
                    slurm.start_node(node)
                slurm.until(lambda: slurm.node_states() == ["idle"] * nodes, "all nodes idle")
                yield slurm
            finally:
                slurm._stop()
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RANK", "WORLD_"))}
        return kept | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": _path(),
            "FIRST_PORT": str(self.ports[DAEMON_PORTS]),
            "PORTS": str(len(self.ports) - DAEMON_PORTS),
        }

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command that talks to this Slurm."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=60, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def node_states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).split()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of the job; empty if it cannot be asked at the moment."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job, check=False)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def state(self, job: str) -> str:
        return self.job(job).get("JobState", "")

    def start_requeued_jobs(self) -> None:
        """A requeued job waits two minutes, by Slurm's word; here two seconds, whatever still runs of its last start.

        Two, because slurmd takes a start in the second in which the job was killed for one of before.
        """
        listed = self.run("squeue", "--noheader", "--states=PENDING", "--format=%i %r", check=False).splitlines()
        waiting = [line.split()[0] for line in listed if line.endswith(" BeginTime")]
        self.waiting_since = {job: self.waiting_since.get(job, time.monotonic()) for job in waiting}
        for job in waiting:
            if time.monotonic() > self.waiting_since[job] + 2.0:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def until(self, is_so: Callable[[], bool], what: str, seconds: float = 60, poll: float = 0.2) -> None:
        """Wait until ``is_so``, starting requeued jobs meanwhile; that asks Slurm, so not at every look."""
        deadline, ask = time.monotonic() + seconds, 0.0
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s: {what}\n{self.run('squeue', check=False)}")
            if time.monotonic() > ask:
                self.start_requeued_jobs()
                ask = time.monotonic() + 0.5
            time.sleep(poll)

    def start_controller(self) -> None:
        """Start slurmctld, which goes on from its saved state if there is one."""
        self._daemon("slurmctld", "slurmctld", "-D")

    def stop_controller(self) -> None:
        """An orderly end of slurmctld, which saves its state: its machine is restarted, or it is brought up to date."""
        self.daemons["slurmctld"].terminate()
        self.daemons.pop("slurmctld").wait()

    def kill_controller(self) -> None:
        """kill -9 of slurmctld; until it is started again nobody answers. It forgets the last seconds."""
        self._kill_daemon("slurmctld")

    def start_node(self, node: str, *wrapper: str) -> None:
        """Start the node's slurmd; ``wrapper`` stands before its command."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self._daemon(node, *wrapper, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """kill -9 of the node's slurmd and of all it runs, as when a machine loses power.

        The slurmstepd of the steps before the steps, because they would report their end.
        """
        steps = [process for process, variables in self._environments() if variables.get("SLURMD_NODENAME") == node]
        keepers = {parent for process in steps if (parent := _slurmstepd_above(process))}
        for process in [self.daemons[node].pid, *keepers, *steps]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def kill_slurmd(self, node: str) -> None:
        """kill -9 of the node's slurmd alone: Slurm takes the node for lost, and what it runs runs on.

        The controller is told at once what it would notice after ``SLURMD_TIMEOUT``.
        """
        self._kill_daemon(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def ranks(self, job: str) -> dict[int, int]:
        """rank -> process id of the job's training processes that run now; of its newest start, where two run."""
        found: dict[int, tuple[int, int]] = {}
        for process, variables in self._environments():
            if variables.get("SLURM_JOB_ID") == job and "RANK" in variables and _is_training(process):
                start, rank = int(variables.get("SLURM_RESTART_COUNT", 0)), int(variables["RANK"])
                found[rank] = max(found.get(rank, (0, 0)), (start, process))
        newest = max((start for start, _ in found.values()), default=0)
        return {rank: process for rank, (start, process) in found.items() if start == newest}

    def processes(self) -> list[int]:
        """All processes of all of this cluster's jobs, their slurmstepds left out."""
        return [process for process, variables in self._environments() if "SLURM_JOB_ID" in variables]

    def _environments(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(process id, environment) of every process that was given this cluster's slurm.conf."""
        conf = str(self.folder / "slurm.conf")
        return ((process, variables) for process, variables in _environments() if variables.get("SLURM_CONF") == conf)

    def _configure(self, cpus: int) -> None:
        (self.folder / "state").mkdir()
        ports = self.ports[: len(self.nodes) + 1]
        host = socket.gethostname().split(".")[0]
        lines = [
            CONFIG.format(
                host=host,
                port=ports[0],
                user=getpass.getuser(),
                folder=self.folder,
                kill_wait=KILL_WAIT,
                slurmd_timeout=SLURMD_TIMEOUT,
            )
        ]
        gres = self._make_gpus()
        for node, port in zip(self.nodes, ports[1:], strict=True):
            address = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"NodeName={node} {address} CPUs={cpus} RealMemory=1000{gres}\n")
        lines.append(f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n")
        # Its own rules are for asking only: without an accounting database Slurm enforces none of them.
        lines.append(f"PartitionName=ours Nodes={','.join(self.nodes)} AllowAccounts=eagle,hawk MaxTime=1-0 State=UP\n")
        (self.folder / "slurm.conf").write_text("".join(lines))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # read, and then not used

    def _make_gpus(self) -> str:
        """The nodes' Gres= entry, empty without GPUs."""
        try:
            for number in range(GPUS):
                os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # /dev/null's number
        except OSError:
            return ""
        self.gpus = GPUS
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=h100 File={self.folder}/gpu[0-{GPUS - 1}]\n")
        return f" Gres=gpu:h100:{GPUS}"

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*command, "-f", str(self.folder / "slurm.conf")],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # also when the tests are killed
            )

    def _kill_daemon(self, name: str) -> None:
        self.daemons[name].kill()
        self.daemons.pop(name).wait()

    def _stop(self) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--user", getpass.getuser(), check=False)
            self._kill_processes()  # all that is still there has had its time
            deadline = time.monotonic() + KILL_WAIT + 5
            while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_processes()

    def _kill_processes(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@contextlib.contextmanager
def _own_ports() -> Iterator[range]:
    """A block of ports that no other cluster of this host takes before the end; the kernel drops a dead one's claim."""
    for block in BLOCKS:
        try:
            claim = os.open(f"/tmp/throwaway-slurm-{block[0]}", os.O_RDONLY | os.O_CREAT, 0o644)
        except PermissionError:  # another user's
            continue
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _bind_all(block[:DAEMON_PORTS])
        except OSError:
            os.close(claim)
            continue
        try:
            yield block
        finally:
            os.close(claim)
        return
    raise RuntimeError(f"no block of {len(BLOCKS[0])} ports is free in {BLOCKS[0][0]} to {BLOCKS[-1][-1]}")


def _bind_all(ports: Iterable[int]) -> None:
    """OSError if one of them is in use."""
    with contextlib.ExitStack() as stack:
        for port in ports:
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "environ").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        yield int(folder.name), dict(part.split("=", 1) for part in text.split("\0") if "=" in part)


def _slurmstepd_above(process: int) -> int | None:
    """The process's parent, if that is a slurmstepd."""
    try:
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        return parent if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd") else None
    except OSError:
        return None


def _is_training(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train" in words and (b"megatron_eagle" in words or any(word.endswith(b"stand_in.py") for word in words))
