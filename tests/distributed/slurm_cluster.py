"""A Slurm of two nodes on this machine, made of Debian's packages, with a munge, ports and folders of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
_NAMES = "127.0.0.1 litn1 litn2  # for the tests with Slurm\n"
_HOSTS = Path("/etc/hosts")
_APT = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=120")
# A requeued job waits as long as a credential lives, two minutes if it is not said (cred_expire); on a busy machine a
# step may take some seconds from its credential to its start. Other waits are long for the same reason.
_CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
KillWait=60
MessageTimeout=60
NodeName=litn[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class SlurmCluster:
    """Starts and stops it.

    Args:
        folder: for state, logs and sockets.

    Attributes:
        environment: what a client needs beside its own variables.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._hosts = False

    def start(self) -> None:
        """Raises RuntimeError, with what the daemons said, if the nodes do not come up."""
        for name in ("state", "spool-litn1", "spool-litn2"):
            (self.folder / name).mkdir()
        config = _CONFIG.format(host=socket.gethostname().split(".")[0], folder=self.folder, ports=_free_ports())
        (self.folder / "slurm.conf").write_text(config)
        said = subprocess.run([_program("slurmd"), "-V"], capture_output=True, text=True).stdout.split()[-1]
        if tuple(int(part) for part in said.split(".")[:2]) >= (23, 11):  # older ones do not know the word
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        with _HOSTS.open("a") as hosts:
            hosts.write(_NAMES)
        self._hosts = True
        self._munge()
        self._daemon("slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        for node in ("litn1", "litn2"):
            self._daemon("slurmd", "-D", "-c", "-N", node, "-f", self.environment["SLURM_CONF"])
        self._wait_for_nodes()

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # --force: the folder of a test may be open to others, which munge warns of.
        self._daemon("munged", "-F", "--force", *(f"--{k}={self.folder}/munge.{v}" for k, v in files.items()))

    def _daemon(self, program: str, *arguments: str) -> None:
        log = (self.folder / f"{program}-{len(self._processes)}.out").open("wb")
        self._processes.append(
            subprocess.Popen([_program(program), *arguments], stdout=log, stderr=log, start_new_session=True)
        )

    def _wait_for_nodes(self) -> None:
        end = time.monotonic() + 180
        while time.monotonic() < end:
            shown = self.run("sinfo", "--noheader", "-N", "-o", "%N %t", check=False).stdout.split()
            if shown.count("idle") == 4:  # two nodes in two partitions
                return
            time.sleep(0.5)
        said = "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}" for log in self.folder.glob("*.out"))
        raise RuntimeError(f"Slurm's nodes did not come up: {shown}\n{said}")

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = os.environ | self.environment
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=check, timeout=180)

    def shown(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, seconds: float) -> dict[str, str]:
        """Waits for a job's end, over its restarts."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            shown = self.shown(job)
            if shown["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING"):
                return shown
            time.sleep(1)
        raise TimeoutError(f"job {job} is {shown['JobState']} after {seconds} s")

    def stop(self) -> None:
        if self._processes:
            self.run("scancel", "--user=root", check=False)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._hosts:
            _HOSTS.write_text(_HOSTS.read_text().replace(_NAMES, "", 1))


def _program(name: str) -> str:
    return shutil.which(name) or f"/usr/sbin/{name}"


def _free_ports() -> list[int]:
    """One, and two that follow one another."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            port = second.getsockname()[1]
            try:
                third.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return [first.getsockname()[1], port, port + 1]


def install() -> str:
    """Installs Debian's packages where they are missing; returns why it cannot be done, or nothing."""
    search = os.environ["PATH"] + ":/usr/sbin"
    if all(shutil.which(program, path=search) for program in PROGRAMS):
        return "" if os.geteuid() == 0 else "a Slurm of two nodes on one machine needs root"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "needs Slurm (slurm-wlm, munge), and root on a Debian to install it"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "POLICY_RC_D": "101"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run([*_APT, *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"apt-get {words[0]}: {' '.join((done.stderr or done.stdout).split())[-300:]}"
    return ""
