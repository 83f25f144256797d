"""Progress, live text and interruption, as ComfyUI has them."""

import logging
import sys
import time

import comfy.model_management
import comfy.utils

from ...skrr_engine.show import duration

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
    """What a search calls before every sub-block's forward: moves the bar, shows the line, ends it when interrupted."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.bar = comfy.utils.ProgressBar(STEPS, node_id=node_id)
        self.shown, self.line = 0.0, ""

    def __call__(self, progress) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if progress.line == self.line and now - self.shown < 0.25:
            return
        if progress.line != self.line:
            logging.info("[Skrr] %s", progress.line)
        self.shown, self.line = now, progress.line
        self.bar.update_absolute(int(progress.done * STEPS), STEPS)
        left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
        show(f"{progress.line}\ncandidate {progress.candidate} of {progress.candidates}{left}", self.node_id)
