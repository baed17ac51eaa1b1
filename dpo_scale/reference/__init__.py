"""The reference: where its log-probs come from, and the store that keeps them on disk.

    protocol             what training asks of a reference
    live, moving         a second model, and one that follows the policy
    adapter              the policy with its adapter off
    from_store, columns  values that are there already
    modes                which of them a config names
    compute              fill the store, compute known values again

    fingerprint          which model: a hash of its weights, config and adapter
    numerics             how it was computed: what else decides the numbers
    store                folders of shards: look up, add, resume, share between jobs
    store_shard          one immutable file of rows, with checksums that are verified as it is read
    store_upkeep         verify, repair, compact
    store_exchange       parquet out, values computed elsewhere in

The store knows nothing of ranks or of torch: whoever computes values hands over arrays.
"""
