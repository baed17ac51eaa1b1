"""`launch/train.py` with faults in place: `patched_train.py PICKLED_FAULTS [what train.py takes]`."""

import os
import pickle
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

for fault in pickle.loads(Path(sys.argv.pop(1)).read_bytes()):
    fault(int(os.environ["RANK"]))
sys.argv[0] = str(ROOT / "launch/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
