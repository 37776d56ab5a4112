"""Text into indexed datasets, in shards that any number of processes may share.

    text --shards of about equal size--> tokens --duplicates found--> one dataset a domain and split

A *shard* of the input is tokenized on its own and its result kept on disk; what a shard holds
depends on the input and the flags alone, so neither the number of processes nor a run that was
killed and started again changes a byte of the output. Settings are passed to whatever needs them,
in worker processes too; no module holds any state. Nothing here imports torch.

Read first: pipeline.py (the order of things), shards.py (what is kept of a shard), merge.py.
"""
