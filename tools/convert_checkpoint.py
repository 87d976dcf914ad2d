"""Convert checkpoints from and to Hugging Face: the same as ``megatron-eagle convert``."""

import sys

from megatron_eagle.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
