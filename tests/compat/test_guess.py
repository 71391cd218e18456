"""Where noise goes in architectures of other people when no sites are given: the stem and the end of every branch."""

from __future__ import annotations

import pytest
import torch

import learn2perturb as l2p

pytestmark = pytest.mark.compat


def test_an_attention_whose_projection_is_no_call_is_perturbed_at_its_dropout(torchvision):
    network = torchvision.models.vision_transformer.VisionTransformer(32, 8, 2, 2, 48, 96, num_classes=10)
    layers = [f"encoder.layers.encoder_layer_{i}.{end}" for i in (0, 1) for end in ("dropout", "mlp.3")]
    assert l2p.noise_sites(l2p.perturb(network)) == ["conv_proj", *layers]


def test_a_branch_that_ends_in_a_layer_scale_is_perturbed_there(timm):
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_classes=10, init_values=1e-5
    )
    l2p.perturb(network)
    assert l2p.noise_sites(network) == ["patch_embed.proj", *(f"blocks.{i}.ls{j}" for i in (0, 1) for j in (1, 2))]
    # The patches are an image, channels first; everything after them is tokens, channels last.
    assert [module.channel_dim for module in network.modules() if hasattr(module, "channel_dim")] == [0, 1, 1, 1, 1]


def test_blocks_without_a_shortcut_have_no_site(torchvision):
    network = torchvision.models.mobilenet_v3_small(num_classes=10)
    l2p.perturb(network)
    residual = [
        name
        for name, module in network.named_modules()
        if getattr(module, "use_res_connect", False)
    ]  # fmt: skip
    assert len(residual) == 6
    sites = l2p.noise_sites(network)
    assert sites[0] == "features.0.1"
    assert [site.partition(".block")[0] for site in sites[1:]] == residual
    network.eval()
    with torch.no_grad():
        x = torch.rand(2, 3, 32, 32)
        assert not torch.equal(network(x), network(x))
