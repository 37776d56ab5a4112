"""Text into indexed datasets, in shards that any number of processes may share.

    text --shards of about equal size--> tokens --duplicates found--> one indexed dataset a prefix

A *shard* of the input is tokenized on its own and its result kept on disk; what a shard holds
depends on the input and the flags alone, so neither the number of processes nor a run that was
killed and started again changes a byte of the output. Nothing here imports torch.

Read first: shards.py (what is kept of a shard), then merge.py.
"""
