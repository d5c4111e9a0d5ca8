"""One rank of the GPU tests of the loopback, started by `epv2 emulate`: `python rma_gin.py FOLDER CUBIN TURNS IS_WEAK`.

Runs the kernel of rma_gin.cu TURNS times between all ranks and writes what it counted to FOLDER/RANK as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from epv2_plugin.elastic.backends.device import _check_device

WORDS, WINDOW = 16384, 1 << 20
SECONDS = 120


def main() -> None:
    folder, cubin, turns, is_weak = sys.argv[1:]
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.synchronize()  # makes the context
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    rank, size = dist.get_rank(), dist.get_world_size()
    library = _check_device()
    unique_id = [library.unique_id() if rank == 0 else b""]
    dist.broadcast_object_list(unique_id)
    communicator = library.Communicator.create(unique_id[0], rank, size, False, SECONDS)
    properties = communicator.properties()
    window = communicator.allocate(WINDOW)
    window.register()
    device = communicator.device_communicator(gin_contexts=2, gin_signals=2, gin_connection="full")
    kernel = library.Module.load(Path(cubin).read_bytes()).function("kernel_gin")
    wrong = library.Mapped(64)
    stream = torch.cuda.Stream()
    for turn in range(1, int(turns) + 1):
        rest = struct.pack("<5Q", window.handle, wrong.pointer, WORDS, turn, int(is_weak))
        padding = bytes(kernel.args_bytes - len(device.data) - len(rest))
        kernel.launch(1, 128, 0, stream.cuda_stream, device.data + padding + rest)
    stream.synchronize()
    counts = list((ctypes.c_uint32 * 3).from_address(wrong.host_pointer))
    error = communicator.async_error()
    dist.barrier()
    device.close()
    window.close()
    communicator.close()
    wrong.close()
    dist.barrier()
    report = {"wrong": counts, "error": error, "properties": properties}
    (Path(folder) / str(rank)).write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
