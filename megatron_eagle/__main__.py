"""``python -m megatron_eagle``: the form in which torchrun starts the command line."""

from megatron_eagle.cli import main

# The guard matters: Megatron's checkpoint writer starts helpers that import this module again.
if __name__ == "__main__":
    main()
