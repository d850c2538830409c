"""What every registered model must hold to, without exemption. A new model gets a row in contract.CASES.

Left out here, because a single process cannot show it: that several processes together equal one with the joint batch.
What the training loop adds to an exact resume (the position in the data, checkpoints on disk) is tested with the trainer.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from contract import CASES, build, is_moved, losses_of, make_batch, optimizer_for, pick, snapshot, texts_of, train
from torch import Tensor

from vlpfast import models, types
from vlpfast.ops import backends
from vlpfast.training.config import load_config, to_yaml
from vlpfast.types import Batch, Progress, UserError

every_model = pytest.mark.parametrize("name", models.names())


def test_every_model_has_a_row() -> None:
    assert sorted(CASES) == models.names()


# 1. YAML -> typed Config -> YAML is the identity; a key that is not there fails with a suggestion.


@every_model
@pytest.mark.parametrize("preset", ["", "tiny"])
def test_config_survives_yaml(name: str, preset: str, tmp_path: Path) -> None:
    config_class = models.get(name).Config
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name: {name}, preset: '{preset}'}}\n")
    run = load_config(path, [], models.get)
    assert run.model.config == (config_class.tiny() if preset else config_class())
    path.write_text(to_yaml(run))
    again = load_config(path, [], models.get)
    assert again == run and type(again.model.config) is config_class
    assert to_yaml(again) == path.read_text()


@every_model
def test_unknown_key_gets_a_suggestion(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{name: {name}}}\n")
    with pytest.raises(UserError, match=r"unknown key 'model\.daata'; did you mean 'model\.data'\?"):
        load_config(path, ["model.daata.image.size=3"], models.get)


# 2. At the published size.


@every_model
def test_parameter_count(name: str) -> None:
    model_class = models.get(name)
    with torch.device("meta"):
        model = model_class(model_class.Config())
    copy, _ = CASES[name].copies
    count = sum(parameter.numel() for key, parameter in model.named_parameters() if not (copy and key.startswith(copy)))
    expected = model_class.PUBLISHED_PARAMETERS or CASES[name].parameters
    assert abs(count / expected - 1) <= 0.005, f"{count:,} parameters, expected {expected:,}"
    assert model_class.PAPER


# 3. Exactly the named losses, finite; three steps move what is trained and nothing else.


@every_model
def test_losses_and_three_steps(name: str) -> None:
    model = build(name)
    batch = make_batch(model.config.data, 6)
    losses = losses_of(model, batch)
    assert set(losses) == CASES[name].losses
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    before = snapshot(model)
    train(model, optimizer_for(model), [batch] * 3)
    for parameter_name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == is_moved(model, parameter_name, CASES[name].copies), parameter_name


@every_model
def test_what_a_stage_freezes_stays_as_it_is(name: str) -> None:
    model = build(name)
    for number, parameter in enumerate(model.parameters()):
        if number % 2:
            parameter.requires_grad_(False)
    before = snapshot(model)
    train(model, optimizer_for(model), [make_batch(model.config.data, 6)] * 3)
    for parameter_name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == is_moved(model, parameter_name, CASES[name].copies), parameter_name


# 4. Padding and the order of the batch change nothing; a batch of one works; forward changes no state.


@every_model
def test_padding_and_order_change_nothing(name: str) -> None:
    model = build(name).eval()
    batch = make_batch(model.config.data, 6)
    expected = losses_of(model, batch)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = pick(batch, order)
    torch.testing.assert_close(losses_of(model, shuffled), expected)
    for text in texts_of(model.config.data):
        fields = [field for field in (text, f"{text}_mask", f"{text}_masked", f"{text}_labels") if field in batch]
        longest = int(batch[f"{text}_mask"].sum(1).max())
        assert longest < batch[text].shape[1]
        cut: Batch = {**batch, **{field: batch[field][:, :longest] for field in fields}}
        torch.testing.assert_close(losses_of(model, cut), expected)
        padded = {
            field: batch[field].masked_fill(~batch[f"{text}_mask"], 7) for field in fields if field in (text, f"{text}_masked")
        }
        torch.testing.assert_close(losses_of(model, {**batch, **padded}), expected)


@every_model
def test_batch_of_one(name: str) -> None:
    model = build(name)
    assert all(loss.isfinite() for loss in losses_of(model, make_batch(model.config.data, 1)).values())


@every_model
def test_forward_changes_no_state(name: str) -> None:
    model = build(name).train()
    before = snapshot(model)
    losses_of(model, make_batch(model.config.data, 6))
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


# 5. Every backend of the operators gives the same losses and gradients.


@every_model
def test_reference_and_default_backend_agree(name: str) -> None:
    if backends.available()["cpp"]:
        pytest.skip(f"waits for the compiled operators: {backends.available()['cpp']}")
    model = build(name).eval()
    batch = make_batch(model.config.data, 6)

    def run() -> tuple[dict[str, Tensor], list[Tensor]]:
        losses = losses_of(model, batch)
        return losses, torch.autograd.grad(sum(losses.values()), [p for p in model.parameters() if p.requires_grad])

    default = run()
    with backends.use("reference"):
        reference = run()
    torch.testing.assert_close(default, reference, atol=1e-5, rtol=1e-4)


# 6. One graph, without a break, and the same one at every step.


@every_model
def test_compiles_without_a_break(name: str) -> None:
    model = build(name).eval()
    batch = make_batch(model.config.data, 4)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = losses_of(model, batch)
    gradients = torch.autograd.grad(sum(expected.values()), parameters)
    compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled = compiled_model(batch, Progress(0, 10))
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(sum(compiled.values()), parameters), gradients, atol=1e-5, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_model(batch, Progress(3, 10))


# 7. Saved, loaded and gone on with: the bits of an unbroken run.


@every_model
def test_resumes_bit_for_bit(name: str) -> None:
    batches = [make_batch(models.get(name).Config.tiny().data, 6, seed=seed) for seed in range(4)]
    model = build(name).train()
    optimizer = optimizer_for(model)
    train(model, optimizer, batches[:2], first=0, steps=4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    expected = train(model, optimizer, batches[2:], first=2, steps=4)

    other = build(name, seed=99).train()
    optimizer = optimizer_for(other)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert train(other, optimizer, batches[2:], first=2, steps=4) == expected
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in other.state_dict().items())


# 9. What it offers beside forward.


@every_model
def test_protocols(name: str) -> None:
    model = build(name).eval()
    batch = make_batch(model.config.data, 5)
    if isinstance(model, types.EncodesImages):
        image = batch["image"]
        check_encoder(model.encode_image, [image if image.ndim == 4 else image[:, 0]])
    if isinstance(model, types.EncodesTexts):
        check_encoder(model.encode_text, [batch["text"], batch["text_mask"]])
        torch.testing.assert_close(model.encode_text(batch["text"]), model.encode_text(batch["text"], batch["text_mask"]))
    if isinstance(model, types.SplitsContrastive):
        parts = [model.encode(pick(batch, torch.tensor(rows))) for rows in ([0, 1], [2], [3, 4])]
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        expected = losses_of(model, batch)
        got = model.contrast(joined)
        torch.testing.assert_close(got, {key: expected[key] for key in got})


def check_encoder(encode, inputs: list[Tensor]) -> None:
    """Unit rows in float32, the same in a batch and one by one, and not all alike."""
    with torch.no_grad():
        features = encode(*inputs)
        alone = torch.cat([encode(*(value[i : i + 1] for value in inputs)) for i in range(len(inputs[0]))])
    assert features.ndim == 2 and features.shape[0] == len(inputs[0]) and features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-5)
    assert features.std(0).max() > 1e-3


# 12. It learns: one batch by heart.


@every_model
def test_learns_one_batch_by_heart(name: str) -> None:
    model = build(name, **CASES[name].alone).train()
    batch = make_batch(model.config.data, 8)
    sums = train(model, optimizer_for(model, CASES[name].lr), [batch] * 20)
    assert sums[-1] < CASES[name].by_heart * sums[0], sums
