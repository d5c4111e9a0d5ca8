"""`python -m epv2_plugin.torchtitan.train ARGUMENTS`: torchtitan's own training script, on a CPU, too.

With a CUDA device `python -m torchtitan.train` does the same: the overrides need nothing else.
"""

from __future__ import annotations

from torchtitan.train import main

if __name__ == "__main__":
    main()
