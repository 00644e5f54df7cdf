"""Networks to train: one file each, torch and the standard library only, chosen by name in `conf/model`.

Each can be built under `torch.device("meta")`, sharded and only then given memory and values:

    with torch.device("meta"):
        model = GPT(vocab_size=256, context=128, n_layer=4, n_head=4, n_embd=128)
    for block in model.shard_blocks():
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cuda")
    model.init_weights()

Built anywhere else it is ready at once, with the same values for the same seed. Besides `forward` each has
`init_weights()`, `shard_blocks()` (what is sharded, checkpointed and compiled one by one) and
`flops_per_sample()`. Each casts its inputs to its weights' dtype itself, so that a shard's root can leave them be
(`cast_forward_inputs=False`): a diffusion time in [0, 1000] does not survive bfloat16.
"""
