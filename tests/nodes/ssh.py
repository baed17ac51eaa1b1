"""An sshd on each machine, with keys and settings made for it: nothing of the user's own is read or written."""

from __future__ import annotations

import os
import shutil
import subprocess

from nodes.rig import PATH, Cluster

SSH_CONFIG = "/etc/ssh/ssh_config"


def why_no_ssh() -> str | None:
    """Why pdsh and ssh can't be tried here; None if they can."""
    missing = [name for name in ("pdsh", "ssh", "sshd", "ssh-keygen") if not shutil.which(name, path=PATH)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: pdsh, openssh-client, openssh-server)"
    return None if os.path.exists(SSH_CONFIG) else f"there is no {SSH_CONFIG}, in whose place a test puts its own"


def start_sshd(cluster: Cluster) -> None:
    """Let every machine reach every other by ssh without a password.

    DeepSpeed calls `ssh` by itself, so the options are put in the place of the machine's `ssh_config`.
    """
    for machine in cluster.machines:
        folder = machine.folder
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    allowed = "".join((machine.folder / "user_key.pub").read_text() for machine in cluster.machines)
    for machine in cluster.machines:
        folder = machine.folder
        (folder / "allowed").write_text(allowed)
        (folder / "sshd_config").write_text(
            f"ListenAddress {machine.address}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/allowed\n"
            f"PidFile {folder}/sshd.pid\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            "AuthenticationMethods publickey\nUsePAM no\n"
        )
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nStrictHostKeyChecking no\nBatchMode yes\n"
            "UserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        machine.run("mount", "--bind", folder / "ssh_config", SSH_CONFIG)
        machine.run("mkdir", "-p", "/run/sshd")
        daemon = shutil.which("sshd", path=PATH)
        machine.start(daemon, "-D", "-e", "-f", folder / "sshd_config", log="sshd.txt").wait_for("Server listening")
