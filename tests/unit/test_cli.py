"""What a command makes of its console."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_scale.run.cli import MAX_KEPT, ForgivingStream

PROGRAM = """
import sys
from pathlib import Path
from dpo_scale.distributed import ranks
from dpo_scale.run.cli import run
from dpo_scale.errors import ConfigError

def main():
    for _ in range(2000):
        ranks.log("a line" * 20)
    print("warned", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text("got here")
    if sys.argv[2] == "fails":
        raise ConfigError("no")

run(main)
"""


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
@pytest.mark.parametrize(("ends", "code"), [("well", 0), ("fails", 2)])
def test_a_console_on_a_full_disk_ends_no_run(tmp_path, unbuffered, ends, code):
    mark = tmp_path / "mark"
    with open("/dev/full", "w") as full:
        command = [sys.executable, *unbuffered, "-c", PROGRAM, str(mark), ends]
        done = subprocess.run(command, stdout=full, stderr=full, timeout=120)
    assert done.returncode == code
    assert mark.read_text() == "got here"


def test_what_could_not_be_said_is_said_once_there_is_room():
    class Disk:
        has_room, text = False, ""

        def write(self, text):
            if not self.has_room:
                raise OSError
            self.text += text

    disk = Disk()
    console = ForgivingStream(disk)
    console.write("a warning\n")
    console.write("more\n" * MAX_KEPT)
    console.write("the last\n")
    disk.has_room = True
    console.write("later\n")
    assert len(disk.text) == MAX_KEPT and disk.text.endswith("more\nthe last\nlater\n")
    console.write("end\n")
    assert disk.text.endswith("later\nend\n")


def test_what_is_said_arrives(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "mark"), "fails"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("\n") == 2000
    assert "warned" in done.stderr and "error: no" in done.stderr
    assert Path(tmp_path / "mark").exists()
