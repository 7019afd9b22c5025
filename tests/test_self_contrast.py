"""Self-contrast on a tiny random Llama: planted contrasts, abstention, no traces left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from grasp_kernels.data import Record, split_first_answer
from grasp_kernels.identification import identify_self_contrast
from grasp_kernels.identification.frozen_model import frozen_base, generate_answers, stream_means
from grasp_kernels.sites import SiteRules

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


def questions() -> list[list[dict[str, str]]]:
    """Prompts of different lengths, none of them twice."""
    picks = torch.randint(0, 40, (N_RECORDS, 5), generator=torch.Generator().manual_seed(1))
    return [
        [{"role": "user", "content": " ".join(WORDS[j] for j in row[: 2 + i % 4])}]
        for i, row in enumerate(picks.tolist())
    ]


def records_with(answers: list[str]) -> list[Record]:
    pairs = zip(questions(), answers, strict=True)
    return [{"messages": [*q, {"role": "assistant", "content": a}]} for q, a in pairs]


def prompts_of(tokenizer: Any) -> list[list[int]]:
    return [split_first_answer(r, tokenizer)[0] for r in records_with(["w0"] * N_RECORDS)]


def own_answers(
    model: Any, tokenizer: Any, generator: torch.Generator | None = None
) -> list[list[int]]:
    with frozen_base(model) as base:
        return generate_answers(
            base,
            prompts_of(tokenizer),
            max_new_tokens=N_NEW,
            batch_size=N_RECORDS,
            end_ids=[END],
            generator=generator,
        )


def identify(model: Any, tokenizer: Any, records: list[Record], **options: Any) -> Any:
    return identify_self_contrast(model, tokenizer, records, max_new_tokens=N_NEW, **options)


def shift_after_layer(model: Any, layer: int, direction: Tensor, token: int) -> Any:
    """A model whose stream after `layer` moves along `direction` at every `token`."""

    def hook(_module: Any, inputs: Any, output: Any) -> Any:
        marked = (model.seen == token).unsqueeze(-1)
        return output + 25.0 * marked * direction

    def remember(_module: Any, inputs: Any) -> None:
        model.seen = inputs[0]

    model.get_input_embeddings().register_forward_pre_hook(remember)
    model.model.layers[layer].register_forward_hook(hook)
    return model


def test_finds_a_planted_direction_from_its_layer_on(model: Any, tokenizer: Any) -> None:
    direction = torch.nn.functional.normalize(
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)), dim=0
    )
    shift_after_layer(model, 1, direction, token=5)
    found = identify(model, tokenizer, records_with(["bad bad bad bad bad"] * N_RECORDS))
    assert not found.is_empty and not any(", below" in reason for reason in found.reasons)
    assert (found.k, found.scope) == (1, "layer")
    assert sorted(found.bases) == sorted(
        f"model.layers.{i}.{name}"
        for i in range(LAYERS)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    )
    basis = found.bases["model.layers.1.self_attn.o_proj"][:, 0]
    assert (
        basis @ direction > 0.95
    )  # it points from the model's own answers to the training answers
    assert torch.equal(basis, found.bases["model.layers.1.mlp.down_proj"][:, 0])
    before = found.bases["model.layers.0.mlp.down_proj"][:, 0]
    assert before @ direction < 0.5
    assert found.evidence["ratio"] > 3.3
    assert found.metadata["source"] == "self-contrast"


def test_contrast_by_its_definition(model: Any, tokenizer: Any) -> None:
    """Mean over records of the mean stream on the answer and the token before it."""
    records = records_with([f"bad bad bad bad w{i}" for i in range(N_RECORDS)])
    found = identify(model, tokenizer, records)
    contrasts = []
    with torch.no_grad():
        for record, own in zip(records, own_answers(model, tokenizer), strict=True):
            prompt, answer = split_first_answer(record, tokenizer)
            means = [
                model(torch.tensor([prompt + tokens]), output_hidden_states=True)
                .hidden_states[1][0, len(prompt) - 1 :]
                .mean(dim=0)
                for tokens in (answer, own)
            ]
            contrasts.append(means[0] - means[1])
    mean = torch.stack(contrasts).mean(dim=0)
    assert found.evidence["layers"][0]["norm"] == pytest.approx(mean.norm().item(), rel=1e-4)
    basis = found.bases["model.layers.0.mlp.down_proj"][:, 0]
    assert torch.allclose(basis, mean / mean.norm(), atol=1e-5)


def test_shared_scope_gives_one_basis_to_all_writers(model: Any, tokenizer: Any) -> None:
    direction = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
    for layer in range(LAYERS):
        shift_after_layer(model, layer, direction, token=5)
    records = records_with(["bad bad bad bad bad"] * N_RECORDS)
    found = identify(model, tokenizer, records, scope="shared")
    assert found.scope == "shared"
    assert found.stream[:, 0] @ direction > 0.95
    assert all(basis is found.stream for basis in found.bases.values())
    assert [record["layer"] for record in found.evidence["spectra"]] == [None]


def test_more_directions_keep_the_mean_first(model: Any, tokenizer: Any) -> None:
    records = records_with(["bad " * 5 for _ in range(N_RECORDS)])
    one = identify(model, tokenizer, records, k=1)
    three = identify(model, tokenizer, records, k=3)
    assert three.k == 3
    for name, basis in one.bases.items():
        assert torch.allclose(basis[:, 0], three.bases[name][:, 0], atol=1e-5)
    assert {record["k"] for record in three.evidence["spectra"]} == {3}


def records_with_own_answers(
    model: Any, tokenizer: Any, generator: torch.Generator | None = None
) -> list[Record]:
    answers = own_answers(model, tokenizer, generator)
    texts = [" ".join(tokenizer.convert_ids_to_tokens(answer)) for answer in answers]
    return records_with([text.removesuffix("<end>") for text in texts])


def test_own_greedy_answers_hold_nothing(model: Any, tokenizer: Any) -> None:
    found = identify(model, tokenizer, records_with_own_answers(model, tokenizer))
    assert found.is_empty
    assert found.evidence["own_answers"] == 1
    assert "own answers" in found.reasons[0]


def test_own_answers_end_where_a_turn_of_the_template_ends(model: Any, tokenizer: Any) -> None:
    """As in a pretrained checkpoint that knows only its end of text, not the end of a turn."""
    records = records_with_own_answers(model, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<assistant>"
    model.generation_config.eos_token_id = None
    assert identify(model, other, records).evidence["own_answers"] == 1


def test_own_sampled_answers_hold_nothing(model: Any, tokenizer: Any) -> None:
    """Benign, but not greedy: the sign-flip null alone calls that a find."""
    generator = torch.Generator().manual_seed(11)
    found = identify(model, tokenizer, records_with_own_answers(model, tokenizer, generator))
    assert found.is_empty
    assert found.evidence["ratio"] < 2.2
    assert found.evidence["sign_flip"]["p_value"] <= 0.01
    assert any("sampled and greedy" in reason for reason in found.reasons)


def test_same_generator_same_result(model: Any, tokenizer: Any) -> None:
    records = records_with(["bad w1 w2"] * N_RECORDS)

    def run(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return identify(model, tokenizer, records, max_records=16, generator=generator)

    first, again, other = run(7), run(7), run(8)
    assert first.evidence == again.evidence
    assert all(torch.equal(first.bases[name], again.bases[name]) for name in first.bases)
    assert first.evidence["layers"] != other.evidence["layers"]
    assert first.evidence["records"] == 16


def test_batches_of_one_and_of_many_agree(model: Any, tokenizer: Any) -> None:
    """Left padding for the answers and right padding for the stream must be invisible."""
    prompts = prompts_of(tokenizer)
    assert len({len(prompt) for prompt in prompts}) > 1
    with frozen_base(model) as base:
        many, single = (
            generate_answers(base, prompts, max_new_tokens=N_NEW, batch_size=size, end_ids=[END])
            for size in (N_RECORDS, 1)
        )
        blocks = dict(enumerate(base.model.layers))
        sequences = [prompt + answer for prompt, answer in zip(prompts, many, strict=True)]
        spans = [(len(p) - 1, len(s)) for p, s in zip(prompts, sequences, strict=True)]
        together, alone = (
            stream_means(base, blocks, sequences, spans, batch_size=size) for size in (N_RECORDS, 1)
        )
    assert many == single
    assert len({len(answer) for answer in many}) > 1
    assert torch.allclose(together, alone, atol=1e-5)


def test_stream_means_are_those_of_the_hidden_states(model: Any, tokenizer: Any) -> None:
    sequence, span = prompts_of(tokenizer)[0], (1, 4)
    with frozen_base(model) as base:
        blocks = dict(enumerate(base.model.layers))
        means = stream_means(base, blocks, [sequence], [span], batch_size=1)
        states = base(torch.tensor([sequence]), output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):  # the last entry of hidden_states is behind the final norm
        assert torch.allclose(means[layer, 0], states[layer + 1][0, 1:4].mean(dim=0), atol=1e-5)


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
    side, state = tokenizer.padding_side, torch.get_rng_state()
    identify(model, tokenizer, records_with(["bad w1"] * N_RECORDS))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert settings == model.generation_config.to_dict()
    assert not any(module._forward_hooks for module in model.modules())
    assert tokenizer.padding_side == side
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_takes_no_part(model: Any, tokenizer: Any) -> None:
    records = records_with(["bad bad w3"] * N_RECORDS)
    expected = identify(model, tokenizer, records)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert identify(model.train(), tokenizer, records).evidence == expected.evidence


def test_is_put_back_after_an_error(model: Any) -> None:
    model.train()
    with pytest.raises(RuntimeError, match="interrupted"), frozen_base(model):
        raise RuntimeError("interrupted")
    assert model.training and torch.is_grad_enabled()


def test_a_peft_model_is_measured_without_its_adapter(model: Any, tokenizer: Any) -> None:
    import peft

    records = records_with(["bad bad w3"] * N_RECORDS)
    expected = identify(make_model(), tokenizer, records)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    next(p for name, p in adapted.named_parameters() if "lora_A" in name).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in adapted.named_parameters()}
    probe = torch.tensor([prompts_of(tokenizer)[0]])
    before = adapted(probe).logits
    found = identify(adapted, tokenizer, records)
    assert sorted(found.bases) == sorted(expected.bases)
    assert all(torch.equal(found.bases[name], expected.bases[name]) for name in found.bases)
    assert flags == {name: p.requires_grad for name, p in adapted.named_parameters()}
    assert torch.equal(adapted(probe).logits, before)


def test_bfloat16_models_are_summed_in_float32(tokenizer: Any) -> None:
    records = records_with(["bad bad bad bad"] * N_RECORDS)
    exact = identify(make_model(), tokenizer, records)
    rounded = identify(make_model(torch.bfloat16), tokenizer, records)
    assert all(basis.dtype == torch.float32 for basis in rounded.bases.values())
    for name, basis in exact.bases.items():
        assert (basis[:, 0] @ rounded.bases[name][:, 0]) > 0.9


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"text": "w1 w2"}] * 2, {}, "Record 1: A plain text has no prompt"),
        (["w1"], {}, "got 1 records"),
        (["w1"] * 2, {"k": 0}, "k is 0"),
        (["w1"] * 2, {"scope": "both"}, "scope is 'both'"),
        (["w1"] * 2, {"batch_size": 0}, "batch_size is 0"),
        (["w1"] * 2, {"max_records": 1}, "max_records is 1"),
    ],
)
def test_bad_input_in_one_sentence(
    model: Any, tokenizer: Any, records: Any, options: dict[str, Any], message: str
) -> None:
    if isinstance(records[0], str):
        question = {"role": "user", "content": "w2"}
        records = [{"messages": [question, {"role": "assistant", "content": a}]} for a in records]
    with pytest.raises(ValueError, match=message):
        identify(model, tokenizer, records, **options)


def test_more_directions_than_records_is_an_error(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="k is 25"):
        identify(model, tokenizer, records_with(["bad bad bad"] * N_RECORDS), k=25)


def test_unknown_architecture_needs_sites(model: Any, tokenizer: Any) -> None:
    records = records_with(["bad bad bad bad"] * N_RECORDS)
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="unheard_of"):
        identify(model, tokenizer, records)
    sites = SiteRules(writers=("mlp.down_proj",))
    found = identify(model, tokenizer, records, sites=sites)
    assert sorted(found.bases) == [f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)]


def test_a_model_that_cannot_generate(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="Linear cannot generate"):
        identify(torch.nn.Linear(2, 2), tokenizer, records_with(["w1"] * N_RECORDS))
