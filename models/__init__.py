"""The built-in networks, one file each, which import only torch and the standard library. `conf/model` selects one.

Each network can be built under `torch.device("meta")` and sharded before it gets memory and weights:

    with torch.device("meta"):
        model = GPT(vocab_size=256, context=128, n_layer=4, n_head=4, n_embd=128)
    for block in model.shard_blocks():
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cuda")
    model.init_weights()

On any other device, the constructor also sets the weights; for one seed they are the same as on the meta device. In
addition to `forward`, each network has `init_weights()`, `flops_per_sample()` and `shard_blocks()`, which returns the
modules that are sharded, checkpointed and compiled one by one.

Each network casts its inputs to the dtype of its weights, so FSDP2 must not cast them (`cast_forward_inputs=False`):
bfloat16 would round a diffusion time in [0, 1000].
"""
