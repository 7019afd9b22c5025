"""The model itself: its file, its names, where it meets the residual stream, what it says.

architectures      where the modules of a family meet the stream
names              what a module is called, in a model and in a file
sharding           weights that are spread over processes
tensors            safetensors files and shards
weights            a model or a checkpoint folder -> its weights by module name, its type and width
checkpoint         a folder or a hub name -> configuration, tokenizer, model
frozen_model       a model -> its answers, and its stream on given ones
"""
