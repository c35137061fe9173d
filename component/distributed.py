"""Work that one process does for all."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def on_rank_zero(make: Callable[[], Result]) -> Result:
    """Run `make` on rank 0 alone and hand its result, or its exception, to every rank. Both must be picklable."""
    if not dist.is_initialized():
        return make()
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
