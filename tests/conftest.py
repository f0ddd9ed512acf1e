import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie in the repository's root
torch.set_num_threads(1)
