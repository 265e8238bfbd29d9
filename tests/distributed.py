"""Cases run in real processes joined by gloo, and what each of them returned on each rank."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=600)  # where one rank fails, the others stop waiting


def run_on_ranks(world: int, case, names: list[str], folder: Path) -> dict[str, list]:
    """name -> [case(name) of each rank], an error as its traceback; one spawn for all names."""
    mp.spawn(_on_rank, (world, case, names, str(folder)), nprocs=world)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [results[name] for results in ranks] for name in names}


def _on_rank(rank: int, world: int, case, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT
    )
    results = dict.fromkeys(names, "Traceback: not run, because a case before it failed")
    try:
        for name in names:
            results[name] = case(name)
        dist.barrier()
    except Exception:  # the ranks are out of step now; leaving tells those that wait
        results[name] = traceback.format_exc()
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
