"""``megatron-direct`` with a stand-in for Transformer Engine, for tests.

Processes that Megatron starts import it again.
"""

from __future__ import annotations

import transformer_engine_on_cpu

transformer_engine_on_cpu.install()

if __name__ == "__main__":
    from megatron_direct.cli.main import main

    main()
