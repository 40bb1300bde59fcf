# SPDX-License-Identifier: Apache-2.0
"""Files and names, Auto classes, register(), pipelines, and the code blocks of transformers' documentation page."""

import importlib.metadata
import json

import pytest
import torch
import transformers
from conftest import operator_input, pairs, tiny_interface
from PIL import Image

import eloftr_ops.integrations.transformers as interface
from eloftr_ops import EfficientLoFTR
from eloftr_ops.integrations.transformers._requirement import check_transformers


def photos(height=80, width=100):
    """Two gray pictures of one pair."""
    values = (pairs(1, height, width)[0, :, 0] * 255).round().to(torch.uint8)
    return [Image.fromarray(value.numpy()) for value in values]


@pytest.fixture
def registered():
    interface.register()
    yield
    interface.unregister()


def small_pipeline(folder):
    pipe = interface.pipeline(task="keypoint-matching", model=str(folder), device="cpu")
    pipe.image_processor.size = transformers.image_utils.SizeDict(height=64, width=96)
    return pipe


def same_state(first, second):
    mine, other = first.state_dict(), second.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_folders_go_both_ways_between_transformers_and_us(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    theirs, report = transformers.EfficientLoFTRForKeypointMatching.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values())
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, report = interface.EfficientLoFTRForKeypointMatching.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(report.values())
    assert same_state(loaded, model)
    assert loaded.config.to_eloftr_ops() == model.config.to_eloftr_ops()
    operator = EfficientLoFTR.from_pretrained(tmp_path / "ours")
    assert same_state(operator, model.matcher)
    features = interface.EfficientLoFTRModel.from_pretrained(tmp_path / "ours")
    assert same_state(features, model.efficientloftr)


def test_what_the_operator_writes_is_loaded_in_every_layout(model, tmp_path):
    for layout in ("eloftr_ops", "authors"):
        model.matcher.save_pretrained(tmp_path / layout, layout=layout)
        loaded = interface.EfficientLoFTRForKeypointMatching.from_pretrained(tmp_path / layout)
        assert same_state(loaded, model)
        assert loaded.config.to_eloftr_ops() == model.config.to_eloftr_ops()
        assert not loaded.training


def test_embedded_weights_take_the_usual_arguments():
    load = interface.AutoModelForKeypointMatching.from_pretrained
    model = load("small", dtype=torch.float16, coarse_matching_threshold=0.4)
    assert model.dtype == torch.float16
    assert model.config.coarse_matching_threshold == model.matcher.config.threshold == 0.4
    assert load("small", dtype="auto", device_map="cpu").dtype == torch.float32
    with pytest.raises(ValueError, match="revision: expected None"):
        load("small", revision="v1")


def test_dtype_and_configuration_arguments_of_a_folder(tiny_folder):
    model = interface.AutoModelForKeypointMatching.from_pretrained(
        tiny_folder, dtype=torch.bfloat16, coarse_matching_border_removal=0, revision="main"
    )
    assert model.dtype == model.matcher.dtype == torch.bfloat16
    assert model.config.coarse_matching_border_removal == 0


def test_missing_weights_are_initialised_and_reported(tiny_folder, tmp_path):
    import safetensors.torch

    state = safetensors.torch.load_file(tiny_folder / "model.safetensors")
    left_out = next(name for name in state if name.endswith("q_proj.weight"))
    del state[left_out]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    model, report = interface.EfficientLoFTRForKeypointMatching.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {left_out}
    assert model.state_dict()[left_out].isfinite().all()
    assert model.state_dict()[left_out].abs().max() > 0


def test_weights_of_another_model_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "superglue"}))
    for load in (interface.AutoModelForKeypointMatching, interface.EfficientLoFTRModel):
        with pytest.raises(ValueError, match="model_type: expected 'efficientloftr', got 'superglue'"):
            load.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(ValueError, match="image_processor_type: expected EfficientLoFTRImageProcessor, got ViT"):
        interface.AutoImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected an EfficientLoFTRConfig, got SuperGlueConfig"):
        interface.AutoModelForKeypointMatching.from_config(transformers.SuperGlueConfig())


def test_the_operators_transformers_layout_serves_transformers_pipeline(model, tmp_path):
    model.matcher.config = model.matcher.config.replace(centred_subpixel=True)
    with pytest.warns(UserWarning, match="centred_subpixel"):
        model.matcher.save_pretrained(tmp_path / "folder", layout="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert dict(processor.size) == {"height": 480, "width": 640}
    assert interface.AutoImageProcessor.from_pretrained(tmp_path / "folder", backend="pil").do_grayscale


def test_registered_classes_come_from_transformers_own_names_and_go_again(tiny_folder):
    task = transformers.pipelines.PIPELINE_REGISTRY.supported_tasks["keypoint-matching"]
    before = task["impl"]
    interface.register()
    interface.register()
    try:
        assert transformers.AutoConfig.from_pretrained(tiny_folder).__class__ is interface.EfficientLoFTRConfig
        ours = transformers.AutoModelForKeypointMatching.from_pretrained(tiny_folder)
        assert type(ours) is interface.EfficientLoFTRForKeypointMatching
        assert type(transformers.AutoModel.from_pretrained(tiny_folder)) is interface.EfficientLoFTRModel
        processor = transformers.AutoImageProcessor.from_pretrained(tiny_folder, backend="pil")
        assert type(processor) is interface.EfficientLoFTRImageProcessorPil
        pipe = transformers.pipeline("keypoint-matching", model=str(tiny_folder))
        assert type(pipe) is interface.KeypointMatchingPipeline
    finally:
        interface.unregister()
        interface.unregister()
    theirs = transformers.AutoModelForKeypointMatching.from_pretrained(tiny_folder)
    assert type(theirs) is transformers.EfficientLoFTRForKeypointMatching
    assert task["impl"] == before


def test_operator_classes_and_pipeline_give_the_same_matches(tiny_folder):
    pipe, images = small_pipeline(tiny_folder), photos()
    found = pipe(images)
    pixel_values = pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        matches = pipe.model.matcher(operator_input(pixel_values))
        (processed,) = pipe.image_processor.post_process_keypoint_matching(
            pipe.model(pixel_values), [[(image.height, image.width) for image in images]]
        )
    scale = torch.tensor([100 / 96, 80 / 64])
    order = matches["confidence"].argsort(descending=True, stable=True)
    assert len(found) == len(order) > 0
    for side in (0, 1):
        expected = matches[f"keypoints{side}"] * scale
        torch.testing.assert_close(processed[f"keypoints{side}"], expected, rtol=0, atol=1e-4)
        piped = torch.tensor([[m[f"keypoint_image_{side}"][axis] for axis in "xy"] for m in found])
        torch.testing.assert_close(piped, expected[order], rtol=0, atol=1e-4)
    scores = [match["score"] for match in found]
    assert scores == sorted(scores, reverse=True)


def test_several_pairs_and_a_batch_size_give_the_same(tiny_folder, tmp_path):
    pipe, images = small_pipeline(tiny_folder), photos()
    paths = [str(tmp_path / f"{i}.png") for i in (0, 1)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    alone = pipe(tuple(paths))
    middle = alone[len(alone) // 2]["score"]
    assert pipe([images, images[::-1]])[0] == alone
    batched = pipe([paths, paths[::-1], images], batch_size=2)
    assert [len(one) for one in batched] == [len(alone), len(batched[1]), len(alone)]
    for mine, expected in zip(batched[0], alone, strict=True):
        assert mine["score"] == pytest.approx(expected["score"], rel=1e-4)
    kept = pipe(paths, threshold=middle)
    assert kept == [match for match in alone if match["score"] > middle]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "got NoneType"),
        ("one.png", "got str"),
        ([], "got an empty list"),
        (["a.png"], "got a list of 1 image"),
        (["a.png"] * 3, "got a list of 3 images"),
        ([["a.png"] * 2, ["a.png"]], r"inputs\[1\]: expected a pair of images, got 1 images"),
        ([[1, 2]], r"inputs\[0\]: expected paths, URLs or Pillow images, got int"),
        (["missing.png"] * 2, "missing.png: expected an image file"),
        (["http://127.0.0.1:9/a.png"] * 2, "expected an image that can be fetched.*save the image to a file"),
    ],
)
def test_bad_inputs_of_a_pipeline_are_named(tiny_folder, inputs, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline(tiny_folder)(inputs)


def test_bad_arguments_of_a_pipeline_are_named(tiny_folder):
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\], got 2"):
        small_pipeline(tiny_folder)(photos(), threshold=2)
    with pytest.raises(ValueError, match="task: expected 'keypoint-matching', got 'ner'"):
        interface.pipeline("ner")


BLOCKS = """
from {module} import AutoImageProcessor, AutoModelForKeypointMatching
import torch

images = [image1, image2]
processor = AutoImageProcessor.from_pretrained(name)
model = AutoModelForKeypointMatching.from_pretrained(name)
inputs = processor(images, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
image_sizes = [[(image.height, image.width) for image in images]]
processed_outputs = processor.post_process_keypoint_matching(outputs, image_sizes, threshold=0.2)
for i, output in enumerate(processed_outputs):
    for keypoint0, keypoint1, matching_score in zip(
        output["keypoints0"], output["keypoints1"], output["matching_scores"]
    ):
        lines.append((keypoint0.numpy(), keypoint1.numpy(), float(matching_score)))
visualized_images = processor.visualize_keypoint_matching(images, processed_outputs)
"""


@pytest.mark.parametrize("module", ["eloftr_ops.integrations.transformers", "transformers"])
def test_the_documentation_pages_code_runs_with_one_import_changed(module, tiny_folder, registered):
    scope = {"name": str(tiny_folder), "lines": [], **dict(zip(("image1", "image2"), photos(), strict=True))}
    exec(BLOCKS.format(module=module), scope)
    assert all(keypoint.dtype.kind == "f" for keypoint, *_ in scope["lines"])
    assert scope["visualized_images"][0].size == (200, 80)


def test_without_transformers_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.57.0")
    with pytest.raises(ImportError, match=r"expected version 5 or newer, got 4\.57\.0.*eloftr-ops\[transformers\]"):
        check_transformers()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"found none.*eloftr-ops\[transformers\]"):
        check_transformers()


def test_config_from_a_tiny_model_builds_the_same_architecture():
    model = interface.AutoModelForKeypointMatching.from_config(tiny_interface().config)
    assert model.state_dict().keys() == tiny_interface().state_dict().keys()
