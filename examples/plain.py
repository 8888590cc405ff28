"""A swapped model in a loop of PyTorch's own, with accumulation over two micro-batches.

Without accumulation nothing but the call of `swap` would differ from ordinary training.
"""

import torch
from data import Witness, digits, loss_of, network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import ghl


def main() -> None:
    """Train, and check that it did something."""
    torch.manual_seed(0)
    model = network()
    print(ghl.swap(model, rule="ghl", tau=1.0))
    groups = ghl.param_groups(model, lr=0.1, lr_hebb=0.01)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    ghl.synchronize(model, optimizer)
    witness, first = Witness(model, optimizer), loss_of(model)
    for _ in range(5):
        for step, (images, classes) in enumerate(DataLoader(digits(), 32, shuffle=True)):
            cross_entropy(model(images), classes).div(2).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    witness.check(first, loss_of(model))


if __name__ == "__main__":
    main()
