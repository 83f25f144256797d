"""The processes of one `torchrun`, which share the candidates of a search and all come to the same plan."""

import atexit
import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from ..errors import SkrrError, first_line


class TeamError(SkrrError):
    """Processes that can't search together, or no longer; one line that says what to do."""


class Team:
    """Who measures what. rank, size: of this process, and how many there are (one, unless `join` says otherwise)."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu"):
        self.rank, self.size, self.device = rank, size, device

    @property
    def leads(self) -> bool:
        """Whether this is the one process that talks and writes."""
        return self.rank == 0

    @property
    def sharing(self) -> int:
        """How many processes take their memory from the same place."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 and str(self.device) == "cpu" else 1

    def part(self) -> None:
        """Wait until all processes have come this far, then leave. Raises TeamError."""
        if self.size > 1:
            self.shared(range(self.size), lambda own: np.zeros((len(own), 1)))
            part()

    def agree(self, facts: str) -> None:
        """Hold what decides the steps of the search against the other processes': where one goes another way, they
        would wait for each other for ever. Raises TeamError in all of them."""
        number = float(int.from_bytes(hashlib.sha256(facts.encode()).digest()[:6], "big"))  # exact: float64 has 53 bits
        found = self.shared(range(self.size), lambda own: np.full((len(own), 1), number))
        if (found != number).any():
            raise TeamError(
                "the processes of this search did not start alike; start them all again with the same command (--memory"
                " included), the same version, and a --resume file that all machines see"
            )

    def shared(self, candidates: Sequence, measure: Callable[[Sequence], np.ndarray]) -> np.ndarray:
        """`measure(candidates)`, a row `[columns]` for each, each made by one of the processes. Raises TeamError."""
        if self.size == 1:
            return measure(candidates)
        # Neighbours in the list cost alike: dealt out in turn, the shares do too.
        mine = measure(candidates[self.rank :: self.size] or candidates[:1])
        rows = -(-len(candidates) // self.size)
        padded = torch.zeros(rows, mine.shape[1], dtype=torch.float64)
        padded[: len(mine)] = torch.from_numpy(mine)
        parts = [torch.empty_like(padded, device=self.device) for _ in range(self.size)]
        try:
            dist.all_gather(parts, padded.to(self.device))
        except RuntimeError as error:
            raise TeamError(
                f"another process of this search has ended ({first_line(error)[:120]}); start it again, with the same"
                " --resume it goes on after the last step saved"
            ) from None
        return torch.stack(parts, dim=1).flatten(0, 1)[: len(candidates)].cpu().numpy()


def part() -> None:
    """Leave the team, together: a process that ends while another still talks to it may take that one down. On the way
    out of an error nobody is waited for."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def join(device: str) -> Team:
    """The team of the `torchrun` that started this process, over gloo or NCCL; a team of one where none did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_available():
        return Team()
    if device == "cuda":
        rank = os.environ.get("LOCAL_RANK", "0")
        try:
            torch.cuda.set_device(int(rank))
        except (RuntimeError, ValueError) as error:
            raise TeamError(
                f"LOCAL_RANK {rank}: no such GPU here ({first_line(error)[:120]}); start no more processes than this"
                " machine has GPUs"
            ) from None
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        problem = first_line(error)[:120]
        raise TeamError(f"the processes can't find each other ({problem}); start them all again") from None
    atexit.register(part)
    return Team(dist.get_rank(), size, device)
