"""Progress, live text and interruption, as ComfyUI has them."""

import logging
import sys
import time

import comfy.model_management
import comfy.utils

from ...skrr_engine.encoder.row import Row
from ...skrr_engine.plan.words import duration
from ...skrr_engine.search.progress import Progress
from ...skrr_engine.search.skip import SkipList
from ..drawing.curve import draw

STEPS = 1000
"""Resolution of the progress bar."""


def say(text: str, node_id: str | None) -> None:
    """Show a line on the node and in the log."""
    logging.info("[Skrr] %s", text)
    show(text, node_id)


def show(text: str, node_id: str | None) -> None:
    """Show a line on the node, where a server is there to send it."""
    module = sys.modules.get("server")  # ComfyUI as a library has none, and importing it would start one
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if node_id is not None and server is not None:
        server.send_progress_text(text, node_id)


class Reporter:
    """What a search calls before every sub-block's forward: moves the bar, shows the line and the curve, ends it when
    interrupted. row: of the encoder; target: sparsity; whose: what lines begin with."""

    def __init__(self, node_id: str | None, row: Row, target: float, whose: str = ""):
        self.node_id, self.row, self.target, self.whose = node_id, row, target, whose
        self.bar = comfy.utils.ProgressBar(STEPS, node_id=node_id)
        self.shown, self.line = 0.0, ""
        self.skips = SkipList((), 0.0)

    def __call__(self, progress: Progress) -> None:
        grown, self.skips = progress.skips is not self.skips, progress.skips
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if progress.line == self.line and now - self.shown < 0.25:
            return
        if progress.line != self.line:
            logging.info("[Skrr] %s%s", self.whose, progress.line)
        self.shown, self.line = now, progress.line
        picture = ("JPEG", self.curve(), None) if grown and self.skips.order else None
        self.bar.update_absolute(int(progress.done * STEPS), STEPS, picture)
        left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
        within = f"candidate {progress.candidate} of {progress.candidates}" if progress.candidates else ""
        show(f"{self.whose}{progress.line}\n{within or f'{progress.done:.0%} done'}{left}", self.node_id)

    def curve(self):
        """Discrepancy against sparsity so far; of a resumed search whose steps are not known, its last one."""
        order, trail = self.skips.order, self.skips.trail or (self.skips.discrepancy,)
        first = len(order) - len(trail)
        points = [(self.row.sparsity(order[: first + n + 1]), d) for n, d in enumerate(trail)]
        return draw(points, self.target, f"{points[-1][0]:.1%} removed, D {points[-1][1]:.4g}, {len(order)} steps")


def remember(hidden, properties: dict) -> None:
    """Put properties onto this node in the workflow of the run, so that its pictures carry them.

    hidden: of the node's class, with unique_id and extra_pnginfo. Does nothing where the run came without a workflow
    (scripts send none), and within subgraphs, whose definition several nodes may share.
    """
    extra = hidden.extra_pnginfo
    workflow = extra.get("workflow") if isinstance(extra, dict) else None
    nodes = workflow.get("nodes") if isinstance(workflow, dict) else None
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, dict) and str(node.get("id")) == str(hidden.unique_id):
            kept = node.get("properties")
            node["properties"] = {**(kept if isinstance(kept, dict) else {}), **properties}
