import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on CPU tensors then
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie in the repository's root
torch.set_num_threads(1)
