"""`launch/train.py` with faults in place: `patched_train.py FAULTS.pickle [what train.py takes]`."""

import os
import pickle
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

faults = next(argument for argument in sys.argv if argument.endswith(".pickle"))  # DeepSpeed puts --local_rank first
sys.argv.remove(faults)
for fault in pickle.loads(Path(faults).read_bytes()):
    fault(int(os.environ["RANK"]))
sys.argv[0] = str(ROOT / "launch/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
