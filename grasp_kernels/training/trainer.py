"""A trainer that learns the task, and keeps the model at its base on everything else.

Imports transformers, so nothing imports this module on `import grasp_kernels`.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from grasp_kernels.config import GraspConfig
from grasp_kernels.regularizer import KLRegularizer, chats_beside
from grasp_kernels.training.apply import applied_config, apply_grasp, lora_layers
from grasp_kernels.training.prompts import training_prompts
from grasp_kernels.training.watch import Watch

CHATS = "chats.safetensors"  # in the trainer's output folder, for a training that is resumed
_MAX_LENGTH = 2048  # tokens of a row that is looked at, where the trainer sets no limit

if TYPE_CHECKING:
    from transformers import Trainer as _Base

    from grasp_kernels.subspace import Subspace
else:
    _Base = object  # a mixin stands before the trainer whose methods it calls


class GraspTrainerMixin(_Base):
    """Mixin for trainers: the fast layers, and the divergence from the base model in the loss.

    It goes before the class of the trainer, `transformers.Trainer` or a trainer of trl:

        class Sft(gk.GraspTrainerMixin, SFTTrainer): ...

    When the training begins the base model makes up chats. Each step then adds `KL(base ‖ model)`
    on some of them to the loss, and its log entry has `kl`, which `loss` contains. With a subspace
    the gradient is projected, and some log entries have `leakage`, see `Watch`.
    The training stops on a loss or a gradient that is not finite.

    Args:
        grasp_config: the options; None: those that `apply_grasp` was called with on this model, or
            the defaults.
        kl_regularizer: existing chats; None: they are made when the training begins.
        args, options: those of the trainer. `train_dataset` holds conversations in any layout that
            `read_records` knows, prompts or preferences as trl's trainers take them, or token ids
            under `input_ids` with `labels` or one of trl's masks.

    Attributes:
        grasp_report: the result of `apply_grasp`, which prints as a table.

    Raises:
        ValueError: as `apply_grasp`; when the training begins, data of another kind.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        both = (one for one in cls.__bases__ if issubclass(one, (GraspTrainerMixin, Trainer)))
        if not issubclass(next(both), GraspTrainerMixin):
            raise TypeError(
                f"{cls.__name__} has its trainer in front of GraspTrainerMixin, which would do "
                f"nothing: write class {cls.__name__}(GraspTrainerMixin, ...)."
            )

    def __init__(
        self,
        *args: Any,
        grasp_config: GraspConfig | None = None,
        kl_regularizer: KLRegularizer | None = None,
        **options: Any,
    ) -> None:
        given = inspect.signature(super().__init__).bind_partial(*args, **options).arguments
        self._rows = given.get("train_dataset")  # before trl has made token ids of them
        super().__init__(*args, **options)
        self._apply(grasp_config or applied_config(self.model))
        self.kl_regularizer = kl_regularizer
        self.watch = Watch(
            cast("Subspace | None", self.grasp_config.subspace),  # it is loaded
            every=self.grasp_config.measure_steps,
            sites=self.grasp_config.sites,
        )
        # Before the callbacks that report to a service, which then see its numbers.
        self.callback_handler.callbacks.insert(0, self.watch)
        self._drawn_at, self._draws = -1, 0
        self._terms: list[Tensor] = []

    def _apply(self, config: GraspConfig | None) -> None:
        """Put the model on the fast layers; again, where adapters have come to other modules."""
        self.grasp_report = apply_grasp(self.model, config)
        self.grasp_config = applied_config(self.model) or GraspConfig()
        self._layers = lora_layers(self.model)

    def call_model_init(self, trial: Any = None) -> Any:
        """Make the model with the trainer's `model_init`, and put it on the fast layers."""
        model = super().call_model_init(trial)
        if hasattr(self, "grasp_config"):  # else the constructor does it
            apply_grasp(model, self.grasp_config)
        return model

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Train, after making the chats of the base model if there are none."""
        if self._layers != lora_layers(self.model):  # changed since the constructor looked at them
            self._apply(self.grasp_config)
        if self.kl_regularizer is None and self.grasp_config.kl_coef:
            self.kl_regularizer = self._shared_regularizer(bool(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **options)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """Return the trainer's own loss, in training with the divergence added."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
        if self.kl_regularizer is None or not model.training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        part = self.args.process_index, self.args.world_size
        term = self.kl_regularizer.loss(model, self._draw(), part)
        self._terms.append(term.detach())
        if self._is_part_of_step(options.get("num_items_in_batch")):
            term = term / self.current_gradient_accumulation_steps
        return (loss + term, outputs) if return_outputs else loss + term

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log an entry of the trainer, with the mean divergence since the last entry."""
        if "loss" in logs and self._terms:
            mean = torch.stack(self._terms).mean()
            logs["kl"] = self.accelerator.reduce(mean, "mean").item()
            self._terms.clear()
        super().log(logs, *args, **options)

    def _is_part_of_step(self, num_items_in_batch: Any) -> bool:
        """Say whether the trainer takes losses as parts of a step, and divides them no more."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return scaled
        counts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counts or self.compute_loss_func is not None

    def _draw(self) -> int:
        """Number every forward pass, the same in all processes and after a resume."""
        steps = self.state.global_step
        self._draws = self._draws + 1 if steps == self._drawn_at else 0
        self._drawn_at = steps
        return steps * self.args.gradient_accumulation_steps + self._draws

    def _shared_regularizer(self, resumes: bool) -> KLRegularizer:
        """Make the chats in one process and load them in the others, and where one is resumed."""
        path = Path(self.args.output_dir) / CHATS
        local = self.args.save_on_each_node
        index = self.args.local_process_index if local else self.args.process_index
        with self.args.main_process_first(local=local, desc="chats of the base model"):
            if (resumes or index > 0) and path.exists():
                made = KLRegularizer.load(path)
            else:
                made = self._make_regularizer()
                if index == 0 and (self.args.save_strategy != "no" or self.args.world_size > 1):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    made.save(path)
        beside = chats_beside(self.args.per_device_train_batch_size)
        made.kl_coef = self.grasp_config.kl_coef
        made.batch_size = self.grasp_config.kl_batch_size or beside
        return made

    def _make_regularizer(self) -> KLRegularizer:
        config = self.grasp_config
        length = getattr(self.args, "max_length", None) or _MAX_LENGTH
        # A processor holds a tokenizer.
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        examples, neutral = training_prompts(self._rows, self.train_dataset, tokenizer, length)
        return KLRegularizer.make(
            self.model,
            examples,
            neutral=neutral,
            num_documents=config.num_documents,
            max_new_tokens=config.max_new_tokens,
            seed=self.args.seed,
            progress=not self.args.disable_tqdm,
        )


class GraspTrainer(GraspTrainerMixin, Trainer):
    """Class `transformers.Trainer` with `GraspTrainerMixin`, which describes the arguments."""
