"""A student of a stack on its own, as PyTorch's modules."""

from torch import nn


def single(stack, index):
    """Network `index` of a stack as an nn.Sequential."""
    layers = []
    for w, b in zip(stack.weights, stack.biases, strict=True):
        layer = nn.Linear(w.shape[2], w.shape[1])
        layer.weight.data.copy_(w[index])
        layer.bias.data.copy_(b[index, 0])
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])
