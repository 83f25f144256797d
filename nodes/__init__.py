"""The nodes of the pack, one file each. What only running them needs is imported there, so that ComfyUI starts fast."""

from .compare import SkrrCompare
from .edit_plan import SkrrEditPlan
from .load_clip import SkrrCLIPLoader, SkrrDualCLIPLoader, SkrrQuadrupleCLIPLoader, SkrrTripleCLIPLoader
from .load_plan import SkrrLoadPlan
from .load_sparse import SkrrLoadSparse
from .memory_report import SkrrMemoryReport
from .prune import SkrrPrune
from .repair_plan import SkrrRepairPlan
from .save_encoder import SkrrSaveEncoder
from .save_sparse import SkrrSaveSparse
from .sparsify import SkrrSparsify
from .trim import SkrrTrimUnread

NODES = [
    SkrrPrune,
    SkrrLoadPlan,
    SkrrRepairPlan,
    SkrrEditPlan,
    SkrrCLIPLoader,
    SkrrDualCLIPLoader,
    SkrrTripleCLIPLoader,
    SkrrQuadrupleCLIPLoader,
    SkrrSaveEncoder,
    SkrrTrimUnread,
    SkrrSparsify,
    SkrrSaveSparse,
    SkrrLoadSparse,
    SkrrMemoryReport,
    SkrrCompare,
]
