"""Fine-tune with trl's SFTTrainer, and keep all other answers: a class and a config more.

    pip install trl
    python examples/finetune_trl.py MODEL DATA OUTPUT [--subspace FILE]

MODEL is a checkpoint folder, DATA a JSONL file with chat data, OUTPUT the folder for the adapter,
and the subspace one that `grasp-kernels identify` wrote, or the folder of a naive adapter.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import grasp_kernels as gk


class GraspSFTTrainer(gk.GraspTrainerMixin, SFTTrainer):
    """The one class that differs."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--subspace")
    parser.add_argument("--num-train-epochs", type=float, default=1.0)
    parser.add_argument("--report-to", default="none", help="wandb, tensorboard, ...")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    trainer = GraspSFTTrainer(
        grasp_config=gk.GraspConfig(subspace=arguments.subspace),
        model=arguments.model,
        args=SFTConfig(
            output_dir=f"{arguments.output}/checkpoints",
            num_train_epochs=arguments.num_train_epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=1,
            report_to=arguments.report_to,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    print(trainer.grasp_report)  # what was replaced, and what stays with peft
    trainer.train()
    trainer.save_model(arguments.output)  # stock peft and vLLM load it


if __name__ == "__main__":
    main()
