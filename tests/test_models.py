"""The small architectures: the published layout, and timm's interface."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import models
from utils import UserError

# Names and shapes of the checkpoints published with 'Contrastive Representation Distillation'.
PUBLISHED = json.loads((Path(__file__).parent / "zoo_keys.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_checkpoints(name):
    state = timm.create_model(name, num_classes=100).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == PUBLISHED[name]


@pytest.mark.parametrize("name", timm.list_models("cifar_*"))
def test_timms_interface(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    for size in (8, 13, 32):
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)
    features = model.forward_features(torch.zeros(2, 1, 32, 32))
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.pretrained_cfg["classifier"] == "fc" and model.get_classifier() is model.fc
    model.reset_classifier(3)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_layer_decay_gives_lower_rates_to_lower_layers():
    model = timm.create_model("cifar_resnet20", num_classes=10)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    rates = [scale[id(m.weight)] for m in (model.conv1, model.layer2[0].conv1, model.fc)]
    assert rates[0] < rates[1] < rates[2] == 1.0


def test_near_names_are_told_for_an_unknown_architecture():
    with pytest.raises(UserError, match="cifar_resnet20"):
        models.create_model("cifar_resnet_20", 10, 32)


def test_a_vit_is_built_for_the_size_asked_for():
    model = models.create_model("vit_tiny_patch16_224", 10, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_an_image_too_small_for_the_network_is_told_before_training():
    with pytest.raises(UserError, match="larger input size"):
        models.create_model("convnext_atto", 10, 8)


def test_an_input_that_would_lose_pixels_between_patches_is_refused():
    with pytest.raises(UserError, match="50 pixels are not whole patches of 16.* of 48 or 64"):
        models.create_model("vit_tiny_patch16_224", 10, 50)
