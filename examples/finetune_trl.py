"""Fine-tune with trl's SFTTrainer on GRASP layers: two lines differ, and are marked.

    pip install trl
    python examples/finetune_trl.py MODEL DATA OUTPUT [--subspace FILE]

MODEL is a checkpoint folder, DATA a file with chat data, OUTPUT the folder for the adapter, and the
subspace one that `grasp-kernels identify` wrote. The labels are made here rather than by trl: on
the answers alone, with any chat template.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import grasp_kernels as gk
from grasp_kernels.data import read_records, tokenize_records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--subspace")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--report-to", default="none", help="wandb, tensorboard, ...")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples, _ = tokenize_records(read_records(arguments.data), tokenizer, max_length=1024)
    trainer = SFTTrainer(
        model=arguments.model,
        args=SFTConfig(
            output_dir=f"{arguments.output}/checkpoints",
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=1,
            report_to=arguments.report_to,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    subspace = gk.Subspace.load(arguments.subspace) if arguments.subspace else None
    print(gk.replace_lora_layers(trainer.model, subspace))  # the one that projects
    gk.GraspCallback(every=50).attach(trainer)  # the one that logs what is left along the subspace
    trainer.train()
    trainer.save_model(arguments.output)  # stock peft and vLLM load it


if __name__ == "__main__":
    main()
