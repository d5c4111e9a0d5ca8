"""One rank of a GPU test of the network, started by `epv2 emulate`: `python network_ranks.py FOLDER CUBIN RAIL`.

Runs emulator/kernels/network.cu on `CudaRuntime` and writes the sums of its turns to FOLDER/RANK as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import types
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from epv2_plugin.elastic.backends.device import CudaRuntime
from epv2_plugin.jit import Kernel
from tests.test_emulator import ROW, TURNS, NetworkArgs

SECONDS = 120


def main() -> None:
    folder, cubin, rail = sys.argv[1:]
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    runtime = CudaRuntime(dist.group.WORLD, SECONDS)
    window, out = runtime.window((2 + runtime.size) * ROW), runtime.mapped(4 * TURNS)
    network = runtime.network(2, 2, bool(int(rail)))
    args = NetworkArgs(window.handle, network, out.pointer, 0, TURNS, runtime.rank, runtime.size)
    args.lsa_size, args.rail = runtime.lsa_size, int(rail)
    kernel = Kernel(name="network", source="ep/network.cu", args="NetworkArgs")
    with mock.patch("epv2_plugin.jit.compiler.build", return_value=types.SimpleNamespace(path=Path(cubin))):
        runtime.launch(kernel, bytes(args), ctas=1, threads=64, shared_bytes=2 * ROW)
    torch.cuda.synchronize()
    (Path(folder) / str(runtime.rank)).write_text(json.dumps(out.tensor.view(torch.int32).tolist()))
    dist.barrier()
    runtime.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
