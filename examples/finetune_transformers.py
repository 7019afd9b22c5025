"""Fine-tune with peft and transformers.Trainer, and keep all other answers: two lines differ.

    python examples/finetune_transformers.py MODEL DATA OUTPUT [--subspace FILE]

MODEL is a checkpoint folder, DATA a file with chat data, OUTPUT the folder for the adapter, and the
subspace one that `grasp-kernels identify` wrote, or the folder of a naive adapter.
"""

import argparse
from functools import partial

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

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
    parser.add_argument("--report-to", default="none", help="wandb, tensorboard, ...")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples, _ = tokenize_records(read_records(arguments.data), tokenizer, max_length=1024)
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    trainer = gk.GraspTrainer(  # the one that differs, and its config
        grasp_config=gk.GraspConfig(subspace=arguments.subspace),
        model=model,
        args=TrainingArguments(
            output_dir=f"{arguments.output}/checkpoints",
            num_train_epochs=arguments.num_train_epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="epoch",  # stock peft loads the checkpoints, too
            report_to=arguments.report_to,
        ),
        train_dataset=examples,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    print(trainer.grasp_report)  # what was replaced, and what stays with peft
    trainer.train()
    model.save_pretrained(arguments.output)  # stock peft and vLLM load it


if __name__ == "__main__":
    main()
