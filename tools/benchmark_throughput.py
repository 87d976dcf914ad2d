"""Runs ``megatron-eagle bench``; for launchers that want a script: torchrun tools/benchmark_throughput.py RECIPE ..."""

import sys

from megatron_eagle.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
