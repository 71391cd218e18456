import torch
from torch import nn

from learn2perturb.engine.identity import fingerprint, fingerprint_of_images, fingerprint_of_weights


def test_layout_does_not_count_and_values_do():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = fingerprint_of_weights(network)
    assert fingerprint_of_weights(network.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1e-6
    assert fingerprint_of_weights(network) != before


def test_names_types_shapes_and_order_count():
    x = torch.zeros(2, 3)
    base = fingerprint([("x", x)])
    others = ([("y", x)], [("x", x.double())], [("x", x.view(3, 2))], [("x", x), ("x", x)], [])
    assert len({base, *(fingerprint(other) for other in others)}) == 6


def test_every_dtype_of_a_state_dict_has_a_fingerprint():
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64):
        assert fingerprint([("x", torch.ones(3, dtype=dtype))]) != fingerprint([("x", torch.zeros(3, dtype=dtype))])
    assert len(fingerprint([("scalar", torch.tensor(1.0))])) == 16


def test_images_and_labels_both_count():
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
    assert (
        len({fingerprint_of_images(x, y), fingerprint_of_images(x, y.flip(0)), fingerprint_of_images(x.flip(0), y)})
        == 3
    )
