import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():  # read when triton is imported: kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie in the root
torch.set_num_threads(1)
