"""The model itself: its files, its names, its places in the residual stream, its answers.

architectures      the places where the modules of a family meet the stream
names              the name of a module, in a model and in a file
sharding           weights spread over processes
tensors            safetensors files and shards
weights            a model or a checkpoint folder -> its weights by module name, its type and width
difference         two models -> their differences
checkpoint         a folder or a hub name -> configuration, tokenizer, model
frozen_model       a model -> its answers, and its logits at chosen positions
"""
