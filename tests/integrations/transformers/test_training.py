# SPDX-License-Identifier: Apache-2.0
"""Labels, the loss at them, memory for computing time, and a plain training loop."""

import pytest
import torch
from conftest import pairs, tiny_interface

from eloftr_ops.training.objective import batch_losses, term_weights


def shift_labels(batch=1, x=-4.0, y=-4.0):
    """Homographies of the pairs of conftest: image 1 is image 0, four pixels further."""
    H_0to1 = torch.eye(3).repeat(batch, 1, 1)
    H_0to1[:, 0, 2], H_0to1[:, 1, 2] = x, y
    return H_0to1


def depth_labels(batch=1, height=64, width=96):
    """The same shift by a translation in front of a wall at distance 1, focal length 40."""
    K = torch.tensor([[40.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]]).repeat(batch, 1, 1)
    T_0to1 = torch.eye(4).repeat(batch, 1, 1)
    T_0to1[:, 0, 3] = T_0to1[:, 1, 3] = -0.1
    depth = torch.ones(batch, height, width)
    return {"depth0": depth, "depth1": depth, "K0": K, "K1": K, "T_0to1": T_0to1}


def test_both_kinds_of_labels_give_the_same_loss():
    model = tiny_interface()
    by_homography = model(pairs(2), labels=shift_labels(2)).loss
    assert by_homography.ndim == 0
    assert by_homography > 0
    assert torch.equal(model(pairs(2), labels={"H_0to1": shift_labels(2)}).loss, by_homography)
    by_depth = model(pairs(2), labels=depth_labels(2)).loss
    torch.testing.assert_close(by_depth, by_homography, rtol=0.2, atol=0)
    assert model(pairs(2)).loss is None


def test_the_loss_is_that_of_training():
    from eloftr_ops.integrations.transformers.labels import _batch
    from eloftr_ops.training.batches import TrainingBatch

    model, pixel_values = tiny_interface(), pairs(2)
    images = pixel_values[:, 0, :1], pixel_values[:, 1, :1]
    batch = TrainingBatch(*_batch(images, shift_labels(2), False))
    losses = batch_losses(model.matcher, batch, model.loss_config)
    expected = sum(w * loss for w, loss in zip(term_weights(model.loss_config), losses, strict=False))
    torch.testing.assert_close(model(pixel_values, labels=shift_labels(2)).loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("homography", TypeError, "labels: expected a tensor"),
        ({"H": torch.eye(3)[None]}, ValueError, "labels: expected H_0to1, or depth0"),
        (torch.eye(3), ValueError, r"labels: H_0to1: expected shape \(1, 3, 3\), got \(3, 3\)"),
        (torch.eye(3).long()[None], TypeError, "labels: H_0to1: expected a floating point tensor"),
        ({**depth_labels(), "depth0": torch.ones(1, 8, 8)}, ValueError, "labels: depth0: expected shape"),
    ],
)
def test_bad_labels_are_named(labels, error, message):
    with pytest.raises(error, match=message):
        tiny_interface()(pairs(1), labels=labels)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_recomputed_features_give_the_same_gradients_and_statistics():
    plain, saving = tiny_interface().train(), tiny_interface().train()
    saving.gradient_checkpointing_enable()
    assert saving.is_gradient_checkpointing
    kept = []
    for model in (plain, saving):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(pairs(2), labels=shift_labels(2))
        kept.append(size)
        output.loss.backward()
    assert kept[1] < 0.8 * kept[0]
    for first, second in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(first[1].grad, second[1].grad, rtol=1e-3, atol=1e-5, msg=first[0])
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(saving.get_buffer(name), buffer, msg=name)


def test_statistics_of_every_batch_norm_move_once_per_step():
    model = tiny_interface().train()
    model(pairs(2), labels=shift_labels(2)).loss.backward()
    counts = {name: int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {1}
    assert model.training
    assert all(module.training for module in model.matcher.modules())
    assert not any(module.training for module in model.eval().matcher.modules())


def test_a_plain_loop_learns():
    torch.manual_seed(0)
    model = tiny_interface().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(pixel_values=pairs(2), labels=shift_labels(2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_transformers_trainer_learns(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = tiny_interface()
    data = [{"pixel_values": pairs(1)[0], "labels": shift_labels()[0]} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_steps=4,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
