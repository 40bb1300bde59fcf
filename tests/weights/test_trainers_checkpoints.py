# SPDX-License-Identifier: Apache-2.0
"""What trainers write around the weights, and the ways in which transformers stores them."""

import json
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eloftr_ops.weights import WeightsNotFoundError, load_pretrained
from support.weights import randomise, same_weights, shard, tiny_model


class Module(nn.Module):
    """As of a trainer: the matcher, and a loss with parameters of its own."""

    def __init__(self, matcher, seed=0):
        super().__init__()
        self.matcher = matcher
        self.loss = nn.Linear(2, 2)


def other(seed):
    model = tiny_model()
    randomise(model, seed)
    return model


def prefixed(model, prefix):
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def load(tmp_path, content, **options):
    torch.save(content, tmp_path / "last.ckpt")
    return load_pretrained(tmp_path / "last.ckpt", config=tiny_model().config, **options)


@pytest.mark.parametrize("prefix", ["module.", "module.matcher.", "_orig_mod.module.net.matcher.", "a.b."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    model = tiny_model()
    assert same_weights(load(tmp_path, {"model": prefixed(model, prefix)}), model)
    safetensors.torch.save_file(prefixed(model, prefix), tmp_path / "x.safetensors")
    assert same_weights(load_pretrained(tmp_path / "x.safetensors", config=model.config), model)


def test_wrappers_inside_a_name_are_taken_off(tmp_path):
    model = tiny_model()
    state = {n.replace("backbone.", "backbone._orig_mod."): t for n, t in model.state_dict().items()}
    assert same_weights(load(tmp_path, state), model)


def test_a_lightning_checkpoint_with_a_loss_and_an_optimizer(tmp_path):
    module = Module(tiny_model())
    optimizer = torch.optim.AdamW(module.parameters())
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    content = {"epoch": 3, "state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    assert same_weights(load(tmp_path, content), module.matcher)


def test_an_averaged_model_is_one_set(tmp_path):
    model = tiny_model()
    assert same_weights(load(tmp_path, AveragedModel(model).state_dict()), model)


def test_two_different_sets_ask_which(tmp_path):
    first, second = other(1), other(2)
    content = {"model": prefixed(first, "module."), "ema": {"model": second.state_dict()}}
    with pytest.raises(ValueError, match=r"2 different sets: 'model.module', 'ema.model'.*entry='model.module'"):
        load(tmp_path, content)
    assert same_weights(load(tmp_path, content, entry="ema.model"), second)
    with pytest.raises(ValueError, match=r"entry: expected one of .*'ema.model'.*got 'ema'"):
        load(tmp_path, content, entry="ema")


def test_student_and_teacher_in_one_state_ask_which(tmp_path):
    student, teacher = other(1), other(2)
    content = {"state_dict": {**prefixed(student, "matcher."), **prefixed(teacher, "matcher.teacher.")}}
    with pytest.raises(ValueError, match="2 different sets"):
        load(tmp_path, content)
    assert same_weights(load(tmp_path, content, entry="state_dict.matcher.teacher"), teacher)


def test_two_equal_sets_are_one(tmp_path):
    model = tiny_model()
    assert same_weights(load(tmp_path, {"state_dict": model.state_dict(), "ema": model.state_dict()}), model)


def test_a_dictionary_that_holds_itself_is_searched_once(tmp_path):
    content = {"state_dict": tiny_model().state_dict()}
    content["self"] = content
    assert same_weights(load(tmp_path, content), tiny_model())


def test_compressed_records_are_refused_before_they_are_unpacked(tmp_path):
    torch.save({"zeros": torch.zeros(10**6)}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / "bomb.ckpt").stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"bomb.ckpt: refused: .* as torch.save writes them"):
        load_pretrained(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize("layout", ["transformers", "eloftr_ops"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_in_shards(tmp_path, layout, suffix):
    model = tiny_model()
    model.save_pretrained(tmp_path, layout=layout)
    shard(tmp_path, suffix)
    assert same_weights(load_pretrained(tmp_path), model)
    next(tmp_path.glob(f"*-00002.{suffix}")).unlink()
    with pytest.raises(WeightsNotFoundError, match=r"index.json: expected the file \w+-0000\d-of-00002"):
        load_pretrained(tmp_path)


def test_a_folder_with_a_pickled_file(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, layout="transformers")
    torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert same_weights(load_pretrained(tmp_path), model)


def test_a_variant_is_found_and_two_ask_which(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, layout="transformers")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    assert same_weights(load_pretrained(tmp_path), model)
    assert same_weights(load_pretrained(tmp_path, variant="fp16"), model)
    with pytest.raises(WeightsNotFoundError, match=r"model.fp32.safetensors: expected the weights of variant"):
        load_pretrained(tmp_path, variant="fp32")
    (tmp_path / "model.bf16.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"variants bf16, fp16. Pass variant="):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_shards_outside_of_the_folder_are_refused(tmp_path, name):
    tiny_model().save_pretrained(tmp_path / "m")
    shard(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="expected the names of 1 to 1000 files beside it"):
        load_pretrained(tmp_path / "m")
