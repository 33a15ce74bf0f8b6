"""A small vocabulary and models for the training code."""

import pytest
import torch

from training import train
from training.labels import Labeller, find_slots
from training.rows import Speller
from training.vocabulary import build_bpe


@pytest.fixture(scope="session")
def speller() -> Speller:
    return Speller(build_bpe(0, count=60))


@pytest.fixture(scope="session")
def labeller() -> Labeller:
    return Labeller(find_slots(0, count=80))


@pytest.fixture
def models(speller: Speller) -> tuple:
    torch.manual_seed(0)
    return train.build_models(speller.bpe.get_vocab_size())
