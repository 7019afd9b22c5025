"""Answers of a frozen model, on a tiny random Llama: no traces left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from grasp_kernels.data import encode_prompt
from grasp_kernels.models.frozen_model import frozen_base, generate_answers

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [f"w{i}" for i in range(40)]
END = 1
LAYERS, WIDTH, N_RECORDS, N_NEW = 3, 32, 24, 6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = ["<pad>", "<end>", "<system>", "<user>", "<assistant>", "bad", *WORDS]
    ids = {word: i for i, word in enumerate(vocabulary)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<pad>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=46,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(config)
    with (
        torch.no_grad()
    ):  # the end token takes the place of a frequent one: answers differ in length
        model.lm_head.weight[END] = 1.05 * model.lm_head.weight[20]
    return model.to(dtype).eval()


@pytest.fixture
def model() -> Any:
    return make_model()


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """Prompts of different lengths, none of them twice."""
    picks = torch.randint(0, 40, (N_RECORDS, 5), generator=torch.Generator().manual_seed(1))
    texts = [" ".join(WORDS[j] for j in row[: 2 + i % 4]) for i, row in enumerate(picks.tolist())]
    return [encode_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]


def sampled(model: Any, tokenizer: Any) -> list[list[int]]:
    """The model's own sampled answers."""
    with frozen_base(model) as base:
        return generate_answers(
            base,
            prompts_of(tokenizer),
            max_new_tokens=N_NEW,
            batch_size=8,
            end_ids=[END],
            generator=torch.Generator().manual_seed(0),
        )


def test_batches_of_one_and_of_many_agree(model: Any, tokenizer: Any) -> None:
    """Left padding must be invisible."""
    prompts = prompts_of(tokenizer)
    assert len({len(prompt) for prompt in prompts}) > 1
    with frozen_base(model) as base:
        many, single = (
            generate_answers(base, prompts, max_new_tokens=N_NEW, batch_size=size, end_ids=[END])
            for size in (N_RECORDS, 1)
        )
    assert many == single
    assert len({len(answer) for answer in many}) > 1


def test_answers_end_at_the_first_end_token(model: Any, tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer)
    with frozen_base(model) as base:
        plain = generate_answers(base, prompts, max_new_tokens=N_NEW, batch_size=8, end_ids=[])
        stop = plain[0][2]
        cut = generate_answers(base, prompts, max_new_tokens=N_NEW, batch_size=8, end_ids=[stop])
    assert all(len(answer) == N_NEW for answer in plain)
    for whole, answer in zip(plain, cut, strict=True):
        n = whole.index(stop) + 1 if stop in whole else N_NEW
        assert answer == whole[:n]


def test_the_head_sees_rows_that_lie_together(model: Any) -> None:
    """Torch copies a frozen head for each sequence of a slice, in bfloat16 on a CPU."""
    whole: list[bool] = []
    hook = model.lm_head.register_forward_hook(
        lambda _head, inputs, _logits: whole.append(inputs[0].is_contiguous())
    )
    try:
        with frozen_base(model) as base:
            base.generate(torch.full((2, 4), 7), max_new_tokens=1)
            assert whole == [False]  # what transformers itself gives
            generate_answers(base, [[7] * 4] * 2, max_new_tokens=2, batch_size=2, end_ids=[])
    finally:
        hook.remove()
    assert whole[1:] == [True, True]


def test_sampling_follows_the_softmax(model: Any, tokenizer: Any) -> None:
    prompt = prompts_of(tokenizer)[0]
    n = 4000
    with frozen_base(model) as base:
        answers = generate_answers(
            base,
            [prompt] * n,
            max_new_tokens=1,
            batch_size=n,
            end_ids=[END],
            generator=torch.Generator().manual_seed(0),
        )
        expected = base(torch.tensor([prompt])).logits[0, -1].softmax(dim=-1)
    counts = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=46)
    deviation = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt()
    assert deviation.max() < 4.5
    assert deviation.square().mean() < 2.0


def test_leaves_no_traces(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    model.generation_config.temperature = 0.3
    settings = copy.deepcopy(model.generation_config.to_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    sampled(model, tokenizer)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert settings == model.generation_config.to_dict()
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_takes_no_part(model: Any, tokenizer: Any) -> None:
    expected = sampled(model, tokenizer)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert sampled(model.train(), tokenizer) == expected


def test_is_put_back_after_an_error(model: Any) -> None:
    model.train()
    with pytest.raises(RuntimeError, match="interrupted"), frozen_base(model):
        raise RuntimeError("interrupted")
    assert model.training and torch.is_grad_enabled()


def test_a_peft_model_is_measured_without_its_adapter(model: Any, tokenizer: Any) -> None:
    import peft

    expected = sampled(make_model(), tokenizer)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    next(p for name, p in adapted.named_parameters() if "lora_A" in name).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in adapted.named_parameters()}
    probe = torch.tensor([prompts_of(tokenizer)[0]])
    before = adapted(probe).logits
    assert sampled(adapted, tokenizer) == expected
    assert flags == {name: p.requires_grad for name, p in adapted.named_parameters()}
    assert torch.equal(adapted(probe).logits, before)


def test_a_model_that_ignores_padding_answers_as_alone() -> None:
    """The states of its blocks take padding for text."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "lru_width": 32}
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=64, num_attention_heads=2, attention_window_size=16, **sizes
    )
    model = transformers.RecurrentGemmaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    prompts = [[5, 6, 7, 8, 9, 10], [5], [7, 8]]

    def answers(base: Any, size: int) -> list[list[int]]:
        return generate_answers(base, prompts, batch_size=size, max_new_tokens=8, end_ids=[])

    with frozen_base(model) as base:
        assert answers(base, 3) == answers(base, 1)


def test_an_encoder_decoder_is_no_causal_model() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    with pytest.raises(TypeError, match="give a causal language model"), frozen_base(model):
        pass


def test_a_model_that_cannot_generate() -> None:
    with pytest.raises(TypeError, match="Linear cannot generate"), frozen_base(nn.Linear(2, 2)):
        pass
