"""The reference's log-probs: which model and numerics they belong to, and the store that keeps them on disk.

    fingerprint   which model: a hash of its weights, config and adapter
    numerics      how it was computed: what else decides the numbers
    shard         one immutable file of rows, with checksums that are verified as it is read
    store         folders of shards: look up, add, resume, share between jobs
    upkeep        verify, repair, compact
    exchange      parquet out, values computed elsewhere in

Nothing here knows of ranks or of torch: whoever computes values hands over arrays.
"""
