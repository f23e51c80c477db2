"""The predicted peak of a training step."""

import itertools
from dataclasses import replace

import pytest

from r1kernels.memory import ITEMSIZE, MODES, OPTIMIZERS, peak_bytes
from r1kernels.memory_events import Account, Gradients, Layer
from r1kernels.model_shape import NAMED, ModelShape

SHAPE = ModelShape(hidden=48, layers=3, heads=6, kv_heads=2, head_dim=16, intermediate=80, vocab=97)


def test_every_layer_frees_what_it_allocates():
    for itemsize, fused, tile, norm, save in itertools.product(
        (2, 4), (False, True), (0, 5), (False, True), (False, True)
    ):
        shape = replace(SHAPE, qk_norm=norm, qkv_bias=True)
        layer = Layer(shape, 11, 11, itemsize, fused, tile, "flash2", 1)
        account = Account({"residual": layer.x})
        layer.forward(account, save)
        if save:
            layer.backward(account, Gradients(itemsize, itemsize, False))
        else:
            account.drop("residual", layer.x)
        # the layer's output, or the gradient that took its place
        account.drop("residual", layer.x if save else 0)
        left = {name: size for name, size in account.live.items() if size}
        grown = {"gradients": itemsize * shape.layer_params} if save else {}
        assert left == {"residual": layer.x, **grown}, (itemsize, fused, tile, norm, save)
        assert min(account.live.values()) >= 0


def test_parts_add_up():
    for mode, dtype, optimizer in itertools.product(MODES, ITEMSIZE, OPTIMIZERS):
        found = peak_bytes(NAMED["qwen2.5-1.5b"], 4096, mode=mode, dtype=dtype, optimizer=optimizer)
        assert sum(found.parts.values()) == found.device and min(found.parts.values()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "mode must be one of plain, checkpoint"),
        ({"dtype": "float64"}, "dtype must be one of float32"),
        ({"optimizer": "sgd"}, "optimizer must be one of none, adamw"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
        ({"attention": "eager"}, "attention must be one of flash2"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        peak_bytes(SHAPE, **{"tokens": 4, **options})
