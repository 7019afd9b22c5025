"""Fine-tune on several processes with FSDP2: one line differs, and is marked.

    torchrun --nproc-per-node 8 examples/finetune_fsdp.py MODEL DATA OUTPUT [--subspace FILE]

MODEL is a checkpoint folder, DATA a file with chat data, OUTPUT the folder for the adapter, and the
subspace one that `grasp-kernels identify` wrote. Every decoder block is a unit that is gathered
when it is needed. One process works too. The layers may be replaced before the model is sharded or
after, on all processes. Under `accelerate` and `transformers.Trainer` choose `fsdp_version: 2`,
which shards in the same way.
"""

import argparse
from functools import partial

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import grasp_kernels as gk
from grasp_kernels.data import collate, read_records, tokenize_records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--subspace")
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()

    dist.init_process_group()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # every process begins with the same adapter

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples, _ = tokenize_records(read_records(arguments.data), tokenizer, max_length=1024)
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    subspace = gk.Subspace.load(arguments.subspace) if arguments.subspace else None
    report = gk.apply_grasp(model, gk.GraspConfig(subspace=subspace))  # the one line

    for block in base.model.layers:
        fully_shard(block)
    fully_shard(model)
    train(model.to(device), examples, tokenizer.pad_token_id, device, arguments.epochs)

    # All processes take part in what gathers shards; one of them writes and speaks.
    leaks = gk.leakage(model) if subspace is not None else {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(arguments.output, state_dict=weights)  # stock peft and vLLM load it
        print(report)
        if leaks:
            print(f"largest share of an update along the subspace: {max(leaks.values()):.1e}")
    dist.destroy_process_group()


def train(
    model: torch.nn.Module, examples: list, pad_token_id: int, device: torch.device, epochs: int
) -> None:
    sampler: DistributedSampler = DistributedSampler(examples)
    batches = DataLoader(
        examples,
        batch_size=4,
        sampler=sampler,
        collate_fn=partial(collate, pad_token_id=pad_token_id),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in batches:
            optimizer.zero_grad()
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
