"""``python -m megatron_direct``: the same as the command ``megatron-direct``."""

from megatron_direct.cli.main import main

if __name__ == "__main__":
    main()
