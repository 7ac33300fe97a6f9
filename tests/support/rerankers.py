"""Tiny cross-encoders: random weights with the tokenizer of the embedded encoder."""

from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from pipeline.decoding.types import Passage, RetrievedPassage
from pipeline.demo_models import build_demo_encoder


def write_classifier(folder: Path, labels: int = 1) -> Path:
    """Write a classifier of pairs as transformers does, without the files of sentence-transformers."""
    tokenizer = AutoTokenizer.from_pretrained(build_demo_encoder())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.2, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """Write a cross-encoder as sentence-transformers does."""
    plain = write_classifier(folder.with_name(f"{folder.name}-plain"), labels)
    CrossEncoder(str(plain), local_files_only=True).save_pretrained(str(folder), create_model_card=False)
    return folder


def find(name: str, text: str, rank: int) -> RetrievedPassage:
    """A passage that a search has found."""
    return RetrievedPassage(Passage(name, "", text), 1.0 / rank, rank)
