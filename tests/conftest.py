import os
import sys
from pathlib import Path

# before torch is imported anywhere: the suite runs several processes on few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

# before Triton is imported anywhere: without a GPU its kernels run in the interpreter, on CPU tensors
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
