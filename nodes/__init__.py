"""The nodes of the pack, one file each."""

from .load_plan import SkrrLoadPlan
from .memory_report import SkrrMemoryReport
from .prune import SkrrPrune

NODES = [SkrrPrune, SkrrLoadPlan, SkrrMemoryReport]
