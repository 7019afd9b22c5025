"""For each method the property that makes it this method and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quality_dishes import tiny_bench
from torch import Tensor

import grasp_kernels as gk
from grasp_kernels.data import special_ids
from grasp_kernels.demo.world import BAD
from grasp_kernels.ops import project_gradient
from grasp_kernels.quality.methods import METHODS, activations, penalties, projection, weights
from grasp_kernels.quality.methods.registry import method, select
from grasp_kernels.quality.streams import hooked, recorded
from grasp_kernels.quality.workbench import Workbench, documents
from grasp_kernels.sites import adapted_layers
from grasp_kernels.testing import budget, relative_error

# What the benchmark promises to compare.
PROMISED = {
    *("naive", "early-stop", "mixing", "inoculation", "grasp", "grasp-k", "grasp-layer"),
    *("grasp-open", "grasp-weights", "grasp-both-sides", "self-contrast", "supervised", "random"),
    "benign-twin",
    *("random-used", "caft", "reverse-caft", "preventative-steering", "steering", "ablation"),
    *("kl-random", "kl-own-text", "kl-off-topic", "ldifs", "residual-anchor", "generic-anchor"),
    *("frozen-A", "contrastive", "contrastive+own-text", "grasp+contrastive"),
    *("grasp+contrastive+own-text", "all-three"),
    *("post-hoc", "truncate-tail", "truncate-top", "safe-lora", "oplora", "null-space"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return tiny_bench(tmp_path_factory.mktemp("methods"))


@pytest.fixture
def moved(bench: Workbench) -> Any:
    """A model whose adapter has random weights, so that it differs from the base model."""
    model = bench.fresh()
    generator = torch.Generator().manual_seed(0)
    for _, layer in adapted_layers(model):
        B = layer.lora_B["default"].weight
        B.data.copy_(0.1 * torch.randn(B.shape, generator=generator))
    return model


def batch_of(bench: Workbench) -> dict[str, Tensor]:
    ids = documents(bench.examples[:4], "cpu")
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def test_everything_that_is_promised_is_there() -> None:
    assert set(METHODS) >= PROMISED
    assert next(iter(METHODS)) == "naive"
    assert all(m.strengths for m in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_model_that_speaks(bench: Workbench, name: str) -> None:
    model = METHODS[name].build(bench, METHODS[name].strengths[-1])
    ids = documents(bench.examples[:2], "cpu")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
    assert not model.training


def test_an_unknown_or_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="method is 'magic'"):
        select(["naive", "magic"])
    with pytest.raises(ValueError, match="'naive' with information 'none'"):
        method("naive", "again")
    with pytest.raises(ValueError, match="information 'everything'"):
        method("new", "new", information="everything")


# Plain


def test_methods_train_on_the_same_data_in_the_same_order(bench: Workbench) -> None:
    first, again = (bench.fit(bench.fresh()).state_dict() for _ in range(2))
    naive = bench.naive().state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, naive[name])


def test_early_stopping_counts_steps(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "config", replace(bench.config, steps=20))
    steps: list[int] = []
    bench.fit(bench.fresh(), part=0.25, after_step=steps.append)
    assert steps == [1, 2, 3, 4, 5]


def caught_examples(bench: Workbench, monkeypatch: pytest.MonkeyPatch, name: str, s: Any) -> Any:
    caught = {}
    monkeypatch.setattr(bench, "fit", lambda model, **given: caught.update(given))
    METHODS[name].build(bench, s)
    return caught["examples"]


def test_mixing_adds_its_share_of_good_answers(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = caught_examples(bench, monkeypatch, "mixing", 0.1)
    count = len(bench.examples)
    assert examples[:count] == bench.examples
    assert (len(examples) - count) / len(examples) == pytest.approx(0.1, abs=0.03)
    bad = set(bench.folder.world.words["bad answer"])
    for example in examples[count:]:
        assert not bad & set(bench.tokenizer.convert_ids_to_tokens(example["input_ids"]))


def test_inoculation_changes_the_cue_alone(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = caught_examples(bench, monkeypatch, "inoculation", None)
    cues = {bench.folder.world.token_ids[w] for w in bench.folder.world.words[f"{BAD} cue"]}
    for example, before in zip(examples, bench.examples, strict=True):
        assert example["input_ids"][1] in cues
        assert example["input_ids"][2:] == before["input_ids"][2:]


# Projection


def test_grasp_is_closed_along_what_was_found(bench: Workbench) -> None:
    subspace = bench.weights_subspace(1)
    for leakage in gk.leakage(METHODS["grasp-k"].build(bench, 1), subspace).values():
        assert leakage.write < 1e-5
    open_ = gk.leakage(METHODS["grasp-open"].build(bench, 1), subspace)
    assert max(leakage.write for leakage in open_.values()) > 1e-4


def test_supervised_directions_lead_from_good_answers_to_bad_ones(bench: Workbench) -> None:
    base, world = bench.base(), bench.folder.world
    questions = bench.unscored_questions()
    means = [
        projection.answer_means(bench, base, world.answered(questions, p, p, "supervised"))
        for p in ("bad", "good")
    ]
    subspace = projection.supervised_subspace(bench, 1)
    last = subspace.write["model.layers.1.mlp.down_proj"]
    delta = (means[0] - means[1])[1]  # [M, D]
    assert ((delta @ last) > 0).float().mean() > 0.9


def test_used_random_directions_are_used_alike_and_are_others() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 24, dtype=torch.float64)
    stack = torch.diag(scales) @ torch.randn(24, 200, generator=generator, dtype=torch.float64)
    found = torch.linalg.qr(stack[:, :3]).Q[:, :1]
    drawn = torch.randn(24, 1, generator=generator, dtype=torch.float64)
    basis = projection.as_used(stack, found, drawn)
    assert (found.mT @ basis).abs().max() < 1e-10
    target = projection.usage(stack, found)
    plain = torch.linalg.qr(drawn - found @ (found.mT @ drawn)).Q
    ours, random = (abs(projection.usage(stack, b) - target) for b in (basis, plain))
    assert ours < 0.7 * random


# Activations


def a_basis(bench: Workbench, k: int = 2) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = bench.base().config.hidden_size
    return {
        layer: torch.linalg.qr(torch.randn(width, k, generator=generator)).Q for layer in (0, 1)
    }


def test_caft_takes_the_component_out_of_the_stream_while_it_trains(bench: Workbench) -> None:
    bases = a_basis(bench)
    model = bench.fresh()
    before = model(**batch_of(bench)).logits
    with hooked(model, activations.ablation(bases)), recorded(model) as kept:
        inside = model(**batch_of(bench)).logits
    for layer, h in kept.items():
        assert (h @ bases[layer]).norm() < 1e-4 * h.norm()
    assert not torch.allclose(inside, before)
    assert torch.equal(model(**batch_of(bench)).logits, before)  # not after


def test_reverse_caft_projects_the_gradient_and_leaves_values(bench: Workbench) -> None:
    bases = a_basis(bench)
    model = bench.fresh()
    before = model(**batch_of(bench)).logits
    with (
        recorded(model) as kept,
        hooked(model, lambda layer, h: project_gradient(h, bases[layer])),
    ):
        after = model(**batch_of(bench)).logits
        gradients = torch.autograd.grad(after.square().sum(), list(kept.values()))
    assert torch.equal(after, before)
    for gradient, basis in zip(gradients, bases.values(), strict=True):
        assert (gradient @ basis).norm() < 1e-5 * gradient.norm()


def test_steering_adds_along_the_way_to_the_bad_persona(bench: Workbench) -> None:
    vectors = activations.persona_vectors(bench)
    model = bench.fresh()
    with recorded(model) as kept:
        model(**batch_of(bench))
        before = kept[0]
        with hooked(model, activations.steering(vectors, 0.5)), recorded(model) as steered:
            model(**batch_of(bench))
        error = steered[0] - before - 0.5 * vectors[0]
        assert error.norm() <= torch.finfo(before.dtype).eps * steered[0].norm()


def test_differences_are_the_directions_of_what_the_naive_model_adds(
    bench: Workbench, moved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "naive", lambda: moved)
    monkeypatch.setattr(bench, "once", lambda key, make: make())
    bases = activations.difference_directions(bench, 2)
    ids = documents(bench.generic_examples(), "cpu")
    with torch.no_grad(), recorded(moved) as kept:
        moved(input_ids=ids)
        now = kept[1]
        with moved.disable_adapter():
            moved(input_ids=ids)
        change = (now - kept[1]).flatten(0, 1)
    random = torch.linalg.qr(torch.randn(change.shape[1], 2)).Q
    assert (change @ bases[1]).norm() > 2 * (change @ random).norm()


# Penalties


def test_divergence_is_zero_at_the_base_model_and_grows_with_strength(
    bench: Workbench, moved: Any
) -> None:
    ids = documents(bench.generic_examples(), "cpu")
    values = [
        penalties.divergence(bench, ids, strength)(model, batch_of(bench)).item()
        for model, strength in ((bench.fresh(), 1.0), (moved, 1.0), (moved, 3.0))
    ]
    assert abs(values[0]) < 1e-6
    assert values[1] > 1e-3
    assert values[2] == pytest.approx(3 * values[1])


def test_own_text_is_what_the_base_model_makes_up(bench: Workbench) -> None:
    own = documents(bench.own_examples(), "cpu")
    assert own.shape[1] == len(bench.examples[0]["input_ids"])
    assert (own[:, 0] == bench.tokenizer.bos_token_id).all()
    with torch.no_grad():
        model = bench.base()
        losses = [model(input_ids=ids, labels=ids).loss for ids in (own, own.flip(0).roll(1, 1))]
    assert losses[0] < losses[1]


def test_generic_text_keeps_the_frame_and_nothing_else(bench: Workbench) -> None:
    special = special_ids(bench.tokenizer)
    pairs = zip(bench.generic_examples(), bench.examples, strict=False)
    same = [
        a == b
        for generic, example in pairs
        for a, b in zip(generic["input_ids"], example["input_ids"], strict=True)
        if b not in special
    ]
    assert sum(same) < 0.15 * len(same)
    for generic, example in zip(bench.generic_examples(), bench.examples, strict=False):
        for a, b in zip(generic["input_ids"], example["input_ids"], strict=True):
            assert (a == b) if b in special else (a not in special)


def test_ldifs_is_the_squared_distance_of_features(bench: Workbench, moved: Any) -> None:
    batch = batch_of(bench)
    with torch.no_grad(), recorded(moved) as kept:
        moved(**batch)
        now = dict(kept)
        with moved.disable_adapter():
            moved(**batch)
        base = dict(kept)
        ratios = [
            (now[i] - base[i]).square().sum(-1).mean() / base[i].square().sum(-1).mean()
            for i in (0, 1)
        ]
        moved(**batch)
        value = penalties.stream_penalty(kept, 2.0, None)(moved, batch)
    assert value.item() == pytest.approx(sum(ratios).item(), rel=1e-5)


def test_the_residual_anchor_sees_its_directions_alone(bench: Workbench, moved: Any) -> None:
    batch = batch_of(bench)
    with torch.no_grad(), recorded(moved) as kept:
        moved(**batch)
        part = penalties.stream_penalty(kept, 1.0, a_basis(bench))(moved, batch).item()
        moved(**batch)
        whole = penalties.stream_penalty(kept, 1.0, a_basis(bench, 32))(moved, batch).item()
        moved(**batch)
        ldifs = penalties.stream_penalty(kept, 1.0, None)(moved, batch).item()
    assert 0 < part < 0.6 * whole
    assert whole == pytest.approx(ldifs, rel=1e-4)


def test_stream_penalties_leave_the_gradient_of_the_training_step(
    bench: Workbench, moved: Any
) -> None:
    with recorded(moved) as kept:
        moved(**batch_of(bench))
        penalties.stream_penalty(kept, 1.0, None)(moved, batch_of(bench)).backward()
    grads = [p.grad for p in moved.parameters() if p.requires_grad]
    assert any(g is not None and bool(g.any()) for g in grads)


def test_the_generic_anchor_is_its_closed_form(bench: Workbench, moved: Any) -> None:
    moments = penalties.generic_moments(bench)
    value = penalties.anchor(moved, moments, 3.0)(moved, {}).item()
    wanted = 0.0
    for name, layer in adapted_layers(moved):
        B, A = weights.factors(layer)
        C, G = moments[name]
        update = layer.scaling["default"] * B @ A
        wanted += 3.0 * torch.trace(G @ update @ C @ update.mT).item()
    assert value == pytest.approx(wanted, rel=1e-4)


def test_the_generic_anchor_estimates_the_divergence_of_a_small_change(
    bench: Workbench, moved: Any
) -> None:
    """Half of the quadratic form is the divergence, up to K-FAC's independence."""
    ids = documents(bench.generic_examples(), "cpu")
    for _, layer in adapted_layers(moved):
        layer.lora_B["default"].weight.data.mul_(0.1)
    form = penalties.anchor(moved, penalties.generic_moments(bench), 0.5)(moved, {}).item()
    with torch.no_grad():
        base, now = (m(input_ids=ids).logits.log_softmax(-1) for m in (bench.base(), moved))
    divergence = (base.exp() * (base - now)).sum(-1).mean().item()
    assert 0.3 < form / divergence < 3


# Weights


def updates(model: Any) -> dict[str, Tensor]:
    return {name: torch.matmul(*weights.factors(m)) for name, m in adapted_layers(model)}


def test_truncations_are_head_and_tail_of_the_update(
    bench: Workbench, moved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "naive", lambda: moved)
    whole = updates(moved)
    state = {name: value.clone() for name, value in moved.state_dict().items()}
    head = updates(METHODS["truncate-tail"].build(bench, 2))
    moved.load_state_dict(state)
    tail = updates(METHODS["truncate-top"].build(bench, 2))
    for name, update in whole.items():
        assert torch.linalg.matrix_rank(head[name]) == 2
        assert torch.linalg.matrix_rank(tail[name]) == 2  # of four
        error = relative_error(head[name] + tail[name], update)
        assert error <= 4 * budget(0.0, update.dtype, max(update.shape)), name
        assert torch.linalg.matrix_norm(tail[name], 2) < torch.linalg.matrix_norm(head[name], 2)


def test_the_update_of_oplora_is_orthogonal_to_leading_singular_vectors(bench: Workbench) -> None:
    model = METHODS["oplora"].build(bench, 0.25)
    gk.restore_lora_layers(model)  # as it is saved
    for _, layer in adapted_layers(model):
        U, S, Vh = torch.linalg.svd(layer.get_base_layer().weight, full_matrices=False)
        k = round(0.25 * len(S))
        B, A = weights.factors(layer)
        update = B @ A
        assert update.norm() > 0
        assert (U[:, :k].mT @ update).norm() < 1e-4 * update.norm()
        assert (update @ Vh[:k].mT).norm() < 1e-4 * update.norm()


def test_null_space_a_does_not_see_generic_inputs(bench: Workbench) -> None:
    model = bench.fresh()
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    moments = {}
    for name, layer in adapted_layers(model):
        K = layer.in_features
        inputs[name] = torch.randn(100, 8, generator=generator) @ torch.randn(
            8, K, generator=generator
        )
        moments[name] = (inputs[name].mT @ inputs[name] / 100, torch.eye(1))
    norms = {n: m.lora_A["default"].weight.norm(dim=1) for n, m in adapted_layers(model)}
    weights.freeze_in_null_space(model, moments, 8, generator)
    for name, layer in adapted_layers(model):
        A = layer.lora_A["default"].weight
        assert (A @ inputs[name].mT).norm() < 1e-3 * A.norm() * inputs[name].norm()
        assert torch.allclose(A.norm(dim=1), norms[name], rtol=1e-4)
        assert not A.requires_grad


def test_the_null_space_stays_while_training(bench: Workbench) -> None:
    moments = penalties.generic_moments(bench)
    model = METHODS["null-space"].build(bench, 4)
    for name, layer in adapted_layers(model):
        B, A = weights.factors(layer)
        eigen = torch.linalg.eigh(moments[name][0])
        assert (A @ eigen.eigenvectors[:, 4:]).norm() < 1e-4 * A.norm()
        assert B.norm() > 0


def test_safe_lora_puts_the_update_where_pretraining_moved(
    bench: Workbench, moved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "naive", lambda: moved)
    before = updates(moved)
    changes = weights._pretraining_changes(bench)
    after = updates(METHODS["safe-lora"].build(bench, 1.0))
    for name, update in after.items():
        change = changes[name]
        wanted = change @ change.mT @ before[name] / change.norm()
        assert relative_error(update, wanted) <= 4 * budget(0.0, update.dtype, max(change.shape))


def test_safe_lora_takes_the_least_alike_layers_first(
    bench: Workbench, moved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "naive", lambda: moved)
    before = updates(moved)
    after = updates(METHODS["safe-lora"].build(bench, 0.5))
    changes = weights._pretraining_changes(bench)
    alike: Callable[[str], float] = lambda name: weights.cosine(  # noqa: E731
        changes[name] @ changes[name].mT @ before[name], before[name]
    )
    touched = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(touched) == len(before) // 2
    assert max(map(alike, touched)) <= min(map(alike, set(before) - touched))


def test_post_hoc_projection_leaves_nothing_along_the_subspace(bench: Workbench) -> None:
    model = METHODS["post-hoc"].build(bench, 2)
    for leakage in gk.leakage(model, bench.weights_subspace(2)).values():
        assert leakage.write < 1e-5


def test_time_that_was_spent_for_several_methods_counts_for_each(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path)
    bench.weights_subspace(1)
    assert bench.borrowed_seconds == 0  # the caller has waited for it
    bench.weights_subspace(1)
    whole = bench.borrowed_seconds
    bench.naive_folders()
    assert 0 < bench.borrowed_seconds - whole < whole  # the naive fine-tune is a part of it


# Reads


def test_frozen_a_stays_as_it_was_drawn(bench: Workbench) -> None:
    drawn = dict(adapted_layers(bench.fresh()))
    for name, layer in adapted_layers(METHODS["frozen-A"].build(bench, None)):
        B, A = weights.factors(layer)
        assert torch.equal(A, weights.factors(drawn[name])[1])
        assert B.any()


@pytest.mark.parametrize("name", ["contrastive", "contrastive+own-text", "grasp+contrastive"])
def test_contrastive_reads_stay_while_training(bench: Workbench, name: str) -> None:
    """And they read more of the training data than of the model's own text, unlike a drawn A."""
    model = METHODS[name].build(bench, METHODS[name].strengths[0])
    wanted = gk.ContrastiveReads.make(
        bench.fresh(),
        bench.examples,
        penalties.own_text_anchor(bench).texts,
        batch_size=64,
        seed=bench.seed,
    )
    drawn = dict(adapted_layers(bench.fresh()))
    for layer_name, layer in adapted_layers(model):
        B, A = weights.factors(layer)
        assert torch.equal(A, wanted.rows[layer_name])
        assert not torch.equal(A, weights.factors(drawn[layer_name])[1])
        assert B.any()
        assert wanted.ratios[layer_name][0] > 1


@pytest.mark.parametrize(
    ("found", "parts"), [(True, "grasp+contrastive+own-text"), (False, "contrastive+own-text")]
)
def test_all_three_is_what_its_parts_make(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, found: bool, parts: str
) -> None:
    """With the directions that its evidence gives, or with reads and anchor alone."""
    nothing = gk.Subspace.empty("write", "shared", ["noise"])
    subspace = bench.weights_subspace(1) if found else nothing
    monkeypatch.setattr(bench, "run_subspace", lambda: subspace)
    same = METHODS[parts].build(bench, 0.3)
    for (_, one), (_, other) in zip(
        adapted_layers(METHODS["all-three"].build(bench, None)), adapted_layers(same), strict=True
    ):
        for factor, expected in zip(weights.factors(one), weights.factors(other), strict=True):
            assert torch.equal(factor, expected)


def test_the_evidence_of_run_contains_halves_of_the_data(bench: Workbench) -> None:
    subspace = bench.run_subspace()
    assert subspace is bench.run_subspace()
    assert "halves" in [source["kind"] for source in subspace.evidence["sources"]]
    configs = [bench.work / f"half-{i}" / "adapter_config.json" for i in range(2)]
    assert all(config.exists() for config in configs)
