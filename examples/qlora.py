"""QLoRA on GRASP layers: the base in 4 bits, and one line, which is marked, replaces the layers.

    python examples/qlora.py MODEL DATA OUTPUT [--subspace FILE]

MODEL is a checkpoint folder, DATA a file with chat data, OUTPUT the folder for the adapter, and the
subspace one that `grasp-kernels identify` wrote. bitsandbytes multiplies with the 4-bit weights as
before; the adapter and the projection are computed by the operator. Needs
`pip install ".[train,quantised]"`.
"""

import argparse
from functools import partial

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

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
    parser.add_argument("--num-train-epochs", type=float, default=1.0)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples, _ = tokenize_records(read_records(arguments.data), tokenizer, max_length=1024)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=four_bits)
    base = prepare_model_for_kbit_training(base)  # float32 norms, activation checkpointing
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    subspace = gk.Subspace.load(arguments.subspace) if arguments.subspace else None
    print(gk.apply_grasp(model, gk.GraspConfig(subspace=subspace)))  # the one line

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{arguments.output}/checkpoints",
            num_train_epochs=arguments.num_train_epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=examples,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
    )
    trainer.train()
    model.save_pretrained(arguments.output)  # stock peft and vLLM load it
    if subspace is not None:
        worst = max(gk.leakage(model).values())
        print(f"largest share of an update along the subspace: {worst:.1e}")


if __name__ == "__main__":
    main()
