"""A Monitor on a network of transformers, whose attention has a module for each projection.

Runs where transformers is installed: `make test-integrations` does it.
"""

import copy

import pytest
import torch
from torch import nn

from ghl.alignment import Monitor
from tests.alignment.test_against_autograd import check

transformers = pytest.importorskip("transformers")


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).train()


def loss(model):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [1]])).long()
    return model(input_ids=tokens, attention_mask=mask, labels=torch.tensor([0, 1, 1, 0])).loss


@pytest.mark.parametrize("rule", ["hebb", "ghl"])
def test_every_linear_layer_of_a_bert(rule):
    """Against plain autograd: queries, keys, values, outputs and feed-forward of two layers."""
    model = bert()
    assert sum(type(m) is nn.Linear for m in model.modules()) == 14
    assert any("attention.self.query" in name for name, _ in model.named_modules())
    check(model, loss, rule)


def test_its_training_is_bit_identical():
    weights = []
    for monitored in (False, True):
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        monitor = Monitor(model, every=2) if monitored else None
        for _ in range(4):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        weights.append(copy.deepcopy(model.state_dict()))
        if monitor:
            assert all(found["update"] for found in monitor.report().values())
            monitor.remove()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
